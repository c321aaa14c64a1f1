#!/usr/bin/env python3
"""What a training step costs, as ratios measured in one process, and how evenly the work is spread.

    python tools/bench_step.py CONFIG... [section.key=value ...] [--repeat N] [--json FILE]

Random tokens, the configuration's model and micro-batch. Three comparisons: the head on masked rows only against logits
for every position (whole step and head alone, time and peak memory, alternating so that a noisy machine is fair to
both); a step with the variance machinery against one without; and the masked positions per rank and micro-step under
global strata against independent rates (simulated).
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
from mdmtrain.config import Config, DiffusionConfig, resolve
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion import masks, noise
from mdmtrain.diffusion.objective import Corruption, plain_law, row_losses, row_statistics
from mdmtrain.diffusion.sampler import RateSampler
from mdmtrain.model.presets import ModelShape, describe, model_shape
from mdmtrain.model.transformer import masked_cross_entropy
from mdmtrain.monitor.logs import user_errors
from mdmtrain.monitor.recorder import StepRecorder
from mdmtrain.optim import build_optimizer, optimizer_step
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

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.cuda, self.clock = device.type == "cuda", clock
        self.seconds: list[float] = []
        self.peak = 0

    def run(self, work: Callable[[], None]) -> None:
        before = self._reset_peak()
        start = self.clock()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(self.clock() - start)
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


def measure_machinery(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    """What coordinated variance reduction adds to a step: P-POTS under global strata against `strata: none`, uniform.

    Both steps pass the same masked rows through the model. `share` is the machinery by itself (its draws, statistics,
    sums and records, and its part of a fit) over the plain step; `time_ratio` is one whole step over the other. On a
    CPU, processor time counts: what other programs take does not.
    """
    plain_choice, full_choice = {"strata": "none", "sampler": "uniform"}, {"strata": "global", "sampler": "ppots"}
    config = config.model_copy(update={"diffusion": config.diffusion.model_copy(update=full_choice)})
    plan, slots = resolve(config, world.size), config.run.global_batch
    model = build_model(shape, config.parallel, world)
    init_weights(model, config.run.seed)
    optimizer = build_optimizer(model, config.optim)
    sampler = RateSampler(config.diffusion, world.device)
    recorder = StepRecorder(config, plan, world.device, world.rank)
    reference = plain_law(config.diffusion.model_copy(update=plain_choice))
    batch = random_batch(config, shape, shape.vocab_size - 1).to(world.device)
    known = torch.rand(len(batch.positions), device=world.device)
    places = [np.array(plan.slots(world.rank, number)) for number in range(plan.accumulation)]
    eligible, step = batch.noisy.numel(), 0

    def cross_entropy() -> Tensor:
        return masked_cross_entropy(model, batch, None, 1)

    def machinery(learn: bool) -> None:
        """As in train.py; without `learn` the model stands still and its cross-entropies are known."""
        nonlocal step
        law = sampler.law(0.0)
        draws = law.draw(config.run.seed, step, slots, world.size)
        sums = recorder.new_sums()
        for place in places:
            ce = cross_entropy() if learn else known
            losses = row_losses(ce, batch)
            if learn:
                (losses.sum() / plan.tokens_per_step).backward()
            by_row = row_statistics(ce.detach(), batch, config.diffusion.target)
            recorder.add_micro_step(sums, losses.detach(), by_row, law.row_cells(draws.at(place)), len(ce), eligible)
        world.sum(sums)
        norm = skipped = torch.zeros((), device=world.device)
        if learn:
            norm, skipped = optimizer_step(optimizer, sums.isfinite().all(), 1e-4, config.optim.clip_norm)
        row_counts = np.bincount(law.row_cells(draws), minlength=config.diffusion.bins)
        step += 1
        sampler.add(recorder.statistics(sums), row_counts, skipped)
        recorder.add_step(step, law, draws, row_counts, sums, norm, skipped, 1e-4)

    def plain() -> None:
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        draws = reference.draw(config.run.seed, step, slots, world.size)
        for place in places:
            draws.at(place)
            losses = row_losses(cross_entropy(), batch)
            (losses.sum() / plan.tokens_per_step).backward()
            total += losses.detach().sum()
        world.sum(total)
        optimizer_step(optimizer, total.isfinite(), 1e-4, config.optim.clip_norm)

    works = {
        "plain step": plain,
        "step": lambda: machinery(learn=True),
        "machinery": lambda: machinery(learn=False),
        "fit": lambda: sampler.use(world.agree(sampler.fitted, main_only=True)),
    }
    while int(sampler.tensors["hits"].min()) < config.diffusion.min_hits:  # else there is nothing to fit
        machinery(learn=False)
    clock = time.process_time if world.device.type == "cpu" else time.perf_counter
    meters = {name: Meter(world.device, clock) for name in works}
    for repetition in track(range(repeat + 1), "variance machinery"):
        for name, meter in meters.items():
            meter.run(works[name])
            if repetition == 0:  # warm-up
                meter.seconds.clear()
    seconds = {name: np.array(meter.seconds) for name, meter in meters.items()}
    share = (seconds["machinery"] + seconds["fit"] / config.diffusion.refit_every) / seconds["plain step"]
    ratio, numbers = seconds["step"] / seconds["plain step"], recorder.new_sums()
    return {
        **{f"{name.replace(' ', '_')}_seconds": float(np.median(of)) for name, of in seconds.items()},
        "share": float(np.median(share)),
        "share_quartiles": np.quantile(share, [0.25, 0.75]).tolist(),
        "time_ratio": float(np.median(ratio)),
        "time_ratio_quartiles": np.quantile(ratio, [0.25, 0.75]).tolist(),
        "bytes_per_step": numbers.numel() * numbers.element_size(),
    }


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


def show(shape: ModelShape, heads: dict, machinery: dict, balance: dict, micro_rows: int) -> None:
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
    low, high = machinery["share_quartiles"]
    title = "variance machinery (P-POTS, global strata) against strata none, uniform"
    table = Table("step without", "machinery", "share (quartiles)", "step with / without", "all-reduced", title=title)
    slower, slowest = machinery["time_ratio_quartiles"]
    table.add_row(
        f"{machinery['plain_step_seconds'] * 1e3:.1f} ms",
        f"{machinery['machinery_seconds'] * 1e3:.2f} ms + fit {machinery['fit_seconds'] * 1e3:.2f} ms at times",
        f"{machinery['share']:.2%} ({low:.2%}..{high:.2%})",
        f"{machinery['time_ratio']:.3f} ({slower:.3f}..{slowest:.3f})",
        f"{machinery['bytes_per_step']:,} bytes a step",
    )
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
    machinery = measure_machinery(config, shape, world, args.repeat)
    micro_rows = 4
    balance = simulate_balance(config.data.sequence_length, config.diffusion.eps, micro_rows)
    if world.is_main:
        show(shape, heads, machinery, balance, micro_rows)
        if args.json:
            parts = {"heads": heads, "machinery": machinery, "balance": balance}
            result = {"torch": torch.__version__, "device": str(world.device), **parts}
            write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
