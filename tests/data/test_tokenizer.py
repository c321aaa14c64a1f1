"""Any text comes back byte for byte, and no text becomes a reserved id."""

import io

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdmtrain.data.tokenizer import Tokenizer, bounded_sample, read_model
from tests.conftest import SOAK

CODE = "def f(x):\n    if x:\n        return  x + 12345\r\n\n\tself.name = 'caf\u00e9'  # \u4e16\u754c\n" * 40
NASTY = ["\u2581", "\U0010f581", "\U0010f5810", "\U0010f5811", "\0", "\r\n", "\t", "  ", "\ufeff", "\ufffd", "\u2585"]
NASTY += ["\u2047", "<mask>", "<s>", "</s>", "<pad>", "<unk>", "<0x41>", "e\u0301", "\u00e9"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train([CODE, "the quick brown fox\n"], 300, tmp_path_factory.mktemp("t") / "tokenizer.model")


any_text = st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]))), max_size=8)


@settings(max_examples=20_000 if SOAK else 400, deadline=None)
@given(any_text.map("".join))
@example("".join(NASTY))
@example("".join(reversed(NASTY)))
def test_every_text_comes_back_and_makes_no_reserved_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    reserved = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    assert len(reserved) == 4 and not reserved & set(ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]) == text


def test_training_learns_line_ends_and_indentation(tokenizer):
    pieces = {tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
    assert tokenizer.vocab_size == 300
    assert "\n" in pieces and "    " in pieces
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (1, 2, 3, 4)
    assert len(tokenizer.encode("    return")) < len("    return")
    assert len(tokenizer.encode("12345")) == 5


def test_training_is_deterministic_in_any_order_of_the_texts(tokenizer, tmp_path):
    again = Tokenizer.train(["the quick brown fox\n", CODE], 300, tmp_path / "again.model")
    assert again.sha256 == tokenizer.sha256 == Tokenizer.load(tmp_path / "again.model").sha256


def test_a_corpus_of_many_characters_fits_a_small_vocabulary(tmp_path):
    text = "".join(chr(0x4E00 + i * i % 5000) for i in range(4000))
    tokenizer = Tokenizer.train([text], 400, tmp_path / "tokenizer.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("size", "words"), [(100, "too small"), (100_000, "too large.*at most")])
def test_a_vocabulary_that_does_not_fit_is_one_clear_line(size, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.train([CODE], size, tmp_path / "tokenizer.model")
    assert "\n" not in str(error.value) and not (tmp_path / "tokenizer.model").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"control_symbols": []}, "mask is the new token <|mdm_mask|>, 330"),
        ({"control_symbols": [], "user_defined_symbols": ["<mask>"]}, "mask is the new token <|mdm_mask|>"),
        ({"pad_id": -1}, "pad is the new token <|mdm_pad|>"),
        ({"bos_id": -1, "eos_id": -1}, "bos is the new token <|mdm_bos|>, 330; eos is the new token <|mdm_eos|>, 331"),
        ({"remove_extra_whitespaces": True}, "runs of spaces are kept"),
        ({"add_dummy_prefix": True}, "no space is put before the first word"),
        ({"normalization_rule_name": "nfkc"}, "normalization nfkc is off"),
        ({"model_type": "unigram", "control_symbols": []}, "mask is the new token <|mdm_mask|>"),
        ({}, None),
        ({"byte_fallback": False}, ValueError("does not preserve text")),
        ({"model_type": "char"}, ValueError("of words or characters")),
    ],
)
def test_a_taken_tokenizer_must_lose_nothing_and_reserve_its_ids(change, words, tmp_path, caplog):
    model = io.BytesIO()
    options = dict(
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=3,
        control_symbols=["<mask>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    texts = iter([CODE[:2000]] * 9)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **{**options, **change})
    (tmp_path / "taken.model").write_bytes(model.getvalue())
    if isinstance(words, ValueError):
        with pytest.raises(ValueError, match=str(words)):
            Tokenizer.load(tmp_path / "taken.model")
        return
    taken, size = read_model(tmp_path / "taken.model")
    assert [words in line for line in caplog.messages] == ([] if words is None else [True])
    given = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert taken.raw_pieces()[:size] == [given.id_to_piece(i) for i in range(size)] and size == given.get_piece_size()
    assert taken.encode(" return x")[-2:] == given.encode(" return x")[-2:]
    (tmp_path / "again.model").write_bytes(taken.model)
    assert Tokenizer.load(tmp_path / "again.model").sha256 == taken.sha256 and len(caplog.messages) == bool(words)


def test_the_sample_is_bounded_spread_and_independent_of_order():
    texts = [f"{i:04d}" * 25 for i in range(1000)]
    sample = bounded_sample(texts, 20_000)
    assert 5_000 < sum(map(len, sample)) <= 20_000
    assert sample == bounded_sample(reversed(texts), 20_000)
    numbers = [int(text[:4]) for text in sample]
    assert min(numbers) < 100 and max(numbers) > 900
    assert bounded_sample(["x" * 100], 10) == ["x" * 100]
