"""Where a step of the real loop spends its time: train.train itself, with a clock at the doors of its parts.

The parts: "data" (waiting for the next micro-batch; with loader processes they work meanwhile), "masking" (rates
applied, masks and weights, the copy to the device), "forward" (the blocks, and the losses of the rows), "head"
(forward), "head backward", "backward" (of the blocks), "optimizer" (norm, clipping, step), and "loop", all the rest:
draws, statistics, records, the flush at the log interval, agreement on a stop. On CUDA the doors are events on the
stream: a part's time is the device's, waiting for the host included.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from mdmtrain import train as loop
from mdmtrain.config import Config
from mdmtrain.diffusion.objective import ForwardProcess, MaskedBatch
from mdmtrain.model.head import Head
from mdmtrain.monitor.recorder import StepRecorder
from mdmtrain.parallel.world import World

PARTS = ("data", "masking", "forward", "head", "head backward", "backward", "optimizer", "loop")
MODEL = ("forward", "head", "head backward", "backward", "optimizer")


class Doors:
    """Times at which the loop passed from one part into another, a list a step."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        self._cuda, self._clock = device.type == "cuda", clock
        self.steps: list[list[tuple[str, object]]] = []

    def begin_step(self) -> None:
        self.steps.append([])
        self.enter("loop")

    def enter(self, part: str) -> None:
        if self.steps:
            self.steps[-1].append((part, self._now()))

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
            row, ends = dict.fromkeys(PARTS, 0.0), [*step[1:], following[0]]
            for (part, start), (_, end) in zip(step, ends, strict=True):
                row[part] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
            rows.append(row)
        return {part: np.array([row[part] for row in rows]) for part in PARTS}


@contextmanager
def doors(watched: Doors) -> Iterator[None]:
    """The functions that the loop calls, with the clock at their doors."""

    def around(function: Callable, part: str) -> Callable:
        def call(*arguments, **named):
            watched.enter(part)
            result = function(*arguments, **named)
            watched.enter("loop")
            return result

        return call

    new_sums, head, wait_for = StepRecorder.new_sums, Head.forward, StepRecorder.wait_for

    def first_of_a_step(recorder: StepRecorder) -> Tensor:
        watched.begin_step()
        return new_sums(recorder)

    def through_the_head(self, rows: Tensor, *arguments) -> Tensor:
        watched.enter("head")
        if rows.requires_grad:
            rows.register_hook(lambda _: watched.enter("backward"))  # the backward pass comes out of the head
        result = head(self, rows, *arguments)
        watched.enter("forward")
        return result

    with ExitStack() as patches:
        for owner, name, function in (
            (StepRecorder, "new_sums", first_of_a_step),
            (StepRecorder, "wait_for", around(wait_for, "data")),
            (ForwardProcess, "corrupt", around(ForwardProcess.corrupt, "masking")),
            (MaskedBatch, "to", around(MaskedBatch.to, "masking")),
            (loop, "masked_cross_entropy", around(loop.masked_cross_entropy, "forward")),
            (loop, "row_losses", around(loop.row_losses, "forward")),
            (Head, "forward", through_the_head),
            (Tensor, "backward", around(Tensor.backward, "head backward")),
            (loop, "optimizer_step", around(loop.optimizer_step, "optimizer")),
        ):
            patches.enter_context(patch.object(owner, name, function))
        yield


def watch(config: Config, world: World, clock: Callable[[], float] = time.perf_counter) -> Doors:
    """Train as configured and return the times. Evaluation, saves and the probe come with the last step alone."""
    watched, steps = Doors(world.device, clock), config.run.steps
    quiet = {"eval": {"every": steps, "rows": 4, "samples": 1}, "checkpoint": {"save_every": steps}}
    quiet["monitor"] = {"probe_every": 0, "tensorboard": config.monitor.tensorboard}
    for section, values in quiet.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
    with doors(watched), redirect_stdout(StringIO()):
        loop.train(config, world)
    return watched
