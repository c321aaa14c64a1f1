"""The options of a preparation, as a dataclass and as command-line options."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mdmtrain.data.chat import PLAIN
from mdmtrain.data.inputs import FormatOption, Input, find_inputs, named_in
from mdmtrain.data.records import (
    LONGEST_TEXT,
    USUAL_FIELDS,
    Fields,
    Ids,
    OnBadRecord,
    Reading,
    add_bad_record_option,
    add_dtype_option,
    add_field_options,
    add_format_option,
)
from mdmtrain.data.tiktoken_files import ENCODINGS
from mdmtrain.data.tokenized import TokenType
from mdmtrain.data.tokenizer import chat_template


@dataclass(frozen=True)
class Options:
    """The options of a preparation: everything except its inputs."""

    tokenizer: str | None = None  # a tokenizer's file, or a folder with one; None: train one
    vocab_size: int = 32_768  # number of pieces, if a tokenizer is trained
    validation_fraction: float = 0.01  # share of the documents, chosen by their hash
    shard_tokens: int = 100_000_000  # maximum number of tokens in a shard (one document may be longer)
    on_bad_record: OnBadRecord = "error"
    format: FormatOption = "auto"
    fields: Fields = USUAL_FIELDS
    tiktoken_pattern: str | None = None  # for a tokenizer that is a rank file of tiktoken
    dtype: TokenType | None = None  # type of the ids in files of token ids without a header
    part_bytes: int = 1 << 30  # maximum bytes of input files, on disk, in a part (one file may be larger)
    dedup: bool = False  # leave out documents with the same text as an earlier one
    min_chars: int | None = None  # minimum characters of a document, its prompt included
    max_chars: int | None = None  # maximum characters, its prompt included

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation-fraction {self.validation_fraction} is not between 0 and 1")
        for option, number in (
            ("--shard-tokens", self.shard_tokens),
            ("--part-bytes", self.part_bytes),
            ("--min-chars", self.min_chars),
            ("--max-chars", self.max_chars),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{option} {number} is not positive")
        if self.max_chars is not None and self.max_chars < (self.min_chars or 0):
            raise ValueError(f"--max-chars {self.max_chars} is less than --min-chars {self.min_chars}")
        if self.dtype and not self.tokenizer:
            raise ValueError("--dtype is only for files of token ids: give the --tokenizer that made them")

    def reading(self) -> Reading:
        ids = Ids(self.tokenizer, self.tiktoken_pattern, self.dtype) if self.tokenizer else None
        return Reading(self.on_bad_record, self.format, self.fields, ids)

    def content(self, tokenizer_sha256: str | None) -> dict[str, Any]:
        """The options that the content of a folder depends on, as JSON.

        Options that were added later are included only if they differ from their default, so that the identity of older
        folders does not change. tokenizer_sha256: the hash of the given tokenizer, None if there is none.
        """
        settings = asdict(self)
        for name in ("fields", "dtype", "part_bytes", "dedup", "min_chars", "max_chars"):
            if getattr(self, name) == getattr(Options, name):
                del settings[name]
        del settings["tiktoken_pattern"]  # the tokenizer's hash covers it
        if tokenizer_sha256:
            settings["tokenizer"] = tokenizer_sha256
            del settings["vocab_size"]
        return settings


def add_options(parser: argparse.ArgumentParser, standard_input: bool) -> None:
    """Add the inputs and options of a preparation to a parser; `read_options` reads them.

    standard_input: whether the command can read an input that can be read only once.
    """
    add = parser.add_argument
    places = "folder, quoted glob (** for any depth), or - for standard input"
    if not standard_input:
        places = "folder, or quoted glob (** for any depth)"
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text file, file with one JSON object on each line (.jsonl, .ndjson, .json, or any file that begins with "
        f"a JSON object), Parquet or Arrow file, {places}. Text and JSON files may be compressed (.gz, .zst, .bz2, "
        ".xz). A JSON object or a row has either a 'text' field, which is one document, or the fields 'prompt' and "
        "'response'. Prompts are never masked in training, and sizes in bytes count only the responses. A text file "
        "is one document; it is cut at a line end every "
        f"{LONGEST_TEXT:,} bytes. In folders, links are followed and hidden files are not read. An input can also be a "
        "URL of a file, folder or glob (s3://, gs://, hf://datasets/, https://). docs/data.md has the details",
    )
    add("--inputs-from", type=Path, metavar="FILE", help="text file with more inputs, one INPUT on each line")
    add("--out", required=True, type=Path, metavar="DIR", help="prepared folder to make; it appears only when complete")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="use an existing tokenizer: a prepared folder, a run, a checkpoint or a model folder that contains one, "
        "or a tokenizer.json, a sentencepiece model or a rank file of tiktoken. docs/tokenizers.md says which are "
        "accepted",
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
        help="needed if --tokenizer is a rank file of tiktoken whose name is not the name of its encoding: the "
        f"encoding's name ({', '.join(ENCODINGS)}), or the regular expression that splits the text",
    )
    add("--include", nargs="+", default=[], metavar="PATTERN", help="in folders, read only files that match ('*.py')")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="in folders, skip files and folders that match")
    add(
        "--validation-fraction",
        type=float,
        default=Options.validation_fraction,
        metavar="F",
        help="share of the documents, chosen by their hash, that is used for validation (default %(default)s)",
    )
    add(
        "--dedup",
        action="store_true",
        help="leave out documents whose text is exactly the text of an earlier document, in the order of the inputs",
    )
    add("--min-chars", type=int, metavar="N", help="leave out documents with fewer characters (prompt included)")
    add("--max-chars", type=int, metavar="N", help="leave out documents with more characters (prompt included)")
    add(
        "--shard-tokens",
        type=int,
        default=Options.shard_tokens,
        metavar="N",
        help="maximum number of tokens in a shard file (default %(default)s)",
    )
    add(
        "--part-bytes",
        type=int,
        default=Options.part_bytes,
        metavar="N",
        help="prepare the inputs in parts of at most N bytes, measured on disk; a file is never divided between parts. "
        "If the preparation is stopped, finished parts are kept (default %(default)s)",
    )
    add_field_options(parser)
    add_format_option(parser)
    add_dtype_option(parser)
    add_bad_record_option(parser)


def read_options(args: argparse.Namespace) -> tuple[list[Input], Options]:
    """The inputs and options given on a command line. Raises ValueError."""
    template = chat_template(args.tokenizer) if args.messages_field and args.tokenizer else PLAIN
    options = Options(
        args.tokenizer,
        args.vocab_size,
        args.validation_fraction,
        args.shard_tokens,
        args.on_bad_record,
        args.format,
        Fields(args.field, args.prompt_field, args.response_field, args.messages_field, template),
        args.tiktoken_pattern,
        args.dtype,
        args.part_bytes,
        args.dedup,
        args.min_chars,
        args.max_chars,
    )
    names = [*args.inputs, *(named_in(args.inputs_from) if args.inputs_from else [])]
    if not names:
        raise ValueError("no input: give files, folders or URLs, or --inputs-from FILE")
    return find_inputs(names, args.include, args.exclude, args.out), options
