"""Text -> prepared folder: stream the documents of files, tokenize in parallel, write shards.

Everything is written to a hidden folder beside the destination and moved into place as the last act (`staging`), so
what stands at the destination is complete. The content does not depend on the number of workers.
"""

import hashlib
import json
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdmtrain.data.inputs import FormatOption, Input, open_name
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.records import (
    LONGEST_TEXT,
    USUAL_FIELDS,
    Document,
    Fields,
    Ids,
    OnBadRecord,
    Reading,
    check_inputs,
    read_documents,
)
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
from mdmtrain.data.tokenized import TokenType
from mdmtrain.data.tokenizer import MODEL_FILE, SAMPLE_CHARACTERS, TextChanged, Tokenizer

BATCH = 1 << 18  # characters that a worker gets at once
Progress = Callable[[str, int, int], None]  # phase, bytes of the input files done, and in all


@dataclass(frozen=True)
class Options:
    """What a prepared folder is made with, besides its inputs."""

    tokenizer: str | None = None  # a tokenizer's file, or a folder with one; None: train one
    vocab_size: int = 32_768  # pieces of a tokenizer trained here
    validation_fraction: float = 0.01  # of the documents, chosen by their hash
    shard_tokens: int = 100_000_000  # most tokens in a shard (one document may be longer)
    on_bad_record: OnBadRecord = "error"
    format: FormatOption = "auto"
    fields: Fields = USUAL_FIELDS
    tiktoken_pattern: str | None = None  # of a tokenizer that is a rank file of tiktoken
    dtype: TokenType | None = None  # of files of token ids without a header

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation-fraction {self.validation_fraction} is not between 0 and 1")
        if self.shard_tokens < 1:
            raise ValueError(f"--shard-tokens {self.shard_tokens} is not positive")
        if self.dtype and not self.tokenizer:
            raise ValueError("--dtype is of token ids: give the --tokenizer that made them")

    def reading(self) -> Reading:
        ids = Ids(self.tokenizer, self.tiktoken_pattern, self.dtype) if self.tokenizer else None
        return Reading(self.on_bad_record, self.format, self.fields, ids)


@dataclass
class Summary:
    out: Path
    manifest: dict[str, Any]
    already: bool  # nothing was done: the folder was there, made from the same inputs and options
    reading: Reading  # what the inputs were, and what was left out of them


def prepare(
    inputs: Sequence[Input | Path], out: Path, options: Options, workers: int, progress: Progress | None = None
) -> Summary:
    """Prepare the files `inputs` into the folder `out`; does nothing where that was done before.

    Raises ValueError (bad input, one line) or OSError; then `out` is as it was, and nothing half-written is left.
    """
    opened = [one if isinstance(one, Input) else open_name(one) for one in inputs]
    given = Tokenizer.load(options.tokenizer, options.tiktoken_pattern) if options.tokenizer else None
    made_from = _identity(opened, options, given)
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        if manifest["made_from"] != made_from:
            raise ValueError(f"{out} holds data made from other inputs or options: remove it or choose another --out")
        for split in manifest["splits"]:
            PreparedSplit(out, split)
        return Summary(out, manifest, True, options.reading())
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a prepared folder: choose another --out")

    reading = options.reading()
    check_inputs(opened, reading)
    report = progress or (lambda phase, done, total: None)
    try:
        with staging(out) as folder:
            model = folder / MODEL_FILE
            if given:
                tokenizer = given
                model.write_bytes(given.model)
            else:
                tokenizer = Tokenizer.train(_training_texts(opened, options, report), options.vocab_size, model)
            splits = _write_splits(opened, folder, options, workers, reading, report)
            manifest = write_manifest(folder, tokenizer, splits, made_from)
    except OSError as error:
        where = error.filename or out
        raise ValueError(f"preparing {out} failed: {where}: {error.strerror or error}; nothing was written") from None
    except BrokenProcessPool:
        raise ValueError(f"preparing {out} failed: a worker was killed (out of memory?): use fewer --workers") from None
    return Summary(out, manifest, False, reading)


def _identity(inputs: list[Input], options: Options, tokenizer: Tokenizer | None) -> str:
    stats = [one.identity() for one in inputs]
    settings = asdict(options)
    if options.fields == USUAL_FIELDS:  # folders from before there were others stay what they are
        del settings["fields"]
    if options.dtype is None:
        del settings["dtype"]
    del settings["tiktoken_pattern"]  # the tokenizer has it
    if tokenizer:
        settings["tokenizer"] = tokenizer.sha256
        del settings["vocab_size"]
    return hashlib.sha256(json.dumps([FORMAT, LONGEST_TEXT, settings, stats], sort_keys=True).encode()).hexdigest()


# ---- tokens


def _draw(hash: int) -> float:
    """A document's number in [0, 1): below --validation-fraction it is validation. Like documents go together."""
    return (hash >> 31) / 2**32


def _training_texts(inputs: list[Input], options: Options, report: Progress) -> Iterator[str]:
    """Training documents for the tokenizer: every file's first ones, up to its share of four times the sample."""
    share = 4 * SAMPLE_CHARACTERS // len(inputs)
    total = sum(one.size for one in inputs)
    done = 0
    for one in inputs:
        characters = 0
        for document, _ in read_documents(one, options.reading()):
            text = (document.prompt or "") + document.text
            if _draw(document.hash()) >= options.validation_fraction:
                yield text
            characters += len(text)
            if characters >= share:
                break
        done += one.size
        report("reading for the tokenizer", done, total)


_Batch = tuple[list[Document], int]  # documents, bytes of the input files read so far
_Encoded = tuple[int, int, np.ndarray, int | None]  # hash, bytes, bos + tokens + eos, where the response starts
_tokenizer: Tokenizer  # of this worker process


def _start_worker(model: Path) -> None:
    global _tokenizer
    if multiprocessing.parent_process():
        follow_parent()
    _tokenizer = Tokenizer.load(model)


def encode_document(tokenizer: Tokenizer, document: Document) -> tuple[list[int], int | None]:
    """bos + tokens + eos, and where in them the response starts, if there is a prompt.

    Raises ValueError naming the file and the line of a text that the tokenizer would change.
    """
    if document.ids is not None:
        return [tokenizer.bos_id, *document.ids.tolist(), tokenizer.eos_id], None
    try:  # the response by itself, so that it starts with a token of its own, as it does when it is generated
        before = [tokenizer.bos_id, *tokenizer.encode_prompt(document.prompt or "", document.specials)]
        tokens = [*before, *tokenizer.encode(document.text), tokenizer.eos_id]
    except TextChanged as error:
        line = document.line if document.record else document.line + error.line - 1
        raise ValueError(f"{document.file}:{line}: {error}: choose another tokenizer, or leave it out") from None
    return tokens, None if document.prompt is None else len(before)


def _encode(documents: list[Document]) -> list[_Encoded]:
    encoded, dtype = [], dtype_for(_tokenizer.vocab_size)
    for document in documents:
        tokens, response = encode_document(_tokenizer, document)
        encoded.append((document.hash(), len(document.text.encode()), np.array(tokens, dtype=dtype), response))
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


def _batches(inputs: list[Input], reading: Reading) -> Iterator[_Batch]:
    """The documents of all inputs, about BATCH characters at a time."""
    documents, size, before, done, prompts = [], 0, 0, 0, None
    for one in inputs:
        for document, position in read_documents(one, reading, prompts):
            prompts = document.prompt is not None
            documents.append(document)
            size, done = size + len(document.text) + len(document.prompt or ""), before + position
            if size >= BATCH:
                yield documents, done
                documents, size = [], 0
        before += one.size
    if documents:
        yield documents, done


def _write_splits(
    inputs: list[Input], folder: Path, options: Options, workers: int, reading: Reading, report: Progress
) -> dict[str, dict]:
    writers = {split: ShardWriter(folder, split, options.shard_tokens) for split in ("train", "validation")}
    total = sum(one.size for one in inputs)
    lowest, highest = 1.0, 0.0
    for encoded, done in _encode_all(_batches(inputs, reading), folder / MODEL_FILE, workers):
        for hash, size, tokens, response in encoded:
            draw = _draw(hash)
            writers["validation" if draw < options.validation_fraction else "train"].add(tokens, size, hash, response)
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
