"""Forward passes without gradients, distributed over the ranks."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mdmtrain.model.transformer import Transformer
from mdmtrain.parallel.parallelize import reshard
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World


@torch.no_grad()
def deal(
    count: int,
    batch: int,
    values: Callable[[np.ndarray], Tensor],
    model: Transformer,
    world: World,
    watch: Watchdog | None = None,
) -> np.ndarray:
    """Compute values(numbers) for the numbers 0 .. count - 1, `batch` at a time, split over ranks. A collective.

    Returns float64 [count, ...] in order. The batches do not depend on the number of ranks, and neither does the
    result. watch: the watchdog of a run in training. Each batch counts as progress. A stop request raises Interrupted,
    before the same batch on all ranks.
    """

    def dealt_batch(number: int) -> np.ndarray:
        if watch is not None:
            watch.progress()
            watch.stop.check()
        return values(batches[number]).double().cpu().numpy()

    batches = [np.arange(first, min(first + batch, count)) for first in range(0, count, batch)]
    try:
        dealt = world.deal(len(batches), dealt_batch)
    finally:  # also after an interruption
        reshard(model)
    return np.concatenate(dealt)
