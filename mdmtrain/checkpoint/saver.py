"""Write the checkpoints of a run, record them in its history, and start the exports that are due."""

import os
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.export import SideExports
from mdmtrain.checkpoint.run_folder import add_to_history
from mdmtrain.checkpoint.writer import CheckpointWriter
from mdmtrain.config import Config, RunPlan
from mdmtrain.data.order import Cursor
from mdmtrain.parallel.world import World


class Saver:
    """Saves the checkpoints of a run. All ranks call it.

    scores: the validation NELBO by evaluated step, needed on rank 0; see `store.save`.
    """

    def __init__(
        self, config: Config, plan: RunPlan, writer: CheckpointWriter, world: World, resumed: Path | None,
        identity: dict, cursor: Cursor, scores: dict[int, float],
    ):  # fmt: skip
        """resumed: the checkpoint that the run was resumed from. identity, cursor: see `run_identity`, `continued`."""
        self.scores = scores
        self._config = config
        self._plan = plan
        self._world = world
        self._identity = identity
        self._cursor = cursor
        self._writer = writer
        self._exports = SideExports(config, resumed, world.is_main)

    def save(self, step: int, tensors: dict[str, Tensor], recorder: dict) -> None:
        """Begin the checkpoint of `step`. Call `finish` before. Raises AgreedError.

        tensors: see `store.training_tensors`. recorder: the state of the StepRecorder.
        """
        tokens = self._cursor.at(step, self._config.slots_per_step, self._plan.tokens_per_step).tokens
        meta = {
            "tokens": tokens,
            "cursor": asdict(self._cursor),
            "identity": self._identity,
            "has_average": self._config.optim.ema_decay is not None,
            "recorder": recorder,
            "config": self._config.model_dump(mode="json"),
            "working_directory": os.getcwd(),  # the base of relative paths in the configuration
        }
        self._writer.save(step, tensors, meta, self.scores)

    def poll(self) -> Path | None:
        """The checkpoint committed since the last call, or None. A collective. Raises AgreedError."""
        return self._committed(self._writer.poll())

    def finish(self) -> Path | None:
        """Wait for the save in progress. Returns its checkpoint, or None if there is no save. Raises AgreedError."""
        return self._committed(self._writer.finish())

    def _committed(self, checkpoint: Path | None) -> Path | None:
        if checkpoint is not None:
            if self._world.is_main:
                add_to_history(Path(self._config.run.dir), "checkpoint", step=store.step_of(checkpoint))
            self._exports.start(checkpoint)
        return checkpoint

    def finish_exports(self) -> None:
        """Wait for the exports in progress."""
        self._exports.finish()

    def best(self) -> str | None:
        """A line that names the best checkpoint. None if checkpoint.keep_best is off, none has a score, or rank > 0."""
        if not self._world.is_main or not self._config.checkpoint.keep_best:
            return None
        best = store.best_of(store.complete_checkpoints(store.home(self._config)), self.scores)
        if not best:
            return None
        return f"best checkpoint by validation NELBO ({self.scores[store.step_of(best[0])]:.4f}): {best[0]}"
