"""Make a sentencepiece model usable as our tokenizer: it must not change text, and reserved ids are control pieces.

sentencepiece writes spaces as U+2581, so a U+2581 in the text would be decoded as a space. It is therefore escaped with
a private-use character that almost no text contains. This character is escaped too, so that each string has exactly one
escaped form.
"""

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as protobuf

from mdmtrain.data.lossless import ESCAPE, PREFIX, ROLES, SPACE_MARK

PIECE = protobuf.ModelProto.SentencePiece
MASKS = ("<mask>", "<|mdm_mask|>")  # the mask's piece: in our models and many others, or added by `adapted`
MODEL_TYPES = {protobuf.TrainerSpec.BPE: "BPE", protobuf.TrainerSpec.UNIGRAM: "Unigram"}  # tokenizer.json's names


def escape(text: str) -> str:
    return text.replace(ESCAPE, ESCAPE + "0").replace(SPACE_MARK, ESCAPE + "1")


def unescape(text: str) -> str:
    return text.replace(ESCAPE + "1", SPACE_MARK).replace(ESCAPE + "0", ESCAPE)


def _roles(proto: protobuf.ModelProto) -> dict[str, str]:
    """role -> its control piece, for each role that has one."""
    training = proto.trainer_spec
    names = {}
    controls = {number: piece.piece for number, piece in enumerate(proto.pieces) if piece.type == PIECE.CONTROL}
    masks = [number for number, piece in controls.items() if piece in MASKS]
    for role, number in zip(ROLES, (training.bos_id, training.eos_id, training.pad_id, *masks[-1:]), strict=False):
        if number in controls:
            names[role] = controls[number]
    return names


def adapted(model: bytes) -> tuple[bytes, int, list[str]]:
    """(adapted model, original vocabulary size, notes on the changes) for a foreign sentencepiece model.

    Steps that change text are disabled, and each role without a control piece gets a new one at the end of the
    vocabulary. Existing ids do not change. If no change is needed, the result is `model` itself. Raises ValueError if
    `model` is not a sentencepiece model.
    """
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(model)
        proto = protobuf.ModelProto.FromString(model)
    except (RuntimeError, OSError, DecodeError):
        raise ValueError("it is not a sentencepiece model") from None
    rules = proto.normalizer_spec
    training = proto.trainer_spec
    size = len(proto.pieces)
    notes = []
    if rules.precompiled_charsmap:
        notes.append(f"normalization {rules.name or 'of its own'} is off")
        rules.name = "identity"
        rules.precompiled_charsmap = b""
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
        number = len(proto.pieces)
        name = f"<|mdm_{role}|>"
        proto.pieces.add(piece=name, type=PIECE.CONTROL)
        if role != "mask":
            setattr(training, f"{role}_id", number)
            setattr(training, f"{role}_piece", name)
        notes.append(f"{role} is the new token {name}, {number}")
    return (proto.SerializeToString() if notes else model), size, notes


class SentencePieces:
    """The pieces of a sentencepiece model file. Encodes and decodes text, and lists the reserved ids."""

    def __init__(self, model: bytes):
        """model: the content of a sentencepiece model file. Raises ValueError if it is not, or changes text."""
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError):
            raise ValueError("it is not a sentencepiece model") from None
        proto = protobuf.ModelProto.FromString(model)
        rules = proto.normalizer_spec
        training = proto.trainer_spec
        self.pieces = list(proto.pieces)  # each has a piece, a score and a type
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
            raise ValueError(f"it does not preserve text: train yours with {missing}, or train one with --vocab-size")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(escape(text))

    def decode(self, ids: list[int]) -> str:
        return unescape(self._processor.decode(ids))

    def get_piece_size(self) -> int:
        return len(self.pieces)

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece; the id of the unknown piece if the model does not have the piece."""
        return self._processor.piece_to_id(piece)

    def id_to_piece(self, number: int) -> str:
        return self.pieces[number].piece

    def unk_id(self) -> int:
        return self._processor.unk_id()

    def of_type(self, *types: int) -> list[int]:
        return [i for i, piece in enumerate(self.pieces) if piece.type in types]

    def reserved(self) -> set[int]:
        """Ids that no text is encoded as."""
        return set(self.of_type(PIECE.CONTROL, PIECE.UNKNOWN, PIECE.UNUSED))

    def added(self) -> list[str]:
        """User-defined pieces, which are found in text first, and special pieces, which text must not become."""
        return [self.pieces[i].piece for i in self.of_type(PIECE.CONTROL, PIECE.UNKNOWN, PIECE.USER_DEFINED)]
