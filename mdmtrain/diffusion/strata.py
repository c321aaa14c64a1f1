"""Stratified uniforms for a global batch (mathematics.md section 6; StraTS of arXiv 2511.18159, over all ranks).

Every rank computes the same uniforms for all slots of a step from (seed, step). This needs no communication, and the
result does not depend on the number of ranks, on the micro-batch or on a resume.
"""

import numpy as np

from mdmtrain.diffusion import noise
from mdmtrain.diffusion.noise import Stream


def uniforms(
    seed: int, step: int, count: int, strata: str, stream: Stream = Stream.STRATA, blocks: int = 1
) -> np.ndarray:
    """One uniform per slot of a step: float64 [count] on [0, 1).

    strata: "global" puts exactly one slot into each of `count` equal strata. It also spreads every aligned block of 2^j
    slots (2^j dividing count) over 2^j equal strata, so that each rank and micro-batch is balanced too. "rank"
    stratifies each of `blocks` equal blocks independently, as trainers without coordination do; it exists for
    comparison. "none" draws independently.
    """
    bits = noise.philox(seed, stream, step)
    match strata:
        case "none":
            return noise.uniforms(bits, count).astype(np.float64)
        case "global":
            return _stratified(bits, count)
        case "rank":
            parts = [noise.philox(seed, stream, step, block + 1) for block in range(blocks)]
            return np.concatenate([_stratified(part, count // blocks) for part in parts])
    raise AssertionError(strata)


def _stratified(bits: np.random.Philox, count: int) -> np.ndarray:
    """Radical inverse of the slot index over the factors of `count`, with nested (Owen) permutations and a jitter."""
    rest = np.arange(count)
    stratum = np.zeros(count, dtype=np.int64)
    nodes = 1
    for base in _factors_twos_first(count):
        # Each value of the digits above has its own random permutation of this digit.
        permutations = bits.random_raw(nodes * base).reshape(nodes, base).argsort(axis=1, kind="stable")
        stratum = stratum * base + permutations[stratum, rest % base]
        rest //= base
        nodes *= base
    return (stratum + noise.uniforms(bits, count).astype(np.float64)) / count


def _factors_twos_first(count: int) -> list[int]:
    factors, divisor = [], 2
    while count > 1:
        while count % divisor == 0:
            factors.append(divisor)
            count //= divisor
        divisor += 1
    return factors
