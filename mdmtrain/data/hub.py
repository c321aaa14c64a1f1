"""Tokenizers as model folders on the hub have them, tokenizer.json: ours written for others, theirs read for us.

A foreign tokenizer is kept in one file, as ours are: a JSON object with the tokenizer.json and the names of its bos,
eos, pad and mask tokens. `Tokenizer` takes either kind.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

ROLES = ("bos", "eos", "pad", "mask")
SPACE_MARK, ESCAPE = "\u2581", "\U0010f581"  # see tokenizer.py


def _library():
    try:
        import tokenizers
    except ImportError:
        raise ValueError("tokenizer.json needs the tokenizers library: pip install mdmtrain[transformers]") from None
    return tokenizers


class HubPieces:
    """A foreign tokenizer with the methods of a SentencePieceProcessor that `Tokenizer` uses."""

    def __init__(self, model: bytes):
        """model: what `bundle` gave. Raises ValueError where it is none, or the library is missing."""
        library = _library()
        try:
            content = json.loads(model)
            self.names: dict[str, str] = content["roles"]
            self.content: dict = content["tokenizer"]
            self._tokenizer = library.Tokenizer.from_str(json.dumps(self.content))
        except Exception:  # the library raises Exception itself
            raise ValueError("no JSON of a tokenizer and its roles") from None
        self._tokenizer.encode_special_tokens = True  # text never becomes a reserved id
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def get_piece_size(self) -> int:
        return max(self._vocabulary.values()) + 1

    def piece_to_id(self, piece: str) -> int:
        return self._vocabulary.get(piece, -1)

    def id_to_piece(self, number: int) -> str:
        return self._tokenizer.id_to_token(number) or ""  # a foreign vocabulary may have holes

    def unk_id(self) -> int:
        return self.piece_to_id(self.content["model"].get("unk_token") or "")


def bundle(folder: Path, config: dict, add_missing: bool) -> tuple[bytes, int]:
    """The tokenizer of a foreign model folder as one file, and its vocabulary size before anything was added.

    config: the model's config.json, which may name a role's id where tokenizer_config.json names no token. A role that
    neither names gets a new token at the end of the vocabulary if `add_missing`. Raises ValueError.
    """
    library, settings = _library(), folder / "tokenizer_config.json"
    try:
        tokenizer = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except Exception:  # the library raises Exception itself
        raise ValueError(f"{folder} has no readable tokenizer.json: copy the model's tokenizer files there") from None
    size, roles = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, {}
    for role in ROLES:
        token, number = named.get(f"{role}_token"), config.get(f"{role}_token_id")
        token = token["content"] if isinstance(token, dict) else token
        number = number[0] if isinstance(number, list) else number
        if token is None and number is not None:
            token = tokenizer.id_to_token(number)
        if token is not None or add_missing:
            roles[role] = token or f"<|mdm_{role}|>"
    # All of them special: text that spells one is then never taken for it.
    tokenizer.add_special_tokens(
        [library.AddedToken(token, normalized=False, special=True) for token in roles.values()]
    )
    content = {"roles": roles, "tokenizer": json.loads(tokenizer.to_str())}
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode(), size


def hub_files(model: bytes) -> dict[str, bytes]:
    """The files that give transformers' AutoTokenizer the ids of the tokenizer in `model`: name -> content."""
    if model[:1] == b"{":
        pieces, files = HubPieces(model), {}
        content, names = pieces.content, pieces.names
    else:
        pieces, files = sentencepiece.SentencePieceProcessor(model_proto=model), {"tokenizer.model": model}
        content = _converted(pieces)
        numbers = (pieces.bos_id(), pieces.eos_id(), pieces.pad_id(), pieces.piece_to_id("<mask>"))
        names = {role: pieces.id_to_piece(number) for role, number in zip(ROLES, numbers, strict=True)}
    settings = {f"{role}_token": name for role, name in names.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["split_special_tokens"] = True  # as ours: text that spells <mask> is text
    texts = {"tokenizer.json": content, "tokenizer_config.json": settings}
    return files | {name: json.dumps(text, ensure_ascii=False, indent=1).encode() for name, text in texts.items()}


def _converted(pieces: sentencepiece.SentencePieceProcessor) -> dict:
    """A sentencepiece BPE model of ours as a tokenizer.json, our escape of U+2581 included.

    sentencepiece merges the neighbours whose union has the best score, so every way to split a piece into two others is
    a merge, in the order of the scores.
    """
    numbers = range(pieces.get_piece_size())
    reserved = [i for i in numbers if pieces.is_control(i) or pieces.is_unknown(i)]
    ordinary = {pieces.id_to_piece(i): i for i in numbers if i not in reserved and not pieces.is_byte(i)}
    if any(pieces.get_score(i) % 1 for i in ordinary.values()):  # BPE scores are ranks
        raise ValueError("the tokenizer is a sentencepiece model, but not BPE: a tokenizer.json of it would differ")
    merges = [
        (-pieces.get_score(i), ordinary[piece[:k]], ordinary[piece[k:]], [piece[:k], piece[k:]])
        for piece, i in ordinary.items()
        for k in range(1, len(piece))
        if piece[:k] in ordinary and piece[k:] in ordinary
    ]

    def swaps(*pairs: tuple[str, str]) -> list[dict]:
        return [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    escape = swaps((ESCAPE, ESCAPE + "0"), (SPACE_MARK, ESCAPE + "1"), (" ", SPACE_MARK))
    back = [*swaps((SPACE_MARK, " ")), {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += swaps((ESCAPE + "1", SPACE_MARK), (ESCAPE + "0", ESCAPE))
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces.id_to_piece(i), **flags} for i in reserved],
        "normalizer": {"type": "Sequence", "normalizers": escape},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE",
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "byte_fallback": True,
            "fuse_unk": True,
            "vocab": {pieces.id_to_piece(i): i for i in numbers},
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }
