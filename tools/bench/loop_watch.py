"""Where a step of the real loop spends its time: from the stamps that the loop gives its watchdog.

The parts: "data" (waiting for the next micro-batch; with loader processes they work meanwhile), "masking" (rates
applied, masks and weights, the copy to the device), "forward" (the blocks, and the losses of the rows), "head"
(forward), "head backward", "backward" (of the blocks), "optimizer" (norm, clipping, step), and "loop", all the rest:
draws, statistics, records, the flush at the log interval, agreement on a stop. The head's two parts come from hooks on
the module, because the loop does not see into the model. On CUDA the times are events on the stream: a part's time is
the device's, waiting for the host included.
"""

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import Config
from mdmtrain.model.head import Head
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World
from mdmtrain.train import build_state, open_inputs, train_from

PARTS = ("data", "masking", "forward", "head", "head backward", "backward", "optimizer", "loop")
MODEL = ("forward", "head", "head backward", "backward", "optimizer")
# The part that a stamp of the loop begins; "loop" where it is not listed. A backward pass begins in the head.
BEGINS = {
    "data": "data", "masking": "masking", "forward": "forward", "backward": "head backward", "optimizer": "optimizer"
}  # fmt: skip


class TimedWatchdog(Watchdog):
    """Keeps the times at which the loop passed from one part into another, a list a step."""

    def __init__(self, world: World, config: Config, clock: Callable[[], float]):
        super().__init__(world, config.run)
        self._cuda = world.device.type == "cuda"
        self._clock = clock
        self.steps: list[list[tuple[str, Any]]] = []

    def at(self, phase: str, step: int | None = None) -> None:
        super().at(phase, step)
        if step is not None:
            self.steps.append([])
        self.enter(BEGINS.get(phase, "loop"))

    def enter(self, part: str) -> None:
        if self.steps:  # not in what comes before the first one
            self.steps[-1].append((part, self._now()))

    def watch_head(self, head: Head) -> None:
        """Tell the head's forward and backward pass from those of the blocks."""

        def begin(_module: Head, arguments: tuple) -> None:
            self.enter("head")
            rows = arguments[0]
            if rows.requires_grad:
                rows.register_hook(lambda _gradient: self.enter("backward"))  # the backward pass leaves the head

        def end(_module: Head, _arguments: tuple, _losses: Tensor) -> None:
            self.enter("forward")

        head.register_forward_pre_hook(begin)
        head.register_forward_hook(end)

    def _now(self):
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: int) -> dict[str, np.ndarray]:
        """By part, float64 [steps] from step number `first` (from 0) on, all but the last one, which saves."""
        if self._cuda:
            torch.cuda.synchronize()
        rows = []
        for step, following in zip(self.steps[first:], self.steps[first + 1 :], strict=False):
            row = dict.fromkeys(PARTS, 0.0)
            ends = [*step[1:], following[0]]
            for (part, start), (_, end) in zip(step, ends, strict=True):
                row[part] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
            rows.append(row)
        return {part: np.array([row[part] for row in rows]) for part in PARTS}


def watch(config: Config, world: World, clock: Callable[[], float] = time.perf_counter) -> TimedWatchdog:
    """Train as configured and return the times. Evaluation, saves and the probe come with the last step alone."""
    steps = config.run.steps
    quiet = {"eval": {"every": steps, "rows": 4, "samples": 1}, "checkpoint": {"save_every": steps}}
    quiet["monitor"] = {"probe_every": 0, "tensorboard": config.monitor.tensorboard}
    for section, values in quiet.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
    watched = TimedWatchdog(world, config, clock)
    with redirect_stdout(StringIO()):
        inputs = open_inputs(config, world, watched)
        state = build_state(inputs, config, world)
        watched.watch_head(state.model.head)
        train_from(state, inputs, config, world, watched)
    return watched
