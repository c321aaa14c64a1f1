"""Prepare a corpus in many processes or as a Slurm job array, with retries. The result is one prepared folder.

    python -m launchers.prepare INPUT... --out DIR --tasks 8                                 processes on this machine
    python -m launchers.prepare INPUT... --out DIR --tasks 100 --slurm '--time 4:00:00'      tasks of a job array

The folder has the same bytes for any number of tasks, and the same bytes as from tools/prepare_data.py. The same
command resumes a preparation that was stopped or killed. docs/preparing.md is the user's guide.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heapreplace
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from launchers import slurm_client
from launchers.launch import ROOT, copy_code, parse, positive
from launchers.prepare_task import note, running, work_on, write_division
from launchers.slurm import (
    PYTHON,
    RunExecutor,
    code_lines,
    common_parameters,
    no_files_if_refused,
    refuse_what_slurm_refuses,
    refuse_what_the_cluster_lacks,
    slurm_parser,
)
from mdmtrain.checkpoint import store
from mdmtrain.command import CommandParser, survive_terminal, user_errors
from mdmtrain.data.division import Division, digest
from mdmtrain.data.options import add_options, read_options
from mdmtrain.data.parts import JOB, Preparation, Stage, work_folder
from mdmtrain.data.prepare import STAGE_NAMES, Summary, finished, preparation
from mdmtrain.files import replacing
from mdmtrain.parallel.stop import handled_signals

POLL = 2.0  # seconds between two checks of the progress
MANY = ("tasks", "give fewer --tasks")


class Tasks(Protocol):
    """Start tasks that do the units of a stage, and track them."""

    def start(self, stage: Stage, deals: list[list[int]]) -> None:
        """Start a task for each list of units."""

    def left(self) -> int:
        """The number of tasks that have not ended."""

    def ended(self, stage: Stage) -> list[list[int]]:
        """The list of units of each task of a stage that has ended since the last call."""

    def stop(self) -> None:
        """Called before the launcher ends, also if tasks are still running."""


class Processes:
    """Tasks as processes on this machine. They end when the launcher ends, even if it is killed."""

    def __init__(self, work: Path, workers: int):
        self._work, self._workers = work, workers
        self._deals: list[list[int]] = []
        self._processes: list[subprocess.Popen] = []

    def start(self, stage: Stage, deals: list[list[int]]) -> None:
        logs = self._work / "logs"
        logs.mkdir(exist_ok=True)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "launchers.prepare_task", str(self._work), stage, str(self._workers)]
        self._deals = deals
        for number, units in enumerate(deals):
            with open(logs / f"{stage}-{number}.log", "a") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                    env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
                    start_new_session=True,  # so that Ctrl-C signals only the launcher
                )  # fmt: skip
            self._processes.append(process)
            assert process.stdin
            with suppress(BrokenPipeError):  # the task has already ended
                process.stdin.write(json.dumps(units) + "\n")
                process.stdin.flush()

    def left(self) -> int:
        left = sum(process.poll() is None for process in self._processes)
        if not left:
            self.stop()
        return left

    def ended(self, stage: Stage) -> list[list[int]]:
        deals = self._deals
        self._deals = []
        return deals

    def stop(self) -> None:
        for process in self._processes:
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.close()  # this ends the task
        for process in self._processes:
            process.wait()
        self._processes = []


class JobArray:
    """Tasks of a Slurm job array. They continue if the launcher ends.

    JOB is written before the array is submitted, and again with its number afterwards. If the launcher was killed in
    between, the next one still finds the array, because it asks Slurm by `job_name`.
    """

    def __init__(self, work: Path, options: argparse.Namespace, workers: int):
        self._work = work
        self._options = options
        self._workers = workers
        self._cluster = options.clusters or ""

    def start(self, stage: Stage, deals: list[list[int]]) -> None:
        made = executor(self._work, self._options, len(deals))
        refuse_what_slurm_refuses(made.script(len(deals)), self._cluster)
        copy_code(self._work / "code")
        for needed in (made.folder, self._work / "logs"):
            needed.mkdir(parents=True, exist_ok=True)
        count = len(deals)
        record = {"cluster": self._cluster, "stage": stage, "deals": deals}
        self._write_record({**record, "job": None})
        try:
            with slurm_client.outside_allocations(), no_files_if_refused(made.folder):
                jobs = made.map_array(work_on, [self._work] * count, [stage] * count, deals, [self._workers] * count)
        except ValueError:  # refused
            (self._work / JOB).unlink()
            raise
        job = jobs[0].job_id.partition("_")[0]
        self._write_record({**record, "job": job})
        print(f"submitted job {job}: {STAGE_NAMES[stage]}, {count} tasks; logs in {self._work}/logs", flush=True)

    def left(self) -> int:
        record = self._read_record()
        name = job_name(self._work)
        cluster = record["cluster"] if record else self._cluster
        return slurm_client.patiently(lambda: slurm_client.tasks_left(name, cluster))

    def ended(self, stage: Stage) -> list[list[int]]:
        record = self._read_record()
        (self._work / JOB).unlink(missing_ok=True)
        return record["deals"] if record and record["job"] and record["stage"] == stage else []

    def _write_record(self, record: dict) -> None:
        with replacing(self._work / JOB) as file:
            json.dump(record, file)

    def _read_record(self) -> dict | None:
        """The job that was submitted last, also by an earlier launcher; None if there is none.

        Its number is None if that launcher was killed before it knew whether Slurm had accepted the job.
        """
        file = self._work / JOB
        return json.loads(file.read_text()) if file.exists() else None

    def stop(self) -> None:
        pass


def job_name(work: Path) -> str:
    """The name of the jobs that work in a folder. It is a function of the folder's path: all launchers know it."""
    return f"prepare-{re.sub('[^A-Za-z0-9._-]', '_', work.name.strip('.'))}-{digest(os.path.realpath(work))[:8]}"


def executor(work: Path, options: argparse.Namespace, tasks: int) -> RunExecutor:
    """The submitit executor for the tasks of a stage."""
    made = RunExecutor(work / "submitit", python=PYTHON)
    setup = [*options.setup, *code_lines(shlex.quote(str(work / "code")), {"OMP_NUM_THREADS": "1"})]
    made.update_parameters(
        **{**common_parameters(options, work, tasks, [str(work)]), "job_name": job_name(work)},
        array_parallelism=tasks,
        setup=setup,
    )
    return made


# ---- a stage


@dataclass
class Show:
    """The live progress table."""

    making: Preparation
    console: Console
    begin: float = 0.0
    first: int = 0  # bytes that were done when the stage began
    sizes: list[int] = field(default_factory=list)  # bytes of each unit of the stage

    def start(self, stage: Stage) -> None:
        self.sizes = [self.making.size(stage, unit) for unit in range(self.making.units(stage))]
        self.begin, self.first = time.monotonic(), self._done(stage)[0]

    def _done(self, stage: Stage) -> tuple[int, int]:
        """(bytes that are done, units that are done). The files that are read are those of units that have begun."""
        pending = {note(self.making.work, stage, unit).name: self.sizes[unit] for unit in self.making.pending(stage)}
        done = sum(self.sizes) - sum(pending.values())
        for file in running(self.making.work).iterdir():
            if file.name in pending:
                with suppress(FileNotFoundError, ValueError):  # the unit has ended, or its file is being written
                    done += int(file.read_text())
        return done, len(self.sizes) - len(pending)

    def table(self, stage: Stage, tasks: int, failures: int) -> Table:
        (done, units_done), total, units = self._done(stage), sum(self.sizes), len(self.sizes)
        speed = (done - self.first) / max(1e-9, time.monotonic() - self.begin)
        seconds = (total - done) / speed if speed > 0 else None
        eta = "" if seconds is None else f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f}:{seconds % 60:02.0f}"
        made = Table("stage", "done", "tasks", "failures", "MB/s", "ETA", box=None)
        rate = f"{speed / 1e6:,.1f}" if stage != "duplicates" else ""
        made.add_row(STAGE_NAMES[stage], f"{units_done:,}/{units:,}", str(tasks), str(failures), rate, eta)
        return made


def dealt(units: Sequence[int], sizes: Sequence[int], tasks: int) -> list[list[int]]:
    """The units of each task, the largest first: each unit in turn goes to the task with the fewest bytes so far.

    No task is without a unit. sizes: bytes of all units of the stage, by number.
    """
    deals: list[list[int]] = [[] for _ in range(min(tasks, len(units)))]
    loads = [(0, 0, task) for task in range(len(deals))]  # bytes, units, task: a heap
    for unit in sorted(units, key=lambda unit: -sizes[unit]):
        load, count, task = loads[0]
        heapreplace(loads, (load + sizes[unit], count + 1, task))
        deals[task].append(unit)
    return deals


def run_stage(making: Preparation, stage: Stage, tasks: Tasks, count: int, attempts: int, show: Show) -> None:
    """Do all units of a stage, with at most `attempts` attempts for each.

    `dealt` distributes the units over `count` tasks. When all tasks have ended, the remaining units are distributed
    again. A unit has failed if a task began but did not finish it. If a task ended before it began any of its remaining
    units, all of them count as failed. Raises ValueError, with the error line of one failed unit, if attempts are
    exhausted.
    """
    failures = Counter[int]()
    errors = dict[int, str]()
    notes = running(making.work)
    notes.mkdir(exist_ok=True)
    show.start(stage)
    with Live(console=show.console, transient=True, auto_refresh=False) as live:
        while True:
            while left := tasks.left():  # includes tasks that an earlier launcher started
                live.update(show.table(stage, left, failures.total()), refresh=True)
                time.sleep(POLL)
            making.clean()
            pending = set(making.pending(stage))
            for deal in tasks.ended(stage):
                open_units = [unit for unit in deal if unit in pending]
                begun = [unit for unit in open_units if note(making.work, stage, unit).exists()]
                for unit in begun or open_units:
                    failures[unit] += 1
                    errors[unit] = _why(making.work, stage, unit)
                    again = "trying again" if failures[unit] < attempts else "no attempts left"
                    line = f"failed: {STAGE_NAMES[stage]}, unit {unit}: {escape(errors[unit])}; {again}"
                    show.console.print(line, soft_wrap=True)
            todo = sorted(unit for unit in pending if failures[unit] < attempts)
            if not todo:
                break
            for file in notes.iterdir():
                file.unlink()
            tasks.start(stage, dealt(todo, show.sizes, count))
        if pending:
            first = min(pending)
            raise ValueError(
                f"{STAGE_NAMES[stage]}: {len(pending)} of {making.units(stage)} units failed {attempts} times; "
                f"unit {first}: {errors[first]}"
            )
    show.console.print(show.table(stage, 0, failures.total()))


def _why(work: Path, stage: Stage, unit: int) -> str:
    try:
        return note(work, stage, unit).with_suffix(".error").read_text()
    except FileNotFoundError:
        return f"its task ended without an error line (killed? out of memory or time?): see {work}/logs"


# ---- command


def parser() -> CommandParser:
    made = CommandParser(
        prog="python -m launchers.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(made, standard_input=False)
    made.add_argument("--tasks", type=positive, required=True, metavar="N", help="number of tasks that run at a time")
    made.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes in each task that tokenize (default: 1)"
    )
    made.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="run the tasks as a job array with these options of launchers.slurm, such as '--time 4:00:00 --mem 8G'",
    )
    made.add_argument(
        "--max-attempts",
        type=positive,
        default=3,
        metavar="N",
        help="try each part at most N times; if one fails N times, finish the others and report it (default: 3)",
    )
    made.add_argument("--dry-run", action="store_true", help="print the parts and the job script; start nothing")
    return made


def slurm_options(arguments: str, workers: int) -> argparse.Namespace:
    """Parse the options in --slurm. Raises ValueError for options that a preparation does not support."""
    options = parse(slurm_parser(), shlex.split(arguments), None)
    if options.config or options.nodes != 1 or options.gpus_per_node or options.ranks_per_node != 1:
        raise ValueError(f"--slurm {arguments!r}: a task has one node and no GPU: leave out nodes, GPUs and ranks")
    options.cpus = options.cpus or workers
    options.stop_before = -60  # a task needs no time to stop; Slurm may signal up to 60 s early
    return options


def explain(division: Division, making: Preparation, tasks: int) -> list[str]:
    largest = max(division.bytes_of(part) for part in range(len(division.parts)))
    parts = len(division.parts)
    stages = [stage for stage in making.stages() if stage != "tokenizer" or not division.model]
    idle = [f"note    only {parts:,} of {tasks:,} tasks have a part: a smaller --part-bytes makes more parts"]
    return [
        f"inputs  {len(division.inputs):,} files, {sum(division.sizes) / 1e6:,.1f} MB",
        f"parts   {parts:,}, the largest {largest / 1e6:,.1f} MB, for {min(tasks, parts):,} tasks",
        *(idle if parts < tasks else []),
        f"stages  {', '.join(STAGE_NAMES[stage] for stage in stages)}",
    ]


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.tokenizer:
        args.tokenizer = store.tokenizer_path(args.tokenizer)
    inputs, options = read_options(args)
    division = Division.of(inputs, options)
    out = args.out.absolute()
    begin = time.monotonic()
    work = work_folder(out)
    if done := finished(division, out):
        print(*done.lines(0), sep="\n")
        return
    slurm = None if args.slurm is None else slurm_options(args.slurm, args.workers)
    tasks = JobArray(work, slurm, args.workers) if slurm else Processes(work, args.workers)
    print(*explain(division, Preparation(division, work), args.tasks), sep="\n", flush=True)
    most = min(args.tasks, len(division.parts))
    script = f"\n{executor(work, slurm, most).script(most)}\n" if slurm else ""
    if args.dry_run:
        print(f"{script}nothing started (--dry-run)")
        return
    if slurm:
        refuse_what_the_cluster_lacks(slurm, args.tasks, MANY)
    survive_terminal()
    for number in handled_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
        signal.signal(number, _stop)
    try:
        with preparation(division, out) as making:
            write_division(work, division)
            show = Show(making, Console(width=None if sys.stdout.isatty() else 130))
            try:
                for stage in making.stages():
                    if making.pending(stage):
                        run_stage(making, stage, tasks, args.tasks, args.max_attempts, show)
            finally:
                tasks.stop()
            manifest, reading = making.finish(out)
    except KeyboardInterrupt:
        jobs = "the jobs continue; the same command waits for them again" if slurm else "the same command resumes"
        raise ValueError(f"interrupted: {jobs}") from None
    print(*Summary(out, manifest, False, reading).lines(time.monotonic() - begin), sep="\n")


def _stop(number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    with user_errors():
        main()
