"""How likely is text under a model: four estimators of its NELBO, with errors (mathematics.md sections 1 and 9).

For a row with P eligible positions, all of them unbiased for the row's nats:

    counted     k = 1..P drawn, stratified over all rows and draws; k positions masked; (P/k) sum CE     any-order NELBO
    systematic  as LLaDA draws k: in sweeps of equal steps through 1..P from a random start            any-order NELBO
    orders      a random order of the positions; the chain rule along it, one forward pass a position    any-order NELBO
    continuous  t ~ U[eps, 1], stratified; each position masked with probability t; (1/t) sum CE         cut at eps

The any-order NELBO is E_order[-log p(x | order)], an upper bound on -log p(x). The cut one differs from it by at most
eps times its size where text gets no easier with more of it masked. A causal model has one value, the exact one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from mdmtrain.data.loader import Rows
from mdmtrain.diffusion import noise, strata
from mdmtrain.diffusion.masks import bernoulli
from mdmtrain.diffusion.noise import Stream
from mdmtrain.diffusion.objective import MaskedBatch, assemble, corrupt_counted, next_token, row_losses
from mdmtrain.model.transformer import Transformer
from mdmtrain.parallel.parallelize import reshard
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World

ESTIMATORS = ("counted", "systematic", "orders", "continuous")
NEXT_TOKEN = "next_token"  # a causal model's
SWEEP = 16  # draws in a sweep of `systematic`, or half of them all if that is less: sweeps differ by its error
FEW_ROWS = 30
MOST_ERRORS = 4.0  # estimators further apart than this many standard errors disagree


@dataclass(frozen=True)
class Estimator:
    """What is drawn for each row. Raises ValueError for draws that make no whole sweeps."""

    name: str  # one of ESTIMATORS, or NEXT_TOKEN
    draws: int  # forward passes of a row; for `orders`, orders of its positions
    seed: int
    eps: float  # smallest rate of `continuous`

    def __post_init__(self) -> None:
        if self.name == "systematic" and self.draws % (2 if self.draws <= 2 * SWEEP else SWEEP):
            raise ValueError(
                f"--mc-num {self.draws}: systematic draws come in two sweeps, beyond {2 * SWEEP} in sweeps of {SWEEP}: "
                f"give an even number, or a multiple of {SWEEP}"
            )

    @property
    def target(self) -> str:
        cut = f"NELBO cut at eps={self.eps:g}"
        return {"continuous": cut, NEXT_TOKEN: "likelihood of the next token"}.get(self.name, "any-order NELBO")


@dataclass(frozen=True)
class Estimate:
    """Nats of each of R rows, in their order."""

    nats: np.ndarray  # float64 [R]
    noise: np.ndarray  # float64 [R], variance of nats from the draws alone, the text given; nan for a single draw
    tokens: np.ndarray  # int64 [R], eligible positions
    passes: int  # rows that went through the model

    @property
    def nelbo(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float:
        """Of nelbo as a property of the source that the rows were drawn from: over rows, draws included."""
        return _ratio_error(self.nats, self.tokens)

    @property
    def noise_error(self) -> float:
        """Of nelbo as a property of these rows: the draws alone. Too large where strata spread them over the rows."""
        return float(math.sqrt(self.noise.sum()) / self.tokens.sum())


def _ratio_error(values: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of sum(values) / sum(tokens) over independent rows: infinite for a single one."""
    rows = len(values)
    if rows < 2:
        return math.inf
    residuals = values - values.sum() / tokens.sum() * tokens
    return float(np.sqrt((residuals**2).sum() * rows / (rows - 1)) / tokens.sum())


@dataclass(frozen=True)
class Comparison:
    """Two estimators of the same rows. Their differences have mean 0, but for the cut at eps."""

    between: tuple[str, str]
    difference: float  # first minus second, nats per token
    standard_error: float  # over the rows' paired differences; of few rows, by the draws where that is larger
    allowed: float  # what the cut can make: eps x NELBO

    @property
    def agree(self) -> bool:
        return not abs(self.difference) > MOST_ERRORS * self.standard_error + self.allowed


def compare(estimates: dict[Estimator, Estimate]) -> list[Comparison]:
    """Every pair of estimates of the same rows."""
    found = []
    for (a, x), (b, y) in combinations(estimates.items(), 2):
        cut = max((e.eps for e in (a, b) if e.name == "continuous"), default=0.0)
        error = _ratio_error(x.nats - y.nats, x.tokens)
        if len(x.nats) < FEW_ROWS:  # which say little of how their differences scatter
            by_draws = math.hypot(x.noise_error, y.noise_error)
            error = max(error, by_draws) if len(x.nats) > 1 else by_draws
        found.append(Comparison((a.name, b.name), x.nelbo - y.nelbo, error, cut * max(x.nelbo, y.nelbo)))
    return found


# ---- forward passes


@dataclass(frozen=True)
class Passes:
    """One forward pass of one row each: T of them."""

    row: np.ndarray  # int64 [T], ascending
    group: np.ndarray  # int64 [T], passes of one group share their noise; groups are independent, equal in size by row
    u: np.ndarray  # float64 [T], on [0, 1): which count or rate
    slot: np.ndarray  # int64 [T], names the positions' noise


def planned_passes(estimator: Estimator, tokens: np.ndarray) -> Passes:
    """The passes for rows of `tokens` eligible positions each, int64 [R]."""
    rows, draws, streams = np.arange(len(tokens)), estimator.draws, 2 * ESTIMATORS.index(estimator.name)
    if estimator.name == "orders":  # k = P .. 1 masked, along one order
        P = tokens.repeat(draws)
        order = np.arange(len(P)).repeat(P)
        revealed = np.arange(len(order)) - (np.cumsum(P) - P).repeat(P)
        return Passes(rows.repeat(draws)[order], order, (P[order] - revealed - 0.5) / P[order], order)
    row, each = rows.repeat(draws), np.arange(len(rows) * draws)
    if estimator.name == "systematic":
        length = min(SWEEP, draws // 2)
        sweep = each // length
        starts = strata.uniforms(estimator.seed, streams, len(each) // length, "none", Stream.EVALUATION)
        return Passes(row, sweep, (starts[sweep] + each % length / length) % 1.0, each)
    u = strata.uniforms(estimator.seed, streams, len(each), "global", Stream.EVALUATION)
    return Passes(row, each, u, each)


def corrupt(estimator: Estimator, rows: Rows, passes: Passes, chosen: np.ndarray, mask_id: int) -> MaskedBatch:
    """The chosen passes as the model sees them: sum(weights * CE) of a row is its value, in nats."""
    row, u = torch.from_numpy(passes.row[chosen]), passes.u[chosen]
    ids, eligible = rows.ids[row], rows.eligible[row]
    streams, slots = 2 * ESTIMATORS.index(estimator.name) + 1, passes.slot[chosen]
    uniforms = torch.from_numpy(
        noise.position_uniforms(estimator.seed, streams, slots, ids.shape[1], Stream.EVALUATION)
    ).masked_fill(~eligible, 1.0)
    if estimator.name == "continuous":
        t = estimator.eps + (1 - estimator.eps) * u
        masked = bernoulli(uniforms.numpy(), t, eligible.numpy())
        return assemble(ids, masked, 1 / t[:, None], 1 / t[:, None], mask_id)
    counted = corrupt_counted(ids, eligible, uniforms, u, mask_id)
    if estimator.name != "orders":
        return counted
    # Of the k masked positions the one that is revealed next: last in the order of the uniforms. All steps add up, and
    # a row's value is a mean over its passes, so each weighs P.
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
    """The nats of each row. A collective; the same on any number of ranks. watch: see `deal`.

    Every row must have an eligible position. A causal model cannot predict the first position of a row: where that is
    eligible, the others stand for it.
    """
    tokens = rows.eligible.sum(dim=1).numpy()
    assert tokens.min() > 0
    if model.shape.causal:  # a row with nothing but its first position has nothing to predict: it does not count
        tokens = tokens * rows.eligible[:, 1:].any(dim=1).numpy()
    each = np.arange(len(tokens))
    passes = Passes(each, each, each * 0.0, each) if model.shape.causal else planned_passes(estimator, tokens)

    def values(chosen: np.ndarray) -> Tensor:
        if model.shape.causal:
            masked_batch = next_token(rows.ids[chosen], rows.eligible[chosen])
        else:
            masked_batch = corrupt(estimator, rows, passes, chosen, mask_id)
        masked_batch = masked_batch.to(world.device)
        visible = None if rows.segments is None else rows.segments[passes.row[chosen]].to(world.device)
        ce = model(masked_batch.noisy, masked_batch.positions, masked_batch.targets, visible)
        return row_losses(ce, masked_batch)

    return _by_row(deal(len(passes.row), batch, values, model, world, watch), passes, tokens)


def _by_row(values: np.ndarray, passes: Passes, tokens: np.ndarray) -> Estimate:
    """Means over each row's passes, and the variance of a mean of independent groups. values: float64 [T]."""
    nats = np.bincount(passes.row, values) / np.bincount(passes.row)
    group = np.bincount(passes.group, values) / np.bincount(passes.group)
    row = passes.row[np.unique(passes.group, return_index=True)[1]]
    groups = np.bincount(row)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.bincount(row, (group - nats[row]) ** 2) / (groups - 1) / groups
    return Estimate(nats, variance, tokens, len(values))


@torch.no_grad()
def deal(
    count: int,
    batch: int,
    values: Callable[[np.ndarray], Tensor],
    model: Transformer,
    world: World,
    watch: Watchdog | None = None,
) -> np.ndarray:
    """values(numbers) of 0 .. count - 1, `batch` numbers at a time: float64 [count], in order. A collective.

    Batches are formed by number, whatever the ranks, so every number of ranks computes the same. watch: of a run that
    trains: each batch is progress, and a stop before one raises Interrupted, on all ranks before the same one.
    """

    def dealt_batch(number: int) -> np.ndarray:
        if watch is not None:
            watch.at("evaluation")
            watch.stop.check()
        return values(batches[number]).double().cpu().numpy()

    batches = [np.arange(first, min(first + batch, count)) for first in range(0, count, batch)]
    try:
        dealt = world.deal(len(batches), dealt_batch)
    finally:  # it may be interrupted
        reshard(model)
    return np.concatenate(dealt)
