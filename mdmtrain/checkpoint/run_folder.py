"""The run folder: the files that describe the run, and its history."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.run_lock import LOCK
from mdmtrain.config import Config
from mdmtrain.files import writing

HISTORY = "history.jsonl"
ABANDONED = "abandoned-"  # prefix for the names of abandoned checkpoints and exports


@contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """Remove a new run folder if the start fails (ValueError, OSError) before `record_start` has written to it.

    Removes only the lock, the logs of ranks and empty folders. Only one rank may call it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except (ValueError, OSError):
        if new and not (folder / "config.yaml").exists():
            for file in (folder / LOCK, *folder.glob("logs/rank-*.log")):
                with suppress(OSError):
                    file.unlink()
            for path in (folder / "logs", *new):
                with suppress(OSError):  # missing, or not empty
                    path.rmdir()
        raise


def record_start(folder: Path, config: Config, step: int, origin: str, ranks: int) -> None:
    """Write the configuration (config.yaml), the software (environment.json) and the start (history.jsonl) of a run.

    step: number of steps done so far. origin: where the weights come from. ranks: number of ranks.
    """
    environment = {
        "command": shlex.join(sys.argv),
        "working_directory": os.getcwd(),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {package.metadata["Name"]: package.version for package in metadata.distributions()},
    }
    started = {key: environment[key] for key in ("command", "git_revision")} | {"ranks": ranks, "origin": origin}
    add_to_history(folder, "start", step=step, **started, config=config.model_dump(mode="json"))
    store.write_atomically(folder / "config.yaml", config.to_yaml())
    store.write_atomically(folder / "environment.json", json.dumps(environment, indent=1) + "\n")


# ---- history.jsonl: each start with its configuration, each checkpoint


def add_to_history(folder: Path, event: str, **facts) -> None:
    """Append a line to the run's history."""
    file = folder / HISTORY
    with writing(file), open(file, "a+b") as history:
        torn = history.tell() > 0 and os.pread(history.fileno(), 1, history.tell() - 1) != b"\n"  # by a crash
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **facts}
        history.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def read_history(folder: Path) -> list[dict]:
    """The entries of a run's history, oldest first. Damaged lines are skipped. Runs of older versions have none."""
    entries = []
    if (folder / HISTORY).is_file():
        for line in (folder / HISTORY).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return [entry for entry in entries if isinstance(entry, dict) and "event" in entry]


def last_start(folder: Path) -> dict:
    """The last start in a run's history, or an empty dict."""
    return next((entry for entry in reversed(read_history(folder)) if entry["event"] == "start"), {})


def lost_checkpoint(folder: Path) -> int | None:
    """The step of the newest checkpoint in the history since the run last began at step 0, or None."""
    newest = None
    for entry in read_history(folder):
        if entry["event"] == "checkpoint":
            newest = entry["step"]
        elif entry["event"] == "start" and entry["step"] == 0:
            newest = None
    return newest


def abandon(folder: Path, step: int) -> list[Path]:
    """Rename the entries step-NNNNNNNN of a folder (checkpoints, exports) after `step`. Returns the new paths."""
    moved = []
    for old in sorted(folder.glob(store.FOLDERS), key=str) if folder.is_dir() else []:
        if store.step_of(old) > step:
            new = old.with_name(ABANDONED + old.name)
            number = 1
            while new.exists():
                number += 1
                new = old.with_name(f"{ABANDONED}{old.name}-{number}")
            old.rename(new)
            moved.append(new)
    return moved


def git_revision() -> str | None:
    """The git revision of this code, or None. A launcher that copies the code sets MDMTRAIN_REVISION."""
    if revision := os.environ.get("MDMTRAIN_REVISION"):
        return revision
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout, or no git
