"""Prepared folders -> clean batches. Every row is a function of (seed, step, slot) for any number of ranks.

The worker processes only prefetch. The loader's position is given by the step, so no loader state is saved.
"""

import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from mdmtrain.config import Config, DataConfig, RunPlan
from mdmtrain.data.cache import RemoteFile, ShardCache
from mdmtrain.data.order import START, Cursor, Mixture, ShardShuffle, Shuffle
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.shards import Check, PreparedSplit, location, read_manifest
from mdmtrain.diffusion import noise
from mdmtrain.diffusion.sampler import token_table

if TYPE_CHECKING:  # text.py imports this module
    from mdmtrain.data.text import TextSplit

LENGTHS = 16  # number of different lengths that a row may be shortened to
MOST_COUNTED = 10_000_000  # maximum number of documents whose lengths are read before training


class Batch(NamedTuple):
    """The clean rows of one micro-batch (a named tuple of tensors, because the loader can pin its memory)."""

    ids: Tensor  # int64 [B, L], pad_id after a row's tokens
    eligible: Tensor  # bool [B, L], positions that may be masked: neither padding nor (except with SyRM) a prompt
    segments: Tensor | None  # int32 [B, L], document of each position, -1 at pads; None: full attention
    uniforms: Tensor  # float32 [B, L], the masking noise U of each position, in [0, 1)
    slots: Tensor  # int64 [B], index of each row in the global batch
    samples: Tensor  # int64 [B, 2], (source, window), for reports


class Rows(NamedTuple):
    """Clean rows, and which of their positions are predicted; the other positions are never masked."""

    ids: Tensor  # int64 [R, L]
    eligible: Tensor  # bool [R, L], neither padding nor a prompt or given prefix
    segments: Tensor | None  # int32 [R, L], attention only between equal values, -1 at pads; None: full attention


def open_splits(config: DataConfig, splits: Sequence[str]) -> list[list[PreparedSplit]]:
    """For each split, the opened splits of all sources, in their order. `check_splits` checks them afterwards.

    Raises ValueError that names the folder.
    """
    cache = shard_cache(config)
    opened = []
    for source in config.sources:
        manifest = read_manifest(location(source.path))
        opened.append([PreparedSplit(source.path, split, None, cache=cache, manifest=manifest) for split in splits])
    for source, *_ in opened:
        first = opened[0][0]
        if source.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"{source.folder} and {first.folder} have different tokenizers: "
                f"prepare one of them again with --tokenizer {first.folder}"
            )
    return [list(split) for split in zip(*opened, strict=True)]


def check_splits(
    splits: Sequence[list[PreparedSplit]], verify: Sequence[Check], share: tuple[int, int] = (0, 1)
) -> None:
    """Check the result of `open_splits`. verify: the check for each split. share: see PreparedSplit.check.

    Raises ValueError that names the file.
    """
    for source in zip(*splits, strict=True):
        listed = source[0].listed(share)
        for split, how in zip(source, verify, strict=True):
            split.check(how, share, listed)


def open_sources(config: DataConfig, split: str, verify: Check | None = None) -> list[PreparedSplit]:
    """Open one split of each source and check it ("size" or "sha256", default data.verify).

    Raises ValueError, naming the folder, if a check fails or a split has no row.
    """
    (sources,) = splits = open_splits(config, [split])
    check_splits(splits, [verify or config.verify])
    for source in sources:
        windows(source, config.sequence_length)
    return sources


def shard_cache(config: DataConfig) -> ShardCache | None:
    """The cache for shards from object stores, None if the configuration names none."""
    return ShardCache(Path(config.cache_dir), int(config.cache_gb * 1e9)) if config.cache_dir is not None else None


def windows(source: "PreparedSplit | TextSplit", length: int) -> int:
    """The number of rows of a split: windows of `length` tokens, or documents if the split has prompts.

    A shorter window at the end is not counted. Raises ValueError if no row has tokens to train on.
    """
    if source.prompts:
        if not source.fits(length):
            raise ValueError(
                f"{source.folder}: no response of the {source.split} split begins within a row of "
                f"data.sequence_length={length}: lengthen the rows or shorten the prompts"
            )
        return source.documents
    if source.tokens < length:
        raise ValueError(
            f"{source.folder}: the {source.split} split has {source.tokens:,} tokens, not one row of "
            f"data.sequence_length={length}: shorten the rows or prepare more text"
        )
    return source.tokens // length


Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def read_row(split: "PreparedSplit | TextSplit", window: int, length: int, document_mask: bool) -> Row:
    """One window of a split as a row of `length` positions; see `span_row`.

    If the split has prompts, a row is one prompt with its response: it begins with bos and is padded or cut.
    """
    first, tokens = split.document(window) if split.prompts else (window * length, length)
    return span_row(split, first, min(tokens, length), length, document_mask)


def span_row(split: "PreparedSplit | TextSplit", first: int, tokens: int, length: int, document_mask: bool) -> Row:
    """Tokens [first, first + tokens) of a split's stream as a row of `length` positions, padded.

    Returns ids int64 [L], eligible bool [L] and the document of each position, int32 [L], -1 at pads.
    """
    ids = np.full(length, split.pad_id, dtype=np.int64)
    segments = np.full(length, -1, dtype=np.int32)
    eligible = np.zeros(length, dtype=bool)
    ids[:tokens], eligible[:tokens] = split.read(first, tokens), split.eligible(first, tokens)
    segments[:tokens] = split.documents_in(first, tokens) if document_mask else 0
    return ids, eligible, segments


def stack_rows(rows: list[Row], document_mask: bool) -> Rows:
    ids, eligible, segments = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
    return Rows(ids, eligible, segments if document_mask or (segments < 0).any() else None)


def describe_rows(source: PreparedSplit, length: int) -> str:
    """A line for the user about the rows of a split with prompts: how many there are, and how many are cut."""
    before, whole = source.document_lengths(MOST_COUNTED)
    of = f" of {len(whole):,}" if len(whole) < source.documents else ""
    return (
        f"{source.folder}: {source.documents:,} prompts with their responses, one in a row of {length}; "
        f"{int((whole > length).sum()):,}{of} do not fit and are cut, {int((before >= length).sum()):,} before the "
        "response"
    )


def shard_rows(source: PreparedSplit, length: int) -> np.ndarray:
    """The number of rows of each shard: int64 [shards].

    A row is a window inside the shard (the remaining tokens at its end are not used), or a document if the split has
    prompts. Raises ValueError if no shard has a row.
    """
    rows = np.diff(source.first_documents) if source.prompts else np.diff(source.first_tokens) // length
    if not rows.any():
        raise ValueError(
            f"{source.folder}: no shard of the {source.split} split has the tokens of a row of "
            f"data.sequence_length={length}: shorten the rows, or leave out data.shuffle_shards"
        )
    return rows


def mixture(config: Config, sources: list[PreparedSplit], cursor: Cursor = START) -> Mixture:
    """The order of a run's samples, valid from `cursor` on. Raises ValueError."""
    data = config.data
    seed = config.run.seed
    shuffles: list[Shuffle] = []
    for number, source in enumerate(sources):
        count = windows(source, data.sequence_length)
        if data.shuffle_shards is None:
            shuffles.append(Shuffle(count, seed, number, source.shards))
        else:
            rows = shard_rows(source, data.sequence_length)
            shuffles.append(ShardShuffle(rows, data.shuffle_shards, seed, number))
    starts = [0, *cursor.phases]
    starts += [cursor.at(p.from_step, config.slots_per_step, 0).sample for p in data.phases[len(cursor.phases) :]]
    weights = [data.weights, *(phase.weights for phase in data.phases)]
    return Mixture(list(zip(starts, weights, strict=True)), shuffles)


class Dataset(torch.utils.data.Dataset):
    """A map-style dataset with the keys (step, slot) that fetches one micro-batch at a time."""

    def __init__(
        self,
        config: Config,
        sources: list[PreparedSplit],
        cursor: Cursor = START,
        validation: Sequence[PreparedSplit] = (),
    ):
        """cursor: the position from which on every step uses this configuration's batch size.

        validation: splits that each evaluation reads; their shards are kept in the cache.
        """
        self._sources = sources
        self._data = config.data
        self._cursor = cursor
        self._seed = config.run.seed
        self._slots_per_step = config.slots_per_step
        self._syrm = None
        if config.diffusion.syrm_tokens:
            if not any(source.prompts for source in sources):
                raise ValueError(
                    "diffusion.syrm_tokens also masks listed tokens of prompts, and plain text has none: leave it out, "
                    "or prepare records with 'prompt' and 'response'"
                )
            pieces = sources[0].tokenizer().pieces()
            self._syrm = token_table(config.diffusion.syrm_tokens, pieces, "diffusion.syrm_tokens")
        self.order = mixture(config, sources, cursor)
        L = config.data.sequence_length
        self._first_rows = [np.cumsum([0, *shard_rows(source, L)]) for source in sources] if self._by_shard else None
        self._ahead = ReadAhead(config, sources, self.order, cursor, validation)

    @property
    def _by_shard(self) -> bool:
        return self._data.shuffle_shards is not None

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch:
        """The micro-batch for (step, slot) pairs, all of one step."""
        step = places[0][0]
        slots = np.array([slot for _, slot in places], dtype=np.int64)
        assert all(one == step for one, _ in places), places
        self._ahead.at(step)
        source, row = self.order(self._cursor.at(step, self._slots_per_step, 0).sample + slots)
        rows = [
            self._row(one, int(number), most)
            for one, number, most in zip(source, row, self._row_lengths(step, slots), strict=True)
        ]
        ids, eligible, segments = stack_rows(rows, self._data.document_mask)
        if self._syrm is not None:
            eligible |= self._syrm[ids] & (ids != self._sources[0].pad_id)
        return Batch(
            ids=ids,
            eligible=eligible,
            segments=segments,
            uniforms=torch.from_numpy(noise.position_uniforms(self._seed, step, slots, self._data.sequence_length)),
            slots=torch.from_numpy(slots),
            samples=torch.from_numpy(np.stack([source, row], axis=1)),
        )

    def samples(self, step: int) -> dict[str, list[int]]:
        """The rows of each source that iteration `step` (from 0) reads on all ranks, in the order of the slots."""
        first = self._cursor.at(step, self._slots_per_step, 0).sample
        source, row = self.order(first + np.arange(self._slots_per_step))
        return {str(s.folder): row[source == number].tolist() for number, s in enumerate(self._sources)}

    def _row(self, source: int, number: int, most: int) -> Row:
        """A row of a source with at most `most` tokens (a prompt with its response has its own length)."""
        split = self._sources[source]
        L = self._data.sequence_length
        if split.prompts:
            return read_row(split, number, L, self._data.document_mask)
        first = number * L
        if self._first_rows is not None:
            rows = self._first_rows[source]
            shard = int(np.searchsorted(rows, number, side="right")) - 1
            first = int(split.first_tokens[shard] + (number - rows[shard]) * L)
        return span_row(split, first, most, L, self._data.document_mask)

    def _row_lengths(self, step: int, slots: np.ndarray) -> list[int]:
        """The number of tokens of each window: L, or for random_length_fraction of them a random n * L/16."""
        L = self._data.sequence_length
        fraction = self._data.random_length_fraction
        if not fraction:
            return [L] * len(slots)
        cut, which = noise.position_uniforms(self._seed, step, slots, 2, noise.Stream.LENGTH).T
        return np.where(cut < fraction, np.maximum(1, L * (1 + (which * LENGTHS).astype(int)) // LENGTHS), L).tolist()


class ReadAhead:
    """Download the next shards from object stores, in a thread of each process that reads rows.

    For each source these are the shards of the current turn (see Shuffle), then those of the next turn, up to the end
    of the run. The processes of a node share the cache, and no two of them download the same file.
    """

    def __init__(
        self, config: Config, sources: list[PreparedSplit], order: Mixture, cursor: Cursor,
        validation: Sequence[PreparedSplit],
    ):  # fmt: skip
        self._sources = sources
        self._order = order
        self._cursor = cursor
        self._mask = config.data.document_mask
        self._steps = config.run.steps
        self._slots = config.slots_per_step
        # Steps that a worker process may be ahead of training: one for each prefetched batch, and one for the ranks.
        self._lag = config.data.workers * config.data.prefetch + 1
        self._validation = [split for split in validation if split.cache is not None]
        self._cache = next((source.cache for source in sources if source.cache is not None), None)
        self._step, self._process = 0, 0

    def at(self, step: int) -> None:
        """Tell the thread that the calling process now reads rows of `step`."""
        if self._cache is None:
            return
        self._step = step
        if self._process != os.getpid():  # a fork does not copy threads
            self._process, self._new = os.getpid(), threading.Event()
            threading.Thread(target=self._run, daemon=True).start()
        self._new.set()

    def files(self, step: int) -> list[RemoteFile]:
        """The files that must be in the cache while `step` is read; those that are needed first come first."""

        def counts(at: int) -> np.ndarray:
            """The number of rows of each source that are read before step `at`."""
            return self._order.counts(self._cursor.at(at, self._slots, 0).sample)

        begin = counts(max(step - self._lag, self._cursor.step))
        now = counts(min(step + 1, self._steps))
        end = counts(self._steps)
        needed, next_ones = [], []
        for number, source in enumerate(self._sources):
            if source.cache is None or begin[number] == end[number]:
                continue
            shuffle = self._order.sources[number]
            first = shuffle.turn_of(int(begin[number]))
            last = shuffle.turn_of(max(int(begin[number]), int(now[number]) - 1))
            needed += [(source, shard) for turn in range(first, last + 1) for shard in shuffle.shards_of(turn)]
            if first == last and shuffle.first_read(last + 1) < end[number]:
                next_ones += [(source, shard) for shard in shuffle.shards_of(last + 1)]
        held_out = [(split, shard) for split in self._validation for shard in range(split.shards)]
        return [
            file for source, shard in (*needed, *held_out, *next_ones)
            for file in source.remote_files(int(shard), self._mask)
        ]  # fmt: skip

    def _run(self) -> None:
        new = self._new
        assert self._cache is not None, "nothing to fetch into"
        while True:
            new.wait()
            new.clear()
            # The reader of the rows will report a failure; until then the download may be tried again.
            with suppress(ValueError):
                for _ in self._cache.fetch_ahead(self.files(self._step)):
                    if new.is_set():
                        break


def train_loader(
    config: Config, plan: RunPlan, rank: int, sources: list[PreparedSplit], first_step: int, pin_memory: bool,
    cursor: Cursor = START, validation: Sequence[PreparedSplit] = (),
) -> Iterable[Batch]:  # fmt: skip
    """The micro-batches of `rank`, in order, for steps first_step .. run.steps - 1 (plan.accumulation per step)."""
    workers = config.data.workers
    places = (
        [(step, slot) for slot in plan.slots(rank, micro_step)]
        for step in range(first_step, config.run.steps)
        for micro_step in range(plan.accumulation)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        return StatefulDataLoader(
            Dataset(config, sources, cursor, validation),
            batch_sampler=places,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=config.data.prefetch if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            snapshot_every_n_steps=1 << 62,  # its state is never used
        )


@contextmanager
def loader_errors() -> Iterator[None]:
    """Turn an error or the death of a loader's worker process into a ValueError of one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not str(error).startswith("Caught "):
            raise
        last = str(error).strip().splitlines()[-1]  # the line after the worker's traceback
        raise ValueError(last.partition(": ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a loader process was killed ({str(error).split(': ')[-1]}): out of memory, or a disk that failed: lower "
            "data.workers or data.prefetch, check the disk, and start again"
        ) from error


def _as_it_is(batch: Batch) -> Batch:
    return batch  # __getitems__ has collated it


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    follow_parent()


def validation_rows(split: "PreparedSplit | TextSplit", rows: int, sequence_length: int, document_mask: bool) -> Rows:
    """`rows` rows of a split (all, if it has fewer), evenly spaced and always the same. Raises ValueError.

    A row that is cut before its response is left out. Prompts are not eligible, even with SyRM.
    """
    count = windows(split, sequence_length)
    rows = min(rows, count)
    chosen = [row * count // rows for row in range(rows)]
    read = [read_row(split, one, sequence_length, document_mask) for one in chosen]
    read = [row for row in read if row[1].any()]
    if not read:
        raise ValueError(
            f"{split.folder}: none of the {rows} rows of the {split.split} split has room for a response after its "
            f"prompt: raise eval.rows or data.sequence_length={sequence_length}"
        )
    return stack_rows(read, document_mask)


def random_rows(splits: list[PreparedSplit], config: DataConfig, rows: int, bits: np.random.Philox) -> Rows:
    """`rows` rows drawn independently from the mixture, with replacement."""
    weights = np.array(config.weights)
    chosen = np.searchsorted(np.cumsum(weights) / weights.sum(), noise.uniforms(bits, rows), side="right")
    counts = [windows(split, config.sequence_length) for split in splits]
    L = config.sequence_length
    places = [(splits[s], int(word) % counts[s]) for s, word in zip(chosen, bits.random_raw(rows), strict=True)]
    return stack_rows([read_row(*place, L, config.document_mask) for place in places], config.document_mask)
