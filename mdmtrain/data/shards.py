"""Token streams on disk: bounded shards of raw little-endian tokens, document offsets, a manifest with hashes.

A split is one stream, its shards end to end; a document is bos + tokens + eos and never crosses a shard. Per shard
`train-00000.bin` holds the tokens (uint16 or uint32) and `train-00000.docs` where each document starts (int64). Where
documents are a prompt and its response, `train-00000.responses` holds where each response starts (int64).
`train-00000.hashes` holds a hash of each document's normalised text (int64): documents in two places are found by it.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer
from mdmtrain.files import sha256

MANIFEST = "manifest.json"
FORMAT = 1
AGAIN = "prepare the data again with tools/prepare_data.py"
Check = Literal["size", "sha256"]  # of shards: their sizes only, or all of their content


def dtype_for(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one split. `add` documents in order, then `close` for the split's part of the manifest."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        """Starts a new shard before a document that would take a shard over `shard_tokens` tokens."""
        self._folder, self._split, self._limit = folder, split, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._bytes = self._response_tokens = self._tokens = 0

    def add(self, tokens: np.ndarray, text_bytes: int, hash: int, response: int | None = None) -> None:
        """tokens: one document with its bos and eos, of `dtype_for`; text_bytes: UTF-8 bytes of its source text; hash:
        of the text, normalised, 63 bits.

        response: where in a document with a prompt the response starts; text_bytes are then those of the response.
        """
        if self._file is not None and self._tokens + len(tokens) > self._limit:
            self._finish()
        if not self._file:
            name = f"{self._split}-{len(self._shards):05d}.bin"
            self._file = open(self._folder / name, "wb")  # noqa: SIM115 (open across calls)
            self._tokens, self._starts, self._responses, self._hashes = 0, [], [], []
        self._file.write(tokens.tobytes())
        self._starts.append(self._tokens)
        self._hashes.append(hash)
        if response is not None:
            self._responses.append(self._tokens + response)
            self._response_tokens += len(tokens) - response
        self._tokens += len(tokens)
        self._bytes += text_bytes

    def close(self) -> dict[str, Any]:
        """Finish the last shard; {"tokens", "bytes", "documents", "shards": [...]}, "response_tokens" with prompts."""
        if self._file is not None:
            self._finish()
        totals = {key: sum(shard[key] for shard in self._shards) for key in ("tokens", "documents")}
        if self._response_tokens:
            totals["response_tokens"] = self._response_tokens
        return {**totals, "bytes": self._bytes, "shards": self._shards}

    def _finish(self) -> None:
        assert self._file is not None, "no shard is open"
        self._file.close()
        file, self._file = Path(self._file.name), None
        shard = {"file": file.name, "tokens": self._tokens, "documents": len(self._starts), "sha256": sha256_of(file)}
        indices = {
            "documents": (".docs", self._starts),
            "responses": (".responses", self._responses),
            "hashes": (".hashes", self._hashes),
        }
        for name, (suffix, positions) in indices.items():
            if positions:
                index = file.with_suffix(suffix)
                index.write_bytes(np.array(positions, dtype="<i8").tobytes())
                shard |= {f"{name}_file": index.name, f"{name}_sha256": sha256_of(index)}
        self._shards.append(shard)


def write_manifest(folder: Path, tokenizer: Tokenizer, splits: dict[str, dict], made_from: str) -> dict[str, Any]:
    """The last file of a prepared folder; `made_from` identifies inputs and options, so that a second run can tell."""
    manifest = {
        "format": FORMAT,
        "made_from": made_from,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "tokenizer": {
            key: getattr(tokenizer, key) for key in ("sha256", "vocab_size", "bos_id", "eos_id", "pad_id", "mask_id")
        },
        "splits": splits,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises ValueError where there is none, or none that this version reads."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"no prepared data at {folder}: make it with tools/prepare_data.py INPUT... --out {folder}")
    if not file.is_file():
        raise ValueError(f"{folder} is not a finished prepared folder (no {MANIFEST}): {AGAIN}")
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{file}: format {manifest['format']!r}, this version reads {FORMAT}: {AGAIN}")
        if manifest["fingerprint"] != fingerprint(manifest):
            raise ValueError(f"{file} was altered (its fingerprint does not fit its content): {AGAIN}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: {AGAIN}") from None
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 of what the data means: everything but the fingerprint itself and how the folder came about."""
    meaning = {key: value for key, value in manifest.items() if key not in ("fingerprint", "made_from")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


class PreparedSplit:
    """One split of a prepared folder as one stream of tokens. Holds no open file, so that it goes to any process.

    `tokens` counts bos and eos, `bytes` is the length of the source text in UTF-8, `fingerprint` is the whole folder's.
    `eligible_tokens` are all of them; where there are `prompts`, those of the responses, each with its eos, and `bytes`
    counts the responses alone too.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        verify: Check = "size",
        share: tuple[int, int] = (0, 1),
    ):
        """Checks the folder: sizes, or the hashes of this split's shards too (reads them once).

        share (k, n): hashes are left to n processes, and this is the k-th of them.

        Raises ValueError naming the file that is missing, truncated or altered.
        """
        self.folder, self.split = Path(folder), split
        manifest = read_manifest(self.folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{self.folder} has no split {split!r}: there are {', '.join(manifest['splits'])}")
        content, tokenizer = manifest["splits"][split], manifest["tokenizer"]
        self.tokens: int = content["tokens"]
        self.documents: int = content["documents"]
        self.bytes: int = content["bytes"]
        self.prompts: bool = "response_tokens" in content
        self.eligible_tokens: int = content.get("response_tokens", self.tokens)
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_sha256: str = tokenizer["sha256"]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.bos_id: int = tokenizer["bos_id"]
        self.pad_id: int = tokenizer["pad_id"]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards: list[dict[str, Any]] = content["shards"]
        self._firsts = list(accumulate((shard["tokens"] for shard in self._shards), initial=0))
        self._first_documents = list(accumulate((shard["documents"] for shard in self._shards), initial=0))
        self._verify(verify, share)

    def _verify(self, verify: str, share: tuple[int, int]) -> None:
        model = self.folder / MODEL_FILE
        if not model.is_file() or sha256_of(model) != self.tokenizer_sha256:
            raise ValueError(f"{model} is missing or not the tokenizer that made this data: {AGAIN}")
        for number, shard in enumerate(self._shards):
            mine = number % share[1] == share[0]
            files = [(shard["file"], shard["tokens"] * self._dtype.itemsize, shard["sha256"])]
            for index in ("documents", "responses", "hashes"):
                if f"{index}_file" not in shard:  # no prompts; or a folder from before there were hashes
                    continue
                files.append((shard[f"{index}_file"], shard["documents"] * 8, shard[f"{index}_sha256"]))
            for name, size, digest in files:
                file = self.folder / name
                if not file.is_file():
                    raise ValueError(f"{file} is missing: {AGAIN}")
                if file.stat().st_size != size:
                    raise ValueError(f"{file} has {file.stat().st_size:,} bytes, the manifest says {size:,}: {AGAIN}")
                if verify == "sha256" and mine and sha256_of(file) != digest:
                    raise ValueError(f"{file} was altered (its sha256 is not the manifest's): {AGAIN}")

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream: int64 [length].

        Raises ValueError on an id outside the vocabulary (shards altered after the check).
        """
        parts = [_map(self.folder / shard["file"], self._dtype)[a:b] for shard, a, b in self._parts(start, length)]
        ids = np.concatenate(parts, dtype=np.int64)
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: token id {ids.max()} in {self.split} at {start + int(ids.argmax())} "
                f"is outside the vocabulary of {self.vocab_size}: {AGAIN}"
            )
        return ids

    def documents_in(self, start: int, length: int) -> np.ndarray:
        """Which document each position of [start, start + length) belongs to, counted from 0: int32 [length]."""
        begins, offset = np.zeros(length, dtype=np.int32), 0
        for shard, a, b in self._parts(start, length):
            starts = self._index(shard, "documents")
            first, last = np.searchsorted(starts, [a, b])
            begins[offset + starts[first:last] - a] = 1
            offset += b - a
        begins[0] = 0
        return np.cumsum(begins, dtype=np.int32)

    def eligible(self, start: int, length: int) -> np.ndarray:
        """Which of [start, start + length) may be masked: all, or the tokens of responses and eos; bool [length]."""
        if not self.prompts:
            return np.ones(length, dtype=bool)
        parts = []
        for shard, a, b in self._parts(start, length):
            positions = np.arange(a, b)
            document = np.searchsorted(self._index(shard, "documents"), positions, side="right") - 1
            parts.append(positions >= self._index(shard, "responses")[document])
        return np.concatenate(parts)

    def document(self, number: int) -> tuple[int, int]:
        """(start, length) of a document in the stream, its bos and eos included."""
        index = bisect_right(self._first_documents, number) - 1
        shard, starts = self._shards[index], self._index(self._shards[index], "documents")
        within = number - self._first_documents[index]
        end = starts[within + 1] if within + 1 < len(starts) else shard["tokens"]
        return int(self._firsts[index] + starts[within]), int(end - starts[within])

    def document_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens before the response (bos and prompt), and in all, of each document: two int64 [documents]."""
        assert self.prompts
        before, whole = [], []
        for shard in self._shards:
            starts = self._index(shard, "documents")
            before.append(self._index(shard, "responses") - starts)
            whole.append(np.diff(starts, append=shard["tokens"]))
        return np.concatenate(before), np.concatenate(whole)

    def document_starts(self) -> np.ndarray:
        """Where each document starts in the stream, ascending: int64 [documents]."""
        parts = zip(self._shards, self._firsts, strict=False)  # the last of the firsts is the end
        return np.concatenate([self._index(shard, "documents") + first for shard, first in parts])

    def document_hashes(self) -> Iterator[np.ndarray]:
        """The hashes of the documents' normalised texts, shard by shard: int64 [documents of the shard]."""
        return (self._index(shard, "hashes") for shard in self._shards if "hashes_file" in shard)

    def _index(self, shard: dict[str, Any], name: str) -> np.ndarray:
        return _map(self.folder / shard[f"{name}_file"], np.dtype("<i8"))

    def _parts(self, start: int, length: int) -> Iterator[tuple[dict[str, Any], int, int]]:
        """(shard, first, end) of the shards under a range, positions counted within the shard."""
        assert length > 0 and start >= 0 and start + length <= self.tokens, (start, length, self.tokens)
        index = bisect_right(self._firsts, start) - 1
        while length:
            shard, a = self._shards[index], start - self._firsts[index]
            b = min(a + length, shard["tokens"])
            yield shard, a, b
            start, length, index = start + b - a, length - (b - a), index + 1


@lru_cache(maxsize=256)  # per process; bounded, because each map holds a file descriptor
def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(file, dtype=dtype, mode="r")


def sha256_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return sha256(stream)
