"""Read text without preparation: tokenize files in memory, and make padded rows of documents or continuations."""

import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mdmtrain.data.inputs import Input
from mdmtrain.data.loader import Rows
from mdmtrain.data.parts import encode_document
from mdmtrain.data.records import Document, Reading, read_documents
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer


class TextSplit:
    """A text or JSON lines file as one stream of tokens in memory, with the methods of a `PreparedSplit`."""

    def __init__(self, source: Input, tokenizer: Tokenizer, reading: Reading, lines: bool = False):
        """Read the documents as tools/prepare_data.py does; with `lines`, each line that is not blank is a document.

        Raises ValueError, naming the file and the line, if the file cannot be read or has no text.
        """
        self.folder = Path(source.name)
        self.split = "text"
        self.vocab_size = tokenizer.vocab_size
        self.pad_id = tokenizer.pad_id
        self.bytes = 0
        documents, responses = [], []
        for document in _documents(source, reading, lines):
            tokens, response = encode_document(tokenizer, document)
            documents.append(np.array(tokens, dtype=np.int32))
            responses.append(response)
            self.bytes += len(document.text.encode())
        if not documents:
            why = f" ({', '.join(reading.left_out)})" if reading.left_out else ""
            raise ValueError(f"{source.name}: no text in it{why}: give a file with text")
        self.prompts = responses[0] is not None
        self._ids = np.concatenate(documents)
        self._starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
        self._responses = self._starts + responses if self.prompts else self._starts
        self.tokens = len(self._ids)
        self.documents = len(documents)
        self.eligible_tokens = int(self.eligible(0, self.tokens).sum())

    def read(self, start: int, length: int) -> np.ndarray:
        return self._ids[start : start + length].astype(np.int64)

    def documents_in(self, start: int, length: int) -> np.ndarray:
        document = self._document_of(start, length)
        return (document - document[0]).astype(np.int32)

    def eligible(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length) >= self._responses[self._document_of(start, length)]

    def document(self, number: int) -> tuple[int, int]:
        start = int(self._starts[number])
        return start, int(np.append(self._starts, self.tokens)[number + 1]) - start

    def document_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return self._responses - self._starts, np.diff(self._starts, append=self.tokens)

    def fits(self, length: int) -> bool:
        return bool(self.document_lengths()[0].min() < length)

    def document_starts(self) -> np.ndarray:
        return self._starts

    def _document_of(self, start: int, length: int) -> np.ndarray:
        return np.searchsorted(self._starts, np.arange(start, start + length), side="right") - 1


def _documents(source: Input, reading: Reading, lines: bool) -> Iterator[Document]:
    """The documents of an input. With `lines`, each line is a document, also in the text of a record."""
    for document, _ in read_documents(source, reading, lines=lines):
        if lines and document.record and document.prompt is None:
            texts = re.split(r"\r\n|\r|\n", document.text)
            yield from (document._replace(text=text) for text in texts if text.strip(string.whitespace))
        else:
            yield document


def document_rows(split: PreparedSplit | TextSplit, rows: int, length: int, cut: bool, pad_id: int) -> tuple[Rows, int]:
    """`rows` evenly spaced documents (all, if there are fewer), each in its own row: bos + tokens + eos, padded.

    A document longer than `length` tokens is cut if `cut`, and continues in further rows otherwise. Also returns the
    number of longer documents.
    """
    edges = np.append(split.document_starts(), split.tokens)
    count = len(edges) - 1
    rows = min(rows, count)
    pieces = []
    longer = 0
    for document in (row * count // rows for row in range(rows)):
        start = int(edges[document])
        end = int(edges[document + 1])
        longer += end - start > length
        ids = split.read(start, end - start)
        pieces += [ids[first : first + length] for first in range(0, 1 if cut else len(ids), length)]
    return pad_rows([(ids, np.ones(len(ids), dtype=bool)) for ids in pieces], pad_id), longer


def continuation_rows(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Rows:
    """Rows for pairs (given, continuation), in which only the continuation is predicted."""
    return pad_rows([(a + b, np.arange(len(a) + len(b)) >= len(a)) for a, b in pairs], pad_id)


def encode_pair(tokenizer: Tokenizer, prefix: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of bos + prefix, and of the continuation.

    If no token of the whole text spans the border, the continuation has the tokens of the whole text after the prefix.
    Otherwise it is encoded separately.
    """
    given = tokenizer.encode(prefix)
    whole = tokenizer.encode(prefix + continuation)
    rest = whole[len(given) :] if whole[: len(given)] == given else tokenizer.encode(continuation)
    return [tokenizer.bos_id, *given], rest


def pad_rows(rows: Sequence[tuple[Sequence[int] | np.ndarray, np.ndarray]], pad_id: int) -> Rows:
    """(ids, eligible) of each row, padded to the longest row. Text and padding do not attend to each other."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    ids = np.full(shape, pad_id, dtype=np.int64)
    segments = np.full(shape, -1, dtype=np.int32)
    eligible = np.zeros(shape, dtype=bool)
    for row, (tokens, predicted) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        segments[row, : len(tokens)] = 0
        eligible[row, : len(tokens)] = predicted
    padded = (segments < 0).any()
    return Rows(torch.from_numpy(ids), torch.from_numpy(eligible), torch.from_numpy(segments) if padded else None)
