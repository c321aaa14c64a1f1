#!/usr/bin/env python3
"""How much gradient variance does each arm remove, at equal compute, on this model and this data?

    python tools/variance_report.py RUN_OR_CHECKPOINT [--arms strats,...] [--pairs N] [--json FILE] [--figure FILE]

Each arm takes 2N real steps from the same weights; Tr Cov is the mean of |g - g'|^2 / 2 over N pairs of them, with a
bootstrap interval, as a ratio to `standard`. Below it, A, B and C of loss and gradient for single rows, and whether
MIRROR can win here. Runs under torchrun as well.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.config import DiffusionConfig
from mdmtrain.data.loader import open_sources
from mdmtrain.measure import Bench, Spread, components, mean_interval, ratio_interval
from mdmtrain.monitor.logs import CommandParser, output_file, user_errors
from mdmtrain.parallel.world import init_world

ARMS = Path(__file__).resolve().parent.parent / "configs/arms"
DEFAULT_ARMS = "standard,strats,ppots-loss,ppots-gradient,mirror,mirror-dedup,complement,count,counted,counted-ppots"
PRECISE = 0.05  # half-width of a ratio's interval, relative, that the study asks for


def read_arm(name: str, run: dict) -> DiffusionConfig:
    """An arm over the run's eps, bins and floor; run: the run's configuration. Raises ValueError if there is none."""
    path = ARMS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in ARMS.glob("*.yaml")))
        raise ValueError(f"--arms: no arm {name!r}: there are {known}")
    overlay = configuration.read_file(str(path))
    if "model" in overlay:
        raise ValueError(f"--arms: {name} is another model: train it by itself, its checkpoint cannot be this one")
    kept = {key: run["diffusion"][key] for key in ("eps", "bins", "floor")}
    tree = {**run, "diffusion": {**kept, **overlay["diffusion"]}}
    return configuration.validate(tree, str(path)).diffusion


def verdict(ratio: Spread) -> str:
    if ratio.low <= 1 <= ratio.high:
        return "cannot tell"
    return "less" if ratio.high < 1 else "more"


def show(result: dict, console: Console) -> None:
    table = Table("arm", "Tr Cov of the step gradient", "ratio to standard", "", "variance of the step loss", "ratio")
    for name, row in result["arms"].items():
        table.add_row(
            name,
            f"{row['grad_var']:.4g} ({row['grad_var_ci'][0]:.4g}..{row['grad_var_ci'][1]:.4g})",
            f"{row['grad_var_ratio']:.3f} ({row['ci'][0]:.3f}..{row['ci'][1]:.3f})",
            row["verdict"] + ("" if row["precise"] else ", wide"),
            f"{row['loss_var']:.4g}",
            f"{row['loss_var_ratio']:.3f} ({row['loss_ci'][0]:.3f}..{row['loss_ci'][1]:.3f})",
        )
    console.print(table)
    table = Table("single rows", *result["components"]["gradient"])
    for what, of in result["components"].items():
        table.add_row(what, *(f"{v['value']:.3g} ({v['low']:.3g}..{v['high']:.3g})" for v in of.values()))
    console.print(table)
    margin = result["components"]["gradient"]["mirror_margin"]
    says = "can win" if margin["low"] > 0 else "loses" if margin["high"] < 0 else "cannot be told from a tie"
    console.print(f"-rho A - (B_int + C) of the gradient: MIRROR at equal compute, beside StraTS, {says} here")
    wide = [name for name, row in result["arms"].items() if not row["precise"]]
    if wide:
        console.print(
            f"interval wider than +-{PRECISE:.0%} for {', '.join(wide)}: take more --pairs before you conclude"
        )


def draw(result: dict, path: Path) -> None:
    """Ratios with their intervals, one bar an arm."""
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
    axes.set_title(f"step {result['step']}: {result['rows']} rows a step, {result['pairs']} pairs of steps an arm")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoint", type=Path, help="run folder (its newest complete checkpoint) or checkpoint folder"
    )
    parser.add_argument(
        "--arms", default=DEFAULT_ARMS, help="names of configs/arms, comma-separated; standard is added"
    )
    parser.add_argument("--pairs", type=int, default=100, help="pairs of steps for each arm (default: 100)")
    parser.add_argument("--single-rows", type=int, default=400, help="rows for the decomposition (default: 400)")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="prepared folders (default: those of the run)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--figure", type=output_file, metavar="FILE", help="draw the ratios here (PNG)")
    args = parser.parse_args(arguments)
    if args.pairs < 2 or args.single_rows < 2:
        raise ValueError("--pairs and --single-rows must be at least 2")
    world = init_world()
    loaded = store.load_model(args.checkpoint, "raw", world)
    tree = loaded.config.model_dump(mode="json")
    if args.data:
        tree["data"]["sources"] = [{"path": path} for path in args.data]
    config = configuration.validate(tree, "the run's configuration")
    names = list(dict.fromkeys(["standard", *args.arms.split(",")]))
    arms = {name: read_arm(name, tree) for name in names}
    sources = world.agree(lambda: open_sources(config.data, "train", "size"))
    bench = Bench(loaded.model, config, sources, loaded.tokenizer, world)
    noises = {}
    with Progress(disable=not world.is_main, transient=True) as bar:
        for name, diffusion in arms.items():
            task = bar.add_task(name, total=2 * args.pairs)
            noises[name] = bench.arm_noise(diffusion, args.pairs, lambda task=task: bar.advance(task))
        task = bar.add_task("single rows", total=args.single_rows)
        kinds = bench.decompose(args.single_rows, lambda: bar.advance(task))
    rows = {}
    for name, noise in noises.items():
        size = mean_interval(noise.gradient)
        ratio = ratio_interval(noise.gradient, noises["standard"].gradient)
        loss = ratio_interval(noise.loss, noises["standard"].loss)
        rows[name] = {
            "grad_var": size.value,
            "grad_var_ci": [size.low, size.high],
            "grad_var_ratio": ratio.value,
            "ci": [ratio.low, ratio.high],
            "verdict": "the reference" if name == "standard" else verdict(ratio),
            "precise": name == "standard" or (ratio.high - ratio.low) / 2 <= PRECISE * ratio.value,
            "loss_var": float(noise.loss.mean()),
            "loss_var_ratio": loss.value,
            "loss_ci": [loss.low, loss.high],
        }
    parts = {what: {k: asdict(v) for k, v in components(of).items()} for what, of in kinds.items()}
    result = {
        "checkpoint": str(loaded.folder), "step": loaded.meta["step"], "rows": config.run.global_batch,
        "pairs": args.pairs, "torch": torch.__version__, "device": str(world.device), "arms": rows, "components": parts,
    }  # fmt: skip
    if world.is_main:
        show(result, Console(width=150))
        if args.json:
            store.write_atomically(args.json, json.dumps(result, indent=1) + "\n")
        if args.figure:
            draw(result, args.figure)


if __name__ == "__main__":
    with user_errors():
        main()
