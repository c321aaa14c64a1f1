"""Text that was not prepared: the same stream as a prepared folder's, documents by themselves, continuations."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.data.inputs import Input
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.records import Reading
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.text import TextSplit, document_rows, encode_pair, pad_rows
from mdmtrain.data.tokenizer import Tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i} \u00e9\n\n" * (1 + i % 4) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.load(corpus)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def test_the_stream_is_that_of_a_prepared_folder(jsonl, corpus, tokenizer, tmp_path):
    """Token for token, document for document, byte for byte; shards do not show."""
    options = Options(tokenizer=str(corpus), validation_fraction=0.5, shard_tokens=200)
    prepare([jsonl], tmp_path / "prepared", options, 1)
    seen = 0
    for split in (PreparedSplit(tmp_path / "prepared", name) for name in ("train", "validation")):
        edges = np.append(split.document_starts(), split.tokens)
        assert len(edges) - 1 == split.documents and split.shards > 1
        for start, end in pairwise(edges):
            ids = split.read(start, end - start)
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and tokenizer.decode(ids) in TEXTS
        seen += split.bytes
    text = TextSplit(Input(str(jsonl)), tokenizer, Reading())
    assert (text.documents, text.bytes) == (40, seen) and seen == sum(len(t.encode()) for t in TEXTS)
    whole = [i for t in TEXTS for i in (tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id)]
    assert text.read(0, text.tokens).tolist() == whole and text.read(7, 5).tolist() == whole[7:12]
    document = np.cumsum(np.array(whole) == tokenizer.bos_id)
    assert text.documents_in(3, 300).tolist() == (document[3:303] - document[3]).tolist()


def test_every_line_is_a_document(tokenizer, tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\n  \ntwo words\nthree")
    split = TextSplit(Input(str(tmp_path / "lines.txt")), tokenizer, Reading(), lines=True)
    assert (split.documents, split.bytes) == (3, len("onetwo wordsthree"))
    starts = [*split.document_starts(), split.tokens]
    documents = [tokenizer.decode(split.read(a, b - a)) for a, b in pairwise(starts)]
    assert documents == ["one", "two words", "three"]


def test_documents_as_rows(jsonl, tokenizer):
    """Split: every token once, in order. Cut: the first of each. Padding is neither predicted nor seen."""
    split = TextSplit(Input(str(jsonl)), tokenizer, Reading())
    lengths = np.diff([*split.document_starts(), split.tokens])
    most = int(np.median(lengths))
    for cut in (False, True):
        rows, longer = document_rows(split, 99, most, cut, tokenizer.pad_id)
        assert longer == (lengths > most).sum() > 0
        assert len(rows.ids) == (40 if cut else np.ceil(lengths / most).sum())
        kept = rows.ids[rows.eligible].tolist()
        expected = split.read(0, split.tokens)
        if cut:
            starts = split.document_starts()
            expected = np.concatenate([expected[a : a + min(n, most)] for a, n in zip(starts, lengths, strict=True)])
        assert kept == expected.tolist()
        assert (rows.ids[~rows.eligible] == tokenizer.pad_id).all()
        assert ((rows.segments == 0) == rows.eligible).all() and (rows.segments[~rows.eligible] == -1).all()
    few, _ = document_rows(split, 4, 10_000, False, tokenizer.pad_id)
    assert [tokenizer.decode(row) for row in few.ids.tolist()] == [TEXTS[i] for i in (0, 10, 20, 30)]


def test_rows_of_one_length_need_no_padding():
    assert pad_rows([([1, 2], np.array([True, False]))] * 2, 0).segments is None


@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_a_pair_is_the_text_and_parts_where_the_prefix_ends(tokenizer, prefix, continuation):
    """Wherever the tokenizer would rather join the two: nothing is lost, and nothing crosses the border."""
    before, after = encode_pair(tokenizer, prefix, continuation)
    assert before[0] == tokenizer.bos_id
    assert (tokenizer.decode(before), tokenizer.decode(after)) == (prefix, continuation)


def test_prompts_and_responses_are_those_of_a_prepared_folder(corpus, tokenizer, tmp_path):
    """Rows to evaluate, tokens and bytes: whether the records are prepared first makes no difference."""
    records = [{"prompt": text, "response": text[::-1]} for text in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    prepare([tmp_path / "pairs.jsonl"], tmp_path / "out", Options(tokenizer=str(corpus), validation_fraction=0.4), 1)
    text = TextSplit(Input(str(tmp_path / "pairs.jsonl")), tokenizer, Reading())
    splits = [PreparedSplit(tmp_path / "out", name) for name in ("train", "validation")]
    assert text.prompts and text.documents == sum(split.documents for split in splits)
    assert text.eligible_tokens == sum(split.eligible_tokens for split in splits)
    assert text.bytes == sum(split.bytes for split in splits) == sum(len(t.encode()) for t in TEXTS)

    def documents(split) -> list:
        lengths = zip(*split.document_lengths(), strict=True)
        places = [split.document(number) for number in range(split.documents)]
        return [
            (split.read(*place).tolist(), split.eligible(*place).tolist(), split.documents_in(*place).tolist(), *length)
            for place, length in zip(places, lengths, strict=True)
        ]

    assert sorted(documents(text)) == sorted(documents(splits[0]) + documents(splits[1]))
