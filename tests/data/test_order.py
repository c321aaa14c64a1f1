"""The order is a bijection that mixes well, and the mixture is exact over every prefix."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.data.order import Mixture, ShardShuffle, Shuffle, permute
from tests.conftest import SOAK


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_small_size_is_permuted(seed):
    for size in [*range(1, 300), 1023, 1024, 1025, 4097]:
        assert sorted(permute(np.arange(size), size, seed, epoch=3)) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**63 - 1), st.integers(0, 100), st.data())
def test_large_sizes_stay_in_range_and_apart(size, seed, epoch, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    values = permute(index, size, seed, epoch)
    assert values.min() >= 0 and values.max() < size
    assert len(set(values.tolist())) == len(index)
    assert [permute(int(i), size, seed, epoch) for i in index] == values.tolist()


def test_epochs_sources_and_seeds_have_their_own_order():
    orders = [permute(np.arange(500), 500, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    agreements = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10


def test_an_order_is_part_of_a_runs_meaning():
    assert permute(np.arange(8), 1000, seed=1, epoch=2, source=3).tolist() == [268, 82, 983, 833, 753, 94, 874, 801]


@pytest.mark.parametrize("size", [3, 5, 10, 16])
def test_small_orders_are_uniform_over_epochs(size):
    """Where each element lands, over many epochs: chi-square of the size x size table of counts."""
    epochs = 3000
    table = np.zeros((size, size))
    for epoch in range(epochs):
        table[np.arange(size), permute(np.arange(size), size, 9, epoch)] += 1
    chi = ((table - epochs / size) ** 2 / (epochs / size)).sum()
    freedom = (size - 1) ** 2
    assert chi < freedom + 6 * np.sqrt(2 * freedom)


def test_neighbours_in_a_large_order_are_unrelated():
    size = 10**6 + 3
    values = permute(np.arange(100_000), size, seed=4, epoch=0) / size
    steps = np.diff(values)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert abs(np.abs(steps).mean() - 1 / 3) < 0.01  # of two independent uniforms
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    # Less than a multinomial: a tenth of the values are drawn without replacement.
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 6 * np.sqrt(2 * 99)


def mixed(weights: list[float], sizes: list[int], seed: int) -> Mixture:
    """One phase, rows shuffled over whole sources."""
    return Mixture([(0, weights)], [Shuffle(size, seed, number) for number, size in enumerate(sizes)])


shares = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=2000 if SOAK else 100, deadline=None)
@given(shares, st.integers(1, 50))
def test_every_prefix_of_a_mixture_is_exact(weights, divisor):
    """|count - n * w| < 1 for every n and every source, over more than two periods."""
    n = 2 * sum(weights) + 7
    source, _ = mixed([w / 8 for w in weights], [divisor] * len(weights), seed=0)(np.arange(n))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, n + 1)[:, None] * np.array([float(Fraction(w, sum(weights))) for w in weights])
    assert np.abs(counts - exact).max() < 1 - 1e-9


def test_a_mixture_goes_through_every_source_once_an_epoch():
    sizes = [7, 30]
    source, window = mixed([0.3, 0.7], sizes, seed=1)(np.arange(100))
    for one, size in enumerate(sizes):
        mine = window[source == one]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert window[source == 0][:7].tolist() != window[source == 0][7:14].tolist()


def test_a_mixture_is_random_access():
    mixture = mixed([1.0, 2.5, 0.1], [11, 13, 5], seed=2)
    n = np.arange(10**12, 10**12 + 200)
    source, window = mixture(n)
    for i in (0, 57, 199):
        one, place = mixture(n[i : i + 1])
        assert (one[0], place[0]) == (source[i], window[i])


def test_decimal_weights_mean_what_was_written_and_long_periods_are_refused():
    source, _ = mixed([0.1, 0.2, 0.7], [5, 5, 5], seed=0)(np.arange(10))
    assert np.bincount(source).tolist() == [1, 2, 7]
    with pytest.raises(ValueError, match="round them"):
        mixed([0.123456789, 0.5], [5, 5], seed=0)


@st.composite
def phases(draw) -> tuple[list[tuple[int, list[int]]], int]:
    """Phases of a few sources, each of which may have no share, and a number of samples beyond the last start."""
    sources = draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 9), min_size=sources, max_size=sources).filter(any)
    starts = sorted(draw(st.lists(st.integers(0, 60), max_size=3)))
    return [(start, draw(weights)) for start in [0, *starts]], (starts or [0])[-1] + draw(st.integers(1, 60))


@settings(max_examples=1000 if SOAK else 100, deadline=None)
@given(phases())
def test_every_prefix_of_every_phase_is_exact(made):
    """Counts by source, against the samples themselves and against n * share to within one, phase by phase."""
    listed, n = made
    sources = len(listed[0][1])
    order = Mixture(listed, [Shuffle(7, 0, number) for number in range(sources)])
    source, row = order(np.arange(n))
    counts = np.cumsum(source[:, None] == np.arange(sources), axis=0)
    assert all((order.counts(k) == counts[k - 1]).all() for k in range(1, n + 1)) and not order.counts(0).any()
    for (start, weights), (end, _) in zip(listed, [*listed[1:], (n, None)], strict=True):
        before = counts[start - 1] if start else 0
        exact = np.arange(1, end - start + 1)[:, None] * np.array(weights) / sum(weights)
        assert end == start or np.abs(counts[start:end] - before - exact).max() < 1 - 1e-9
    for one in range(sources):  # reads go on through all phases: each epoch has each row once
        mine = row[source == one]
        for epoch in range(len(mine) // 7):
            assert sorted(mine[7 * epoch : 7 * epoch + 7]) == list(range(7))


@settings(max_examples=500 if SOAK else 60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 5), st.integers(0, 40))
def test_rows_shuffled_by_shards_are_an_epoch_and_its_turns_say_their_shards(shard_rows, together, first):
    shuffle = ShardShuffle(np.array(shard_rows), together, seed=3, source=1)
    size = sum(shard_rows)
    reads = np.arange(3 * size)
    rows = shuffle(reads)
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))
    owner = np.repeat(np.arange(len(shard_rows)), shard_rows)
    for read in reads:
        turn = shuffle.turn_of(int(read))
        shards = shuffle.shards_of(turn)
        assert owner[rows[read]] in shards and 1 <= len(shards) <= together
        assert shuffle.first_read(turn) <= read < shuffle.first_read(turn + 1)
    some = reads[first % len(reads) :]
    assert (ShardShuffle(np.array(shard_rows), together, 3, 1)(some) == rows[some]).all()  # from anywhere


def test_shards_are_in_another_order_each_epoch_and_their_rows_are_mixed():
    shuffle = ShardShuffle(np.full(40, 50), 8, seed=0, source=0)
    turns = np.array([shuffle.shards_of(turn) for turn in range(10)])
    epochs = turns.reshape(2, 40)
    assert (np.sort(epochs) == np.arange(40)).all() and (epochs[0] != epochs[1]).any()
    shards = shuffle(np.arange(400)) // 50
    counts = np.array([np.bincount(shards[at : at + 100], minlength=40)[turns[0]] for at in range(0, 400, 100)])
    assert ((counts - 12.5) ** 2 / 12.5).sum() < 24 + 6 * np.sqrt(2 * 24)  # less than independent draws
