"""Import and export tokenizers in the format of model folders on the Hugging Face hub (tokenizer.json).

An imported (foreign) tokenizer is stored in one file, like our own: a JSON object with the tokenizer.json, made
lossless, and the names of its bos, eos, pad and mask tokens. `Tokenizer` reads both kinds of files.
"""

import json
import logging
from pathlib import Path
from typing import Any

from mdmtrain.data.lossless import (
    ESCAPE,
    FLAGS,
    ROLES,
    SPACE_MARK,
    escaping,
    keep_apart,
    load,
    neutralise,
    replacements,
    spelled,
    tokenizers_library,
    unescaping,
    vocabulary,
)
from mdmtrain.data.sentencepieces import PIECE, SentencePieces

log = logging.getLogger("mdmtrain")


class HubPieces:
    """A third-party tokenizer with the methods of a SentencePieceProcessor that `Tokenizer` uses."""

    def __init__(self, model: bytes):
        """model: the result of `bundle`. Raises ValueError if it is anything else, or the library is missing."""
        try:
            content = json.loads(model)
            self.names: dict[str, str] = content["roles"]
            self.content: dict = content["tokenizer"]
            self._tokenizer = load(self.content)
            assert self.names.keys() == set(ROLES)
        except ValueError:
            raise
        except Exception:  # the library raises Exception itself
            raise ValueError("not a JSON object with a tokenizer and its roles") from None
        self._tokenizer.encode_special_tokens = True  # text is never encoded as a reserved id
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def get_piece_size(self) -> int:
        return max(self._vocabulary.values()) + 1

    def piece_to_id(self, piece: str) -> int:
        return self._vocabulary.get(piece, -1)

    def id_to_piece(self, number: int) -> str:
        return self._tokenizer.id_to_token(number) or ""  # a foreign vocabulary may have unused ids

    def unk_id(self) -> int:
        unknown = self.content["model"].get("unk_id")
        return self.piece_to_id(self.content["model"].get("unk_token") or "") if unknown is None else unknown

    def reserved(self) -> set[int]:
        """Ids that no text is encoded as: special tokens, the unknown piece, and ids without a piece."""
        special = {token["id"] for token in self.content["added_tokens"] if token["special"]}
        holes = set(range(self.get_piece_size())) - set(self._vocabulary.values())
        return special | holes | ({self.unk_id()} - {-1})

    def added(self) -> list[str]:
        """Added tokens: those that are found in text first, and special tokens, which text must not become."""
        return [token["content"] for token in self.content["added_tokens"]]


def bundle(file: Path, config: dict, add_missing: bool) -> tuple[bytes, int]:
    """A foreign tokenizer.json as the content of one file, made lossless, and its original vocabulary size.

    The names of bos, eos, pad and mask are read from tokenizer_config.json (or special_tokens_map.json) next to `file`,
    or their ids from config, the model's config.json. A role without a token gets a new one at the end of the
    vocabulary if `add_missing`. A role that shares its token with another role always gets a new one. Changes are
    logged. Raises ValueError.
    """
    library = tokenizers_library()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        library.Tokenizer.from_str(json.dumps(content))
    except Exception:  # the library raises Exception itself
        raise ValueError(f"{file}: not a tokenizer.json that can be read: copy the model's original file") from None
    return bundle_content(file, content, _settings(file.parent), config, add_missing)


def bundle_content(file: Path, content: dict, settings: dict, config: dict, add_missing: bool) -> tuple[bytes, int]:
    """Like `bundle`, for the content of a tokenizer.json and its settings. file: their origin, for messages."""
    usual = tokenizers_library().Tokenizer.from_str(json.dumps(content))
    try:
        content.setdefault("added_tokens", [])
        _add_from_settings(content, settings)
        content = json.loads(load(content).to_str())  # in the library's current format
        size = max(number for _, number in vocabulary(content)) + 1
        notes = neutralise(content)
        for token in content["added_tokens"]:
            if usual.token_to_id(token["content"]) not in (None, token["id"]):
                notes.append(
                    f"{token['content']!r} keeps its id in the file, {token['id']}; transformers gives it another id"
                )
                break
        names = _named(content, settings, config, notes)
        roles = _own_tokens(content, names, add_missing, notes)
        keep_apart(content)
        content = json.loads(load(content).to_str())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}, or its settings: not in the expected format ({error!r}): get the original files"
        ) from None
    if notes:
        log.warning("%s: changed so that no text is lost: %s (docs/tokenizers.md)", file, "; ".join(notes))
    return _dump(roles, content), size


def _settings(folder: Path) -> dict:
    """The settings in tokenizer_config.json, and those that only special_tokens_map.json (of older folders) has."""
    found: dict = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                found = {**dict(json.loads((folder / name).read_text(encoding="utf-8"))), **found}
            except (ValueError, TypeError):
                raise ValueError(f"{folder / name}: damaged (not a JSON object): get the original file") from None
    return found


def _text(token: str | dict | None) -> str | None:
    """The text of a token in the settings, which is either a string or an object with it. Raises ValueError."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json names {text!r} as a token: it must be a text")
    return text


def _add_from_settings(content: dict, settings: dict) -> None:
    """Add the tokens, and their `special` flags, that only tokenizer_config.json has."""
    known = {token["content"]: token for token in content["added_tokens"]}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        entry = known.setdefault(token["content"], {**FLAGS, **token, "id": int(number)})
        entry["special"] |= token.get("special", False)
        if entry["id"] != int(number):
            raise ValueError(f"{token['content']!r} has id {entry['id']}, but {number} in tokenizer_config.json")
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    for token in more.values() if isinstance(more, dict) else more:
        if _text(token) in known:
            known[_text(token)]["special"] = True
    content["added_tokens"] = list(known.values())


def _named(content: dict, settings: dict, config: dict, notes: list[str]) -> dict[str, str]:
    """The token of each role that the settings name, or that the model's configuration gives by its id.

    An id in the configuration that is an ordinary piece (often its default) is not used; a note is then added to
    `notes`.
    """
    by_id = {number: piece for piece, number in vocabulary(content)}
    names = {}
    declared = {token["content"] for token in content["added_tokens"]}
    for role in ROLES:
        token = _text(settings.get(f"{role}_token"))
        number = config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if token is None and isinstance(number, int):
            token = by_id.get(number)
            if token is not None and token not in declared and spelled(content, [token]):
                notes.append(
                    f"{role}_token_id {number} of config.json is not used, because it is the ordinary piece {token!r}"
                )
                token = None
        if token:
            names[role] = token
    return names


def _own_tokens(content: dict, names: dict, add_missing: bool, notes: list[str]) -> dict[str, str]:
    """A special token for each role, shared with no other role. Adds new tokens to `content` and changes to `notes`."""
    model = content["model"]
    tokens = {token["content"]: token for token in content["added_tokens"]}
    unknown = model.get("unk_token")
    if unknown is None and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    ordinary = spelled(content, [name for name in names.values() if name not in tokens])
    roles = {}
    taken = {unknown: "unk"} if unknown else {}
    for role in ("eos", "bos", "mask", "pad"):  # the first of several roles with the same token keeps it
        name = names.get(role)
        if name is None and not add_missing:
            raise ValueError(f"it names no {role} token: tokenizer_config.json must have {role}_token")
        if name in ordinary:
            raise ValueError(f"{role}_token {name!r} is an ordinary piece, which occurs in text: name a special token")
        if name in taken:
            notes.append(f"{role} gets a new token, because {name!r} is also {taken[name]}")
        if name is None or name in taken:
            name = f"<|mdm_{role}|>"
        roles[role], taken[name] = name, role
    numbers = dict(vocabulary(content))
    for role in ROLES:
        number = numbers.setdefault(roles[role], max(numbers.values()) + 1)
        tokens.setdefault(roles[role], {"id": number, "content": roles[role], **FLAGS})["special"] = True
    content["added_tokens"] = list(tokens.values())
    return {role: roles[role] for role in ROLES}


def hub_files(model: bytes) -> dict[str, bytes]:
    """The files with which transformers' AutoTokenizer gives the same ids as the tokenizer in `model`: name -> content.

    Raises ValueError if a tokenizer.json cannot express this tokenizer.
    """
    if model[:1] == b"{":
        pieces = HubPieces(model)
        files = {}
        content = pieces.content
    else:
        pieces = SentencePieces(model)
        files = {"tokenizer.model": model}
        if pieces.model_type != "BPE":  # the two libraries break ties between pieces differently
            raise ValueError("a sentencepiece unigram model cannot be exported: give its file to prepare_data.py again")
        content = _converted(pieces)
    settings: dict[str, Any] = {f"{role}_token": name for role, name in pieces.names.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["split_special_tokens"] = True  # as in our tokenizer, "<mask>" in a text is ordinary text
    texts = {"tokenizer.json": content, "tokenizer_config.json": settings}
    return files | {name: json.dumps(text, ensure_ascii=False, indent=1).encode() for name, text in texts.items()}


def bundle_unigram(pieces: SentencePieces) -> bytes:
    """A sentencepiece unigram model in the format of `bundle`'s result, so that the export to transformers is exact.

    If two ways to split a word are equally likely, the ids may differ from those of sentencepiece.
    """
    content = json.loads(load(_converted(pieces)).to_str())
    return _dump(pieces.names, content)


def _dump(roles: dict[str, str], content: dict) -> bytes:
    return json.dumps({"roles": roles, "tokenizer": content}, ensure_ascii=False, sort_keys=True).encode()


def _converted(pieces: SentencePieces) -> dict:
    """A sentencepiece model as a tokenizer.json, with our escape of U+2581. Raises ValueError.

    User-defined pieces become added tokens, because both are found before all other pieces and are never merged.
    """
    added = []
    for number in pieces.of_type(PIECE.CONTROL, PIECE.UNKNOWN, PIECE.USER_DEFINED):
        piece = pieces.id_to_piece(number)
        special = pieces.pieces[number].type != PIECE.USER_DEFINED
        if not special and (SPACE_MARK in piece or ESCAPE in piece):
            raise ValueError(f"user-defined piece {piece!r}: a tokenizer.json cannot have one with a space")
        if special or " " not in piece:  # sentencepiece replaces spaces, so it never finds such a piece
            added.append({"id": number, "content": piece, **FLAGS, "special": special})
    marked = [*escaping(SPACE_MARK), *replacements((" ", SPACE_MARK))]
    back = [*replacements((SPACE_MARK, " ")), {"type": "ByteFallback"}, *unescaping(SPACE_MARK)]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": marked},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _unigram(pieces) if pieces.model_type == "Unigram" else _bpe(pieces),
    }
    if pieces.model_type == "Unigram":
        keep_apart(content)
    return content


def _unigram(pieces: SentencePieces) -> dict:
    vocabulary = [[piece.piece, piece.score] for piece in pieces.pieces]
    return {"type": "Unigram", "unk_id": pieces.unk_id(), "byte_fallback": True, "vocab": vocabulary}


def _bpe(pieces: SentencePieces) -> dict:
    """The BPE model of a tokenizer.json for the pieces.

    sentencepiece merges the two neighbours whose union has the best score. So each way to split a piece into two other
    pieces is a merge, and the merges are ordered by score.
    """
    ordinary = {pieces.id_to_piece(i): i for i in pieces.of_type(PIECE.NORMAL)}
    merges = [
        (-pieces.pieces[i].score, ordinary[piece[:k]], ordinary[piece[k:]], [piece[:k], piece[k:]])
        for piece, i in ordinary.items()
        for k in range(1, len(piece))
        if piece[:k] in ordinary and piece[k:] in ordinary
    ]
    return {
        "type": "BPE",
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "byte_fallback": True,
        "fuse_unk": True,
        "vocab": {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())},
        "merges": [pair for *_, pair in sorted(merges)],
    }
