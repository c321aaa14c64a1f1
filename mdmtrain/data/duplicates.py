"""Find documents whose text is the text of an earlier document, without all hashes in memory.

Each part writes the sorted hashes of its documents. A bucket is a range of hash values: the hashes of all parts that
are in it are sorted together. Of the documents with equal hashes, all but the first are duplicates. Each part then
leaves out its duplicates. Memory: about 75 bytes for each document of a part, or of a bucket. Files: each bucket reads
the file of each part and each part reads that of each bucket, one after another. Only one of them is open at a time.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mdmtrain.data.records import Document

BUCKET = 1 << 21  # documents
BUCKETS = 1 << 10  # at most, so that a part reads no more files than this; larger corpora have larger buckets
_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4")])
_FOUND = np.dtype([("part", "<u4"), ("number", "<u4")])


def text_hash(document: Document) -> bytes:
    """A 16-byte hash of a document's exact content: prompt and text, or the ids if its file contains token ids."""
    if document.ids is not None:
        content = document.ids.astype("<i8").tobytes()
    elif document.prompt is not None:
        content = f"{len(document.prompt)} {document.prompt}{document.text}".encode()
    else:
        content = document.text.encode()
    return hashlib.sha256(content).digest()[:16]


def sorted_hashes(hashes: Iterable[bytes]) -> np.ndarray:
    """The sorted hashes of a part's documents, each with its document's number from 0: _HASH [documents].

    hashes: those of the documents, in the order of the documents.
    """
    content = bytearray()
    for hash in hashes:
        content += hash
    columns = np.frombuffer(content, "<u8").reshape(-1, 2)
    order = np.lexsort((columns[:, 1], columns[:, 0]))
    made = np.empty(len(columns), _HASH)
    made["high"] = columns[order, 0]
    made["low"] = columns[order, 1]
    made["number"] = order
    return made


def buckets(documents: int) -> int:
    """The number of buckets for this many documents. The duplicates that are found do not depend on it."""
    return min(max(1, -(-documents // BUCKET)), BUCKETS)


def duplicates(parts: Sequence[Path], bucket: int, of: int) -> np.ndarray:
    """The documents in a bucket that are duplicates of an earlier one: _FOUND [duplicates], by part and number, sorted.

    parts: for each part, the file with the result of `sorted_hashes`. of: the number of buckets.
    """
    lowest, above = (np.uint64(min(-(-number * 2**64 // of), 2**64 - 1)) for number in (bucket, bucket + 1))
    blocks, origins = [], []
    for part, file in enumerate(parts):
        hashes = np.load(file, mmap_mode="r")
        first = bisect_left(hashes["high"], lowest)
        end = bisect_left(hashes["high"], above, first) if bucket + 1 < of else len(hashes)
        blocks.append(np.array(hashes[first:end]))
        origins.append(np.full(end - first, part, "<u4"))
    found = np.concatenate(blocks)
    origin = np.concatenate(origins)
    del blocks, origins
    order = np.lexsort((found["low"], found["high"]))  # stable: documents with the same text keep their order
    high = found["high"][order]
    low = found["low"][order]
    again = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
    again.sort()
    made = np.empty(len(again), _FOUND)
    made["part"] = origin[again]
    made["number"] = found["number"][again]
    made.sort(order=("part", "number"))
    return made


def numbers_in(files: Iterable[Path], part: int) -> np.ndarray:
    """The numbers of a part's duplicates, ascending: uint32 [duplicates of the part]. files: one for each bucket."""
    lists = [np.empty(0, "<u4")]
    for file in files:
        found = np.load(file, mmap_mode="r")
        ours = found["number"][slice(*(bisect_left(found["part"], one) for one in (part, part + 1)))]
        lists.append(np.array(ours))  # a copy: a view would keep the file open
    return np.sort(np.concatenate(lists))
