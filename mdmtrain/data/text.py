"""Text that nobody prepared: files tokenized in memory, and documents or continuations as padded rows."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mdmtrain.data.loader import Rows
from mdmtrain.data.prepare import read_documents
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer


class TextSplit:
    """A text or jsonl file as one stream of tokens in memory, read like a `PreparedSplit`."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, lines: bool):
        """Documents are those of tools/prepare_data.py, or with `lines` the lines of them that are not blank.

        Raises ValueError naming the file that is missing, unreadable or empty.
        """
        self.folder, self.split = Path(path), "text"
        self.vocab_size, self.pad_id, self.bytes = tokenizer.vocab_size, tokenizer.pad_id, 0
        documents = []
        for text in _texts(self.folder, lines):
            documents.append(np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32))
            self.bytes += len(text.encode())
        if not documents:
            raise ValueError(f"{path}: no text in it: give a file with text")
        self._ids = np.concatenate(documents)
        self._starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
        self.tokens, self.documents = len(self._ids), len(documents)
        self.prompts, self.eligible_tokens = False, self.tokens

    def read(self, start: int, length: int) -> np.ndarray:
        return self._ids[start : start + length].astype(np.int64)

    def documents_in(self, start: int, length: int) -> np.ndarray:
        document = np.searchsorted(self._starts, np.arange(start, start + length), side="right")
        return (document - document[0]).astype(np.int32)

    def eligible(self, start: int, length: int) -> np.ndarray:
        return np.ones(length, dtype=bool)

    def document_starts(self) -> np.ndarray:
        return self._starts


def _texts(path: Path, lines: bool) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file or prepared folder: check the path")
    skipped = Counter[str]()
    for document, _ in read_documents(path, "skip", skipped, prompts=False):
        yield from (line for line in document.text.split("\n") if line.strip()) if lines else [document.text]
    if skipped["not UTF-8"]:
        raise ValueError(f"{path}: not UTF-8 text, in {skipped['not UTF-8']} of its documents: convert the file")


def document_rows(split: PreparedSplit | TextSplit, rows: int, length: int, cut: bool, pad_id: int) -> tuple[Rows, int]:
    """`rows` documents (or all, where there are fewer), evenly spaced, each by itself: bos + tokens + eos, padded.

    One longer than `length` tokens is cut there, or goes on in rows of its own. Returns how many were longer, too.
    """
    edges = np.append(split.document_starts(), split.tokens)
    count = len(edges) - 1
    rows, pieces, longer = min(rows, count), [], 0
    for document in (row * count // rows for row in range(rows)):
        start, end = int(edges[document]), int(edges[document + 1])
        longer += end - start > length
        ids = split.read(start, end - start)
        pieces += [ids[first : first + length] for first in range(0, 1 if cut else len(ids), length)]
    return pad_rows([(ids, np.ones(len(ids), dtype=bool)) for ids in pieces], pad_id), longer


def continuation_rows(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Rows:
    """(given, continuation) as rows of which only the continuation is to be predicted."""
    return pad_rows([(a + b, np.arange(len(a) + len(b)) >= len(a)) for a, b in pairs], pad_id)


def encode_pair(tokenizer: Tokenizer, prefix: str, continuation: str) -> tuple[list[int], list[int]]:
    """bos + prefix, and continuation: split out of the whole text's tokens where none of them crosses the border."""
    given = tokenizer.encode(prefix)
    whole = tokenizer.encode(prefix + continuation)
    rest = whole[len(given) :] if whole[: len(given)] == given else tokenizer.encode(continuation)
    return [tokenizer.bos_id, *given], rest


def pad_rows(rows: Sequence[tuple[Sequence[int], np.ndarray]], pad_id: int) -> Rows:
    """(ids, eligible) of each row, padded to the longest; the padding sees nothing of the text and is not seen."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    ids, segments = np.full(shape, pad_id, dtype=np.int64), np.full(shape, -1, dtype=np.int32)
    eligible = np.zeros(shape, dtype=bool)
    for row, (tokens, predicted) in enumerate(rows):
        ids[row, : len(tokens)], segments[row, : len(tokens)], eligible[row, : len(tokens)] = tokens, 0, predicted
    padded = (segments < 0).any()
    return Rows(torch.from_numpy(ids), torch.from_numpy(eligible), torch.from_numpy(segments) if padded else None)


def read_records(path: Path) -> list[tuple[str, dict]]:
    """The objects of a jsonl file, each with its place, "path:line". Raises ValueError naming a line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}): convert the file") from None
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: not a JSON object: every line must be one")
            records.append((f"{path}:{number}", record))
    if not records:
        raise ValueError(f"{path}: no records in it: give one JSON object a line")
    return records
