"""Prompts and responses: prepared exactly, one in a row, and nothing but responses (and SyRM's tokens) eligible."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdmtrain import config as configuration
from mdmtrain.data.loader import describe_rows, open_sources, train_loader, validation_rows
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.shards import MANIFEST, PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.evaluate import baselines, evaluate_split
from tests.spawn import fake_world

WORDS = ["alpha", "beta", "gamma", "caf\u00e9", "(", ")", "\n", "return", "delta"]
OPTIONS = Options(vocab_size=300, validation_fraction=0.2, shard_tokens=2000)


def pairs(count=300):
    """Prompts of none to many words, some longer than any row of the tests, and responses that repeat the prompt's."""
    generator = np.random.default_rng(0)

    def text(most):
        return " ".join(generator.choice(WORDS, generator.integers(0, most)))

    return [(text(90 if i % 10 == 0 else 12), text(9) + "." * (i % 7)) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared prompts and responses, in several shards."""
    base = tmp_path_factory.mktemp("prompts")
    lines = [json.dumps({"prompt": prompt, "response": response, "id": 1}) for prompt, response in pairs()]
    (base / "a.jsonl").write_text("\n".join(lines[:100]) + "\n\n")
    (base / "b.jsonl").write_text("\n".join(lines[100:]))
    summary = prepare([base / "a.jsonl", base / "b.jsonl"], base / "out", OPTIONS, 1)
    assert summary.reading.left_out["empty"] == sum(not response for _, response in pairs()) + 1 and not summary.already
    return base / "out"


@pytest.fixture
def make(small_run, folder):
    def config(data=None, diffusion=None, run=None):
        data = {"sources": [{"path": str(folder)}], "sequence_length": 32, **(data or {})}
        return configuration.validate(small_run({"data": data, "run": run or {}, "diffusion": diffusion or {}}), "test")

    return config


def documents(split):
    """(ids, where the response starts) of every document, found by reading the stream alone."""
    stream, eligible = split.read(0, split.tokens), split.eligible(0, split.tokens)
    starts = np.flatnonzero(stream == split.bos_id)
    for a, b in zip(starts, [*starts[1:], split.tokens], strict=True):
        inside = eligible[a:b]
        assert not inside[0] and inside[-1] and (np.diff(inside.astype(int)) != 0).sum() == 1
        yield stream[a:b], int(inside.argmax())


def test_every_pair_is_there_once_with_its_boundary(folder):
    tokenizer, found, response_tokens = Tokenizer.load(folder), [], 0
    for name in ("train", "validation"):
        split = PreparedSplit(folder, name, verify="sha256")
        assert split.prompts
        assert name == "validation" or split.shards > 1
        whole = list(documents(split))
        before, lengths = split.document_lengths()
        assert before.tolist() == [start for _, start in whole] and lengths.tolist() == [len(ids) for ids, _ in whole]
        assert split.eligible_tokens == sum(len(ids) - start for ids, start in whole)
        response_tokens += split.eligible_tokens
        begin, texts = 0, []
        for number, (ids, start) in enumerate(whole):
            assert split.document(number) == (begin, len(ids))
            assert ids[start - 1] != tokenizer.eos_id and ids[-1] == tokenizer.eos_id
            texts.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])))
            assert ids[1:start].tolist() == tokenizer.encode(texts[-1][0])  # as a prompt is encoded to be answered
            begin += len(ids)
        assert split.bytes == sum(len(response.encode()) for _, response in texts)
        found += texts
    assert sorted(found) == sorted((p, r) for p, r in pairs() if r)
    assert len({p for p, _ in found}) > 200 and any(p == "" for p, _ in found)


def test_eligible_positions_of_any_range_across_shards(folder):
    split = PreparedSplit(folder, "train")
    everything = split.eligible(0, split.tokens)
    assert 0.1 < everything.mean() < 0.9
    for start in range(0, split.tokens - 700, 331):
        assert (split.eligible(start, 700) == everything[start : start + 700]).all()


def test_a_folder_of_plain_text_is_what_it_was(corpus):
    content = json.loads((corpus / MANIFEST).read_text())
    assert content["format"] == 1
    for split in content["splits"].values():
        assert set(split) == {"tokens", "documents", "bytes", "shards"}
        names = {"file", "tokens", "documents", "sha256", "documents_file", "documents_sha256"}
        names |= {"hashes_file", "hashes_sha256"}
        assert all(set(shard) == names for shard in split["shards"])
    assert not list(corpus.glob("*.responses"))
    split = PreparedSplit(corpus, "train")
    assert not split.prompts and split.eligible_tokens == split.tokens and split.eligible(5, 300).all()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "the manifest says"),
        (lambda file: file.write_bytes(b"\x07" + file.read_bytes()[1:]), "was altered"),
    ],
)
def test_damaged_boundaries_are_found(folder, tmp_path, damage, words):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy / "train-00001.responses")
    with pytest.raises(ValueError, match=f"train-00001.responses.* {words}"):
        PreparedSplit(copy, "train", verify="sha256")


# ---- rows


def batches(config, world_size=1, rank=0):
    plan = configuration.resolve(config, world_size)
    return list(train_loader(config, plan, rank, open_sources(config.data, "train"), 0, pin_memory=False))


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_row_is_one_prompt_with_its_response(make, document_mask):
    """From bos, padded after eos or cut, never to a random length; prompts are not eligible, nor are pads."""
    config = make({"random_length_fraction": 1.0, "document_mask": document_mask})
    split = open_sources(config.data, "train")[0]
    whole, seen, without = list(documents(split)), [], 0
    for batch in batches(config):
        assert batch.segments is not None
        rows = zip(*(part.numpy() for part in batch[:3]), batch.samples[:, 1].tolist(), strict=True)
        for ids, eligible, segments, number in rows:
            document, start = whole[number]
            n = min(len(document), 32)
            assert (ids[:n] == document[:n]).all() and (ids[n:] == split.pad_id).all()
            assert np.flatnonzero(eligible).tolist() == list(range(start, n))
            assert (segments[:n] == 0).all() and (segments[n:] == -1).all()
            without += not eligible.any()
            seen.append(number)
    assert sorted(seen[: split.documents]) == list(range(split.documents)) and without > 5
    line = describe_rows(split, 32)
    cut = sum(len(ids) > 32 for ids, _ in whole)
    assert f"{split.documents:,} prompts" in line and f"{cut} do not fit" in line
    assert f"{sum(start >= 32 for _, start in whole)} before the response" in line


def test_what_is_eligible_is_the_same_on_any_ranks_and_micro_batches(make):
    def by_slot(config, world_size):
        rows = {}
        for rank in range(world_size):
            for number, batch in enumerate(batches(config, world_size, rank)):
                step = number // configuration.resolve(config, world_size).accumulation
                for slot, ids, eligible in zip(batch.slots.tolist(), batch.ids, batch.eligible, strict=True):
                    rows[step, slot] = (ids.tolist(), eligible.tolist())
        return rows

    listed = {"syrm_tokens": ("(", ")")}
    alone = by_slot(make(None, listed, {"steps": 6}), 1)
    assert len(alone) == 6 * 16
    assert by_slot(make({"workers": 1}, listed, {"steps": 6, "micro_batch": 1}), 2) == alone


def test_validation_rows_are_whole_documents(make, folder):
    split = PreparedSplit(folder, "validation")
    ids, eligible, segments = validation_rows(split, 40, 32, document_mask=False)
    chosen = [list(documents(split))[row * split.documents // 40] for row in range(40)]
    chosen = [(document, start) for document, start in chosen if start < 32]
    assert len(ids) == len(chosen) < 40
    for row, (document, start) in enumerate(chosen):
        assert (ids[row, : len(document)].numpy() == document[:32]).all()
        assert int(eligible[row].sum()) == min(len(document), 32) - start > 0
    assert ((segments == -1) == (ids == split.pad_id)).all()
    with pytest.raises(ValueError, match=r"no response of the validation split begins within a row of .*=1:"):
        validation_rows(split, 10, 1, document_mask=False)
    shortest, first = int(split.document_lengths()[0].min()), int(split.document_lengths()[0][0])
    assert first > shortest
    with pytest.raises(ValueError, match="none of the 1 rows of the validation split has room"):
        validation_rows(split, 1, first, document_mask=False)


def test_syrm_adds_the_listed_tokens_of_the_prompt(make, folder, corpus):
    """And nothing of it reaches evaluation; pads stay out, even where someone lists them."""
    tokenizer, listed = Tokenizer.load(folder), ("(", ")", 3)
    table = np.isin(np.arange(300), [tokenizer.pieces().index("("), tokenizer.pieces().index(")")])
    added = 0
    for plain, syrm in zip(batches(make()), batches(make(diffusion={"syrm_tokens": listed})), strict=True):
        assert torch.equal(plain.ids, syrm.ids) and torch.equal(plain.uniforms, syrm.uniforms)
        extra = syrm.eligible & ~plain.eligible
        assert torch.equal(syrm.eligible & plain.eligible, plain.eligible)
        prompt = (~plain.eligible & (plain.segments == 0)).numpy()
        assert (extra.numpy() == (prompt & table[plain.ids.numpy()])).all()
        added += int(extra.sum())
    assert added > 100
    with pytest.raises(ValueError, match=r"syrm_tokens: the tokenizer has no piece 'none'"):
        batches(make(diffusion={"syrm_tokens": ("none",)}))
    with pytest.raises(ValueError, match=r"syrm_tokens also masks listed tokens of prompts, and plain text has none"):
        batches(make({"sources": [{"path": str(corpus)}]}, {"syrm_tokens": (5,)}))


def test_plain_text_and_prompts_mix_each_in_its_own_rows(make, folder, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"alpha beta ( gamma {i} " * 20)
    text = tmp_path / "text"
    prepare(sorted(tmp_path.glob("*.txt")), text, replace(OPTIONS, tokenizer=str(folder)), 1)
    config = make({"sources": [{"path": str(folder)}, {"path": str(text)}]}, {"syrm_tokens": ("(",)})
    kinds = set()
    for batch in batches(config):
        for ids, eligible, (source, _) in zip(batch.ids, batch.eligible, batch.samples.tolist(), strict=True):
            full = bool(eligible[ids != 3].all())
            assert full or source == 0
            kinds.add((source, full))
    assert {(0, False), (1, True)} <= kinds


# ---- evaluation


class Constant(torch.nn.Module):
    """Two nats for every token."""

    shape = SimpleNamespace(causal=False)

    def forward(self, ids, positions, targets, segments):
        return torch.full((len(positions),), 2.0)


WORLD = fake_world()


def test_evaluation_counts_tokens_and_bytes_of_responses_alone(folder):
    """Two nats a token whatever the rows' lengths; a mean over rows of L, or with the prompts' tokens, is less."""
    split = PreparedSplit(folder, "validation")
    settings = configuration.EvalConfig(rows=50, samples=3, batch=8)
    found = evaluate_split(Constant(), split, "validation", settings, 32, False, 4, WORLD)
    assert found.nelbo == pytest.approx(2.0, abs=1e-6) and found.nelbo_se < 1e-6
    whole, tokenizer = list(documents(split)), Tokenizer.load(folder)
    tokens = np.concatenate([ids[start:] for ids, start in whole])
    size = len(tokenizer.decode(tokens).encode())
    assert found.bits_per_byte == pytest.approx(2 / math.log(2) * len(tokens) / size)
    base = baselines(split, tokenizer.decode)
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert base.unigram_nats_per_token == pytest.approx(-(share * np.log(share)).sum())
    assert base.unigram_bits_per_byte == pytest.approx(base.unigram_nats_per_token / math.log(2) * len(tokens) / size)
    assert base.gzip_bits_per_byte < 8


def test_the_standard_error_is_that_of_a_ratio(folder):
    """The jackknife's, which knows no formula; the spread of the rows' sums alone is something else."""

    class ByRow(Constant):
        def forward(self, ids, positions, targets, segments):
            return 1.0 + ((ids != 3).sum(dim=1) % 5).float()[positions // ids.shape[1]]

    split = PreparedSplit(folder, "validation")
    settings = configuration.EvalConfig(rows=50, samples=2, batch=16)
    found = evaluate_split(ByRow(), split, "validation", settings, 32, False, 4, WORLD)
    ids, eligible, _ = validation_rows(split, 50, 32, False)
    P = eligible.sum(dim=1).double().numpy()
    nats = P * (1.0 + ((ids != 3).sum(dim=1) % 5).numpy())
    assert found.nelbo == pytest.approx(nats.sum() / P.sum(), rel=1e-6)
    left_out = (nats.sum() - nats) / (P.sum() - P)
    jackknife = math.sqrt(((left_out - left_out.mean()) ** 2).sum() * (len(P) - 1) / len(P))
    assert found.nelbo_se == pytest.approx(jackknife, rel=0.05)
    assert abs(nats.std(ddof=1) / math.sqrt(len(P)) / P.mean() / jackknife - 1) > 0.2
