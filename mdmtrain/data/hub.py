"""Tokenizers as model folders on the hub have them, tokenizer.json: ours written for others, theirs read for us.

A foreign tokenizer is kept in one file, as ours are: a JSON object with the tokenizer.json, made lossless, and the
names of its bos, eos, pad and mask tokens. `Tokenizer` takes either kind.
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
    """A foreign tokenizer with the methods of a SentencePieceProcessor that `Tokenizer` uses."""

    def __init__(self, model: bytes):
        """model: what `bundle` gave. Raises ValueError if it is none, or the library is missing."""
        try:
            content = json.loads(model)
            self.names: dict[str, str] = content["roles"]
            self.content: dict = content["tokenizer"]
            self._tokenizer = load(self.content)
            assert self.names.keys() == set(ROLES)
        except ValueError:
            raise
        except Exception:  # the library raises Exception itself
            raise ValueError("no JSON of a tokenizer and its roles") from None
        self._tokenizer.encode_special_tokens = True  # text never becomes a reserved id
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
        return self._tokenizer.id_to_token(number) or ""  # a foreign vocabulary may have holes

    def unk_id(self) -> int:
        unknown = self.content["model"].get("unk_id")
        return self.piece_to_id(self.content["model"].get("unk_token") or "") if unknown is None else unknown

    def reserved(self) -> set[int]:
        """Ids that no text becomes: special tokens, the piece of what is unknown, and numbers without a piece."""
        special = {token["id"] for token in self.content["added_tokens"] if token["special"]}
        holes = set(range(self.get_piece_size())) - set(self._vocabulary.values())
        return special | holes | ({self.unk_id()} - {-1})

    def added(self) -> list[str]:
        """Pieces with a meaning of their own: tokens that text spells, or that it must not become."""
        return [token["content"] for token in self.content["added_tokens"]]


def bundle(file: Path, config: dict, add_missing: bool) -> tuple[bytes, int]:
    """A foreign tokenizer.json as one file, made lossless, and its vocabulary size before anything was added.

    The names of bos, eos, pad and mask are in tokenizer_config.json (or special_tokens_map.json) beside `file`, or
    config, the model's config.json, has their ids. A role that nothing names gets a new token at the end of the
    vocabulary if `add_missing`; one that shares its token with another always does. What had to be changed is logged.
    Raises ValueError.
    """
    library = tokenizers_library()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        library.Tokenizer.from_str(json.dumps(content))
    except Exception:  # the library raises Exception itself
        raise ValueError(f"{file}: not a tokenizer.json that can be read: copy the model's original file") from None
    return bundle_content(file, content, _settings(file.parent), config, add_missing)


def bundle_content(file: Path, content: dict, settings: dict, config: dict, add_missing: bool) -> tuple[bytes, int]:
    """The same of a tokenizer.json and its settings that were made from `file`."""
    usual = tokenizers_library().Tokenizer.from_str(json.dumps(content))
    try:
        content.setdefault("added_tokens", [])
        _add_from_settings(content, settings)
        content = json.loads(load(content).to_str())  # as the library writes it today
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
        raise ValueError(f"{file}, or its settings: not in the format ({error!r}): get the original files") from None
    if notes:
        log.warning("%s, to lose no text: %s (docs/tokenizers.md)", file, "; ".join(notes))
    return _dump(roles, content), size


def _settings(folder: Path) -> dict:
    """What tokenizer_config.json says, and special_tokens_map.json of older folders where that says nothing."""
    found: dict = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                found = {**dict(json.loads((folder / name).read_text(encoding="utf-8"))), **found}
            except (ValueError, TypeError):
                raise ValueError(f"{folder / name}: damaged (no JSON object): get the original file") from None
    return found


def _text(token: str | dict | None) -> str | None:
    """A token of the settings, which have either its text or an object with that. Raises ValueError."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json names {text!r} as a token: it must be a text")
    return text


def _add_from_settings(content: dict, settings: dict) -> None:
    """Tokens, and which of them are special, that tokenizer_config.json knows and tokenizer.json does not."""
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
    """The tokens that the settings, or the model's configuration by their ids, name for the roles.

    An id in the configuration that is an ordinary piece (its default, often) does not count, which `notes` says.
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
    """A special token for each role, shared with no other. Adds tokens to `content`; what it changes is in `notes`."""
    model, tokens = content["model"], {token["content"]: token for token in content["added_tokens"]}
    unknown = model.get("unk_token")
    if unknown is None and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    ordinary = spelled(content, [name for name in names.values() if name not in tokens])
    roles, taken = {}, {unknown: "unk"} if unknown else {}
    for role in ("eos", "bos", "mask", "pad"):  # the first keeps a token that several have
        name = names.get(role)
        if name is None and not add_missing:
            raise ValueError(f"it names no {role} token: tokenizer_config.json must have {role}_token")
        if name in ordinary:
            raise ValueError(f"{role}_token {name!r} is an ordinary piece, which text has: name a token of its own")
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
    """The files that give transformers' AutoTokenizer the ids of the tokenizer in `model`: name -> content.

    Raises ValueError if a tokenizer.json cannot say the same.
    """
    if model[:1] == b"{":
        pieces, files = HubPieces(model), {}
        content = pieces.content
    else:
        pieces, files = SentencePieces(model), {"tokenizer.model": model}
        if pieces.model_type != "BPE":  # the two libraries choose differently between equally likely pieces
            raise ValueError("a sentencepiece unigram model cannot be exported: give its file to prepare_data.py again")
        content = _converted(pieces)
    settings: dict[str, Any] = {f"{role}_token": name for role, name in pieces.names.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["split_special_tokens"] = True  # as ours: text that spells <mask> is text
    texts = {"tokenizer.json": content, "tokenizer_config.json": settings}
    return files | {name: json.dumps(text, ensure_ascii=False, indent=1).encode() for name, text in texts.items()}


def bundle_unigram(pieces: SentencePieces) -> bytes:
    """A sentencepiece unigram model as `bundle` gives a tokenizer.json: exact in transformers from the start.

    Where two ways to split a word are equally likely the ids may be others than sentencepiece's.
    """
    content = json.loads(load(_converted(pieces)).to_str())
    return _dump(pieces.names, content)


def _dump(roles: dict[str, str], content: dict) -> bytes:
    return json.dumps({"roles": roles, "tokenizer": content}, ensure_ascii=False, sort_keys=True).encode()


def _converted(pieces: SentencePieces) -> dict:
    """A sentencepiece model as a tokenizer.json, our escape of U+2581 included. Raises ValueError.

    User-defined pieces become added tokens: like these they are found first, and are merged with nothing.
    """
    added = []
    for number in pieces.of_type(PIECE.CONTROL, PIECE.UNKNOWN, PIECE.USER_DEFINED):
        piece, special = pieces.id_to_piece(number), pieces.pieces[number].type != PIECE.USER_DEFINED
        if not special and (SPACE_MARK in piece or ESCAPE in piece):
            raise ValueError(f"user-defined piece {piece!r}: a tokenizer.json cannot have one with a space")
        if special or " " not in piece:  # sentencepiece sees no spaces, so it never finds one with them
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
    """sentencepiece merges the neighbours whose union has the best score, so every way to split a piece into two others
    is a merge, in the order of the scores.
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
