"""Measure the cost of variance reduction in a step, and how evenly it distributes the work: two parts of step.py.

`machinery` in `measure_machinery` repeats the step of `take_steps` in mdmtrain/train.py, because the step is written
inline there and needs a whole run. It must make the same calls, except for those in LEFT_OUT. tests/test_bench.py
compares the two.
"""

import numpy as np
import torch
from meter import in_turns, new_model, random_batch, summary
from rich.progress import track
from torch import Tensor

from mdmtrain.config import Config, DiffusionConfig, resolve
from mdmtrain.diffusion import masks, noise
from mdmtrain.diffusion.objective import plain_process, row_losses, row_statistics
from mdmtrain.diffusion.sampler import RateSampler
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import masked_cross_entropy
from mdmtrain.monitor.recorder import StepRecorder
from mdmtrain.optim import build_optimizer, optimizer_step
from mdmtrain.parallel.world import World

# The calls of the loop's step that are left out here, by reason.
LEFT_OUT = {
    "the plain step has them too": ("learning_rate", "model.set_requires_all_reduce", "state.average.update"),
    "the batch is given": ("batch.eligible.sum", "batch.slots.numpy", "int", "process.corrupt", "recorder.wait_for"),
    "called by `cross_entropy`": ("masked_cross_entropy",),
    "the fit is measured by itself": ("sampler.due", "sampler.use", "world.agree"),
    "measured at the interval of the probe only": ("due_after", "pair.compare", "pair.keep", "recorder.add_pair"),
    "of the run, not of the step": ("gc.collect", "profiler.before", "watch.at"),
}
SIMULATED_RANKS = 64
SIMULATED_BATCH = 1280
SIMULATED_STEPS = 20
SIMULATED_ROWS = 4


def measure_machinery(config: Config, shape: ModelShape, world: World, repeat: int) -> dict:
    """The cost of variance reduction: a step with P-POTS and global strata compared with a plain step.

    The plain step has `strata: none` and the uniform sampler. Both steps use the same masked rows. `share` is the time
    of the machinery alone (its draws, statistics, sums and records, and its share of a fit) divided by that of the
    plain step. `time_ratio` is the time of the whole step divided by that of the plain step. On a CPU, processor time
    is measured, so that other programs do not count.
    """
    plain_choice = {"strata": "none", "sampler": "uniform"}
    full_choice = {"strata": "global", "sampler": "ppots"}
    config = config.model_copy(update={"diffusion": config.diffusion.model_copy(update=full_choice)})
    plan = resolve(config, world.size)
    slots = config.run.global_batch
    model = new_model(config, shape, world)
    optimizer = build_optimizer(model, config.optim)
    sampler = RateSampler(config.diffusion, world.device)
    recorder = StepRecorder(config, plan, world.device, world.rank)
    reference = plain_process(config.diffusion.model_copy(update=plain_choice))
    batch = random_batch(config, shape).to(world.device)
    known = torch.rand(len(batch.positions), device=world.device)
    places = [np.array(plan.slots(world.rank, number)) for number in range(plan.accumulation)]
    eligible = batch.noisy.numel()
    step = 0
    one_source = torch.zeros(len(places[0]), dtype=torch.int64)  # all rows are of the first source

    def cross_entropy() -> Tensor:
        return masked_cross_entropy(model, batch, None, 1)

    def machinery(learn: bool) -> None:
        """A step as in train.py. Without `learn` it does not run the model and uses fixed cross-entropies."""
        nonlocal step
        process = sampler.process(0.0)
        draws = process.draw(config.run.seed, step, slots, world.size)
        sums = recorder.new_sums()
        for place in places:
            ce = cross_entropy() if learn else known
            losses = row_losses(ce, batch)
            if learn:
                (losses.sum() / plan.tokens_per_step).backward()
            by_row = row_statistics(ce.detach(), batch, config.diffusion.target)
            recorder.add_micro_step(
                sums, losses.detach(), by_row, process.row_cells(draws.at(place)), len(ce), eligible
            )
            recorder.add_sources(sums, losses.detach(), one_source)
        recorder.add_own(sums)
        world.sum(sums)
        norm = skipped = torch.zeros((), device=world.device)
        if learn:
            norm, skipped = optimizer_step(optimizer, sums.isfinite().all(), 1e-4, config.optim.clip_norm)
        row_counts = np.bincount(process.row_cells(draws), minlength=config.diffusion.bins)
        step += 1
        sampler.add(recorder.statistics(sums), row_counts, skipped)
        recorder.add_step(step, process, draws, row_counts, sums, norm, skipped, 1e-4)

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
    while int(sampler.tensors["hits"].min()) < config.diffusion.min_hits:  # else the fit does nothing
        machinery(learn=False)
    seconds = in_turns(works, repeat, world, "variance machinery")
    share = (seconds["machinery"] + seconds["fit"] / config.diffusion.refit_every) / seconds["plain step"]
    ratio = seconds["step"] / seconds["plain step"]
    numbers = recorder.new_sums()
    return {
        **{f"{name.replace(' ', '_')}_seconds": float(np.median(of)) for name, of in seconds.items()},
        "share": summary(share),
        "time_ratio": summary(ratio),
        "bytes_per_step": numbers.numel() * numbers.element_size(),
    }


def simulate_balance(length: int, eps: float) -> dict:
    """The most masked positions of any rank and micro-step, divided by the mean. All ranks wait for the busiest one."""
    per_rank = SIMULATED_BATCH // SIMULATED_RANKS
    result = {}
    for strata in ("global", "none"):
        process = plain_process(DiffusionConfig(eps=eps, strata=strata))
        by_rank, by_micro = [], []
        for step in track(range(SIMULATED_STEPS), f"strata {strata}"):
            drawn = process.draw(0, step, SIMULATED_BATCH)
            slots = np.arange(SIMULATED_BATCH)
            uniforms = noise.position_uniforms(0, step, slots, length)
            counts = masks.bernoulli(uniforms, drawn.rates, np.ones(uniforms.shape, dtype=bool)).sum(axis=1)
            ranks = counts.reshape(SIMULATED_RANKS, per_rank)
            by_rank.append(ranks.sum(axis=1).max() / ranks.sum(axis=1).mean())
            micro = ranks.reshape(SIMULATED_RANKS, -1, SIMULATED_ROWS).sum(axis=2)
            by_micro.append(micro.max(axis=0).mean() / micro.mean())
        result[strata] = {
            "rank_max_over_mean": float(np.mean(by_rank)),
            "micro_max_over_mean": float(np.mean(by_micro)),
        }
    return result
