#!/usr/bin/env python
"""Turn text into a prepared folder that mdmtrain trains on: a tokenizer, memory-mapped token shards and a manifest.

Examples:
  tools/prepare_data.py corpus/ --include '*.txt' --vocab-size 32768 --out data/corpus
  tools/prepare_data.py 'dumps/*.jsonl.gz' notes.txt --tokenizer data/corpus --out data/dumps
"""

import argparse
import glob
import os
import signal
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

# Worker processes import this file: what they do not need is imported in main.
from mdmtrain.data.prepare import LONGEST_TEXT, Options, Summary, prepare


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 prepared (or prepared before, from the same inputs and options), 2 nothing was written: "
        "the error line says why.",
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="text file, folder, quoted glob (** for any depth), .jsonl or .jsonl.gz (one object with a 'text' field a "
        "line = one document), or other .gz (text); a text file is one document, cut at line ends every "
        f"{LONGEST_TEXT:,} bytes; hidden files in folders are not read. Or .jsonl whose objects all have 'prompt' and "
        "'response': prompts are never masked in training, and sizes in bytes are those of the responses",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="prepared folder to make; appears only when complete")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="use that of a prepared folder, a run, a checkpoint or a model folder, or a sentencepiece model or "
        "tokenizer.json file; docs/tokenizers.md says which are accepted",
    )
    kind.add_argument(
        "--vocab-size",
        type=int,
        default=Options.vocab_size,
        metavar="N",
        help="train a tokenizer of N pieces on the text (default %(default)s)",
    )
    add("--include", nargs="+", default=[], metavar="PATTERN", help="in folders, only files with such names ('*.py')")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="in folders, no files or folders with such names")
    add(
        "--validation-fraction",
        type=float,
        default=Options.validation_fraction,
        metavar="F",
        help="share of the documents, chosen by their hash, that is kept for validation (default %(default)s)",
    )
    add(
        "--shard-tokens",
        type=int,
        default=Options.shard_tokens,
        metavar="N",
        help="most tokens in a shard file (default %(default)s)",
    )
    add(
        "--bad-utf8",
        choices=("error", "skip"),
        default=Options.bad_utf8,
        help="a document that is not UTF-8: stop, or leave it out and count it (default %(default)s)",
    )
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="tokenizing processes (default: cores, %(default)s)")
    return parser.parse_args(argv)


def find_inputs(arguments: list[str], include: list[str], exclude: list[str], out: Path) -> list[Path]:
    """The files that `arguments` (files, folders, globs) name, each once, in a fixed order, absolute.

    Within folders, `include` patterns choose files and `exclude` patterns drop files and folders, both by name; hidden
    names and `out` are left alone. Raises ValueError where an argument names nothing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        named = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        before = len(found)
        for path in named:
            files = _walk(path, include, exclude, out.resolve()) if os.path.isdir(path) else [path]
            found.update((Path(file).resolve(), None) for file in files)
        if not named:
            raise ValueError(f"no input matches {argument!r}: give a file, a folder or a quoted glob")
        if len(found) == before and all(os.path.isdir(path) for path in named):
            raise ValueError(f"no new file in {argument!r} matches --include and --exclude: widen the patterns")
    return list(found)


def _walk(root: str, include: list[str], exclude: list[str], out: Path) -> Iterator[str]:
    def any_match(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and not any_match(name, exclude) and Path(folder, name).resolve() != out
        )
        for name in sorted(files):
            path = os.path.join(folder, name)
            wanted = any_match(name, include or ["*"]) and not any_match(name, exclude) and not name.startswith(".")
            if wanted and os.path.isfile(path):
                yield path


def main(argv: list[str] | None = None) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    args = arguments(argv)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} is not positive")
    if args.tokenizer and os.path.isdir(os.path.join(args.tokenizer, "checkpoints")):
        from mdmtrain.checkpoint import store

        args.tokenizer = str(store.find(args.tokenizer))
    options = Options(args.tokenizer, args.vocab_size, args.validation_fraction, args.shard_tokens, args.bad_utf8)
    inputs = find_inputs(args.inputs, args.include, args.exclude, args.out)
    percent = TextColumn("{task.percentage:>3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total)

        begin = time.monotonic()
        summary = prepare(inputs, args.out, options, args.workers, show)
    print_summary(summary, time.monotonic() - begin)


def print_summary(summary: Summary, seconds: float) -> None:
    """A few lines for a person: what was made, how big, how fast."""
    manifest = summary.manifest
    if summary.already:
        print(f"already prepared: {summary.out} (same inputs and options; fingerprint {manifest['fingerprint'][:12]})")
        return
    for split, content in manifest["splits"].items():
        learned = content.get("response_tokens")  # with eos
        text_tokens = learned - content["documents"] if learned else content["tokens"] - 2 * content["documents"]
        print(
            f"{split:<10} {content['tokens']:>15,} tokens  {content['bytes']:>15,} bytes  "
            f"{content['bytes'] / text_tokens:.2f} bytes/token  "
            f"{content['documents']:>10,} documents  {len(content['shards'])} shards"
            + (f"  {learned:,} tokens of responses" if learned else "")
        )
    for reason, count in sorted(summary.skipped.items()):
        print(f"left out   {count:,} documents: {reason}")
    print(f"vocabulary {manifest['tokenizer']['vocab_size']:,} pieces, {manifest['dtype']}")
    print(f"prepared   {summary.out} (fingerprint {manifest['fingerprint'][:12]}) in {seconds:.1f} s")


def _stop(number: int, _frame: object) -> None:
    for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(again, signal.SIG_IGN)  # let the clean-up finish
    print("stopped: nothing was written", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number, _stop)
    from mdmtrain.monitor.logs import user_errors

    with user_errors():
        main()
