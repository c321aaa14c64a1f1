"""The training objective: clean rows and noise in, masked rows and loss weights out (mathematics.md).

    l(x0, t, M) = 1/(P t) sum_i M_i CE_i        P eligible positions, masking rate t, masked set M

The step's loss is sum_ij weight_ij M_ij CE_ij / (N L) over all rows j of the global batch and their masked positions
i, with N the FIXED number of rows and L the row length. A row without a mask counts as 0; nothing is divided by a
count that a rank sees alone, so the gradient is the same however rows are dealt to ranks and micro-steps. What a
method changes is where t comes from (the sampler's density p), which positions are masked (`masks`), and `weight_ij`;
its expectation is always the average of omega(t) l over t, except where `isad` says otherwise.
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
    """What the slots of a global batch drew, or some of them."""

    rates: np.ndarray  # float64 [n], t
    density: np.ndarray  # float64 [n], p(t) relative to uniform

    def at(self, slots: np.ndarray) -> "MaskingRates":
        return MaskingRates(self.rates[slots], self.density[slots])


@dataclass(frozen=True)
class MaskedBatch:
    """One micro-batch as the model sees it. K masked positions in B rows of L tokens."""

    noisy: Tensor  # int64 [B, L], mask_id at masked positions; the views of a slot are neighbours
    positions: Tensor  # int64 [K], flat index b * L + i of each masked position, ascending
    targets: Tensor  # int64 [K], the clean tokens there
    weights: Tensor  # float32 [K], weight of each position's cross-entropy in the loss
    unit: Tensor  # float32 [K], its weight in l: 1/(P t), or 1/k where the count was drawn; neither p nor omega

    def to(self, device: torch.device) -> "MaskedBatch":
        """Copy to the device; from pinned memory where it is a GPU, so that the host goes on without waiting."""
        tensors = (getattr(self, field.name) for field in fields(self))
        if device.type == "cuda":
            tensors = (tensor.pin_memory() for tensor in tensors)
        return MaskedBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class ForwardProcess:
    """How one step draws rates and masks and weighs them: configuration, sampler and weighting as they stand.

    Pure: every method is a function of its arguments. A new density makes a new ForwardProcess.
    """

    config: DiffusionConfig
    density: Density
    omega: Omega
    delimiters: Tensor | None = None  # bool [vocabulary], isad's listed tokens

    def draw(self, seed: int, step: int, slots: int, blocks: int = 1) -> MaskingRates:
        """Rates of all slots of a step, the same on every rank. `blocks`: ranks, used by `strata: rank` alone."""
        return self.rates_at(strata.uniforms(seed, step, slots, self.config.strata, blocks=blocks))

    def rates_at(self, u: np.ndarray) -> MaskingRates:
        """The rates that uniforms on [0, 1) stand for: float64 [n]."""
        if self.config.schedule == "cosine":
            return MaskingRates(*draw_cosine(u, self.config.eps))
        return MaskingRates(*self.density.draw(u))

    def row_cells(self, draws: MaskingRates) -> np.ndarray:
        """The sampler's cell that each row's rate lies in: int64 [slots * views], the views of a slot side by side."""
        rates = draws.rates
        if self.config.views == "complement":
            rates = np.stack([rates, 1.0 - rates], axis=1).reshape(-1)
        elif self.config.views != "single":
            rates = rates.repeat(2)
        return self.density.cell(rates)

    def corrupt(
        self, ids: Tensor, eligible: Tensor, uniforms: Tensor, draws: MaskingRates, mask_id: int
    ) -> MaskedBatch:
        """Mask a micro-batch on the host, where the number of masked positions costs no device synchronisation.

        ids: int64 [S, L] of S slots; eligible: bool [S, L], positions that may be masked; uniforms: float32 [S, L];
        draws: those of the slots. A row with nothing eligible is legal and counts as 0.
        """
        if self.config.objective == "ar":
            return next_token(ids, eligible)
        U, E = uniforms.numpy(), eligible.numpy()
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

    # ---- Bernoulli masks, each position by itself with probability t

    def _weighed_by_rate(
        self, ids: Tensor, U: np.ndarray, E: np.ndarray, draws: MaskingRates
    ) -> tuple[list, list, list]:
        """Weight omega(t)/(p(t) t), and what pairs make of it."""
        t, P = draws.rates[:, None], np.maximum(E.sum(axis=1, keepdims=True), 1)
        weight = self.omega(t) / draws.density[:, None]
        if self.config.views == "complement":  # one weight for the pair: each of the two rates could have drawn it
            first, opposite = masks.bernoulli(U, draws.rates, E), 1.0 - t
            pair = 2.0 / (draws.density[:, None] + self.density.at(opposite))
            weights = [pair * self.omega(t) / t, pair * self.omega(opposite) / opposite]
            return [first, masks.complement(first, E)], weights, [1 / (P * t), 1 / (P * opposite)]
        q = (
            t
            if self.delimiters is None
            else np.where(self.delimiters[ids].numpy(), np.minimum(1.0, t + self.config.isad_delta), t)
        )
        first, unit = masks.bernoulli(U, q, E), 1 / (P * q)
        if self.config.views == "single":
            return [first], [weight / q], [unit]
        second = masks.mirrored(U, q, E)
        if self.config.views == "mirror":
            return [first, second], [weight / q] * 2, [unit] * 2
        # dedup: each position once per pair, wherever it is masked; half of it in each view where it is in both
        once = 2.0 * weight / np.minimum(1.0, 2.0 * t) * np.where(first & second, 0.5, 1.0)
        return [first, second], [once, once], [unit] * 2

    def _weighed_by_count(self, U: np.ndarray, E: np.ndarray, draws: MaskingRates) -> tuple[list, list, list]:
        """omega_k / (q(k) k) for a row with k masks: the mean of the rate weight given the count (Rao-Blackwell)."""
        masked = masks.bernoulli(U, draws.rates, E)
        counts, P = masked.sum(axis=1), E.sum(axis=1)
        return [masked], [self._count_weights(P, counts)], [1 / (np.maximum(P, 1) * draws.rates)[:, None]]

    # ---- the number of masks itself is drawn

    def _counted(self, U: np.ndarray, E: np.ndarray, draws: MaskingRates) -> tuple[list, list, list]:
        """k = ceil(t P) of P positions, uniformly; for a pair of complements k is drawn on 0 .. P."""
        P = E.sum(axis=1)
        if self.config.views == "complement":
            counts = np.minimum(np.floor(draws.rates * (P + 1)).astype(np.int64), P)
        else:
            counts = np.clip(np.ceil(draws.rates * P).astype(np.int64), np.minimum(P, 1), P)
        first, weight = masks.counted(U, counts, E), self._count_weights(P, counts)
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
        """omega_k / (q(drawn) k) per row, k the masks of the view (default: those drawn): float64 [rows, 1]."""
        shown = counts if shown is None else shown
        weights, some = np.zeros(len(P)), shown > 0
        q, k = self.count_probability(P[some], counts[some]), shown[some]
        weights[some] = self.omega.of_count(P[some], k) / (q * k)
        return weights[:, None]

    def count_probability(self, P: np.ndarray, k: np.ndarray) -> np.ndarray:
        """q(k): the probability that k of P >= 1 eligible positions are masked. int64 [n] each; float64 [n].

        Of the rows at hand alone: with prompts and responses P takes as many values as there are rows, and a table of
        all k for a single P of 4,096 would cost as much as 128 micro-batches of 32 rows.
        """
        if self.config.masks == "counted":
            if self.config.views == "complement":
                return self.density.cdf((k + 1) / (P + 1)) - self.density.cdf(k / (P + 1))
            return np.where(k > 0, self.density.cdf(k / P) - self.density.cdf((k - 1) / P), 0.0)
        edges, p = self.density.edges, self.density.p
        below = betainc(k[:, None] + 1.0, (P - k)[:, None] + 1.0, edges)
        return (p * np.diff(below, axis=1)).sum(axis=1) / ((edges[-1] - edges[0]) * (P + 1))


def rate_range(config: DiffusionConfig) -> tuple[float, float]:
    """Between which rates t is drawn: drawn counts need no cut, and a complement must not be empty."""
    if config.masks == "counted":
        return 0.0, 1.0
    if config.views == "complement":
        return config.eps, 1.0 - config.eps
    return config.rate_low or config.eps, config.rate_high or 1.0


def omega_at(config: DiffusionConfig, progress: float) -> Omega:
    """The weighting at a point of the run, progress in [0, 1]: annealed to the NELBO over the last anneal_fraction."""
    anneal = 0.0
    if config.anneal_fraction > 0:
        anneal = min(1.0, max(0.0, (progress - (1 - config.anneal_fraction)) / config.anneal_fraction))
    name = "nelbo" if config.objective == "ar" else config.objective
    return Omega(name, config.bell, *rate_range(config), anneal)


def plain_process(config: DiffusionConfig, delimiters: Tensor | None = None) -> ForwardProcess:
    """The forward process of a run's first step: uniform rates."""
    return ForwardProcess(config, uniform_density(*rate_range(config), config.bins), omega_at(config, 0.0), delimiters)


def assemble(ids: Tensor, masked: np.ndarray, weights: np.ndarray, units: np.ndarray, mask_id: int) -> MaskedBatch:
    """Gather the masked positions. ids: int64 [B, L]; masked: bool [B, L]; weights, units: float64 [B, L] or [B, 1]."""
    flat = torch.from_numpy(masked)
    positions = flat.flatten().nonzero().squeeze(1)

    def gather(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.broadcast_to(values, masked.shape)[masked].astype(np.float32))

    return MaskedBatch(
        ids.masked_fill(flat, mask_id), positions, ids.flatten()[positions], gather(weights), gather(units)
    )


def next_token(ids: Tensor, eligible: Tensor) -> MaskedBatch:
    """The autoregressive reference: nothing is masked, and each eligible position is predicted from those before it.

    ids: int64 [B, L]; eligible: bool [B, L]. The first position cannot be predicted; the weight, eligible positions
    over predicted ones (L/(L - 1) in a full row), makes a row's sum / P its mean cross-entropy.
    """
    known = eligible.roll(-1, dims=1)
    known[:, -1] = False
    positions = known.flatten().nonzero().squeeze(1)
    predicted = known.sum(dim=1).clamp(min=1)
    rows = positions // ids.shape[1]
    weights, units = (eligible.sum(dim=1) / predicted)[rows], (1 / predicted)[rows]
    return MaskedBatch(ids, positions, ids.flatten()[positions + 1], weights, units)


def corrupt_counted(ids: Tensor, eligible: Tensor, uniforms: Tensor, u: np.ndarray, mask_id: int) -> MaskedBatch:
    """Evaluation noise: the number of masked positions itself is drawn, so no rate is cut off at eps.

    k = floor(u P) + 1 of the P eligible positions, uniformly; each masked one weighs P/k, that is: the row's value
    sum(weights * CE) / P is the mean CE over its masked positions. Over u ~ U[0, 1) its expectation is (1/P) sum_k c_k,
    the exact NELBO per token; a row with P = 0 has none and counts as 0.
    ids: int64 [B, L]; eligible: bool [B, L]; uniforms: float32 [B, L]; u: float64 [B] on [0, 1).
    """
    P = eligible.numpy().sum(axis=1)
    counts = np.minimum(np.floor(u * P).astype(np.int64) + 1, P)
    masked = masks.counted(uniforms.numpy(), counts, eligible.numpy())
    k = np.maximum(counts, 1)[:, None]
    return assemble(ids, masked, P[:, None] / k, 1 / k, mask_id)


def _interleave(views: list[np.ndarray]) -> np.ndarray:
    """[S, ...] of each view -> [S * views, ...] with the views of a slot side by side."""
    return np.stack(np.broadcast_arrays(*views), axis=1).reshape(-1, views[0].shape[-1]) if len(views) > 1 else views[0]


def row_losses(ce: Tensor, masked_batch: MaskedBatch) -> Tensor:
    """sum_i weight_ij CE_ij of each row: float32 [B], from the cross-entropies [K] of the masked positions."""
    return _row_sums(masked_batch.weights * ce, masked_batch)


def row_statistics(ce: Tensor, masked_batch: MaskedBatch, target: str) -> Tensor:
    """P-POTS' statistic of each row, without p and omega: float32 [B] (mathematics.md section 3).

    "loss": l^2. "gradient": sum_i unit_i^2 (1 - p_y,i)^2, p_y = exp(-CE) the probability of the right token: up to a
    factor between 1 and 2, and |h_i|^2, the same-token part of the head's squared gradient norm.
    """
    if target == "loss":
        return _row_sums(masked_batch.unit * ce, masked_batch).square()
    return _row_sums((masked_batch.unit * -torch.expm1(-ce)).square(), masked_batch)


def _row_sums(values: Tensor, masked_batch: MaskedBatch) -> Tensor:
    rows, length = masked_batch.noisy.shape
    sums = torch.zeros(rows, dtype=torch.float32, device=values.device)
    return sums.index_add(0, masked_batch.positions // length, values)
