#!/usr/bin/env python3
"""Measure the time and memory that a run needs to open a folder of many shards. The tool creates the folder.

    python tools/bench/shards.py --out DIR [--shards N] [--ranks N] [--json FILE]

DIR becomes a prepared folder of N shards. Their files are sparse and use almost no disk space. As in `mdmtrain.train`,
rank 0 reads the manifest and sends it to the other ranks, and each rank checks a part of the file sizes. Here, the work
of rank 0 and of one other rank is measured, one after the other.
"""

import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.config import DataConfig, DataSource
from mdmtrain.data.loader import check_splits, open_splits, windows
from mdmtrain.data.shards import MANIFEST, write_manifest
from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer

SHARD_TOKENS = 100_000_000
SHARD_DOCUMENTS = 100_000
LENGTH = 4096  # tokens of a row
READS = 2_000  # rows that are read from random positions


def make_folder(folder: Path, shards: int) -> None:
    """Create a prepared folder with `shards` shards of 100M tokens each. All token ids are 0."""
    folder.mkdir(parents=True)
    Tokenizer.train([Path(__file__).read_text()], 300, folder / MODEL_FILE)
    splits = {}
    for split, count in (("train", shards), ("validation", 1)):
        listed = []
        for number in range(count):
            shard: dict[str, Any] = {"tokens": SHARD_TOKENS, "documents": SHARD_DOCUMENTS}
            for key, suffix, size in (("", "bin", 2 * SHARD_TOKENS), ("documents_", "docs", 8 * SHARD_DOCUMENTS),
                                      ("hashes_", "hashes", 8 * SHARD_DOCUMENTS)):  # fmt: skip
                name = f"{split}-{number:05d}.{suffix}"
                with open(folder / name, "wb") as file:
                    file.truncate(size)
                shard |= {f"{key}file": name, f"{key}sha256": f"{number:064x}"}
            listed.append(shard)
        totals = {"tokens": count * SHARD_TOKENS, "documents": count * SHARD_DOCUMENTS}
        splits[split] = {**totals, "bytes": 4 * count * SHARD_TOKENS, "shards": listed}
    write_manifest(folder, Tokenizer.load(folder), splits, "tools/bench/shards.py")


def measured(act: Callable[[], object]) -> tuple[float, float, Any]:
    """Call `act` in a new process. Returns (seconds, growth of memory to its peak in MB, result). Only on Linux."""

    def child(pipe) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory to the present memory
        before = resident("VmRSS")
        start = time.perf_counter()
        result = act()
        pipe.send((time.perf_counter() - start, resident("VmHWM") - before, result))

    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    found = mine.recv()
    process.join()
    return found


def resident(field: str) -> float:
    """Memory of this process in megabytes: VmRSS (present) or VmHWM (peak)."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1e3


def read_rows(splits: list, seed: int) -> int:
    """Read rows from random positions. Returns the number of open files afterwards."""
    train = splits[0][0]
    for window in np.random.default_rng(seed).integers(windows(train, LENGTH), size=READS):
        train.read(int(window) * LENGTH, LENGTH)
    return len(os.listdir("/proc/self/fd"))


def main() -> None:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to create, or to use if it exists"
    )
    parser.add_argument(
        "--shards", type=int, default=100_000, metavar="N", help="shards of 100M tokens each (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=int, default=64, metavar="N", help="ranks that share the checks (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_args()
    if not (args.out / MANIFEST).exists():
        make_folder(args.out, args.shards)
    config = DataConfig(sources=(DataSource(path=str(args.out)),), sequence_length=LENGTH)

    def rank_0() -> bytes:
        return pickle.dumps(open_splits(config, ("train", "validation")))

    seconds, peak, sent = measured(rank_0)

    def other() -> None:
        splits = pickle.loads(sent)
        check_splits(splits, ("size", "size"), (1, args.ranks))

    share, other_peak, _ = measured(other)
    reading, _, files = measured(lambda: read_rows(pickle.loads(sent), 0))
    figures = {
        "shards": args.shards, "manifest_mb": (args.out / MANIFEST).stat().st_size / 1e6,
        "rank_0_seconds": seconds, "rank_0_peak_mb": peak, "sent_mb": len(sent) / 1e6,
        "other_rank_seconds": share, "other_rank_peak_mb": other_peak,
        "row_microseconds": reading / READS * 1e6, "open_files_after_rows": files,
    }  # fmt: skip
    for name, value in figures.items():
        print(f"{name:24} {value:,.4g}")
    if args.json:
        write_atomically(args.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
