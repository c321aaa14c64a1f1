"""The folder of one run: who may write it, and what it says about itself."""

import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.config import Config
from mdmtrain.parallel.world import writing

LOCK_PATIENCE = 10.0  # seconds: a killed predecessor may need a moment to go


class RunLock:
    """The right to write a run folder. The operating system takes it back when the process ends, however it ends."""

    def __init__(self, folder: Path):
        """Raises ValueError when another live process holds the folder, OSError when it cannot be written."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / ".lock", "a+")  # noqa: SIM115 (held, and locked, for the whole run)
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    by = self._file.read().strip() or "another process"
                    problem = f"run folder {folder} is in use by {by}: stop that run, or choose another run.dir"
                    raise ValueError(problem) from None
                time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()


@contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """Remove a new run folder where the start is refused (ValueError, OSError) before `describe_run` has filled it.

    Only the lock, the logs of ranks and empty folders go: whatever else lies there stays. For one rank to call.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except (ValueError, OSError):
        if new and not (folder / "config.yaml").exists():
            for file in (folder / ".lock", *folder.glob("logs/rank-*.log")):
                with suppress(OSError):
                    file.unlink()
            for path in (folder / "logs", *new):
                with suppress(OSError):  # not there, or not empty
                    path.rmdir()
        raise


def describe_run(folder: Path, config: Config) -> None:
    """Write what the run is (config.yaml) and what it runs on (environment.json)."""
    write_atomically(folder / "config.yaml", config.to_yaml())
    environment = {
        "command": shlex.join(sys.argv),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {package.metadata["Name"]: package.version for package in metadata.distributions()},
    }
    write_atomically(folder / "environment.json", json.dumps(environment, indent=1) + "\n")


def git_revision() -> str | None:
    """Of this checkout; of the one that a job's copy of the code was taken from, as the launcher says."""
    if told := os.environ.get("MDMTRAIN_REVISION"):
        return told
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout, or no git
