#!/usr/bin/env python3
"""Measure how much gradient variance each arm removes, at equal compute, for a model and its data.

    python tools/variance_report.py RUN_OR_CHECKPOINT [--arms strats,...] [--slots N] [--json FILE] [--figure FILE]

The first table shows Tr Cov of the step gradient under each arm's forward process, and its ratio to `standard`. Both
are estimated from N single slots, by importance sampling, with a bootstrap interval. For comparison it also shows
Tr Cov from real steps, and the squared mean gradient divided by Tr Cov. The second table shows A, B and C
(docs/mathematics.md) of loss and gradient for single rows, and whether MIRROR can reduce the variance. Rows are assumed
to be independent, which is nearly true for one shuffled epoch. The tool also runs under torchrun: the model is sharded,
and real steps are split over the ranks.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mdmtrain import config as configuration
from mdmtrain import yaml12
from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.loading import load_model
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.config import DiffusionConfig
from mdmtrain.data.loader import open_sources
from mdmtrain.parallel.world import init_world
from mdmtrain.variance.gradients import ArmNoise, Bench
from mdmtrain.variance.intervals import Spread, density_floor, gradient_components, mean_interval, ratio_interval

ARMS = Path(__file__).resolve().parent.parent / "configs/arms"
DEFAULT_ARMS = "standard,strats,ppots-loss,ppots-gradient,mirror,mirror-dedup,complement,count,counted,counted-ppots"
PRECISE = 0.05  # largest relative half-width of a ratio's interval for a conclusion


def read_arm(name: str, run: dict) -> DiffusionConfig:
    """The forward process of an arm, with eps, bins and floor of the run. run: its configuration. Raises ValueError."""
    path = ARMS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in ARMS.glob("*.yaml")))
        raise ValueError(f"--arms: unknown arm {name!r}: choose from {known}")
    overlay = yaml12.read_file(str(path))
    if "model" in overlay:
        raise ValueError(f"--arms: {name} needs another model than this checkpoint: compare it by training")
    kept = {key: run["diffusion"][key] for key in ("eps", "bins", "floor")}
    tree = {**run, "diffusion": {**kept, **overlay["diffusion"]}}
    diffusion = configuration.validate(tree, str(path)).diffusion
    if diffusion.schedule != "linear":
        raise ValueError(f"--arms: {name} has schedule={diffusion.schedule}, but only schedule=linear is supported")
    if diffusion.syrm_tokens:
        raise ValueError(f"--arms: {name} masks other positions, which changes the objective: compare it by training")
    return diffusion


def verdict(name: str, trains_nelbo: bool, ratio: Spread) -> str:
    """The conclusion from an arm's ratio of variances: less, more, within 5%, or cannot tell."""
    if name == "standard":
        return "the reference"
    if not trains_nelbo:
        return "other objective"
    if ratio.low > 1 or ratio.high < 1:
        return "less" if ratio.high < 1 else "more"
    return f"within {PRECISE:.0%}" if ratio.low >= 1 - PRECISE and ratio.high <= 1 + PRECISE else "cannot tell"


def report_row(noise: ArmNoise, standard: ArmNoise, steps: ArmNoise, products: np.ndarray) -> dict:
    """The numbers of an arm. noise and standard are from slots, steps and products from real steps."""
    size = mean_interval(noise.gradient)
    ratio = ratio_interval(noise.gradient, standard.gradient)
    loss = ratio_interval(noise.loss, standard.loss)
    real = mean_interval(steps.gradient)
    signal = ratio_interval(products, noise.gradient, shared=False)
    return {
        "grad_var": size.value,
        "grad_var_ci": [size.low, size.high],
        "grad_var_ratio": ratio.value,
        "ci": [ratio.low, ratio.high],
        "precise": (ratio.high - ratio.low) / 2 <= PRECISE * ratio.value,
        "loss_var": float(noise.loss.mean()),
        "loss_var_ratio": loss.value,
        "loss_ci": [loss.low, loss.high],
        "real_steps_grad_var": real.value,
        "real_steps_ci": [real.low, real.high],
        "signal_to_noise": signal.value,
        "signal_to_noise_ci": [signal.low, signal.high],
    }


def interval(value: float, ends: list[float], digits: str) -> str:
    return f"{value:{digits}} ({ends[0]:{digits}}..{ends[1]:{digits}})"


def show(result: dict, console: Console) -> None:
    table = Table(
        "arm",
        "Tr Cov",
        "ratio to standard",
        "",
        "in real steps",
        "|E g|^2 / Tr Cov",
        "loss variance",
        "ratio",
        "best density of t",
    )
    for name, row in result["arms"].items():
        table.add_row(
            name,
            interval(row["grad_var"], row["grad_var_ci"], ".3g"),
            interval(row["grad_var_ratio"], row["ci"], ".3f"),
            row["verdict"] + ("" if row["precise"] else ", wide"),
            interval(row["real_steps_grad_var"], row["real_steps_ci"], ".3g"),
            interval(row["signal_to_noise"], row["signal_to_noise_ci"], ".2f"),
            f"{row['loss_var']:.3g}",
            interval(row["loss_var_ratio"], row["loss_ci"], ".2f"),
            interval(row["density_floor"], row["density_floor_ci"], ".2f") if "density_floor" in row else "",
        )
    console.print(table)
    console.print("best density of t: smallest second moment of any density of the rate, divided by the arm's")
    table = Table("single rows", *result["components"]["gradient"])
    for what, of in result["components"].items():
        table.add_row(what, *(f"{v['value']:.3g} ({v['low']:.3g}..{v['high']:.3g})" for v in of.values()))
    console.print(table)
    margin = result["components"]["gradient"]["mirror_margin"]
    says = "is not significantly different from StraTS alone"
    if margin["low"] > 0:
        says = "can reduce the variance further"
    elif margin["high"] < 0:
        says = "increases the variance"
    console.print(f"-rho A - (B_int + C) of the gradient: MIRROR at equal compute, in addition to StraTS, {says}")
    wide = [name for name, row in result["arms"].items() if not row["precise"]]
    if wide:
        console.print(
            f"interval wider than +-{PRECISE:.0%} for {', '.join(wide)}: use more --slots before you draw conclusions"
        )
    if any(row["verdict"] == "other objective" for row in result["arms"].values()):
        console.print(
            "the ratio of another objective is not meaningful, because its gradient differs: use |E g|^2 / Tr Cov"
        )


def draw(result: dict, path: Path) -> None:
    """Draw the ratios with their intervals, one bar for each arm."""
    names = list(result["arms"])
    rows = [result["arms"][name] for name in names]
    figure = Figure(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    ratios = [row["grad_var_ratio"] for row in rows]
    errors = [[r - row["ci"][0] for r, row in zip(ratios, rows, strict=True)],
              [row["ci"][1] - r for r, row in zip(ratios, rows, strict=True)]]  # fmt: skip
    axes.barh(names, ratios, xerr=errors, color="#4477aa", capsize=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("Tr Cov of the step gradient, ratio to standard (95% bootstrap interval)")
    axes.set_title(f"step {result['step']}: {result['rows']} rows per step, {result['slots']:,} slots per arm")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="run folder (its newest checkpoint is used) or checkpoint folder")
    parser.add_argument(
        "--arms",
        default=DEFAULT_ARMS,
        help=f"names of files in configs/arms, comma-separated; standard is added (default: {DEFAULT_ARMS})",
    )
    parser.add_argument("--slots", type=int, default=2000, help="single slots for each arm (default: 2000)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of real steps for each arm (default: 20)")
    parser.add_argument("--single-rows", type=int, default=400, help="rows for the decomposition (default: 400)")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="prepared folders (default: those of the run)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    parser.add_argument("--figure", type=output_file, metavar="FILE", help="draw the ratios to this file (PNG)")
    args = parser.parse_args(arguments)
    if min(args.slots, args.pairs, args.single_rows) < 2:
        raise ValueError("--slots, --pairs and --single-rows must be at least 2")
    world = init_world()
    loaded = load_model(args.checkpoint, "raw", world)
    tree = loaded.config.model_dump(mode="json")
    if args.data:
        tree["data"]["sources"] = [{"path": path} for path in args.data]
    config = configuration.validate(tree, "the run's configuration")
    names = list(dict.fromkeys(["standard", *args.arms.split(",")]))
    arms = {name: read_arm(name, tree) for name in names}
    sources = world.agree(lambda: open_sources(config.data, "train", "size"))
    bench = Bench(loaded.model, config, sources, loaded.tokenizer, world)
    steps = {}
    with Progress(disable=not world.is_main, transient=True) as bar:
        for name, diffusion in arms.items():
            task = bar.add_task(f"{name}: real steps", total=2 * args.pairs)
            steps[name] = bench.step_noise(diffusion, args.pairs, partial(bar.advance, task))
        task = bar.add_task("slots of all arms", total=args.slots)
        noises = bench.slot_noise(arms, args.slots, lambda: bar.advance(task))
        task = bar.add_task("single rows", total=args.single_rows)
        kinds = bench.decompose(args.single_rows, lambda: bar.advance(task))
    rows = {}
    for name, noise in noises.items():
        row = report_row(noise, noises["standard"], *steps[name])
        objective = arms[name].objective
        says = verdict(name, arms[name].trains_nelbo, Spread(row["grad_var_ratio"], *row["ci"]))
        rows[name] = {"objective": objective, "verdict": says, **row}
        if arms[name].sampler == "uniform":
            floor = density_floor(noise)
            rows[name] |= {"density_floor": floor.value, "density_floor_ci": [floor.low, floor.high]}
    parts = {what: {k: asdict(v) for k, v in gradient_components(of).items()} for what, of in kinds.items()}
    result = {
        "checkpoint": str(loaded.folder), "step": loaded.meta["step"], "rows": config.run.global_batch,
        "slots": args.slots, "pairs": args.pairs, "single_rows": args.single_rows, "torch": torch.__version__,
        "device": str(world.device), "arms": rows, "components": parts,
    }  # fmt: skip
    if world.is_main:
        show(result, Console(width=170))
        if args.json:
            store.write_atomically(args.json, json.dumps(result, indent=1) + "\n")
        if args.figure:
            draw(result, args.figure)


if __name__ == "__main__":
    with user_errors():
        main()
