"""Who may write a run folder: one process at a time. Standard library only: a supervisor asks without torch."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from mdmtrain.files import writing

LOCK = ".lock"  # in the run folder; its text names the process that holds it
PATIENCE = 10.0  # seconds: a killed predecessor may need a moment to go


class RunLock:
    """The right to write a run folder. The operating system takes it back when the process ends, however it ends."""

    def __init__(self, folder: Path):
        """Raises ValueError when another live process holds the folder, OSError when it cannot be written."""
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
    """The live process, on any node, that holds a run folder's lock, or None."""
    if not (folder / LOCK).is_file():
        return None
    with open(folder / LOCK, "r+", encoding="utf-8") as file:
        return _take(file)


def _take(file: IO[str]) -> str | None:
    """Lock an open lock file until it is closed. None, or who holds it instead."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    return None
