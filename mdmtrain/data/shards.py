"""Token streams on disk: shards of limited size with raw little-endian tokens, document offsets, a manifest with
hashes.

A split is one stream: the concatenation of its shards. A document is bos + tokens + eos and is never divided between
shards. Each shard consists of `train-00000.bin`, the tokens (uint16 or uint32), and `train-00000.docs`, the start of
each document (int64). If documents are a prompt and its response, `train-00000.responses` has the start of each
response (int64). `train-00000.hashes` has a hash of each document's normalised text (int64), to find documents that
occur in two places.
"""

import hashlib
import json
import os
import resource
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
from upath import UPath

from mdmtrain.data import remote
from mdmtrain.data.cache import RemoteFile, ShardCache
from mdmtrain.data.remote import is_url
from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer
from mdmtrain.files import on_disk, sha256

MANIFEST = "manifest.json"
FORMAT = 1
AGAIN = "prepare the data again with tools/prepare_data.py"
Check = Literal["size", "sha256"]  # check of shards: only their sizes, or all of their content


def dtype_for(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one split. Call `add` for each document in order, then `close`, which returns the manifest entry."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        """A new shard begins before a document that would make a shard longer than `shard_tokens` tokens."""
        self._folder = folder
        self._split = split
        self._limit = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._bytes = self._response_tokens = self._tokens = 0

    def add(self, tokens: np.ndarray, text_bytes: int, hash: int, response: int | None = None) -> None:
        """tokens: one document with its bos and eos, in `dtype_for`. text_bytes: UTF-8 bytes of its source text. hash:
        63 bits, of the normalised text.

        response: the start of the response in a document with a prompt; text_bytes then counts the response only.
        """
        if self._file is not None and self._tokens + len(tokens) > self._limit:
            self._finish()
        if not self._file:
            name = f"{self._split}-{len(self._shards):05d}.bin"
            self._file = open(self._folder / name, "wb")  # noqa: SIM115 (open across calls)
            self._tokens = 0
            self._starts = []
            self._responses = []
            self._hashes = []
        self._file.write(tokens.tobytes())
        self._starts.append(self._tokens)
        self._hashes.append(hash)
        if response is not None:
            self._responses.append(self._tokens + response)
            self._response_tokens += len(tokens) - response
        self._tokens += len(tokens)
        self._bytes += text_bytes

    def close(self) -> dict[str, Any]:
        """Finish the last shard. Returns {"tokens", "bytes", "documents", "shards": [...]}, with prompts also
        "response_tokens".
        """
        if self._file is not None:
            self._finish()
        totals = {key: sum(shard[key] for shard in self._shards) for key in ("tokens", "documents")}
        if self._response_tokens:
            totals["response_tokens"] = self._response_tokens
        return {**totals, "bytes": self._bytes, "shards": self._shards}

    def _finish(self) -> None:
        assert self._file is not None, "no shard is open"
        self._file.close()
        file = Path(self._file.name)
        self._file = None
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
    """Write the manifest, the last file of a prepared folder. `made_from` identifies the inputs and options."""
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


def location(folder: str | Path) -> Path:
    """A folder on a disk, or a UPath in an object store. Only for names: `remote` reads its files."""
    return cast(Path, UPath(folder)) if is_url(str(folder)) else Path(folder)


def is_prepared(path: str) -> bool:
    """Whether the path is a folder (in an object store: a prepared folder). Otherwise it is a file with text."""
    return remote.exists(f"{path}/{MANIFEST}") if is_url(path) else Path(path).is_dir()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises ValueError if it is missing, damaged or of another version."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(_manifest_content(folder))
        if manifest["format"] != FORMAT:
            raise ValueError(f"{file}: format {manifest['format']!r}, this version reads {FORMAT}: {AGAIN}")
        if manifest["fingerprint"] != fingerprint(manifest):
            raise ValueError(f"{file} was altered (its fingerprint does not fit its content): {AGAIN}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: {AGAIN}") from None
    return manifest


def _manifest_content(folder: Path) -> bytes:
    file = folder / MANIFEST
    if not on_disk(folder):
        return remote.read(str(file))
    if not folder.is_dir():
        raise ValueError(f"no prepared data at {folder}: make it with tools/prepare_data.py INPUT... --out {folder}")
    if not file.is_file():
        raise ValueError(f"{folder} is not a finished prepared folder (no {MANIFEST}): {AGAIN}")
    return file.read_bytes()


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest without the fingerprint itself and `made_from`."""
    meaning = {key: value for key, value in manifest.items() if key not in ("fingerprint", "made_from")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


# The files of a split, one of each kind for a shard, and their keys in the manifest.
_KINDS = {
    "tokens": ("file", "sha256"),
    "documents": ("documents_file", "documents_sha256"),
    "responses": ("responses_file", "responses_sha256"),
    "hashes": ("hashes_file", "hashes_sha256"),
}


class _Files(NamedTuple):
    """The files of one kind. As arrays: 100,000 shards take 5 MB a kind, and a fork of the process shares them."""

    names: np.ndarray  # bytes [shards], empty where a shard has none
    digests: np.ndarray  # uint8 [shards, 32], their sha256


class PreparedSplit:
    """One split of a prepared folder as one stream of tokens. It holds no open file, so it can be sent to any process.

    `tokens` includes bos and eos. `bytes` is the UTF-8 length of the source text. `fingerprint` is that of the whole
    folder. `eligible_tokens` counts all tokens; if there are `prompts`, only the responses with their eos, and `bytes`
    counts only the responses too. `first_tokens` and `first_documents` are the start of each shard, and the end of the
    last one: int64 [shards + 1].
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        verify: Check | None = "size",
        share: tuple[int, int] = (0, 1),
        cache: ShardCache | None = None,
        manifest: dict[str, Any] | None = None,
    ):
        """folder: a path, or an fsspec URL, whose shards are copied to the `cache` when they are read.

        verify, share: see `check`; None: no check. manifest: the result of `read_manifest`, if it is known already.

        Raises ValueError that names the file that is missing, truncated or altered.
        """
        url = is_url(str(folder))
        if url and cache is None:
            raise ValueError(
                f"{folder}: shards of an object store are read through a cache: give data.cache_dir, a folder on a "
                "local disk of each node"
            )
        self.folder = location(folder)
        self.split = split
        self.cache = cache if url else None
        manifest = manifest or read_manifest(self.folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{self.folder} has no split {split!r}: there are {', '.join(manifest['splits'])}")
        content = manifest["splits"][split]
        tokenizer = manifest["tokenizer"]
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
        shards = content["shards"]
        self.first_tokens = _sums([shard["tokens"] for shard in shards])
        self.first_documents = _sums([shard["documents"] for shard in shards])
        self._files = {kind: _Files(*_columns(shards, *keys)) for kind, keys in _KINDS.items()}
        if verify is not None:
            self.check(verify, share)

    @property
    def shards(self) -> int:
        return len(self.first_tokens) - 1

    def listed(self, share: tuple[int, int] = (0, 1)) -> dict[str, int]:
        """The size in bytes of each file of the folder in an object store, by name. Empty for a disk, and if k is not
        0.
        """
        return remote.sizes_in(str(self.folder)) if self.cache is not None and share[0] == 0 else {}

    def check(
        self, verify: Check = "size", share: tuple[int, int] = (0, 1), listed: dict[str, int] | None = None
    ) -> None:
        """Check the folder: the sizes of the files, or also their hashes, which reads all files once.

        share (k, n): the files are divided between n processes, of which this is number k. In an object store, process
        0 compares the sizes with the store's list; the hash of a shard is checked when it is downloaded. listed: the
        result of `listed`, if it is known already.

        Raises ValueError that names the file that is missing, truncated or altered.
        """
        if self.cache is not None:
            if share[0] == 0:
                self._check_list(self.listed() if listed is None else listed)
            return
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"{self.folder} has no {MANIFEST} here: {AGAIN}")
        model = self.folder / MODEL_FILE
        if share[0] == 0 and (not model.is_file() or sha256_of(model) != self.tokenizer_sha256):
            raise ValueError(f"{model} is missing or not the tokenizer that made this data: {AGAIN}")
        for number in range(share[0], self.shards, share[1]):
            for kind in self._kinds(number):
                file = self._path(kind, number)
                size = self._size(kind, number)
                try:
                    found = os.stat(file).st_size
                except FileNotFoundError:
                    raise ValueError(f"{file} is missing: {AGAIN}") from None
                if found != size:
                    raise ValueError(f"{file} has {found:,} bytes, the manifest says {size:,}: {AGAIN}")
                if verify == "sha256" and sha256_of(Path(file)) != self._digest(kind, number):
                    raise ValueError(f"{file} was altered (its sha256 is not the manifest's): {AGAIN}")

    def _check_list(self, sizes: dict[str, int]) -> None:
        for number in range(self.shards):
            for kind in self._kinds(number):
                file = self._path(kind, number)
                size = self._size(kind, number)
                found = sizes.get(file.rsplit("/", 1)[-1])
                if found is None:
                    raise ValueError(f"{file} is missing: copy it there again")
                if found != size:
                    raise ValueError(f"{file} has {found:,} bytes, the manifest says {size:,}: copy it there again")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises ValueError if the file in the folder is a different tokenizer."""
        if self.cache is None:
            return Tokenizer.load(self.folder)
        made = Tokenizer(remote.read(f"{self.folder}/{MODEL_FILE}"), str(self.folder))
        if made.sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"{self.folder}/{MODEL_FILE} is not the tokenizer that made this data: copy it there again"
            )
        return made

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream: int64 [length].

        Raises ValueError for an id outside the vocabulary, and for a truncated file (altered after the check).
        """
        parts = [self._numbers("tokens", shard).read(a, b) for shard, a, b in self._parts(start, length)]
        ids = np.concatenate(parts, dtype=np.int64)
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: token id {ids.max()} in {self.split} at {start + int(ids.argmax())} "
                f"is outside the vocabulary of {self.vocab_size}: {AGAIN}"
            )
        return ids

    def documents_in(self, start: int, length: int) -> np.ndarray:
        """The document of each position in [start, start + length), counted from 0 in the range: int32 [length]."""
        begins = np.zeros(length, dtype=np.int32)
        offset = 0
        for shard, a, b in self._parts(start, length):
            starts = self._numbers("documents", shard)
            first = bisect_left(starts, a)
            begins[offset + starts.read(first, bisect_left(starts, b, first)) - a] = 1
            offset += b - a
        begins[0] = 0
        return np.cumsum(begins, dtype=np.int32)

    def eligible(self, start: int, length: int) -> np.ndarray:
        """Which positions in [start, start + length) may be masked: all, or those of responses and their eos; bool
        [length].
        """
        if not self.prompts:
            return np.ones(length, dtype=bool)
        parts = []
        for shard, a, b in self._parts(start, length):
            starts = self._numbers("documents", shard)
            first = bisect_right(starts, a) - 1
            last = bisect_left(starts, b, first)
            positions = np.arange(a, b)
            document = np.searchsorted(starts.read(first, last), positions, side="right") - 1
            parts.append(positions >= self._numbers("responses", shard).read(first, last)[document])
        return np.concatenate(parts)

    def document(self, number: int) -> tuple[int, int]:
        """(start, length) of a document in the stream, its bos and eos included."""
        shard = int(np.searchsorted(self.first_documents, number, side="right")) - 1
        starts = self._numbers("documents", shard)
        within = number - int(self.first_documents[shard])
        first = int(self.first_tokens[shard])
        tokens = int(self.first_tokens[shard + 1] - self.first_tokens[shard])
        end = starts[within + 1] if within + 1 < len(starts) else tokens
        return first + starts[within], end - starts[within]

    def document_lengths(self, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """For each document, the tokens before the response (bos and prompt) and all tokens: two int64 [documents].

        most: if there are more documents, use only about this many, in shards spread evenly over the split.
        """
        before, whole = zip(*(self._lengths(shard) for shard in self.some_shards(most)), strict=True)
        return np.concatenate(before), np.concatenate(whole)

    def fits(self, length: int) -> bool:
        """Whether at least one response begins within the first `length` tokens of its document."""
        return any(self._lengths(shard)[0].min() < length for shard in range(self.shards))

    def _lengths(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.prompts
        return self._all("responses", shard) - self._all("documents", shard), self.lengths_in(shard)

    def lengths_in(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, bos and eos included: int64 [documents of the shard]."""
        tokens = self.first_tokens[shard + 1] - self.first_tokens[shard]
        return np.diff(self._all("documents", shard), append=tokens)

    def hashes_in(self, shard: int) -> np.ndarray:
        """The hashes of the normalised documents of a shard: int64 [documents of the shard]; empty in older folders."""
        return self._all("hashes", shard) if "hashes" in self._kinds(shard) else np.empty(0, np.int64)

    def document_starts(self) -> np.ndarray:
        """The start of each document in the stream, ascending: int64 [documents]."""
        return np.concatenate([self._all("documents", n) + self.first_tokens[n] for n in range(self.shards)])

    def document_hashes(self, most: int | None = None) -> Iterator[np.ndarray]:
        """The hashes of the normalised documents, shard by shard: int64 [documents of the shard].

        most: see `document_lengths`.
        """
        return (self.hashes_in(n) for n in self.some_shards(most))

    def some_shards(self, most: int | None) -> Sequence[int]:
        """All shards; or, spread evenly, as many as together have about `most` documents (at least one shard)."""
        if most is None or self.documents <= most:
            return range(self.shards)
        count = max(1, self.shards * most // self.documents)
        return [number * self.shards // count for number in range(count)]

    def documents_of(self, shards: Sequence[int]) -> int:
        return int(np.diff(self.first_documents)[list(shards)].sum())

    # ---- files

    def remote_files(self, shard: int, document_mask: bool) -> list[RemoteFile]:
        """The files of a shard in an object store that are needed to read its rows."""
        kinds = ("tokens", "documents", "responses") if self.prompts else ("tokens", "documents")[: 1 + document_mask]
        return [self._remote_file(kind, shard) for kind in kinds]

    def row_bytes(self, document_mask: bool) -> np.ndarray:
        """The total size of the files needed to read the rows of each shard: int64 [shards], bytes."""
        indices = 2 if self.prompts else int(document_mask)
        return np.diff(self.first_tokens) * self._dtype.itemsize + np.diff(self.first_documents) * 8 * indices

    def _kinds(self, number: int) -> list[str]:
        return [kind for kind, files in self._files.items() if files.names[number]]

    def _path(self, kind: str, number: int) -> str:
        return f"{self.folder}/{self._files[kind].names[number].decode()}"

    def _size(self, kind: str, number: int) -> int:
        firsts, each = (self.first_tokens, self._dtype.itemsize) if kind == "tokens" else (self.first_documents, 8)
        return int(firsts[number + 1] - firsts[number]) * each

    def _digest(self, kind: str, number: int) -> str:
        return self._files[kind].digests[number].tobytes().hex()

    def _remote_file(self, kind: str, number: int) -> RemoteFile:
        return RemoteFile(self._path(kind, number), self._size(kind, number), self._digest(kind, number))

    def _numbers(self, kind: str, number: int) -> "_Numbers":
        dtype = self._dtype if kind == "tokens" else np.dtype("<i8")
        path = self._path(kind, number)
        size = self._size(kind, number)
        if self.cache is None:
            return _kept_open()(path, dtype, size)
        return _Numbers(self.cache.open(self._remote_file(kind, number)), path, dtype, size)

    def _all(self, kind: str, number: int) -> np.ndarray:
        numbers = self._numbers(kind, number)
        return numbers.read(0, len(numbers))

    def _parts(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, end) for each shard that a range covers; positions are relative to the shard."""
        assert length > 0 and start >= 0 and start + length <= self.tokens, (start, length, self.tokens)
        shard = int(np.searchsorted(self.first_tokens, start, side="right")) - 1
        while length:
            first = int(self.first_tokens[shard])
            end = int(self.first_tokens[shard + 1])
            a = start - first
            b = min(start + length, end) - first
            yield shard, a, b
            start += b - a
            length -= b - a
            shard += 1


def _sums(counts: list[int]) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int64)


def _columns(shards: list[dict[str, Any]], name: str, sha256: str) -> tuple[np.ndarray, np.ndarray]:
    digests = bytes.fromhex("".join(shard.get(sha256, "00" * 32) for shard in shards))
    return np.array([shard.get(name, "").encode() for shard in shards]), np.frombuffer(digests, np.uint8).reshape(
        -1, 32
    )


class _Numbers:
    """Integers in an open file, read on demand.

    The file is not memory-mapped: page tables for terabytes of maps take gigabytes, and a truncated file would kill the
    process that reads it (SIGBUS).
    """

    def __init__(self, descriptor: int, path: str, dtype: np.dtype, size: int):
        """size: bytes according to the manifest. Raises ValueError if the file has another size."""
        self._descriptor = descriptor
        self._path = path
        self._dtype = dtype
        self._count = size // dtype.itemsize
        self._check_size()

    def _check_size(self) -> None:
        found = os.fstat(self._descriptor).st_size
        size = self._count * self._dtype.itemsize
        if found != size:
            raise ValueError(f"{self._path} has {found:,} bytes, the manifest says {size:,}: {AGAIN}")

    def __del__(self):
        os.close(self._descriptor)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return int(self.read(index, index + 1)[0])

    def read(self, first: int, end: int) -> np.ndarray:
        """Numbers [first, end)."""
        at = first * self._dtype.itemsize
        left = (end - first) * self._dtype.itemsize
        blocks = []
        while left:
            try:
                block = os.pread(self._descriptor, left, at)
            except OSError as error:
                raise ValueError(f"{self._path}: {error.strerror}: check the disk, and start again") from None
            if not block:
                self._check_size()  # truncated since it was opened
            blocks.append(block)
            at += len(block)
            left -= len(block)
        return np.frombuffer(b"".join(blocks), self._dtype)


@cache
def _kept_open() -> Callable[[str, np.dtype, int], _Numbers]:
    """A function that opens files and keeps the most recently used ones open: half of the process's limit, at most
    65,536.

    Opening a file again costs a request to the metadata server of a parallel file system.
    """
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1 << 16)

    @lru_cache(maxsize=most)
    def opened(path: str, dtype: np.dtype, size: int) -> _Numbers:
        try:
            return _Numbers(os.open(path, os.O_RDONLY), path, dtype, size)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: {AGAIN}") from None

    return opened


def sha256_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return sha256(stream)
