"""Exact answers: the batched sampler against the one of generate.py and a plain loop, and what counts as right."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdmtrain.answers import fill_greedily, is_right, main, read_tasks
from mdmtrain.data.text import pad_rows
from mdmtrain.generate import Sampling, unmask
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer, initial_std

MASK, PAD, EOS = 4, 3, 2


def model(causal: bool) -> Transformer:
    """Random weights, large enough that every token changes what the others are."""
    shape = ModelShape(vocab_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64, causal=causal)
    built, generator = Transformer(shape, 4096), torch.Generator().manual_seed(0)
    for name, p in built.named_parameters():
        std = initial_std(name, shape)
        p.data = torch.ones_like(p) if std is None else 20 * std * torch.randn(p.shape, generator=generator)
    return built.eval()


def masked_rows(count: int) -> list[tuple[list[int], np.ndarray]]:
    """Prompts of different lengths with gaps of different lengths at their ends."""
    generator = np.random.default_rng(1)
    rows = []
    for _ in range(count):
        prompt, gap = generator.integers(5, 64, generator.integers(1, 9)).tolist(), int(generator.integers(1, 8))
        rows.append((prompt + [MASK] * gap, np.arange(len(prompt) + gap) >= len(prompt)))
    return rows


def filled(network: Transformer, rows: list) -> list[list[int]]:
    ids, open_, segments = pad_rows(rows, PAD)
    out = fill_greedily(network, ids, open_, segments, [MASK, PAD])
    return [row[: len(given)].tolist() for row, (given, _) in zip(out, rows, strict=True)]


def test_a_batch_is_unmasked_as_generate_unmasks_each_row():
    network, rows = model(causal=False), masked_rows(24)
    expected = []
    for ids, open_ in rows:
        gap = int(open_.sum())
        expected.append(unmask(network, torch.tensor(ids), MASK, [MASK, PAD], Sampling(gap, gap, gap), 0).tolist())
    assert filled(network, rows) == expected
    from_the_left = []  # another order of the same model: it must not pass
    for ids, open_ in rows:
        ids = torch.tensor(ids)
        for position in open_.nonzero()[0]:
            logits = network(ids[None], torch.tensor([position]))[0]
            logits[[MASK, PAD]] = -torch.inf
            ids[position] = logits.argmax()
        from_the_left.append(ids.tolist())
    assert from_the_left != expected


def test_a_causal_model_writes_from_the_left():
    network, rows = model(causal=True), masked_rows(24)
    expected = []
    for ids, open_ in rows:
        row = torch.tensor(ids)[: int((~open_).sum())]
        for _ in range(int(open_.sum())):
            logits = network(row[None], torch.tensor([len(row) - 1]))[0]
            logits[[MASK, PAD]] = -torch.inf
            row = torch.cat([row, logits.argmax()[None]])
        expected.append(row.tolist())
    assert filled(network, rows) == expected


LETTERS = SimpleNamespace(eos_id=EOS, decode=lambda ids: "".join(chr(ord("a") + i - 10) for i in ids))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ([10, 11, 12, EOS], True),
        ([10, 11, 12, EOS, 30], True),  # what comes after the end is not part of it
        ([10, 11, 12], False),  # it does not end
        ([10, 11, 12, 13, EOS], False),  # the response and more: a test for its beginning would take it
        ([10, 11, EOS, 12], False),
        ([10, 12, 11, EOS], False),  # the right letters in the wrong order
        ([EOS, 10, 11, 12], False),
        ([], False),
    ],
)
def test_an_answer_is_right_only_if_it_is_exactly_the_response(answer, right):
    assert is_right(answer, "abc", LETTERS) is right


@pytest.mark.parametrize(
    "record", [{"prompt": "a", "response": "b"}, {"kind": "k", "prompt": "a", "response": ""}, {"kind": 1}]
)
def test_a_line_that_is_no_task_is_named(tmp_path, record):
    good = {"kind": "k", "prompt": "a", "response": "b"}
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=r"t.jsonl:2: needs 'kind', 'prompt' and 'response'"):
        read_tasks(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="no such file: make it with tools/make_tasks"):
        main(["run", "--tasks", str(tmp_path / "none.jsonl")])
