"""Find the inputs of a command, recognise the format of each one, and open it.

The format follows from the name that was given (a link in a Hugging Face cache is called train.jsonl, but the blob it
points to has no ending) and from the first bytes of the content. Endings are compared without regard to case. If name
and content disagree, the content decides: a gzip file is unpacked whatever its name is, and JSON objects are never read
as plain text. A format that cannot be read is refused, and the error names the format. To support another compression,
give its `Format` a `decompress`.
"""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from mdmtrain.data.remote import exists, is_url
from mdmtrain.data.remote_inputs import Remote, remote_file, remote_files
from mdmtrain.data.saved_dataset import data_files, is_dataset
from mdmtrain.data.tokenized import LLM_C, MEGATRON
from mdmtrain.files import sha256

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STANDARD_INPUT = "-"
BOM = b"\xef\xbb\xbf"
HEAD = 1 << 12  # bytes that are read to recognise a format
_BLOCK = 1 << 17  # bytes that are unpacked at once
ID_ENDINGS = {".bin", ".npy"}
RECORD_ENDINGS = {".jsonl", ".ndjson", ".jsonlines", ".json"}
COLUMN_ENDINGS = {".csv": "a CSV file", ".tsv": "a TSV file"}  # tables that are text, and are not read

Kind = Literal["text", "jsonl", "parquet", "arrow", "tokens"]
FormatOption = Literal["auto", "text", "jsonl"]


# ---- find inputs


@dataclass(frozen=True)
class Input:
    """A file (by the name that the user gave), a URL, or the content of standard input or of a pipe."""

    name: str
    spool: BinaryIO | None = None  # an unnamed temporary file with the content of an input that can be read only once
    remote: Remote | None = None  # set if the name is a URL

    @property
    def size(self) -> int:
        """Bytes on disk, or in the object store."""
        if self.remote:
            return self.remote.size
        return os.stat(self.name if self.spool is None else self.spool.fileno()).st_size

    def open(self) -> BinaryIO:
        """A seekable stream of the content, at its first byte."""
        if self.remote:
            return self.remote.open()
        if self.spool is None:
            return open(self.name, "rb")
        descriptor = os.dup(self.spool.fileno())
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.fdopen(descriptor, "rb")

    def index(self) -> "Input | None":
        """The Megatron index (.idx) next to a .bin file, or None."""
        if self.spool or not self.name.endswith(".bin"):
            return None
        beside = f"{self.name.removesuffix('.bin')}.idx"
        there = exists(beside) if self.remote else os.path.isfile(beside)
        return open_name(beside) if there else None

    def identity(self) -> list:
        """Values that differ between this input and any other one, or a later version of this one."""
        index = self.index()
        return self._identity() + (index.identity() if index else [])

    def _identity(self) -> list:
        if self.remote:
            return [self.remote.url, self.remote.size, self.remote.version]
        if self.spool is None:
            return [os.path.abspath(self.name), self.size, os.stat(self.name).st_mtime_ns]
        with self.open() as stream:
            return [self.size, sha256(stream)]


def open_name(name: str | Path) -> Input:
    """The input with this name; "-" is standard input. Pipes are read completely here, into a temporary file.

    Raises ValueError if there is no such file.
    """
    name = str(name)
    if _is_url(name):
        return _behind_url(name, remote_file(name))
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise ValueError("standard input is closed: give a file, or pipe the text in")
        return Input("standard input", _spooled(sys.stdin.buffer))
    if os.path.isfile(name):
        return Input(name)
    if os.path.isdir(name):
        raise ValueError(f"{name}: a folder, not a file: give the files in it")
    if not os.path.exists(name):
        broken = os.path.islink(name)
        raise ValueError(f"{name}: {'a broken link: repair it' if broken else 'no such file: check the path'}")
    with open(name, "rb") as stream:
        return Input(name, _spooled(stream))


def _is_url(name: str) -> bool:
    return is_url(name) and not os.path.lexists(name)


def _data_of(file: str) -> str:
    """The .bin file next to a Megatron index; any other file is returned unchanged."""
    data = f"{file.removesuffix('.idx')}.bin"
    return data if file.endswith(".idx") and os.path.isfile(data) else file


def _behind_url(url: str, file: Remote | BinaryIO) -> Input:
    return Input(url, remote=file) if isinstance(file, Remote) else Input(url, spool=file)


def _spooled(stream: BinaryIO) -> BinaryIO:
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the input)
    shutil.copyfileobj(stream, spool)
    spool.flush()
    return spool


def find_inputs(arguments: Sequence[str], include: Sequence[str], exclude: Sequence[str], out: Path) -> list[Input]:
    """The files named by `arguments` (files, folders, globs, URLs of these, "-"), each once, in a fixed order.

    Within folders, `include` patterns select files, and `exclude` patterns remove files and folders, both by name.
    Hidden names and the folder `out` are not read. Links to folders are followed; each real folder is read once.

    Raises ValueError if an argument matches nothing or a link is broken, OSError if a folder cannot be read.
    """
    found: dict[str, Input] = {}
    for argument in arguments:
        if _is_url(argument):
            behind = {url: file for url, file in remote_files(argument, include, exclude)}
            if not behind:
                raise ValueError(f"no file behind {argument!r} matches the URL, --include and --exclude: check them")
            for url, file in behind.items():
                if not (url.endswith(".idx") and f"{url.removesuffix('.idx')}.bin" in behind):
                    found.setdefault(url, _behind_url(url, file))
            continue
        exists = argument == STANDARD_INPUT or os.path.lexists(argument)
        named = [argument] if exists else _expand(argument)
        if not named and os.path.isfile(f"{argument}.idx"):  # the common prefix of Megatron's two files
            named = [f"{argument}.idx"]
        if not named:
            raise ValueError(f"no input matches {argument!r}: give a file, a folder or a quoted glob")
        files = [
            file for path in named for file in (_files(path, include, exclude, out) if os.path.isdir(path) else [path])
        ]
        if not files:
            raise ValueError(f"no file in {argument!r} matches --include and --exclude: widen the patterns")
        for file in map(_data_of, files):
            real = file if file == STANDARD_INPUT else os.path.realpath(file)
            if real not in found:
                found[real] = open_name(file)
    return list(found.values())


def named_in(file: Path) -> list[str]:
    """The inputs named by the lines of a text file. Blank lines are skipped. Raises ValueError."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"--inputs-from {file}: {why}: give a text file with one input on each line") from None
    return [name for name in names if name]


def _expand(pattern: str) -> list[str]:
    """The paths that match a glob. `**` enters each real folder once; that of `glob` never ends with circular links."""
    base, any_depth, rest = pattern.partition("**/")
    if not any_depth:
        return sorted(glob.glob(pattern))
    folders = [folder for root in glob.glob(base or ".") for folder, _ in _folders(root, [], set())]
    return sorted({path for folder in folders for path in _expand(os.path.join(glob.escape(folder), rest))})


def _files(root: str, include: Sequence[str], exclude: Sequence[str], out: Path) -> Iterator[str]:
    """The files in a folder and its subfolders. Raises ValueError for a broken link, and for a pipe or socket."""
    for folder, files in _folders(root, exclude, {os.path.realpath(out)} - {os.path.realpath(root)}):
        for name in _of_dataset(folder, files):
            path = os.path.join(folder, name)
            if not _matches(name, include or ["*"]) or _matches(name, exclude) or name.startswith("."):
                continue
            if not os.path.isfile(path):
                what = "neither a file nor a folder" if os.path.exists(path) else "a broken link"
                raise ValueError(f"{path}: {what}: repair it, or leave it out with --exclude")
            yield path


def _of_dataset(folder: str, files: list[str]) -> list[str]:
    """The files of a folder that have data, in order: all files, except in a folder written by `datasets.save_to_disk`.

    Raises ValueError as `data_files` does.
    """
    if "dataset_dict.json" in files:  # lists the folders of the splits
        files = [name for name in files if name != "dataset_dict.json"]
    if not is_dataset(files):
        return files
    return data_files(folder, lambda: Path(folder, "state.json").read_bytes())


def _folders(root: str, exclude: Sequence[str], seen: set[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for a folder and its subfolders, links included. Each real folder once; not those in
    `seen`.
    """

    def stop(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and not _matches(name, exclude))
        yield folder, sorted(files)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# ---- recognise and open inputs


class _Frames(io.RawIOBase):
    """Decompress consecutive compressed frames. Zero bytes between and after frames are skipped.

    The readers of the standard library stop without an error if other bytes follow a frame, so the content of a damaged
    second frame would be lost silently.
    """

    def __init__(self, raw: BinaryIO, decompressor: Callable[[], Any]):
        """decompressor: makes a `bz2.BZ2Decompressor`, or an object with the same methods, for one frame."""
        self._raw, self._new = raw, decompressor
        self._frame = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # io passes a memoryview
        """Raises EOFError if a frame is truncated or damaged, or if other bytes follow it."""
        content = b""
        while not content:
            packed = b""
            if self._frame.eof:
                packed = self._frame.unused_data.lstrip(b"\0")
                while not packed and (block := self._raw.read(_BLOCK)):
                    packed = block.lstrip(b"\0")
                if not packed:
                    return 0
                self._frame = self._new()
            elif self._frame.needs_input:
                packed = self._raw.read(_BLOCK)
                if not packed:
                    raise EOFError("cut off")
            try:
                content = self._frame.decompress(packed, len(buffer))
            except (OSError, lzma.LZMAError, zstd.ZstdError) as error:
                raise EOFError(str(error)) from None
        buffer[: len(content)] = content
        return len(content)


def _unpack_zstd() -> Any:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31})  # `zstd --long=31` needs it


def _frames(decompressor: Callable[[], Any]) -> Callable[[BinaryIO], BinaryIO]:
    return lambda raw: io.BufferedReader(_Frames(raw, decompressor), _BLOCK)


@dataclass(frozen=True)
class Format:
    """A compression, or a format that is not plain text."""

    name: str  # with an article, for messages
    endings: tuple[str, ...]
    magic: tuple[bytes, ...]  # the first bytes of its files; empty: recognised by its ending alone
    instead: str  # the remedy in the error message
    decompress: Callable[[BinaryIO], BinaryIO] | None = None
    kind: Kind | None = None  # how its records are read; with neither this nor decompress, it is refused
    offset: int = 0  # position of the magic bytes

    def unpack(self, raw: BinaryIO) -> BinaryIO:
        assert self.decompress is not None, self.name
        return self.decompress(raw)


def _gunzip(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw))


_UNPACK = "unpack it, or compress it with gzip instead"
_CONVERT = "convert it to Parquet, or to .jsonl with a 'text' field"
_EXTRACT = "extract the text from it"
_SKIPPABLE = tuple(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))  # frames that may come first in zstandard
_BZIP2 = tuple(b"BZh%d%b" % (n, then) for n in range(1, 10) for then in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"))
FORMATS = (
    Format("a gzip file", (".gz", ".gzip", ".tgz"), (b"\x1f\x8b",), _UNPACK, _gunzip),
    Format("a zstandard file", (".zst", ".zstd"), (b"\x28\xb5\x2f\xfd", *_SKIPPABLE), _UNPACK, _frames(_unpack_zstd)),
    Format("an xz file", (".xz",), (b"\xfd7zXZ\0",), _UNPACK, _frames(lzma.LZMADecompressor)),
    Format("an lzma file", (".lzma",), (b"\x5d\0\0",), _UNPACK, _frames(lzma.LZMADecompressor)),
    Format("a bzip2 file", (".bz2",), _BZIP2, _UNPACK, _frames(bz2.BZ2Decompressor)),
    Format("an lz4 file", (".lz4",), (b"\x04\x22\x4d\x18",), _UNPACK),
    Format("an lzip file", (".lz",), (b"LZIP\1",), _UNPACK),
    Format("an lzop file", (".lzo",), (b"\x89LZO\0",), _UNPACK),
    Format("a Unix compress file", (".z",), (b"\x1f\x9d",), _UNPACK),
    Format("a snappy file", (".snappy", ".sz"), (b"\xff\x06\0\0sNaPpY",), _UNPACK),
    Format("a brotli file", (".br",), (), _UNPACK),
    Format("a zip archive", (".zip",), (b"PK\3\4", b"PK\5\6"), _EXTRACT),
    Format("a 7-Zip archive", (".7z",), (b"7z\xbc\xaf\x27\x1c",), _EXTRACT),
    Format("a RAR archive", (".rar",), (b"Rar!\x1a\7",), _EXTRACT),
    Format("a tar archive", (".tar",), (b"ustar",), _EXTRACT, offset=257),
    Format("a Parquet file", (".parquet", ".pq"), (b"PAR1",), _UNPACK, kind="parquet"),
    Format("an encrypted Parquet file", (), (b"PARE",), "decrypt it"),
    Format("an Arrow file", (".arrow", ".feather"), (b"ARROW1\0\0", b"\xff\xff\xff\xff"), _UNPACK, kind="arrow"),
    Format("a Feather file of version 1", (), (b"FEA1",), _CONVERT),
    Format("an Avro file", (".avro",), (b"Obj\1",), _CONVERT),
    Format("an ORC file", (".orc",), (b"ORC",), _CONVERT),
    Format("an HDF5 file", (".h5", ".hdf5"), (b"\x89HDF\r\n\x1a\n",), _CONVERT),
    Format("an SQLite database", (".sqlite",), (b"SQLite format 3\0",), _CONVERT),
    Format("a NumPy array", (".npy",), (b"\x93NUMPY",), _UNPACK, kind="tokens"),
    Format("a file of ids for llm.c", (), tuple(LLM_C), _UNPACK, kind="tokens"),
    Format("a Megatron index", (), (MEGATRON,), "its .bin file must be next to it"),
    Format("a PDF document", (".pdf",), (b"%PDF-",), _EXTRACT),
    Format("a Git LFS pointer", (), (b"version https://git-lfs.github.com/spec/",), "fetch the file: git lfs pull"),
)
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)  # errors from reading through `decompress`
_BY_ENDING = {ending: format for format in FORMATS for ending in format.endings}
_JSON_OBJECT = re.compile(rb'\s*\[?\s*\{\s*("(?:[^"\\\n]|\\.)*"\s*:|\})')


@dataclass(frozen=True)
class Opened:
    """An open input: a stream of its text, unpacked and without byte order mark, or a file for `columns.Table`."""

    kind: Kind
    by_content: bool  # the content, not the name, shows that these are JSON records
    stream: BinaryIO
    raw: BinaryIO  # the file as stored; its position is the progress of a text


@contextmanager
def open_input(source: Input, option: FormatOption = "auto", raw_ids: bool = False) -> Iterator[Opened]:
    """Open an input in the format that is recognised. Otherwise it is text or JSON records, as `option` says.

    raw_ids: .bin and .npy files without a header have token ids.

    Raises ValueError that names the input, here or while it is read, if its format or encoding is not supported, or if
    it is damaged.
    """
    with source.open() as raw:
        packed = None
        try:
            name = urlsplit(source.name).path if _is_url(source.name) else source.name
            endings = [ending.lower() for ending in PurePath(name).suffixes]
            if endings and endings[-1] in ID_ENDINGS and _has_ids(source, raw, raw_ids):
                yield Opened("tokens", False, raw, raw)
                return
            packed, inside, head = _formats(source.name, raw, endings)
            if inside:
                yield Opened(inside, False, raw, raw)
                return
            encoding = _other_encoding(head)
            if encoding:
                raise ValueError(
                    f"{source.name}: {encoding} text, not UTF-8: convert it: iconv -f {encoding} -t UTF-8 FILE"
                )
            if head and not head.strip(b"\0"):
                raise ValueError(f"{source.name}: begins with {len(head):,} zero bytes: damaged, or not text")
            stream = packed.unpack(raw) if packed else raw
            if head.startswith(BOM):
                head = head.removeprefix(BOM)
                stream.read(len(BOM))
            by_content = False
            if option == "auto":
                by_name = bool(endings) and endings[-1] in RECORD_ENDINGS
                by_content = not by_name and _JSON_OBJECT.match(head) is not None
                kind: Literal["text", "jsonl"] = "jsonl" if by_name or by_content else "text"
                if kind == "text" and endings and endings[-1] in COLUMN_ENDINGS:
                    raise ValueError(
                        f"{source.name}: {COLUMN_ENDINGS[endings[-1]]}, which is not read here: {_CONVERT}, give "
                        "--format text to take it as text, or leave it out with --exclude"
                    )
            else:
                kind = option
            if kind == "jsonl":
                _refuse_one_json_value(source.name, head, by_content)
            yield Opened(kind, by_content, stream, raw)
        except _DAMAGED as error:
            if packed is None:
                raise
            raise _damaged(source.name, packed, error) from None


def _has_ids(source: Input, raw: BinaryIO, raw_ids: bool) -> bool:
    """Whether a .bin or .npy file has token ids, according to the user or an index. Raises ValueError if only its
    content suggests it.
    """
    if raw_ids or source.index():
        return True
    head = raw.read(HEAD)
    raw.seek(0)
    if not _recognise(head) and has_control_characters(head):
        raise ValueError(
            f"{source.name}: not text: if it has token ids without a header (OLMo-core, nanoGPT), give --dtype and "
            "--tokenizer; otherwise leave it out with --exclude"
        )
    return False


def _damaged(name: str, packed: Format, error: Exception) -> ValueError:
    what = packed.name.split(" ", 1)[1]  # without its article
    return ValueError(f"{name}: damaged {what} ({error}): replace it or leave it out")


def _formats(name: str, raw: BinaryIO, endings: list[str]) -> tuple[Format | None, Kind | None, bytes]:
    """The compression of a file, the kind of its records if it has a format of its own, and its first unpacked bytes.

    Leaves `raw` at its first byte, and removes the recognised endings from `endings`. Raises ValueError for a format
    that cannot be read, and if the content does not match the ending.
    """
    stream, packed = raw, None
    while True:
        try:
            head = stream.read(HEAD)
        except _DAMAGED as error:
            assert packed is not None, "nothing is unpacked yet"
            raise _damaged(name, packed, error) from None
        raw.seek(0)
        found = _recognise(head)
        named = _BY_ENDING.get(endings[-1]) if endings else None
        if named and (found or not named.magic):
            endings.pop()
        format = found or named
        if format is None:
            return packed, None, head
        if found is None and format.magic:
            begins = f"it begins with {head[:12]!r}" if head else "it is empty"
            raise ValueError(f"{name}: named like {format.name}, but {begins}: replace it, or correct its name")
        if format.decompress is None and format.kind is None:
            inside = f" inside {packed.name}" if packed else ""
            raise ValueError(f"{name}: {format.name}{inside}, which is not read here: {format.instead}")
        if packed is not None:
            raise ValueError(f"{name}: {format.name} inside {packed.name}: unpack it once")
        if format.kind:
            return None, format.kind, head
        packed = format
        stream = format.unpack(raw)


def _recognise(head: bytes) -> Format | None:
    for format in FORMATS:
        for magic in format.magic:
            # A text could also begin with these short words of letters, so the bytes after them must be binary.
            is_word = magic.isalnum() and len(magic) < 5
            if head.startswith(magic, format.offset) and not (is_word and not has_control_characters(head)):
                return format
    return None


def has_control_characters(content: bytes) -> bool:
    """Whether there are bytes that text files do not have: control characters other than white space, bell, backspace,
    escape.
    """
    return bool(content.translate(None, bytes(range(32, 256)) + b"\a\b\t\n\v\f\r\x1b"))


def _other_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 if the byte order mark or the positions of the zero bytes show it, else None.

    In alphabetic text the high bytes (every second byte) are small, because all characters are in a few blocks of
    Unicode. Some of them, those of spaces and digits, are zero. Low bytes are rarely zero. Text in other scripts is not
    valid UTF-8, so it is refused later.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    head = head[: len(head) // 4 * 4] or head[: len(head) // 2 * 2]
    if b"\0" not in head or not head.strip(b"\0"):
        return None
    for order, quads in (("LE", (3, 2, 0)), ("BE", (0, 1, 3))):
        top, plane, low = (head[first::4] for first in quads)
        if top and not any(top) and max(plane) <= 16 and low.count(0) <= 0.1 * len(low):
            return f"UTF-32{order}"
    for order, first in (("LE", 1), ("BE", 0)):
        high = head[first::2]
        low = head[1 - first :: 2]
        small = sum(byte < 32 for byte in high)
        if small >= 0.8 * len(high) and high.count(0) >= 0.05 * len(high) and low.count(0) <= 0.1 * high.count(0):
            return f"UTF-16{order}"
    return None


def _refuse_one_json_value(name: str, head: bytes, by_content: bool) -> None:
    """Raise ValueError for a file that is a single JSON value over several lines instead of one object a line."""
    start = head.lstrip()
    way_out = ", or give --format text to read it as text" if by_content else ""
    if start.startswith(b"["):
        raise ValueError(f"{name}: a JSON array, not one object a line: convert it: jq -c '.[]' FILE{way_out}")
    if re.match(rb"\{[ \t]*\r?\n", start):
        raise ValueError(f"{name}: JSON over several lines, not one object a line: convert it: jq -c . FILE{way_out}")
