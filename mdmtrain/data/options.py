"""The options of a preparation: as a value, and as options of a command line."""

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
    """The options that determine a prepared folder, together with its inputs."""

    tokenizer: str | None = None  # path of a tokenizer's file or of a folder that has one; None: train one
    vocab_size: int = 32_768  # number of pieces of a tokenizer that is trained here
    validation_fraction: float = 0.01  # share of the documents; chosen by their hash
    shard_tokens: int = 100_000_000  # largest number of tokens in a shard, if it has more than one document
    on_bad_record: OnBadRecord = "error"
    format: FormatOption = "auto"
    fields: Fields = USUAL_FIELDS
    tiktoken_pattern: str | None = None  # for a tokenizer that is a rank file of tiktoken
    dtype: TokenType | None = None  # of files of token ids without a header
    part_bytes: int = 1 << 30  # largest size of the input files of a part, as stored, if it has more than one
    dedup: bool = False  # skip documents whose text an earlier document has
    min_chars: int | None = None  # of a document with its prompt
    max_chars: int | None = None

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
            raise ValueError("--dtype is for token ids: give the --tokenizer that made them")

    def reading(self) -> Reading:
        ids = Ids(self.tokenizer, self.tiktoken_pattern, self.dtype) if self.tokenizer else None
        return Reading(self.on_bad_record, self.format, self.fields, ids)

    def content(self, tokenizer_sha256: str | None) -> dict[str, Any]:
        """The options that a folder's content depends on, as JSON. tokenizer_sha256: of a tokenizer that is given.

        Newer options are included only if they are used, so that the values of older folders do not change.
        """
        settings = asdict(self)
        for name in ("fields", "dtype", "part_bytes", "dedup", "min_chars", "max_chars"):
            if getattr(self, name) == getattr(Options, name):
                del settings[name]
        del settings["tiktoken_pattern"]  # it is contained in the tokenizer
        if tokenizer_sha256:
            settings["tokenizer"] = tokenizer_sha256
            del settings["vocab_size"]
        return settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a preparation and its inputs. `read_options` reads them."""
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text file, file with one JSON object per line (.jsonl, .ndjson, .json, or a file that begins with one), "
        "each also as .gz, .zst, .bz2 or .xz, Parquet or Arrow file, folder, quoted glob (** for any depth), or - "
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
        help="use the tokenizer of a prepared folder, run, checkpoint or model folder, or a tokenizer.json, a "
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
        help="for a --tokenizer that is a rank file of tiktoken and not named like its encoding: the encoding's name "
        f"({', '.join(ENCODINGS)}), or the regular expression by which it splits text",
    )
    add("--include", nargs="+", default=[], metavar="PATTERN", help="in folders, read only files so named ('*.py')")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="in folders, skip files and folders so named")
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
        help="skip documents with exactly the text of an earlier one, in the order of the inputs",
    )
    add("--min-chars", type=int, metavar="N", help="skip documents of fewer characters, their prompts included")
    add("--max-chars", type=int, metavar="N", help="skip documents of more characters, their prompts included")
    add(
        "--shard-tokens",
        type=int,
        default=Options.shard_tokens,
        metavar="N",
        help="largest number of tokens in a shard file (default %(default)s)",
    )
    add(
        "--part-bytes",
        type=int,
        default=Options.part_bytes,
        metavar="N",
        help="largest size of a part of the inputs, in stored bytes; a file is never divided, and finished parts are "
        "kept if the preparation is stopped (default %(default)s)",
    )
    add_field_options(parser)
    add_format_option(parser)
    add_dtype_option(parser)
    add_bad_record_option(parser)


def read_options(args: argparse.Namespace) -> tuple[list[Input], Options]:
    """The inputs and the options of a command line. Raises ValueError."""
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
