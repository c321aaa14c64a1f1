#!/usr/bin/env python
"""Turn text into a prepared folder that mdmtrain trains on: a tokenizer, token shards and a manifest.

Examples:
  tools/prepare_data.py corpus/ --include '*.txt' --vocab-size 32768 --out data/corpus
  tools/prepare_data.py 'dumps/*.jsonl.gz' notes.txt --tokenizer data/corpus --out data/dumps
  tools/prepare_data.py code/ --include '*.parquet' --field content --out data/code
"""

import argparse
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

# Worker processes import this file, so modules that they do not need are imported in main.
from mdmtrain.data.chat import PLAIN
from mdmtrain.data.options import add_options, read_options
from mdmtrain.data.parts import kept_units, work_folder
from mdmtrain.data.prepare import prepare


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="If the command is stopped or killed, finished parts are kept, and the same command resumes. Exit "
        "status: 0 if the folder is prepared (or was before, from the same inputs and options), 2 after an error line.",
    )
    add_options(parser, standard_input=True)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="tokenizing processes (default: cores, %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    args = arguments(argv)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} is not positive")
    if args.tokenizer:
        from mdmtrain.checkpoint import store

        args.tokenizer = store.tokenizer_path(args.tokenizer)
    inputs, options = read_options(args)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, partial(_stop, work_folder(args.out)))
    percent = TextColumn("{task.percentage:>3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total)

        begin = time.monotonic()
        summary = prepare(inputs, args.out, options, args.workers, show)
    print(*summary.lines(time.monotonic() - begin), sep="\n")
    if args.messages_field:
        plain = options.fields.template == PLAIN
        print(f"messages   formatted with the {'plain template' if plain else 'chat template of the tokenizer'}")


def _stop(work: Path, number: int, _frame: object) -> None:
    for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(again, signal.SIG_IGN)  # a second signal does not interrupt the clean-up
    kept = kept_units(work)
    left = f"finished units kept: {kept}; the same command resumes" if kept else "nothing was written"
    print(f"stopped: {left}", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    from mdmtrain.command import user_errors

    with user_errors():
        main()
