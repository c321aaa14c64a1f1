"""Tools for the measurements of step.py and gpu_check.py: times, ratios, memory peaks, speed of matrix products.

Pieces of work that are compared run alternately in one process, so that changes of the machine's speed affect all of
them. A ratio is computed in each round; the result is the median over rounds, with quartiles.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from allocator import allocations
from rich.progress import track
from torch import Tensor
from torch.utils.benchmark import Timer

from mdmtrain.config import Config, DiffusionConfig
from mdmtrain.diffusion import noise
from mdmtrain.diffusion.objective import MaskedBatch, plain_process, row_losses
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer, initial_std
from mdmtrain.optim import local
from mdmtrain.parallel.parallelize import build_model
from mdmtrain.parallel.world import World

# Settings of `parallel`. Each is compared with the first one of its group.
RECOMPUTE = {
    "none": {"activation_checkpointing": "none", "compile": False},
    "selective": {"activation_checkpointing": "selective", "compile": False},
    "ops": {"activation_checkpointing": "ops", "compile": False},
    "full": {"activation_checkpointing": "full", "compile": False},
}
EAGER = {"eager": RECOMPUTE["none"]}
COMPILE = {**EAGER, "compiled": {"activation_checkpointing": "none", "compile": True}}
# A separate group, because the compiler's cache does not distinguish graphs with different budgets.
BUDGET = {**EAGER, "compiled, budget": {"activation_checkpointing": "budget", "compile": True}}
CHUNKS = {
    "one chunk": {"head_chunk": 1 << 20, "fused_head": False},
    "chunks of 256": {"head_chunk": 256, "fused_head": False},
}
if hasattr(torch.nn.functional, "linear_cross_entropy"):
    CHUNKS["fused, chunks of 256"] = {"head_chunk": 256, "fused_head": True}
Work = Callable[[], None]


def changed(config: Config, section: str, **values) -> Config:
    """A copy of the configuration with changed values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


# ---- time


def clock_of(world: World) -> Callable[[], float]:
    """The clock for measurements.

    For one process on a CPU it is processor time, so that other programs do not count. Otherwise it is wall-clock time,
    which includes waiting for collectives and GPUs.
    """
    return time.process_time if world.device.type == "cpu" and world.size == 1 else time.perf_counter


def in_turns(works: dict[str, Work], repeat: int, world: World, title: str) -> dict[str, np.ndarray]:
    """Seconds of each work, float64 [repeat]. A first round, which compiles and fills caches, is not counted."""
    clock = clock_of(world)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in track(range(repeat + 1), title, disable=not world.is_main):
        for name, work in works.items():
            start = wait_for(world.device, clock)
            work()
            seconds[name].append(wait_for(world.device, clock) - start)
    return {name: np.array(measured[1:]) for name, measured in seconds.items()}


def wait_for(device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock()


def summary(values: np.ndarray) -> dict:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "quartiles": [low, high]}


def against(base: str, seconds: dict[str, np.ndarray], peaks: dict[str, int]) -> dict:
    """Time and peak memory of each work, and their ratios to those of `base`."""
    return {
        name: {
            "seconds": float(np.median(seconds[name])),
            "time_ratio": summary(seconds[name] / seconds[base]),
            "peak_bytes": peaks[name],
            "memory_ratio": peaks[name] / peaks[base],
        }
        for name in seconds
    }


def product_ceiling(world: World, dtype: torch.dtype, shape: ModelShape, tokens: int) -> float:
    """The FLOP/s of matrix products on this device: the best of the model's feed-forward product and a large square."""
    device = world.device
    square = 8192 if device.type == "cuda" else 1024
    clock = partial(wait_for, device, clock_of(world))
    best = 0.0
    for n, m, k in ((tokens, shape.d_ff, shape.d_model), (square, square, square)):
        factors = {
            "left": torch.randn(n, m, device=device, dtype=dtype),
            "right": torch.randn(m, k, device=device, dtype=dtype),
        }
        timer = Timer("left @ right", timer=clock, globals=factors, num_threads=torch.get_num_threads())
        fastest = min(timer.blocked_autorange(min_run_time=0.5).times)
        best = max(best, 2 * n * m * k / fastest)
    return best


# ---- memory


def peak_bytes(work: Work, device: torch.device) -> int:
    """The peak bytes that a work allocates in addition to those in use before it, according to the allocator."""
    with allocations(device) as (mark, spans):
        mark("work")
        work()
        mark("end")
    return spans["work"][1]


# ---- work


def random_batch(config: Config, shape: ModelShape) -> MaskedBatch:
    """A masked micro-batch of random tokens, with the noise of the first rows of step 0. The last token is the mask."""
    rows = config.run.micro_batch
    length = config.data.sequence_length
    slots = np.arange(rows)
    ids = np.stack([noise.uniforms(noise.philox(1, noise.Stream.ORDER, 0, int(s)), length) for s in slots])
    ids = torch.from_numpy((ids * (shape.vocab_size - 1)).astype(np.int64))
    process = plain_process(DiffusionConfig(eps=config.diffusion.eps))
    drawn = process.draw(config.run.seed, 0, rows)
    uniforms = torch.from_numpy(noise.position_uniforms(config.run.seed, 0, slots, length))
    return process.corrupt(ids, torch.ones_like(ids, dtype=torch.bool), uniforms, drawn, shape.vocab_size - 1)


def all_positions(batch: MaskedBatch) -> MaskedBatch:
    """The same batch with all positions in the head. Positions that are not masked have weight 0."""
    count = batch.noisy.numel()
    device = batch.noisy.device
    weights = torch.zeros(count, device=device).index_copy(0, batch.positions, batch.weights)
    targets = batch.noisy.flatten().index_copy(0, batch.positions, batch.targets)
    return MaskedBatch(batch.noisy, torch.arange(count, device=device), targets, weights, weights)


@torch.no_grad()
def new_model(config: Config, shape: ModelShape, world: World) -> Transformer:
    """A model with equal initial weights each time, drawn on the device (init_weights would take minutes at 1B)."""
    model = build_model(shape, config.parallel, world)
    torch.manual_seed(config.run.seed)
    for name, parameter in model.named_parameters():
        std = initial_std(name, shape)
        local(parameter).fill_(1.0) if std is None else local(parameter).normal_(0.0, std)
    return model


def passes(model: Transformer, batch: MaskedBatch, segments: Tensor | None = None) -> Work:
    """A work: forward and backward pass of a micro-batch. The gradients are discarded."""

    def work() -> None:
        row_losses(model(batch.noisy, batch.positions, batch.targets, segments), batch).sum().backward()
        model.zero_grad()

    return work


def compare_settings(config: Config, shape: ModelShape, world: World, settings: dict[str, dict], repeat: int) -> dict:
    """Compare forward and backward pass under each {name: settings of `parallel`} with the first one.

    All models are in memory at the same time, without optimizers. `first_seconds` includes compilation.
    """
    torch.compiler.reset()
    batch = random_batch(config, shape).to(world.device)
    works = {}
    first = {}
    for name, values in settings.items():
        works[name] = passes(new_model(changed(config, "parallel", **values), shape, world), batch)
        start = time.perf_counter()
        works[name]()
        first[name] = wait_for(world.device, time.perf_counter) - start
    peaks = {name: peak_bytes(work, world.device) for name, work in works.items()}
    compared = against(next(iter(settings)), in_turns(works, repeat, world, "in turns"), peaks)
    return {name: {**row, "first_seconds": first[name]} for name, row in compared.items()}
