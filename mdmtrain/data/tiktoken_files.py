"""Convert tiktoken's rank files (base64 tokens with their ranks) to the tokenizer.json of a byte-level BPE.

A rank file contains neither the pattern that splits text before merging nor the special tokens. This module has both
for known encodings, under the names of their files.
"""

import base64
import binascii
import json
import re
from pathlib import Path
from typing import NamedTuple

from mdmtrain.data.lossless import FLAGS, tokenizers_library


class Encoding(NamedTuple):
    """The parts of an encoding that a rank file does not contain."""

    pattern: str
    specials: dict[str, int]  # token -> id
    eos: str | None
    bos: str | None = None


# From tiktoken's openai_public.py and Llama's tokenizer.py, but without possessive quantifiers, because the tokenizers
# library gives some of them another meaning.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _WORDS + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _WORDS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_END = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)  # fmt: skip
ENCODINGS = {
    "gpt2": Encoding(_GPT2, {_END: 50256}, _END),
    "r50k_base": Encoding(_GPT2, {_END: 50256}, _END),
    "p50k_base": Encoding(_GPT2, {_END: 50256}, _END),
    "cl100k_base": Encoding(
        _CL100K, {_END: 100257, **dict(zip(_FIM, range(100258, 100261), strict=True)), "<|endofprompt|>": 100276}, _END
    ),
    "o200k_base": Encoding(_O200K, {_END: 199999, "<|endofprompt|>": 200018}, _END),
    "llama3": Encoding(
        _CL100K, {token: 128000 + i for i, token in enumerate(_LLAMA3)}, "<|end_of_text|>", "<|begin_of_text|>"
    ),
}
_RANK = re.compile(rb"([A-Za-z0-9+/]+=*) (\d+)")


def is_rank_file(content: bytes) -> bool:
    return _RANK.fullmatch(content[:4096].split(b"\n", 1)[0].rstrip(b"\r")) is not None


def as_tokenizer_json(file: Path, pattern: str | None) -> tuple[dict, dict]:
    """(tokenizer.json, settings with the names of its bos and eos tokens) for a rank file.

    pattern: the name of a known encoding, or the regular expression that splits text; None: the encoding with the name
    of the file. Raises ValueError.
    """
    name = pattern or file.stem
    known = ", ".join(ENCODINGS)
    if pattern is None and name not in ENCODINGS:
        raise ValueError(
            f"{file}: a tiktoken file, which does not say how text is split: give --tiktoken-pattern with a name "
            f"({known}) or a regular expression"
        )
    encoding = ENCODINGS.get(name) or Encoding(_checked(name, known), {}, None)
    content = json.loads(_converted(_ranks(file), encoding.pattern))
    content["added_tokens"] = [{"id": i, "content": token, **FLAGS} for token, i in encoding.specials.items()]
    roles = {"bos_token": encoding.bos, "eos_token": encoding.eos}
    return content, {role: token for role, token in roles.items() if token}


def _checked(pattern: str, known: str) -> str:
    """The user's pattern. Raises ValueError if the library would interpret it differently than tiktoken."""
    if re.search(r"\}\+|(?<!\\)\$", pattern):
        raise ValueError(
            "--tiktoken-pattern: '{m,n}+' and '$' mean something else here: write them as '{m,n}' and '\\z'"
        )
    try:
        tokenizers_library().Regex(pattern)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"--tiktoken-pattern {pattern!r}: neither one of {known} nor a regular expression ({error})"
        ) from None
    return pattern


def _ranks(file: Path) -> dict[bytes, int]:
    """The rank of each token, which is its id. Raises ValueError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        match = _RANK.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if match is None or not token or token in ranks:
            problem = f"the token {token!r} occurs twice" if token else "not a token in base64 and its rank"
            raise ValueError(f"{file}:{number}: {problem}: get the original file")
        ranks[token] = int(match[2])
    if len(set(ranks.values())) < len(ranks):
        raise ValueError(f"{file}: two tokens have the same rank: get the original file")
    return ranks


def _converted(ranks: dict[bytes, int], pattern: str) -> str:
    """Convert as transformers does: each way to split a token into two others is a merge, ordered by the ranks."""
    tokenizers_library()
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return ranks  # so that the package tiktoken is not needed

    return Converter(vocab_file="", pattern=pattern).converted().to_str()
