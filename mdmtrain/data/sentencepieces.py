"""A sentencepiece model as our tokenizer needs it: it changes no text, and reserved ids are control pieces.

sentencepiece writes spaces as U+2581, so a U+2581 in the text would come back as a space. It is escaped with a
private-use character that next to no text contains; the escape itself is escaped too: one escaped form per string.
"""

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as protobuf

from mdmtrain.data.lossless import ESCAPE, PREFIX, ROLES, SPACE_MARK

PIECE = protobuf.ModelProto.SentencePiece
MASKS = ("<mask>", "<|mdm_mask|>")  # the mask's piece: of our models and of many, or one that `adapted` added
MODEL_TYPES = {protobuf.TrainerSpec.BPE: "BPE", protobuf.TrainerSpec.UNIGRAM: "Unigram"}  # tokenizer.json's names


def escape(text: str) -> str:
    return text.replace(ESCAPE, ESCAPE + "0").replace(SPACE_MARK, ESCAPE + "1")


def unescape(text: str) -> str:
    return text.replace(ESCAPE + "1", SPACE_MARK).replace(ESCAPE + "0", ESCAPE)


def _roles(proto: protobuf.ModelProto) -> dict[str, str]:
    """The control piece of each role that has one."""
    training, names = proto.trainer_spec, {}
    controls = {number: piece.piece for number, piece in enumerate(proto.pieces) if piece.type == PIECE.CONTROL}
    masks = [number for number, piece in controls.items() if piece in MASKS]
    for role, number in zip(ROLES, (training.bos_id, training.eos_id, training.pad_id, *masks[-1:]), strict=False):
        if number in controls:
            names[role] = controls[number]
    return names


def adapted(model: bytes) -> tuple[bytes, int, list[str]]:
    """A sentencepiece model of others with what ours needs, its size before, and what was changed, for a person.

    What changes text is switched off, and roles without a control piece get a new one at the end of the vocabulary; ids
    stay what they are. One that needs nothing is returned as it is. Raises ValueError if it is no such model.
    """
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(model)
        proto = protobuf.ModelProto.FromString(model)
    except (RuntimeError, OSError, DecodeError):
        raise ValueError("it is not a sentencepiece model") from None
    rules, training, size, notes = proto.normalizer_spec, proto.trainer_spec, len(proto.pieces), []
    if rules.precompiled_charsmap:
        notes.append(f"normalization {rules.name or 'of its own'} is off")
        rules.name, rules.precompiled_charsmap = "identity", b""
    if rules.add_dummy_prefix:
        notes.append(PREFIX)
        rules.add_dummy_prefix = False
    if rules.remove_extra_whitespaces:
        notes.append("runs of spaces are kept")
        rules.remove_extra_whitespaces = False
    if proto.denormalizer_spec.precompiled_charsmap:
        notes.append("the denormalizer is off")
        proto.ClearField("denormalizer_spec")
    for role in [role for role in ROLES if role not in _roles(proto)]:
        number, name = len(proto.pieces), f"<|mdm_{role}|>"
        proto.pieces.add(piece=name, type=PIECE.CONTROL)
        if role != "mask":
            setattr(training, f"{role}_id", number)
            setattr(training, f"{role}_piece", name)
        notes.append(f"{role} is the new token {name}, {number}")
    return (proto.SerializeToString() if notes else model), size, notes


class SentencePieces:
    """The pieces of a model file. Encodes any text, and tells which ids no text becomes."""

    def __init__(self, model: bytes):
        """model: the content of a sentencepiece model file. Raises ValueError if it is none, or changes text."""
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError):
            raise ValueError("it is not a sentencepiece model") from None
        proto = protobuf.ModelProto.FromString(model)
        rules, training = proto.normalizer_spec, proto.trainer_spec
        self.pieces = list(proto.pieces)  # each with its piece, score and type
        self.names = _roles(proto)
        if missing := [role for role in ROLES if role not in self.names]:
            raise ValueError(
                f"it has no control piece for {', '.join(missing)}: train one with --vocab-size, or add <mask> to "
                "control_symbols and set pad_id when you train yours"
            )
        if training.model_type not in MODEL_TYPES:
            raise ValueError("a sentencepiece model of words or characters: train a BPE or unigram one")
        self.model_type = MODEL_TYPES[training.model_type]
        needed = {
            "byte_fallback=True": training.byte_fallback,
            "normalization_rule_name='identity' without own rules": not rules.precompiled_charsmap,
            "add_dummy_prefix=False": not rules.add_dummy_prefix,
            "remove_extra_whitespaces=False": not rules.remove_extra_whitespaces,
            "no denormalizer": not proto.denormalizer_spec.precompiled_charsmap,
        }
        if not all(needed.values()):
            missing = ", ".join(option for option, there in needed.items() if not there)
            raise ValueError(f"it does not give text back: train yours with {missing}, or train one with --vocab-size")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(escape(text))

    def decode(self, ids: list[int]) -> str:
        return unescape(self._processor.decode(ids))

    def get_piece_size(self) -> int:
        return len(self.pieces)

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece, that of the unknown piece where there is none."""
        return self._processor.piece_to_id(piece)

    def id_to_piece(self, number: int) -> str:
        return self.pieces[number].piece

    def unk_id(self) -> int:
        return self._processor.unk_id()

    def of_type(self, *types: int) -> list[int]:
        return [i for i, piece in enumerate(self.pieces) if piece.type in types]

    def reserved(self) -> set[int]:
        """Ids that no text becomes."""
        return set(self.of_type(PIECE.CONTROL, PIECE.UNKNOWN, PIECE.UNUSED))

    def added(self) -> list[str]:
        """Pieces with a meaning of their own: tokens that text spells, or that it must not become."""
        return [self.pieces[i].piece for i in self.of_type(PIECE.CONTROL, PIECE.UNKNOWN, PIECE.USER_DEFINED)]
