"""Prepared folders -> clean batches. Every row is a function of (seed, step, slot), whatever the ranks and workers.

The loader's processes prefetch and nothing more: its position is the step, so none of its state is ever saved.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from mdmtrain.config import Config, DataConfig, RunPlan
from mdmtrain.data.order import START, Cursor, Mixture
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.shards import Check, PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion import noise
from mdmtrain.diffusion.sampler import token_table

if TYPE_CHECKING:  # text.py imports this module
    from mdmtrain.data.text import TextSplit

LENGTHS = 16  # different lengths that a row may be cut to


class Batch(NamedTuple):
    """The clean rows of one micro-batch (a named tuple of tensors: the loader pins it as it is)."""

    ids: Tensor  # int64 [B, L], pad_id after a row's tokens
    eligible: Tensor  # bool [B, L], positions that may be masked: neither padding nor (but for SyRM) a prompt
    segments: Tensor | None  # int32 [B, L], document of each position, -1 at pads; None: all attend to all
    uniforms: Tensor  # float32 [B, L], the masking noise U of each position, in [0, 1)
    slots: Tensor  # int64 [B], place of each row in the global batch
    samples: Tensor  # int64 [B, 2], (source, window), for reports


class Rows(NamedTuple):
    """Clean rows, and which of their positions are to be predicted: the others stay visible throughout."""

    ids: Tensor  # int64 [R, L]
    eligible: Tensor  # bool [R, L], neither padding nor a prompt or given prefix
    segments: Tensor | None  # int32 [R, L], attention stays between equal values, -1 at pads; None: all see all


def open_sources(
    config: DataConfig, split: str, verify: Check | None = None, share: tuple[int, int] = (0, 1)
) -> list[PreparedSplit]:
    """The sources' splits, checked ("size" or "sha256", default data.verify). Raises ValueError naming the folder.

    share: of the hashes, see PreparedSplit.
    """
    sources = [PreparedSplit(source.path, split, verify or config.verify, share) for source in config.sources]
    for source in sources:
        if source.tokenizer_sha256 != sources[0].tokenizer_sha256:
            raise ValueError(
                f"{source.folder} and {sources[0].folder} have different tokenizers: "
                f"prepare one of them again with --tokenizer {sources[0].folder}"
            )
        windows(source, config.sequence_length)
    return sources


def windows(source: "PreparedSplit | TextSplit", length: int) -> int:
    """Rows of a split: windows of `length` tokens (a last, shorter one is left out), or documents, if it has prompts.

    Raises ValueError where there is none with anything to train on.
    """
    if source.prompts:
        if source.document_lengths()[0].min() >= length:
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


def read_row(split: "PreparedSplit | TextSplit", window: int, length: int, most: int, document_mask: bool) -> Row:
    """One window of a split as a row of `length` positions, padded after `most` tokens.

    A prompt and its response are a row of their own, from its bos, padded after its eos or cut. Returns ids int64 [L],
    eligible bool [L] and the document of each position, int32 [L], -1 at pads.
    """
    first, tokens = split.document(window) if split.prompts else (window * length, most)
    tokens = min(tokens, length)
    ids, segments = np.full(length, split.pad_id, dtype=np.int64), np.full(length, -1, dtype=np.int32)
    eligible = np.zeros(length, dtype=bool)
    ids[:tokens], eligible[:tokens] = split.read(first, tokens), split.eligible(first, tokens)
    segments[:tokens] = split.documents_in(first, tokens) if document_mask else 0
    return ids, eligible, segments


def stack_rows(rows: list[Row], document_mask: bool) -> Rows:
    ids, eligible, segments = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
    return Rows(ids, eligible, segments if document_mask or (segments < 0).any() else None)


def describe_rows(source: PreparedSplit, length: int) -> str:
    """What a person should know about the rows of a split with prompts: a line."""
    before, whole = source.document_lengths()
    return (
        f"{source.folder}: {source.documents:,} prompts with their responses, one in a row of {length}; "
        f"{int((whole > length).sum()):,} do not fit and are cut, {int((before >= length).sum()):,} before the response"
    )


class Dataset(torch.utils.data.Dataset):
    """Map-style over (step, slot); fetches a micro-batch at a time."""

    def __init__(self, config: Config, sources: list[PreparedSplit], cursor: Cursor = START):
        """cursor: from where on every step has had this configuration's batch."""
        self._sources, self._data, self._cursor = sources, config.data, cursor
        self._seed, self._slots_per_step = config.run.seed, config.slots_per_step
        sizes = [windows(source, config.data.sequence_length) for source in sources]
        self._syrm = None
        if config.diffusion.syrm_tokens:
            if not any(source.prompts for source in sources):
                raise ValueError(
                    "diffusion.syrm_tokens also masks listed tokens of prompts, and plain text has none: leave it out, "
                    "or prepare records with 'prompt' and 'response'"
                )
            pieces = Tokenizer.load(sources[0].folder).pieces()
            self._syrm = token_table(config.diffusion.syrm_tokens, pieces, "diffusion.syrm_tokens")
        self._mixture = Mixture([source.weight for source in config.data.sources], sizes, config.run.seed)

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch:
        """The micro-batch of (step, slot) pairs, all of one step."""
        step, slots = places[0][0], np.array([slot for _, slot in places], dtype=np.int64)
        assert all(one == step for one, _ in places), places
        L = self._data.sequence_length
        source, window = self._mixture(self._cursor.at(step, self._slots_per_step, 0).sample + slots)
        rows = [
            read_row(self._sources[one], int(number), L, most, self._data.document_mask)
            for one, number, most in zip(source, window, self._row_lengths(step, slots), strict=True)
        ]
        ids, eligible, segments = stack_rows(rows, self._data.document_mask)
        if self._syrm is not None:
            eligible |= self._syrm[ids] & (ids != self._sources[0].pad_id)
        return Batch(
            ids=ids,
            eligible=eligible,
            segments=segments,
            uniforms=torch.from_numpy(noise.position_uniforms(self._seed, step, slots, L)),
            slots=torch.from_numpy(slots),
            samples=torch.from_numpy(np.stack([source, window], axis=1)),
        )

    def samples(self, step: int) -> dict[str, list[int]]:
        """What iteration `step` (from 0) reads, on all ranks: the windows of each source, in the order of the slots."""
        first = self._cursor.at(step, self._slots_per_step, 0).sample
        source, window = self._mixture(first + np.arange(self._slots_per_step))
        return {str(s.folder): window[source == number].tolist() for number, s in enumerate(self._sources)}

    def _row_lengths(self, step: int, slots: np.ndarray) -> list[int]:
        """Tokens of windows: all, or (random_length_fraction of the rows) one of 16 multiples of L/16, at least 1."""
        L, fraction = self._data.sequence_length, self._data.random_length_fraction
        if not fraction:
            return [L] * len(slots)
        cut, which = noise.position_uniforms(self._seed, step, slots, 2, noise.Stream.LENGTH).T
        return np.where(cut < fraction, np.maximum(1, L * (1 + (which * LENGTHS).astype(int)) // LENGTHS), L).tolist()


def train_loader(
    config: Config, plan: RunPlan, rank: int, sources: list[PreparedSplit], first_step: int, pin_memory: bool,
    cursor: Cursor = START,
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
            Dataset(config, sources, cursor),
            batch_sampler=places,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=config.data.prefetch if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            snapshot_every_n_steps=1 << 62,  # its state is never asked for
        )


@contextmanager
def loader_deaths(config: DataConfig) -> Iterator[None]:
    """Say why a loader's process may have died: a shard that was cut while it was read kills whoever reads on."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        open_sources(config, "train", "size")  # raises ValueError naming the shard
        raise ValueError(
            f"a loader process was killed ({str(error).split(': ')[-1]}): out of memory, or a disk that failed: lower "
            "data.workers or data.prefetch, check the disk, and start again"
        ) from error


def _as_it_is(batch: Batch) -> Batch:
    return batch  # __getitems__ has made it


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    follow_parent()


def validation_rows(split: "PreparedSplit | TextSplit", rows: int, sequence_length: int, document_mask: bool) -> Rows:
    """`rows` rows (or all, where there are fewer), always the same, spread evenly over a split. Raises ValueError.

    One that is cut before its response has nothing to evaluate and is left out. No prompt is eligible, even under SyRM.
    """
    count = windows(split, sequence_length)
    rows = min(rows, count)
    chosen = [row * count // rows for row in range(rows)]
    read = [read_row(split, one, sequence_length, sequence_length, document_mask) for one in chosen]
    read = [row for row in read if row[1].any()]
    if not read:
        raise ValueError(
            f"{split.folder}: none of the {rows} rows of the {split.split} split has room for a response after its "
            f"prompt: raise eval.rows or data.sequence_length={sequence_length}"
        )
    return stack_rows(read, document_mask)


def random_rows(splits: list[PreparedSplit], config: DataConfig, rows: int, bits: np.random.Philox) -> Rows:
    """`rows` rows drawn independently from the mixture, as often as chance has it."""
    weights = np.array([source.weight for source in config.sources])
    chosen = np.searchsorted(np.cumsum(weights) / weights.sum(), noise.uniforms(bits, rows), side="right")
    counts, L = [windows(split, config.sequence_length) for split in splits], config.sequence_length
    places = [(splits[s], int(word) % counts[s]) for s, word in zip(chosen, bits.random_raw(rows), strict=True)]
    return stack_rows([read_row(*place, L, L, config.document_mask) for place in places], config.document_mask)
