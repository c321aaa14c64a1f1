"""The lock of a run folder: only one process may write the folder at a time.

Uses only the standard library, so that a supervisor can check the lock without torch.
"""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from mdmtrain.files import writing

LOCK = ".lock"  # a file in the run folder; its text names the process that holds the lock
PATIENCE = 10.0  # seconds to wait for the lock, because a killed process may need a moment to end


class RunLock:
    """An exclusive lock on a run folder. The operating system releases it when the process ends for any reason."""

    def __init__(self, folder: Path):
        """Raises ValueError if another live process holds the lock, OSError if the folder cannot be written."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held for the whole run)
        deadline = time.monotonic() + PATIENCE
        while (holder := _take(self._file)) is not None:
            if time.monotonic() > deadline:
                problem = f"run folder {folder} is in use by {holder}: stop that run, or choose another run.dir"
                raise ValueError(problem)
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()


def lock_holder(folder: Path) -> str | None:
    """The live process (on any node) that holds the lock of a run folder, or None."""
    if not (folder / LOCK).is_file():
        return None
    with open(folder / LOCK, "r+", encoding="utf-8") as file:
        return _take(file)


def _take(file: IO[str]) -> str | None:
    """Lock an open file until it is closed. Returns None, or the name of the process that holds the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    return None
