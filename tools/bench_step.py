#!/usr/bin/env python3
"""What a training step costs, as ratios measured in one process, and how evenly the work is spread.

    python tools/bench_step.py CONFIG... [section.key=value ...] [--repeat N] [--json FILE]

Random tokens, the configuration's model and micro-batch. Two comparisons: the head on masked rows only against logits
for every position (whole step and head alone, time and peak memory, alternating so that a noisy machine is fair to
both), and the masked positions per rank and micro-step under global strata against independent rates (simulated).
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mdmtrain import config as configuration
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.config import Config, DiffusionConfig
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion import masks, noise
from mdmtrain.diffusion.objective import Corruption, plain_law, row_losses
from mdmtrain.model.presets import ModelShape, describe, model_shape
from mdmtrain.monitor.logs import user_errors
from mdmtrain.parallel.world import World, init_world
from mdmtrain.parallel.wrap import build_model, init_weights

SIMULATED_RANKS, SIMULATED_BATCH, SIMULATED_STEPS = 64, 1280, 20


def random_batch(config: Config, shape: ModelShape, mask_id: int) -> Corruption:
    """One corrupted micro-batch of random tokens: the first rows of step 0."""
    rows, length = config.run.micro_batch, config.data.sequence_length
    slots = np.arange(rows)
    ids = np.stack([noise.uniforms(noise.philox(1, noise.Stream.ORDER, 0, int(s)), length) for s in slots])
    ids = torch.from_numpy((ids * (shape.vocab_size - 1)).astype(np.int64))
    law = plain_law(DiffusionConfig(eps=config.diffusion.eps))
    drawn = law.draw(config.run.seed, 0, rows)
    uniforms = torch.from_numpy(noise.position_uniforms(config.run.seed, 0, slots, length))
    return law.corrupt(ids, torch.ones_like(ids, dtype=torch.bool), uniforms, drawn, mask_id)


def all_positions(batch: Corruption, clean_targets: Tensor) -> Corruption:
    """The same batch with every position through the head; those that are not masked weigh 0."""
    count = batch.noisy.numel()
    weights = torch.zeros(count, device=batch.noisy.device).index_copy(0, batch.positions, batch.weights)
    return Corruption(batch.noisy, torch.arange(count, device=batch.noisy.device), clean_targets, weights, weights)


class Meter:
    """Seconds and peak bytes of a piece of work."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self.peak = 0

    def run(self, work: Callable[[], None]) -> None:
        before = self._reset_peak()
        start = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.peak = max(self.peak, self._peak() - before)

    def _reset_peak(self) -> int:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
        return self._peak()

    def _peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if sys.platform == "linux":
            line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare_heads(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    """Time and peak memory of masked rows only against full logits, for the step and for the head alone."""
    model = build_model(shape, config.parallel, world)
    init_weights(model, config.run.seed)
    mask_id = shape.vocab_size - 1
    masked = random_batch(config, shape, mask_id)
    clean = masked.noisy.flatten().index_copy(0, masked.positions, masked.targets)
    batches = {"masked rows": masked.to(world.device), "full logits": all_positions(masked, clean).to(world.device)}
    hidden = torch.randn(masked.noisy.numel(), shape.d_model, device=world.device)
    weight = torch.randn(shape.vocab_size, shape.d_model, device=world.device, requires_grad=True)

    def step(batch: Corruption) -> None:
        row_losses(model(batch.noisy, batch.positions, batch.targets), batch).sum().backward()
        model.zero_grad()

    def head(batch: Corruption) -> None:
        rows = hidden.index_select(0, batch.positions)
        (model.head(rows, batch.targets, weight) * batch.weights).sum().backward()
        weight.grad = None

    chunks = {"masked rows": config.parallel.head_chunk, "full logits": masked.noisy.numel()}
    meters = {(what, how): Meter(world.device) for what in ("step", "head") for how in batches}
    for repetition in track(range(repeat + 1), "comparing heads"):
        for (what, how), meter in meters.items():
            model.head.chunk = chunks[how]
            meter.run(lambda work=(step if what == "step" else head), how=how: work(batches[how]))
            if repetition == 0:  # warm-up
                meter.seconds.clear()
                meter.peak = 0
    tokens = masked.noisy.numel()
    result: dict = {"micro_batch_tokens": tokens, "masked_positions": len(masked.positions)}
    for what in ("step", "head"):
        few, full = meters[what, "masked rows"], meters[what, "full logits"]
        ratios = sorted(a / b for a, b in zip(few.seconds, full.seconds, strict=True))
        result[what] = {
            "masked_seconds": statistics.median(few.seconds),
            "full_seconds": statistics.median(full.seconds),
            "time_ratio": statistics.median(ratios),
            "time_ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
            "masked_peak_bytes": few.peak,
            "full_peak_bytes": full.peak,
            "memory_ratio": few.peak / full.peak if full.peak else None,
        }
    result["step"]["tokens_per_second"] = tokens / result["step"]["masked_seconds"]
    return result


def simulate_balance(length: int, eps: float, micro_rows: int) -> dict:
    """Masked positions of the busiest rank and micro-step over the mean: the busiest one sets the pace."""
    per_rank = SIMULATED_BATCH // SIMULATED_RANKS
    result = {}
    for strata in ("global", "none"):
        law = plain_law(DiffusionConfig(eps=eps, strata=strata))
        by_rank, by_micro = [], []
        for step in track(range(SIMULATED_STEPS), f"strata {strata}"):
            drawn = law.draw(0, step, SIMULATED_BATCH)
            slots = np.arange(SIMULATED_BATCH)
            uniforms = noise.position_uniforms(0, step, slots, length)
            counts = masks.bernoulli(uniforms, drawn.rates, np.ones(uniforms.shape, dtype=bool)).sum(axis=1)
            ranks = counts.reshape(SIMULATED_RANKS, per_rank)
            by_rank.append(ranks.sum(axis=1).max() / ranks.sum(axis=1).mean())
            micro = ranks.reshape(SIMULATED_RANKS, -1, micro_rows).sum(axis=2)
            by_micro.append(micro.max(axis=0).mean() / micro.mean())
        result[strata] = {
            "rank_max_over_mean": float(np.mean(by_rank)),
            "micro_max_over_mean": float(np.mean(by_micro)),
        }
    return result


def show(shape: ModelShape, heads: dict, balance: dict, micro_rows: int) -> None:
    console = Console()
    console.print(describe(shape))
    title = f"{heads['masked_positions']} of {heads['micro_batch_tokens']} positions masked"
    table = Table(
        "forward + backward", "masked rows", "full logits", "time ratio (quartiles)", "peak memory ratio", title=title
    )
    for what in ("step", "head"):
        row = heads[what]
        low, high = row["time_ratio_quartiles"]
        memory = f"{row['masked_peak_bytes'] / 2**20:.0f} / {row['full_peak_bytes'] / 2**20:.0f} MiB"
        ratio = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f} ({memory})"
        times = f"{row['masked_seconds'] * 1e3:.1f} ms", f"{row['full_seconds'] * 1e3:.1f} ms"
        table.add_row(what, *times, f"{row['time_ratio']:.2f} ({low:.2f}..{high:.2f})", ratio)
    console.print(table)
    title = (
        f"masked positions, max over mean: {SIMULATED_RANKS} ranks, batch {SIMULATED_BATCH}, {SIMULATED_STEPS} steps"
    )
    table = Table("strata", "per rank", f"per micro-step of {micro_rows} rows", title=title)
    for strata, row in balance.items():
        table.add_row(strata, f"{row['rank_max_over_mean']:.3f}", f"{row['micro_max_over_mean']:.3f}")
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="+", metavar="CONFIG | section.key=value")
    parser.add_argument("--repeat", type=int, default=15, help="measurements of each (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(arguments)
    config = configuration.load(args.config)
    tokenizer_size = config.model.vocab_size or Tokenizer.load(config.data.sources[0].path).vocab_size
    shape = model_shape(config.model, tokenizer_size)
    world = init_world()
    heads = compare_heads(config, shape, world, args.repeat)
    micro_rows = 4
    balance = simulate_balance(config.data.sequence_length, config.diffusion.eps, micro_rows)
    if world.is_main:
        show(shape, heads, balance, micro_rows)
        if args.json:
            result = {"torch": torch.__version__, "device": str(world.device), "heads": heads, "balance": balance}
            write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
