"""The runs under a folder: where each stands, how fast it is, what was last wrong with it.

    python -m launchers.status [FOLDER] [--watch] [--json FILE]     a table; FOLDER is a run or holds runs (runs)
    python -m launchers.status cancel RUN...                        save and stop; the run does not restart by itself
    python -m launchers.status resume RUN [--nodes N ...]           launch again as before, with these changes

Runs are found up to three levels below FOLDER.
"""

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

UNDECIDED = ("queued", "running", "requeued")  # phases that only a living job can be in


@dataclass(frozen=True)
class RunStatus:
    run: str
    state: str
    job: str
    step: int  # of the newest record
    steps: int
    saved: int  # step of the newest checkpoint
    loss: float | None  # mean of the newest records
    tokens_per_second: float | None
    eta: float | None  # seconds of training that are left
    restarts: int
    last_error: str


def is_run(folder: Path) -> bool:
    return (job_folder(folder) / "launch.json").is_file() or (folder / "config.yaml").is_file()


def runs_under(folder: Path, depth: int = 3) -> list[Path]:
    """Run folders: `folder` itself, or those up to three levels below. Raises ValueError."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: name a run, or the folder that holds runs")
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
            continue  # the first, cut in two; the last, half-written
        if "tokens_per_second" in record:
            records.append(record)
    return records[-count:]


def phase(run_dir: Path, state: State | None, step: int, steps: int) -> str:
    """The word for where a run stands: Slurm's, where a job lives, else that of its last end.

    gone: its job or its process has ended without a word, and Slurm does not know why either. It can be resumed.
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
    """Whether the job, or the process that supervises the ranks, still exists."""
    if state.kind == "slurm":
        return bool(state.job) and RunJob(state).now().lives
    return alive(state.job)


def alive(job: str) -> bool:
    """Whether HOST:PID lives. A process of another machine is believed to."""
    host, _, pid = job.rpartition(":")
    return host != socket.gethostname() or Path(f"/proc/{pid}").exists()


def run_status(run_dir: Path) -> RunStatus:
    state, saved = read_state(run_dir), newest_step(run_dir)
    config_file = job_folder(run_dir) / "config.yaml"
    if not config_file.is_file():
        config_file = run_dir / "config.yaml"
    tree = yaml12.parse(config_file.read_text(encoding="utf-8"), str(config_file))
    run, tokens_per_step = tree["run"], tree["run"]["global_batch"] * tree["data"]["sequence_length"]
    records = last_records(run_dir / "metrics.jsonl")
    step = records[-1]["step"] if records else 0
    word = phase(run_dir, state, saved, run["steps"])
    losses = [record["nelbo"] for record in records if record["nelbo"] is not None]
    speed = records[-1]["tokens_per_second"] if records else None
    error = state.last_error if state else ""
    if not error and state and state.phase == "queued" and state.job and not lives(state):
        error = f"the job ended before its ranks began: see {state.log}; without that file, its node does not see it"
    eta = (run["steps"] - step) * tokens_per_step / speed if speed else None
    return RunStatus(
        str(run_dir), word, state.job if state else "", step, run["steps"], saved,
        sum(losses) / len(losses) if losses else None, speed, eta, max(0, state.starts - 1) if state else 0,
        error,
    )  # fmt: skip


def table(statuses: list[RunStatus]) -> Table:
    made = Table("run", "state", "job", "step", "saved", "loss", "tokens/s", "ETA", "restarts", "last error", box=None)
    for s in statuses:
        eta = "" if s.eta is None or s.step >= s.steps else f"{s.eta // 3600:.0f}:{s.eta % 3600 // 60:02.0f}"
        loss = "" if s.loss is None else f"{s.loss:.4f}"
        speed = "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}"
        made.add_row(escape(s.run), s.state, s.job, f"{s.step}/{s.steps}", str(s.saved), loss, speed, eta,
                     str(s.restarts), escape(s.last_error))  # fmt: skip
    return made


# ---- verbs


def cancel(run_dir: Path) -> None:
    state = read_state(run_dir)
    if state is None:
        raise ValueError(f"{run_dir}: not launched by launchers.slurm or launchers.local: stop it where it runs")
    word = phase(run_dir, state, newest_step(run_dir), sys.maxsize)
    if state.phase not in UNDECIDED or not lives(state):
        raise ValueError(f"{run_dir}: nothing to cancel, the run is {word}")
    if state.kind == "slurm":
        RunJob(state).cancel()
    else:
        host, _, pid = state.job.rpartition(":")
        if host != socket.gethostname():
            raise ValueError(f"{run_dir}: runs on {host} as process {pid}: stop it there")
        os.kill(int(pid), signal.SIGTERM)
    print(f"{run_dir}: told job {state.job} to stop; its ranks save first. Go on with "
          f"python -m launchers.status resume {run_dir}")  # fmt: skip


def resume(run_dir: Path, changes: list[str]) -> None:
    """Launch again with the options of the last launch, and with `changes`, as a user types them, on top."""
    path = job_folder(run_dir) / "launch.json"
    if not path.is_file():
        raise ValueError(f"{run_dir}: was never launched: start it with launchers.slurm or launchers.local")
    from launchers import local, slurm

    told = json.loads(path.read_text(encoding="utf-8"))
    os.chdir(told["directory"])
    module = slurm if told["kind"] == "slurm" else local
    module.launch([str(job_folder(run_dir) / "config.yaml"), *changes], told["options"])


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["cancel"]:
        if not arguments[1:]:
            raise ValueError("cancel what? name run folders")
        for run in arguments[1:]:
            cancel(Path(run))
        return
    if arguments[:1] == ["resume"]:
        if not arguments[1:]:
            raise ValueError("resume what? name a run folder")
        resume(Path(arguments[1]).absolute(), arguments[2:])
        return
    parser = CommandParser(prog="python -m launchers.status", description=__doc__.split("\n\n")[0], epilog=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER")
    parser.add_argument("--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help="again and again (10)")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)

    def look() -> Table:
        statuses = [run_status(run) for run in runs_under(options.folder)]
        if options.json:
            options.json.write_text(json.dumps([asdict(s) for s in statuses], indent=1) + "\n", encoding="utf-8")
        if not statuses:
            raise ValueError(f"{options.folder}: no runs in it: name a run, or the folder that holds runs")
        return table(statuses)

    with suppress(KeyboardInterrupt):
        while True:
            shown = look()
            if options.watch is not None:
                console.clear()  # on a terminal: the table stays in its place
            console.print(shown)
            if options.watch is None:
                return
            time.sleep(options.watch)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
