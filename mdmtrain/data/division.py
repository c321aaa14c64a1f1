"""Divide the preparation of a folder into parts: a pure function of the inputs and options.

A part consists of consecutive inputs. The number of processes that prepare the parts, and the order in which they do
so, do not affect the result.
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

SHORT = "shorter than --min-chars"
LONG = "longer than --max-chars"


def cut(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """[first, end) of the inputs of each part: at most `most` bytes together, or one input that is larger."""
    parts, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > most:
            parts.append((first, number))
            first, total = number, 0
        total += size
    return [*parts, (first, len(sizes))]


def digest(*what: Any) -> str:
    """The sha256 of values that can be written as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Division:
    """The inputs and options of a preparation. Processes that share the work read the division from a file."""

    inputs: tuple[Input, ...]
    identities: tuple[list, ...]  # the identities of the inputs when the division was made
    sizes: tuple[int, ...]  # bytes of the inputs, on disk
    options: Options
    model: bytes | None  # content of the tokenizer's file, if the user gave one

    @classmethod
    def of(cls, inputs: Sequence[Input], options: Options) -> "Division":
        """Raises ValueError if the tokenizer cannot be read, OSError if an input no longer exists."""
        given = Tokenizer.load(options.tokenizer, options.tiktoken_pattern) if options.tokenizer else None
        identities = tuple(one.identity() for one in inputs)
        sizes = tuple(one.size for one in inputs)
        return cls(tuple(inputs), identities, sizes, options, given.model if given else None)

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        return cut(self.sizes, self.options.part_bytes)

    @cached_property
    def settings(self) -> list:
        """Everything except the inputs that the content of the folder depends on."""
        given = hashlib.sha256(self.model).hexdigest() if self.model else None
        return [FORMAT, LONGEST_TEXT, self.options.content(given)]

    @cached_property
    def made_from(self) -> str:
        """A hash that identifies the prepared folder: two divisions with the same hash give the same content."""
        return digest(*self.settings, list(self.identities))

    def bytes_of(self, part: int) -> int:
        return sum(self.sizes[slice(*self.parts[part])])

    def prompts(self, reading: Reading) -> bool | None:
        """Whether the first document, and so every document, has a prompt; None if there is no document."""
        for source in self.inputs:
            for document, _ in read_documents(source, reading):
                return document.prompt is not None
        return None

    def refuse_changes(self, part: int) -> None:
        """Raise ValueError if an input of a part has changed since the division was made."""
        for number in range(*self.parts[part]):
            source = self.inputs[number]
            if source.spool is None and open_name(source.name).identity() != self.identities[number]:
                raise ValueError(f"{source.name} has changed since the preparation began: start it again")

    def documents(self, part: int, reading: Reading, prompts: bool | None) -> Iterator[tuple[Document, int, int]]:
        """(document, number of its input, bytes of the part read so far) for each document of a part.

        Documents that are too short or too long are left out.
        """
        first, end = self.parts[part]
        for number, before in zip(range(first, end), accumulate(self.sizes[first:end], initial=0), strict=False):
            for document, position in read_documents(self.inputs[number], reading, prompts):
                if reason := self._unfit(document):
                    reading.left_out[reason] += 1
                else:
                    yield document, number, before + position

    def tokenizer_sample(self, reading: Reading, prompts: bool | None) -> Iterator[tuple[str, bool, int]]:
        """(text, whether it is in the train split, bytes of the inputs that are done) to train a tokenizer on.

        The texts are the first documents of every input, in proportion to its bytes. They have at most about four times
        as many characters as the tokenizer is trained on.
        """
        total = max(1, sum(self.sizes))
        fraction = self.options.validation_fraction
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
        least = self.options.min_chars
        most = self.options.max_chars
        if least is None and most is None:
            return None
        characters = len(document.text) + len(document.prompt or "")
        if least is not None and characters < least:
            return f"{SHORT} {least:,}"
        return f"{LONG} {most:,}" if most is not None and characters > most else None


def draw(hash: int) -> float:
    """A document's number in [0, 1): below --validation-fraction, the document is in the validation split.

    Documents with equal hashes are in the same split.
    """
    return (hash >> 31) / 2**32
