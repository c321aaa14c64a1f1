"""The parts that a prepared folder is made in: a pure function of its inputs and options.

A part has consecutive inputs. How many processes prepare the parts, and in which order, changes nothing.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from mdmtrain.data.inputs import Input, open_name
from mdmtrain.data.options import Options
from mdmtrain.data.records import LONGEST_TEXT, Document, Reading, read_documents
from mdmtrain.data.shards import FORMAT
from mdmtrain.data.tokenizer import SAMPLE_CHARACTERS, Tokenizer

SHORT, LONG = "shorter than --min-chars", "longer than --max-chars"


def cut(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """[first, end) of the inputs of each part: as many as have `most` bytes together, or one that is larger."""
    parts, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > most:
            parts.append((first, number))
            first, total = number, 0
        total += size
    return [*parts, (first, len(sizes))]


def digest(*what: Any) -> str:
    """sha256 of something that JSON can write."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What is to be prepared. Processes that share the work read it from a file."""

    inputs: tuple[Input, ...]
    identities: tuple[list, ...]  # of the inputs, when the plan was made
    sizes: tuple[int, ...]  # bytes of the inputs, on disk
    options: Options
    model: bytes | None  # content of the tokenizer's file where one is given

    @classmethod
    def of(cls, inputs: Sequence[Input], options: Options) -> "Plan":
        """Raises ValueError where the tokenizer cannot be read, OSError where an input is gone."""
        given = Tokenizer.load(options.tokenizer, options.tiktoken_pattern) if options.tokenizer else None
        identities = tuple(one.identity() for one in inputs)
        sizes = tuple(one.size for one in inputs)
        return cls(tuple(inputs), identities, sizes, options, given.model if given else None)

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        return cut(self.sizes, self.options.part_bytes)

    @cached_property
    def settings(self) -> list:
        """What the content depends on besides the inputs."""
        given = hashlib.sha256(self.model).hexdigest() if self.model else None
        return [FORMAT, LONGEST_TEXT, self.options.content(given)]

    @cached_property
    def made_from(self) -> str:
        """What tells a folder that this plan makes from all others."""
        return digest(*self.settings, list(self.identities))

    def bytes_of(self, part: int) -> int:
        return sum(self.sizes[slice(*self.parts[part])])

    def prompts(self, reading: Reading) -> bool | None:
        """Whether documents have prompts: as the first one does; None where there is none."""
        for source in self.inputs:
            for document, _ in read_documents(source, reading):
                return document.prompt is not None
        return None

    def refuse_changes(self, part: int) -> None:
        """Raise ValueError where an input of a part is no longer what it was when the plan was made."""
        for number in range(*self.parts[part]):
            source = self.inputs[number]
            if source.spool is None and open_name(source.name).identity() != self.identities[number]:
                raise ValueError(f"{source.name} has changed since the preparation began: start it again")

    def documents(self, part: int, reading: Reading, prompts: bool | None) -> Iterator[tuple[Document, int, int]]:
        """The documents of a part that are neither too short nor too long, each with the number of its input and the
        bytes of the part read so far.
        """
        first, end = self.parts[part]
        for number, before in zip(range(first, end), accumulate(self.sizes[first:end], initial=0), strict=False):
            for document, position in read_documents(self.inputs[number], reading, prompts):
                if reason := self._unfit(document):
                    reading.left_out[reason] += 1
                else:
                    yield document, number, before + position

    def tokenizer_sample(self, reading: Reading, prompts: bool | None) -> Iterator[tuple[str, bool, int]]:
        """Text for a tokenizer: the first documents of every input, in proportion to its bytes, four times what is
        learned from at most. Each with whether it is of training, and the bytes of the inputs that are done.
        """
        total, fraction = max(1, sum(self.sizes)), self.options.validation_fraction
        for source, size, before in zip(self.inputs, self.sizes, accumulate(self.sizes, initial=0), strict=False):
            share = 4 * SAMPLE_CHARACTERS * size / total
            for document, _ in read_documents(source, reading, prompts):
                text = (document.prompt or "") + document.text
                if not self._unfit(document):
                    yield text, draw(document.hash()) >= fraction, before
                share -= len(text)
                if share <= 0:
                    break

    def _unfit(self, document: Document) -> str | None:
        least, most = self.options.min_chars, self.options.max_chars
        if least is None and most is None:
            return None
        characters = len(document.text) + len(document.prompt or "")
        if least is not None and characters < least:
            return f"{SHORT} {least:,}"
        return f"{LONG} {most:,}" if most is not None and characters > most else None


def draw(hash: int) -> float:
    """A document's number in [0, 1): below --validation-fraction it is validation. Like documents go together."""
    return (hash >> 31) / 2**32
