"""Show the state, speed and last error of runs; cancel and resume runs.

    python -m launchers.status [FOLDER] [--watch] [--json FILE]     a table of the runs in FOLDER (default: runs)
    python -m launchers.status cancel RUN...                        save and stop; the run is not started again
    python -m launchers.status resume RUN [--nodes N ...]           launch again with the same options and these changes

FOLDER is a run folder, or a folder that has run folders up to three levels below it.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launchers.handle import RunJob
from launchers.lifecycle import State, job_folder, newest_step, read_state
from mdmtrain import yaml12
from mdmtrain.checkpoint.run_lock import lock_holder
from mdmtrain.command import CommandParser, output_file, user_errors

UNDECIDED = ("queued", "running", "requeued")  # phases that are true only while the job or process exists


@dataclass(frozen=True)
class RunStatus:
    run: str
    state: str
    job: str
    step: int  # of the newest record
    steps: int  # of the whole run
    saved: int  # step of the newest checkpoint
    loss: float | None  # mean of the newest records
    tokens_per_second: float | None
    eta: float | None  # remaining training time in seconds
    restarts: int
    last_error: str


def is_run(folder: Path) -> bool:
    return (job_folder(folder) / "launch.json").is_file() or (folder / "config.yaml").is_file()


def runs_under(folder: Path, depth: int = 3) -> list[Path]:
    """The run folders: `folder` itself, or those up to three levels below it. Raises ValueError if it is missing."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: name a run folder, or a folder that contains run folders")
    if is_run(folder):
        return [folder]
    inside = sorted(f for f in folder.iterdir() if f.is_dir()) if depth else []
    return [run for f in inside for run in runs_under(f, depth - 1)]


def last_records(path: Path, count: int = 20) -> list[dict]:
    """The newest training records of metrics.jsonl, read from its end."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 64_000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the first line may be cut, the last may be incomplete
        if "tokens_per_second" in record:
            records.append(record)
    return records[-count:]


def phase(run_dir: Path, state: State | None, step: int, steps: int) -> str:
    """The state of a run in one word: Slurm's state while a job exists, otherwise the phase of the run.

    gone: the job or process ended without recording a phase, and Slurm does not report why. The run can be resumed.
    """
    if state is None:
        if lock_holder(run_dir) is not None:
            return "running"
        return "finished" if step >= steps else "stopped"
    if state.phase not in UNDECIDED:
        return state.phase
    if state.kind == "local":
        return state.phase if alive(state.job) else "gone"
    if not state.job:
        return "not submitted"
    now = RunJob(state).now()
    if now.lives:
        return now.name.lower() + (f" ({now.reason})" if now.reason != "None" else "")
    return "gone" if now.name == "COMPLETED" else now.name.lower()


def lives(state: State) -> bool:
    """Whether the job, or the supervising process, still exists."""
    if state.kind == "slurm":
        return bool(state.job) and RunJob(state).now().lives
    return alive(state.job)


def alive(job: str) -> bool:
    """Whether process HOST:PID exists. A process on another machine cannot be checked: the answer is then True."""
    host, _, pid = job.rpartition(":")
    return host != socket.gethostname() or Path(f"/proc/{pid}").exists()


def run_status(run_dir: Path) -> RunStatus:
    state = read_state(run_dir)
    saved = newest_step(run_dir)
    config_file = job_folder(run_dir) / "config.yaml"
    if not config_file.is_file():
        config_file = run_dir / "config.yaml"
    tree = yaml12.parse(config_file.read_text(encoding="utf-8"), str(config_file))
    run = tree["run"]
    tokens_per_step = run["global_batch"] * tree["data"]["sequence_length"]
    records = last_records(run_dir / "metrics.jsonl")
    step = records[-1]["step"] if records else 0
    word = phase(run_dir, state, saved, run["steps"])
    losses = [record["nelbo"] for record in records if record["nelbo"] is not None]
    speed = records[-1]["tokens_per_second"] if records else None
    error = state.last_error if state else ""
    if not error and state and state.phase == "queued" and state.job and not lives(state):
        error = (
            f"the job ended before its ranks started: see {state.log}; if that file is missing, the node does not see "
            "its folder"
        )
    eta = (run["steps"] - step) * tokens_per_step / speed if speed else None
    return RunStatus(
        run=str(run_dir),
        state=word,
        job=state.job if state else "",
        step=step,
        steps=run["steps"],
        saved=saved,
        loss=sum(losses) / len(losses) if losses else None,
        tokens_per_second=speed,
        eta=eta,
        restarts=max(0, state.starts - 1) if state else 0,
        last_error=error,
    )


def table(statuses: list[RunStatus]) -> Table:
    made = Table("run", "state", "job", "step", "saved", "loss", "tokens/s", "ETA", "restarts", "last error", box=None)
    for s in statuses:
        eta = "" if s.eta is None or s.step >= s.steps else f"{s.eta // 3600:.0f}:{s.eta % 3600 // 60:02.0f}"
        loss = "" if s.loss is None else f"{s.loss:.4f}"
        speed = "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}"
        made.add_row(escape(s.run), s.state, s.job, f"{s.step}/{s.steps}", str(s.saved), loss, speed, eta,
                     str(s.restarts), escape(s.last_error))  # fmt: skip
    return made


# ---- actions


def cancel(run_dir: Path) -> None:
    state = read_state(run_dir)
    if state is None:
        raise ValueError(
            f"{run_dir}: was not launched with launchers.slurm or launchers.local: stop its processes with SIGTERM"
        )
    word = phase(run_dir, state, newest_step(run_dir), sys.maxsize)
    if state.phase not in UNDECIDED or not lives(state):
        raise ValueError(f"{run_dir}: nothing to cancel, the run is {word}")
    if state.kind == "slurm":
        RunJob(state).cancel()
    else:
        host, _, pid = state.job.rpartition(":")
        if host != socket.gethostname():
            raise ValueError(f"{run_dir}: runs on {host} as process {pid}: run this command on {host}")
        os.kill(int(pid), signal.SIGTERM)
    print(f"{run_dir}: asked job {state.job} to save and stop. Resume it with "
          f"python -m launchers.status resume {run_dir}")  # fmt: skip


def resume(run_dir: Path, changes: list[str]) -> None:
    """Launch again with the options of the last launch. `changes`: command-line arguments that override them."""
    path = job_folder(run_dir) / "launch.json"
    if not path.is_file():
        raise ValueError(f"{run_dir}: has not been launched: start it with launchers.slurm or launchers.local")
    from launchers import local, slurm

    launched = json.loads(path.read_text(encoding="utf-8"))
    os.chdir(launched["directory"])
    module = slurm if launched["kind"] == "slurm" else local
    module.launch([str(job_folder(run_dir) / "config.yaml"), *changes], launched["options"])


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["cancel"]:
        if not arguments[1:]:
            raise ValueError("cancel: give one or more run folders")
        for run in arguments[1:]:
            cancel(Path(run))
        return
    if arguments[:1] == ["resume"]:
        if not arguments[1:]:
            raise ValueError("resume: give a run folder")
        resume(Path(arguments[1]).absolute(), arguments[2:])
        return
    parser = CommandParser(
        prog="python -m launchers.status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of the examples
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="FOLDER",
        help="a run folder, or a folder that contains run folders (default: runs)",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="refresh the table at this interval (default: 10)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the table to this file too")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)

    def look() -> Table:
        statuses = [run_status(run) for run in runs_under(options.folder)]
        if options.json:
            options.json.write_text(json.dumps([asdict(s) for s in statuses], indent=1) + "\n", encoding="utf-8")
        if not statuses:
            raise ValueError(
                f"{options.folder}: contains no runs: name a run folder, or a folder that contains run folders"
            )
        return table(statuses)

    with suppress(KeyboardInterrupt):
        while True:
            shown = look()
            if options.watch is not None:
                console.clear()  # only a terminal is cleared
            console.print(shown)
            if options.watch is None:
                return
            time.sleep(options.watch)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
