"""Prepared folders -> clean batches. Every row is a function of (seed, step, slot), whatever the ranks and workers.

The loader's processes prefetch and nothing more: its position is the step, so none of its state is ever saved.
"""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from mdmtrain.config import Config, DataConfig, RunPlan
from mdmtrain.data.order import Mixture
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.diffusion import noise

LENGTHS = 16  # different lengths of rows: tables per length stay few


class Batch(NamedTuple):
    """The clean rows of one micro-batch (a named tuple of tensors: the loader pins it as it is)."""

    ids: Tensor  # int64 [B, L], pad_id after a row's length
    lengths: Tensor  # int64 [B], tokens before the padding
    segments: Tensor | None  # int32 [B, L], document of each position, -1 at pads; None: all attend to all
    uniforms: Tensor  # float32 [B, L], the masking noise U of each position, in [0, 1)
    slots: Tensor  # int64 [B], place of each row in the global batch
    samples: Tensor  # int64 [B, 2], (source, window), for reports


def open_sources(config: DataConfig, split: str, verify: str | None = None) -> list[PreparedSplit]:
    """The sources' splits, checked ("size" or "sha256", default data.verify). Raises ValueError naming the folder."""
    sources = [PreparedSplit(source.path, split, verify or config.verify) for source in config.sources]
    for source in sources:
        if source.tokenizer_sha256 != sources[0].tokenizer_sha256:
            raise ValueError(
                f"{source.folder} and {sources[0].folder} have different tokenizers: "
                f"prepare one of them again with --tokenizer {sources[0].folder}"
            )
        windows(source, config.sequence_length)
    return sources


def windows(source: PreparedSplit, length: int) -> int:
    """Rows of `length` tokens in a split (a last, shorter one is left out). Raises ValueError where there is none."""
    if source.tokens < length:
        raise ValueError(
            f"{source.folder}: the {source.split} split has {source.tokens:,} tokens, not one row of "
            f"data.sequence_length={length}: shorten the rows or prepare more text"
        )
    return source.tokens // length


class Dataset(torch.utils.data.Dataset):
    """Map-style over (step, slot); fetches a micro-batch at a time."""

    def __init__(self, config: Config, sources: list[PreparedSplit]):
        self._sources, self._data = sources, config.data
        self._seed, self._slots_per_step = config.run.seed, config.slots_per_step
        sizes = [windows(source, config.data.sequence_length) for source in sources]
        self._mixture = Mixture([source.weight for source in config.data.sources], sizes, config.run.seed)

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch:
        """The micro-batch of (step, slot) pairs, all of one step."""
        step, slots = places[0][0], np.array([slot for _, slot in places], dtype=np.int64)
        assert all(one == step for one, _ in places), places
        L = self._data.sequence_length
        source, window = self._mixture(step * self._slots_per_step + slots)
        lengths = np.array([self._row_length(step, slot) for slot in slots])
        ids = np.full((len(slots), L), self._sources[0].pad_id, dtype=np.int64)
        segments = np.full((len(slots), L), -1, dtype=np.int32)
        for row, (one, first, length) in enumerate(zip(source, window * L, lengths, strict=True)):
            split = self._sources[one]
            ids[row, :length] = split.read(int(first), int(length))
            segments[row, :length] = split.documents_in(int(first), int(length)) if self._data.document_mask else 0
        masked = self._data.document_mask or (lengths < L).any()
        return Batch(
            ids=torch.from_numpy(ids),
            lengths=torch.from_numpy(lengths),
            segments=torch.from_numpy(segments) if masked else None,
            uniforms=torch.from_numpy(noise.position_uniforms(self._seed, step, slots, L)),
            slots=torch.from_numpy(slots),
            samples=torch.from_numpy(np.stack([source, window], axis=1)),
        )

    def _row_length(self, step: int, slot: int) -> int:
        """Tokens of a row: all, or (for random_length_fraction of the rows) one of 16 multiples of L/16, at least 1."""
        L, fraction = self._data.sequence_length, self._data.random_length_fraction
        if not fraction:
            return L
        cut, which = noise.uniforms(noise.philox(self._seed, noise.Stream.LENGTH, step, int(slot)), 2)
        return max(1, L * (1 + int(which * LENGTHS)) // LENGTHS) if cut < fraction else L


def train_loader(
    config: Config, plan: RunPlan, rank: int, sources: list[PreparedSplit], first_step: int, pin_memory: bool
) -> Iterable[Batch]:
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
            Dataset(config, sources),
            batch_sampler=places,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=config.data.prefetch if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            snapshot_every_n_steps=1 << 62,  # its state is never asked for
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch  # __getitems__ has made it


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    follow_parent()


def validation_rows(
    split: PreparedSplit, rows: int, sequence_length: int, document_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """`rows` windows (or all, where there are fewer), always the same, spread evenly over a split.

    Returns ids int64 [R, L] and segments int32 [R, L] (None without `document_mask`); ValueError from `windows`.
    """
    count = windows(split, sequence_length)
    rows = min(rows, count)
    places = [(split, row * count // rows) for row in range(rows)]
    return _read_windows(places, sequence_length, document_mask)


def random_rows(
    splits: list[PreparedSplit], config: DataConfig, rows: int, bits: np.random.Philox
) -> tuple[Tensor, Tensor | None]:
    """`rows` windows drawn independently from the mixture, as often as chance has it. Shapes as of validation_rows."""
    weights = np.array([source.weight for source in config.sources])
    chosen = np.searchsorted(np.cumsum(weights) / weights.sum(), noise.uniforms(bits, rows), side="right")
    counts = [windows(split, config.sequence_length) for split in splits]
    places = [(splits[s], int(word) % counts[s]) for s, word in zip(chosen, bits.random_raw(rows), strict=True)]
    return _read_windows(places, config.sequence_length, config.document_mask)


def _read_windows(
    places: list[tuple[PreparedSplit, int]], length: int, document_mask: bool
) -> tuple[Tensor, Tensor | None]:
    ids = np.stack([split.read(window * length, length) for split, window in places])
    if not document_mask:
        return torch.from_numpy(ids), None
    segments = np.stack([split.documents_in(window * length, length) for split, window in places])
    return torch.from_numpy(ids), torch.from_numpy(segments)
