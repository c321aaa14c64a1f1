"""One reader for all inputs of all commands: what is accepted, what is refused, what is left out.

A record is a JSON object on a line of its own, a row of a table, or a text file as {"text": ...}. `read_records` gives
each to a function that makes something of it and may find it bad; --on-bad-record says whether this is an error or a
number in a summary.
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
if TYPE_CHECKING:  # it needs pyarrow, which only the reading of tables imports
    from mdmtrain.data.columns import Table

LONGEST_TEXT = 1 << 18  # bytes; a longer text file becomes several documents, cut at line ends
LINE_END = re.compile(rb"\r\n|\r|\n")
OnBadRecord = Literal["error", "skip"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Fields:
    """In which fields of a record its document is; None: in 'text', or in 'prompt' and 'response'.

    A dot leads into an object, unless there is a field with the whole name.
    """

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None  # a conversation, of which the last message is the response
    template: Template = PLAIN  # writes out the messages before it

    def __post_init__(self) -> None:
        given = [option for option, there in self._options().items() if there]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: a document is made from one of them")

    def _options(self) -> dict[str, bool]:
        return {
            "--field": self.text is not None,
            "--prompt-field or --response-field": self.prompt is not None or self.response is not None,
            "--messages-field": self.messages is not None,
        }

    def prompts(self) -> bool | None:
        """Whether documents have a prompt, as far as the options say it."""
        return self.text is None if any(self._options().values()) else None

    def pair(self) -> tuple[str, str]:
        return self.prompt or "prompt", self.response or "response"


USUAL_FIELDS = Fields()


@dataclass(frozen=True)
class Ids:
    """What is needed to read files of token ids."""

    tokenizer: str  # that made them, as `Tokenizer.load` takes it
    tiktoken_pattern: str | None = None
    dtype: TokenType | None = None  # of files without a header


@dataclass
class Reading:
    """How inputs are read, and what was left out so far."""

    on_bad_record: OnBadRecord = "error"
    format: FormatOption = "auto"
    fields: Fields = USUAL_FIELDS
    ids: Ids | None = None  # None: files of ids are refused
    left_out: Counter[str] = field(default_factory=Counter)  # records, by reason
    files: Counter[Kind] = field(default_factory=Counter)  # inputs that were opened, by what they are

    def summary(self) -> list[str]:
        """A line for each reason, for a person."""
        return [f"left out {count:,} records: {reason}" for reason, count in sorted(self.left_out.items())]


def add_bad_record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-bad-record",
        "--bad-utf8",  # its name when it knew no other fault
        choices=get_args(OnBadRecord),
        default="error",
        help="a record or text that cannot be used: stop and name it, or leave it out and count it, by reason "
        "(default: %(default)s). A file that is damaged or in a format that is not read is an error in any case",
    )


def add_format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=get_args(FormatOption),
        default="auto",
        help="what inputs are: text, one JSON object a line, or whichever their names and contents say "
        "(default: %(default)s)",
    )


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=get_args(TokenType),
        help="take .bin and .npy files without a header as token ids of this type (OLMo-core, nanoGPT: uint16 or "
        "uint32), made by --tokenizer; files with a header or an index (NumPy, llm.c, Megatron) say it themselves",
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
        help="the field or column with a conversation, a list of objects with 'role' and 'content': the last message, "
        "which must be the assistant's, is the response, and those before it are the prompt, written out with the chat "
        "template of --tokenizer, or a plain one where it has none",
    )


class BadRecord(Exception):
    """A record that cannot be used. `reason` is what it is counted under, `line` counts from where it begins."""

    def __init__(self, reason: str, explanation: str = "", line: int = 0):
        super().__init__(reason + explanation)
        self.reason, self.line = reason, line


class EmptyRecord(BadRecord):
    """Nothing in it: left out and counted, never an error."""

    def __init__(self) -> None:
        super().__init__("empty")


class Place(NamedTuple):
    """Where a record stands."""

    file: str
    line: int  # of the record, or the first one of the text
    record: bool  # whether it is a line of JSON

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def read_records(
    source: Input,
    reading: Reading,
    make: Callable[[dict[str, Any]], Made],
    lines: bool = False,
    columns: Callable[["Table"], Sequence[str]] | None = None,
) -> Iterator[tuple[Made, Place, int]]:
    """What `make` makes of each record, where that stands, and how many bytes of the input (on disk) were read so far.

    make: raises BadRecord. lines: every line of a text file is a record, without its line end (LF, CRLF or CR), but for
    blank ones. columns: gives those of a table that `make` needs; all where it is None. Raises ValueError naming the
    file and the line.
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


_Record = tuple[int, Callable[[], dict[str, Any]], int]  # its number, its fields (raises BadRecord), bytes read so far


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
    """The table of an input that is one. Raises ValueError where it is damaged."""
    from mdmtrain.data.columns import Table

    return Table(source.name, opened.kind, opened.raw)


class IdRecord(dict):
    """The record of a document that is ids already: its text is what they decode to."""

    ids: np.ndarray


def _decoded(ids: np.ndarray, tokenizer: Tokenizer) -> IdRecord:
    record = IdRecord(text=tokenizer.decode(ids.tolist()))
    record.ids = ids
    return record


@contextmanager
def _open_ids(source: Input, opened: Opened, reading: Reading) -> Iterator[tuple[TokenFile, Tokenizer]]:
    """A file of ids, and the tokenizer that made them. Raises ValueError."""
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
    """(number of its first line, content) of each record."""
    if opened.kind == "jsonl":
        yield from enumerate(opened.stream, 1)
    elif lines:
        number = 0
        for block in opened.stream:  # up to an LF: CR alone may end lines inside
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
    """A text in pieces of at most LONGEST_TEXT bytes, cut at line ends or at characters."""
    rest = b""
    while True:
        block = rest + stream.read(LONGEST_TEXT - len(rest))
        if len(block) < LONGEST_TEXT:
            break
        cut = block.rfind(b"\n") + 1
        if not cut:  # before the last character, which may go on in the next block
            cut = len(block) - 1
            while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:
                cut -= 1
        yield block[:cut]
        rest = block[cut:]
    if block:
        yield block


def _text(content: bytes) -> str:
    """Content decoded. Raises BadRecord."""
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
    """The object on a line. Raises BadRecord."""
    line = line.removeprefix(BOM).strip()  # files put end to end have byte order marks inside
    if not line:
        raise EmptyRecord
    text = _text(line)
    try:
        found = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        more = error.pos < len(text) and error.msg == "Extra data"
        hint = f"{text[error.pos : error.pos + 12]!r} follows the object" if more else error.msg
        if not more and error.pos >= len(text) - 1:
            hint += ": cut off, or spread over several lines?"
        raise BadRecord("not JSON", f" ({hint}): every line must be one JSON object") from None
    except RecursionError:
        raise BadRecord("nested too deeply", ": every line must be one JSON object of less depth") from None
    except ValueError:  # Python's own limit, which keeps such a number from taking hours
        limit = f"{sys.get_int_max_str_digits():,}"
        raise BadRecord("a number too large", f" (over {limit} digits): write it as a string, or remove it") from None
    if not isinstance(found, dict):
        raise BadRecord("not a JSON object", f" but {_kind(found)}: every line must be one")
    if isinstance(found, _Repeated):
        raise BadRecord("a field twice", f" ({found.names()}): only one of the two could be kept")
    return found


class _Repeated(dict):
    """An object with a name that occurs twice."""

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
    """The text of a field. wanted: what the record should look like, for the BadRecord that this raises."""
    value = _value(fields, name)
    if isinstance(value, bytes):  # of a binary column
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
    """The value of a field, into objects at the dots of its name; None where there is none."""
    if name in fields or "." not in name:
        return fields.get(name)
    value: Any = fields
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def present(fields: dict[str, Any], *names: str) -> list[str]:
    """Those of the names that are fields with a value: null stands for a field that is not there."""
    return [name for name in names if fields.get(name) is not None]


# ---- documents


class Document(NamedTuple):
    text: str  # all of it, or the response to the prompt
    prompt: str | None = None  # never masked in training
    file: str = ""
    line: int = 0  # of the record in the file (a row's number, in a table), or of the text's beginning
    record: bool = False  # whether it is a line of JSON or a row
    ids: np.ndarray | None = None  # made elsewhere, without bos and eos: int64
    specials: Spans = ()  # [start, end) in the prompt of what is a special token and not text

    def hash(self) -> int:
        """63 bits that documents share which differ in white space, case or the encoding of characters alone."""
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
    """The last message of a conversation as the response to those before it."""
    assert fields.messages is not None, "not asked for conversations"
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
    """The columns of a table that documents are made from. Raises ValueError where they are not there, or no text."""
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
    """The documents of one input, each with the bytes of the input (as it lies on disk) that were read so far.

    A jsonl file has one a line, a table one a row, a text file is one (or several where it is long, or with `lines`).
    prompts: whether all must have one; None: as the first does. Raises ValueError naming the file and the line of what
    cannot be read or is of the other kind.
    """
    make = partial(as_document, fields=reading.fields)
    columns = partial(columns_of, fields=reading.fields)
    for document, place, position in read_records(source, reading, make, lines, columns):
        prompts = document.prompt is not None if prompts is None else prompts
        if prompts != (document.prompt is not None):
            mixed = "plain text among prompts and responses" if prompts else "a prompt among plain text"
            raise ValueError(f"{place}: {mixed}: give each kind by itself")
        yield document._replace(**place._asdict()), position


def _check_first(source: Input, file: TokenFile, tokenizer: Tokenizer) -> None:
    """Warn where the first document of a file of ids does not come back from its text: these may be ids of another."""
    ids: list[int] = next((document.tolist() for document in file.documents() if len(document)), [])
    same = Counter(ids) & Counter(tokenizer.encode(tokenizer.decode(ids)))
    if same.total() < 0.8 * len(ids) - 2:  # the first word may have been another piece
        log.warning(
            "%s: the text of its first document has other tokens: is --tokenizer the one that made the ids?",
            source.name,
        )


def check_inputs(inputs: Sequence[Input], reading: Reading) -> None:
    """Find what stands in the way of reading the inputs, as far as their beginnings and the schemas of tables show it.

    Raises ValueError naming the file: what `open_input` refuses, a table without the columns that documents are made
    from, prompts in one and plain text in another, ids that do not come from the tokenizer.
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
                    f"{source.name} has {' and '.join(columns)}, but {first[0]} has {' and '.join(first[1])}: give "
                    "each kind by itself, or name the field: see --field"
                )
            first = first or (source.name, columns)
