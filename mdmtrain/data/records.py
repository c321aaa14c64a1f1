"""One reader for text and JSON lines, for all commands: what is accepted, what is refused, what is left out.

A record is a JSON object on a line of its own, or a text file as {"text": ...}. `read_records` gives each to a function
that makes something of it and may find it bad; --on-bad-record says whether this is an error or a number in a summary.
"""

import argparse
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, get_args

from mdmtrain.data.inputs import BOM, FormatOption, Input, Kind, Opened, has_control_characters, open_input

LONGEST_TEXT = 1 << 18  # bytes; a longer text file becomes several documents, cut at line ends
LINE_END = re.compile(rb"\r\n|\r|\n")
OnBadRecord = Literal["error", "skip"]
Made = TypeVar("Made")


@dataclass
class Reading:
    """How inputs are read, and what was left out so far."""

    on_bad_record: OnBadRecord = "error"
    format: FormatOption = "auto"
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
    source: Input, reading: Reading, make: Callable[[dict[str, Any]], Made], lines: bool = False
) -> Iterator[tuple[Made, Place, int]]:
    """What `make` makes of each record, where that stands, and how many bytes of the input (on disk) were read so far.

    make: raises BadRecord. lines: every line of a text file is a record, without its line end (LF, CRLF or CR), but for
    blank ones. Raises ValueError naming the file and the line.
    """
    with open_input(source, reading.format) as opened:
        reading.files[opened.kind] += 1
        number = 0
        for number, content in _contents(opened, lines):
            place = Place(source.name, number, opened.kind == "jsonl")
            try:
                made = make(_json_object(content) if place.record else {"text": _text(content)})
            except BadRecord as bad:
                if reading.on_bad_record == "error" and not isinstance(bad, EmptyRecord):
                    why = " (read as JSON lines, because the file begins with a JSON object)"
                    place = place._replace(line=place.line + bad.line)
                    raise ValueError(f"{place}: {bad}{why if opened.by_content else ''}") from None
                reading.left_out[bad.reason] += 1
                continue
            yield made, place, opened.raw.tell()
        if not number and not lines:
            reading.left_out["empty"] += 1


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
        raise BadRecord(
            "not UTF-8",
            f" text ({error.reason} 0x{content[error.start]:02x}, byte {column} of the line): convert the file, leave "
            "it out, or give --on-bad-record skip",
            line,
        ) from None


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
    value = fields.get(name)
    if not isinstance(value, str):
        found = f": it is {_kind(value)}" if name in fields else ""
        raise BadRecord(f"no {name!r} field with a string", f"{found}: {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRecord("half a surrogate pair", f" ({half}) in {name!r}, not UTF-8 text: repair the record") from None
    return value


def present(fields: dict[str, Any], *names: str) -> list[str]:
    """Those of the names that are fields with a value: null stands for a field that is not there."""
    return [name for name in names if fields.get(name) is not None]


# ---- documents


class Document(NamedTuple):
    text: str  # all of it, or the response to the prompt
    prompt: str | None = None  # never masked in training
    file: str = ""
    line: int = 0  # of the record in the file, or of the text's beginning
    record: bool = False  # whether it is a line of JSON

    def hash(self) -> int:
        """63 bits that documents share which differ in white space, case or the encoding of characters alone."""
        parts = [self.text] if self.prompt is None else [self.prompt, self.text]
        composed = (part if part.isascii() else unicodedata.normalize("NFKC", part) for part in parts)
        normal = "\0".join(" ".join(part.casefold().split()) for part in composed)
        return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big") >> 1


def as_document(fields: dict[str, Any]) -> Document:
    """The document in a record. Raises BadRecord."""
    wanted = "every line must be an object with a 'text' field, or with 'prompt' and 'response'"
    given = present(fields, "text", "prompt", "response")
    if len(given) == 3:
        raise BadRecord("both a 'text' and a 'prompt' with its 'response'", ": remove one of the two")
    if "text" in given or not given:
        document = Document(string_field(fields, "text", wanted))
    else:
        prompt = string_field(fields, "prompt", wanted)
        document = Document(string_field(fields, "response", wanted), prompt)
    if not document.text:
        raise EmptyRecord
    return document


def read_documents(
    source: Input, reading: Reading, prompts: bool | None = None, lines: bool = False
) -> Iterator[tuple[Document, int]]:
    """The documents of one input, each with the bytes of the input (as it lies on disk) that were read so far.

    A jsonl file has one a line, a text file is one (or several where it is long, or with `lines`). prompts: whether all
    must have one; None: as the first does. Raises ValueError naming the file and the line of what cannot be read or is
    of the other kind.
    """
    for document, place, position in read_records(source, reading, as_document, lines):
        prompts = document.prompt is not None if prompts is None else prompts
        if prompts != (document.prompt is not None):
            mixed = "plain text among prompts and responses" if prompts else "a prompt among plain text"
            raise ValueError(f"{place}: {mixed}: give each kind by itself")
        yield document._replace(**place._asdict()), position
