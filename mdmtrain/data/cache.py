"""A cache on a local disk for files of object stores. All processes of a node share it, and it is kept between runs.

The name of a file is its sha256, so that old content is never taken for new content. A file has this name only after it
is complete and verified. To make room, the least recently used files are removed; the modification time is the time of
the last use.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mdmtrain.data import remote

PART = ".part"  # suffix of a file that is being downloaded and is locked


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store, as described in a manifest."""

    url: str
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        """The name of the file in a cache."""
        return f"{self.sha256}-{self.url.rsplit('/', 1)[-1]}"


@dataclass(frozen=True)
class ShardCache:
    """A folder on a local disk with files of at most `limit` bytes in total."""

    folder: Path
    limit: int

    def open(self, file: RemoteFile) -> int:
        """An open descriptor of a file, which is downloaded if necessary. The caller closes it.

        Raises ValueError if the download fails, or if the content does not match the manifest.
        """
        while True:
            with suppress(FileNotFoundError, NotADirectoryError):
                descriptor = os.open(self.folder / file.name, os.O_RDONLY)
                _use(descriptor)
                return descriptor
            descriptor = self._download(file, wait=True)
            if descriptor is not None:
                return descriptor

    def fetch_ahead(self, files: Iterable[RemoteFile]) -> Iterator[None]:
        """Download missing files in this order, except those that another process is downloading. Yields after each
        file.

        All of the files count as used now, so that they do not displace each other.
        """
        missing = [file for file in files if not self._touch(file)]
        for file in missing:
            if not self._touch(file):
                descriptor = self._download(file, wait=False)
                if descriptor is not None:
                    os.close(descriptor)
            yield

    def _touch(self, file: RemoteFile) -> bool:
        """Whether the file is in the cache. If so, it counts as used now."""
        try:
            _use(self.folder / file.name)
        except FileNotFoundError:
            return False
        return True

    def _download(self, file: RemoteFile, wait: bool) -> int | None:
        """Download a file. Returns a descriptor, or None if another process has downloaded it (without `wait`: or is
        doing so).
        """
        if file.size > self.limit:
            raise ValueError(
                f"{file.url} has {file.size:,} bytes, the cache {self.folder} is limited to {self.limit:,}: raise "
                "data.cache_gb"
            )
        part, final = self.folder / (file.name + PART), self.folder / file.name
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not _is(descriptor, part):  # it was completed or removed while this process waited
                os.close(descriptor)
                return None
            if final.exists():
                part.unlink()
                os.close(descriptor)
                return None
            self._fill(file, descriptor)
            _use(descriptor)
            with self._locked():  # so that a process that adds up sizes sees one of the two names
                os.rename(part, final)
            return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            if _is(descriptor, part):
                part.unlink()
            os.close(descriptor)
            raise

    def _fill(self, file: RemoteFile, descriptor: int) -> None:
        """Download into a locked empty file. Raises ValueError if the content does not match the manifest."""
        size = remote.size_of(file.url)
        if size != file.size:
            raise ValueError(f"{file.url} has {size:,} bytes, the manifest says {file.size:,}: copy it there again")
        while not self._reserve(file.size, descriptor):
            time.sleep(0.2)  # other downloads use all the room; they can be removed when they are complete
        digest = hashlib.sha256()
        for start in range(0, size, remote.PIECE):
            piece = remote.read_piece(file.url, start, min(start + remote.PIECE, size))
            digest.update(piece)
            with self._writing():
                os.pwrite(descriptor, piece, start)
        if digest.hexdigest() != file.sha256:
            raise ValueError(f"{file.url} was altered (its sha256 is not the manifest's): copy it there again")
        with self._writing():
            os.fsync(descriptor)  # the name guarantees the content, so the content must be on the disk first

    def _reserve(self, size: int, descriptor: int) -> bool:
        """Make room for a file and allocate its size. False if unfinished downloads use too much of the room."""
        with self._locked():
            os.ftruncate(descriptor, 0)
            files = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            room = self.limit - sum(taken for _, taken, _ in files)
            for _, taken, path in sorted(files):
                if room >= size:
                    break
                if taken and _removed(path):
                    room += taken
            if room >= size:
                os.ftruncate(descriptor, size)
            return room >= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A context in which no other process makes room or completes a file."""
        with self._writing(), open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"cannot write the cache {self.folder}: {error.strerror or error}: make room there, lower "
                "data.cache_gb, or choose another data.cache_dir"
            ) from None


def _use(file: int | Path) -> None:
    """Record the time of the last use. (The file system's own clock moves only every few milliseconds.)"""
    os.utime(file, ns=(time.time_ns(),) * 2)


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _removed(path: str) -> bool:
    """Remove a complete file (its readers keep it open), or the rest of a download whose process has ended."""
    try:
        with open(path) as file:
            if path.endswith(PART):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):  # it is being downloaded, or was completed just now
        return False
