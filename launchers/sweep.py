"""Train every combination of arms, seeds and variations, and compare them at equal tokens in a table.

    python -m launchers.sweep CONFIG... --arms standard,strats,... --seeds 0,1,2 --dir DIR [--vary KEY=A,B] [key=value]

Each combination is a run with its own folder. An arm is a file of configs/arms that overrides the configuration. Runs
with the same seed share initial weights and data order, so arms are compared by paired differences (comparison.py).
`--variant 'KEY=A KEY=B'` changes several settings together, where `--vary` would train all their combinations. The same
command resumes a sweep that was stopped: it skips finished runs, and the others resume from their checkpoints.
`--report` only compares finished runs. `--json FILE` stores the table and the curves of all runs. `--results FILE`
reads such a file, so that a sweep can continue on another machine. `--slurm '--time 2:00:00'` trains on a cluster, as
a job array with one task for each run. These tasks save and requeue like the jobs of launchers.slurm.
"""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launchers.comparison import compare, draw, reference_of, show
from launchers.launch import live_job, parse
from launchers.lifecycle import read_state
from launchers.results import Cell, Results, Run, collect, flops_of_cells, read_stored, to_json
from launchers.slurm import prepare, slurm_parser, submit
from mdmtrain import config as configuration
from mdmtrain.command import CommandParser, output_file, survive_terminal, user_errors
from mdmtrain.config import resolve
from mdmtrain.evaluate import write_json
from mdmtrain.parallel.stop import handled_signals

ROOT = Path(__file__).resolve().parent.parent
ARMS = ROOT / "configs/arms"
POLL = 5.0  # seconds between two queries of the state of an array's jobs


def all_runs(
    base: list[str],
    arms: list[str],
    seeds: list[int],
    variations: list[tuple[str, ...]],
    folder: Path,
    alone: bool = True,
) -> list[Run]:
    """All runs of the sweep, validated. Ordered by variation, then seed, so that all arms of a seed finish early.

    variations: the settings (key=value) of each, see `all_variations`. alone: each run is one process. Raises
    ValueError for an unknown arm or an invalid configuration.
    """
    runs = []
    for variation, seed, arm in itertools.product(variations, seeds, arms):
        path = ARMS / f"{arm}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in ARMS.glob("*.yaml")))
            raise ValueError(f"--arms: unknown arm {arm!r}: choose from {known}")
        cell = Cell(arm, variation)
        run_dir = folder / cell.folder / f"seed-{seed}"
        arguments = [*base, str(path), *variation, f"run.seed={seed}", f"run.dir={run_dir}"]
        config = configuration.load(arguments)
        if alone:
            resolve(config, 1)
        runs.append(Run(cell, seed, run_dir, arguments, config))
    return runs


# ---- running


def runs_bar(console: Console) -> Progress:
    return Progress(TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)


def train_all(runs: list[Run], workers: int, console: Console) -> list[Run]:
    """Train the unfinished runs, one process each, `workers` at the same time. Returns the runs that failed.

    On SIGTERM, Ctrl-C or a closed terminal the running processes save and stop, and no other run is started. Raises
    ValueError then.
    """
    waiting = [run for run in runs if not run.finished()]
    survive_terminal()
    stopping = threading.Event()
    live: set[subprocess.Popen] = set()
    lock = threading.Lock()

    def stop(number: int, frame) -> None:
        stopping.set()
        for process in list(live):
            process.terminate()

    for number in handled_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
        signal.signal(number, stop)

    def train(run: Run) -> bool:
        if stopping.is_set():
            return False
        run.dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mdmtrain.train", *run.arguments]
        with open(run.dir / "output.log", "a") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C reaches only this process, and `stop` forwards it once
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        with lock:
            live.add(process)
        status = process.wait()
        with lock:
            live.discard(process)
        if status and not stopping.is_set():
            console.print(f"failed: {run.cell.name} seed {run.seed}, status {status}: see {run.dir / 'output.log'}")
        return status == 0 and run.finished()

    with runs_bar(console) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("", total=len(runs), completed=len(runs) - len(waiting))
        outcomes = []
        for future in [pool.submit(train, run) for run in waiting]:
            outcomes.append(future.result())
            bar.advance(task, 1 if outcomes[-1] else 0)
    if stopping.is_set():
        raise ValueError("stopped: the started runs have saved a checkpoint; the same command resumes them")
    return [run for run, good in zip(waiting, outcomes, strict=True) if not good]


def train_on_slurm(runs: list[Run], options: str, at_once: int | None, folder: Path, console: Console) -> list[Run]:
    """Train the unfinished runs as tasks of one job array, and wait for them. Returns the runs that failed.

    Ctrl-C ends only this command, with a ValueError. The same command then waits again for the jobs that exist, and
    submits the runs that have none.
    """
    waiting = [run for run in runs if not run.finished()]
    fresh = [run for run in waiting if not live_job(run.dir)]
    if fresh:
        parsed = [parse(slurm_parser(), [*run.arguments, *shlex.split(options)], None) for run in fresh]
        submit([prepare(one) for one in parsed], folder.absolute(), at_once)
    try:
        with runs_bar(console) as bar:
            task = bar.add_task("", total=len(runs))
            while live := [run for run in waiting if live_job(run.dir)]:
                bar.update(task, completed=len(runs) - len(live))
                time.sleep(POLL)
    except KeyboardInterrupt:
        raise ValueError("interrupted: the jobs continue; the same command waits for them again") from None
    failed = [run for run in waiting if not run.finished()]
    for run in failed:
        state = read_state(run.dir)
        if state is not None:
            problem = f"{state.last_error or state.phase}: see {state.log}"
            console.print(f"failed: {run.cell.name} seed {run.seed}: {problem}")
    return failed


# ---- command


def seed_list(argument: str) -> list[int]:
    """The type of --seeds: N,N,... Raises ArgumentTypeError."""
    try:
        return [int(seed) for seed in argument.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{argument}: expected whole numbers, such as 0,1,2") from None


def varied(argument: str) -> list[str]:
    """The value of --vary: KEY=A,B,... -> [KEY=A, KEY=B, ...]. Raises ValueError."""
    key, equals, values = argument.partition("=")
    if not (key and equals and values):
        raise ValueError(f"--vary {argument}: expected KEY=A,B,..., such as optim.lr=1e-3,3e-3")
    return [f"{key}={value}" for value in values.split(",")]


def all_variations(variants: list[str], varied_keys: list[str]) -> list[tuple[str, ...]]:
    """Each of --variant (or none) with every combination of the values of --vary. Raises ValueError.

    A key that would have two values in one combination is refused: only the last one would be trained.
    """
    groups = [tuple(shlex.split(variant)) for variant in dict.fromkeys(variants)] or [()]
    for group in groups:
        for setting in group:
            key, equals, value = setting.partition("=")
            if not (key and equals and value):
                raise ValueError(f"--variant {' '.join(group)}: expected 'KEY=A KEY=B ...', but {setting} is not KEY=A")
    values = list(itertools.product(*(varied(argument) for argument in varied_keys)))
    combinations = [group + combination for group in groups for combination in values]
    for combination in combinations:
        keys = [setting.partition("=")[0] for setting in combination]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"--variant and --vary give {twice[0]} twice in '{' '.join(combination)}': give it once")
    return combinations


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m launchers.sweep", description=__doc__.split("\n")[0])
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG | section.key=value", help="configuration, as for mdmtrain.train"
    )
    parser.add_argument("--arms", required=True, help="names of files in configs/arms, comma-separated")
    parser.add_argument(
        "--seeds", type=seed_list, default=[0, 1, 2], metavar="N,...", help="values of run.seed (default: 0,1,2)"
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="train every arm with each of these values; may be given several times: all combinations",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'KEY=A KEY=B'",
        help="train every arm with these settings together; may be given several times: one after the other",
    )
    parser.add_argument("--dir", type=Path, required=True, help="folder that will hold the run folders")
    parser.add_argument(
        "--reference",
        metavar="'ARM [KEY=A ...]'",
        help="arm that the others are compared with, at the same values of --vary; with values, this one is the "
        "reference of all (default: standard)",
    )
    parser.add_argument(
        "--workers", type=int, help="number of runs that train at the same time (default: 1, or all with --slurm)"
    )
    parser.add_argument("--slurm", metavar="OPTIONS", help="train as a job array with these options of launchers.slurm")
    parser.add_argument("--report", action="store_true", help="only compare the finished runs, without training")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="use the finished runs in this file, which --json wrote, instead of training them; may be given several "
        "times",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the table and the curves of the runs to this file too"
    )
    parser.add_argument("--figure", type=output_file, metavar="FILE", help="draw the differences to this file (PNG)")
    args = parser.parse_intermixed_args(arguments)  # overrides may also follow the options
    if args.workers is not None and args.workers < 1:
        raise ValueError("--workers must be at least 1")
    if args.slurm is not None and (settings := parse(slurm_parser(), shlex.split(args.slurm), None).config):
        raise ValueError(f"--slurm has settings of the runs: give {' '.join(settings)} outside of --slurm")
    arms = list(dict.fromkeys(args.arms.split(",")))
    console = Console(width=None if sys.stdout.isatty() else 130)
    variations = all_variations(args.variant, args.vary)
    runs = all_runs(args.config, arms, args.seeds, variations, args.dir, args.slurm is None)
    cells = {run.cell for run in runs}
    if args.reference is not None and not cells & {reference_of(cell, args.reference) for cell in cells}:
        raise ValueError(f"--reference {args.reference}: not one of {', '.join(sorted(cell.name for cell in cells))}")
    reference = args.reference or "standard"
    stored: Results = {}
    for file in args.results:
        found, others = read_stored(file, runs)
        stored |= found
        if others and args.json is not None and args.json.resolve() == file.resolve():
            raise ValueError(
                f"--json {file} would lose {others} runs that are not part of this sweep: name another file"
            )
    missing = [run for run in runs if run.key not in stored]
    if args.report or not missing:
        failed = []
    elif args.slurm is not None:
        failed = train_on_slurm(missing, args.slurm, args.workers, args.dir, console)
    else:
        failed = train_all(missing, args.workers or 1, console)
    results = collect(runs, stored)
    rows = compare(results, reference, flops_of_cells(runs))
    show(rows, reference, console)
    if args.json:
        write_json(args.json, {"reference": reference, "cells": rows, "runs": to_json(results)})
    if args.figure and rows:
        draw(rows, reference).savefig(args.figure, dpi=120)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: see above; the same command retries them")


if __name__ == "__main__":
    with user_errors():
        main()
