#!/usr/bin/env python
"""Compare the estimators of the NELBO at equal compute: variance over seeds per forward pass, for fixed rows.

Example:
  tools/bench/estimators.py runs/quickstart --rows 32 --mc-num 16 --seeds 32
"""

import argparse
import json

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import chi2

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.loading import load_model
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.data.loader import open_sources, validation_rows
from mdmtrain.likelihood import ESTIMATORS, Estimate, Estimator, estimate
from mdmtrain.parallel.world import init_world


def summarise(found: list[Estimate]) -> dict[str, float]:
    """Over seeds: mean and variance of nats per token, and the variance times the forward passes, with 95% bounds.

    `stated` is the mean of the variances that the estimates report, divided by the measured variance. Above 1, the
    reported errors are too large.
    """
    values = np.array([one.nelbo for one in found])
    variance = float(values.var(ddof=1))
    freedom = len(values) - 1
    per_pass = variance * found[0].passes
    bounds = [freedom / float(chi2.ppf(q, freedom)) for q in (0.975, 0.025)]
    return {
        "nelbo": float(values.mean()),
        "nelbo_se": float(np.sqrt(variance / len(values))),
        "passes": found[0].passes,
        "pass_variance": per_pass,
        "low": per_pass * bounds[0],
        "high": per_pass * bounds[1],
        "stated": float(np.mean([one.noise_error**2 for one in found]) / variance),
    }


def show(results: dict[str, dict[str, float]], title: str) -> None:
    table = Table(
        "estimator", "nats/token", "forward passes", "variance x passes", "95%", "stated / measured", title=title
    )
    for name, row in results.items():
        table.add_row(
            name, f"{row['nelbo']:.4f} +- {row['nelbo_se']:.4f}", f"{row['passes']:,}",
            f"{row['pass_variance']:.3f}", f"{row['low']:.3f}..{row['high']:.3f}", f"{row['stated']:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="run folder (its newest complete checkpoint) or checkpoint folder")
    add("--rows", type=int, default=32, help="rows, evenly spaced over the validation split (default: 32)")
    add("--mc-num", type=int, default=16, help="draws per row, even (default: 16)")
    add("--orders", type=int, default=2, help="orders per row (default: 2)")
    add("--seeds", type=int, default=32, help="repetitions (default: 32)")
    add("--estimator", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help="default: all")
    add("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_args(arguments)
    if min(args.rows, args.orders, args.mc_num, args.seeds) < 2:
        raise ValueError("--rows, --orders, --mc-num and --seeds must be at least 2")
    world = init_world()
    loaded = load_model(args.checkpoint, None, world)
    config = loaded.config
    split = world.agree(lambda: open_sources(config.data, "validation"))[0]
    rows = validation_rows(split, args.rows, config.data.sequence_length, config.data.document_mask)
    results = {}
    with Progress(disable=not world.is_main, transient=True) as bar:
        for name in args.estimator:
            draws = args.orders if name == "orders" else args.mc_num
            found = []
            for seed in bar.track(range(args.seeds), description=name):
                one = Estimator(name, draws, seed, config.diffusion.eps)
                found.append(estimate(loaded.model, rows, one, config.eval.batch, loaded.tokenizer.mask_id, world))
            results[name] = summarise(found)
    if world.is_main:
        title = f"{args.rows} rows, {args.mc_num} draws ({args.orders} orders) each, {args.seeds} seeds"
        show(results, title)
        if args.json:
            store.write_atomically(args.json, json.dumps({"title": title, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
