#!/usr/bin/env python
"""Measure time and peak memory of tools/convert_ckpt.py on a synthetic checkpoint, compared with copying its files.

  tools/bench/convert.py --out bench --layers 24

Makes a checkpoint like one saved by a single rank, converts it to llama and back, each in a separate process, and
removes everything. All files are new, so with enough memory every read comes from the page cache.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.formats import tensor_shapes
from mdmtrain.checkpoint.layout import divide
from mdmtrain.checkpoint.tensor_files import file_blocks, write_file
from mdmtrain.command import CommandParser, user_errors
from mdmtrain.config import validate
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.model.presets import ModelShape

T = TypeVar("T")
TOOL = Path(__file__).resolve().parent.parent / "convert_ckpt.py"
# VmHWM is used because ru_maxrss starts with the peak of the parent process.
WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name=sys.argv.pop(1))
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def synthetic_checkpoint(folder: Path, shape: ModelShape) -> int:
    """Write a checkpoint of zeros. Returns the bytes of its tensors."""
    tokenizer = Tokenizer.train([Path(__file__).read_text()], 300, folder.parent / "tokenizer.model")
    tensors = {f"model.{name}": torch.zeros(size) for name, size in tensor_shapes(shape).items()}
    layout = divide(tensors, (), 1, 1)
    folder.mkdir()
    file = folder / layout.file_name(0)
    files = {file.name: write_file(file, file_blocks(layout.header(0), tensors.__getitem__))}
    shutil.copyfile(folder.parent / "tokenizer.model", folder / store.TOKENIZER_FILE)
    tree = {
        "run": {"dir": "run", "steps": 1, "global_batch": 1, "micro_batch": 1},
        "model": asdict(shape),
        "data": {"sources": [{"path": "data"}], "sequence_length": 1024},
        "optim": {"lr": 1e-4},
    }
    identity = {"model": asdict(shape), "tokenizer": tokenizer.sha256}
    config = validate(tree, "benchmark").model_dump(mode="json")
    store.write_marker(folder, {"step": 1, "identity": identity, "has_average": False, "config": config}, layout, files)
    return sum(tensor.nbytes for tensor in tensors.values())


def seconds(act: Callable[[], T]) -> tuple[float, float, T]:
    """Run `act`. Returns its wall-clock seconds, its CPU seconds (with child processes), and its result."""
    clock = time.monotonic()
    before = sum(os.times()[:4])
    result = act()
    return time.monotonic() - clock, sum(os.times()[:4]) - before, result


def watched(name: str, *arguments: str | Path) -> float:
    """Peak MiB of a process that runs the tool. name: '__main__', or any other name to only import the tool."""
    command = [sys.executable, "-c", WATCHED, str(TOOL), name, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024


def copied(source: Path, to: Path) -> None:
    """Copy a folder and sync the copy to the disk."""
    to.mkdir()
    for file in source.iterdir():
        with open(file, "rb") as reader, open(to / file.name, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 24)
            writer.flush()
            os.fsync(writer.fileno())


def main() -> None:
    parser = CommandParser(
        prog="tools/bench/convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="scratch folder; it must not exist")
    parser.add_argument("--layers", type=int, default=24, help="layers; 24 make 3.1 GB (default: %(default)s)")
    args = parser.parse_args()
    shape = ModelShape(32_768, 1536, args.layers, 12, 12, 4096)
    args.out.mkdir(parents=True)
    try:
        size = synthetic_checkpoint(args.out / "checkpoint", shape)
        largest = max(torch.Size(s).numel() for s in tensor_shapes(shape).values()) * 4 / 2**20
        imports = seconds(lambda: watched("imported"))
        copy = partial(copied, args.out / "checkpoint", args.out / "copy")
        rows: dict[str, tuple[float, float, float | None]] = {"imports alone": imports, "plain copy": seconds(copy)}
        convert = {
            "--to llama": ("checkpoint", "--to", "llama"),
            "--to llama --dtype bfloat16": ("checkpoint", "--to", "llama", "--dtype", "bfloat16"),
            "--from llama": ("--to llama", "--from", "llama"),
        }
        for name, (source, *options) in convert.items():
            arguments = [args.out / source, *options, "--out", args.out / name]
            arguments += ["--no-check"] if "--to" in options else []
            rows[name] = seconds(partial(watched, "__main__", *arguments))
        shutil.rmtree(args.out / "copy")
        rows["plain copy again"] = seconds(copy)
        table = Table(
            title=f"{size / 1e9:.2f} GB in {len(tensor_shapes(shape))} tensors, the largest {largest:.0f} MiB"
        )
        for column in ("", "seconds", "CPU seconds", "peak MiB", "peak without imports / largest tensor"):
            table.add_column(column, justify="right" if column else "left")
        for name, (clock, cpu, peak) in rows.items():
            more = "" if peak is None else f"{(peak - imports[2]) / largest:.2f}"
            table.add_row(name, f"{clock:.1f}", f"{cpu:.1f}", "" if peak is None else f"{peak:.0f}", more)
        Console().print(table)
    finally:
        shutil.rmtree(args.out)


if __name__ == "__main__":
    with user_errors():
        main()
