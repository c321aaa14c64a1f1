"""Generate prompts with one exact answer from a seed: arithmetic in words, table look-up, string transformation.

They measure fine-tuning (docs/finetune-study.md). An answer is right or wrong, nothing has to be downloaded, and there
are enough prompts for large data sets. Tables and strings range from small to large, so that accuracy rises gradually.
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

# fmt: off
UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
TABLE = range(2, 7)  # number of pairs (key, value) in a table
ASKED = 3  # maximum number of keys that are looked up in a table
LETTERS = range(3, 9)  # number of letters of a string that is transformed
TRANSFORMATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda letters: letters[::-1],
    "sort": lambda letters: "".join(sorted(letters)),
    "rotate": lambda letters: letters[1:] + letters[:1],
}
DRAWS = 26 + 2 * TABLE[-1] + 2  # maximum number of uniforms that a kind needs
FUTILE = 10_000  # consecutive draws without a new task, after which it raises ValueError


@dataclass(frozen=True)
class Task:
    """A prompt and the only right response."""

    kind: str  # a key of KINDS
    prompt: str
    response: str


def in_words(number: int) -> str:
    """A whole number from 0 to 99 in English: 47 -> "forty seven"."""
    if number < len(UNITS):
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens - 2] + (f" {UNITS[unit]}" if unit else "")


def arithmetic(u: np.ndarray) -> Task:
    """The sum or the difference of two numbers below 100, the larger one first. The answer has three digits."""
    smaller, larger = sorted((u[:2] * 100).astype(int).tolist())
    word, result = ("plus", larger + smaller) if u[2] < 0.5 else ("minus", larger - smaller)
    return Task("arithmetic", f"({in_words(larger)} {word} {in_words(smaller)}):\n", f"({result:03d})")


def lookup(u: np.ndarray) -> Task:
    """A table that maps letters to digits, and some of its letters. The answer is their digits, in the same order."""
    pairs = TABLE[int(u[-1] * len(TABLE))]
    asked = 1 + int(u[-2] * min(ASKED, pairs))
    keys = some_letters(u[:26], pairs)
    values = (u[26 : 26 + pairs] * 10).astype(int).tolist()
    chosen = np.argsort(u[26 + pairs : 26 + 2 * pairs], kind="stable")[:asked].tolist()
    table = " ".join(f"{key}{value}" for key, value in zip(keys, values, strict=True))
    prompt = f"({table}: {' '.join(keys[i] for i in chosen)}):\n"
    return Task("lookup", prompt, f"({''.join(str(values[i]) for i in chosen)})")


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
