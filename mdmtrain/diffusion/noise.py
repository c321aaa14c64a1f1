"""Every random number of a run: a pure function of (seed, stream, step, slot).

Counter-based generation (Philox) leaves no generator state to save, to broadcast or to lose on resume: any process can
draw any slot's noise at any time. Only the bit generator's raw output is used, because numpy promises that it stays the
same from release to release; its distributions (`Generator.normal` and so on) carry no such promise.
"""

import hashlib
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a random number is for. Values are part of every run's meaning: add new ones, never renumber."""

    STRATA = 1  # one uniform per slot of a step, stratified
    POSITIONS = 2  # one uniform per token position of a slot
    ORDER = 3  # the order of the samples; step = epoch, slot = source
    INIT = 4  # initial weights; step = first 8 bytes of sha256(parameter name)
    LENGTH = 5  # which rows are cut to a random length, and to which
    EVALUATION = 6  # the fixed noise of evaluation; two steps an estimator: strata, positions
    GENERATION = 7  # sampling: positions and tokens
    PROBE = 8  # the live decomposition; step 2s: rows and rates of the probe after step s, step 2s + 1: positions
    FIT = 9  # the fit of p before training; step 0: rows, step 1: strata, step 2: positions
    TASKS = 10  # made prompts and answers; step = kind, slot = number of the task
    SHARDS = 11  # the order of the shards, where rows are shuffled by shards; step = epoch, slot = source


def philox(seed: int, stream: Stream, step: int, slot: int = 0, block: int = 0) -> np.random.Philox:
    """The bit generator of one (seed, stream, step, slot), at its block of four words number `block`.

    Word 0 of the counter counts blocks, so step and slot (words 2 and 3) are never reached by carry and no two slots
    overlap.
    """
    return np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([block, 0, step, slot], dtype=np.uint64)
    )


def uniforms(bits: np.random.Philox, count: int) -> np.ndarray:
    """The next `count` uniforms on [0, 1), float32 [count], exact multiples of 2^-24."""
    return _unit(bits.random_raw(count))


def _unit(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def position_uniforms(
    seed: int, step: int, slots: np.ndarray, length: int, stream: Stream = Stream.POSITIONS
) -> np.ndarray:
    """The first `length` uniforms of each slot of a step, one per token position: float32 [len(slots), length]."""
    bits, words = philox(seed, stream, step), np.empty((len(slots), length), dtype=np.uint64)
    start = bits.state  # one generator that is put before each slot's first block: making one takes ten times as long
    for row, slot in zip(words, slots, strict=True):
        start["state"]["counter"][3] = slot
        bits.state = start
        row[:] = bits.random_raw(length)
    return _unit(words)


def normals(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """Standard normals number first .. first + count of the parameter called `name`: float32 [count].

    Any slice can be drawn by itself, so each rank fills just its own shard of a parameter, and every mesh starts from
    the same weights. A block of the counter makes eight normals (Box-Muller on 32-bit halves, in float64).
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    skip = first % 8
    blocks = -(-(skip + count) // 8)
    halves = philox(seed, Stream.INIT, key, block=first // 8).random_raw(4 * blocks).view(np.uint32)
    unit = (halves.astype(np.float64) + 0.5) * 2.0**-32  # (0, 1): the logarithm is finite
    radius, angle = np.sqrt(-2.0 * np.log(unit[0::2])), 2.0 * np.pi * unit[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[skip : skip + count].astype(np.float32)
