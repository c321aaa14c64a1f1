"""Prepare the parts of a `Division` in a work folder that several processes can share.

Each unit of work is committed by itself. The stages run one after another; the units of a stage are independent. The
output of a unit is a function of the division. A unit is committed by an atomic rename of its file into `done`, after
all of its output is on the disk. The file's name contains a hash of everything that the output depends on. So the
result has the same bytes if a unit is done twice, is killed at any moment, or was done by an earlier start.

    .OUT.parts/settings     a hash of the options that the content depends on
    .OUT.parts/done/        a file for each finished unit: the tokenizer, hashes, lists of duplicates, records of parts
    .OUT.parts/data/        the shards; at the end this folder is renamed to OUT
"""

import json
import math
import multiprocessing
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mdmtrain.data.division import Division, digest, draw
from mdmtrain.data.duplicates import buckets, duplicates, numbers_in, sorted_hashes, text_hash
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.records import Document, Reading
from mdmtrain.data.shards import MANIFEST, PreparedSplit, ShardWriter, dtype_for, write_manifest
from mdmtrain.data.tokenizer import MODEL_FILE, TextChanged, Tokenizer
from mdmtrain.files import put_in_place, replacing

BATCH = 1 << 18  # characters in a batch for a worker
SOURCES = "sources.jsonl"  # in a prepared folder: a line for each input, with its documents, bytes and tokens
JOB = "job.json"  # in a work folder: the Slurm job of launchers.prepare
SPLITS = ("train", "validation")
DUPLICATE = "exact duplicates of earlier documents"
Stage = Literal["tokenizer", "hashes", "duplicates", "parts"]
Report = Callable[[int], None]  # called with the bytes of the unit that are done
Do = Callable[[int, Report], None]  # does the unit of this number
_SUFFIX = {"tokenizer": ".model", "hashes": ".npy", "duplicates": ".npy", "parts": ".json"}


class Preparation:
    """The state of a preparation, and the methods that carry it out. Several processes may work on the same one."""

    def __init__(self, division: Division, work: Path):
        """work: see `work_folder`; `begin` makes its contents."""
        self.division, self.work = division, work
        self._data = work / "data"
        self._done = work / "done"
        self._file = cache(self._file_of)

    def refuse_other_options(self) -> None:
        """Raise ValueError if the folder contains finished units that were made with other options."""
        if in_use(self.work) and (self.work / "settings").read_text() != digest(self.division.settings):
            raise ValueError(
                f"{self.work} holds finished units that were made with other options: give the same options to resume, "
                "or remove it to start again"
            )

    def begin(self) -> None:
        """Make the contents of the work folder, or resume with those that it has."""
        self._data.mkdir(exist_ok=True)
        self._done.mkdir(exist_ok=True)
        with replacing(self.work / "settings") as stream:
            stream.write(digest(self.division.settings))
        if self.division.model:
            self._commit("tokenizer", 0, self.division.model)

    def clean(self) -> None:
        """Remove the unfinished output of killed processes. No process may be working in the folder."""
        for leftover in self.work.glob("unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    # ---- stages and units

    def stages(self) -> list[Stage]:
        return [stage for stage in get_args(Stage) if self.division.options.dedup or stage in ("tokenizer", "parts")]

    def units(self, stage: Stage) -> int:
        """The number of units of a stage. For duplicates it is known only when all hashes are written."""
        if stage == "tokenizer":
            return 1
        return buckets(sum(self._hashed)) if stage == "duplicates" else len(self.division.parts)

    def pending(self, stage: Stage) -> list[int]:
        """The units of a stage that are not committed yet."""
        there = {path.name for path in self._done.iterdir()}
        return [unit for unit in range(self.units(stage)) if self._file(stage, unit).name not in there]

    def size(self, stage: Stage, unit: int) -> int:
        """The bytes that a unit reads, counted as for `Report`."""
        if stage == "tokenizer":
            return sum(self.division.sizes)
        return 1 if stage == "duplicates" else self.division.bytes_of(unit)

    @cached_property
    def _hashed(self) -> list[int]:
        """The number of documents of each part."""
        return [len(np.load(file, mmap_mode="r")) for file in self._files("hashes")]

    def _files(self, stage: Stage) -> list[Path]:
        return [self._file(stage, unit) for unit in range(self.units(stage))]

    def _file_of(self, stage: Stage, unit: int) -> Path:
        """The file that a unit is committed as."""
        return self._done / f"{stage}-{unit:05d}-{self._key(stage, unit)[:16]}{_SUFFIX[stage]}"

    def _key(self, stage: Stage, unit: int) -> str:
        """A hash of everything that the content of a unit depends on."""
        division = self.division
        if stage == "tokenizer":
            return self._tokenizer_key
        if stage == "duplicates":
            return digest(stage, division.made_from, self._tokenizer_key, self.units(stage))
        if stage == "parts" and division.options.dedup:
            return digest(stage, division.made_from, self._tokenizer_key)
        inputs = list(division.identities[slice(*division.parts[unit])])
        return digest(stage, division.settings, self._tokenizer_key, len(division.parts) == 1, self._prompts, inputs)

    @cached_property
    def _tokenizer_key(self) -> str:
        return digest(self.division.settings) if self.division.model else self.division.made_from

    # ---- execution

    @contextmanager
    def doing(self, stage: Stage, workers: int) -> Iterator[Do]:
        """A function that does a unit of a stage and commits it. workers: the number of processes that tokenize.

        The function raises ValueError (bad input, one line), OSError, or BrokenProcessPool (a worker process was
        killed). After an error, no output of the unit is left.
        """
        match stage:
            case "tokenizer":
                yield self._train_tokenizer
            case "hashes":
                yield self._write_hashes
            case "duplicates":
                yield self._find_duplicates
            case "parts":
                with encoder(self.model, workers) as encode:
                    yield lambda part, report: self._write_part(part, encode, report)

    @property
    def model(self) -> Path:
        """The tokenizer's file."""
        return self._file("tokenizer", 0)

    @cached_property
    def _prompts(self) -> bool | None:
        return self.division.prompts(self._reading())

    def _reading(self) -> Reading:
        options = self.division.options
        if self.division.model:  # the user's tokenizer file may be gone, or have another path on this machine
            options = replace(options, tokenizer=str(self.model), tiktoken_pattern=None)
        return options.reading()

    def _train_tokenizer(self, unit: int, report: Report) -> None:
        def texts() -> Iterator[str]:
            for text, train, done in self.division.tokenizer_sample(self._reading(), self._prompts):
                report(done)
                if train:
                    yield text

        with self._unfinished("tokenizer", unit) as folder:
            file = folder / MODEL_FILE
            Tokenizer.train(texts(), self.division.options.vocab_size, file)
            self._commit("tokenizer", unit, file.read_bytes())

    def _write_hashes(self, part: int, report: Report) -> None:
        def hashes() -> Iterator[bytes]:
            for document, _, position in self.division.documents(part, self._reading(), self._prompts):
                yield text_hash(document)
                report(position)

        self.division.refuse_changes(part)
        made = sorted_hashes(hashes())
        self.division.refuse_changes(part)
        self._commit("hashes", part, made)

    def _find_duplicates(self, bucket: int, report: Report) -> None:
        self._commit("duplicates", bucket, duplicates(self._files("hashes"), bucket, self.units("duplicates")))

    def _write_part(self, part: int, encode: "Encode", report: Report) -> None:
        division = self.division
        reading = self._reading()
        division.refuse_changes(part)
        counts = {number: Counter[str]() for number in range(*division.parts[part])}
        lowest, highest = 1.0, 0.0
        with self._unfinished("parts", part) as folder:
            suffix = "" if len(division.parts) == 1 else f"-{part:05d}"
            writers = {split: ShardWriter(folder, split + suffix, division.options.shard_tokens) for split in SPLITS}
            for encoded, position in encode(_batches(self._kept_documents(part, reading))):
                for number, hash, size, tokens, response in encoded:
                    drawn = draw(hash)
                    split = "validation" if drawn < division.options.validation_fraction else "train"
                    writers[split].add(tokens, size, hash, response)
                    lowest = min(lowest, drawn)
                    highest = max(highest, drawn)
                    count = counts[number]
                    count["documents"] += 1
                    count["bytes"] += size
                    count["tokens"] += len(tokens)
                    count["text_tokens"] += len(tokens) - (response or 1) - 1  # the tokens of the counted bytes
                report(position)
            record = {
                "splits": {split: writer.close() for split, writer in writers.items()},
                "sources": [
                    {"input": division.inputs[number].name, "size": division.sizes[number]}
                    | {name: count[name] for name in ("documents", "bytes", "tokens", "text_tokens")}
                    for number, count in counts.items()
                ],
                "left_out": reading.left_out,
                "files": reading.files,
                "draws": [lowest, highest],
            }
            division.refuse_changes(part)
            # The shards of a part keep their names if its inputs change: remove records that name older ones.
            for other in self._done.glob(f"parts-{part:05d}-*"):
                other.unlink(missing_ok=True)
            for file in folder.iterdir():
                put_in_place(file, self._data / file.name)
        self._commit("parts", part, json.dumps(record).encode())

    def _kept_documents(self, part: int, reading: Reading) -> Iterator[tuple[Document, int, int]]:
        """The documents of a part, without duplicates."""
        documents = self.division.documents(part, reading, self._prompts)
        if not self.division.options.dedup:
            yield from documents
            return
        out = deque(numbers_in(self._files("duplicates"), part).tolist())
        count = 0
        for count, one in enumerate(documents, 1):
            if out and out[0] == count - 1:
                out.popleft()
                reading.left_out[DUPLICATE] += 1
            else:
                yield one
        if count != self._hashed[part]:
            self.division.refuse_changes(part)
            raise ValueError(f"part {part} has {count:,} documents, but {self._hashed[part]:,} were hashed: restart")

    @contextmanager
    def _unfinished(self, stage: Stage, unit: int) -> Iterator[Path]:
        """A temporary folder for the output of a unit. The end of the block removes it; after SIGKILL, `clean` does."""
        folder = Path(tempfile.mkdtemp(prefix=f"unfinished-{stage}-{unit:05d}-", dir=self.work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, stage: Stage, unit: int, content: bytes | np.ndarray) -> None:
        with self._unfinished(stage, unit) as folder:
            file = folder / "content"
            with open(file, "wb") as stream:
                if isinstance(content, bytes):
                    stream.write(content)
                else:
                    np.save(stream, content)
            put_in_place(file, self._file(stage, unit))

    # ---- the end

    def finish(self, out: Path) -> tuple[dict[str, Any], Reading]:
        """Combine all parts into the folder `out`, without rewriting a shard.

        Returns the manifest, and a `Reading` with the counts of files and of left-out documents. Raises ValueError if a
        split has no document.
        """
        splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
        reading = self._reading()
        sources, draws = [], []
        for file in self._files("parts"):
            record = json.loads(file.read_text())
            for split, content in record["splits"].items():
                splits[split].setdefault("shards", []).extend(content.pop("shards"))
                for key, more in content.items():
                    splits[split][key] = splits[split].get(key, 0) + more
            sources += record["sources"]
            draws.append(record["draws"])
            reading.left_out += Counter(record["left_out"])
            reading.files += Counter(record["files"])
        if problem := self._empty(splits, min(low for low, _ in draws), max(high for _, high in draws)):
            shutil.rmtree(self._done)  # they cannot be used with other options
            raise ValueError(problem)
        shutil.copyfile(self.model, self._data / MODEL_FILE)
        (self._data / SOURCES).write_text("".join(json.dumps(source) + "\n" for source in sources), encoding="utf-8")
        manifest = write_manifest(self._data, Tokenizer.load(self._data), splits, self.division.made_from)
        named = {name for split in splits.values() for shard in split["shards"] for name in shard.values()}
        for file in self._data.iterdir():
            if file.name not in {*named, MODEL_FILE, SOURCES, MANIFEST}:
                file.unlink()  # written before the inputs changed, when the parts had other bounds
        for split in splits:
            PreparedSplit(self._data, split)
        put_in_place(self._data, out)
        return manifest, reading

    def _empty(self, splits: dict[str, dict], lowest: float, highest: float) -> str | None:
        """An error message if a split has no document. lowest, highest: the range of the documents' drawn numbers."""
        count = sum(split["documents"] for split in splits.values())
        if not count:
            return f"no text in the {len(self.division.inputs)} input files: give files with text in them"
        for split, hint in (
            ("validation", f"give --validation-fraction {math.ceil(lowest * 1e4 + 1) / 1e4} or more"),
            ("train", f"give --validation-fraction {math.floor(highest * 1e4) / 1e4} or less"),
        ):
            if not splits[split]["documents"]:
                hint = "give more documents, or divide this one" if count == 1 else hint
                return f"none of the {count} documents fell into the {split} split: {hint}"
        return None


def work_folder(out: Path) -> Path:
    """The work folder in which `out` is made."""
    return out.parent / f".{out.name}.parts"


def kept_units(work: Path) -> int:
    """The number of finished units in a work folder; a tokenizer does not count."""
    return sum(not file.name.startswith("tokenizer") for file in work.glob("done/*"))


def in_use(work: Path) -> bool:
    """Whether a work folder must be kept: it has finished units, or Slurm jobs may still write some."""
    return kept_units(work) > 0 or (work / JOB).exists()


# ---- tokens


_Batch = tuple[list[tuple[int, Document]], int]  # (input number, document) pairs; bytes of the part read so far
_Encoded = tuple[int, int, int, np.ndarray, int | None]  # input, hash, bytes, bos + tokens + eos, start of the response
Encode = Callable[[Iterable[_Batch]], Iterator[tuple[list[_Encoded], int]]]
_tokenizer: Tokenizer  # the tokenizer of this worker process


def _start_worker(model: Path) -> None:
    global _tokenizer
    if multiprocessing.parent_process():
        follow_parent()
    _tokenizer = Tokenizer.load(model)


def encode_document(tokenizer: Tokenizer, document: Document) -> tuple[list[int], int | None]:
    """bos + tokens + eos, and the index at which the response starts (None if the document has no prompt).

    Raises ValueError, naming the file and the line, if the tokenizer would change the text.
    """
    if document.ids is not None:
        return [tokenizer.bos_id, *document.ids.tolist(), tokenizer.eos_id], None
    try:  # the response is encoded separately: no token spans the border, as in generation
        before = [tokenizer.bos_id, *tokenizer.encode_prompt(document.prompt or "", document.specials)]
        tokens = [*before, *tokenizer.encode(document.text), tokenizer.eos_id]
    except TextChanged as error:
        line = document.line if document.record else document.line + error.line - 1
        raise ValueError(f"{document.file}:{line}: {error}: choose another tokenizer, or leave this text out") from None
    return tokens, None if document.prompt is None else len(before)


def _encode(documents: list[tuple[int, Document]]) -> list[_Encoded]:
    encoded = []
    dtype = dtype_for(_tokenizer.vocab_size)
    for number, document in documents:
        tokens, response = encode_document(_tokenizer, document)
        size = len(document.text.encode())
        encoded.append((number, document.hash(), size, np.array(tokens, dtype=dtype), response))
    return encoded


@contextmanager
def encoder(model: Path, workers: int) -> Iterator[Encode]:
    """A function that encodes batches in order, in `workers` processes (1: in this process).

    Only a few batches per worker are in flight, so memory is bounded.
    """
    if workers == 1:
        _start_worker(model)
        yield lambda batches: ((_encode(documents), done) for documents, done in batches)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(model,))

    def encode(batches: Iterable[_Batch]) -> Iterator[tuple[list[_Encoded], int]]:
        flying: deque = deque()
        for documents, done in batches:
            flying.append((pool.submit(_encode, documents), done))
            if len(flying) > 3 * workers:
                future, before = flying.popleft()
                yield future.result(), before
        for future, before in flying:
            yield future.result(), before

    try:
        yield encode
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[tuple[Document, int, int]]) -> Iterator[_Batch]:
    """Group the documents into batches of about BATCH characters."""
    batch, size, position = [], 0, 0
    for document, number, position in documents:
        batch.append((number, document))
        size += len(document.text) + len(document.prompt or "")
        if size >= BATCH:
            yield batch, position
            batch, size = [], 0
    if batch:
        yield batch, position
