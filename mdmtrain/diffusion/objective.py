"""The training objective: masks clean rows and computes the loss weights (mathematics.md).

    l(x0, t, M) = 1/(P t) sum_i M_i CE_i        P eligible positions, masking rate t, masked set M

The loss of a step is sum_ij weight_ij M_ij CE_ij / (N L) over all rows j of the global batch and their masked positions
i. N is the FIXED number of rows and L the row length. A row without a mask counts as 0. No rank divides by a count of
its own rows, so the gradient does not depend on how rows are split over ranks and micro-steps. A method chooses the
density p of t, the masked positions (`masks`) and `weight_ij`. The expected loss is the average of omega(t) l over t
for all methods but ISAD, which is biased.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.special import betainc
from torch import Tensor

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion import masks, strata
from mdmtrain.diffusion.rates import Density, uniform_density
from mdmtrain.diffusion.schedule import draw_cosine
from mdmtrain.diffusion.weighting import Omega


@dataclass(frozen=True)
class MaskingRates:
    """The masking rates of n slots of a global batch."""

    rates: np.ndarray  # float64 [n], t
    density: np.ndarray  # float64 [n], p(t) relative to uniform

    def at(self, slots: np.ndarray) -> "MaskingRates":
        """The rates of some slots."""
        return MaskingRates(self.rates[slots], self.density[slots])


@dataclass(frozen=True)
class MaskedBatch:
    """The model's input and targets for one micro-batch: K masked positions in B rows of L tokens."""

    noisy: Tensor  # int64 [B, L], mask_id at masked positions; the views of a slot are adjacent rows
    positions: Tensor  # int64 [K], flat index b * L + i of each masked position, ascending
    targets: Tensor  # int64 [K], the clean tokens there
    weights: Tensor  # float32 [K], weight of each position's cross-entropy in the loss
    unit: Tensor  # float32 [K], its weight in l, without p and omega: 1/(P t), or 1/k if the count was drawn

    def to(self, device: torch.device) -> "MaskedBatch":
        """A copy on the device. For a GPU the source is pinned memory, so that the host does not wait for the copy."""
        tensors = (getattr(self, field.name) for field in fields(self))
        if device.type == "cuda":
            tensors = (tensor.pin_memory() for tensor in tensors)
        return MaskedBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class ForwardProcess:
    """How a step draws masking rates and masks, and weights the masked tokens.

    All methods are pure functions of their arguments. A new density needs a new ForwardProcess.
    """

    config: DiffusionConfig
    density: Density
    omega: Omega
    delimiters: Tensor | None = None  # bool [vocabulary], the tokens listed in isad_tokens

    def draw(self, seed: int, step: int, slots: int, blocks: int = 1) -> MaskingRates:
        """The rates of all slots of a step, the same on every rank. blocks: number of ranks, used by `strata=rank`."""
        return self.rates_at(strata.uniforms(seed, step, slots, self.config.strata, blocks=blocks))

    def rates_at(self, u: np.ndarray) -> MaskingRates:
        """The rates that uniforms on [0, 1) map to. u: float64 [n]."""
        if self.config.schedule == "cosine":
            return MaskingRates(*draw_cosine(u, self.config.eps))
        return MaskingRates(*self.density.draw(u))

    def row_cells(self, draws: MaskingRates) -> np.ndarray:
        """The sampler's cell of each row's rate: int64 [slots * views], with the views of a slot adjacent."""
        rates = draws.rates
        if self.config.views == "complement":
            rates = np.stack([rates, 1.0 - rates], axis=1).reshape(-1)
        elif self.config.views != "single":
            rates = rates.repeat(2)
        return self.density.cell(rates)

    def corrupt(
        self, ids: Tensor, eligible: Tensor, uniforms: Tensor, draws: MaskingRates, mask_id: int
    ) -> MaskedBatch:
        """Mask a micro-batch. This happens on the host, because counting the masks on the device would synchronize.

        ids: int64 [S, L] of S slots; eligible: bool [S, L], positions that may be masked; uniforms: float32 [S, L];
        draws: the rates of the slots. A row without eligible positions is allowed and counts as 0.
        """
        if self.config.objective == "ar":
            return next_token(ids, eligible)
        U = uniforms.numpy()
        E = eligible.numpy()
        if self.config.masks == "counted":
            views, weights, units = self._counted(U, E, draws)
        elif self.config.weights == "count":
            views, weights, units = self._weighed_by_count(U, E, draws)
        else:
            views, weights, units = self._weighed_by_rate(ids, U, E, draws)
        rows = _interleave(views)
        return assemble(
            ids.repeat_interleave(len(views), dim=0), rows, _interleave(weights), _interleave(units), mask_id
        )

    # ---- Bernoulli masks: each position is masked independently with probability t

    def _weighed_by_rate(
        self, ids: Tensor, U: np.ndarray, E: np.ndarray, draws: MaskingRates
    ) -> tuple[list, list, list]:
        """Masks, weights omega(t)/(p(t) t) and units, one entry for each view."""
        t = draws.rates[:, None]
        P = np.maximum(E.sum(axis=1, keepdims=True), 1)
        weight = self.omega(t) / draws.density[:, None]
        if self.config.views == "complement":
            # Either of the two rates could have drawn this pair, so both views share the mean density.
            first = masks.bernoulli(U, draws.rates, E)
            opposite = 1.0 - t
            pair = 2.0 / (draws.density[:, None] + self.density.at(opposite))
            weights = [pair * self.omega(t) / t, pair * self.omega(opposite) / opposite]
            return [first, masks.complement(first, E)], weights, [1 / (P * t), 1 / (P * opposite)]
        q = t
        if self.delimiters is not None:
            q = np.where(self.delimiters[ids].numpy(), np.minimum(1.0, t + self.config.isad_delta), t)
        first = masks.bernoulli(U, q, E)
        unit = 1 / (P * q)
        if self.config.views == "single":
            return [first], [weight / q], [unit]
        second = masks.mirrored(U, q, E)
        if self.config.views == "mirror":
            return [first, second], [weight / q] * 2, [unit] * 2
        # mirror_dedup: a position counts once per pair. If both views mask it, each view has half of its weight.
        once = 2.0 * weight / np.minimum(1.0, 2.0 * t) * np.where(first & second, 0.5, 1.0)
        return [first, second], [once, once], [unit] * 2

    def _weighed_by_count(self, U: np.ndarray, E: np.ndarray, draws: MaskingRates) -> tuple[list, list, list]:
        """Weights omega_k / (q(k) k) of a row with k masks: the mean of the rate weight given k (Rao-Blackwell)."""
        masked = masks.bernoulli(U, draws.rates, E)
        counts = masked.sum(axis=1)
        P = E.sum(axis=1)
        return [masked], [self._count_weights(P, counts)], [1 / (np.maximum(P, 1) * draws.rates)[:, None]]

    # ---- counted masks: the number of masks is drawn

    def _counted(self, U: np.ndarray, E: np.ndarray, draws: MaskingRates) -> tuple[list, list, list]:
        """Masks of k = ceil(t P) of P positions. For a pair of complements k is drawn on 0 .. P."""
        P = E.sum(axis=1)
        if self.config.views == "complement":
            counts = np.minimum(np.floor(draws.rates * (P + 1)).astype(np.int64), P)
        else:
            counts = np.clip(np.ceil(draws.rates * P).astype(np.int64), np.minimum(P, 1), P)
        first = masks.counted(U, counts, E)
        weight = self._count_weights(P, counts)
        unit = 1 / np.maximum(counts, 1)[:, None]
        if self.config.views == "single":
            return [first], [weight], [unit]
        if self.config.views == "complement":
            weights = [weight, self._count_weights(P, counts, P - counts)]
            return [first, masks.complement(first, E)], weights, [unit, 1 / np.maximum(P - counts, 1)[:, None]]
        second = masks.counted_mirrored(U, counts, E)
        if self.config.views == "mirror":
            return [first, second], [weight, weight], [unit, unit]
        share = (counts / np.maximum(np.minimum(P, 2 * counts), 1))[:, None]
        once = 2.0 * weight * share * np.where(first & second, 0.5, 1.0)
        return [first, second], [once, once], [unit, unit]

    def _count_weights(self, P: np.ndarray, counts: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
        """The weights omega_k / (q(counts) k) of rows: float64 [rows, 1].

        counts: the drawn number of masks; shown: k, the number of masks in this view (default: `counts`).
        """
        shown = counts if shown is None else shown
        weights = np.zeros(len(P))
        some = shown > 0
        q = self.count_probability(P[some], counts[some])
        k = shown[some]
        weights[some] = self.omega.of_count(P[some], k) / (q * k)
        return weights[:, None]

    def count_probability(self, P: np.ndarray, k: np.ndarray) -> np.ndarray:
        """q(k): the probability that k of P >= 1 eligible positions are masked. P, k: int64 [n]. Returns float64 [n].

        It is computed for the given rows only. With prompts and responses nearly every row has its own P, and a table
        of all k for one P of 4,096 would cost as much as 128 micro-batches of 32 rows.
        """
        if self.config.masks == "counted":
            if self.config.views == "complement":
                return self.density.cdf((k + 1) / (P + 1)) - self.density.cdf(k / (P + 1))
            return np.where(k > 0, self.density.cdf(k / P) - self.density.cdf((k - 1) / P), 0.0)
        edges = self.density.edges
        p = self.density.p
        below = betainc(k[:, None] + 1.0, (P - k)[:, None] + 1.0, edges)
        return (p * np.diff(below, axis=1)).sum(axis=1) / ((edges[-1] - edges[0]) * (P + 1))


def rate_range(config: DiffusionConfig) -> tuple[float, float]:
    """The lowest and the highest masking rate."""
    if config.masks == "counted":  # no weight 1/t, so no cut at eps
        return 0.0, 1.0
    if config.views == "complement":  # the rates of a pair are t and 1 - t
        return config.eps, 1.0 - config.eps
    return config.rate_low or config.eps, config.rate_high or 1.0


def omega_at(config: DiffusionConfig, progress: float) -> Omega:
    """The weighting at `progress` in [0, 1] of the run. It moves to the NELBO over the last anneal_fraction."""
    anneal = 0.0
    if config.anneal_fraction > 0:
        anneal = min(1.0, max(0.0, (progress - (1 - config.anneal_fraction)) / config.anneal_fraction))
    name = "nelbo" if config.objective == "ar" else config.objective
    return Omega(name, config.bell, *rate_range(config), anneal)


def plain_process(config: DiffusionConfig, delimiters: Tensor | None = None) -> ForwardProcess:
    """The forward process of the first step of a run, with uniform rates."""
    return ForwardProcess(config, uniform_density(*rate_range(config), config.bins), omega_at(config, 0.0), delimiters)


def assemble(ids: Tensor, masked: np.ndarray, weights: np.ndarray, units: np.ndarray, mask_id: int) -> MaskedBatch:
    """Make a MaskedBatch. ids: int64 [B, L]; masked: bool [B, L]; weights, units: float64 [B, L] or [B, 1]."""
    flat = torch.from_numpy(masked)
    positions = flat.flatten().nonzero().squeeze(1)

    def gather(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.broadcast_to(values, masked.shape)[masked].astype(np.float32))

    return MaskedBatch(
        ids.masked_fill(flat, mask_id), positions, ids.flatten()[positions], gather(weights), gather(units)
    )


def next_token(ids: Tensor, eligible: Tensor) -> MaskedBatch:
    """The batch of the autoregressive objective: each eligible position is predicted from the positions before it.

    ids: int64 [B, L]; eligible: bool [B, L]. The first position cannot be predicted. A weight is the number of eligible
    positions over that of predicted ones (L/(L - 1) in a full row), so that a row's sum / P is its mean cross-entropy.
    """
    known = eligible.roll(-1, dims=1)
    known[:, -1] = False
    positions = known.flatten().nonzero().squeeze(1)
    predicted = known.sum(dim=1).clamp(min=1)
    rows = positions // ids.shape[1]
    weights = (eligible.sum(dim=1) / predicted)[rows]
    units = (1 / predicted)[rows]
    return MaskedBatch(ids, positions, ids.flatten()[positions + 1], weights, units)


def corrupt_counted(ids: Tensor, eligible: Tensor, uniforms: Tensor, u: np.ndarray, mask_id: int) -> MaskedBatch:
    """Mask rows for evaluation. The number of masked positions is drawn, so no rate is cut off at eps.

    k = floor(u P) + 1 of the P eligible positions are masked, with weight P/k each. A row's value
    sum(weights * CE) / P is then the mean CE over its masked positions. For u ~ U[0, 1) its expectation is
    (1/P) sum_k c_k, the exact NELBO per token. A row with P = 0 counts as 0.
    ids: int64 [B, L]; eligible: bool [B, L]; uniforms: float32 [B, L]; u: float64 [B] on [0, 1).
    """
    P = eligible.numpy().sum(axis=1)
    counts = np.minimum(np.floor(u * P).astype(np.int64) + 1, P)
    masked = masks.counted(uniforms.numpy(), counts, eligible.numpy())
    k = np.maximum(counts, 1)[:, None]
    return assemble(ids, masked, P[:, None] / k, 1 / k, mask_id)


def _interleave(views: list[np.ndarray]) -> np.ndarray:
    """[S, ...] of each view -> [S * views, ...], with the views of a slot adjacent."""
    if len(views) == 1:
        return views[0]
    return np.stack(np.broadcast_arrays(*views), axis=1).reshape(-1, views[0].shape[-1])


def row_losses(ce: Tensor, masked_batch: MaskedBatch) -> Tensor:
    """sum_i weight_ij CE_ij of each row: float32 [B], from the cross-entropies [K] of the masked positions."""
    return _row_sums(masked_batch.weights * ce, masked_batch)


def row_statistics(ce: Tensor, masked_batch: MaskedBatch, target: str) -> Tensor:
    """The statistic of P-POTS for each row, without p and omega: float32 [B] (mathematics.md section 3).

    target "loss": l^2. "gradient": sum_i unit_i^2 (1 - p_y,i)^2, where p_y = exp(-CE) is the probability of the right
    token. Up to |h_i|^2 and a factor between 1 and 2, this is the same-token part of the head's squared gradient norm.
    """
    if target == "loss":
        return _row_sums(masked_batch.unit * ce, masked_batch).square()
    return _row_sums((masked_batch.unit * -torch.expm1(-ce)).square(), masked_batch)


def _row_sums(values: Tensor, masked_batch: MaskedBatch) -> Tensor:
    rows, length = masked_batch.noisy.shape
    sums = torch.zeros(rows, dtype=torch.float32, device=values.device)
    return sums.index_add(0, masked_batch.positions // length, values)
