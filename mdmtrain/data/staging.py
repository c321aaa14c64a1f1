"""A folder that is complete, or not there."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mdmtrain.files import put_in_place


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A locked empty folder beside `out` to write into. At the end it takes the name of `out`, on an error it goes.

    After SIGKILL the next run for `out` removes it. Raises ValueError where another process writes it.
    """
    folder = out.parent / f".{out.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    with ExitStack() as at_the_end:
        at_the_end.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being prepared by another process: wait for it, or stop it") from None
        at_the_end.callback(shutil.rmtree, folder, ignore_errors=True)
        for leftover in folder.iterdir():
            leftover.unlink()
        yield folder
        put_in_place(folder, out)
