"""Text -> prepared folder: stream the documents of files, tokenize in parallel, write shards.

Everything is written to a hidden folder beside the destination and moved into place as the last act (`staging`), so
what stands at the destination is complete. The content does not depend on the number of workers.
"""

import gzip
import hashlib
import json
import math
import multiprocessing
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from mdmtrain.data.processes import follow_parent
from mdmtrain.data.shards import (
    FORMAT,
    MANIFEST,
    PreparedSplit,
    ShardWriter,
    dtype_for,
    read_manifest,
    write_manifest,
)
from mdmtrain.data.staging import staging
from mdmtrain.data.tokenizer import MODEL_FILE, SAMPLE_CHARACTERS, TextChanged, Tokenizer

LONGEST_TEXT = 1 << 18  # bytes; a longer text file becomes several documents, cut at line ends
BATCH = 1 << 18  # characters that a worker gets at once
Progress = Callable[[str, int, int], None]  # phase, bytes of the input files done, and in all


@dataclass(frozen=True)
class Options:
    """What a prepared folder is made with, besides its inputs."""

    tokenizer: str | None = None  # a tokenizer's file, or a folder with one; None: train one
    vocab_size: int = 32_768  # pieces of a tokenizer trained here
    validation_fraction: float = 0.01  # of the documents, chosen by their hash
    shard_tokens: int = 100_000_000  # most tokens in a shard (one document may be longer)
    bad_utf8: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation-fraction {self.validation_fraction} is not between 0 and 1")
        if self.shard_tokens < 1:
            raise ValueError(f"--shard-tokens {self.shard_tokens} is not positive")


@dataclass
class Summary:
    out: Path
    manifest: dict[str, Any]
    already: bool  # nothing was done: the folder was there, made from the same inputs and options
    skipped: Counter[str]  # documents left out, by reason


def prepare(inputs: list[Path], out: Path, options: Options, workers: int, progress: Progress | None = None) -> Summary:
    """Prepare the files `inputs` into the folder `out`; does nothing where that was done before.

    Raises ValueError (bad input, one line) or OSError; then `out` is as it was, and nothing half-written is left.
    """
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    made_from = _identity(inputs, options, given)
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        if manifest["made_from"] != made_from:
            raise ValueError(f"{out} holds data made from other inputs or options: remove it or choose another --out")
        for split in manifest["splits"]:
            PreparedSplit(out, split)
        return Summary(out, manifest, True, Counter())
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a prepared folder: choose another --out")

    skipped: Counter[str] = Counter()
    report = progress or (lambda phase, done, total: None)
    try:
        with staging(out) as folder:
            model = folder / MODEL_FILE
            if given:
                tokenizer = given
                model.write_bytes(given.model)
            else:
                tokenizer = Tokenizer.train(_training_texts(inputs, options, report), options.vocab_size, model)
            splits = _write_splits(inputs, folder, options, workers, skipped, report)
            manifest = write_manifest(folder, tokenizer, splits, made_from)
    except OSError as error:
        where = error.filename or out
        raise ValueError(f"preparing {out} failed: {where}: {error.strerror or error}; nothing was written") from None
    except BrokenProcessPool:
        raise ValueError(f"preparing {out} failed: a worker was killed (out of memory?): use fewer --workers") from None
    return Summary(out, manifest, False, skipped)


def _identity(inputs: list[Path], options: Options, tokenizer: Tokenizer | None) -> str:
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    settings = asdict(options)
    if tokenizer:
        settings["tokenizer"] = tokenizer.sha256
        del settings["vocab_size"]
    return hashlib.sha256(json.dumps([FORMAT, LONGEST_TEXT, settings, stats], sort_keys=True).encode()).hexdigest()


# ---- documents


class Document(NamedTuple):
    text: str  # all of it, or the response to the prompt
    prompt: str | None = None  # never masked in training
    file: str = ""
    line: int = 0  # of the record in the file, or of the text's beginning
    record: bool = False

    def encode(self) -> bytes:
        """What tells documents apart. Raises UnicodeError: JSON can spell half a surrogate pair, which is no text."""
        return self.text.encode() if self.prompt is None else self.prompt.encode() + b"\0" + self.text.encode()


def read_documents(
    path: Path, bad_utf8: str, skipped: Counter[str], prompts: bool | None = None
) -> Iterator[tuple[Document, int]]:
    """The documents of one file, each with the bytes of the file (as it lies on disk) that were read so far.

    A jsonl file has one a line, a text file is one (or several where it is long). prompts: whether all must have one;
    None: as the first does. Raises ValueError naming the file and the line or byte of what cannot be read or is of the
    other kind; `skipped` counts what is left out.
    """
    records, lines = path.name.endswith((".jsonl", ".jsonl.gz")), 0
    with open(path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        try:
            for number, content in enumerate(stream, 1) if records else _pieces(stream):
                line, lines = number if records else lines + 1, lines + content.count(b"\n")
                try:
                    place = f"{path}:{number}" if records else str(path)
                    document = _json_document(content, place) if records else Document(content.decode())
                    document.encode()
                except UnicodeError as error:
                    if bad_utf8 == "error":
                        place = place if records else f"{path} at byte {number + error.start}"
                        raise ValueError(
                            f"{place}: not UTF-8 text ({error.reason}): convert the file, leave it out with --exclude, "
                            "or give --bad-utf8 skip"
                        ) from None
                    skipped["not UTF-8"] += 1
                    continue
                if not document.text:
                    skipped["empty"] += 1
                    continue
                prompts = document.prompt is not None if prompts is None else prompts
                if prompts != (document.prompt is not None):
                    mixed = "plain text among prompts and responses" if prompts else "a prompt among plain text"
                    raise ValueError(f"{place}: {mixed}: prepare each kind into a folder of its own")
                yield document._replace(file=str(path), line=line, record=records), raw.tell()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}): replace it or leave it out") from None


def _pieces(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset, content) of a text file in pieces of at most LONGEST_TEXT bytes, cut at line ends or at characters."""
    offset, rest = 0, b""
    while True:
        block = rest + stream.read(LONGEST_TEXT - len(rest))
        if len(block) < LONGEST_TEXT:
            break
        cut = block.rfind(b"\n") + 1
        if not cut:  # before the last character, which may go on in the next block
            cut = len(block) - 1
            while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:
                cut -= 1
        yield offset, block[:cut]
        offset, rest = offset + cut, block[cut:]
    if block or not offset:
        yield offset, block


def _json_document(line: bytes, place: str) -> Document:
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if not line:
        return Document("")
    wanted = "every line must be an object with a 'text' field, or with 'prompt' and 'response'"
    try:
        record = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg}): {wanted}") from None
    fields = record.keys() & {"text", "prompt", "response"} if isinstance(record, dict) else set()
    if len(fields) == 3:
        raise ValueError(f"{place}: both a 'text' and a 'prompt' with its 'response': remove one of the two")
    names = ("text",) if "text" in fields or not fields else ("prompt", "response")
    for name in names:
        if name not in fields or not isinstance(record[name], str):
            raise ValueError(f"{place}: no {name!r} field with a string: {wanted}")
    return Document(*(record[name] for name in reversed(names)))


# ---- tokens


def _draw(document: Document) -> float:
    """The document's number in [0, 1): below --validation-fraction it is validation. Equal documents go together."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") / 2**32


def _training_texts(inputs: list[Path], options: Options, report: Progress) -> Iterator[str]:
    """Training documents for the tokenizer: every file's first ones, up to its share of four times the sample."""
    share = 4 * SAMPLE_CHARACTERS // len(inputs)
    total = sum(path.stat().st_size for path in inputs)
    done = 0
    for path in inputs:
        characters = 0
        for document, _ in read_documents(path, options.bad_utf8, Counter()):
            text = (document.prompt or "") + document.text
            if _draw(document) >= options.validation_fraction:
                yield text
            characters += len(text)
            if characters >= share:
                break
        done += path.stat().st_size
        report("reading for the tokenizer", done, total)


_Batch = tuple[list[Document], int]  # documents, bytes of the input files read so far
_Encoded = tuple[float, int, np.ndarray, int | None]  # draw, bytes, bos + tokens + eos, where the response starts
_tokenizer: Tokenizer  # of this worker process


def _start_worker(model: Path) -> None:
    global _tokenizer
    if multiprocessing.parent_process():
        follow_parent()
    _tokenizer = Tokenizer.load(model)


def _encode(documents: list[Document]) -> list[_Encoded]:
    encoded, dtype = [], dtype_for(_tokenizer.vocab_size)
    for document in documents:
        try:  # the response by itself, so that it starts with a token of its own, as it does when it is generated
            before = [_tokenizer.bos_id, *_tokenizer.encode(document.prompt or "")]
            tokens = np.array([*before, *_tokenizer.encode(document.text), _tokenizer.eos_id], dtype=dtype)
        except TextChanged as error:
            line = document.line if document.record else document.line + error.line - 1
            raise ValueError(f"{document.file}:{line}: {error}: choose another tokenizer, or leave it out") from None
        response = None if document.prompt is None else len(before)
        encoded.append((_draw(document), len(document.text.encode()), tokens, response))
    return encoded


def _encode_all(batches: Iterable[_Batch], model: Path, workers: int) -> Iterator[tuple[list[_Encoded], int]]:
    """The batches encoded, in their order; a few per worker are in flight, so memory stays bounded."""
    if workers == 1:
        _start_worker(model)
        yield from ((_encode(documents), done) for documents, done in batches)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(model,))
    try:
        flying: deque = deque()
        for documents, done in batches:
            flying.append((pool.submit(_encode, documents), done))
            if len(flying) > 3 * workers:
                future, before = flying.popleft()
                yield future.result(), before
        for future, before in flying:
            yield future.result(), before
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(inputs: list[Path], bad_utf8: str, skipped: Counter[str]) -> Iterator[_Batch]:
    """The documents of all inputs, about BATCH characters at a time."""
    documents, size, before, done, prompts = [], 0, 0, 0, None
    for path in inputs:
        for document, position in read_documents(path, bad_utf8, skipped, prompts):
            prompts = document.prompt is not None
            documents.append(document)
            size, done = size + len(document.text) + len(document.prompt or ""), before + position
            if size >= BATCH:
                yield documents, done
                documents, size = [], 0
        before += path.stat().st_size
    if documents:
        yield documents, done


def _write_splits(
    inputs: list[Path], folder: Path, options: Options, workers: int, skipped: Counter[str], report: Progress
) -> dict[str, dict]:
    writers = {split: ShardWriter(folder, split, options.shard_tokens) for split in ("train", "validation")}
    total = sum(path.stat().st_size for path in inputs)
    lowest, highest = 1.0, 0.0
    for encoded, done in _encode_all(_batches(inputs, options.bad_utf8, skipped), folder / MODEL_FILE, workers):
        for draw, size, tokens, response in encoded:
            writers["validation" if draw < options.validation_fraction else "train"].add(tokens, size, response)
            lowest, highest = min(lowest, draw), max(highest, draw)
        report("tokenizing", done, total)
    splits = {split: writer.close() for split, writer in writers.items()}
    count = sum(split["documents"] for split in splits.values())
    if not count:
        raise ValueError(f"no text in the {len(inputs)} input files: give files with text in them")
    for split, hint in (
        ("validation", f"give --validation-fraction {math.ceil(lowest * 1e4 + 1) / 1e4} or more"),
        ("train", f"give --validation-fraction {math.floor(highest * 1e4) / 1e4} or less"),
    ):
        if not splits[split]["documents"]:
            hint = "give more documents, or cut this one up" if count == 1 else hint
            raise ValueError(f"none of the {count} documents fell into the {split} split: {hint}")
    return splits
