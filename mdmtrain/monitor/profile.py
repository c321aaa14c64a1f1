"""A profiler trace of a few steps, and a helpful error when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mdmtrain.config import Config, MonitorConfig
from mdmtrain.parallel.world import World, describe_error


class Profiler:
    """Traces monitor.profile_steps steps of rank 0 with torch.profiler, from step monitor.profile_at on.

    chrome://tracing shows the file.
    """

    def __init__(self, config: MonitorConfig, run_dir: Path, world: World):
        self._first = config.profile_at if world.is_main else None
        self._steps = config.profile_steps
        self._folder = run_dir / "profile"
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call before each step. step: from 0."""
        if self._first is None:
            return
        if step == self._first:
            self._profile = torch.profiler.profile()  # of the CPU, and of the GPU if there is one
            self._profile.start()
        elif self._profile is not None and step == self._first + self._steps:
            self.close()

    def close(self) -> None:
        """Write the trace, also if the run ends before all steps are traced."""
        if self._profile is not None:
            self._profile.stop()
            self._folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(self._folder / f"step-{self._first}.json"))
            self._profile = None


@contextmanager
def out_of_memory(config: Config, world: World) -> Iterator[None]:
    """Raise a ValueError with suggestions when memory runs out.

    On CUDA, also write a memory snapshot for pytorch.org/memory_viz.
    """
    if world.device.type == "cuda":
        torch.cuda.memory._record_memory_history("state", context="state", stacks="python")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):  # the message of the CPU's allocator
            raise
        snapshot = ""
        if world.device.type == "cuda":
            file = Path(config.run.dir) / "logs" / f"memory-{world.rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(file))
            snapshot = f"; memory snapshot: {file}"
        raise ValueError(
            f"out of memory ({describe_error(error)[:200]}): lower run.micro_batch={config.run.micro_batch} (the "
            f"run stays the same) or parallel.head_chunk={config.parallel.head_chunk}, set "
            f"parallel.activation_checkpointing=full, or start more ranks; tools/plan_run.py says what fits{snapshot}"
        ) from error
