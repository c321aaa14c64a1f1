"""Arms x seeds x variations: one run folder each, and a table that compares them at equal tokens.

    python -m launchers.sweep CONFIG... --arms standard,strats,... --seeds 0,1,2 --dir DIR [--vary KEY=A,B] [key=value]

An arm is a file of configs/arms laid over the configuration; runs of equal seed share initial weights and data order,
so arms are compared by paired differences. Started again, a sweep goes on where it stopped: finished runs are passed
over, others resume from their checkpoints. `--report` only reads what is there. `--slurm '--time 2:00:00'` trains on a
cluster: a job array with a task for each run, which look after themselves as those of launchers.slurm do.
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
from mdmtrain.command import CommandParser, output_file, survive_terminal, user_errors
from mdmtrain.config import Config, resolve
from mdmtrain.parallel.stop import heard

ROOT = Path(__file__).resolve().parent.parent
ARMS = ROOT / "configs/arms"
POLL = 5.0  # seconds between two looks at the jobs of an array


@dataclass(frozen=True)
class Cell:
    """One thing to compare: an arm under one choice of the varied keys. Its runs differ in their seed alone."""

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


# ---- comparing


@dataclass(frozen=True)
class Curve:
    """Validation NELBO of one run along its tokens, and where its learning rate began to fall."""

    tokens: np.ndarray  # float64 [evaluations]
    nelbo: np.ndarray  # float64 [evaluations], nats per token
    constant: int  # evaluations before the decay: prefixes of different lengths compare there


def read_curve(run: Run) -> Curve:
    records = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    at: dict[int, list[float]] = {}  # of every validation set; not finite is no value, and no better than any
    for record in records:
        if record.get("split", "").startswith("validation"):
            at.setdefault(record["step"], []).append(np.inf if record["nelbo"] is None else record["nelbo"])
    steps, nelbo = np.array(list(at)), np.array([np.mean(values) for values in at.values()])
    optim = run.config.optim
    before = run.config.run.steps - round(run.config.run.steps * optim.decay_fraction) if optim.schedule == "wsd" else 0
    tokens = steps * float(run.config.run.global_batch * run.config.data.sequence_length)
    return Curve(tokens, nelbo, int((steps <= before).sum()))


def tokens_to_reach(curve: Curve, nelbo: float) -> float:
    """Tokens at which a run's NELBO first falls to a value, interpolated, before its decay; inf if it does not."""
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
    """95% Student interval of a mean: [low, high], or None for fewer than two values."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean() - half), float(values.mean() + half)]


def compare(runs: list[Run], reference: str) -> list[dict]:
    """A row per cell: the final NELBO, and against the reference arm of the same variation and seeds, the difference.

    `tokens_ratio`: tokens to reach the NELBO that the reference has at the end of its constant learning rate, over the
    reference's; null where some seed does not get there before its own decay.
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
                [tokens_to_reach(of_seed[s], base[s].nelbo[g]) / base[s].tokens[g] for s, g in goals.items()]
            )
            reached = bool(np.isfinite(ratios).all())
            row |= {
                "tokens_ratio": float(ratios.mean()) if reached else None,
                "tokens_ratio_ci": interval(ratios) if reached else None,
            }
        rows.append(row)
    return rows


def show(rows: list[dict], reference: str, console: Console) -> None:
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
    """Difference of the final NELBO to the reference, with its interval: a bar an arm, a panel a variation."""
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
