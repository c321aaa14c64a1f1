"""Two looks into a run: a profiler's trace of a few steps, and what to do when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mdmtrain.config import Config, MonitorConfig
from mdmtrain.parallel.world import World, describe_error


class Profiler:
    """A torch.profiler trace of monitor.profile_steps steps from monitor.profile_at on, of rank 0 (chrome://tracing)."""

    def __init__(self, config: MonitorConfig, run_dir: Path, world: World):
        self._first = config.profile_at if world.is_main else None
        self._steps = config.profile_steps
        self._folder = run_dir / "profile"
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call before each iteration."""
        if self._first is None:
            return
        if step == self._first:
            self._profile = torch.profiler.profile()  # of the CPU, and of CUDA where there is one
            self._profile.start()
        elif self._profile is not None and step == self._first + self._steps:
            self.close()

    def close(self) -> None:
        """Write what there is: the run may end within the window."""
        if self._profile is not None:
            self._profile.stop()
            self._folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(self._folder / f"step-{self._first}.json"))
            self._profile = None


@contextmanager
def out_of_memory(config: Config, world: World) -> Iterator[None]:
    """Say what to change when memory runs out; on CUDA, leave a snapshot of what held it (pytorch.org/memory_viz)."""
    if world.device.type == "cuda":
        torch.cuda.memory._record_memory_history("state", context="state", stacks="python")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):  # what the CPU's allocator says
            raise
        snapshot = ""
        if world.device.type == "cuda":
            file = Path(config.run.dir) / "logs" / f"memory-{world.rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(file))
            snapshot = f"; what held it: {file}"
        raise ValueError(
            f"out of memory ({describe_error(error)[:200]}): lower run.micro_batch={config.run.micro_batch} (the "
            f"run stays the same) or parallel.head_chunk={config.parallel.head_chunk}, set "
            f"parallel.activation_checkpointing=full, or start more ranks; tools/plan_run.py says what fits{snapshot}"
        ) from error
