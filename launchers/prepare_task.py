"""A task of a preparation: does some units of a stage, in a Slurm job or as a process on this machine.

launchers.prepare starts it. For a unit that fails, it writes the error line for the launcher, and continues with the
next unit.
"""

import json
import os
import pickle
import sys
import threading
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import cast

from mdmtrain.data.parts import Do, Preparation, Stage
from mdmtrain.data.plan import Plan
from mdmtrain.files import replacing

BEAT = 1.0  # seconds between two updates of a unit's progress


def write_plan(work: Path, plan: Plan) -> None:
    """Write the plan for the tasks. Raises ValueError if an input can only be read by this process."""
    for one in plan.inputs:
        if one.spool is not None:
            raise ValueError(
                f"{one.name}: can be read only once, and not by several tasks: make a file of it, or prepare it with "
                "tools/prepare_data.py"
            )
    content = pickle.dumps((plan, os.getcwd()))
    temporary = work / "plan.tmp"
    temporary.write_bytes(content)
    os.replace(temporary, work / "plan.pickle")


def note(work: Path, stage: Stage, unit: int) -> Path:
    """The progress file of a unit: its bytes done. The same name with `.error` has the reason of a failure."""
    return work / "running" / f"{stage}-{unit:05d}"


def work_on(work: Path, stage: Stage, units: list[int], workers: int) -> None:
    """Do those of the given units that are not done yet."""
    plan, directory = pickle.loads((work / "plan.pickle").read_bytes())
    os.chdir(directory)  # the inputs may be relative paths
    making = Preparation(plan, work)
    pending = set(making.pending(stage))
    with making.doing(stage, workers) as do:
        for unit in units:
            if unit in pending and not _do(do, work, stage, unit):
                return


def _do(do: Do, work: Path, stage: Stage, unit: int) -> bool:
    """Do a unit. Returns whether the next unit can begin."""
    file, last = note(work, stage, unit), time.monotonic()
    file.write_text("0")

    def report(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > BEAT:
            last = time.monotonic()
            file.write_text(str(done))

    try:
        do(unit, report)
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ValueError):
            traceback.print_exc()
            line = f"{type(error).__name__}: {line}"
        print(f"error: {stage} {unit}: {line}", file=sys.stderr, flush=True)
        with replacing(file.with_suffix(".error")) as stream:
            stream.write(line)
        return not isinstance(error, BrokenProcessPool)
    with suppress(FileNotFoundError):
        file.unlink()
    return True


def main() -> None:
    """Arguments: WORK STAGE WORKERS. Standard input: a line of JSON with the units; when it is closed, the task
    ends.
    """
    work, workers = sys.argv[1], int(sys.argv[3])
    stage = cast(Stage, sys.argv[2])
    units = json.loads(sys.stdin.readline())

    def follow_launcher() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=follow_launcher, daemon=True).start()
    work_on(Path(work), stage, units, workers)


if __name__ == "__main__":
    main()
