"""Which sample a global sample number is: random access into a shuffled, weighted, endless stream of windows.

Nothing is stored and nothing is drawn in sequence, so any rank finds any sample at once, however large the corpus.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from mdmtrain.diffusion import noise

_ROUNDS = 6
_LONGEST_PERIOD = 100_000


@dataclass(frozen=True)
class Cursor:
    """Where a run stood in its data after some step. From there on each step takes as much as the step before."""

    step: int = 0
    sample: int = 0  # number in the order of the sample that comes next
    tokens: int = 0  # positions trained on, padding included

    def at(self, step: int, samples_per_step: int, tokens_per_step: int) -> "Cursor":
        """Where it stands after a later step."""
        steps = step - self.step
        assert steps >= 0, (step, self)
        return Cursor(step, self.sample + steps * samples_per_step, self.tokens + steps * tokens_per_step)


START = Cursor()


def permute(index: int | np.ndarray, size: int, seed: int, epoch: int, source: int = 0) -> int | np.ndarray:
    """A shuffle of range(size) as a function: the element at `index` (int, or int64 of any shape; 1 <= size <= 2^62).

    A Feistel network, which is a bijection of 4^h values for any round function, on the smallest 4^h >= size; values
    outside the range are walked on along their cycle until they are inside (fewer than 4 evaluations in the mean).
    """
    keys = _round_keys(seed, epoch, source)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = np.array(index, dtype=np.uint64, ndmin=1)
    assert 1 <= size <= 1 << 62 and values.size and values.max() < size, (size, index)
    values = _feistel(values, half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return int(values[0]) if np.ndim(index) == 0 else values.astype(np.int64)


@lru_cache(maxsize=1024)
def _round_keys(seed: int, epoch: int, source: int) -> tuple[np.uint64, ...]:
    return tuple(noise.philox(seed, noise.Stream.ORDER, epoch, source).random_raw(_ROUNDS))


def _feistel(values: np.ndarray, half: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << shift | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the input flips about half of those of the output."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Mixture:
    """Samples of several sources in exact proportions: after any n samples, each has n * weight to within one."""

    def __init__(self, weights: list[float], sizes: list[int], seed: int):
        """`weights` are relative, `sizes` are windows per source. Raises ValueError where the period is too long."""
        # A float stands for what the user wrote: 0.1 is one tenth.
        shares = [Fraction(str(weight)) for weight in weights]
        shares = [share / sum(shares) for share in shares]
        self._period = lcm(*(share.denominator for share in shares))
        if self._period > _LONGEST_PERIOD:
            raise ValueError(
                f"data.sources weights {weights} repeat only after {self._period:,} samples "
                f"(at most {_LONGEST_PERIOD:,}): round them, to 1, 2, 3 or to hundredths that add up to 1"
            )
        self._sizes, self._seed = sizes, seed
        self._quota = np.array([int(share * self._period) for share in shares], dtype=np.int64)
        self._source, self._earlier = _quota_method(self._quota, self._period)

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, window) of global sample numbers: int64 in, two int64 of the same shape out.

        Every source is gone through in a fresh order each epoch of its own.
        """
        rounds, place = np.divmod(np.asarray(samples, dtype=np.int64), self._period)
        source = self._source[place]
        index = rounds * self._quota[source] + self._earlier[place]
        window = np.empty_like(index)
        for one in np.unique(source):
            size = self._sizes[one]
            epochs = index // size
            for epoch in np.unique(epochs[source == one]):
                mine = (source == one) & (epochs == epoch)
                window[mine] = permute(index[mine] % size, size, self._seed, int(epoch), int(one))
        return source, window


def _quota_method(quota: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each sample in a period, and how many earlier samples of the period it has: int64 [period] each.

    Balinski and Young 1975: the next goes to the largest quota / (count + 1) among the sources that this leaves
    below their share rounded up. (The ratios are of integers below 2^17, so that floats compare them exactly.)
    """
    source, earlier = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    count = np.zeros_like(quota)
    for n in range(period):
        eligible = count * period < (n + 1) * quota
        source[n] = best = np.argmax(np.where(eligible, quota / (count + 1), -1.0))
        earlier[n] = count[best]
        count[best] += 1
    assert (count == quota).all()
    return source, earlier
