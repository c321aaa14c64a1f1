"""The fastest way to run a configuration on given GPUs: cost.py prices every arrangement; those that fit are sorted.

An arrangement is the size of a forward pass, what is recomputed, and how the model is spread over ranks. It changes
speed and memory, and not the training. The global batch is part of the training: it changes only if it does not divide
over the GPUs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mdmtrain.config import Config
from mdmtrain.cost import Assumptions, Cost, Gpu, cost
from mdmtrain.model.presets import ModelShape

RECOMPUTE = ("none", "selective", "ops", "full")


@dataclass(frozen=True)
class Found:
    """One arrangement that fits, and its cost."""

    config: Config
    cost: Cost
    overlay: dict[str, dict]  # what to lay over the configuration that was asked about

    @property
    def words(self) -> str:
        """The overlay as arguments of a command line."""
        parts = [(f"{section}.{key}", value) for section, keys in self.overlay.items() for key, value in keys.items()]
        return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in parts)


def divisible_batch(config: Config, gpus: int) -> tuple[Config, str | None]:
    """The configuration with a global batch that divides over the GPUs, and why it changed; None if it did not have to.

    The batch becomes the nearest multiple. The number of steps changes with it, so that the run has as many tokens.
    """
    run, unit = config.run, gpus * config.diffusion.rows_per_slot
    if run.global_batch % unit == 0:
        return config, None
    batch = max(1, round(run.global_batch / unit)) * unit
    steps = max(1, round(run.steps * run.global_batch / batch))
    new = config.model_copy(update={"run": run.model_copy(update={"global_batch": batch, "steps": steps})})
    return new, (
        f"run.global_batch={run.global_batch} does not divide over {gpus:,} GPUs, it must be a multiple of {unit}: "
        f"changed to {batch}, and run.steps from {run.steps} to {steps}, so that the run has as many tokens. "
        "This changes the training: optim.lr and optim.warmup_steps were chosen for the old batch"
    )


def arrangements(config: Config, gpus: int) -> Iterator[Config]:
    """Every arrangement that is searched; the batch divides over the GPUs."""
    views, length = config.diffusion.rows_per_slot, config.data.sequence_length
    rows = config.run.global_batch // gpus
    micros = [micro for micro in range(views, rows + 1, views) if rows % micro == 0]
    replicas = [copies for copies in range(1, gpus + 1) if gpus % copies == 0]
    both = (False, True)
    for micro, recompute, copies, reshard, compiled, offload in product(micros, RECOMPUTE, replicas, both, both, both):
        # The second chunk holds all rows that can be masked, so that the head recomputes nothing.
        changes = {
            "activation_checkpointing": recompute, "replicate": copies, "shard": None, "reshard_after_forward": reshard,
            "compile": compiled, "offload": offload,
        }  # fmt: skip
        run = config.run.model_copy(update={"micro_batch": micro})
        for chunk in dict.fromkeys((config.parallel.head_chunk, micro * length)):
            parallel = config.parallel.model_copy(update={**changes, "head_chunk": chunk})
            yield config.model_copy(update={"run": run, "parallel": parallel})


def search(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, assumed: Assumptions) -> list[Found]:
    """All arrangements that fit, the fastest first; of equals, the one that needs the least memory.

    Raises ValueError where the configuration resolves on no arrangement.
    """
    start, _ = divisible_batch(config, gpus)
    priced = ((one, cost(one, shape, gpus, gpu, assumed)) for one in arrangements(start, gpus))
    found = [Found(one, price, overlay(config, one)) for one, price in priced if price.fits]
    return sorted(found, key=lambda one: (one.cost.step_seconds, one.cost.memory_total))


def overlay(before: Config, after: Config) -> dict[str, dict]:
    """What an arrangement sets, in full, so that it also holds over other files; of the batch, only what changed."""
    run = {key: getattr(after.run, key) for key in ("global_batch", "steps", "micro_batch")}
    changed = {key: value for key, value in run.items() if key == "micro_batch" or value != getattr(before.run, key)}
    parallel = after.parallel.model_dump(exclude={"compute_dtype", "fused_head", "recompute_budget"})
    return {"run": changed, "parallel": parallel}
