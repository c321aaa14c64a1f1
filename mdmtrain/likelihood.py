"""Four estimators of the NELBO of text under a model, with standard errors (docs/mathematics.md, sections 1 and 9).

For a row with P eligible positions, each is an unbiased estimate, in nats, of the target on the right:

    counted     k = 1..P drawn, stratified over all rows and draws; k positions masked; (P/k) sum CE     any-order NELBO
    systematic  as LLaDA draws k: in sweeps of equal steps through 1..P from a random start            any-order NELBO
    orders      a random order of the positions; the chain rule along it, one pass per position          any-order NELBO
    continuous  t ~ U[eps, 1], stratified; each position masked with probability t; (1/t) sum CE         cut at eps

The any-order NELBO is E_order[-log p(x | order)], an upper bound on -log p(x). The NELBO cut at eps differs from it by
at most a fraction eps, if masking more of a text does not make its tokens easier to predict. A causal model needs no
estimator: its likelihood is exact.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from mdmtrain.data.loader import Rows
from mdmtrain.diffusion import noise, strata
from mdmtrain.diffusion.masks import bernoulli
from mdmtrain.diffusion.noise import Stream
from mdmtrain.diffusion.objective import MaskedBatch, assemble, corrupt_counted, next_token, row_losses
from mdmtrain.model.transformer import Transformer, masked_cross_entropy
from mdmtrain.parallel.forward_passes import deal
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World

ESTIMATORS = ("counted", "systematic", "orders", "continuous")
NEXT_TOKEN = "next_token"  # the exact value of a causal model
SWEEP = 16  # draws in a sweep of `systematic`; at least two sweeps are needed, because its error is estimated from them
FEW_ROWS = 30  # with fewer rows, the spread over rows is a poor estimate of the error
RATES = 8  # intervals of the masking rate in Estimate.by_rate
MOST_ERRORS = 4.0  # estimators that differ by more than this many standard errors disagree


@dataclass(frozen=True)
class Estimator:
    """An estimator and its settings. Raises ValueError if `draws` is not a whole number of sweeps (systematic)."""

    name: str  # one of ESTIMATORS, or NEXT_TOKEN
    draws: int  # forward passes of a row; for `orders`, orders of its positions
    seed: int
    eps: float  # smallest rate of `continuous`

    def __post_init__(self) -> None:
        multiple = 2 if self.draws <= 2 * SWEEP else SWEEP
        if self.name == "systematic" and self.draws % multiple:
            raise ValueError(
                f"--mc-num {self.draws}: the systematic estimator needs an even number of draws up to {2 * SWEEP}, and "
                f"above that a multiple of {SWEEP}"
            )

    @property
    def target(self) -> str:
        """The quantity that is estimated, in words."""
        cut = f"NELBO cut at eps={self.eps:g}"
        return {"continuous": cut, NEXT_TOKEN: "likelihood of the next token"}.get(self.name, "any-order NELBO")


@dataclass(frozen=True)
class Estimate:
    """The estimated nats of R rows, in the order of the rows."""

    nats: np.ndarray  # float64 [R]
    noise: np.ndarray  # float64 [R], variance of nats over the draws for the given text; nan for a single draw
    tokens: np.ndarray  # int64 [R], eligible positions
    passes: int  # number of rows in all forward passes
    # float64 [RATES], nats: the cross-entropy of a masked token at masking rates between i / RATES and (i + 1) / RATES.
    # nan: no pass had such a rate. Their mean estimates the NELBO. None for a causal model, and for `orders`.
    by_rate: np.ndarray | None = None

    @property
    def nelbo(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of `nelbo` as an estimate for the source of the rows: over rows and draws."""
        return _ratio_error(self.nats, self.tokens)

    @property
    def noise_error(self) -> float:
        """Standard error of `nelbo` as an estimate for these rows: over draws only.

        It is too large if the draws are stratified over rows.
        """
        return float(math.sqrt(self.noise.sum()) / self.tokens.sum())


def _ratio_error(values: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of sum(values) / sum(tokens) over independent rows. Infinite for a single row."""
    rows = len(values)
    if rows < 2:
        return math.inf
    residuals = values - values.sum() / tokens.sum() * tokens
    return float(np.sqrt((residuals**2).sum() * rows / (rows - 1)) / tokens.sum())


@dataclass(frozen=True)
class Comparison:
    """Two estimators on the same rows. Their difference has mean 0, except for the cut at eps."""

    between: tuple[str, str]
    difference: float  # first minus second, nats per token
    standard_error: float  # over the rows' paired differences; with few rows, that over the draws if it is larger
    allowed: float  # largest effect of the cut: eps x NELBO

    @property
    def agree(self) -> bool:
        return not abs(self.difference) > MOST_ERRORS * self.standard_error + self.allowed


def compare(estimates: dict[Estimator, Estimate]) -> list[Comparison]:
    """Compare each pair of estimates of the same rows."""
    found = []
    for (a, x), (b, y) in combinations(estimates.items(), 2):
        cut = max((e.eps for e in (a, b) if e.name == "continuous"), default=0.0)
        error = _ratio_error(x.nats - y.nats, x.tokens)
        if len(x.nats) < FEW_ROWS:
            by_draws = math.hypot(x.noise_error, y.noise_error)
            error = max(error, by_draws) if len(x.nats) > 1 else by_draws
        found.append(Comparison((a.name, b.name), x.nelbo - y.nelbo, error, cut * max(x.nelbo, y.nelbo)))
    return found


# ---- forward passes


@dataclass(frozen=True)
class Passes:
    """T forward passes of one row each."""

    row: np.ndarray  # int64 [T], ascending
    group: np.ndarray  # int64 [T]; groups are independent, passes in a group share noise; a row's groups have one size
    u: np.ndarray  # float64 [T] on [0, 1), determines the count or the rate
    slot: np.ndarray  # int64 [T], slot number of the positions' noise


def passes_of(estimator: Estimator, tokens: np.ndarray) -> Passes:
    """The forward passes for R rows. tokens: int64 [R], eligible positions of each row."""
    rows = np.arange(len(tokens))
    draws = estimator.draws
    stream_step = 2 * ESTIMATORS.index(estimator.name)
    if estimator.name == "orders":  # k = P .. 1 masked, along one order
        P = tokens.repeat(draws)
        order = np.arange(len(P)).repeat(P)
        revealed = np.arange(len(order)) - (np.cumsum(P) - P).repeat(P)
        return Passes(rows.repeat(draws)[order], order, (P[order] - revealed - 0.5) / P[order], order)
    row = rows.repeat(draws)
    each = np.arange(len(rows) * draws)
    if estimator.name == "systematic":
        length = min(SWEEP, draws // 2)
        sweep = each // length
        starts = strata.uniforms(estimator.seed, stream_step, len(each) // length, "none", Stream.EVALUATION)
        return Passes(row, sweep, (starts[sweep] + each % length / length) % 1.0, each)
    u = strata.uniforms(estimator.seed, stream_step, len(each), "global", Stream.EVALUATION)
    return Passes(row, each, u, each)


def corrupt(estimator: Estimator, rows: Rows, passes: Passes, chosen: np.ndarray, mask_id: int) -> MaskedBatch:
    """The model's input for some passes. The value of a row, in nats, is its sum(weights * CE).

    chosen: int64 [B], numbers of the passes.
    """
    row = torch.from_numpy(passes.row[chosen])
    u = passes.u[chosen]
    ids = rows.ids[row]
    eligible = rows.eligible[row]
    stream_step = 2 * ESTIMATORS.index(estimator.name) + 1
    uniforms = torch.from_numpy(
        noise.position_uniforms(estimator.seed, stream_step, passes.slot[chosen], ids.shape[1], Stream.EVALUATION)
    ).masked_fill(~eligible, 1.0)
    if estimator.name == "continuous":
        t = estimator.eps + (1 - estimator.eps) * u
        masked = bernoulli(uniforms.numpy(), t, eligible.numpy())
        return assemble(ids, masked, 1 / t[:, None], 1 / t[:, None], mask_id)
    counted = corrupt_counted(ids, eligible, uniforms, u, mask_id)
    if estimator.name != "orders":
        return counted
    # Only the masked position that is revealed next counts: the last one in the order of the uniforms. A row's nats are
    # the sum over its P steps, but its value is the mean over its passes, so each has weight P.
    P = eligible.sum(dim=1)
    last = torch.from_numpy(np.floor(u * P.numpy())).long()
    position = uniforms.argsort(dim=1, stable=True).gather(1, last[:, None]).squeeze(1)
    flat = position + torch.arange(len(ids)) * ids.shape[1]
    return MaskedBatch(counted.noisy, flat, ids.flatten()[flat], P.float(), P.float())


def estimate(
    model: Transformer,
    rows: Rows,
    estimator: Estimator,
    batch: int,
    mask_id: int,
    world: World,
    watch: Watchdog | None = None,
) -> Estimate:
    """Estimate the nats of each row. A collective; equal on any number of ranks. watch: see `deal`.

    Every row must have an eligible position. A causal model cannot predict the first position of a row. If this
    position is eligible, its loss is set to the mean of the others.
    """
    tokens = rows.eligible.sum(dim=1).numpy()
    assert tokens.min() > 0
    if model.shape.causal:  # a row in which only the first position is eligible does not count
        tokens = tokens * rows.eligible[:, 1:].any(dim=1).numpy()
    each = np.arange(len(tokens))
    passes = Passes(each, each, each * 0.0, each) if model.shape.causal else passes_of(estimator, tokens)

    def values(chosen: np.ndarray) -> Tensor:
        if model.shape.causal:
            masked_batch = next_token(rows.ids[chosen], rows.eligible[chosen])
        else:
            masked_batch = corrupt(estimator, rows, passes, chosen, mask_id)
        masked_batch = masked_batch.to(world.device)
        visible = None if rows.segments is None else rows.segments[passes.row[chosen]]
        return row_losses(masked_cross_entropy(model, masked_batch, visible, 1), masked_batch)

    found = deal(len(passes.row), batch, values, model, world, watch)
    whole = _by_row(found, passes, tokens)
    if model.shape.causal or estimator.name == "orders":  # `orders` has no rates between whole numbers of tokens
        return whole
    return replace(whole, by_rate=_by_rate(found, passes, tokens))


def _by_rate(values: np.ndarray, passes: Passes, tokens: np.ndarray) -> np.ndarray:
    """Estimate.by_rate. values: float64 [T], nats of a row by each pass."""
    interval = (passes.u * RATES).astype(int)
    with np.errstate(invalid="ignore"):
        return np.bincount(interval, values, RATES) / np.bincount(interval, tokens[passes.row], RATES)


def _by_row(values: np.ndarray, passes: Passes, tokens: np.ndarray) -> Estimate:
    """The mean of each row's passes, and its variance from the independent groups. values: float64 [T]."""
    nats = np.bincount(passes.row, values) / np.bincount(passes.row)
    group = np.bincount(passes.group, values) / np.bincount(passes.group)
    row = passes.row[np.unique(passes.group, return_index=True)[1]]
    groups = np.bincount(row)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.bincount(row, (group - nats[row]) ** 2) / (groups - 1) / groups
    return Estimate(nats, variance, tokens, len(values))
