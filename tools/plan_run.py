#!/usr/bin/env python3
"""Predict what a run costs on N GPUs: memory, communication and time. Needs no GPU.

    python tools/plan_run.py CONFIG... --gpus 64,256,1024 --gpu h100 [--trace] [--json FILE] [section.key=value ...]

The prediction is computed from the configuration and data-sheet numbers (mdmtrain/cost.py). The assumptions are
printed. `--trace` runs one micro-step of the real model on fake tensors, and compares the bytes that it sends with the
prediction.
"""

import json
from dataclasses import asdict, fields

from observed import traced_traffic
from rich.console import Console
from rich.table import Table

from mdmtrain import config as configuration
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.cost import GIB, GPUS, Assumptions, Cost, cost, hurry, muon_traffic, propose, shape_of, traffic
from mdmtrain.model.presets import describe_shape


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
    row("optimizer (Muon; AdamW only with offload), s", [f"{c.optimizer_seconds:.3g}" for c in costs])
    row("step (the larger of both, plus optimizer), s", [f"{c.step_seconds:.3g}" for c in costs])
    row("MFU", [f"{c.mfu:.1%}" for c in costs])
    row("tokens/s", [f"{c.tokens_per_second:,.0f}" for c in costs])
    row("days", [f"{c.days:,.2f}" for c in costs])
    row("GPU-hours", [f"{c.gpu_hours:,.0f}" for c in costs])
    row("checkpoint, GB in total", [f"{c.checkpoint_bytes / 1e9:.1f}" for c in costs])
    row("stall per save (copy to the host), s", [f"{c.stall_seconds:.2g}" for c in costs])
    row("asynchronous write of a save, s", [f"{c.write_seconds:.2g}" for c in costs])
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="+", metavar="CONFIG | section.key=value", help="as in mdmtrain.train")
    parser.add_argument("--gpus", required=True, help="numbers of GPUs, separated by commas")
    parser.add_argument("--gpu", required=True, choices=sorted(GPUS), help="kind of GPU")
    for assumed in fields(Assumptions):
        flag = "--" + assumed.name.replace("_", "-")
        parser.add_argument(flag, type=float, default=assumed.default, help=f"assumed (default: {assumed.default:g})")
    parser.add_argument("--trace", action="store_true", help="compare with the bytes that the engine sends")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the plan to this file too")
    args = parser.parse_intermixed_args(arguments)
    assumed = Assumptions(**{f.name: getattr(args, f.name) for f in fields(Assumptions)})
    if min(asdict(assumed).values()) <= 0:
        raise ValueError("all assumptions must be greater than 0: see --help")
    if not all(part.isdecimal() and int(part) for part in args.gpus.split(",")):
        raise ValueError(f"--gpus {args.gpus}: expected numbers of GPUs, such as 64,256")
    config, gpu = configuration.load(args.config), GPUS[args.gpu]
    shape, counts = shape_of(config), [int(part) for part in args.gpus.split(",")]
    console = Console(width=max(100, 40 + 20 * len(counts)))
    costs, refused = [], []
    for count in counts:
        try:
            costs.append(cost(config, shape, count, gpu, assumed))
        except ValueError as error:
            refused.append(f"{count:,} GPUs: {error}")
    if not costs:
        raise ValueError("; ".join(refused))
    console.print(describe_shape(shape), highlight=False)
    for reason in costs[0].reasons[1:]:
        console.print(reason, highlight=False)
    for one in costs:
        console.print(f"{one.gpus:,} GPUs: {one.reasons[0]}", highlight=False)
    console.print(table_of(costs, gpu.memory))
    for line in refused:
        console.print(line, highlight=False)
    console.print("assumed: " + ", ".join(f"{k} {v:g}" for k, v in asdict(assumed).items()), highlight=False)
    report = [{**asdict(one), "memory_total": one.memory_total} for one in costs]
    for one, entry in zip(costs, report, strict=True):
        if not one.fits:
            entry["proposal"] = propose(config, shape, one.gpus, gpu, assumed)
            way = entry["proposal"] or "more GPUs, a smaller model or a smaller data.sequence_length"
            console.print(f"{one.gpus:,} GPUs: does not fit; try {way}", highlight=False, soft_wrap=True)
        entry["hurry"] = hurry(config, shape, one.gpus, gpu, assumed)
        if entry["hurry"]:
            line = f"communication is the bottleneck and there is free memory; try {entry['hurry']}"
            console.print(f"{one.gpus:,} GPUs: {line}", highlight=False)
        if args.trace:
            shard = one.gpus // config.parallel.replicate
            by_rank = muon_traffic(shape, shard)
            busiest = by_rank.index(max(by_rank))  # the plan is for this rank; without Muon all ranks send equally much
            entry["traced_micro_step"] = traced_traffic(config, shape, one.gpus, busiest)
            planned_step = traffic(shape, config, one.gpus, shard, 1)
            for kind, sent in entry["traced_micro_step"].items():
                planned = planned_step[kind]
                console.print(
                    f"{one.gpus:,} GPUs: one micro-step sends {sent:,} bytes by {kind}, the plan has {planned:,.0f} "
                    f"({planned / sent - 1:+.2%})",
                    highlight=False,
                )
    if args.json:
        result = {
            "gpu": args.gpu,
            "assumed": asdict(assumed),
            "model": asdict(shape),
            "plans": report,
            "refused": refused,
        }
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
