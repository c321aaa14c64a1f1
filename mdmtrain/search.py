"""Find the fastest arrangement of a configuration on given GPUs, with the predictions of cost.py.

An arrangement is the micro-batch, what is recomputed, and how the model is spread over the ranks. It changes speed and
memory, and not the training. The global batch belongs to the training. It changes only if it does not divide over the
GPUs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mdmtrain.config import Config
from mdmtrain.cost import Assumptions, Cost, Gpu, cost
from mdmtrain.model.presets import ModelShape

RECOMPUTE = ("none", "selective", "ops", "full")
SEARCHED = {  # the keys of `parallel` that an arrangement sets
    "activation_checkpointing", "replicate", "shard", "reshard_after_forward", "compile", "offload", "head_chunk"
}  # fmt: skip


@dataclass(frozen=True)
class Arrangement:
    """An arrangement that fits into memory, and its cost."""

    config: Config
    cost: Cost
    overlay: dict[str, dict]  # the settings to add to the configuration that the search started from

    @property
    def arguments(self) -> str:
        """The overlay as arguments of a command line."""
        parts = [(f"{section}.{key}", value) for section, keys in self.overlay.items() for key, value in keys.items()]
        return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in parts)


def search(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, assumed: Assumptions) -> list[Arrangement]:
    """All arrangements that fit into memory, the fastest first. Of equally fast ones, the smallest is first."""
    start, _ = divisible_batch(config, gpus)
    costs = ((one, cost(one, shape, gpus, gpu, assumed)) for one in arrangements(start, gpus))
    found = [Arrangement(one, price, overlay(config, one)) for one, price in costs if price.fits]
    return sorted(found, key=lambda one: (one.cost.step_seconds, one.cost.memory_total))


def divisible_batch(config: Config, gpus: int) -> tuple[Config, str | None]:
    """(the configuration with a global batch that divides over the GPUs, the reason if it had to change).

    The batch becomes the nearest multiple. The number of steps changes with it, so that the run has as many tokens.
    """
    run = config.run
    unit = gpus * config.diffusion.rows_per_slot
    if run.global_batch % unit == 0:
        return config, None
    batch = max(1, round(run.global_batch / unit)) * unit
    steps = max(1, round(run.steps * run.global_batch / batch))
    new = config.model_copy(update={"run": run.model_copy(update={"global_batch": batch, "steps": steps})})
    return new, (
        f"run.global_batch={run.global_batch} does not divide over {gpus:,} GPUs, because it must be a multiple of "
        f"{unit}. It is changed to {batch}, and run.steps from {run.steps} to {steps}, so that the run has as many "
        "tokens. This changes the training: optim.lr and optim.warmup_steps were chosen for the old batch"
    )


def arrangements(config: Config, gpus: int) -> Iterator[Config]:
    """Every arrangement of a configuration whose global batch divides over the GPUs."""
    views = config.diffusion.rows_per_slot
    length = config.data.sequence_length
    rows = config.run.global_batch // gpus
    micros = [micro for micro in range(views, rows + 1, views) if rows % micro == 0]
    replicas = [copies for copies in range(1, gpus + 1) if gpus % copies == 0]
    both = (False, True)
    for micro, recompute, copies, reshard, compiled, offload in product(micros, RECOMPUTE, replicas, both, both, both):
        changes = {
            "activation_checkpointing": recompute, "replicate": copies, "shard": None, "reshard_after_forward": reshard,
            "compile": compiled, "offload": offload,
        }  # fmt: skip
        run = config.run.model_copy(update={"micro_batch": micro})
        # The second chunk holds all positions of a micro-batch. The head then recomputes nothing.
        for chunk in dict.fromkeys((config.parallel.head_chunk, micro * length)):
            parallel = config.parallel.model_copy(update={**changes, "head_chunk": chunk})
            yield config.model_copy(update={"run": run, "parallel": parallel})


def overlay(before: Config, after: Config) -> dict[str, dict]:
    """The settings of an arrangement, also those at their default. Of the batch and the steps, only what changed."""
    run = {key: getattr(after.run, key) for key in ("global_batch", "steps", "micro_batch")}
    changed = {key: value for key, value in run.items() if key == "micro_batch" or value != getattr(before.run, key)}
    return {"run": changed, "parallel": after.parallel.model_dump(include=SEARCHED)}
