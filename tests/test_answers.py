"""Exact answers: how a causal model gives many at once, against a plain loop, and what counts as right."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdmtrain.answers import continue_greedily, is_right, main, read_tasks
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer, initial_std

MASK, PAD, EOS = 4, 3, 2


def test_a_causal_model_continues_a_batch_as_it_continues_each_row():
    shape = ModelShape(vocab_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64, causal=True)
    network, generator = Transformer(shape, 4096).eval(), torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():  # large, so that every token changes what follows it
        std = initial_std(name, shape)
        p.data = torch.ones_like(p) if std is None else 20 * std * torch.randn(p.shape, generator=generator)
    numbers = np.random.default_rng(1)
    rows = [torch.from_numpy(numbers.integers(5, 64, size)) for size in numbers.integers(1, 9, 24)]
    lengths = numbers.integers(1, 8, 24).tolist()
    expected = []
    for row, length in zip(rows, lengths, strict=True):
        for _ in range(length):
            logits = network(row[None], torch.tensor([len(row) - 1]))[0]
            logits[[MASK, PAD]] = -torch.inf
            row = torch.cat([row, logits.argmax()[None]])
        expected.append(row.tolist())
    assert [row.tolist() for row in continue_greedily(network, rows, lengths, [MASK, PAD])] == expected
    assert len({tuple(row[-3:]) for row in expected}) > 12, "they say the same, whatever came before"


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
