#!/usr/bin/env python3
"""Run all checks and measurements that need a GPU, in less than nine minutes.

    python tools/gpu_check.py [--only PART,...] [--json FILE] [--data PREPARED] [--cpu-rehearsal]

The parts are: attention against a reference, graphs of torch.compile, a training loop without synchronization, skipping
on the device, asynchronous saves, and benchmarks at 170M and 1B parameters that compare memory with the plan. They need
no network: the text is Python source from site-packages. Each part runs in its own process, so that a failure, a crash
or a hang does not affect other parts. Exit status: 0, or 1 if a check failed. `--cpu-rehearsal` runs the parts without
a GPU at tiny sizes. It checks this tool, not a GPU.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import ExitStack
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.command import CommandParser, output_file, user_errors

sys.path.append(str(Path(__file__).resolve().parent / "bench"))  # where the modules below are
import gpu_bench
import gpu_parts as parts
from gpu_parts import Place, Report

# The parts in order of importance, with the time limit of each in seconds. Parts are left out if no time is left.
PARTS: dict[str, tuple[Callable[[Report, Place], None], int]] = {
    "device": (parts.device, 40),
    "corpus": (parts.corpus, 60),
    "attention": (parts.attention, 60),
    "sync_free": (parts.sync_free, 60),
    "nan_skip": (parts.nan_skip, 60),
    "saves": (parts.saves, 60),
    "graphs": (parts.graphs, 90),
    "save_stall": (parts.save_stall, 60),
    "bench_170m": (gpu_bench.bench_170m, 180),
    "bench_1b": (gpu_bench.bench_1b, 120),
}
BUDGET = 530.0  # seconds
LEAST = 20  # a part starts only if this many seconds are left
fork = multiprocessing.get_context("fork")  # children inherit the imports; only they initialize CUDA


def has_gpu() -> bool:
    """Whether there is a CUDA GPU. A child checks it, because a process that has used CUDA must not fork."""
    process = fork.Process(target=lambda: os._exit(0 if torch.cuda.is_available() else 1))
    process.start()
    process.join()
    return process.exitcode == 0


def run_part(name: str, place: Place, limit: float) -> dict:
    """Run a part in a child process for at most `limit` seconds. Returns its findings and its status."""
    file = place.folder / f"{name}.json"
    output = place.folder / f"{name}.log"
    process = fork.Process(target=child, args=(name, place, file, output))
    start = time.monotonic()
    process.start()
    process.join(limit)
    if process.is_alive():
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)  # the process group of the part also has its loader processes
        process.join()
        ended = f"did not end within {limit:.0f} s"
    else:
        ended = None if process.exitcode == 0 else f"ended with status {process.exitcode}"
    found = json.loads(file.read_text()) if file.exists() else {"checks": {}, "numbers": {}, "error": None}
    problem = found.pop("error") or ended
    good = problem is None and all(check["good"] for check in found["checks"].values())
    if problem and output.exists():
        found["output"] = output.read_text(errors="replace")[-4000:]
    return {"status": "passed" if good else "FAILED", "seconds": time.monotonic() - start, "problem": problem, **found}


def child(name: str, place: Place, file: Path, output: Path) -> None:
    """The child process of a part. Writes the findings to `file` and standard output and error to `output`."""
    os.setpgid(0, 0)
    with open(output, "w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    report = Report(file)
    report.write()
    try:
        with ExitStack() as patches:
            if place.rehearsal:  # capture the same graphs, but without the C++ compiler, which takes minutes
                quick = partialmethod(torch.nn.Module.compile, backend="eager")
                patches.enter_context(patch.object(torch.nn.Module, "compile", quick))
            PARTS[name][0](report, place)
    except BaseException as error:
        traceback.print_exc()
        report.error = f"{type(error).__name__}: {error}"[:400]
        report.write()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may crash during the shutdown of the interpreter (mdmtrain/command.py)


def part_names(argument: str) -> list[str]:
    """The value of --only: names of parts, comma-separated."""
    names = argument.split(",")
    if not set(names) <= set(PARTS):
        raise ArgumentTypeError(f"{argument}: unknown part: choose from {','.join(PARTS)}")
    return names


def table_of(results: dict[str, dict]) -> Table:
    """All results as a table."""
    table = Table("part", "", "s", "check or number", "found")
    for name, result in results.items():
        rows = [(("" if c["good"] else "FAILED: ") + check, c["detail"]) for check, c in result["checks"].items()]
        rows += [line for key, value in result["numbers"].items() for line in lines_of(key, value)]
        if result["problem"]:
            rows.insert(0, ("problem", result["problem"]))
        rows = rows or [("", "")]
        for number, (what, found) in enumerate(rows):
            first = (name, result["status"], f"{result['seconds']:.0f}") if number == 0 else ("", "", "")
            table.add_row(*first, what, found)
        table.add_section()
    return table


def lines_of(key: str, value) -> list[tuple[str, str]]:
    """A number, or a tree of numbers, as rows."""
    if isinstance(value, dict) and "time_ratio" in value:
        low, high = value["time_ratio"]["quartiles"]
        times = f"{value['seconds'] * 1e3:,.1f} ms, {value['time_ratio']['median']:.3f} ({low:.3f}..{high:.3f})"
        peak = f"{value['peak_bytes'] / 2**20:,.1f} MiB, {value['memory_ratio']:.3f}"
        first = f"; first {value['first_seconds']:.1f} s" if "first_seconds" in value else ""
        return [(key, f"{times}; {peak}{first}")]
    if isinstance(value, dict):
        return [line for inner, one in value.items() for line in lines_of(f"{key}.{inner}", one)]
    if isinstance(value, list):
        return [(key, " ".join(f"{one:.4g}" for one in value))]
    return [(key, f"{value:.4g}" if isinstance(value, float) else str(value))]


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only",
        type=part_names,
        default=list(PARTS),
        metavar="PART,...",
        help=f"run only these parts, out of {', '.join(PARTS)}",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results to this file too")
    parser.add_argument("--data", type=Path, help="prepared folder (default: Python source from site-packages)")
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="run without a GPU at tiny sizes, to check this tool"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"total time in seconds (default: {BUDGET:.0f})")
    args = parser.parse_args(arguments)
    if args.cpu_rehearsal:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not has_gpu():
        raise ValueError(
            "gpu_check.py needs a CUDA GPU, but there is none: run it on a machine with a GPU, or use --cpu-rehearsal"
        )
    console = Console(width=150)
    start = time.monotonic()
    results = {}
    with tempfile.TemporaryDirectory(prefix="mdmtrain-gpu-check-") as folder:
        repeat = 1 if args.cpu_rehearsal else 10
        place = Place(Path(folder), args.data or Path(folder) / "corpus", args.cpu_rehearsal, repeat)
        for name in args.only:
            left = args.budget - (time.monotonic() - start)
            if left < LEAST:
                results[name] = {"status": "left out", "seconds": 0.0, "problem": None, "checks": {}, "numbers": {}}
            else:
                results[name] = run_part(name, place, min(left, PARTS[name][1]))
            console.print(f"{name}: {results[name]['status']}, {results[name]['seconds']:.0f} s", highlight=False)
            if args.json:
                write_atomically(args.json, json.dumps(results, indent=1) + "\n")
    console.print(table_of(results))
    by_status = {status: [n for n, r in results.items() if r["status"] == status] for status in ("FAILED", "left out")}
    seconds = time.monotonic() - start
    words = "; ".join(f"{status}: {', '.join(names)}" for status, names in by_status.items() if names) or "all passed"
    console.print(f"{words}; {seconds:.0f} s" + ("; a rehearsal on the CPU" if args.cpu_rehearsal else ""))
    return 1 if by_status["FAILED"] else 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
