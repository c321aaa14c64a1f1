#!/usr/bin/env python
"""Compare how long training waits for data from an object store, with read-ahead, and from a disk.

Example, with a server on this machine:
  moto_server -p 5000 &
  export AWS_ENDPOINT_URL=http://127.0.0.1:5000 AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret
  tools/bench/read_ahead.py configs/quickstart.yaml run.steps=200 --folder data/shards --url s3://bucket/shards

The folder is copied to the URL first. The same run then reads both places in turn, each time with an empty cache and
two loader processes. `data.shuffle_shards` is 2, so the loaders copy two shards while training reads two.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import numpy as np

from mdmtrain.command import CommandParser, output_file, user_errors

AT_FIRST = 10  # steps that are not counted: the first shards are copied before the first step


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    filesystem, path = fsspec.core.url_to_fs(args.url)
    filesystem.makedirs(path, exist_ok=True)
    for file in sorted(args.folder.iterdir()):
        filesystem.put_file(str(file), f"{path}/{file.name}")

    waits: dict[str, list[float]] = {"disk": [], "object store": []}
    for _ in range(args.rounds):
        for name, place in (("disk", str(args.folder.resolve())), ("object store", args.url)):
            with tempfile.TemporaryDirectory() as work:
                records = train(args.config, place, Path(work))
            waits[name].append(float(np.mean([record["data_wait"] for record in records])))
    for name, shares in waits.items():
        middle = float(np.median(shares))
        print(f"{name:13} waits for data {middle:.1%} of the time ({min(shares):.1%} to {max(shares):.1%})")
    if args.json:
        args.json.write_text(json.dumps(waits, indent=1) + "\n", encoding="utf-8")


def train(config: list[str], place: str, work: Path) -> list[dict]:
    """Train on the prepared data at `place`. Returns the records of its steps. Raises ValueError if the run fails."""
    data = {
        "sources": [{"path": place}], "cache_dir": str(work / "cache"), "cache_gb": 4, "shuffle_shards": 2, "workers": 2
    }  # fmt: skip
    settings = [f"data.{name}={json.dumps(value)}" for name, value in data.items()]
    settings += [f"run.dir={work / 'run'}", "eval.every=1000000", "monitor.log_every=1", "monitor.tensorboard=false"]
    command = [sys.executable, "-m", "mdmtrain.train", *config, *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the run on {place} failed: {done.stderr.strip()}")
    with open(work / "run/metrics.jsonl", encoding="utf-8") as lines:
        records = [record for record in map(json.loads, lines) if "split" not in record]
    return records[AT_FIRST:]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", metavar="CONFIG | section.key=value", help="as for mdmtrain.train")
    parser.add_argument("--folder", type=Path, required=True, metavar="DATA", help="a prepared folder on a disk")
    parser.add_argument("--url", required=True, help="where in an object store the folder is copied to")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each place (default: 3)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with user_errors():
        main()
