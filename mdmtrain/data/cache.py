"""A cache of object store files on a local disk: bounded, shared by all processes of a node, kept from run to run.

A file's name contains its sha256, so an old version is never used in place of a new one. The file gets this name only
when it is complete and its checksum has been verified. If room is needed, the least recently used files are removed:
the modification time of a file is the time of its last use.
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

PART = ".part"  # suffix of a file that is being downloaded; the downloading process holds a lock on it


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store, as listed in a manifest."""

    url: str
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        """The file's name in a cache."""
        return f"{self.sha256}-{self.url.rsplit('/', 1)[-1]}"


@dataclass(frozen=True)
class ShardCache:
    """A folder on a local disk with files of at most `limit` bytes in total."""

    folder: Path
    limit: int

    def open(self, file: RemoteFile) -> int:
        """An open descriptor of a file, which is downloaded first if the cache lacks it. The caller closes it.

        Raises ValueError if the file cannot be downloaded, or does not match the manifest.
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
        """Download the missing files, in this order, and yield after each one.

        Files that another process is downloading are skipped. All `files` are marked as used now, so that none of them
        is removed to make room for another.
        """
        missing = [file for file in files if not self._touch(file)]
        for file in missing:
            if not self._touch(file):
                descriptor = self._download(file, wait=False)
                if descriptor is not None:
                    os.close(descriptor)
            yield

    def _touch(self, file: RemoteFile) -> bool:
        """Whether the cache has the file; if so, it is marked as used now."""
        try:
            _use(self.folder / file.name)
        except FileNotFoundError:
            return False
        return True

    def _download(self, file: RemoteFile, wait: bool) -> int | None:
        """An open descriptor of the new file. None: another process downloaded it (or, without `wait`, does so now)."""
        if file.size > self.limit:
            raise ValueError(
                f"{file.url} has {file.size:,} bytes, but the cache {self.folder} is limited to {self.limit:,}: raise "
                "data.cache_gb"
            )
        part = self.folder / (file.name + PART)
        final = self.folder / file.name
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not _is(descriptor, part):  # the download was completed or abandoned while this process waited
                os.close(descriptor)
                return None
            if final.exists():
                part.unlink()
                os.close(descriptor)
                return None
            self._fill(file, descriptor)
            _use(descriptor)
            with self._locked():  # otherwise a process that adds up the sizes might see it under neither name
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
        """Download into an empty, locked file. Raises ValueError if the content does not match the manifest."""
        size = remote.size_of(file.url)
        if size != file.size:
            raise ValueError(f"{file.url} has {size:,} bytes, the manifest says {file.size:,}: copy it there again")
        while not self._reserve(file.size, descriptor):
            time.sleep(0.2)  # unfinished downloads use all the room; once complete, they can be removed
        digest = hashlib.sha256()
        for start in range(0, size, remote.PIECE):
            piece = remote.read_piece(file.url, start, min(start + remote.PIECE, size))
            digest.update(piece)
            with self._writing():
                os.pwrite(descriptor, piece, start)
        if digest.hexdigest() != file.sha256:
            raise ValueError(f"{file.url} was altered (its sha256 is not the manifest's): copy it there again")
        with self._writing():
            os.fsync(descriptor)  # before the rename, because the final name promises verified content

    def _reserve(self, size: int, descriptor: int) -> bool:
        """Make room for a file and reserve it by setting the file's size. False: other downloads use too much room."""
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
        """Hold the lock under which a process makes room or completes a file."""
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
    """Set the time of a file's last use to now. (The kernel's own timestamps have a resolution of milliseconds.)"""
    os.utime(file, ns=(time.time_ns(),) * 2)


def _is(descriptor: int, path: Path) -> bool:
    """Whether a path names the open file."""
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _removed(path: str) -> bool:
    """Remove a complete file (its readers keep it open), or the unfinished download of a process that has ended."""
    try:
        with open(path) as file:
            if path.endswith(PART):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):  # it is being downloaded, or has just been completed
        return False
