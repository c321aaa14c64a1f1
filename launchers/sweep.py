"""Arms x seeds x variations: one run folder each, and a table that compares them at equal tokens.

    python -m launchers.sweep CONFIG... --arms standard,strats,... --seeds 0,1,2 --dir DIR [--vary KEY=A,B] [key=value]

An arm is a file of configs/arms laid over the configuration. Runs of equal seed share initial weights and data order,
so arms are compared by paired differences (comparison.py). Started again, a sweep resumes: finished runs are skipped,
others resume from their checkpoints. `--report` only reads what exists. `--slurm '--time 2:00:00'` trains on a
cluster, as a job array with one task for each run; the tasks are requeued like the jobs of launchers.slurm.
"""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launchers.comparison import Cell, Run, compare, draw, show
from launchers.launch import live_job, parse
from launchers.lifecycle import read_state
from launchers.slurm import prepare, slurm_parser, submit
from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.command import CommandParser, output_file, survive_terminal, user_errors
from mdmtrain.config import resolve
from mdmtrain.parallel.stop import heard

ROOT = Path(__file__).resolve().parent.parent
ARMS = ROOT / "configs/arms"
POLL = 5.0  # seconds between two looks at the jobs of an array


def planned_runs(
    base: list[str], arms: list[str], seeds: list[int], variations: list[list[str]], folder: Path, alone: bool = True
) -> list[Run]:
    """Every run of the sweep, validated: variations outermost, then seeds, so that early results are whole comparisons.

    alone: each run is one process. Raises ValueError for an arm that is not there or a configuration that is wrong.
    """
    runs = []
    for variation, seed, arm in itertools.product(itertools.product(*variations), seeds, arms):
        path = ARMS / f"{arm}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in ARMS.glob("*.yaml")))
            raise ValueError(f"--arms: no arm {arm!r}: there are {known}")
        cell = Cell(arm, variation)
        run_dir = folder / cell.folder / f"seed-{seed}"
        arguments = [*base, str(path), *variation, f"run.seed={seed}", f"run.dir={run_dir}"]
        config = configuration.load(arguments)
        if alone:
            resolve(config, 1)
        runs.append(Run(cell, seed, run_dir, arguments, config))
    return runs


# ---- running


def train_all(runs: list[Run], workers: int, console: Console) -> list[Run]:
    """Train what is not finished, `workers` runs at a time, one process each. Returns the runs that failed.

    SIGTERM, Ctrl-C and a closed terminal stop the running ones with a checkpoint and start no other.
    """
    survive_terminal()
    waiting = [run for run in runs if not run.finished()]
    stopping, live, lock = threading.Event(), set(), threading.Lock()

    def stop(number: int, frame) -> None:
        stopping.set()
        for process in list(live):
            process.terminate()

    for number in heard((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
        signal.signal(number, stop)

    def train(run: Run) -> bool:
        if stopping.is_set():
            return False
        run.dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mdmtrain.train", *run.arguments]
        with open(run.dir / "output.log", "a") as output:  # its own session: Ctrl-C reaches it once, through `stop`
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )  # fmt: skip
        with lock:
            live.add(process)
        status = process.wait()
        with lock:
            live.discard(process)
        if status and not stopping.is_set():
            console.print(f"failed: {run.cell.name} seed {run.seed}, status {status}: see {run.dir / 'output.log'}")
        return status == 0 and run.finished()

    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("", total=len(runs), completed=len(runs) - len(waiting))
        outcomes = []
        for future in [pool.submit(train, run) for run in waiting]:
            outcomes.append(future.result())
            bar.advance(task, 1 if outcomes[-1] else 0)
    if stopping.is_set():
        raise ValueError("stopped: the runs under way have saved; the same command goes on from there")
    return [run for run, good in zip(waiting, outcomes, strict=True) if not good]


def train_on_slurm(runs: list[Run], options: str, at_once: int | None, folder: Path, console: Console) -> list[Run]:
    """Train what is not finished as tasks of one job array, and wait for them. Returns the runs that failed.

    Ctrl-C ends the waiting alone: the same command waits on, and submits what has no job.
    """
    waiting = [run for run in runs if not run.finished()]
    fresh = [run for run in waiting if not live_job(run.dir)]
    if fresh:
        parsed = [parse(slurm_parser(), [*run.arguments, *shlex.split(options)], None) for run in fresh]
        submit([prepare(one) for one in parsed], folder.absolute(), at_once)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=len(runs))
            while live := [run for run in waiting if live_job(run.dir)]:
                bar.update(task, completed=len(runs) - len(live))
                time.sleep(POLL)
    except KeyboardInterrupt:
        raise ValueError("not waiting any more: the jobs go on, and the same command waits for them") from None
    failed = [run for run in waiting if not run.finished()]
    for run in failed:
        state = read_state(run.dir)
        console.print(f"failed: {run.cell.name} seed {run.seed}: {state.last_error or state.phase}: see {state.log}")
    return failed


# ---- command


def varied(argument: str) -> list[str]:
    """The type of --vary: KEY=A,B,... -> [KEY=A, KEY=B, ...]."""
    key, equals, values = argument.partition("=")
    if not (key and equals and values):
        raise ValueError(f"--vary {argument}: expected KEY=A,B,..., such as optim.lr=1e-3,3e-3")
    return [f"{key}={value}" for value in values.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m launchers.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="+", metavar="CONFIG | section.key=value", help="as for mdmtrain.train")
    parser.add_argument("--arms", required=True, help="files of configs/arms, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="run.seed of the runs, comma-separated (default: 0,1,2)")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=A,B", help="every arm under each value too")
    parser.add_argument("--dir", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--reference", default="standard", help="arm that the others are compared with")
    parser.add_argument("--workers", type=int, help="runs at a time (default: 1 process; on Slurm all)")
    parser.add_argument("--slurm", metavar="OPTIONS", help="train as a job array; options of launchers.slurm")
    parser.add_argument("--report", action="store_true", help="train nothing, compare what is finished")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the table here")
    parser.add_argument("--figure", type=output_file, metavar="FILE", help="draw the differences here (PNG)")
    args = parser.parse_intermixed_args(arguments)  # overrides may also follow the options
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {args.seeds}: expected whole numbers, such as 0,1,2") from None
    if args.workers is not None and args.workers < 1:
        raise ValueError("--workers must be at least 1")
    arms = list(dict.fromkeys(args.arms.split(",")))
    console = Console(width=None if sys.stdout.isatty() else 130)
    runs = planned_runs(args.config, arms, seeds, [varied(v) for v in args.vary], args.dir, args.slurm is None)
    if args.report:
        failed = []
    elif args.slurm is not None:
        failed = train_on_slurm(runs, args.slurm, args.workers, args.dir, console)
    else:
        failed = train_all(runs, args.workers or 1, console)
    rows = compare(runs, args.reference)
    show(rows, args.reference, console)
    if args.json:
        table = json.loads(json.dumps({"reference": args.reference, "cells": rows}), parse_constant=lambda _: None)
        store.write_atomically(args.json, json.dumps(table, indent=1) + "\n")
    if args.figure and rows:
        draw(rows, args.reference, args.figure)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: see above; started again, the sweep retries them")


if __name__ == "__main__":
    with user_errors():
        main()
