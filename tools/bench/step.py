#!/usr/bin/env python3
"""Measure the cost of a training step and the effect of each setting, as ratios within one process.

    python tools/bench/step.py CONFIG... [section.key=value ...] [--only PART,...] [--repeat N] [--json FILE]
    torchrun --nproc-per-node 2 tools/bench/step.py ...

The model and the micro-batch are those of the configuration, the tokens are random. Pieces of work that are compared
run alternately. The parts:

    heads      the head on masked positions only, compared with logits for all positions: whole step, and head alone
    recompute  forward and backward pass with each mode of activation checkpointing, compared with none
    compile    compiled blocks, compared with eager ones
    chunks     the head in chunks, and torch's fused linear cross-entropy, compared with one chunk, in float32
    memory     the prediction of mdmtrain/cost.py, compared with the allocator's numbers, by kind and mode
    loop       steps of the real training loop on the prepared data: time by part, tokens/s, MFU relative to the matrix
               products of this process, and the overhead in addition to the model and the optimizer
    optimizer  the optimizer's step alone, Muon compared with AdamW, and all memory that a rank needs for it
    machinery  a step with variance reduction, compared with one without
    balance    masked positions per rank and micro-step with global strata, compared with independent rates (simulated)

With one process on a CPU, processor time is measured, so that other programs do not count. Memory peaks come from the
allocator.
"""

import json
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from allocator import compare_with_plan
from loop_watch import MODEL, watch
from machinery import (
    SIMULATED_BATCH,
    SIMULATED_RANKS,
    SIMULATED_ROWS,
    SIMULATED_STEPS,
    measure_machinery,
    simulate_balance,
)
from meter import (
    BUDGET,
    CHUNKS,
    COMPILE,
    RECOMPUTE,
    against,
    all_positions,
    changed,
    clock_of,
    compare_settings,
    in_turns,
    new_model,
    passes,
    peak_bytes,
    product_ceiling,
    random_batch,
    summary,
)
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from mdmtrain import config as configuration
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.config import Config, resolve
from mdmtrain.cost import Assumptions, mean_masked, shape_of, step_flops
from mdmtrain.diffusion.objective import MaskedBatch, row_losses
from mdmtrain.model.presets import ModelShape, describe_shape
from mdmtrain.optim import build_optimizer, local
from mdmtrain.parallel.world import World, init_world

WARM_UP = 5  # first steps of the loop, which are not measured


# ---- measurements


def compare_heads(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    """Compare the head on masked positions with full logits (in one chunk, as is usual elsewhere)."""
    model = new_model(config, shape, world)
    masked = random_batch(config, shape)
    batches = {"masked rows": masked.to(world.device), "full logits": all_positions(masked).to(world.device)}
    chunks = {"masked rows": config.parallel.head_chunk, "full logits": masked.noisy.numel()}
    hidden = torch.randn(masked.noisy.numel(), shape.d_model, device=world.device)
    weight = torch.randn(shape.vocab_size, shape.d_model, device=world.device, requires_grad=True)

    def head_alone(batch: MaskedBatch) -> None:
        rows = hidden.index_select(0, batch.positions)
        (model.head(rows, batch.targets, weight) * batch.weights).sum().backward()
        weight.grad = None

    def chunked(name: str, work: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            model.head.chunk = chunks[name]
            work()

        return call

    result: dict = {"micro_batch_tokens": masked.noisy.numel(), "masked_positions": len(masked.positions)}
    for what in ("step", "head"):
        works = {
            name: chunked(name, passes(model, batch) if what == "step" else partial(head_alone, batch))
            for name, batch in batches.items()
        }
        for work in works.values():
            work()
        peaks = {name: peak_bytes(work, world.device) for name, work in works.items()}
        result[what] = against("full logits", in_turns(works, repeat, world, f"{what}: heads"), peaks)
    return result


def compare_recompute(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    return compare_settings(config, shape, world, RECOMPUTE, repeat)


def compare_compile(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    plain, budget = (compare_settings(config, shape, world, settings, repeat) for settings in (COMPILE, BUDGET))
    return budget | plain


def compare_chunks(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    return compare_settings(changed(config, "parallel", compute_dtype="float32"), shape, world, CHUNKS, repeat)


def compare_memory(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    """{mode: {kind: (planned, measured)}} in bytes on rank 0. Only "peak" includes the states."""
    modes = {mode: changed(config, "parallel", **settings) for mode, settings in RECOMPUTE.items()}
    return {mode: compare_with_plan(one, shape, world) for mode, one in modes.items()}


def compare_optimizers(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    """Compare the optimizers' steps, on fixed gradients.

    Memory includes parameters, gradients, state and the additional peak of the step.
    """
    batch = random_batch(config, shape).to(world.device)
    works = {}
    peaks = {}
    for name in ("adamw", "muon"):
        model = new_model(config, shape, world)
        optimizer = build_optimizer(model, config.optim.model_copy(update={"name": name, "muon_lr": None}))
        row_losses(model(batch.noisy, batch.positions, batch.targets), batch).sum().backward()
        optimizer.found_inf = torch.zeros((), device=local(next(model.parameters())).device)
        works[name] = optimizer.step
        optimizer.step()
        held = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
        peaks[name] = sum(local(tensor).nbytes for tensor in held) + peak_bytes(optimizer.step, world.device)
    works["micro-step"] = passes(new_model(config, shape, world), batch)
    seconds = in_turns(works, repeat, world, "optimizers")
    micro_step = seconds.pop("micro-step")
    compared = against("adamw", seconds, peaks)
    return {name: {**row, "of_a_micro_step": summary(seconds[name] / micro_step)} for name, row in compared.items()}


def watch_loop(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    """Times of the training loop on rank 0: max(2 * log_every, repeat) steps after WARM_UP steps."""
    steps = WARM_UP + max(2 * config.monitor.log_every, repeat)
    folder = world.agree(lambda: tempfile.mkdtemp(prefix="mdmtrain-bench-"), main_only=True)
    one = changed(config, "run", dir=folder, steps=steps + 1)
    one = changed(one, "optim", warmup_steps=0)
    seconds = watch(one, world, clock_of(world)).seconds(WARM_UP)
    plan = resolve(one, world.size)
    total = np.sum(list(seconds.values()), axis=0)
    model = np.sum([seconds[part] for part in MODEL], axis=0)
    dtype = getattr(torch, config.parallel.compute_dtype)
    tokens = config.run.micro_batch * config.data.sequence_length
    ceiling = product_ceiling(world, dtype, shape, tokens)
    counted, *_ = step_flops(shape, one, mean_masked(one, Assumptions()))
    step = float(np.median(total))
    return {
        "steps": len(total),
        "step_seconds": summary(total),
        "tokens_per_second": plan.tokens_per_step / step,
        "ceiling_flops": ceiling,
        "mfu": counted / world.size / step / ceiling,
        "parts": {part: {"seconds": float(values.mean()), "share": summary(values / total)}
                  for part, values in seconds.items()},
        "overhead": float(1 - model.sum() / total.sum()),
        "overhead_by_step": summary(1 - model / total),
        "communication": measure_communication(config, shape, world),
    }  # fmt: skip


def measure_communication(config: Config, shape: ModelShape, world: World) -> dict | None:
    """The seconds of a micro-step in which a collective is in progress on this rank, and their share. None: one rank.

    Measured with a profiler in separate steps. The seconds include waiting for slower ranks, and collectives that
    overlap with computation.
    """
    if world.size == 1:
        return None
    work = passes(new_model(config, shape, world), random_batch(config, shape).to(world.device))
    work()
    cuda = world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            work()
        if cuda:
            torch.cuda.synchronize()
    events = [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in profiler.profiler.kineto_results.events()
    ]
    word = "nccl" if cuda else "gloo:"
    covered = 0
    until = 0
    for start, end, name in sorted(events):
        if word in name.lower():
            covered += max(0, end - max(start, until))
            until = max(until, end)
    whole = max(end for _, end, _ in events) - min(start for start, _, _ in events)
    return {"seconds": covered / 3e9, "share": covered / whole}


# ---- output


def ratio(of: dict) -> str:
    low, high = of["quartiles"]
    return f"{of['median']:.3f} ({low:.3f}..{high:.3f})"


def comparison(title: str, rows: dict[str, dict]) -> Table:
    table = Table("", "time", "ratio (quartiles)", "peak", "ratio", "first", title=title)
    for name, row in rows.items():
        first = f"{row['first_seconds']:.1f} s" if "first_seconds" in row else ""
        peak = f"{row['peak_bytes'] / 2**20:,.1f} MiB"
        table.add_row(name, f"{row['seconds'] * 1e3:,.1f} ms", ratio(row["time_ratio"]), peak,
                      f"{row['memory_ratio']:.3f}", first)  # fmt: skip
    return table


def show_heads(console: Console, heads: dict) -> None:
    masked = f"{heads['masked_positions']} of {heads['micro_batch_tokens']} positions masked"
    console.print(comparison(f"step (forward + backward), {masked}", heads["step"]))
    console.print(comparison(f"head alone, {masked}", heads["head"]))


def show_memory(console: Console, compared: dict) -> None:
    kinds = list(next(iter(compared.values())))
    table = Table("planned / measured, MiB", *kinds, title="memory of a rank (at work: without the states)")
    for mode, row in compared.items():
        cells = [f"{p / 2**20:,.2f} / {m / 2**20:,.2f}" + (f" = {p / m:.3f}" if p else "") for p, m in row.values()]
        table.add_row(mode, *cells)
    console.print(table)


def show_optimizers(console: Console, rows: dict) -> None:
    console.print(comparison("the optimizer's step, and all memory that it needs", rows))
    for name, row in rows.items():
        console.print(f"{name}: {ratio(row['of_a_micro_step'])} of the forward and backward pass of one micro-batch")


def show_loop(console: Console, loop: dict) -> None:
    table = Table(
        "part", "ms per step", "share (quartiles of steps)", title=f"{loop['steps']} steps of the training loop"
    )
    for part, row in loop["parts"].items():
        table.add_row(part, f"{row['seconds'] * 1e3:,.2f}", ratio(row["share"]))
    console.print(table)
    console.print(
        f"step {ratio(loop['step_seconds'])} s, {loop['tokens_per_second']:,.0f} tokens/s, MFU {loop['mfu']:.1%} of "
        f"the {loop['ceiling_flops'] / 1e12:,.3g} TFLOP/s of matrix products on this device, overhead in addition to "
        f"model and optimizer {loop['overhead']:.2%} (by step {ratio(loop['overhead_by_step'])})",
        highlight=False,
    )
    if loop["communication"]:
        share = loop["communication"]["share"]
        seconds = loop["communication"]["seconds"]
        console.print(f"collectives are in progress for {seconds * 1e3:,.1f} ms of a micro-step ({share:.1%})")


def show_machinery(console: Console, machinery: dict) -> None:
    title = "variance reduction (P-POTS, global strata) compared with strata none and uniform rates"
    table = Table("step without", "machinery", "share (quartiles)", "step with / without", "all-reduced", title=title)
    table.add_row(
        f"{machinery['plain_step_seconds'] * 1e3:.1f} ms",
        f"{machinery['machinery_seconds'] * 1e3:.2f} ms + fit {machinery['fit_seconds'] * 1e3:.2f} ms per fit",
        ratio({key: np.array(value) * 100 for key, value in machinery["share"].items()}) + " %",
        ratio(machinery["time_ratio"]),
        f"{machinery['bytes_per_step']:,} bytes per step",
    )
    console.print(table)


def show_balance(console: Console, balance: dict) -> None:
    title = (
        f"masked positions, max over mean: {SIMULATED_RANKS} ranks, batch {SIMULATED_BATCH}, {SIMULATED_STEPS} steps"
    )
    table = Table("strata", "per rank", f"per micro-step of {SIMULATED_ROWS} rows", title=title)
    for strata, row in balance.items():
        table.add_row(strata, f"{row['rank_max_over_mean']:.3f}", f"{row['micro_max_over_mean']:.3f}")
    console.print(table)


PARTS: dict[str, tuple[Callable[..., dict], Callable[[Console, dict], None]]] = {
    "heads": (compare_heads, show_heads),
    "recompute": (
        compare_recompute,
        lambda console, rows: console.print(comparison("activation checkpointing compared with none", rows)),
    ),
    "compile": (compare_compile, lambda console, rows: console.print(comparison("compiled compared with eager", rows))),
    "chunks": (compare_chunks, lambda console, rows: console.print(comparison("compared with one chunk", rows))),
    "memory": (compare_memory, show_memory),
    "loop": (watch_loop, show_loop),
    "optimizer": (compare_optimizers, show_optimizers),
    "machinery": (measure_machinery, show_machinery),
    "balance": (
        lambda config, *_: simulate_balance(config.data.sequence_length, config.diffusion.eps),
        show_balance,
    ),
}


def part_names(argument: str) -> list[str]:
    names = argument.split(",")
    if not set(names) <= set(PARTS):
        raise ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {argument}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="+", metavar="CONFIG | section.key=value", help="as in mdmtrain.train")
    parser.add_argument("--only", type=part_names, default=list(PARTS), metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--repeat", type=int, default=15, help="measurements of each work (default: 15)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_intermixed_args(arguments)
    if args.repeat < 1:
        raise ValueError(f"--repeat {args.repeat}: must be at least 1")
    config = configuration.load(args.config)
    shape = shape_of(config)
    world = init_world()
    console = Console(width=130)
    result: dict[str, Any] = {"torch": torch.__version__, "device": str(world.device), "ranks": world.size,
              "clock": clock_of(world).__name__}  # fmt: skip
    if world.is_main:
        console.print(describe_shape(shape), highlight=False)
    for name in args.only:
        measure, show = PARTS[name]
        result[name] = measure(config, shape, world, args.repeat)
        if world.is_main:
            show(console, result[name])
    if world.is_main and args.json:
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
