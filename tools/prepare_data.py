#!/usr/bin/env python
"""Turn text into a prepared folder that mdmtrain trains on: a tokenizer, memory-mapped token shards and a manifest.

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
from pathlib import Path

# Worker processes import this file: what they do not need is imported in main.
from mdmtrain.data.chat import PLAIN
from mdmtrain.data.inputs import find_inputs, named_in
from mdmtrain.data.prepare import Options, Summary, prepare
from mdmtrain.data.records import (
    LONGEST_TEXT,
    Fields,
    add_bad_record_option,
    add_dtype_option,
    add_field_options,
    add_format_option,
)
from mdmtrain.data.tiktoken_files import ENCODINGS
from mdmtrain.data.tokenizer import chat_template


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
        nargs="*",
        metavar="INPUT",
        help="text file, file with a JSON object a line (.jsonl, .ndjson, .json, or whatever begins with one), each "
        "also compressed (.gz, .zst, .bz2, .xz), Parquet or Arrow file, folder, quoted glob (** for any depth), or - "
        "for standard input. A JSON object or a row has a 'text' field, which is one document, or 'prompt' and "
        "'response': prompts are never masked in training, and sizes in bytes are those of the responses. A text file "
        f"is one document, cut at line ends every {LONGEST_TEXT:,} bytes. In folders, links are followed and hidden "
        "files are not read. URLs (s3://, gs://, hf://datasets/, https://) name files, folders and globs too. "
        "docs/data.md has the details",
    )
    add("--inputs-from", type=Path, metavar="FILE", help="more inputs: a text file with one INPUT on each line")
    add("--out", required=True, type=Path, metavar="DIR", help="prepared folder to make; appears only when complete")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="use that of a prepared folder, a run, a checkpoint or a model folder, or a tokenizer.json, a "
        "sentencepiece model or a rank file of tiktoken; docs/tokenizers.md says which are accepted",
    )
    kind.add_argument(
        "--vocab-size",
        type=int,
        default=Options.vocab_size,
        metavar="N",
        help="train a tokenizer of N pieces on the text (default %(default)s)",
    )
    add(
        "--tiktoken-pattern",
        metavar="PATTERN",
        help="where --tokenizer is a rank file of tiktoken that is not named like its encoding: the encoding's name "
        f"({', '.join(ENCODINGS)}), or the regular expression at which it splits text",
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
    add_field_options(parser)
    add_format_option(parser)
    add_dtype_option(parser)
    add_bad_record_option(parser)
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="tokenizing processes (default: cores, %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    args = arguments(argv)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} is not positive")
    if args.tokenizer and os.path.isdir(os.path.join(args.tokenizer, "checkpoints")):
        from mdmtrain.checkpoint import store

        args.tokenizer = str(store.find(args.tokenizer))
    template = PLAIN
    if args.messages_field and args.tokenizer:
        template = chat_template(args.tokenizer)
    fields = Fields(args.field, args.prompt_field, args.response_field, args.messages_field, template)
    options = Options(
        args.tokenizer,
        args.vocab_size,
        args.validation_fraction,
        args.shard_tokens,
        args.on_bad_record,
        args.format,
        fields,
        args.tiktoken_pattern,
        args.dtype,
    )
    names = [*args.inputs, *(named_in(args.inputs_from) if args.inputs_from else [])]
    if not names:
        raise ValueError("no input: give files, folders or URLs, or --inputs-from FILE")
    inputs = find_inputs(names, args.include, args.exclude, args.out)
    percent = TextColumn("{task.percentage:>3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total)

        begin = time.monotonic()
        summary = prepare(inputs, args.out, options, args.workers, show)
    print_summary(summary, time.monotonic() - begin)
    if args.messages_field:
        print(f"messages   written out with {'the plain template' if template is PLAIN else 'that of the tokenizer'}")


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
    kinds = {"text": "text", "jsonl": "JSON lines", "parquet": "Parquet", "arrow": "Arrow", "tokens": "token ids"}
    files = [f"{count:,} of {kinds[kind]}" for kind, count in sorted(summary.reading.files.items())]
    print(f"files      {', '.join(files)}")
    for line in summary.reading.summary():
        print(line)
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
    from mdmtrain.command import user_errors

    with user_errors():
        main()
