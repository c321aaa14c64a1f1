"""The parts of tools/gpu_check.py on the fake device, in the sizes of a GPU, but for save_stall.

    python -m tests.gpu check DATA SCRATCH PART...       one line of JSON for each part

Times and values mean nothing here; memory, waits and graphs do. "PART, item" is the part with a fault in the step (see
arrangements.py).
"""

import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import gpu_bench
import gpu_check
import gpu_parts
import meter
import save

from tests.gpu.arrangements import STEP, compiled_by, fake_ranks, item_in_the_step
from tests.gpu.fake_cuda import FakeCuda


def run_save_here(command: list[str], check: bool) -> None:
    """tools/bench/save.py, which save_stall starts: here and not in a process of its own, which would have no fake
    device. Small, because its files are real.
    """
    save.main([*command[2:], "--layers", "1", "--saves", "1"])


def compiled_is_faster(*arguments) -> dict:
    """meter.compare_settings. What the benchmark then runs must not depend on the load of this machine."""
    compared = meter.compare_settings(*arguments)
    return {name: {**row, "seconds": 0.0} if name == "compiled" else row for name, row in compared.items()}


def check(data: str, scratch: str, part: str) -> dict:
    """Run a part. Returns its checks and numbers, and the exception that ended it, or None."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    report = gpu_parts.Report(folder / "report.json")
    place = gpu_parts.Place(folder, Path(data), rehearsal=False, repeat=1)
    error = None
    STEP[0] = 1
    with ExitStack() as stack:
        stack.enter_context(compiled_by("aot_eager"))
        stack.enter_context(FakeCuda())
        world = stack.enter_context(fake_ranks(1))
        for module in (gpu_parts, gpu_bench):
            stack.enter_context(patch.object(module, "the_world", lambda: world))
        stack.enter_context(patch.object(save, "init_world", lambda: world))
        stack.enter_context(patch.object(gpu_parts, "subprocess", SimpleNamespace(run=run_save_here)))
        stack.enter_context(patch.object(gpu_bench, "compare_settings", compiled_is_faster))
        if part.endswith(", item"):
            stack.enter_context(item_in_the_step())
        try:
            gpu_check.PARTS[part.removesuffix(", item")][0](report, place)
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
    return {"name": part, "checks": report.checks, "numbers": report.numbers, "error": error}
