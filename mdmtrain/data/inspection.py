"""Report on the content of a prepared folder: document lengths, tokens, sources, repeated documents.

Memory: two arrays with 8 bytes for each document of the shards that are read, and one counter for each piece.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdmtrain.data.parts import SOURCES
from mdmtrain.data.shards import PreparedSplit, read_manifest
from mdmtrain.data.tokenizer import Tokenizer

BLOCK = 1 << 22  # tokens in one read
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass
class SplitContent:
    """Statistics of the shards of a split that were read."""

    split: PreparedSplit
    shards: list[int]  # the numbers of the shards that were read
    lengths: np.ndarray  # int64 [documents], tokens with bos and eos
    counts: np.ndarray  # int64 [vocabulary], the number of occurrences of each piece
    repeated: int | None  # documents with the same hash as an earlier one; None: the folder has no hashes

    @property
    def text_tokens(self) -> int:
        """The number of tokens that encode the split's `bytes`: texts, or responses, without bos and eos."""
        per_document = 1 if self.split.prompts else 2
        return self.split.eligible_tokens - per_document * self.split.documents

    def numbers(self, tokenizer: Tokenizer, most: int) -> dict[str, Any]:
        """The split's section of the report, as JSON. most: how many of the most frequent tokens it lists."""
        pieces = tokenizer.pieces()
        seen = int(self.counts.sum())
        fallback = [number for number, piece in enumerate(tokenizer.raw_pieces()) if _BYTE.fullmatch(piece)]
        texts = seen - int(self.counts[list({tokenizer.bos_id, tokenizer.eos_id})].sum())
        frequent = np.argsort(-self.counts, kind="stable")[:most]
        middle = np.quantile(self.lengths, (0.0, 0.1, 0.5, 0.9, 1.0)).tolist()
        return {
            "tokens": self.split.tokens,
            "documents": self.split.documents,
            "bytes": self.split.bytes,
            "bytes_per_token": self.split.bytes / self.text_tokens,
            "shards": self.split.shards,
            "shards_looked_at": len(self.shards),
            "documents_looked_at": len(self.lengths),
            "length": {"mean": float(self.lengths.mean())}
            | dict(zip(("least", "10%", "median", "90%", "most"), middle, strict=True)),
            "byte_fallback": int(self.counts[fallback].sum()) / max(1, texts) if fallback else None,
            "unused_pieces": int((self.counts == 0).sum()),
            "repeated_documents": self.repeated,
            "frequent": [
                {"id": int(i), "piece": pieces[i], "count": int(self.counts[i]), "share": int(self.counts[i]) / seen}
                for i in frequent
                if self.counts[i]
            ],
        }


def look_at(folder: Path, split: str, most_shards: int) -> SplitContent:
    """Read at most `most_shards` shards of a split, evenly spaced. Raises ValueError if one is damaged."""
    opened = PreparedSplit(folder, split)
    count = min(most_shards, opened.shards)
    shards = [number * opened.shards // count for number in range(count)]
    counts = np.zeros(opened.vocab_size, dtype=np.int64)
    for shard in shards:
        first, end = map(int, opened.first_tokens[shard : shard + 2])
        for start in range(first, end, BLOCK):
            counts += np.bincount(opened.read(start, min(BLOCK, end - start)), minlength=opened.vocab_size)
    lengths = np.concatenate([opened.lengths_in(shard) for shard in shards])
    hashes = np.sort(np.concatenate([opened.hashes_in(shard) for shard in shards]))
    repeated = int((hashes[1:] == hashes[:-1]).sum()) if len(hashes) == len(lengths) else None
    return SplitContent(opened, shards, lengths, counts, repeated)


def decoded(opened: PreparedSplit, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """`count` documents, evenly spaced over a split: {"document", "text"}, and "prompt" if the split has prompts."""
    made = []
    count = min(count, opened.documents)
    for number in (one * opened.documents // count for one in range(count)):
        start, length = opened.document(number)
        ids = opened.read(start, length)
        response = int(np.argmax(opened.eligible(start, length)))
        prompt = {"prompt": tokenizer.decode(ids[:response])} if opened.prompts else {}
        made.append({"document": number, **prompt, "text": tokenizer.decode(ids[response:])})
    return made


def sources(folder: Path, most: int) -> list[dict[str, Any]]:
    """The `most` inputs with the most bytes, largest first, then one entry for all others; empty for older folders.

    Each entry has "input", "size" (bytes on disk), "documents", "bytes" and "tokens" in the folder, "bytes_per_token".
    """
    file = folder / SOURCES
    if not file.is_file():
        return []
    with open(file, encoding="utf-8") as stream:
        every = sorted(map(json.loads, stream), key=lambda one: -one["bytes"])
    shown = every[:most]
    rest = every[most:]
    if rest:
        sums = {key: sum(one[key] for one in rest) for key in rest[0] if key != "input"}
        shown.append({"input": f"{len(rest):,} others", **sums})
    for one in shown:
        text_tokens = one.pop("text_tokens")
        one["bytes_per_token"] = one["bytes"] / text_tokens if text_tokens else None
    return shown


def inspect(folder: Path, most_shards: int, most: int, documents: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A report of a prepared folder, as JSON, and the lengths of the documents of each split.

    most: the number of sources and of frequent tokens in it. documents: the number of decoded documents of each split.
    Raises ValueError.
    """
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.load(folder)
    contents = {split: look_at(folder, split, most_shards) for split in manifest["splits"]}
    report = {
        "folder": str(folder),
        "fingerprint": manifest["fingerprint"],
        "vocabulary": tokenizer.vocab_size,
        "splits": {split: content.numbers(tokenizer, most) for split, content in contents.items()},
        "sources": sources(folder, most),
        "documents": {split: decoded(content.split, tokenizer, documents) for split, content in contents.items()},
    }
    return report, {split: content.lengths for split, content in contents.items()}
