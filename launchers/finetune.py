"""Repeat the experiment of arXiv 2511.18159: fine-tune one base model with several arms, then compare their accuracy.

    python -m launchers.finetune CONFIG... --tasks FILE --base RUN --ar-base RUN --arms A,B --seeds 0,1,2 --dir DIR

All runs of an arm start from the same base weights. Their seeds differ, and with them the data order and the noise.
After training, each run answers the tasks (mdmtrain/answers.py); the score is stored in RUN/answers.json. An arm with
two views of a sequence is trained twice: at equal compute, with half as many sequences in a step, and at equal steps,
with all sequences and twice the compute. If there is such an arm, the standard arm is also trained with twice the
sequences. This shows what twice the compute does by itself. The same command resumes a study that was stopped.
--report only compares the runs that are finished.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from launchers.comparison import around, interval, number
from launchers.results import Run
from launchers.sweep import all_runs, seed_list, train_all
from mdmtrain import answers
from mdmtrain.answers import Score
from mdmtrain.checkpoint import store
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.data.tasks import Task
from mdmtrain.evaluate import write_json
from mdmtrain.parallel.world import World, init_world

EQUAL_COMPUTE = "equal compute"
EQUAL_STEPS = "equal steps"
TWICE = "twice the compute"
REFERENCE = "standard"
AUTOREGRESSIVE = "ar"
ANSWERS = "answers.json"  # in a run folder


@dataclass(frozen=True)
class StudyRun:
    """A run of the study, and the rule by which it is compared with the others."""

    rule: str  # EQUAL_COMPUTE, EQUAL_STEPS or TWICE
    run: Run


def study_runs(base: list[str], arms: list[str], seeds: list[int], ar_base: str, folder: Path) -> list[StudyRun]:
    """All runs of the study, ordered by seed, so that all arms of the first seed are finished first.

    Raises ValueError as all_runs does.
    """
    study = []
    for arm in arms:
        runs = all_runs(base, [arm], seeds, [()], folder)
        if runs[0].config.model.causal:  # an autoregressive arm needs the autoregressive base
            runs = all_runs([*base, f"checkpoint.init_from={ar_base}"], [arm], seeds, [()], folder)
        study += [StudyRun(EQUAL_COMPUTE, run) for run in runs]
        if runs[0].config.diffusion.rows_per_slot > 1:
            rows = runs[0].config.run.global_batch * runs[0].config.diffusion.rows_per_slot
            twice = all_runs(base, [arm], seeds, [(f"run.global_batch={rows}",)], folder)
            study += [StudyRun(EQUAL_STEPS, run) for run in twice]
    rows = next((one.run.config.run.global_batch for one in study if one.rule == EQUAL_STEPS), None)
    if rows and REFERENCE in arms:
        twice = all_runs(base, [REFERENCE], seeds, [(f"run.global_batch={rows}",)], folder)
        study += [StudyRun(TWICE, run) for run in twice]
    return sorted(study, key=lambda one: one.run.seed)  # a stable sort: arms stay in order


# ---- scoring


@dataclass(frozen=True)
class Scorer:
    """Computes the scores of runs on one file of tasks, and stores each score in its own file."""

    tasks_file: Path
    tasks: list[Task]
    world: World | None  # None: only read stored scores

    def score(self, run: Path, kept: Path) -> Score | None:
        """The score of a run's newest checkpoint, read from the file `kept` or computed.

        None if the run has no checkpoint, or if there is no stored score and `world` is None.
        """
        newest = store.newest(run) if run.is_dir() else None
        if newest is None:
            return None
        if kept.is_file():
            found = Score(**json.loads(kept.read_text(encoding="utf-8")))
            if (found.checkpoint, found.tasks) == (str(newest), answers.digest(self.tasks_file)):
                return found
        if self.world is None:
            return None
        found = answers.score(run, self.tasks_file, self.tasks, self.world)
        kept.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomically(kept, json.dumps(asdict(found), indent=1) + "\n")
        return found


# ---- comparing


def spread(values: np.ndarray) -> dict:
    """Mean and standard deviation over runs, with 95% intervals for normal values (Student's t, chi-square)."""
    found = {"mean": float(values.mean()), "mean_ci": interval(values), "values": values.tolist()}
    if len(values) < 2:
        return {**found, "sd": None, "sd_ci": None}
    free = len(values) - 1  # degrees of freedom
    sd = float(values.std(ddof=1))
    low, high = (sd * (free / stats.chi2.ppf(q, free)) ** 0.5 for q in (0.975, 0.025))
    return {**found, "sd": sd, "sd_ci": [float(low), float(high)]}


def sd_ratio(values: np.ndarray, others: np.ndarray) -> dict | None:
    """Ratio of two standard deviations with its 95% interval (F; assumes that both are normal and independent).

    None if a group has fewer than two runs, or if `others` do not differ.
    """
    if min(len(values), len(others)) < 2 or others.std() == 0:
        return None
    a, b = len(values) - 1, len(others) - 1  # degrees of freedom
    ratio = float(values.std(ddof=1) / others.std(ddof=1))
    return {"ratio": ratio, "ci": [float(ratio / stats.f.ppf(q, a, b) ** 0.5) for q in (0.975, 0.025)]}


def flips(right: list[str]) -> float | None:
    """The standard deviation of accuracy that equally good runs would have, if each answer were right independently.

    right: for each run, a string with 1 for a right answer and 0 for a wrong one. The result shows how much of the
    spread between runs comes from the size of the test set. None for fewer than two runs.
    """
    if len(right) < 2:
        return None
    table = np.array([[int(one) for one in run] for run in right])
    return float(np.sqrt(table.var(axis=0, ddof=1).sum()) / table.shape[1])


def compare(study: list[StudyRun], scores: dict[Path, Score]) -> list[dict]:
    """A row for each rule and arm of the study. scores: the scores of the finished runs, by run folder.

    Differences are taken to the standard arm and paired by seed. Ratios of standard deviations are taken to the
    standard and to the autoregressive arm. A row without a finished run has an empty list of seeds and no values.
    """
    cells: dict[tuple[str, str], dict[int, Score]] = {}
    for one in study:
        cell = cells.setdefault((one.rule, one.run.cell.arm), {})
        if one.run.dir in scores:
            cell[one.run.seed] = scores[one.run.dir]
    rows = []
    for (rule, arm), of_seed in cells.items():
        missing = sorted({p.run.seed for p in study if (p.rule, p.run.cell.arm) == (rule, arm)} - set(of_seed))
        row: dict[str, Any] = {"rule": rule, "arm": arm, "seeds": sorted(of_seed), "missing_seeds": missing}
        rows.append(row)
        if not of_seed:
            continue
        row["flips_sd"] = flips([score.right for score in of_seed.values()])
        kinds = next(iter(of_seed.values())).by_kind
        row["by_kind_values"] = {kind: [of_seed[seed].by_kind[kind] for seed in sorted(of_seed)] for kind in kinds}
        row["by_kind"] = {kind: float(np.mean(values)) for kind, values in row["by_kind_values"].items()}
        for measure in ("accuracy", "nelbo"):
            values = _values(of_seed, measure)
            row[measure] = spread(values)
            for name in (REFERENCE, AUTOREGRESSIVE):
                others = cells.get((EQUAL_COMPUTE, name), {})
                itself = (rule, arm) == (EQUAL_COMPUTE, name)
                row[measure][f"sd_over_{name}"] = None if itself else sd_ratio(values, _values(others, measure))
            base = cells.get((EQUAL_COMPUTE, REFERENCE), {})
            shared = [seed for seed in of_seed if seed in base]
            if shared and (rule, arm) != (EQUAL_COMPUTE, REFERENCE):
                pairs = [getattr(of_seed[seed], measure) - getattr(base[seed], measure) for seed in shared]
                row[measure] |= {"difference": float(np.mean(pairs)), "difference_ci": interval(np.array(pairs))}
    return rows


def _values(of_seed: dict[int, Score], measure: str) -> np.ndarray:
    return np.array([getattr(of_seed[seed], measure) for seed in sorted(of_seed)])


# ---- showing


def show(rows: list[dict], before: dict[str, Score], console: Console) -> None:
    """Print two Markdown tables: accuracy, also by kind of task, then the NELBO of the responses."""
    kinds = sorted({*(k for s in before.values() for k in s.by_kind), *(k for r in rows for k in r.get("by_kind", {}))})
    for measure, scale, digits in (("accuracy", 100, 1), ("nelbo", 1, 3)):
        unit = "%" if measure == "accuracy" else ", nats/token"
        table = Table(
            "rule", "arm", "seeds", measure + unit, "sd (95%)", "lowest..highest", f"minus {REFERENCE} (95%)",
            f"sd / sd of {AUTOREGRESSIVE}", *(["sd by chance", ", ".join(kinds)] if measure == "accuracy" else []),
            box=box.MARKDOWN,
        )  # fmt: skip
        for name, base in before.items():
            cells = ["before", name, "", number(scale * getattr(base, measure), digits)]
            table.add_row(*cells, *([""] * 5 + [percents(base.by_kind, kinds)] if measure == "accuracy" else []))
        for row in rows:
            if not row["seeds"]:
                table.add_row(row["rule"], row["arm"], "missing")
                continue
            found = row[measure]
            ratio = found[f"sd_over_{AUTOREGRESSIVE}"]
            ci = found["sd_ci"]
            difference = found.get("difference_ci")
            cells = [
                row["rule"], row["arm"],
                str(len(row["seeds"])) + (f", {len(row['missing_seeds'])} missing" if row["missing_seeds"] else ""),
                number(scale * found["mean"], digits),
                around(found["sd"] and scale * found["sd"], ci and [scale * end for end in ci], digits + 1),
                f"{scale * min(found['values']):.{digits}f}..{scale * max(found['values']):.{digits}f}",
                around(
                    scale * found["difference"] if "difference" in found else None,
                    difference and [scale * end for end in difference], digits, "+",
                ),
                around(ratio and ratio["ratio"], ratio and ratio["ci"], 2),
            ]  # fmt: skip
            if measure == "accuracy":
                chance = number(row["flips_sd"] and scale * row["flips_sd"], digits + 1)
                cells += [chance, percents(row["by_kind"], kinds)]
            table.add_row(*cells)
        console.print(table)


def percents(by_kind: dict[str, float], kinds: list[str]) -> str:
    """Accuracy by kind of task, in the order of `kinds`."""
    return ", ".join(f"{100 * by_kind[kind]:.1f}%" for kind in kinds)


def draw(rows: list[dict], path: Path) -> None:
    """Draw each run as a point and each mean as a line: accuracy on the left, the NELBO on the right."""
    labels = [row["arm"] + ("" if row["rule"] == EQUAL_COMPUTE else f" ({row['rule']})") for row in rows]
    figure = Figure(figsize=(11, 0.36 * len(rows) + 1.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    measures = (("accuracy", 100, "exact answers, %"), ("nelbo", 1, "NELBO, nats/token"))
    for panel, (measure, scale, title) in zip(panels, measures, strict=True):
        for place, row in enumerate(rows):
            if row["seeds"]:
                values = scale * np.array(row[measure]["values"])
                panel.plot(values, np.full(len(values), place), "o", color="#4477aa", alpha=0.6, markersize=5)
                panel.plot(values.mean(), place, "|", color="black", markersize=16)
        panel.set_xlabel(f"{title}: each run, and the mean")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), labels)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


# ---- command


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m launchers.finetune", description=__doc__.split("\n")[0])
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG | section.key=value", help="configuration, as for mdmtrain.train"
    )
    parser.add_argument(
        "--tasks", type=Path, required=True, metavar="FILE", help="test.jsonl, written by tools/make_tasks.py"
    )
    parser.add_argument("--base", required=True, metavar="RUN", help="pretrained model that the arms start from")
    parser.add_argument(
        "--ar-base", required=True, metavar="RUN", help="pretrained autoregressive model that causal arms start from"
    )
    parser.add_argument("--arms", required=True, help="names of files in configs/arms, comma-separated")
    parser.add_argument(
        "--seeds", type=seed_list, default=[0, 1, 2], metavar="N,...", help="values of run.seed (default: 0,1,2)"
    )
    parser.add_argument("--dir", type=Path, required=True, help="folder that will hold the run folders")
    parser.add_argument(
        "--workers", type=int, default=1, help="number of runs that train at the same time (default: 1)"
    )
    parser.add_argument(
        "--report", action="store_true", help="only compare the finished runs, without training or scoring"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the tables to this file too, after each seed"
    )
    parser.add_argument(
        "--figure", type=output_file, metavar="FILE", help="draw all runs to this file (PNG), after each seed"
    )
    args = parser.parse_intermixed_args(arguments)  # overrides may also follow the options
    seeds = sorted(set(args.seeds))
    if args.workers < 1:
        raise ValueError("--workers must be at least 1")
    arms = list(dict.fromkeys(args.arms.split(",")))
    tasks = answers.read_tasks(args.tasks)
    base = [*args.config, f"checkpoint.init_from={args.base}"]
    study = study_runs(base, arms, seeds, args.ar_base, args.dir)
    bases = {"base": Path(args.base), "base-ar": Path(args.ar_base)}
    for run in bases.values():
        store.find(run)  # a missing base model is an error before the first run starts
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    scorer = Scorer(args.tasks, tasks, None if args.report else init_world())
    before = {name: scorer.score(run, args.dir / f"{name}.{ANSWERS}") for name, run in bases.items()}
    before = {name: found for name, found in before.items() if found is not None}
    scores: dict[Path, Score] = {}
    failed: list[Run] = []
    for seed in seeds:
        runs = [one.run for one in study if one.run.seed == seed]
        if not args.report:
            failed += train_all(runs, args.workers, console)
        for run in runs:
            if run.finished() and (found := scorer.score(run.dir, run.dir / ANSWERS)):
                scores[run.dir] = found
        if args.report and seed != seeds[-1]:
            continue
        rows = compare(study, scores)
        show(rows, before, console)
        if args.json:
            bare = {name: asdict(score) for name, score in before.items()}
            write_json(args.json, {"tasks": len(tasks), "before": bare, "cells": rows})
        if args.figure:
            draw(rows, args.figure)
    if failed:
        raise ValueError(f"{len(failed)} of {len(study)} runs failed: see above; the same command retries them")


if __name__ == "__main__":
    with user_errors():
        main()
