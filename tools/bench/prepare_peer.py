#!/usr/bin/env python
"""Measure preparation on one core against datatrove's DocumentTokenizer, on the same files with the same tokenizer.

datatrove has its own environment: python3 -m venv peer && peer/bin/pip install "datatrove[io,processing]". Both
programs run in turn, as a user starts them. Times are of the processor, start included. The fastest round counts.

Example:
  tools/bench/prepare_peer.py corpus/ --pattern '*.parquet' --tokenizer tokenizer.json --peer-python peer/bin/python
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from mdmtrain.command import CommandParser, output_file, user_errors

ROOT = Path(__file__).resolve().parents[2]
PEER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, pattern, tokenizer, out = sys.argv[1:]
reader = ParquetReader if pattern.endswith(".parquet") else JsonlReader
LocalPipelineExecutor(
    pipeline=[
        reader(folder, glob_pattern=pattern),
        DocumentTokenizer(out + "/tokens", tokenizer, shuffle_documents=False, batch_size=1000),
    ],
    logging_dir=out + "/logs",
).run()
"""


def seconds(command: list[str]) -> float:
    """Processor seconds of a command and its processes. Raises ValueError with the end of its output if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {(done.stdout + done.stderr)[-1000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder with Parquet or JSON lines files")
    add("--pattern", required=True, metavar="GLOB", help="names of the files in it, such as '*.parquet'")
    add("--tokenizer", required=True, type=Path, metavar="FILE", help="a tokenizer.json")
    add("--peer-python", required=True, type=Path, metavar="PATH", help="the Python of datatrove's environment")
    add("--rounds", type=int, default=3, metavar="N", help="times that each program runs (default %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write the numbers there")
    args = parser.parse_args(arguments)
    size = sum(file.stat().st_size for file in args.folder.glob(args.pattern))
    best = {"mdmtrain": float("inf"), "datatrove": float("inf")}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as out:
            files = [str(args.folder.resolve()), args.pattern]
            names = [str(args.tokenizer.resolve()), out]
            commands = {
                "mdmtrain": [
                    sys.executable, "tools/prepare_data.py", files[0], "--include", args.pattern,
                    "--tokenizer", names[0], "--out", f"{out}/prepared", "--workers", "1",
                ],
                "datatrove": [str(args.peer_python.absolute()), "-c", PEER, *files, *names],
            }  # fmt: skip
            for name, command in commands.items():
                best[name] = min(best[name], seconds(command))
    ratio = best["datatrove"] / best["mdmtrain"]
    print(f"{size / 1e6:.1f} MB of files, processor seconds: {best}, speed against datatrove {ratio:.0%}")
    if args.json:
        args.json.write_text(json.dumps({"megabytes": size / 1e6, "seconds": best, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    with user_errors():
        main()
