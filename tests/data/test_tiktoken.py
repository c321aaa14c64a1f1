"""Rank files of tiktoken give the ids that tiktoken gives, and every text comes back."""

import base64
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken._educational import bpe_train

from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.tiktoken_files import ENCODINGS
from mdmtrain.data.tokenizer import Tokenizer, read_model
from tests.conftest import ROOT
from tests.data.foreign import DOCUMENTS

OFFICIAL = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
TEXT = (ROOT / "mdmtrain/optim.py").read_text()[
    :9000
] + "They're HERE, I'LL 12345 67 \u4e16\u754c gr\u00f6\u00dfe\n\n" * 9


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return bpe_train(TEXT, 400, ENCODINGS["cl100k_base"].pattern, visualise=None)


def write(file: Path, ranks: dict[bytes, int]) -> Path:
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return file


@pytest.fixture(scope="module", params=OFFICIAL)
def pair(request, ranks, tmp_path_factory) -> tuple[Tokenizer, tiktoken.Encoding]:
    """An encoding as we read it, and tiktoken's own of the same ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        official = {**getattr(tiktoken_ext.openai_public, request.param)(), "explicit_n_vocab": None}
    file = write(tmp_path_factory.mktemp("ranks") / f"{request.param}.tiktoken", ranks)
    return Tokenizer.load(file), tiktoken.Encoding(**official)


words = st.sampled_from(
    ["'s", "'LL", "They", "\u01c5", "e\u0301", "12345", " ", "\n", "\r\n", "//", "\u3000", "\u0660", "_"]
)


@given(st.lists(words | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=12).map("".join))
@example("\n".join(DOCUMENTS))
@example("self.x  = 1000000 \n\n\n  \t\n end  ")
@settings(deadline=None, max_examples=300, derandomize=True)
def test_ids_are_those_of_tiktoken(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode_ordinary(text) and ours.decode(ours.encode(text)) == text


def test_special_tokens_are_those_of_tiktoken(pair):
    ours, theirs = pair
    pieces = ours.raw_pieces()
    for token in theirs.special_tokens_set:
        assert pieces[theirs.encode_single_token(token)] == token
    assert ours.eos_id == theirs.eot_token and len({ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id}) == 4


def test_llama3(ranks, tmp_path):
    """Its file is called tokenizer.model, so the name of the encoding has to be given."""
    file = write(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(ValueError, match="does not say how text is split: give --tiktoken-pattern with a name"):
        Tokenizer.load(file)
    tokenizer, size = read_model(file, "llama3")
    assert (tokenizer.bos_id, tokenizer.eos_id, size) == (128000, 128001, 128256)
    assert tokenizer.raw_pieces()[128009] == "<|eot_id|>" and tokenizer.raw_pieces()[128255].endswith("_250|>")


def test_a_pattern_of_the_user(ranks, tmp_path):
    file = write(tmp_path / "own.tiktoken", ranks)
    pattern = r"[a-z]+|[^a-z]"
    theirs = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    options = Options(str(file), tiktoken_pattern=pattern, validation_fraction=0.3)
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"{TEXT} {number}")
    prepare([tmp_path / f"{number}.txt" for number in range(9)], tmp_path / "out", options, 1)
    ours = Tokenizer.load(tmp_path / "out")
    assert ours.encode(TEXT) == theirs.encode_ordinary(TEXT) and ours.bos_id == len(ranks)


BAD = {
    "no base64": (b"IQ== 0\n!!! 1\n", "cl100k_base", r":2: not a token in base64"),
    "no rank": (b"IQ== 0\nIg==\n", "cl100k_base", r":2: not a token in base64 and its rank"),
    "a token twice": (b"IQ== 0\nIQ== 1\n", "cl100k_base", r":2: the token b'!' occurs twice"),
    "a rank twice": (b"IQ== 0\nIg== 0\n", "cl100k_base", "two tokens have the same rank"),
    "bytes missing": (b"IQ== 0\nIg== 1\n", "cl100k_base", "does not preserve text"),
    "not an expression": (b"IQ== 0\n", "(", "neither one of .*llama3 nor a regular expression"),
    "a possessive quantifier": (b"IQ== 0\n", r"\p{N}{1,3}+", "mean something else here"),
    "an end of lines": (b"IQ== 0\n", r"\s+$", "mean something else here"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(name, tmp_path):
    content, pattern, words = BAD[name]
    (tmp_path / "a.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.load(tmp_path / "a.tiktoken", pattern)
    assert "\n" not in str(error.value)
