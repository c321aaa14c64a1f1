"""Train every combination of arms, seeds and variations, and compare them at equal tokens in a table.

    python -m launchers.sweep CONFIG... --arms standard,strats,... --seeds 0,1,2 --dir DIR [--vary KEY=A,B] [key=value]

Each combination is a run with its own folder. An arm is a file of configs/arms that overrides the configuration. Runs
with the same seed share initial weights and data order, so arms are compared by paired differences. The same command
resumes a sweep that was stopped: it skips finished runs, and the others resume from their checkpoints. `--report` only
compares finished runs. `--slurm '--time 2:00:00'` trains on a cluster, as a job array with one task for each run. These
tasks save and requeue like the jobs of launchers.slurm.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import stats

from launchers.launch import live_job, parse
from launchers.lifecycle import read_state
from launchers.slurm import prepare, slurm_parser, submit
from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.config import Config, resolve
from mdmtrain.monitor.logs import CommandParser, output_file, survive_terminal, user_errors
from mdmtrain.parallel.world import heard

ROOT = Path(__file__).resolve().parent.parent
ARMS = ROOT / "configs/arms"
POLL = 5.0  # seconds between two queries of the state of an array's jobs


@dataclass(frozen=True)
class Cell:
    """A row of the comparison: one arm with one value of each varied key. Its runs differ only in their seeds."""

    arm: str
    variation: tuple[str, ...]  # key=value

    @property
    def name(self) -> str:
        return " ".join([self.arm, *self.variation])

    @property
    def folder(self) -> str:
        return ",".join([self.arm, *self.variation])


@dataclass(frozen=True)
class Run:
    cell: Cell
    seed: int
    dir: Path
    arguments: list[str]  # of mdmtrain.train
    config: Config

    def finished(self) -> bool:
        newest = store.newest(self.dir) if self.dir.is_dir() else None
        return newest is not None and store.read_meta(newest)["step"] >= self.config.run.steps


def planned_runs(
    base: list[str], arms: list[str], seeds: list[int], variations: list[list[str]], folder: Path, alone: bool = True
) -> list[Run]:
    """All runs of the sweep, validated. Ordered by variation, then seed, so that all arms of a seed finish early.

    alone: each run is one process. Raises ValueError for an unknown arm or an invalid configuration.
    """
    runs = []
    for variation, seed, arm in itertools.product(itertools.product(*variations), seeds, arms):
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


def train_all(runs: list[Run], workers: int, console: Console) -> list[Run]:
    """Train the unfinished runs, one process each, `workers` at the same time. Returns the runs that failed.

    On SIGTERM, Ctrl-C or a closed terminal the running processes save and stop, and no other run is started. Raises
    ValueError then.
    """
    survive_terminal()
    waiting = [run for run in runs if not run.finished()]
    stopping = threading.Event()
    live, lock = set(), threading.Lock()

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

    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar, ThreadPoolExecutor(workers) as pool:
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
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=len(runs))
            while live := [run for run in waiting if live_job(run.dir)]:
                bar.update(task, completed=len(runs) - len(live))
                time.sleep(POLL)
    except KeyboardInterrupt:
        raise ValueError("interrupted: the jobs continue; the same command waits for them again") from None
    failed = [run for run in waiting if not run.finished()]
    for run in failed:
        state = read_state(run.dir)
        console.print(f"failed: {run.cell.name} seed {run.seed}: {state.last_error or state.phase}: see {state.log}")
    return failed


# ---- comparing


@dataclass(frozen=True)
class Curve:
    """The validation NELBO of one run as a function of its tokens."""

    tokens: np.ndarray  # float64 [evaluations]
    nelbo: np.ndarray  # float64 [evaluations], nats per token
    constant: int  # evaluations before the learning rate decays; runs of different lengths are comparable there


def read_curve(run: Run) -> Curve:
    """Read the evaluations of a run from its metrics.jsonl: the mean over the validation sets at each step."""
    records = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    at: dict[int, list[float]] = {}
    for record in records:
        if record.get("split", "").startswith("validation"):
            nelbo = record["nelbo"]
            at.setdefault(record["step"], []).append(np.inf if nelbo is None else nelbo)  # null: it was not finite
    steps = np.array(list(at))
    nelbo = np.array([np.mean(values) for values in at.values()])
    optim = run.config.optim
    before = 0  # first step of the decay
    if optim.schedule == "wsd":
        before = run.config.run.steps - round(run.config.run.steps * optim.decay_fraction)
    tokens = steps * float(run.config.run.global_batch * run.config.data.sequence_length)
    return Curve(tokens, nelbo, int((steps <= before).sum()))


def tokens_to_reach(curve: Curve, nelbo: float) -> float:
    """Number of tokens at which a run's NELBO first falls to a value before the decay, interpolated. inf if never."""
    values = curve.nelbo[: curve.constant]
    below = np.flatnonzero(values <= nelbo)
    if not len(below):
        return float("inf")
    i = below[0]
    if i == 0:
        return float(curve.tokens[0])
    share = (values[i - 1] - nelbo) / (values[i - 1] - values[i])
    return float(curve.tokens[i - 1] + share * (curve.tokens[i] - curve.tokens[i - 1]))


def interval(values: np.ndarray) -> list[float] | None:
    """The 95% Student interval of a mean: [low, high]. None for fewer than two values, or if one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean() - half), float(values.mean() + half)]


def compare(runs: list[Run], reference: str) -> list[dict]:
    """A row for each cell: its final NELBO, and its difference to the reference arm with the same variation and seeds.

    `tokens_ratio`: the tokens to reach the NELBO that the reference has at the end of its constant learning rate,
    divided by the reference's tokens. None if a seed does not reach it before its own decay.
    """
    curves: dict[Cell, dict[int, Curve]] = {}
    for run in runs:
        if run.finished():
            curves.setdefault(run.cell, {})[run.seed] = read_curve(run)
    rows = []
    for cell, of_seed in curves.items():
        final = np.array([curve.nelbo[-1] for curve in of_seed.values()])
        row = {
            "arm": cell.arm, "variation": list(cell.variation), "seeds": sorted(of_seed), "nelbo": float(final.mean()),
            "nelbo_sd": float(final.std(ddof=1)) if len(final) > 1 else None,
            "tokens": float(min(curve.tokens[-1] for curve in of_seed.values())),
        }  # fmt: skip
        base = curves.get(Cell(reference, cell.variation), {})
        shared = [seed for seed in of_seed if seed in base]
        if shared:
            difference = np.array([of_seed[seed].nelbo[-1] - base[seed].nelbo[-1] for seed in shared])
            row |= {"difference": float(difference.mean()), "difference_ci": interval(difference)}
        if shared and all(base[seed].constant for seed in shared):
            goals = {seed: base[seed].constant - 1 for seed in shared}
            ratios = np.array(
                [
                    tokens_to_reach(of_seed[seed], base[seed].nelbo[goal]) / base[seed].tokens[goal]
                    for seed, goal in goals.items()
                ]
            )
            reached = bool(np.isfinite(ratios).all())
            row |= {
                "tokens_ratio": float(ratios.mean()) if reached else None,
                "tokens_ratio_ci": interval(ratios) if reached else None,
            }
        rows.append(row)
    return rows


def show(rows: list[dict], reference: str, console: Console) -> None:
    """Print a table for each variation."""

    def number(value: float | None, digits: int = 4, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.{digits}f}"

    def around(value: float | None, ci: list[float] | None, digits: int, sign: str = "") -> str:
        low_high = "" if ci is None else f" ({number(ci[0], digits, sign)}..{number(ci[1], digits, sign)})"
        return number(value, digits, sign) + low_high

    for variation in dict.fromkeys(tuple(row["variation"]) for row in rows):
        table = Table(
            "arm", "seeds", "final NELBO, nats/token", "sd", f"minus {reference} (95%)", "tokens to its level, ratio",
            title=" ".join(variation) or None,
        )  # fmt: skip
        for row in (row for row in rows if tuple(row["variation"]) == variation):
            table.add_row(
                row["arm"], str(len(row["seeds"])), number(row["nelbo"]), number(row["nelbo_sd"]),
                around(row.get("difference"), row.get("difference_ci"), 4, "+"),
                around(row.get("tokens_ratio"), row.get("tokens_ratio_ci"), 2) or "not reached",
            )  # fmt: skip
        console.print(table)


def draw(rows: list[dict], reference: str, path: Path) -> None:
    """Draw each arm's difference of the final NELBO to the reference as a bar, with a panel for each variation."""
    variations = list(dict.fromkeys(tuple(row["variation"]) for row in rows))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != reference]
    figure = Figure(figsize=(3 + 4 * len(variations), 0.35 * len(arms) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(variations), sharex=True, sharey=True, squeeze=False)[0]
    for panel, variation in zip(panels, variations, strict=True):
        for row in rows:
            if tuple(row["variation"]) == variation and row["arm"] != reference and "difference" in row:
                low, high = row["difference_ci"] or [row["difference"]] * 2
                error = [[row["difference"] - low], [high - row["difference"]]]
                panel.barh(arms.index(row["arm"]), row["difference"], xerr=error, color="#4477aa", capsize=3)
        panel.axvline(0.0, color="black", linewidth=0.8)
        panel.set_title(" ".join(variation))
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    figure.supxlabel(f"final validation NELBO minus {reference}'s, nats/token (95% over seeds)")
    figure.savefig(path, dpi=120)


# ---- command


def varied(argument: str) -> list[str]:
    """The value of --vary: KEY=A,B,... -> [KEY=A, KEY=B, ...]. Raises ValueError."""
    key, equals, values = argument.partition("=")
    if not (key and equals and values):
        raise ValueError(f"--vary {argument}: expected KEY=A,B,..., such as optim.lr=1e-3,3e-3")
    return [f"{key}={value}" for value in values.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m launchers.sweep", description=__doc__.split("\n")[0])
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG | section.key=value", help="configuration, as for mdmtrain.train"
    )
    parser.add_argument("--arms", required=True, help="names of files in configs/arms, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="values of run.seed, comma-separated (default: 0,1,2)")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="train every arm with each of these values; may be given several times",
    )
    parser.add_argument("--dir", type=Path, required=True, help="folder that will hold the run folders")
    parser.add_argument(
        "--reference", default="standard", help="arm that the others are compared with (default: standard)"
    )
    parser.add_argument(
        "--workers", type=int, help="number of runs that train at the same time (default: 1, or all with --slurm)"
    )
    parser.add_argument("--slurm", metavar="OPTIONS", help="train as a job array with these options of launchers.slurm")
    parser.add_argument("--report", action="store_true", help="only compare the finished runs, without training")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the table to this file too")
    parser.add_argument("--figure", type=output_file, metavar="FILE", help="draw the differences to this file (PNG)")
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
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: see above; the same command retries them")


if __name__ == "__main__":
    with user_errors():
        main()
