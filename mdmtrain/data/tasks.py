"""Prompts with one exact answer, made from a seed: arithmetic in words, table look-up, string transformation.

They measure fine-tuning (docs/finetune-study.md): an answer is right or wrong, nothing has to be downloaded, and any
number of them can be made. The length of an answer follows from the kind of task alone, so the number of masked
positions gives nothing away.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from string import ascii_lowercase
from typing import Literal, get_args

import numpy as np

from mdmtrain.diffusion import noise

Split = Literal["text", "train", "test"]  # pretraining, fine-tuning, scoring
SHARES: dict[Split, float] = {"text": 0.4, "train": 0.5, "test": 0.1}  # of all prompts

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
TABLE = 6  # pairs of a key and a value
ASKED = 3  # keys of the table that are looked up
LETTERS = 5  # of a string that is transformed
TRANSFORMATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda letters: letters[::-1],
    "sort": lambda letters: "".join(sorted(letters)),
    "rotate": lambda letters: letters[1:] + letters[:1],
}
DRAWS = 26 + TABLE + TABLE  # uniforms that the greediest kind takes
FUTILE = 10_000  # draws in a row that give nothing new


@dataclass(frozen=True)
class Task:
    """A prompt and the only response that counts as right."""

    kind: str  # a key of KINDS
    prompt: str
    response: str


def in_words(number: int) -> str:
    """A whole number of 0 .. 99 in English: 47 -> "forty seven"."""
    if number < len(UNITS):
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens - 2] + (f" {UNITS[unit]}" if unit else "")


def arithmetic(u: np.ndarray) -> Task:
    """The sum or the difference of two numbers below 100, the larger one first; the answer has three digits."""
    smaller, larger = sorted((u[:2] * 100).astype(int).tolist())
    word, result = ("plus", larger + smaller) if u[2] < 0.5 else ("minus", larger - smaller)
    return Task("arithmetic", f"({in_words(larger)} {word} {in_words(smaller)}):\n", f"({result:03d})")


def lookup(u: np.ndarray) -> Task:
    """A table of letters with digits, and some of the letters: the answer is their digits, in the order asked."""
    keys, values = some_letters(u[:26], TABLE), (u[26 : 26 + TABLE] * 10).astype(int).tolist()
    asked = np.argsort(u[26 + TABLE :], kind="stable")[:ASKED].tolist()
    table = " ".join(f"{key}{value}" for key, value in zip(keys, values, strict=True))
    prompt = f"({table}: {' '.join(keys[i] for i in asked)}):\n"
    return Task("lookup", prompt, f"({''.join(str(values[i]) for i in asked)})")


def transformation(u: np.ndarray) -> Task:
    """Different letters, to be reversed, sorted or rotated by one place."""
    letters, name = some_letters(u[:26], LETTERS), list(TRANSFORMATIONS)[int(u[26] * len(TRANSFORMATIONS))]
    prompt = f"({name} {' '.join(letters)}):\n"
    return Task("transformation", prompt, f"( {' '.join(TRANSFORMATIONS[name](letters))})")


def some_letters(u: np.ndarray, number: int) -> str:
    """`number` different letters, in any order. u: 26 uniforms."""
    return "".join(ascii_lowercase[i] for i in np.argsort(u, kind="stable")[:number])


KINDS: dict[str, Callable[[np.ndarray], Task]] = {
    "arithmetic": arithmetic,
    "lookup": lookup,
    "transformation": transformation,
}


def split_of(prompt: str) -> Split:
    """The split of a prompt, by its hash: splits of whatever sizes and seeds never share one."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") / 2**48
    edges = np.cumsum(list(SHARES.values()))[:-1]
    return get_args(Split)[int(np.searchsorted(edges, place, side="right"))]


def make_tasks(split: Split, number: int, seed: int) -> list[Task]:
    """`number` tasks of a split, the kinds in turn. The first n of a longer list are the list of n.

    Those of "test" are all different; the others come as they are drawn. Raises ValueError where a kind has not so many.
    """
    kinds = [_of_kind(kind, split, -(-(number - i) // len(KINDS)), seed) for i, kind in enumerate(KINDS)]
    return [kinds[i % len(KINDS)][i // len(KINDS)] for i in range(number)]


def _of_kind(kind: str, split: Split, number: int, seed: int) -> list[Task]:
    found: list[Task] = []
    prompts: set[str] = set()
    newest = 0
    for slot in count():
        if len(found) == number:
            return found
        if slot - newest > FUTILE:
            raise ValueError(f"there are fewer than {number:,} {kind} tasks in the {split} split: ask for fewer")
        bits = noise.philox(seed, noise.Stream.TASKS, list(KINDS).index(kind), slot)
        task = KINDS[kind](noise.uniforms(bits, DRAWS).astype(np.float64))
        if split_of(task.prompt) != split or (split == "test" and task.prompt in prompts):
            continue
        found.append(task)
        prompts.add(task.prompt)
        newest = slot
