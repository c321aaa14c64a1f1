"""A task of a preparation, in a Slurm job or as a local process: does its share of the units of a stage.

launchers.prepare starts it. If a unit fails, the task writes the error line to a file for the launcher, and continues
with the next unit.
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

from mdmtrain.data.division import Division
from mdmtrain.data.parts import Do, Preparation, Stage
from mdmtrain.files import put_in_place, replacing

BEAT = 1.0  # seconds between two updates of a unit's progress file


def write_division(work: Path, division: Division) -> None:
    """Write the inputs and options to a file for the tasks. Raises ValueError if only this process can read one."""
    for one in division.inputs:
        if one.spool is not None:
            raise ValueError(
                f"{one.name}: can be read only once, and not by several tasks: save it as a file, or prepare it with "
                "tools/prepare_data.py"
            )
    content = pickle.dumps((division, os.getcwd()))
    temporary = work / "division.tmp"
    temporary.write_bytes(content)
    put_in_place(temporary, work / "division.pickle")


def running(work: Path) -> Path:
    """The folder of the progress files of the units that have begun."""
    return work / "running"


def note(work: Path, stage: Stage, unit: int) -> Path:
    """The progress file of a unit: the bytes that are done. With the suffix `.error`: the unit's error line."""
    return running(work) / f"{stage}-{unit:05d}"


def work_on(work: Path, stage: Stage, units: list[int], workers: int) -> None:
    """Do the given units that are not done yet."""
    division, directory = pickle.loads((work / "division.pickle").read_bytes())
    os.chdir(directory)  # the names of inputs may be relative to it
    making = Preparation(division, work)
    pending = set(making.pending(stage))
    with making.doing(stage, workers) as do:
        for unit in units:
            if unit in pending and not _do(do, work, stage, unit):
                return


def _do(do: Do, work: Path, stage: Stage, unit: int) -> bool:
    """Do a unit. Returns whether the task can begin the next one."""
    file = note(work, stage, unit)
    last = time.monotonic()
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
    """Run as a process with the arguments WORK STAGE WORKERS.

    The first line of standard input has the units as JSON. The launcher closes standard input to end the process.
    """
    work = sys.argv[1]
    workers = int(sys.argv[3])
    stage = cast(Stage, sys.argv[2])
    units = json.loads(sys.stdin.readline())

    def follow_launcher() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=follow_launcher, daemon=True).start()
    work_on(Path(work), stage, units, workers)


if __name__ == "__main__":
    main()
