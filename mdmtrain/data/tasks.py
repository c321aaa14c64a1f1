"""Generate prompts with one exact answer from a seed: arithmetic in words, table look-up, string transformation.

They measure fine-tuning (docs/finetune-study.md). An answer is right or wrong, nothing has to be downloaded, and there
are enough prompts for large data sets. Tasks of a kind have different sizes, so that accuracy rises gradually.
The length of an answer follows from its prompt, so the number of masked positions reveals nothing about the answer.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Literal, get_args

import numpy as np

from mdmtrain.diffusion import noise

Split = Literal["pretrain", "train", "test"]  # train: fine-tuning; test: scoring
SHARES: dict[Split, float] = {"pretrain": 0.4, "train": 0.5, "test": 0.1}  # the share of each split in all prompts

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TERMS = range(3, 7)  # number of terms of a sum
# The values of the keys from a0 to j9, chosen at random.
TABLE = "2914177763170669074391500080636083778353374068124158683449786907366258517812865707049996228303883685"
ASKED = range(2, 5)  # number of keys that are looked up in the table
LETTERS = range(4, 10)  # number of letters of a string that is transformed
TRANSFORMATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda letters: letters[::-1],
    "sort": lambda letters: "".join(sorted(letters)),
    "rotate": lambda letters: letters[1:] + letters[:1],
}
DRAWS = 28  # maximum number of uniforms that a kind needs
FUTILE = 10_000  # consecutive draws without a new task, after which it raises ValueError


@dataclass(frozen=True)
class Task:
    """A prompt and the only right response."""

    kind: str  # a key of KINDS
    prompt: str
    response: str


def arithmetic(u: np.ndarray) -> Task:
    """A sum of numbers from 0 to 9 in words. The answer has two digits."""
    numbers = (u[: TERMS[int(u[-1] * len(TERMS))]] * 10).astype(int).tolist()
    return Task("arithmetic", f"({' plus '.join(WORDS[number] for number in numbers)}):\n", f"({sum(numbers):02d})")


def lookup(u: np.ndarray) -> Task:
    """Keys whose values are looked up in a table. A prompt never shows the table, so a model must learn it."""
    keys = (u[: ASKED[int(u[-1] * len(ASKED))]] * len(TABLE)).astype(int).tolist()
    prompt = f"(codes {' '.join(ascii_lowercase[key // 10] + str(key % 10) for key in keys)}):\n"
    return Task("lookup", prompt, f"({''.join(TABLE[key] for key in keys)})")


def transformation(u: np.ndarray) -> Task:
    """A string of distinct letters that must be reversed, sorted or rotated by one position."""
    name = list(TRANSFORMATIONS)[int(u[26] * len(TRANSFORMATIONS))]
    letters = some_letters(u[:26], LETTERS[int(u[-1] * len(LETTERS))])
    prompt = f"({name} {' '.join(letters)}):\n"
    return Task("transformation", prompt, f"( {' '.join(TRANSFORMATIONS[name](letters))})")


def some_letters(u: np.ndarray, number: int) -> str:
    """`number` distinct letters in random order. u: 26 uniforms."""
    return "".join(ascii_lowercase[i] for i in np.argsort(u, kind="stable")[:number])


KINDS: dict[str, Callable[[np.ndarray], Task]] = {
    "arithmetic": arithmetic,
    "lookup": lookup,
    "transformation": transformation,
}


def split_of(prompt: str) -> Split:
    """The split of a prompt, chosen by its hash. So splits never share a prompt, for any sizes and seeds."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") / 2**48
    edges = np.cumsum(list(SHARES.values()))[:-1]
    return get_args(Split)[int(np.searchsorted(edges, place, side="right"))]


def make_tasks(split: Split, number: int, seed: int) -> list[Task]:
    """`number` tasks of a split; the kinds alternate. A longer list begins with the shorter one.

    The tasks of "test" are all different; in the other splits a task may occur again. Raises ValueError if a kind has
    too few tasks.
    """
    kinds = [_of_kind(kind, split, -(-(number - i) // len(KINDS)), seed) for i, kind in enumerate(KINDS)]
    return [kinds[i % len(KINDS)][i // len(KINDS)] for i in range(number)]


def _of_kind(kind: str, split: Split, number: int, seed: int) -> list[Task]:
    found: list[Task] = []
    prompts: set[str] = set()
    newest = 0
    slot = -1
    while len(found) < number:
        slot += 1
        if slot - newest > FUTILE:
            raise ValueError(f"there are fewer than {number:,} {kind} tasks in the {split} split: ask for fewer")
        bits = noise.philox(seed, noise.Stream.TASKS, list(KINDS).index(kind), slot)
        task = KINDS[kind](noise.uniforms(bits, DRAWS).astype(np.float64))
        if split_of(task.prompt) != split or (split == "test" and task.prompt in prompts):
            continue
        found.append(task)
        prompts.add(task.prompt)
        newest = slot
    return found
