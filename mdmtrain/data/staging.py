"""A folder that appears only when it is complete."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdmtrain.files import put_in_place


@contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Create the folder in which `out` is made, and lock it. Raises ValueError if another process has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being prepared by another process: wait for it, or stop it") from None
        yield
    finally:
        os.close(lock)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A locked empty folder next to `out` to write into. It is renamed to `out` at the end, or removed after an error.

    After SIGKILL, the next run for `out` removes it. Raises ValueError if another process is writing `out`.
    """
    folder = out.parent / f".{out.name}.partial"
    with locked(folder, out):
        try:
            for leftover in folder.iterdir():
                leftover.unlink()
            yield folder
            put_in_place(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
