"""Make a foreign tokenizer.json lossless: disable all steps that cut, pad or change text, and keep the file's ids.

All functions edit the JSON of the file, so that transformers reads the same tokenizer from a folder that we export.
`Tokenizer` then tests whether the result is lossless, and raises an error if it is not.
"""

import json
import re

ROLES = ("bos", "eos", "pad", "mask")
SPACE_MARK, ESCAPE = "\u2581", "\U0010f581"  # see tokenizer.py
PREFIX = "no space is put before the first word"
BYTE = "<0x41>"  # stands for all byte pieces; its text has no "A", so only the piece itself can give this id
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def tokenizers_library():
    """The module tokenizers, which only foreign tokenizers need. Raises ValueError if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("tokenizer.json needs the tokenizers library: pip install mdmtrain[transformers]") from None
    return tokenizers


def replacements(*pairs: tuple[str, str]) -> list[dict]:
    """Steps of a normalizer or a decoder that replace strings, one pair (old, new) after another."""
    return [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]


def escaping(mark: str) -> list[dict]:
    """Normalizer steps for use before spaces become `mark`. They escape marks in the text, to distinguish them."""
    return replacements((ESCAPE, ESCAPE + "0"), (mark, ESCAPE + "1"))


def unescaping(mark: str) -> list[dict]:
    """Decoder steps for use after marks became spaces again: the inverse of `escaping`."""
    return [{"type": "Fuse"}, *replacements((ESCAPE + "1", mark), (ESCAPE + "0", ESCAPE))]


# ---- ids


def vocabulary(content: dict) -> list[tuple[str, int]]:
    """(piece, its id in the file) for every piece of a tokenizer.json: the model's pieces, then the added tokens."""
    pieces = content["model"]["vocab"]
    own = list(pieces.items()) if isinstance(pieces, dict) else [(piece, i) for i, (piece, _) in enumerate(pieces)]
    return own + [(token["content"], token["id"]) for token in content["added_tokens"]]


def load(content: dict):
    """Load a tokenizer.json with the tokenizers library, with the ids that are in the file. Raises ValueError.

    The library renumbers added tokens if there are gaps between their ids, except those that are also in the model's
    vocabulary. If there are gaps, all added tokens are therefore written into that vocabulary, in `content`.
    """
    numbers: dict[str, int] = {}
    for piece, number in vocabulary(content):
        if numbers.setdefault(piece, number) != number:
            raise ValueError(f"{piece!r} has two ids, {numbers[piece]} and {number}: it cannot be used")
    if len(set(numbers.values())) < len(numbers):
        twice = sorted(piece for piece, i in numbers.items() if list(numbers.values()).count(i) > 1)[:2]
        raise ValueError(f"{twice[0]!r} and {twice[1]!r} have the same id: it cannot be used")
    content["added_tokens"].sort(key=lambda token: token["id"])
    loaded = _from_json(content)
    if loaded.get_vocab(with_added_tokens=True) != numbers and isinstance(content["model"]["vocab"], dict):
        content["model"]["vocab"] = numbers
        loaded = _from_json(content)
    found = loaded.get_vocab(with_added_tokens=True)
    for piece, number in vocabulary(content):
        if found.get(piece) != number:
            raise ValueError(f"{piece!r} has id {number} in the file, but {found.get(piece)} when loaded: repair it")
    return loaded


def _from_json(content: dict):
    library = tokenizers_library()
    try:
        return library.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"the tokenizers library cannot read it ({error})") from None


# ---- text


def _steps(step: dict | None, key: str) -> list[dict]:
    """A list of the single steps in a step, which may be a nested sequence or None."""
    if step is None:
        return []
    return [part for inner in step[key] for part in _steps(inner, key)] if step["type"] == "Sequence" else [step]


def _sequence(steps: list[dict], key: str) -> dict | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}


def _marks_spaces(step: dict) -> bool:
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and len(step["content"]) == 1


def neutralise(content: dict) -> list[str]:
    """Disable every setting in the content of a tokenizer.json that loses text. Returns notes on the changes.

    A second call changes nothing.
    """
    notes = []
    for name in ("truncation", "padding"):
        if content.get(name):
            notes.append(f"{name} is off")
        content[name] = None
    content["post_processor"] = None  # we add bos and eos ourselves
    for name in ("dropout", "alpha", "nbest_size"):
        if content["model"].get(name):
            notes.append(f"{name} is off")
            content["model"][name] = None
    stripping = [token["content"] for token in content["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if stripping:
        more = f" and {len(stripping) - 1} more" if len(stripping) > 1 else ""
        notes.append(f"spaces around {stripping[0]!r}{more} are kept")
    for token in content["added_tokens"]:
        token |= {"lstrip": False, "rstrip": False, "normalized": False}
    return notes + _neutralise_steps(content)


def _neutralise_steps(content: dict) -> list[str]:
    normalizers = _steps(content["normalizer"], "normalizers")
    splitters = _steps(content["pre_tokenizer"], "pretokenizers")
    decoders = _steps(content["decoder"], "decoders")
    marks = {step["replacement"] for step in splitters if step["type"] == "Metaspace"}
    marks |= {step["content"] for step in normalizers if _marks_spaces(step)}
    before, after = [], []
    if len(marks) == 1:
        mark = marks.pop()
        before = escaping(mark)
        after = unescaping(mark)
    notes = []
    kept = [step for step in normalizers if step["type"] == "ByteLevel" or _marks_spaces(step)]
    for step in normalizers:
        if step["type"] == "Prepend":
            notes.append(PREFIX)
        elif step not in kept and step not in before:
            notes.append(f"normalizer {step['type']} is off")
    for step in splitters:
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            notes.append(PREFIX)
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel" and step["add_prefix_space"]:
            notes.append(PREFIX)
            step["add_prefix_space"] = False
    # No space is added at the start any more, so the decoder must not remove one.
    decoders = [step for step in decoders if step["type"] != "Strip" and step not in after[1:]]
    for step in decoders:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    if after and decoders[-1:] == after[:1]:
        del after[0]
    content["normalizer"] = _sequence(before + kept, "normalizers")
    content["pre_tokenizer"] = _sequence(splitters, "pretokenizers")
    content["decoder"] = _sequence(decoders + after, "decoders")
    return list(dict.fromkeys(notes))


def keep_apart(content: dict) -> None:
    """Make sure that text which spells a special token or a byte piece ("</s>", "<0x41>") is encoded as ordinary text.

    A model that looks up whole words in its vocabulary (unigram, WordPiece, BPE with ignore_merges) would find these
    pieces. An added split after the first character of such text prevents this, and does not affect other text. Raises
    ValueError if that is not enough.
    """
    texts = [token["content"] for token in content["added_tokens"] if token["special"]]
    if content["model"].get("byte_fallback"):
        texts.append(BYTE)
    found = spelled(content, texts)
    if found:
        patterns = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in found if text != BYTE]
        patterns += ["<(?=0x[0-9A-F]{2}>)"] if BYTE in found else []
        split = {"pattern": {"Regex": "|".join(patterns)}, "behavior": "Isolated", "invert": False}
        splitters = _steps(content["pre_tokenizer"], "pretokenizers")
        content["pre_tokenizer"] = _sequence([*splitters, {"type": "Split", **split}], "pretokenizers")
    unknown = {content["model"].get("unk_token")}  # may be the unknown piece, which `Tokenizer` refuses
    for text in set(spelled(content, found)) - unknown:
        raise ValueError(
            f"ordinary text that spells {text!r} would be encoded as this token: give the role a token of its own"
        )


def spelled(content: dict, texts: list[str]) -> list[str]:
    """Those of the pieces `texts` that the model produces for ordinary text which spells them."""
    if not texts:
        return []
    loaded = load(content)
    loaded.encode_special_tokens = True

    def made(piece: str) -> bool:
        contexts = (piece, f" {piece} ", f"a{piece}b")
        number = loaded.token_to_id(piece)
        return any(number in loaded.encode(text, add_special_tokens=False).ids for text in contexts)

    return [piece for piece in texts if made(piece)]
