"""Map a global sample number to a sample: random access into a shuffled, weighted, endless stream of windows.

The order is computed, not stored, and no draw depends on an earlier one. So any rank can find any sample
directly, however large the corpus is.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from mdmtrain.diffusion import noise

_ROUNDS = 6
_LONGEST_PERIOD = 100_000


@dataclass(frozen=True)
class Cursor:
    """The position of a run in its data after `step` steps. All later steps use equal numbers of samples and tokens."""

    step: int = 0
    sample: int = 0  # the number of the next sample
    tokens: int = 0  # positions trained on, padding included
    phases: tuple[int, ...] = ()  # the first sample of each phase that began before `step`

    def at(self, step: int, samples_per_step: int, tokens_per_step: int) -> "Cursor":
        """The position after a later step."""
        steps = step - self.step
        assert steps >= 0, (step, self)
        return replace(
            self,
            step=step,
            sample=self.sample + steps * samples_per_step,
            tokens=self.tokens + steps * tokens_per_step,
        )


START = Cursor()


def permute(
    index: int | np.ndarray,
    size: int,
    seed: int,
    epoch: int,
    source: int = 0,
    stream: noise.Stream = noise.Stream.ORDER,
) -> int | np.ndarray:
    """A random permutation of range(size) as a function: its value at `index` (int or int64 of any shape; 1 <= size <=
    2^62).

    A Feistel network is a bijection of 4^h values for any round function; here 4^h is the smallest one >= size. It is
    applied again to values outside the range until they are inside (fewer than 4 evaluations on average).
    """
    keys = _round_keys(seed, stream, epoch, source)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = np.array(index, dtype=np.uint64, ndmin=1)
    assert 1 <= size <= 1 << 62 and values.size and values.max() < size, (size, index)
    values = _feistel(values, half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return int(values[0]) if np.ndim(index) == 0 else values.astype(np.int64)


@lru_cache(maxsize=1024)
def _round_keys(seed: int, stream: noise.Stream, epoch: int, source: int) -> tuple[np.uint64, ...]:
    return tuple(noise.philox(seed, stream, epoch, source).random_raw(_ROUNDS))


def _feistel(values: np.ndarray, half: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    shift = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left = values >> shift
    right = values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << shift | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a change of one input bit flips about half of the output bits."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Shuffle:
    """The rows of a source in a new random order each epoch: read number -> row.

    A turn is a range of reads that needs only certain shards. Here a turn is an epoch, which needs all shards.
    """

    def __init__(self, size: int, seed: int, source: int, shards: int = 1):
        """size: the number of rows; shards: the number of shards that contain them."""
        self.size = size
        self._seed = seed
        self._source = source
        self._shards = shards

    def __call__(self, reads: np.ndarray) -> np.ndarray:
        """The rows of the given reads (numbered over all epochs): int64 in, int64 of the same shape out."""
        rows = np.empty_like(reads)
        epochs, places = np.divmod(reads, self.size)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            rows[mine] = permute(places[mine], self.size, self._seed, int(epoch), self._source)
        return rows

    def turn_of(self, read: int) -> int:
        return read // self.size

    def first_read(self, turn: int) -> int:
        """The first read of a turn."""
        return turn * self.size

    def shards_of(self, turn: int) -> np.ndarray:
        """The shards that a turn reads: int64 [shards]."""
        return np.arange(self._shards)


class ShardShuffle(Shuffle):
    """A `Shuffle` that needs only a few shards at a time.

    Each epoch has its own random order of the shards. The rows of up to `together` shards that follow each other in
    this order are shuffled together. The reads of these rows are a turn.
    """

    def __init__(self, shard_rows: np.ndarray, together: int, seed: int, source: int):
        """shard_rows: rows of each shard, int64 [shards]; together: the maximum number of shards shuffled together."""
        self._firsts = np.cumsum([0, *shard_rows])  # the first row of each shard
        super().__init__(int(self._firsts[-1]), seed, source, len(shard_rows))
        self._turns = -(-len(shard_rows) // together)  # turns in an epoch
        self._edges = np.arange(self._turns + 1) * len(shard_rows) // self._turns  # bounds in the order of shards
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the shards in an epoch [shards], the cumulative reads before each shard [shards + 1], and the
        cumulative reads before each turn [turns + 1]; the last element of both is the total."""
        found = self._epochs.get(epoch)
        if found is None:
            places = np.arange(self._shards)
            shards = permute(places, self._shards, self._seed, epoch, self._source, noise.Stream.SHARDS)
            assert isinstance(shards, np.ndarray)  # because the positions are an array
            before = np.cumsum([0, *np.diff(self._firsts)[shards]])
            found = shards, before, before[self._edges]
            self._epochs = {**dict([*self._epochs.items()][-1:]), epoch: found}  # keeps two: reads may cross epochs
        return found

    def __call__(self, reads: np.ndarray) -> np.ndarray:
        rows = np.empty_like(reads)
        epochs, places = np.divmod(reads, self.size)
        for epoch in np.unique(epochs):
            shards, before, turns = self._epoch(int(epoch))
            parts = np.searchsorted(turns, places, side="right") - 1
            for part in np.unique(parts[epochs == epoch]):
                mine = (epochs == epoch) & (parts == part)
                first = turns[part]
                size = int(turns[part + 1] - turns[part])
                turn = int(epoch) * self._turns + int(part)
                place = first + permute(places[mine] - first, size, self._seed, turn, self._source)
                at = np.searchsorted(before, place, side="right") - 1
                rows[mine] = self._firsts[shards[at]] + place - before[at]
        return rows

    def turn_of(self, read: int) -> int:
        epoch, place = divmod(read, self.size)
        return epoch * self._turns + int(np.searchsorted(self._epoch(epoch)[2], place, side="right")) - 1

    def first_read(self, turn: int) -> int:
        epoch, part = divmod(turn, self._turns)
        return epoch * self.size + int(self._epoch(epoch)[2][part])

    def shards_of(self, turn: int) -> np.ndarray:
        epoch, part = divmod(turn, self._turns)
        return self._epoch(epoch)[0][self._edges[part] : self._edges[part + 1]]


class Mixture:
    """Samples of several sources in exact proportions, which may differ between phases.

    Among the first n samples of a phase, the number from each source differs from n * share by less than one. The reads
    of a source are numbered across all phases.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]], sources: Sequence[Shuffle]):
        """phases: (first sample, relative weights of the sources) of each phase, ascending; the first one begins at 0.

        If several phases begin with the same sample, the last one is used. Raises ValueError if a period is too long.
        """
        self.sources = sources
        self._firsts = [first for first, _ in phases]
        self._phases = [
            _Phase(weights, "data.phases" if number else "data.sources") for number, (_, weights) in enumerate(phases)
        ]
        self._before = [np.zeros(len(sources), dtype=np.int64)]  # reads of each source before each phase
        for phase, first, end in zip(self._phases, self._firsts, self._firsts[1:], strict=False):
            self._before.append(self._before[-1] + phase.counts(end - first))

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) of global sample numbers: int64 in, two int64 of the same shape out."""
        samples = np.asarray(samples, dtype=np.int64)
        source, read, row = (np.empty_like(samples) for _ in range(3))
        numbers = np.searchsorted(self._firsts, samples, side="right") - 1
        for number in np.unique(numbers):
            mine = numbers == number
            source[mine], within = self._phases[number](samples[mine] - self._firsts[number])
            read[mine] = self._before[number][source[mine]] + within
        for one in np.unique(source):
            mine = source == one
            row[mine] = self.sources[one](read[mine])
        return source, row

    def counts(self, samples: int) -> np.ndarray:
        """The number of samples of each source among the first `samples` samples: int64 [sources]."""
        number = bisect_right(self._firsts, samples) - 1
        return self._before[number] + self._phases[number].counts(samples - self._firsts[number])


class _Phase:
    """The source of each sample of a phase, and the number of earlier samples of that source in the phase."""

    def __init__(self, weights: Sequence[float], key: str):
        # A float means the decimal number that the user wrote: 0.1 is one tenth.
        shares = [Fraction(str(weight)) for weight in weights]
        shares = [share / sum(shares) for share in shares]
        self._period = lcm(*(share.denominator for share in shares))
        if self._period > _LONGEST_PERIOD:
            raise ValueError(
                f"{key} weights {list(weights)} have a period of {self._period:,} samples "
                f"(at most {_LONGEST_PERIOD:,}): round them to small integers, or to hundredths that add up to 1"
            )
        self._quota = np.array([int(share * self._period) for share in shares], dtype=np.int64)
        self._source, self._earlier = _quota_method(self._quota, self._period)

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounds, place = np.divmod(samples, self._period)
        source = self._source[place]
        return source, rounds * self._quota[source] + self._earlier[place]

    def counts(self, samples: int) -> np.ndarray:
        rounds, rest = divmod(samples, self._period)
        return rounds * self._quota + np.bincount(self._source[:rest], minlength=len(self._quota))


def _quota_method(quota: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
    """(source of each sample in a period, number of earlier samples of that source): two int64 [period].

    Balinski and Young 1975: the next sample goes to the source with the largest quota / (count + 1), among those that
    then have no more than their share, rounded up. Floats compare these ratios exactly, because they are ratios of
    integers below 2^17.
    """
    source = np.empty(period, dtype=np.int64)
    earlier = np.empty(period, dtype=np.int64)
    count = np.zeros_like(quota)
    for n in range(period):
        eligible = count * period < (n + 1) * quota
        source[n] = best = np.argmax(np.where(eligible, quota / (count + 1), -1.0))
        earlier[n] = count[best]
        count[best] += 1
    assert (count == quota).all()
    return source, earlier
