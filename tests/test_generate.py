"""The sampler by itself: which tokens it fills in, in which order, and how it ends."""

import argparse
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdmtrain.generate import Filled, Prompt, gap_lengths, never_chosen, result, show_step, temperature
from mdmtrain.likelihood import Estimate
from mdmtrain.unmask import MaskedRow, Sampling, _truncated, unmask, unmask_rows


class Oracle:
    """A model that always gives the same logits to a position."""

    def __init__(self, logits: torch.Tensor):
        self.logits, self.calls = logits, 0

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.logits[positions]


MASK = 9


def test_unmask_takes_the_most_confident_first():
    """With as many steps as gaps and temperature 0, each step fixes the surest position that is left."""
    logits = torch.zeros(4, 10)
    logits[torch.arange(4), torch.tensor([5, 6, 7, 8])] = torch.tensor([3.0, 1.0, 4.0, 2.0])
    logits[:, MASK] = 50.0  # the likeliest, and forbidden
    seen = []

    class Watching(Oracle):
        def __call__(self, ids, positions):
            seen.append(positions.tolist())
            return super().__call__(ids, positions)

    model = Watching(logits)
    out = unmask(model, torch.full((4,), MASK), MASK, [MASK], Sampling(4, 4, 4), 0)
    assert out.tolist() == [5, 6, 7, 8]
    assert seen == [[0, 1, 2, 3], [0, 1, 3], [1, 3], [1]]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("steps", [1, 3, 5, 99])
def test_unmask_fills_every_gap_and_keeps_the_rest(remasking, steps):
    ids = torch.tensor([1, MASK, 2, MASK, MASK, MASK, 3, MASK])
    model = Oracle(torch.zeros(8, 10))
    out = unmask(model, ids, MASK, [0, MASK], Sampling(5, steps, 5, 1.0, 0.0, remasking, 3), 0)
    assert model.calls == min(steps, 5)
    assert (out[ids != MASK] == ids[ids != MASK]).all()
    assert not set(out.tolist()) & {0, MASK}


def test_unmask_samples_from_the_model():
    """At temperature 1 a single position follows softmax(logits), within 4.5 standard errors; argmax would not."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    model, draws = Oracle(probabilities.log()[None]), 4000
    counts = np.zeros(5)
    for sample in range(draws):
        sampling = Sampling(1, 1, 1, 1.0, seed=11)
        counts[unmask(model, torch.tensor([4]), 4, [], sampling, sample).item()] += 1
    for count, p in zip(counts, probabilities.tolist(), strict=False):
        assert abs(count / draws - p) < 4.5 * math.sqrt(p * (1 - p) / draws)


class Mixing(torch.nn.Module):
    """Logits of a position depend on every token of the row and its place; float64, so that no two are equal."""

    def __init__(self, vocabulary, length):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.parts = torch.randn(vocabulary, length, length, vocabulary, generator=generator, dtype=torch.float64)

    def forward(self, ids, positions):
        whole = sum(self.parts[ids[:, j], j] for j in range(ids.shape[1]))  # [B, L, V]
        return whole.flatten(0, 1)[positions]


def by_the_paper(model, prompt, gen_length, steps, block_length, cfg_scale):
    """LLaDA's sampler at temperature 0, from its description: one gap after a prompt, one block after the other."""
    row = prompt + [MASK] * gen_length
    for block in range(gen_length // block_length):
        start = len(prompt) + block * block_length
        passes = steps * block_length // gen_length
        for step in range(passes):
            ids = torch.tensor([row, [MASK] * len(prompt) + row[len(prompt) :]])
            with_prompt, without = model(ids, torch.arange(2 * len(row))).chunk(2)
            logits = without + (cfg_scale + 1) * (with_prompt - without)
            logits[:, MASK] = -math.inf
            best = [
                (logits[i].softmax(0).max().item(), i, int(logits[i].argmax()))
                for i in range(start, start + block_length)
                if row[i] == MASK
            ]
            count = block_length // passes + (step < block_length % passes)
            for _, i, token in sorted(best, reverse=True)[:count]:
                row[i] = token
    return row


@pytest.mark.parametrize(
    ("steps", "block", "cfg_scale"), [(8, 8, 0.0), (3, 8, 0.0), (6, 4, 0.0), (8, 2, 1.5), (2, 4, 0.7)]
)
def test_unmask_is_the_papers_sampler(steps, block, cfg_scale):
    model, prompt = Mixing(10, 12), [1, 2, 3, 4]
    out = unmask(
        model, torch.tensor(prompt + [MASK] * 8), MASK, [MASK], Sampling(8, steps, block, cfg_scale=cfg_scale), 0
    )
    assert out.tolist() == by_the_paper(model, prompt, 8, steps, block, cfg_scale)
    others = {(8, 4, 0.0), (8, 8, 0.7), (4, 8, 0.0)} - {(steps, block, cfg_scale)}
    assert all(out.tolist() != by_the_paper(model, prompt, 8, *other) for other in others), "the settings do not matter"


def test_blocks_of_several_gaps_are_filled_together():
    """Two gaps of four in blocks of two: the first halves of both, then the second halves; the rest is kept."""
    ids = torch.tensor([1, *[MASK] * 4, 2, *[MASK] * 4, 3])
    seen = []
    out = unmask(Mixing(10, 11), ids, MASK, [MASK], Sampling(4, 4, 2), 0, on_step=lambda row: seen.append(row.tolist()))
    left = [{i for i, token in enumerate(row) if token == MASK} for row in seen]
    assert [len(masked) for masked in left] == [6, 4, 2, 0] and left[1] == {3, 4, 8, 9}
    assert (out[ids != MASK] == ids[ids != MASK]).all()


def test_an_end_that_nothing_can_change_stops_the_sampler():
    """eos at the third of six positions: what comes before is filled as ever, and no pass is spent on what follows."""
    eos, logits = 8, torch.zeros(7, 10)
    logits[torch.arange(7), torch.tensor([0, 5, 6, eos, eos, 7, 7])] = torch.tensor([0.0, 5, 4, 3, 2, 9, 1])
    calls, results = [], []
    for end in (None, (eos, 1), (eos, 4), (eos, 7)):
        model = Oracle(logits)
        row = torch.tensor([1, *[MASK] * 6])
        results.append(unmask(model, row, MASK, [MASK], Sampling(6, 6, 6), 0, end).tolist())
        calls.append(model.calls)
    assert results[:2] == [[1, 5, 6, eos, eos, 7, 7], [1, 5, 6, eos, eos, 7, eos]] and calls[:2] == [6, 4]
    assert results[2][:4] == [1, 5, 6, 0] and results[2][4] == eos, "not before the first position where it may end"
    assert calls[2] == 6 and eos not in results[3]
    blocks = Oracle(logits)
    assert unmask(blocks, row, MASK, [MASK], Sampling(6, 6, 3), 0, (eos, 1)).tolist() == [1, 5, 6, *[eos] * 4]
    assert blocks.calls == 3, "the second block was never begun"


def test_what_watch_shows():
    """Given text dim, generated text bold, one _ for each mask."""
    shown = []
    live = SimpleNamespace(update=lambda text, refresh: shown.append(text))
    tokenizer = SimpleNamespace(mask_id=MASK, decode=lambda ids: "".join("abcdefghi"[i] for i in ids))
    show_step(
        live, [0, 1, MASK, MASK, MASK, 2], SimpleNamespace(tokenizer=tokenizer), torch.tensor([0, 1, 4, MASK, MASK, 2])
    )
    assert shown[0].plain == "abe__c"
    assert [(span.start, span.end, span.style) for span in shown[0].spans] == [
        (0, 2, "dim"),
        (2, 3, "bold"),
        (5, 6, "dim"),
    ]


def test_an_eos_that_is_also_the_pad_may_be_chosen():
    """As in LLaDA's tokenizer: forbidding every pad would leave texts without an end."""
    own = SimpleNamespace(eos_id=2, reserved=frozenset({1, 2, 3, 4}), vocab_size=6)
    shape = SimpleNamespace(vocab_size=8)
    assert never_chosen(SimpleNamespace(tokenizer=own, model=SimpleNamespace(shape=shape))) == [1, 3, 4, 6, 7]
    own.reserved = frozenset({1, 2, 4})
    assert never_chosen(SimpleNamespace(tokenizer=own, model=SimpleNamespace(shape=shape))) == [1, 4, 6, 7]


class Segmented(torch.nn.Module):
    """Logits of a position depend on the tokens of its segment and their places, as in the real model."""

    def __init__(self, vocabulary: int, length: int):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.parts = torch.randn(vocabulary, length, length, vocabulary, generator=generator, dtype=torch.float64)
        self.rows: list[int] = []

    def forward(self, ids, positions, segments=None):
        self.rows.append(len(ids))
        length = ids.shape[1]
        seen = torch.ones_like(ids) if segments is None else (segments == 0).int()
        parts = torch.stack([self.parts[ids[:, j], j, :length] * seen[:, j, None, None] for j in range(length)])
        return parts.sum(0).flatten(0, 1)[positions]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_a_batch_gives_what_its_texts_give_alone(cfg_scale):
    """Of different lengths, gaps, steps and ends: padding that is seen, shared noise or swapped logits would differ."""
    model, eos = Segmented(10, 9), 8
    shapes = [([1, *[MASK] * 6], (6,), 3), ([1, 2, *[MASK] * 2, 4, *[MASK] * 4], (2, 4), 4), ([1, MASK, 3], (1,), 1)]
    rows = []
    for n, (ids, gaps, steps) in enumerate(shapes):
        sampling = Sampling(max(gaps), steps, max(gaps), 0.7, cfg_scale, seed=4, top_p=0.9)
        rows.append(MaskedRow(torch.tensor(ids), sampling, n, gaps, (eos, 1)))
    together = [out.tolist() for out in unmask_rows(model, rows, MASK, [MASK])]
    most = max(model.rows)
    alone = [unmask_rows(model, [row], MASK, [MASK])[0].tolist() for row in rows]
    assert together == alone and most == (3 if cfg_scale == 0 else 6)


def test_gaps_of_their_own_lengths_are_filled_in_blocks_from_the_left():
    """Gaps of 2 and 4 in blocks of 2: the short one is full after the first block."""
    ids = torch.tensor([1, *[MASK] * 2, 2, *[MASK] * 4, 3])
    seen = []
    row = MaskedRow(ids, Sampling(4, 4, 2), 0, (2, 4))
    unmask_rows(Segmented(10, 9), [row], MASK, [MASK], lambda out: seen.append(out.tolist()))
    left = [{i for i, token in enumerate(out) if token == MASK} for out in seen]
    assert left[1] == {6, 7} and left[-1] == set()


def test_top_k_and_top_p_leave_what_they_say():
    """Every token that is left is drawn at its share, and no other; top_p counts the probability before a token."""
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    allowed = {(2, 1.0): 2, (None, 0.39): 1, (None, 0.41): 2, (None, 0.69): 2, (3, 0.75): 2, (9, 1.0): 4}
    for (k, p), count in allowed.items():
        sampling = Sampling(1, 1, 1, 1.0, top_k=k, top_p=p)
        left = _truncated(probabilities.log()[None].expand(2, -1), sampling)
        assert (left.isfinite().sum(dim=1) == count).all() and left[0, :count].isfinite().all(), (k, p)
        ids, drawn = torch.tensor([4]), set()
        for sample in range(100):
            drawn.add(unmask(Oracle(probabilities.log()[None]), ids, 4, [], sampling, sample).item())
        assert drawn == set(range(count)), (k, p)


def test_eos_is_held_back():
    """It is the surest proposal everywhere: chosen at once, after all others, or never."""
    eos, logits = 8, torch.zeros(5, 10)
    logits[:, 5] = 1.0
    logits[2, eos] = 9.0
    results = {}
    for way in ("any", "last", "never"):
        model, seen = Oracle(logits), []
        row = MaskedRow(torch.tensor([1, *[MASK] * 4]), Sampling(4, 4, 4, eos=way), 0, None, (eos, 1))
        (out,) = unmask_rows(model, [row], MASK, [MASK], lambda ids, seen=seen: seen.append(ids.tolist()))
        results[way] = out.tolist(), model.calls, seen[0].count(eos)
    assert results == {
        "any": ([1, 5, eos, eos, eos], 2, 1), "last": ([1, 5, eos, 5, 5], 4, 0), "never": ([1, 5, 5, 5, 5], 4, 0)
    }  # fmt: skip


@pytest.mark.parametrize("text", ["1e-400", "1e-320", "1e-7", "0.0000001", "-0.1", "nan", "inf"])
def test_a_temperature_that_is_lost_in_rounding_is_refused(text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError), match=r"temperature|too small"):
        Sampling(1, 1, 1, temperature(text))
    for fine in ("0", "0.0", "0e5", "1e-3", "1.5"):
        Sampling(1, 1, 1, temperature(fine))
    with pytest.raises(ValueError, match="--top-k and --top-p have no effect"):
        Sampling(1, 1, 1, 0.0, top_p=0.5)


def test_results_keep_the_inputs_own_fields():
    text = Filled(["a", "x", "b"], [1, 2, 3], np.array([False, True, False]), False)
    found = Estimate(np.array([2.0]), np.array([0.1]), np.array([1]), 1)
    own = {"id": 7, "text": "a<mask>b", "tokens": "mine", "meta": {"k": 1}}
    made = result(Prompt("place", own, ["a", "b"], (1,), Sampling(1, 1, 1)), 0, text, found, 0.0)
    assert (made["id"], made["meta"], made["text"], made["tokens"]) == (7, {"k": 1}, "axb", 1)
    assert made["input"] == {"text": "a<mask>b", "tokens": "mine"}
    assert "input" not in result(Prompt("p", {"id": 1}, ["a", "b"], (1,), Sampling(1, 1, 1)), 0, text, found, 0.0)


@pytest.mark.parametrize(
    ("record", "wanted", "lengths"),
    [({}, [3], (3, 3)), ({}, [3, 5], (3, 5)), ({"gen_length": 2}, [3], (2, 2)), ({"gen_length": [1, 4]}, [3], (1, 4))],
)
def test_lengths_of_gaps(record, wanted, lengths):
    assert gap_lengths("f:1", record, ["", "", ""], wanted) == lengths
    for wrong in ([1, 2, 3], 0, [2, 0], "4", [1.5, 2], [], True):
        with pytest.raises(ValueError, match="f:1: 'gen_length'"):
            gap_lengths("f:1", {"gen_length": wrong}, ["", "", ""], wanted)
