"""The storage of checkpoints: a folder on a disk, or an object store supported by fsspec (s3://, gs://, memory://).

A folder on a disk is a Path. Any other is a UPath, which has the same methods. `LocalDisk` and `ObjectStore` contain
the differences; `storage_of` chooses one of them.
"""

import fcntl
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol, cast

from upath import UPath

from mdmtrain.files import on_disk, replacing, writing
from mdmtrain.parallel.world import describe_error


def place(text: str) -> Path:
    """The folder at a path or an fsspec URL, as a Path or a UPath. Raises ValueError for an unknown protocol."""
    if "://" not in text:
        return Path(text)
    try:
        found = UPath(text, use_listings_cache=False)  # no cache: other ranks write there too
        _ = found.fs  # import the protocol's package now, so that a missing one is reported here
        return cast(Path, found)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {describe_error(error)}: install its package, or choose another place") from None


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Convert all errors of an object store's library to OSError, because each library has its own error types."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise OSError(f"{where}: {describe_error(error)}") from error


def remove(folder: Path) -> None:
    """Remove a checkpoint. meta.json is removed first, so that a partly removed folder is not a complete checkpoint."""
    with storage_errors(folder):
        (folder / "meta.json").unlink(missing_ok=True)
        if folder.exists():
            storage_of(folder).remove_tree(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file atomically: after a crash it has the old text or the new one, never a part."""
    storage_of(path).replace(path, text)


def checksum(file: Path) -> str:
    """CRC-32 of a file's content. It detects damage by a disk or a copy, and is faster than writing to a disk."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


# ---- a disk and an object store


class Storage(Protocol):
    """The operations that differ between a disk and an object store."""

    def remove_tree(self, folder: Path) -> None:
        """Remove a folder with all that it contains."""

    def replace(self, path: Path, text: str) -> None:
        """Replace a text file atomically."""

    def hold(self, folder: Path) -> IO:
        """Protect a checkpoint from removal (as too old) until the returned file is closed or the process ends."""

    def held(self, folder: Path) -> bool:
        """Does any process protect the checkpoint with `hold`?"""

    def sync(self, file: IO) -> None:
        """Bring what was written into an open file to the disk itself."""


class LocalDisk:
    def remove_tree(self, folder: Path) -> None:
        shutil.rmtree(folder)

    def replace(self, path: Path, text: str) -> None:
        with writing(path), replacing(path) as file:
            file.write(text)

    def hold(self, folder: Path) -> IO:
        file = (folder / "meta.json").open("rb")
        fcntl.flock(file, fcntl.LOCK_SH)
        return file

    def held(self, folder: Path) -> bool:
        try:
            with open(folder / "meta.json", "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:  # never completed
            return False
        return False

    def sync(self, file: IO) -> None:
        file.flush()
        os.fsync(file.fileno())


class ObjectStore:
    """An object store. It has no locks, so `hold` protects nothing. It always replaces objects atomically."""

    def remove_tree(self, folder: Path) -> None:
        cast(UPath, folder).rmdir(recursive=True)

    def replace(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")

    def hold(self, folder: Path) -> IO:
        return (folder / "meta.json").open("rb")

    def held(self, folder: Path) -> bool:
        return False

    def sync(self, file: IO) -> None:
        pass  # an object is there when it is closed


def storage_of(path: Path) -> Storage:
    return LocalDisk() if on_disk(path) else ObjectStore()
