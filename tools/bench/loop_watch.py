"""Measure where a step of the training loop spends its time, from the phases that the loop reports to its watchdog.

The parts are "data" (waiting for the next micro-batch; loader processes prepare it in parallel), "masking" (masks and
weights from the rates, and the copy to the device), "forward" (the blocks, and the losses of the rows), "head"
(forward), "head backward", "backward" (of the blocks), "optimizer" (norm, clipping, step), and "loop" for everything
else: drawing rates, statistics, records, the flush at the log interval, and agreement on a stop. The parts of the head
are measured with hooks on the module, because the loop calls the model as a whole. On CUDA the times are from events on
the stream, so the time of a part is that of the device, including its waits for the host.
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
# Phase of the loop -> the part that begins with it. All other phases are "loop". A backward pass begins in the head.
BEGINS = {
    "data": "data", "masking": "masking", "forward": "forward", "backward": "head backward", "optimizer": "optimizer"
}  # fmt: skip


class TimedWatchdog(Watchdog):
    """Records when each part begins: one list per step."""

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
        if self.steps:  # not before the first step
            self.steps[-1].append((part, self._now()))

    def watch_head(self, head: Head) -> None:
        """Register hooks that separate the forward and backward pass of the head from those of the blocks."""

        def begin(_module: Head, arguments: tuple) -> None:
            self.enter("head")
            rows = arguments[0]
            if rows.requires_grad:
                rows.register_hook(lambda _gradient: self.enter("backward"))  # the head's backward pass ends

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
        """Seconds by part, float64 [steps], from step number `first` (from 0), without the last step, which saves."""
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
    """Train as configured and return the times. Evaluation and the save are only after the last step; no probe runs."""
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
