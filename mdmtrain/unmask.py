"""The sampler for generation. It replaces mask tokens by text, a few at each step.

It follows LLaDA (arXiv 2502.09992, section 2.4 and appendix B). At each step the model proposes a token for every
masked position of the current block. The most confident proposals (or random ones) are kept, the others are masked
again.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mdmtrain.diffusion import noise
from mdmtrain.diffusion.noise import Stream

SMALLEST_TEMPERATURE = 1e-6  # with a lower one, rounding removes the noise, and the result is the same as with 0
OnStep = Callable[[Tensor], None]  # is called with the row of tokens after each step


@dataclass(frozen=True)
class Sampling:
    """The settings of generation. Raises ValueError that names the command-line option, for an invalid value."""

    gen_length: int  # tokens in each gap; in the longest gap, if they differ
    steps: int  # forward passes, divided evenly over the blocks; each unmasks an equal share of its block
    block_length: int  # gaps are filled block by block from the left, all gaps at once; gen_length: one block
    temperature: float = 0.0  # 0: the most probable token
    cfg_scale: float = 0.0  # guidance: logits u + (cfg_scale + 1) (c - u), where u has every given token masked
    remasking: str = "low_confidence"  # low_confidence | random: which proposals are masked again
    seed: int = 0
    top_k: int | None = None  # draw among this many most probable tokens
    top_p: float = 1.0  # draw among the fewest most probable tokens with this total probability
    eos: str = "any"  # any: like other tokens | last: kept only after all other proposals | never: not chosen

    def __post_init__(self) -> None:
        for name in ("gen_length", "steps", "block_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.gen_length % self.block_length:
            divisors = ", ".join(str(n) for n in range(1, self.gen_length + 1) if self.gen_length % n == 0)
            raise ValueError(
                f"--block-length {self.block_length} does not divide --gen-length {self.gen_length}: "
                f"choose one of {divisors}"
            )
        if self.steps % self.blocks:
            raise ValueError(
                f"--steps {self.steps} cannot be divided evenly over {self.blocks} blocks (--gen-length "
                f"{self.gen_length} / --block-length {self.block_length}): make it a multiple of {self.blocks}"
            )
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"--temperature {self.temperature:g} is too small (below {SMALLEST_TEMPERATURE:g}) to differ from 0: "
                "give 0 for the most probable token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError("--top-k must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError("--top-p must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ValueError(
                "--top-k and --top-p have no effect with --temperature 0: set --temperature, or leave them out"
            )
        if self.eos not in ("any", "last", "never"):
            raise ValueError("--eos must be any, last or never")
        if not 0 <= self.seed < 2**63:
            raise ValueError("--seed must be 0 or more and below 2^63")

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length


@dataclass(frozen=True)
class MaskedRow:
    """A row of tokens with masks in it."""

    ids: Tensor  # int64 [L] on the model's device
    sampling: Sampling
    sample: int  # number of the draw: (seed, sample) determines the noise in any batch and on any number of ranks
    gaps: Sequence[int] | None = None  # tokens of each gap, in order; None: all have sampling.gen_length
    eos: tuple[int, int] | None = None  # (id, first position where the text may end)


def unmask(
    model: nn.Module,
    ids: Tensor,
    mask_id: int,
    forbidden: list[int],
    sampling: Sampling,
    sample: int,
    eos: tuple[int, int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Replace every mask_id in a single row by the model's choice (see `unmask_rows`). Returns int64 [L]."""
    return unmask_rows(model, [MaskedRow(ids, sampling, sample, eos=eos)], mask_id, forbidden, on_step)[0]


@torch.no_grad()
def unmask_rows(
    model: nn.Module, rows: Sequence[MaskedRow], mask_id: int, forbidden: list[int], on_step: OnStep | None = None
) -> list[Tensor]:
    """Replace every mask_id in the rows by the model's choice. Rows share forward passes, but do not affect each other.

    forbidden: ids that are never chosen. When no mask is left before an eos, the masks after it become eos without
    further steps, and the row leaves the batch. Rows of different lengths are padded, which changes logits only by
    rounding. Returns int64 [L] for each row. A collective under FSDP.
    """
    filled = [row.ids.clone() for row in rows]
    cfg_scale = rows[0].sampling.cfg_scale
    assert all(row.sampling.cfg_scale == cfg_scale for row in rows)
    running = {n: _steps(filled[n], row, mask_id, forbidden, on_step) for n, row in enumerate(rows)}
    wanted = {n: next(steps) for n, steps in running.items() if (filled[n] == mask_id).any()}
    while wanted:
        logits = _logits(
            model, [filled[n] for n in wanted], [rows[n].ids != mask_id for n in wanted], list(wanted.values()),
            mask_id, cfg_scale,
        )  # fmt: skip
        for n, own in zip(list(wanted), logits, strict=True):
            try:
                wanted[n] = running[n].send(own)
            except StopIteration:
                del wanted[n]
    return filled


def _steps(
    ids: Tensor, row: MaskedRow, mask_id: int, forbidden: list[int], on_step: OnStep | None
) -> Generator[Tensor, Tensor, None]:
    """Fill the masks of `ids` in place. Yields each step's positions, int64 [K], and receives their logits [K, V]."""
    sampling = row.sampling
    eos = row.eos
    masks = (ids == mask_id).nonzero().squeeze(1)
    lengths = row.gaps or [sampling.gen_length] * -(-len(masks) // sampling.gen_length)
    place_in_gap = torch.cat([torch.arange(length) for length in lengths])[: len(masks)].to(ids.device)
    block_of = place_in_gap // sampling.block_length
    number = 0
    for block in range(sampling.blocks):
        inside = masks[block_of == block]
        steps = min(sampling.steps // sampling.blocks, len(inside))
        for step in range(steps):
            positions = inside[ids[inside] == mask_id]
            logits = yield positions
            logits[:, forbidden] = -math.inf
            if eos is not None:
                held = torch.ones_like(positions, dtype=torch.bool) if sampling.eos == "never" else positions < eos[1]
                logits[held, eos[0]] = -math.inf
            bits = noise.philox(sampling.seed, Stream.GENERATION, number, row.sample)
            tokens, confidence = _propose(logits, sampling, bits)
            if sampling.remasking == "random":
                confidence = torch.from_numpy(noise.uniforms(bits, len(positions))).to(ids.device)
            if eos is not None and sampling.eos == "last":
                confidence = confidence.masked_fill(tokens == eos[0], -math.inf)
            share = len(inside) // steps + (step < len(inside) % steps)  # as in LLaDA: the remainder goes to the first
            keep = confidence.argsort(descending=True, stable=True)[:share]
            ids[positions[keep]] = tokens[keep]
            number += 1
            if eos is not None and _ended(ids, mask_id, *eos):
                ids.masked_fill_(ids == mask_id, eos[0])
                return
            if on_step is not None:
                on_step(ids)


def _logits(
    model: nn.Module, rows: list[Tensor], given: list[Tensor], positions: list[Tensor], mask_id: int, cfg_scale: float
) -> list[Tensor]:
    """The logits of some positions of each row, with classifier-free guidance by the given tokens.

    rows: int64 [L] each; given: bool [L] each; positions: int64 [K] each. Returns float64 [K, V] for each row.
    """
    if cfg_scale != 0:
        unknown = [row.masked_fill(known, mask_id) for row, known in zip(rows, given, strict=True)]
        rows = rows + unknown
        positions = positions * 2
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=mask_id) for row in rows])
    flat = torch.cat([number * length + own for number, own in enumerate(positions)])
    if all(len(row) == length for row in rows):
        logits = model(ids, flat)
    else:
        ends = torch.tensor([len(row) for row in rows], device=ids.device)
        padding = torch.arange(length, device=ids.device) >= ends[:, None]
        logits = model(ids, flat, segments=-padding.int())
    each = [part.double() for part in logits.split([len(own) for own in positions])]
    if cfg_scale == 0:
        return each
    half = len(each) // 2
    return [u + (cfg_scale + 1) * (c - u) for c, u in zip(each[:half], each[half:], strict=True)]


def _propose(logits: Tensor, sampling: Sampling, bits: np.random.Philox) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [K, V], and its probability under the model: int64 [K], float64 [K]."""
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:  # the Gumbel-max trick in float64, because float32 lowers the effective temperature (arXiv 2409.02908)
        uniform = torch.from_numpy(noise.uniforms(bits, logits.numel())).double().view_as(logits).to(logits.device)
        gumbel = -(-(uniform + 2.0**-25).log()).log()
        tokens = (_truncated(logits / sampling.temperature, sampling) + gumbel).argmax(dim=-1)
    return tokens, logits.softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)


def _truncated(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [K, V], divided by the temperature, with -inf for the tokens that top_k and then top_p exclude."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(dim=-1)
        beyond = share.cumsum(dim=-1) - share >= sampling.top_p  # the tokens before it already have top_p
        logits = logits.masked_fill(beyond.gather(1, order.argsort(dim=-1)), -math.inf)
    return logits


def _ended(ids: Tensor, mask_id: int, eos_id: int, first: int) -> bool:
    """Whether there is an eos at position `first` or later without a mask before it."""
    stops = ((ids == mask_id) | ((ids == eos_id) & (torch.arange(len(ids), device=ids.device) >= first))).nonzero()
    return len(stops) > 0 and int(ids[stops[0]]) == eos_id
