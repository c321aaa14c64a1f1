"""Where checkpoints are: in a folder on a disk, or in an object store that fsspec reaches (s3://, gs://, memory://).

A place on a disk is a Path, any other a UPath, which has the same methods. What differs between the two is in
`LocalDisk` and `ObjectStore`; `storage_of` chooses one.
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

from mdmtrain.files import replacing, writing
from mdmtrain.parallel.world import describe_error


def place(text: str) -> Path:
    """The folder that a path or an fsspec URL names: a Path, or a UPath. Raises ValueError where nothing reaches it."""
    if "://" not in text:
        return Path(text)
    try:
        found = UPath(text, use_listings_cache=False)  # other ranks write there too
        _ = found.fs  # made here, so that what is missing is said here
        return cast(Path, found)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {describe_error(error)}: install what reaches it, or choose another place") from None


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Make an OSError of any error of an object store's library: they have their own."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise OSError(f"{where}: {describe_error(error)}") from error


def remove(folder: Path) -> None:
    """Remove a checkpoint, its marker first, so that a folder that is half removed does not count."""
    with storage_errors(folder):
        (folder / "meta.json").unlink(missing_ok=True)
        if folder.exists():
            storage_of(folder).remove_tree(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a crash leaves the old text or the new, never a part."""
    storage_of(path).replace(path, text)


def checksum(file: Path) -> str:
    """CRC-32 of a file's content: finds what a disk or a copy has damaged, and reads faster than a disk writes."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


# ---- a disk and an object store


class Storage(Protocol):
    """What depends on where a folder is."""

    def remove_tree(self, folder: Path) -> None:
        """Remove a folder with all that it contains."""

    def replace(self, path: Path, text: str) -> None:
        """Write a text file as a whole: a crash leaves the old text or the new."""

    def hold(self, folder: Path) -> IO:
        """Keep a checkpoint from being removed as too old, until the returned file is closed or the process ends."""

    def held(self, folder: Path) -> bool:
        """Does any process hold a checkpoint?"""

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
    """It has no locks, so nothing is held. It replaces an object as a whole by itself."""

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


def on_disk(path: Path) -> bool:
    return isinstance(path, Path)


def storage_of(path: Path) -> Storage:
    return LocalDisk() if on_disk(path) else ObjectStore()
