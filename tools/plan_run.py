#!/usr/bin/env python3
"""Predict what a run costs on N GPUs, and find its fastest arrangement: memory, communication and time. Needs no GPU.

    python tools/plan_run.py CONFIG... --gpus 64,256,1024 --gpu h100 [--trace] [--json FILE] [section.key=value ...]
    python tools/plan_run.py CONFIG... --gpus 64 --gpu h100 --best [--write FILE]
    python tools/plan_run.py CONFIG... --gpus 1 --gpu h100 --roofline

The prediction is computed from the configuration and data-sheet numbers (mdmtrain/cost.py). The assumptions are
printed. `--best` searches micro-batch, activation checkpointing, replicas, resharding, compilation and offload
(mdmtrain/search.py). `--roofline` counts the operations of one micro-step of the real model on fake tensors. `--trace`
runs one micro-step of the real model on many fake ranks, and compares the bytes that it sends with the prediction.
"""

import json
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from observed import traced_traffic
from rich.console import Console
from rich.table import Table

from mdmtrain import config as configuration
from mdmtrain import yaml12
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.config import Config
from mdmtrain.cost import GIB, GPUS, Assumptions, Cost, Gpu, cost, mean_masked, muon_traffic, shape_of, traffic
from mdmtrain.model.presets import ModelShape, describe_shape
from mdmtrain.search import Arrangement, divisible_batch, search

SHOWN = 5  # arrangements in the table of --best
NOTHING_FITS = "nothing fits: take more GPUs, a smaller model or a smaller data.sequence_length"
FASTER = 0.95  # an arrangement is proposed if its step takes less than this share of the configured one


def table_of(costs: list[Cost], capacity: float) -> Table:
    table = Table("", *(f"{c.gpus:,} GPUs" for c in costs))

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    for kind in costs[0].memory:
        row(f"{kind}, GiB per GPU", [f"{c.memory[kind] / GIB:.2f}" for c in costs])
    row(
        "peak (only one part at work)",
        [f"{c.memory_total / GIB:.1f} of {capacity / GIB:.1f}" for c in costs],
    )
    if any(c.host_bytes for c in costs):
        row("offloaded, GiB of host memory per GPU", [f"{c.host_bytes / GIB:.2f}" for c in costs])
    row("fits", ["yes" if c.fits else "NO" for c in costs])
    for kind in costs[0].traffic:
        row(f"{kind}, GB sent per step", [f"{c.traffic[kind] / 1e9:.3g}" for c in costs])
    row("link of the sharding collectives", [c.link for c in costs])
    row("model FLOPs per step", [f"{c.model_flops:.3g}" for c in costs])
    row("compute, s", [f"{c.compute_seconds:.3g}" for c in costs])
    row("communication, s", [f"{c.communication_seconds:.3g}" for c in costs])
    row("of it latency, s", [f"{c.latency_seconds:.3g}" for c in costs])
    row("optimizer, s", [f"{c.optimizer_seconds:.3g}" for c in costs])
    row("step (the larger of both, plus optimizer), s", [f"{c.step_seconds:.3g}" for c in costs])
    row("MFU", [f"{c.mfu:.1%}" for c in costs])
    row("tokens/s", [f"{c.tokens_per_second:,.0f}" for c in costs])
    row("days", [f"{c.days:,.2f}" for c in costs])
    row("GPU-hours", [f"{c.gpu_hours:,.0f}" for c in costs])
    row("checkpoint, GB in total", [f"{c.checkpoint_bytes / 1e9:.1f}" for c in costs])
    row("stall per save (copy to the host), s", [f"{c.stall_seconds:.2g}" for c in costs])
    row("asynchronous write of a save, s", [f"{c.write_seconds:.2g}" for c in costs])
    return table


def table_of_arrangements(found: list[Arrangement], gpus: int) -> Table:
    """One arrangement in each row."""
    heads = ("rows x accum.", "recompute", "copies x shard", "reshard", "compile", "offload", "head_chunk",
             "step, s", "MFU", "GiB", "GB sent", "compute, s", "comm., s")  # fmt: skip
    table = Table(*heads, title=f"the fastest arrangements on {gpus:,} GPUs that fit")
    for one in found:
        run = one.config.run
        parallel = one.config.parallel
        price = one.cost
        accumulation = run.global_batch // (gpus * run.micro_batch)
        yes = {True: "yes", False: "no"}
        table.add_row(
            f"{run.micro_batch} x {accumulation}", parallel.activation_checkpointing,
            f"{parallel.replicate} x {gpus // parallel.replicate}", yes[parallel.reshard_after_forward],
            yes[parallel.compile], yes[parallel.offload], str(parallel.head_chunk), f"{price.step_seconds:.3g}",
            f"{price.mfu:.1%}", f"{price.memory_total / GIB:.1f}", f"{sum(price.traffic.values()) / 1e9:.3g}",
            f"{price.compute_seconds:.3g}", f"{price.communication_seconds:.3g}",
        )  # fmt: skip
    return table


def show_best(
    config: Config, shape: ModelShape, gpus: int, gpu: Gpu, assumed: Assumptions, console: Console, write: Path | None
) -> list[Arrangement]:
    """Print the fastest arrangements, and write the first to a file. Raises ValueError if none fits."""
    _, changed = divisible_batch(config, gpus)
    found = search(config, shape, gpus, gpu, assumed)
    if not found:
        raise ValueError(f"{gpus:,} GPUs: {NOTHING_FITS}")
    if changed:
        console.print(f"{gpus:,} GPUs: {changed}", highlight=False, soft_wrap=True)
    console.print(table_of_arrangements(found[:SHOWN], gpus))
    best = found[0]
    console.print(f"{gpus:,} GPUs: the fastest: {best.arguments}", highlight=False, soft_wrap=True)
    if write:
        comments = [
            shlex.join(["tools/plan_run.py", *sys.argv[1:]]),
            f"Planned, not measured: {best.cost.step_seconds:.3g} s a step, MFU {best.cost.mfu:.1%}.",
            *([changed] if changed else []),
        ]
        write_atomically(write, "".join(f"# {line}\n" for line in comments) + yaml12.dump(best.overlay))
        console.print(f"written to {write}: give it after the other configuration files", highlight=False)
    return found[:SHOWN]


def show_trace(config: Config, shape: ModelShape, gpus: int, console: Console) -> dict[str, float]:
    """Print the bytes that one micro-step of the real model sends next to the plan, and return them by collective."""
    shard = gpus // config.parallel.replicate
    by_rank = muon_traffic(shape, shard)
    busiest = by_rank.index(max(by_rank))  # the plan is for this rank; without Muon all ranks send equally much
    traced, _ = traced_traffic(config, shape, gpus, busiest)
    planned = traffic(shape, config, gpus, shard, 1)
    for kind, sent in traced.items():
        console.print(
            f"{gpus:,} GPUs: one micro-step sends {sent:,} bytes by {kind}, the plan has {planned[kind]:,.0f} "
            f"({planned[kind] / sent - 1:+.2%})",
            highlight=False,
        )
    return traced


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="+", metavar="CONFIG | section.key=value", help="as in mdmtrain.train")
    parser.add_argument("--gpus", required=True, help="numbers of GPUs, separated by commas")
    parser.add_argument("--gpu", required=True, choices=sorted(GPUS), help="kind of GPU")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--best", action="store_true", help="find the fastest arrangement that fits into memory")
    other.add_argument("--roofline", action="store_true", help="show the time of a micro-step by kind of operation")
    other.add_argument("--trace", action="store_true", help="compare with the bytes that the engine sends")
    parser.add_argument(
        "--write", type=output_file, metavar="FILE", help="with --best: write it to this new configuration file"
    )
    for assumed in fields(Assumptions):
        flag = "--" + assumed.name.replace("_", "-")
        parser.add_argument(
            flag,
            type=float,
            default=assumed.default,
            help=assumed.metadata["meaning"] + ("" if assumed.default is None else f" (default: {assumed.default:g})"),
        )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the plan to this file too")
    args = parser.parse_intermixed_args(arguments)
    assumed = Assumptions(**{f.name: getattr(args, f.name) for f in fields(Assumptions)})
    if not all(part.isdecimal() and int(part) for part in args.gpus.split(",")):
        raise ValueError(f"--gpus {args.gpus}: expected numbers of GPUs, such as 64,256")
    config = configuration.load(args.config)
    assumed = replace(assumed, masked=mean_masked(config, assumed))
    if min(asdict(assumed).values()) <= 0:
        raise ValueError("all assumptions must be greater than 0: see --help")
    gpu = GPUS[args.gpu]
    shape = shape_of(config)
    counts = [int(part) for part in args.gpus.split(",")]
    if args.write and not (args.best and len(counts) == 1):
        raise ValueError("--write needs --best and one number of GPUs")
    if args.write and args.write.exists():
        raise ValueError(f"--write {args.write}: the file exists: remove it, or give another name")
    console = Console(width=max(140 if args.best else 100, 40 + 20 * len(counts)))
    console.print(describe_shape(shape), highlight=False, soft_wrap=True)
    result: dict = {"gpu": args.gpu, "assumed": asdict(assumed), "model": asdict(shape)}
    if args.best:
        found = {n: show_best(config, shape, n, gpu, assumed, console, args.write) for n in counts}
        result["best"] = [
            {"overlay": one.overlay, **asdict(one.cost), "memory_total": one.cost.memory_total}
            for ranked in found.values() for one in ranked
        ]  # fmt: skip
    elif args.roofline:
        from roofline import roofline, table_of_roofline  # importing the compiler takes seconds

        lines = [roofline(config, shape, n, gpu, assumed) for n in counts]
        for count, line in zip(counts, lines, strict=True):
            console.print(table_of_roofline(line, count))
        result["roofline"] = [{**asdict(line), "total": line.total, "mfu": line.mfu()} for line in lines]
    else:
        plans, refused = plain(config, shape, counts, gpu, assumed, console, args.trace)
        result |= {"plans": plans, "refused": refused}
    console.print("assumed: " + ", ".join(f"{k} {v:g}" for k, v in asdict(assumed).items()), highlight=False)
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")


def plain(
    config: Config, shape: ModelShape, counts: list[int], gpu: Gpu, assumed: Assumptions, console: Console, trace: bool
) -> tuple[list[dict], list[str]]:
    """Print the plan of the configuration as it is on each number of GPUs.

    Returns (the plans, one error line for each number on which it is not valid). Raises ValueError if it is valid on
    none.
    """
    costs, refused = [], []
    for count in counts:
        try:
            costs.append(cost(config, shape, count, gpu, assumed))
        except ValueError as error:
            refused.append(f"{count:,} GPUs: {error}")
    if not costs:
        raise ValueError("; ".join(refused) + "; --best finds valid settings")
    for reason in costs[0].reasons[1:]:
        console.print(reason, highlight=False)
    for one in costs:
        console.print(f"{one.gpus:,} GPUs: {one.reasons[0]}", highlight=False)
    console.print(table_of(costs, gpu.memory))
    for line in refused:
        console.print(f"{line}; --best finds valid settings", highlight=False, soft_wrap=True)
    report = [{**asdict(one), "memory_total": one.memory_total} for one in costs]
    for one, entry in zip(costs, report, strict=True):
        best = next(iter(search(config, shape, one.gpus, gpu, assumed)), None)
        if best and one.fits and best.cost.step_seconds >= FASTER * one.step_seconds:
            best = None
        entry["best"] = {"arguments": best.arguments, "step_seconds": best.cost.step_seconds} if best else None
        state = "fits" if one.fits else "does not fit"
        if best:
            advice = f"{best.cost.step_seconds:.3g} s a step with {best.arguments}"
            console.print(f"{one.gpus:,} GPUs: {state}; {advice}", highlight=False, soft_wrap=True)
        elif not one.fits:
            console.print(f"{one.gpus:,} GPUs: {NOTHING_FITS}", highlight=False, soft_wrap=True)
        if trace:
            entry["traced_micro_step"] = show_trace(config, shape, one.gpus, console)
    return report, refused


if __name__ == "__main__":
    with user_errors():
        main()
