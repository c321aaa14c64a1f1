"""Inputs at URLs: find the files, and open them as seekable files.

The listing gives each file's version (an ETag or a time). So a file that has changed since counts as another input.
"""

import fnmatch
import glob
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from mdmtrain.data import remote
from mdmtrain.data.saved_dataset import data_files, is_dataset

LEAST, MOST = 1 << 16, 1 << 23  # bytes of a request; requests grow while a file is read sequentially
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "last_commit", "mtime", "updated", "created")


@dataclass(frozen=True)
class Remote:
    """A file at a URL; `version` distinguishes it from later files of the same name."""

    url: str
    size: int
    version: str

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Bytes(self.url, self.size), LEAST)


class _Bytes(io.RawIOBase):
    """The bytes of a file, requested in pieces. A read raises ValueError if all attempts of a request fail."""

    def __init__(self, url: str, size: int):
        self._url, self._size = url, size
        self._at = self._first = 0  # offsets of the next read, and of the piece in memory
        self._piece = b""
        self._ask = LEAST

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # the type that io passes
        if self._at >= self._size:
            return 0
        if not self._first <= self._at < self._first + len(self._piece):
            in_a_row = self._piece and self._at == self._first + len(self._piece)
            self._ask = min(4 * self._ask, MOST) if in_a_row else LEAST
            end = min(self._at + max(self._ask, min(len(buffer), MOST)), self._size)
            self._first, self._piece = self._at, remote.read_piece(self._url, self._at, end)
        content = self._piece[self._at - self._first :][: len(buffer)]
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def remote_file(url: str) -> "Remote | BinaryIO":
    """The file at a URL, or an unnamed temporary copy of it if the server does not support range requests.

    Raises ValueError if there is no such file, or it cannot be reached.
    """
    info = remote.ask(url, remote.TIMEOUT, "info")
    if info.get("type") == "directory":
        raise ValueError(f"{url}: a folder, not a file: give the files in it")
    return _file(url, info)


def _file(url: str, info: dict[str, Any]) -> "Remote | BinaryIO":
    if url.startswith(("http://", "https://")) and info.get("partial") is not True:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the input)
        remote.ask(url, remote.LIST_TIMEOUT, "get_file", lpath=copy)
        copy.flush()
        return copy
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Remote(url, info["size"], version)


def remote_files(
    argument: str, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[str, "Remote | BinaryIO"]]:
    """(URL, file) of each file that the argument (the URL of a file or folder, or a glob) names, sorted by name.

    include, exclude: patterns for names in folders, as for `find_inputs`. Raises ValueError.
    """

    def left_out(name: str) -> bool:
        return name.startswith(".") or any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)

    web = argument.startswith(("http://", "https://"))  # a question mark begins the query of such a URL
    if "*" in argument or (not web and glob.has_magic(argument)):
        found = remote.ask(argument, remote.LIST_TIMEOUT, "glob", detail=True)
    else:
        found = {argument: remote.ask(argument, remote.TIMEOUT, "info")}
    filesystem, _ = remote.filesystem(argument)
    for name, info in sorted(found.items()):
        url = name if remote.is_url(name) else filesystem.unstrip_protocol(name)
        if info.get("type") != "directory":
            yield url, _file(url, info)
            continue
        inside = remote.ask(url, remote.LIST_TIMEOUT, "find", detail=True)
        entries = {
            path if remote.is_url(path) else filesystem.unstrip_protocol(path): entry
            for path, entry in sorted(inside.items())
        }
        folders = {file: file.removeprefix(url).strip("/").split("/")[:-1] for file in entries}
        for file in _with_data([file for file in entries if not any(map(left_out, folders[file]))]):
            last = file.rsplit("/", 1)[-1]
            if not left_out(last) and any(fnmatch.fnmatchcase(last, one) for one in include or ["*"]):
                yield file, _file(file, entries[file])


def _with_data(files: list[str]) -> Iterator[str]:
    """The URLs of the files that have data: all, except in folders written by `datasets.save_to_disk`.

    Of such a folder, they are those that its state.json names, in its order. Raises ValueError as `data_files` does.
    """
    folders: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        folders.setdefault(folder, []).append(name)
    datasets = {folder for folder, names in folders.items() if is_dataset(names)}
    seen: set[str] = set()
    for file in files:
        folder, _, name = file.rpartition("/")
        if folder not in datasets and name != "dataset_dict.json":  # that one lists the folders of the splits
            yield file
        elif folder in datasets and folder not in seen:
            seen.add(folder)
            for named in data_files(folder, partial(remote.read, f"{folder}/state.json")):
                if named not in folders[folder]:
                    raise ValueError(f"{folder}/{named}: no such file, but state.json names it: copy the folder again")
                yield f"{folder}/{named}"
