"""Tokenizers in the format of model folders on the hub, tokenizer.json: write ours, and read those of others.

A third-party tokenizer is kept in one file: a JSON object with its tokenizer.json, made lossless, and the names of its
bos, eos, pad and mask tokens. `Tokenizer` reads both kinds.
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
        """model: the result of `bundle`. Raises ValueError if it is something else, or if the library is not
        installed.
        """
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
        self._tokenizer.encode_special_tokens = True  # no text is encoded to a reserved id
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
        return self._tokenizer.id_to_token(number) or ""  # a third-party vocabulary may have gaps

    def unk_id(self) -> int:
        unknown = self.content["model"].get("unk_id")
        return self.piece_to_id(self.content["model"].get("unk_token") or "") if unknown is None else unknown

    def reserved(self) -> set[int]:
        """The ids that no text is encoded to: special tokens, the unknown piece, and numbers without a piece."""
        special = {token["id"] for token in self.content["added_tokens"] if token["special"]}
        holes = set(range(self.get_piece_size())) - set(self._vocabulary.values())
        return special | holes | ({self.unk_id()} - {-1})

    def added(self) -> list[str]:
        """Pieces with a special meaning: tokens that text can contain, and tokens that text must not be encoded to."""
        return [token["content"] for token in self.content["added_tokens"]]


def bundle(file: Path, config: dict, add_missing: bool) -> tuple[bytes, int]:
    """A third-party tokenizer.json as one lossless file, and its vocabulary size before tokens were added.

    tokenizer_config.json (or special_tokens_map.json) next to `file` has the names of bos, eos, pad and mask, or
    config, the model's config.json, has their ids. With `add_missing`, a missing role gets a new token at the end of
    the vocabulary. A role that shares its token with another one always does. All changes are logged. Raises
    ValueError.
    """
    library = tokenizers_library()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        library.Tokenizer.from_str(json.dumps(content))
    except Exception:  # the library raises Exception itself
        raise ValueError(f"{file}: not a tokenizer.json that can be read: copy the model's original file") from None
    return bundle_content(file, content, _settings(file.parent), config, add_missing)


def bundle_content(file: Path, content: dict, settings: dict, config: dict, add_missing: bool) -> tuple[bytes, int]:
    """The same for a tokenizer.json and settings that were converted from `file`."""
    usual = tokenizers_library().Tokenizer.from_str(json.dumps(content))
    try:
        content.setdefault("added_tokens", [])
        _add_from_settings(content, settings)
        content = json.loads(load(content).to_str())  # in the library's present format
        size = max(number for _, number in vocabulary(content)) + 1
        notes = neutralise(content)
        for token in content["added_tokens"]:
            if usual.token_to_id(token["content"]) not in (None, token["id"]):
                notes.append(
                    f"{token['content']!r} has the id of the file, {token['id']}; transformers gives it another"
                )
                break
        names = _named(content, settings, config, notes)
        roles = _own_tokens(content, names, add_missing, notes)
        keep_apart(content)
        content = json.loads(load(content).to_str())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}, or its settings: unknown format ({error!r}): get the original files") from None
    if notes:
        log.warning("%s, to lose no text: %s (docs/tokenizers.md)", file, "; ".join(notes))
    return _dump(roles, content), size


def _settings(folder: Path) -> dict:
    """The content of tokenizer_config.json, completed from special_tokens_map.json (of older folders)."""
    found: dict = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                found = {**dict(json.loads((folder / name).read_text(encoding="utf-8"))), **found}
            except (ValueError, TypeError):
                raise ValueError(f"{folder / name}: damaged (no JSON object): get the original file") from None
    return found


def _text(token: str | dict | None) -> str | None:
    """The text of a token in the settings, where it is a string or an object. Raises ValueError."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json names {text!r} as a token: it must be a text")
    return text


def _add_from_settings(content: dict, settings: dict) -> None:
    """Add the tokens that are only in tokenizer_config.json, and mark those as special that are special there."""
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
    """The token of each role, named by the settings, or by its id in the model's configuration.

    An id in the configuration that belongs to an ordinary piece (often a default) is ignored, with an entry in `notes`.
    """
    by_id, names = {number: piece for piece, number in vocabulary(content)}, {}
    declared = {token["content"] for token in content["added_tokens"]}
    for role in ROLES:
        token, number = _text(settings.get(f"{role}_token")), config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if token is None and isinstance(number, int):
            token = by_id.get(number)
            if token is not None and token not in declared and spelled(content, [token]):
                notes.append(
                    f"{role}_token_id {number} of config.json is not used, as it is the ordinary piece {token!r}"
                )
                token = None
        if token:
            names[role] = token
    return names


def _own_tokens(content: dict, names: dict, add_missing: bool, notes: list[str]) -> dict[str, str]:
    """A separate special token for each role. Adds tokens to `content`, and a description of the changes to `notes`."""
    model, tokens = content["model"], {token["content"]: token for token in content["added_tokens"]}
    unknown = model.get("unk_token")
    if unknown is None and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    ordinary = spelled(content, [name for name in names.values() if name not in tokens])
    roles, taken = {}, {unknown: "unk"} if unknown else {}
    for role in ("eos", "bos", "mask", "pad"):  # in this order: the first role keeps a shared token
        name = names.get(role)
        if name is None and not add_missing:
            raise ValueError(f"it names no {role} token: tokenizer_config.json must have {role}_token")
        if name in ordinary:
            raise ValueError(f"{role}_token {name!r} is an ordinary piece, which occurs in text: name a special token")
        if name in taken:
            notes.append(f"{role} gets a token of its own, as {name!r} is {taken[name]}")
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

    Raises ValueError if a tokenizer.json cannot express the tokenizer.
    """
    if model[:1] == b"{":
        pieces, files = HubPieces(model), {}
        content = pieces.content
    else:
        pieces, files = SentencePieces(model), {"tokenizer.model": model}
        if pieces.model_type != "BPE":  # the two libraries differ in the choice between equally likely pieces
            raise ValueError("a sentencepiece unigram model cannot be exported: give its file to prepare_data.py again")
        content = _converted(pieces)
    settings: dict[str, Any] = {f"{role}_token": name for role, name in pieces.names.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["split_special_tokens"] = True  # as in our tokenizers, text such as <mask> remains text
    texts = {"tokenizer.json": content, "tokenizer_config.json": settings}
    return files | {name: json.dumps(text, ensure_ascii=False, indent=1).encode() for name, text in texts.items()}


def bundle_unigram(pieces: SentencePieces) -> bytes:
    """A sentencepiece unigram model in the form that `bundle` gives a tokenizer.json, so that it is exact in
    transformers.

    If two divisions of a word are equally likely, the ids may differ from sentencepiece's.
    """
    content = json.loads(load(_converted(pieces)).to_str())
    return _dump(pieces.names, content)


def _dump(roles: dict[str, str], content: dict) -> bytes:
    return json.dumps({"roles": roles, "tokenizer": content}, ensure_ascii=False, sort_keys=True).encode()


def _converted(pieces: SentencePieces) -> dict:
    """A sentencepiece model as a tokenizer.json, with our escape of U+2581. Raises ValueError.

    User-defined pieces become added tokens, because both are found first and are not merged.
    """
    added = []
    for number in pieces.of_type(PIECE.CONTROL, PIECE.UNKNOWN, PIECE.USER_DEFINED):
        piece, special = pieces.id_to_piece(number), pieces.pieces[number].type != PIECE.USER_DEFINED
        if not special and (SPACE_MARK in piece or ESCAPE in piece):
            raise ValueError(f"user-defined piece {piece!r}: a tokenizer.json cannot have one with a space")
        if special or " " not in piece:  # sentencepiece never finds a piece with a space
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
    """A BPE model. sentencepiece merges the two neighbours whose union has the best score. So each division of a piece
    into two others is a merge, in the order of the scores.
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
