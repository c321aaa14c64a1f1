"""The folder of one run: what it says about itself."""

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
ABANDONED = "abandoned-"  # before the name of what a run has left behind


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
            for file in (folder / LOCK, *folder.glob("logs/rank-*.log")):
                with suppress(OSError):
                    file.unlink()
            for path in (folder / "logs", *new):
                with suppress(OSError):  # not there, or not empty
                    path.rmdir()
        raise


def describe_run(folder: Path, config: Config, step: int, origin: str, ranks: int) -> None:
    """Write what the run is (config.yaml), what it runs on (environment.json), and that it starts (history.jsonl).

    step: iterations done so far; origin: where its weights come from.
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
    """The lines of a run's history, oldest first; none for a run of an older version. Damaged lines are left out."""
    entries = []
    if (folder / HISTORY).is_file():
        for line in (folder / HISTORY).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return [entry for entry in entries if isinstance(entry, dict) and "event" in entry]


def last_start(folder: Path) -> dict:
    """The last start in a run's history; empty where there is none."""
    return next((entry for entry in reversed(read_history(folder)) if entry["event"] == "start"), {})


def lost_checkpoint(folder: Path) -> int | None:
    """The step of the newest checkpoint that the run committed since it last began at step 0; None: it never has."""
    newest = None
    for entry in read_history(folder):
        if entry["event"] == "checkpoint":
            newest = entry["step"]
        elif entry["event"] == "start" and entry["step"] == 0:
            newest = None
    return newest


def abandon(folder: Path, step: int) -> list[Path]:
    """Rename the step-NNNNNNNN entries of a folder (checkpoints, exports) that lie beyond `step`; their new places."""
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
    """Of this checkout; of the one that a job's copy of the code was taken from, as the launcher says."""
    if told := os.environ.get("MDMTRAIN_REVISION"):
        return told
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout, or no git
