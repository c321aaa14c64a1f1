"""Inputs at URLs: list them, and read them as seekable files.

The listing includes a version (an ETag or a time), so a file that has changed since then counts as a different input.
"""

import fnmatch
import glob
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from mdmtrain.data import remote

LEAST, MOST = 1 << 16, 1 << 23  # bytes in a request; it grows during sequential reads
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "last_commit", "mtime", "updated", "created")


@dataclass(frozen=True)
class Remote:
    """A file at a URL. `version` differs if the content was replaced under the same name."""

    url: str
    size: int
    version: str

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Bytes(self.url, self.size), LEAST)


class _Bytes(io.RawIOBase):
    """A seekable file that requests its content in pieces. A read raises ValueError if all attempts of a
    request fail.
    """

    def __init__(self, url: str, size: int):
        self._url, self._size = url, size
        self._at = self._first = 0  # position of the next read, and the start of the present piece
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

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # io passes a memoryview
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
    """The file at a URL, or an unnamed temporary copy if the server does not send parts of files.

    Raises ValueError if it does not exist or cannot be reached.
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
    """(URL, file) of each file that a URL, a glob of URLs or the URL of a folder names, ordered by name.

    include, exclude: patterns for names in folders, as in `find_inputs`. Raises ValueError.
    """
    web = argument.startswith(("http://", "https://"))  # there a question mark begins the query, and is no glob
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
        for path, entry in sorted(inside.items()):
            file = path if remote.is_url(path) else filesystem.unstrip_protocol(path)
            *folders, last = file.removeprefix(url).strip("/").split("/")
            hidden = any(part.startswith(".") for part in (*folders, last))
            left_out = any(fnmatch.fnmatchcase(part, pattern) for part in (*folders, last) for pattern in exclude)
            if not hidden and not left_out and any(fnmatch.fnmatchcase(last, one) for one in include or ["*"]):
                yield file, _file(file, entry)
