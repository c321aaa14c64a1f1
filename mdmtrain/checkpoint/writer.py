"""Asynchronous checkpoints: training waits only until its tensors are copied; a thread writes the copy."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mdmtrain.checkpoint import store
from mdmtrain.config import CheckpointConfig
from mdmtrain.optim import local
from mdmtrain.parallel.world import WRITER_THREAD, World


class CheckpointWriter:
    """Saves a run's checkpoints one at a time. With checkpoint.asynchronous, a thread on each rank writes them.

    The threads have their own process group, so that their collectives cannot mix with those of the training loop.
    `poll` and `finish`, which all ranks call together, return the result of a save. They raise AgreedError on all ranks
    if it failed.
    """

    def __init__(self, home: Path, tokenizer: bytes, config: CheckpointConfig, world: World, patience: float):
        """A collective. home: the folder of checkpoints; tokenizer: the content of its file, which each of them has.

        patience: minutes that a rank waits until the slowest rank has written its file.
        """
        self._home = home
        self._tokenizer = tokenizer
        self._config = config
        self._world = world
        self._own_world = replace(world, control=dist.new_group(backend="gloo", timeout=timedelta(minutes=patience)))
        self._copies: dict[str, Tensor] = {}  # reused by each save, because pinning memory takes long
        self._saving: Future[Path] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict, scores: Mapping[int, float]) -> None:
        """Begin to write the checkpoint of `step`. The previous one must be finished. scores: see `store.save`.

        If not asynchronous, returns when the checkpoint is written, and raises AgreedError if that failed.
        """
        assert self._saving is None, "finish() comes first"
        saving: Future[Path] = Future()
        self._saving = saving
        # Copy what the loop keeps changing, also `meta` and `scores`.
        scores = dict(scores)
        arguments = (self._home, step, tensors, deepcopy(meta), self._tokenizer, self._config)
        if not self._config.asynchronous:
            saving.set_result(store.save(*arguments, self._world, scores=scores))
            return
        self._copy(tensors)

        def write() -> None:
            try:
                saving.set_result(store.save(*arguments, self._own_world, self._copies, scores))
            except BaseException as error:  # the main thread raises it
                saving.set_exception(error)

        # A daemon thread, because a process that fails otherwise must not wait for ranks that may have died.
        threading.Thread(target=write, name=WRITER_THREAD, daemon=True).start()

    def poll(self) -> Path | None:
        """The checkpoint committed since the last call, or None. A collective while a save is in progress."""
        if self._saving is None:
            return None
        done = torch.tensor([int(self._saving.done())], dtype=torch.int32)
        dist.all_reduce(done, dist.ReduceOp.MIN, self._world.control)
        return self.finish() if done.item() else None

    def finish(self) -> Path | None:
        """Wait for the save in progress. Returns its checkpoint, or None if there is no save."""
        saving = self._saving
        self._saving = None
        return saving.result() if saving is not None else None

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """This rank's part of each tensor that it writes, in memory that the loop does not write to."""
        for name in store.layout_of(tensors, self._world).header(self._world.rank):
            part = local(tensors[name])
            if name not in self._copies:
                self._copies[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._copies[name].copy_(part, non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
