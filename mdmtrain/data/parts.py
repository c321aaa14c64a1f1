"""Make a prepared folder in steps that several processes share. Each step of a `Plan` is committed separately.

Stages run one after the other; the units of a stage are independent. The output of a unit depends only on the plan. A
finished unit appears in `done` by a rename, after its content is on the disk, under a name that contains a hash of
everything it depends on. So a unit may be done twice, killed at any moment, or found finished by a later start, and the
result has the same bytes.

    .OUT.parts/settings     everything but the inputs that the content depends on
    .OUT.parts/done/        a file for each finished unit: the tokenizer, hashes, lists of duplicates, records of parts
    .OUT.parts/data/        the shards; renamed to OUT at the end
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

from mdmtrain.data.duplicates import buckets, duplicates, numbers_in, sorted_hashes, text_hash
from mdmtrain.data.plan import Plan, digest, draw
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.records import Document, Reading
from mdmtrain.data.shards import MANIFEST, PreparedSplit, ShardWriter, dtype_for, write_manifest
from mdmtrain.data.tokenizer import MODEL_FILE, TextChanged, Tokenizer
from mdmtrain.files import put_in_place, replacing

BATCH = 1 << 18  # characters in a batch for a worker
SOURCES = "sources.jsonl"  # in a prepared folder: one line for each input, with counts of its content
JOB = "job.json"  # in a folder that jobs of launchers.prepare share
SPLITS = ("train", "validation")
DUPLICATE = "exact duplicates of earlier documents"
Stage = Literal["tokenizer", "hashes", "duplicates", "parts"]
Report = Callable[[int], None]  # is called with the number of bytes of the unit that are done
Do = Callable[[int, Report], None]  # does a unit
_SUFFIX = {"tokenizer": ".model", "hashes": ".npy", "duplicates": ".npy", "parts": ".json"}


class Preparation:
    """The finished and the remaining steps of a plan. Several processes may each have one for the same plan."""

    def __init__(self, plan: Plan, work: Path):
        """work: see `work_folder`. `begin` creates its content."""
        self.plan, self.work = plan, work
        self._data, self._done = work / "data", work / "done"
        self._file = cache(self._file_of)

    def refuse_other_options(self) -> None:
        """Raise ValueError if the folder has finished steps that were made with other options."""
        if in_use(self.work) and (self.work / "settings").read_text() != digest(self.plan.settings):
            raise ValueError(
                f"{self.work} holds finished steps that were made with other options: give the same options to resume, "
                "or remove it to start again"
            )

    def begin(self) -> None:
        """Create the folder, or resume in it."""
        self._data.mkdir(exist_ok=True)
        self._done.mkdir(exist_ok=True)
        with replacing(self.work / "settings") as stream:
            stream.write(digest(self.plan.settings))
        if self.plan.model:
            self._commit("tokenizer", 0, self.plan.model)

    def clean(self) -> None:
        """Remove the incomplete output of killed processes. No other process may be working."""
        for leftover in self.work.glob("unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    # ---- stages and units

    def stages(self) -> list[Stage]:
        return [stage for stage in get_args(Stage) if self.plan.options.dedup or stage in ("tokenizer", "parts")]

    def units(self, stage: Stage) -> int:
        """The number of units of a stage. For duplicates it is known only when all hashes are written."""
        if stage == "tokenizer":
            return 1
        return buckets(sum(self._hashed)) if stage == "duplicates" else len(self.plan.parts)

    def pending(self, stage: Stage) -> list[int]:
        """The units of a stage that are not finished."""
        there = {path.name for path in self._done.iterdir()}
        return [unit for unit in range(self.units(stage)) if self._file(stage, unit).name not in there]

    def size(self, stage: Stage, unit: int) -> int:
        """The number of bytes that a unit reads, in the units of `Report`."""
        if stage == "tokenizer":
            return sum(self.plan.sizes)
        return 1 if stage == "duplicates" else self.plan.bytes_of(unit)

    @cached_property
    def _hashed(self) -> list[int]:
        """The number of documents in each part."""
        return [len(np.load(file, mmap_mode="r")) for file in self._files("hashes")]

    def _files(self, stage: Stage) -> list[Path]:
        return [self._file(stage, unit) for unit in range(self.units(stage))]

    def _file_of(self, stage: Stage, unit: int) -> Path:
        """The file that marks a unit as finished."""
        return self._done / f"{stage}-{unit:05d}-{self._key(stage, unit)[:16]}{_SUFFIX[stage]}"

    def _key(self, stage: Stage, unit: int) -> str:
        """A hash of everything that the content of a unit depends on."""
        plan = self.plan
        if stage == "tokenizer":
            return self._tokenizer_key
        if stage == "duplicates" or (stage == "parts" and plan.options.dedup):
            return digest(stage, plan.made_from, self._tokenizer_key)
        inputs = list(plan.identities[slice(*plan.parts[unit])])
        return digest(stage, plan.settings, self._tokenizer_key, len(plan.parts) == 1, self._prompts, inputs)

    @cached_property
    def _tokenizer_key(self) -> str:
        return digest(self.plan.settings) if self.plan.model else self.plan.made_from

    # ---- do a unit

    @contextmanager
    def doing(self, stage: Stage, workers: int) -> Iterator[Do]:
        """A function that does a unit of a stage and commits it. workers: number of tokenizing processes.

        The function raises ValueError (bad input, one line), OSError, or BrokenProcessPool if one of its processes was
        killed. Then nothing of the unit remains.
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
        return self.plan.prompts(self._reading())

    def _reading(self) -> Reading:
        options = self.plan.options
        if self.plan.model:  # the file that was given may have been moved or removed since
            options = replace(options, tokenizer=str(self.model), tiktoken_pattern=None)
        return options.reading()

    def _train_tokenizer(self, unit: int, report: Report) -> None:
        def texts() -> Iterator[str]:
            for text, train, done in self.plan.tokenizer_sample(self._reading(), self._prompts):
                report(done)
                if train:
                    yield text

        with self._unfinished("tokenizer", unit) as folder:
            file = folder / MODEL_FILE
            Tokenizer.train(texts(), self.plan.options.vocab_size, file)
            self._commit("tokenizer", unit, file.read_bytes())

    def _write_hashes(self, part: int, report: Report) -> None:
        def hashes() -> Iterator[bytes]:
            for document, _, position in self.plan.documents(part, self._reading(), self._prompts):
                yield text_hash(document)
                report(position)

        self.plan.refuse_changes(part)
        made = sorted_hashes(hashes())
        self.plan.refuse_changes(part)
        self._commit("hashes", part, made)

    def _find_duplicates(self, bucket: int, report: Report) -> None:
        self._commit("duplicates", bucket, duplicates(self._files("hashes"), bucket, self.units("duplicates")))

    def _write_part(self, part: int, encode: "Encode", report: Report) -> None:
        plan, reading = self.plan, self._reading()
        plan.refuse_changes(part)
        counts = {number: Counter[str]() for number in range(*plan.parts[part])}
        lowest, highest = 1.0, 0.0
        with self._unfinished("parts", part) as folder:
            suffix = "" if len(plan.parts) == 1 else f"-{part:05d}"
            writers = {split: ShardWriter(folder, split + suffix, plan.options.shard_tokens) for split in SPLITS}
            for encoded, position in encode(_batches(self._kept_documents(part, reading))):
                for number, hash, size, tokens, response in encoded:
                    drawn = draw(hash)
                    split = "validation" if drawn < plan.options.validation_fraction else "train"
                    writers[split].add(tokens, size, hash, response)
                    lowest, highest = min(lowest, drawn), max(highest, drawn)
                    count = counts[number]
                    count["documents"] += 1
                    count["bytes"] += size
                    count["tokens"] += len(tokens)
                    count["text_tokens"] += len(tokens) - (response or 1) - 1  # tokens of the text that `bytes` counts
                report(position)
            record = {
                "splits": {split: writer.close() for split, writer in writers.items()},
                "sources": [
                    {"input": plan.inputs[number].name, "size": plan.sizes[number]}
                    | {name: count[name] for name in ("documents", "bytes", "tokens", "text_tokens")}
                    for number, count in counts.items()
                ],
                "left_out": reading.left_out,
                "files": reading.files,
                "draws": [lowest, highest],
            }
            plan.refuse_changes(part)
            for file in folder.iterdir():
                put_in_place(file, self._data / file.name)
        self._commit("parts", part, json.dumps(record).encode())

    def _kept_documents(self, part: int, reading: Reading) -> Iterator[tuple[Document, int, int]]:
        """The documents of a part, without duplicates."""
        documents = self.plan.documents(part, reading, self._prompts)
        if not self.plan.options.dedup:
            yield from documents
            return
        out, count = deque(numbers_in(self._files("duplicates"), part).tolist()), 0
        for count, one in enumerate(documents, 1):
            if out and out[0] == count - 1:
                out.popleft()
                reading.left_out[DUPLICATE] += 1
            else:
                yield one
        if count != self._hashed[part]:
            self.plan.refuse_changes(part)
            raise ValueError(f"part {part} has {count:,} documents, but had {self._hashed[part]:,}: start again")

    @contextmanager
    def _unfinished(self, stage: Stage, unit: int) -> Iterator[Path]:
        """A temporary folder for a unit's output, removed at the end. After SIGKILL, `clean` removes it."""
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
        """Join all parts into one folder with a manifest. Shards are not copied. Returns the manifest, and what was
        skipped.

        Raises ValueError if a split has no document.
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
            shutil.rmtree(self._done)  # useless with other options
            raise ValueError(problem)
        shutil.copyfile(self.model, self._data / MODEL_FILE)
        (self._data / SOURCES).write_text("".join(json.dumps(source) + "\n" for source in sources), encoding="utf-8")
        manifest = write_manifest(self._data, Tokenizer.load(self._data), splits, self.plan.made_from)
        named = {name for split in splits.values() for shard in split["shards"] for name in shard.values()}
        for file in self._data.iterdir():
            if file.name not in {*named, MODEL_FILE, SOURCES, MANIFEST}:
                file.unlink()  # from a part that was divided differently, before the inputs changed
        for split in splits:
            PreparedSplit(self._data, split)
        put_in_place(self._data, out)
        return manifest, reading

    def _empty(self, splits: dict[str, dict], lowest: float, highest: float) -> str | None:
        """An error message if a split has no document. lowest, highest: smallest and largest number from `draw`."""
        count = sum(split["documents"] for split in splits.values())
        if not count:
            return f"no text in the {len(self.plan.inputs)} input files: give files with text in them"
        for split, hint in (
            ("validation", f"give --validation-fraction {math.ceil(lowest * 1e4 + 1) / 1e4} or more"),
            ("train", f"give --validation-fraction {math.floor(highest * 1e4) / 1e4} or less"),
        ):
            if not splits[split]["documents"]:
                hint = "give more documents, or divide this one into several" if count == 1 else hint
                return f"none of the {count} documents fell into the {split} split: {hint}"
        return None


def work_folder(out: Path) -> Path:
    """The hidden folder in which `out` is made."""
    return out.parent / f".{out.name}.parts"


def kept_steps(work: Path) -> int:
    """The number of finished units in a work folder, without the tokenizer."""
    return sum(not file.name.startswith("tokenizer") for file in work.glob("done/*"))


def in_use(work: Path) -> bool:
    """Whether to keep a work folder: it has finished units, or jobs write to it."""
    return kept_steps(work) > 0 or (work / JOB).exists()


# ---- tokens


_Batch = tuple[list[tuple[int, Document]], int]  # documents with the numbers of their inputs; bytes of the part so far
_Encoded = tuple[int, int, int, np.ndarray, int | None]  # input, hash, bytes, bos + tokens + eos, start of the response
Encode = Callable[[Iterable[_Batch]], Iterator[tuple[list[_Encoded], int]]]
_tokenizer: Tokenizer  # of this worker process


def _start_worker(model: Path) -> None:
    global _tokenizer
    if multiprocessing.parent_process():
        follow_parent()
    _tokenizer = Tokenizer.load(model)


def encode_document(tokenizer: Tokenizer, document: Document) -> tuple[list[int], int | None]:
    """The ids bos + tokens + eos, and the position in them where the response starts, or None without a prompt.

    Raises ValueError that names the file and the line of a text that the tokenizer would change.
    """
    if document.ids is not None:
        return [tokenizer.bos_id, *document.ids.tolist(), tokenizer.eos_id], None
    try:  # encoded separately, so that a token starts at the response, as in generation
        before = [tokenizer.bos_id, *tokenizer.encode_prompt(document.prompt or "", document.specials)]
        tokens = [*before, *tokenizer.encode(document.text), tokenizer.eos_id]
    except TextChanged as error:
        line = document.line if document.record else document.line + error.line - 1
        raise ValueError(f"{document.file}:{line}: {error}: choose another tokenizer, or leave this text out") from None
    return tokens, None if document.prompt is None else len(before)


def _encode(documents: list[tuple[int, Document]]) -> list[_Encoded]:
    encoded, dtype = [], dtype_for(_tokenizer.vocab_size)
    for number, document in documents:
        tokens, response = encode_document(_tokenizer, document)
        size = len(document.text.encode())
        encoded.append((number, document.hash(), size, np.array(tokens, dtype=dtype), response))
    return encoded


@contextmanager
def encoder(model: Path, workers: int) -> Iterator[Encode]:
    """A function that encodes batches in order. workers: number of processes; with 1, this process does it.

    Only a few batches per worker are in progress, so memory is bounded.
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
    """Batches of documents, of about BATCH characters each."""
    batch, size, position = [], 0, 0
    for document, number, position in documents:
        batch.append((number, document))
        size += len(document.text) + len(document.prompt or "")
        if size >= BATCH:
            yield batch, position
            batch, size = [], 0
    if batch:
        yield batch, position
