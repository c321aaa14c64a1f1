"""The training objective: clean rows and noise in, masked rows and loss weights out (VARIANCE.md sections 1 and 6).

    l(x0, t, M) = 1/(P t) sum_i M_i CE_i        P eligible positions, masking rate t, masked set M

The step's loss is the sum of importance_weight * l over the rows, each times P/L, over the FIXED number of rows N of
the global batch: sum_j sum_i weight_ij M_ij CE_ij / (N L). A row without a mask counts as 0; nothing is divided by a
count that a rank sees alone, so the gradient is the same however rows are dealt to ranks and micro-steps.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion import masks, strata
from mdmtrain.diffusion.schedule import draw_rates


@dataclass(frozen=True)
class StepRates:
    """Masking rates of the slots of a global batch, float64 [N], and their importance weights, float64 [N]."""

    rates: np.ndarray
    importance: np.ndarray

    def at(self, slots: np.ndarray) -> "StepRates":
        """Those of the given slots."""
        return StepRates(self.rates[slots], self.importance[slots])


def step_rates(config: DiffusionConfig, seed: int, step: int, slots: int) -> StepRates:
    """The rates of step `step`, the same on every rank: a pure function of the arguments."""
    u = strata.uniforms(seed, step, slots, config.strata)
    return StepRates(*draw_rates(u, config.schedule, config.eps))


@dataclass(frozen=True)
class Corruption:
    """One micro-batch as the model sees it. K masked positions in B rows of L tokens."""

    noisy: Tensor  # int64 [B, L], mask_id at masked positions
    positions: Tensor  # int64 [K], flat index b * L + i of each masked position, ascending
    targets: Tensor  # int64 [K], the clean tokens there
    weights: Tensor  # float32 [K], weight of each position's cross-entropy in the loss

    def to(self, device: torch.device) -> "Corruption":
        """Copy to the device; from pinned memory where it is a GPU, so that the host goes on without waiting."""
        tensors = (getattr(self, field.name) for field in fields(self))
        if device.type == "cuda":
            tensors = (tensor.pin_memory() for tensor in tensors)
        return Corruption(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def corrupt(ids: Tensor, lengths: Tensor, uniforms: Tensor, drawn: StepRates, mask_id: int) -> Corruption:
    """Mask a micro-batch on the host, where the number of masked positions costs no device synchronisation.

    ids: int64 [B, L]; lengths: int64 [B]; uniforms: float32 [B, L]; drawn: those of the B rows.
    """
    masked = masks.bernoulli(uniforms.numpy(), drawn.rates, lengths.numpy())
    return _apply(ids, masked, drawn.importance / drawn.rates, mask_id)


def corrupt_counted(ids: Tensor, uniforms: Tensor, u: np.ndarray, mask_id: int) -> Corruption:
    """Evaluation noise: the number of masked positions itself is drawn, so no rate is cut off at eps.

    k = floor(u L) + 1 positions, uniformly; each masked position weighs L/(L k), that is: the row's value
    sum(weights * CE) / L is the mean CE over its masked positions. Over u ~ U[0, 1) its expectation is
    (1/L) sum_k c_k, the exact NELBO per token. ids: int64 [B, L]; uniforms: float32 [B, L]; u: float64 [B] on [0, 1).
    """
    length = ids.shape[1]
    counts = np.floor(u * length).astype(np.int64) + 1
    masked = masks.counted(uniforms.numpy(), counts, np.full(len(u), length))
    return _apply(ids, masked, length / counts, mask_id)


def _apply(ids: Tensor, masked: np.ndarray, row_weights: np.ndarray, mask_id: int) -> Corruption:
    flat = torch.from_numpy(masked)
    positions = flat.flatten().nonzero().squeeze(1)
    weights = torch.from_numpy(row_weights.astype(np.float32))[positions // ids.shape[1]]
    return Corruption(
        noisy=ids.masked_fill(flat, mask_id),
        positions=positions,
        targets=ids.flatten()[positions],
        weights=weights,
    )


def row_losses(ce: Tensor, corruption: Corruption) -> Tensor:
    """sum_i weight_ij CE_ij of each row: float32 [B], from the cross-entropies [K] of the masked positions."""
    rows, length = corruption.noisy.shape
    sums = torch.zeros(rows, dtype=torch.float32, device=ce.device)
    return sums.index_add(0, corruption.positions // length, corruption.weights * ce)
