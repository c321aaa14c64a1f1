"""Random numbers of a run. Each is a pure function of (seed, stream, step, slot).

Philox is a counter-based generator, so there is no state to save, broadcast or restore: any process can draw the noise
of any slot. Only the raw output of the bit generator is used, because numpy guarantees that it is the same in all
releases. numpy gives no such guarantee for its distributions (`Generator.normal` and others).
"""

import hashlib
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The use of a random number. Every run's noise depends on these values: add new ones, never renumber."""

    STRATA = 1  # one uniform per slot of a step, stratified
    POSITIONS = 2  # one uniform per token position of a slot
    ORDER = 3  # the order of the samples; step = epoch, slot = source
    INIT = 4  # initial weights; step = first 8 bytes of sha256(parameter name)
    LENGTH = 5  # which rows are cut to a random length, and their lengths
    EVALUATION = 6  # the fixed noise of evaluation; each estimator has two steps: strata, positions
    GENERATION = 7  # sampling: positions and tokens
    PROBE = (
        8  # variance measured in training; step 2s: rows and rates of the probe after step s, step 2s + 1: positions
    )
    FIT = 9  # the fit of p before training; step 0: rows, step 1: strata, step 2: positions
    TASKS = 10  # generated tasks; step = kind, slot = number of the task
    SHARDS = 11  # the order of the shards, where rows are shuffled by shards; step = epoch, slot = source


def philox(seed: int, stream: Stream, step: int, slot: int = 0, block: int = 0) -> np.random.Philox:
    """The bit generator of one (seed, stream, step, slot), positioned at block number `block` of four words.

    Word 0 of the counter counts blocks. Step and slot are words 2 and 3, which a carry never reaches, so the noise of
    two slots never overlaps.
    """
    return np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([block, 0, step, slot], dtype=np.uint64)
    )


def uniforms(bits: np.random.Philox, count: int) -> np.ndarray:
    """The next `count` uniforms on [0, 1): float32 [count], multiples of 2^-24."""
    return _unit(bits.random_raw(count))


def _unit(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def position_uniforms(
    seed: int, step: int, slots: np.ndarray, length: int, stream: Stream = Stream.POSITIONS
) -> np.ndarray:
    """The first `length` uniforms of each slot of a step, one per token position: float32 [len(slots), length]."""
    bits = philox(seed, stream, step)
    words = np.empty((len(slots), length), dtype=np.uint64)
    start = bits.state  # one generator is moved to each slot: making a new one takes ten times as long
    for row, slot in zip(words, slots, strict=True):
        start["state"]["counter"][3] = slot
        bits.state = start
        row[:] = bits.random_raw(length)
    return _unit(words)


def normals(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """Standard normals number first to first + count - 1 of the parameter called `name`: float32 [count].

    Any slice can be drawn without the others. So each rank draws only its shard of a parameter, and the weights do not
    depend on the mesh. A block of the counter gives eight normals (Box-Muller on 32-bit halves, in float64).
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    skip = first % 8
    blocks = -(-(skip + count) // 8)
    halves = philox(seed, Stream.INIT, key, block=first // 8).random_raw(4 * blocks).view(np.uint32)
    unit = (halves.astype(np.float64) + 0.5) * 2.0**-32  # in (0, 1), so that the logarithm is finite
    radius = np.sqrt(-2.0 * np.log(unit[0::2]))
    angle = 2.0 * np.pi * unit[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[skip : skip + count].astype(np.float32)
