"""The benchmarks of gpu_check.py. They are parts like those of gpu_parts.py."""

import gc

import numpy as np
import torch
from allocator import compare_with_plan
from gpu_parts import Place, Report, example, the_world
from meter import (
    BUDGET,
    COMPILE,
    RECOMPUTE,
    against,
    changed,
    compare_settings,
    in_turns,
    new_model,
    passes,
    peak_bytes,
    product_ceiling,
    random_batch,
    summary,
)
from step import compare_heads

from mdmtrain.config import Config
from mdmtrain.cost import step_flops
from mdmtrain.diffusion.objective import row_losses
from mdmtrain.model.presets import ModelShape, model_shape
from mdmtrain.optim import build_optimizer, optimizer_step
from mdmtrain.parallel.world import World


def bench_170m(report: Report, place: Place) -> None:
    """Time and memory of a step at 170M compared with the plan, and the effect of each setting."""
    config, shape, world = benchmark(report, place, "170m")
    report.note(recompute=compare_settings(config, shape, world, RECOMPUTE, place.repeat))
    free()
    report.note(budget=compare_settings(config, shape, world, BUDGET, place.repeat))
    free()
    report.note(heads=compare_heads(config, shape, world, place.repeat))
    free()
    documents(report, config, shape, world, place.repeat)


def bench_1b(report: Report, place: Place) -> None:
    """Time and memory of a step at 1B compared with the plan."""
    benchmark(report, place, "1b")


def benchmark(report: Report, place: Place, name: str) -> tuple[Config, ModelShape, World]:
    """Measure peak memory compared with the plan, compiled and eager mode, and the whole step in the faster mode."""
    world = the_world()
    config = example(place, name)
    shape = model_shape(config.model, 0)
    both = compare_with_plan(config, shape, world)
    report.note(memory_planned_and_measured=both)
    expected, most = both["peak"]
    ratio = most / expected
    # Above 1.1 the measured memory exceeds the plan's reserve. Below 0.75 the plan rejects runs that would fit.
    report.check("memory", 0.75 < ratio < 1.1, f"{most / 2**30:.2f} GiB, {ratio:.3f} of the plan")
    free()
    compared = compare_settings(config, shape, world, COMPILE, place.repeat)
    report.note(compile=compared)
    free()
    faster = compared["compiled"]["seconds"] < compared["eager"]["seconds"]
    whole_step(report, changed(config, "parallel", compile=faster), shape, world, place.repeat)
    free()
    return config, shape, world


def whole_step(report: Report, config: Config, shape: ModelShape, world: World, repeat: int) -> None:
    model = new_model(config, shape, world)
    optimizer = build_optimizer(model, config.optim)
    batch = random_batch(config, shape).to(world.device)
    tokens = batch.noisy.numel()

    def step() -> None:
        loss = row_losses(model(batch.noisy, batch.positions, batch.targets), batch).sum() / tokens
        loss.backward()
        optimizer_step(optimizer, loss.isfinite(), 1e-4, config.optim.clip_norm)

    seconds = in_turns({"step": step}, repeat, world, "step")["step"]
    ceiling = product_ceiling(world, getattr(torch, config.parallel.compute_dtype), shape, tokens)
    one = changed(config, "run", global_batch=config.run.micro_batch)
    counted, *_ = step_flops(shape, one, len(batch.positions) / tokens)
    middle = float(np.median(seconds))
    report.note(
        step={"seconds": summary(seconds), "tokens": tokens, "compiled": config.parallel.compile,
              "tokens_per_second": tokens / middle, "ceiling_flops": ceiling, "mfu": counted / middle / ceiling}
    )  # fmt: skip


def documents(report: Report, config: Config, shape: ModelShape, world: World, repeat: int) -> None:
    """Compare rows of eight documents with whole rows."""
    model = new_model(config, shape, world)
    batch = random_batch(config, shape).to(world.device)
    length = config.data.sequence_length
    segments = (torch.arange(length, device=world.device) * 8 // length).int().expand(batch.noisy.shape).contiguous()
    works = {"whole rows": passes(model, batch), "documents": passes(model, batch, segments)}
    for work in works.values():
        work()  # compile and fill caches
    peaks = {name: peak_bytes(work, world.device) for name, work in works.items()}
    report.note(documents=against("whole rows", in_turns(works, repeat, world, "documents"), peaks))


def free() -> None:
    """Free the memory of deleted models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
