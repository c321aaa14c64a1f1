"""Where checkpoints lie: a folder on a disk, or whatever fsspec reaches (s3://, gs://, memory://, file://).

A place on a disk is a plain Path, any other a UPath, which has the same methods. Locks exist on disks only.
"""

import fcntl
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from mdmtrain.files import replacing, writing
from mdmtrain.parallel.world import describe_error


def place(text: str) -> Path:
    """The folder that a path or an fsspec URL names. Raises ValueError where nothing reaches it."""
    if "://" not in text:
        return Path(text)
    try:
        from upath import UPath

        found = UPath(text, use_listings_cache=False)  # other ranks write there too
        _ = found.fs  # made here, so that what is missing is said here
        return found
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
    """Remove a checkpoint, its marker first, so that what is half removed does not count."""
    with storage_errors(folder):
        (folder / "meta.json").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder) if isinstance(folder, Path) else folder.rmdir(recursive=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a crash leaves the old text or the new, never a part (object stores do so themselves)."""
    if not isinstance(path, Path):
        path.write_text(text, encoding="utf-8")
        return
    with writing(path), replacing(path) as file:
        file.write(text)


def checksum(file: Path) -> str:
    """CRC-32 of a file's content: finds what a disk or a copy has damaged, and reads faster than a disk writes."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def hold(folder: Path) -> IO:
    """Keep a checkpoint from being removed as too old until the returned file is closed, or the process ends.

    On a disk only: elsewhere nothing is held.
    """
    file = (folder / "meta.json").open("rb")
    if isinstance(folder, Path):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def held(folder: Path) -> bool:
    if not isinstance(folder, Path):
        return False
    try:
        with open(folder / "meta.json", "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # never completed
        return False
    return False


# ---- DCP's files


class _OwnErrors:
    """Brings out what the system said: torch's archive writer covers a failed write with an error of its own."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            # It goes to the other ranks, and what a library raises may not survive pickling.
            raise cause if isinstance(cause, OSError) else OSError(describe_error(cause)) from None


class _DiskWriter(_OwnErrors, dcp.FileSystemWriter):
    pass


class _FsspecWriter(_OwnErrors, FsspecWriter):
    pass


def storage_writer(folder: Path) -> dcp.StorageWriter:
    """DCP's writer for a folder. It gets tensors on the CPU, so that copying them ahead has nothing to win."""
    if isinstance(folder, Path):
        return _DiskWriter(folder, per_thread_copy_ahead=0)
    return _FsspecWriter(str(folder), per_thread_copy_ahead=0)


def storage_reader(folder: Path) -> dcp.StorageReader:
    return dcp.FileSystemReader(folder) if isinstance(folder, Path) else FsspecReader(str(folder))
