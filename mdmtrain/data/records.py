"""Read the records of an input. All commands use this module, so they accept, refuse and skip the same records.

A record is a JSON object on one line, a row of a table, or a text file as {"text": ...}. `read_records` passes each
record to a function that makes something of it, or raises BadRecord. --on-bad-record decides whether a bad record is an
error or is skipped and counted.
"""

import argparse
import hashlib
import json
import logging
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeVar, get_args

import numpy as np

from mdmtrain.data.chat import PLAIN, Spans, Template
from mdmtrain.data.inputs import BOM, FormatOption, Input, Kind, Opened, has_control_characters, open_input
from mdmtrain.data.tokenized import TokenFile, TokenType
from mdmtrain.data.tokenizer import Tokenizer

log = logging.getLogger("mdmtrain")
if TYPE_CHECKING:  # needs pyarrow, which is imported only to read tables
    from mdmtrain.data.columns import Table

LONGEST_TEXT = 1 << 18  # bytes; a longer text file is split into several documents at line ends
LINE_END = re.compile(rb"\r\n|\r|\n")
OnBadRecord = Literal["error", "skip"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Fields:
    """The fields of a record that contain its document. None: 'text', or 'prompt' and 'response'.

    `a.b` is the field b of the object a, unless a field is named `a.b`.
    """

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None  # the field with a conversation; its last message is the response
    template: Template = PLAIN  # converts the other messages to the prompt

    def __post_init__(self) -> None:
        given = [option for option, there in self._options().items() if there]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} cannot be combined: a document is made from one of them")

    def _options(self) -> dict[str, bool]:
        return {
            "--field": self.text is not None,
            "--prompt-field or --response-field": self.prompt is not None or self.response is not None,
            "--messages-field": self.messages is not None,
        }

    def prompts(self) -> bool | None:
        """Whether documents have a prompt, or None if the options do not decide it."""
        return self.text is None if any(self._options().values()) else None

    def pair(self) -> tuple[str, str]:
        return self.prompt or "prompt", self.response or "response"


USUAL_FIELDS = Fields()


@dataclass(frozen=True)
class Ids:
    """What is needed to read files of token ids."""

    tokenizer: str  # the tokenizer that made the ids, as `Tokenizer.load` takes it
    tiktoken_pattern: str | None = None
    dtype: TokenType | None = None  # dtype of files without a header


@dataclass
class Reading:
    """How inputs are read, and how many records were skipped so far."""

    on_bad_record: OnBadRecord = "error"
    format: FormatOption = "auto"
    fields: Fields = USUAL_FIELDS
    ids: Ids | None = None  # None: files of token ids are refused
    left_out: Counter[str] = field(default_factory=Counter)  # number of skipped records by reason
    files: Counter[Kind] = field(default_factory=Counter)  # number of opened inputs by kind

    def summary(self) -> list[str]:
        """One line of text for each reason."""
        return [f"left out {count:,} records: {reason}" for reason, count in sorted(self.left_out.items())]


def add_bad_record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-bad-record",
        "--bad-utf8",  # its former name, from when it applied only to bad UTF-8
        choices=get_args(OnBadRecord),
        default="error",
        help="what to do with a record or text that cannot be used: stop with an error, or skip and count it "
        "(default: %(default)s). A damaged file, or one in an unsupported format, is always an error",
    )


def add_format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=get_args(FormatOption),
        default="auto",
        help="format of the inputs: text, JSON lines, or auto, which decides by their names and contents "
        "(default: %(default)s)",
    )


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=get_args(TokenType),
        help="read .bin and .npy files without a header as token ids of this type (OLMo-core, nanoGPT: uint16 or "
        "uint32), made by --tokenizer; files with a header or an index (NumPy, llm.c, Megatron) specify the type",
    )


def add_field_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--field",
        metavar="NAME",
        help="the field or column with the text of a document (default: text); a.b is the field b of the object a",
    )
    add("--prompt-field", metavar="NAME", help="the field or column with the prompt (default: prompt)")
    add("--response-field", metavar="NAME", help="the field or column with the response to it (default: response)")
    add(
        "--messages-field",
        metavar="NAME",
        help="the field or column with a conversation, a list of objects with 'role' and 'content'. The last message, "
        "which must be the assistant's, is the response. The others are the prompt, formatted with the chat "
        "template of --tokenizer, or with a plain one if it has none",
    )


class BadRecord(Exception):
    """A record that cannot be used, counted under `reason`. `line` is relative to the first line of the record."""

    def __init__(self, reason: str, explanation: str = "", line: int = 0):
        super().__init__(reason + explanation)
        self.reason, self.line = reason, line


class EmptyRecord(BadRecord):
    """A record without content. It is always skipped and counted, never an error."""

    def __init__(self) -> None:
        super().__init__("empty")


class Place(NamedTuple):
    """The location of a record."""

    file: str
    line: int  # of the record, or the first line of the text
    record: bool  # whether the record is a line of JSON or a row

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def read_records(
    source: Input,
    reading: Reading,
    make: Callable[[dict[str, Any]], Made],
    lines: bool = False,
    columns: Callable[["Table"], Sequence[str]] | None = None,
) -> Iterator[tuple[Made, Place, int]]:
    """Yields for each record: the result of `make`, the location, and the number of bytes of the input read so far.

    The bytes are those of the stored file. make: may raise BadRecord. lines: every line of a text file that is not
    blank is a record, without its line end (LF, CRLF or CR). columns: returns the columns of a table that `make` needs;
    None: all. Raises ValueError that names the file and the line.
    """
    with _open(source, reading) as opened:
        reading.files[opened.kind] += 1
        number = 0
        for number, fields, position in _records(source, opened, reading, lines, columns):
            place = Place(source.name, number, opened.kind != "text")
            try:
                made = make(fields())
            except BadRecord as bad:
                if reading.on_bad_record == "error" and not isinstance(bad, EmptyRecord):
                    why = " (read as JSON lines, because the file begins with a JSON object)"
                    place = place._replace(line=place.line + bad.line)
                    raise ValueError(f"{place}: {bad}{why if opened.by_content else ''}") from None
                reading.left_out[bad.reason] += 1
                continue
            yield made, place, position
        if not number and not lines:
            reading.left_out["empty"] += 1


_Record = tuple[int, Callable[[], dict[str, Any]], int]  # number, function that returns the fields, bytes read so far


def _open(source: Input, reading: Reading) -> AbstractContextManager[Opened]:
    return open_input(source, reading.format, reading.ids is not None and reading.ids.dtype is not None)


def _records(
    source: Input,
    opened: Opened,
    reading: Reading,
    lines: bool,
    columns: Callable[["Table"], Sequence[str]] | None,
) -> Iterator[_Record]:
    if opened.kind in ("text", "jsonl"):
        parse = _json_object if opened.kind == "jsonl" else lambda content: {"text": _text(content)}
        for number, content in _contents(opened, lines):
            yield number, partial(parse, content), opened.raw.tell()
        return
    if opened.kind == "tokens":
        with _open_ids(source, opened, reading) as (file, tokenizer):
            for number, ids in enumerate(file.documents(), 1):
                yield number, partial(_decoded, ids, tokenizer), opened.raw.tell()
        return
    table = open_table(source, opened)
    size = source.size
    for number, (row, share) in enumerate(table.rows(columns and columns(table)), 1):
        yield number, partial(_row, row), int(share * size)


def open_table(source: Input, opened: Opened) -> "Table":
    """Open a table. Raises ValueError if it is damaged."""
    from mdmtrain.data.columns import Table

    return Table(source.name, opened.kind, opened.raw)


class IdRecord(dict):
    """A record that is stored as token ids. Its text is the decoded ids."""

    ids: np.ndarray


def _decoded(ids: np.ndarray, tokenizer: Tokenizer) -> IdRecord:
    record = IdRecord(text=tokenizer.decode(ids.tolist()))
    record.ids = ids
    return record


@contextmanager
def _open_ids(source: Input, opened: Opened, reading: Reading) -> Iterator[tuple[TokenFile, Tokenizer]]:
    """A file of token ids, and the tokenizer that made them. Raises ValueError."""
    if reading.ids is None:
        raise ValueError(
            f"{source.name}: token ids, not text: tools/prepare_data.py reads them with the --tokenizer that made them"
        )
    tokenizer = _loaded(reading.ids.tokenizer, reading.ids.tiktoken_pattern)
    index = source.index()
    with index.open() if index else nullcontext() as stream:
        file = TokenFile(source.name, opened.raw, stream, reading.ids.dtype, tokenizer)
    yield file, tokenizer


_loaded = lru_cache(maxsize=1)(Tokenizer.load)


def _row(row: dict[str, Any] | UnicodeDecodeError) -> dict[str, Any]:
    """The fields of a row. Raises BadRecord."""
    if isinstance(row, UnicodeDecodeError):
        raise _not_utf8(row, "")
    return row


def _contents(opened: Opened, lines: bool) -> Iterator[tuple[int, bytes]]:
    """The number of the first line and the content of each record."""
    if opened.kind == "jsonl":
        yield from enumerate(opened.stream, 1)
    elif lines:
        number = 0
        for block in opened.stream:  # a block ends with LF; inside it, CR alone may end lines
            for line in LINE_END.split(block.removesuffix(b"\n").removesuffix(b"\r")):
                number += 1
                if line.strip():
                    yield number, line
    else:
        number = 1
        for piece in _pieces(opened.stream):
            yield number, piece
            number += piece.count(b"\n")


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    """Split a text into pieces of at most LONGEST_TEXT bytes, at line ends, or else between characters."""
    rest = b""
    while True:
        block = rest + stream.read(LONGEST_TEXT - len(rest))
        if len(block) < LONGEST_TEXT:
            break
        cut = block.rfind(b"\n") + 1
        if not cut:  # cut before the last character, which may continue in the next block
            cut = len(block) - 1
            while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:
                cut -= 1
        yield block[:cut]
        rest = block[cut:]
    if block:
        yield block


def _text(content: bytes) -> str:
    """Decode the content. Raises BadRecord."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        if has_control_characters(content):
            raise BadRecord("binary data", ", not text: leave the file out with --exclude", line) from None
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise _not_utf8(error, f", byte {column} of the line", line) from None


def _not_utf8(error: UnicodeDecodeError, where: str, line: int = 0) -> BadRecord:
    what = f" text ({error.reason} 0x{error.object[error.start]:02x}{where})"
    return BadRecord("not UTF-8", f"{what}: convert the file, leave it out, or give --on-bad-record skip", line)


def _json_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises BadRecord."""
    line = line.removeprefix(BOM).strip()  # concatenated files have byte order marks inside
    if not line:
        raise EmptyRecord
    text = _text(line)
    try:
        found = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        more = error.pos < len(text) and error.msg == "Extra data"
        hint = f"{text[error.pos : error.pos + 12]!r} follows the object" if more else error.msg
        if not more and error.pos >= len(text) - 1:
            hint += ": truncated, or spread over several lines?"
        raise BadRecord("not JSON", f" ({hint}): every line must be one JSON object") from None
    except RecursionError:
        raise BadRecord("nested too deeply", ": every line must be one JSON object with fewer levels") from None
    except ValueError:  # Python limits the digits of an integer, because converting a very long one takes hours
        limit = f"{sys.get_int_max_str_digits():,}"
        raise BadRecord("a number too large", f" (over {limit} digits): write it as a string, or remove it") from None
    if not isinstance(found, dict):
        raise BadRecord("not a JSON object", f" but {_kind(found)}: every line must be one")
    if isinstance(found, _Repeated):
        raise BadRecord("a field twice", f" ({found.names()}): only one of the two could be kept")
    return found


class _Repeated(dict):
    """A JSON object in which a name occurs twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self._counts = Counter(name for name, _ in pairs)

    def names(self) -> str:
        return ", ".join(repr(name) for name, count in self._counts.items() if count > 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(pairs)


def _float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise BadRecord("a number too large", f" ({digits[:20]}): write it as a string, or remove it")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float)


def _kind(value: object) -> str:
    names = {type(None): "null", str: "a string", list: "an array", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number")


def string_field(fields: dict[str, Any], name: str, wanted: str) -> str:
    """The text of a field. wanted: the expected form of the record, for the message of the BadRecord that is raised."""
    value = _value(fields, name)
    if isinstance(value, bytes):  # from a binary column
        value = _text(value)
    if not isinstance(value, str):
        found = "" if value is None and name not in fields else f": it is {_kind(value)}"
        raise BadRecord(f"no {name!r} field with a string", f"{found}: {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRecord("half a surrogate pair", f" ({half}) in {name!r}, not UTF-8 text: repair the record") from None
    return value


def _value(fields: dict[str, Any], name: str) -> Any:
    """The value of a field, or None. Dots in the name lead into objects."""
    if name in fields or "." not in name:
        return fields.get(name)
    value: Any = fields
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def present(fields: dict[str, Any], *names: str) -> list[str]:
    """The names of those fields that exist and are not null."""
    return [name for name in names if fields.get(name) is not None]


# ---- documents


class Document(NamedTuple):
    text: str  # the whole text, or the response to the prompt
    prompt: str | None = None  # never masked in training
    file: str = ""
    line: int = 0  # of the record in the file (of a table: the row), or the first line of the text
    record: bool = False  # whether the record is a line of JSON or a row
    ids: np.ndarray | None = None  # set if the document is stored as ids: int64, without bos and eos
    specials: Spans = ()  # [start, end) of the special tokens in the prompt

    def hash(self) -> int:
        """63 bits, equal for documents that differ only in white space, case or the encoding of characters."""
        parts = [self.text] if self.prompt is None else [self.prompt, self.text]
        composed = (part if part.isascii() else unicodedata.normalize("NFKC", part) for part in parts)
        normal = "\0".join(" ".join(part.casefold().split()) for part in composed)
        return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big") >> 1


def as_document(record: dict[str, Any], fields: Fields = USUAL_FIELDS) -> Document:
    """The document in a record. Raises BadRecord."""
    if isinstance(record, IdRecord):
        document = Document(record["text"], ids=record.ids)
    elif fields.messages is not None:
        document = _conversation(record, fields)
    elif fields.prompts() is None:
        wanted = "every record (a JSON object or a row) must have a 'text' field, or 'prompt' and 'response'"
        wanted += ": otherwise name the fields, see --field"
        given = present(record, "text", "prompt", "response")
        if len(given) == 3:
            raise BadRecord("both a 'text' and a 'prompt' with its 'response'", ": remove one of the two")
        document = _plain(record, "text", wanted) if "text" in given or not given else _pair(record, fields, wanted)
    elif fields.text is not None:
        document = _plain(record, fields.text, "every record must have it, or give --on-bad-record skip")
    else:
        document = _pair(record, fields, "every record must have it, or give --on-bad-record skip")
    if not document.text and not (document.ids is not None and len(document.ids)):
        raise EmptyRecord
    return document


def _plain(record: dict[str, Any], name: str, wanted: str) -> Document:
    return Document(string_field(record, name, wanted))


def _pair(record: dict[str, Any], fields: Fields, wanted: str) -> Document:
    prompt, response = (string_field(record, name, wanted) for name in fields.pair())
    return Document(response, prompt)


def _conversation(record: dict[str, Any], fields: Fields) -> Document:
    """The last message of a conversation is the response; the other messages are the prompt."""
    assert fields.messages is not None, "no field for conversations is set"
    messages = _value(record, fields.messages)
    wanted = "each must be an object with a 'role' and a 'content', both strings"
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord(f"no {fields.messages!r} field with a list of messages", f": {wanted}")
    turns = [{**m, **{name: string_field(m, name, wanted) for name in ("role", "content")}} for m in messages]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise BadRecord("the last message is not the assistant's response to others")
    try:
        prompt, specials = fields.template.prompt(turns[:-1])
    except ValueError as error:
        raise BadRecord("messages that the chat template refuses", f" ({error})") from None
    return Document(turns[-1]["content"], prompt, specials=specials)


def columns_of(table: "Table", fields: Fields) -> list[str]:
    """The columns of a table from which documents are made. Raises ValueError if they are missing or are not text."""
    if fields.messages is not None:
        table.messages_field(fields.messages)
        return [fields.messages]
    if fields.prompts() is None:
        pair = list(fields.pair()) if set(fields.pair()) <= set(table.schema.names) else []
        names = ["text", *pair] if "text" in table.schema.names or not pair else pair
    else:
        names = [fields.text] if fields.text is not None else list(fields.pair())
    for name in names:
        table.text_field(name)
    return names


def read_documents(
    source: Input, reading: Reading, prompts: bool | None = None, lines: bool = False
) -> Iterator[tuple[Document, int]]:
    """The documents of one input, each with the number of bytes of the stored input that were read so far.

    Each line of a jsonl file and each row of a table is a document. A text file is one document, or several if it is
    long or with `lines`. prompts: whether all documents must have a prompt; None: the first one decides. Raises
    ValueError that names the file and the line of a record that cannot be read or is of the other kind.
    """
    make = partial(as_document, fields=reading.fields)
    columns = partial(columns_of, fields=reading.fields)
    for document, place, position in read_records(source, reading, make, lines, columns):
        prompts = document.prompt is not None if prompts is None else prompts
        if prompts != (document.prompt is not None):
            mixed = "plain text among prompts and responses" if prompts else "a prompt among plain text"
            raise ValueError(f"{place}: {mixed}: prepare the two kinds separately")
        yield document._replace(**place._asdict()), position


def _check_first(source: Input, file: TokenFile, tokenizer: Tokenizer) -> None:
    """Warn if the ids of the first document change when decoded and encoded: another tokenizer may have made them."""
    ids: list[int] = next((document.tolist() for document in file.documents() if len(document)), [])
    same = Counter(ids) & Counter(tokenizer.encode(tokenizer.decode(ids)))
    if same.total() < 0.8 * len(ids) - 2:  # the first word may have been another piece
        log.warning(
            "%s: --tokenizer encodes the text of the first document differently: did it make these ids?",
            source.name,
        )


def check_inputs(inputs: Sequence[Input], reading: Reading) -> None:
    """Find errors early: check the beginning of every input and the schema of every table.

    Raises ValueError that names the file: for what `open_input` refuses, a table without the columns that documents are
    made from, a mix of prompts and plain text, or ids that the tokenizer cannot have made.
    """
    first: tuple[str, list[str]] | None = None
    for source in inputs:
        with _open(source, reading) as opened:
            if opened.kind == "tokens":
                with _open_ids(source, opened, reading) as (file, tokenizer):
                    _check_first(source, file, tokenizer)
            if opened.kind not in ("parquet", "arrow"):
                continue
            columns = columns_of(open_table(source, opened), reading.fields)
            if first and ("text" in columns) != ("text" in first[1]) and reading.fields.prompts() is None:
                raise ValueError(
                    f"{source.name} has {' and '.join(columns)}, but {first[0]} has {' and '.join(first[1])}: "
                    "prepare the two kinds separately, or name the field: see --field"
                )
            first = first or (source.name, columns)
