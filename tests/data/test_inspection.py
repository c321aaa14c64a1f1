"""The numbers of a report against closed forms."""

import json
import sys

import numpy as np
import pytest

from mdmtrain.data.inspection import inspect
from mdmtrain.data.parts import SOURCES
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer
from tests.conftest import ROOT

TEXTS = ["aaaa", "bb bb", "\u2603", "aaaa", "AAAA", "c" * 20, "d\n" * 9, "\u2603\u2603 e"]  # one thing three times


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of which the tokenizer has no piece for some characters; two files; shards of few documents."""
    base = tmp_path_factory.mktemp("data")
    (base / "tokenizer").mkdir()
    Tokenizer.train(["a bc de \n" * 500], 268, base / "tokenizer" / MODEL_FILE)
    for name, texts in (("one", TEXTS[:5]), ("two", TEXTS[5:] + [f"a{n}" for n in range(20)])):
        (base / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = Options(str(base / "tokenizer"), validation_fraction=0.3, shard_tokens=30, part_bytes=100)
    prepare([base / "one.jsonl", base / "two.jsonl"], base / "out", options, 1)
    return base / "out"


def test_numbers_are_those_of_the_documents(folder):
    report, lengths = inspect(folder, 1000, 1000, 1000)
    tokenizer = Tokenizer.load(folder)
    texts = [*TEXTS, *(f"a{n}" for n in range(20))]
    ids = {text: tokenizer.encode(text) for text in texts}
    byte_pieces = {number for number, piece in enumerate(tokenizer.raw_pieces()) if piece.startswith("<0x")}
    seen = []
    for split, one in report["splits"].items():
        here = [document["text"] for document in report["documents"][split]]
        seen += here
        tokens = [ids[text] for text in here]
        flat = np.concatenate(tokens)
        assert lengths[split].tolist() == [len(one) + 2 for one in tokens]
        assert one["documents"] == one["documents_looked_at"] == len(here) and one["shards"] > 1
        assert one["bytes"] == sum(len(text.encode()) for text in here)
        assert one["bytes_per_token"] == pytest.approx(one["bytes"] / len(flat))
        assert (
            one["byte_fallback"] == pytest.approx(np.isin(flat, list(byte_pieces)).mean()) and one["byte_fallback"] > 0
        )
        assert one["length"]["median"] == np.median(lengths[split]) and one["length"]["most"] == lengths[split].max()
        whole = np.concatenate([flat, [tokenizer.bos_id, tokenizer.eos_id] * len(here)])
        counts = {token["id"]: token["count"] for token in one["frequent"]}
        assert counts == dict(zip(*(column.tolist() for column in np.unique(whole, return_counts=True)), strict=True))
        assert list(counts.values()) == sorted(counts.values(), reverse=True)
        assert sum(token["share"] for token in one["frequent"]) == pytest.approx(1)
        assert one["unused_pieces"] == tokenizer.vocab_size - len(counts)
        assert one["repeated_documents"] == len(here) - len({text.casefold() for text in here})
    assert sorted(seen) == sorted(texts) and sum(s["repeated_documents"] for s in report["splits"].values()) == 2
    for source, part in zip(report["sources"], (texts[5:], texts[:5]), strict=True):
        size, tokens = sum(len(text.encode()) for text in part), sum(len(ids[text]) for text in part)
        assert (source["documents"], source["bytes"], source["tokens"]) == (len(part), size, tokens + 2 * len(part))
        assert source["bytes_per_token"] == pytest.approx(size / tokens)


def test_few_shards_and_few_sources(folder):
    report, lengths = inspect(folder, 2, 1, 1)
    whole, _ = inspect(folder, 1000, 1, 1)
    for split, one in report["splits"].items():
        assert one["shards_looked_at"] == 2 and one["documents_looked_at"] == len(lengths[split]) < one["documents"]
        assert len(one["frequent"]) == len(report["documents"][split]) == 1
    assert [one["input"] for one in report["sources"]][1:] == ["1 others"]
    assert report["sources"] == whole["sources"]


def test_prompts_are_told_from_responses(tmp_path):
    pairs = [{"prompt": f"ask {n}", "response": "b" * (n % 5 + 1)} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    options = Options(vocab_size=275, validation_fraction=0.3)
    prepare([tmp_path / "pairs.jsonl"], tmp_path / "out", options, 1)
    report, _ = inspect(tmp_path / "out", 10, 5, 100)
    found = [(one["prompt"], one["text"]) for documents in report["documents"].values() for one in documents]
    assert sorted(found) == sorted((pair["prompt"], pair["response"]) for pair in pairs)
    tokenizer = Tokenizer.load(tmp_path / "out")
    tokens = sum(len(tokenizer.encode(pair["response"])) for pair in pairs)
    assert report["sources"][0]["bytes_per_token"] == pytest.approx(sum(len(p["response"]) for p in pairs) / tokens)


def test_the_command_shows_and_writes(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import inspect_data

    monkeypatch.setenv("COLUMNS", "200")
    inspect_data.main([str(folder), "--figure", str(tmp_path / "f.png"), "--json", str(tmp_path / "r.json")])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads(json.dumps(inspect(folder, 100, 20, 2)[0]))
    for words in ("bytes/token", "two.jsonl", "byte fallback", "train, document 0", "most frequent tokens of train"):
        assert words in said
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    (folder / SOURCES).rename(tmp_path / SOURCES)
    try:
        inspect_data.main([str(folder)])
        assert "sources: unknown (prepared by an older version)" in capsys.readouterr().out
    finally:
        (tmp_path / SOURCES).rename(folder / SOURCES)
    with pytest.raises(ValueError, match="no prepared data at"):
        inspect_data.main([str(tmp_path / "nothing")])
    sys.modules.pop("inspect_data")
