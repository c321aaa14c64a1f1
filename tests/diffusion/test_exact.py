"""Expectations and variances without simulation: every rate (quadrature) and every masked set (enumeration).

Everything goes through `ForwardProcess.corrupt`, `row_losses` and `row_statistics` as a step does. A uniform
matters only by the side of q and 1 - q on which it lies, so a position has three states, and L positions 3^L; drawn
counts depend on the order of the uniforms alone. With rates by Gauss-Legendre between the
sampler's breaks, an expectation is exact.
"""

from itertools import combinations, pairwise, permutations, product
from math import comb, factorial
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion.objective import (
    ForwardProcess,
    MaskedBatch,
    MaskingRates,
    omega_at,
    rate_range,
    row_losses,
    row_statistics,
)
from mdmtrain.diffusion.rates import Density, fit, uniform_density
from mdmtrain.diffusion.schedule import draw_cosine

EPS, L, MASK, CELLS = 0.05, 5, 9, 8
NODES, DT = np.polynomial.legendre.leggauss(6)
IDS = torch.tensor([0, 1, 2, 0, 1])
TABLE = np.random.default_rng(4).gamma(2.0, 1.0, (2**L, L)) * [[1.0 + s.bit_count() ** 1.5] for s in range(2**L)]


def bumpy(low, high, cells=CELLS):
    """An arbitrary sampler."""
    p = np.linspace(2.0, 0.4, cells) * np.random.default_rng(1).uniform(0.6, 1.4, cells)
    return Density(np.linspace(low, high, cells + 1), p / p.mean())


def make_process(density=None, anneal_at=1.0, delimiters=None, **choice):
    """density: None for the uniform one, or a function of the range; anneal_at: progress of the run."""
    config = DiffusionConfig(**{"eps": EPS, "bins": CELLS, "strata": "none", **choice})
    low, high = rate_range(config)
    return ForwardProcess(
        config,
        density(low, high) if density else uniform_density(low, high, CELLS),
        omega_at(config, anneal_at),
        delimiters,
    )


def leading(P, rows, length):
    """The P first positions of each row are eligible."""
    return (torch.arange(length) < P).repeat(rows, 1)


# ---- enumeration


def nodes_of(process, breaks):
    """(draws, probability of each): quadrature over the sampler's uniform, between the breaks of t."""
    low, high = rate_range(process.config)
    breaks = np.unique(np.clip(np.concatenate([process.density.edges, breaks, [low, high]]), low, high))
    if process.config.schedule == "cosine":
        first = np.arcsin(low)
        at = (np.arcsin(breaks) - first) / (np.pi / 2 - first)
    else:
        at = process.density.cdf(breaks)
    u = np.concatenate([a + (b - a) * (NODES + 1) / 2 for a, b in pairwise(at)])
    du = np.concatenate([(b - a) * DT / 2 for a, b in pairwise(at)])
    return MaskingRates(*(draw_cosine(u, low) if process.config.schedule == "cosine" else process.density.draw(u))), du


def enumerate_uniforms(process, ids, drawn, P):
    """All that can happen to the P first positions: uniforms [nodes, states, len(ids)] and probabilities."""
    length = len(ids)
    if process.config.masks == "counted":
        U = np.zeros((len(drawn.rates), factorial(P), length))
        U[:, :, :P] = (np.array(list(permutations(range(P)))) + 0.5) / P
        return U, np.full(U.shape[:2], 1 / factorial(P))
    q = np.repeat(drawn.rates[:, None], length, axis=1)
    if process.delimiters is not None:
        q = np.where(process.delimiters[ids].numpy(), np.minimum(1, q + process.config.isad_delta), q)
    edge = np.stack([0 * q, np.minimum(q, 1 - q), np.maximum(q, 1 - q), 0 * q + 1], axis=-1)  # [nodes, L, 4]
    middle, mass = (edge[..., 1:] + edge[..., :-1]) / 2, np.diff(edge, axis=-1)
    states = np.array(list(product(range(3), repeat=P)))
    U = np.zeros((len(q), len(states), length))  # padding would be masked, if a law let it
    U[:, :, :P] = np.stack([middle[:, i, states[:, i]] for i in range(P)], axis=-1)
    return U, np.prod(np.stack([mass[:, i, states[:, i]] for i in range(P)]), axis=0)


def outcomes(process, ids, P, ce, reweigh=None, breaks=(), drawn=None, du=None):
    """(value of each outcome, its probability): sum_i weight_i CE_i averaged over the views; float64 [nodes, states].

    ce(masked bool [B, L]) -> [B, L]. drawn, du: given rates and their probabilities (default: equal).
    """
    edges, views = process.density.edges, process.config.rows_per_slot
    if drawn is None:
        kinks = [0.5, 1 - process.config.isad_delta, 0.5 - process.config.isad_delta]
        kinks += [*(1 - edges), *np.arange(P + 1) / P, *np.arange(P + 2) / (P + 1)]
        drawn, du = nodes_of(process, np.array([*kinks, *breaks]))
    elif du is None:
        du = np.full(len(drawn.rates), 1 / len(drawn.rates))
    U, states = enumerate_uniforms(process, ids, drawn, P)
    n, s, _ = U.shape
    masked_batch = process.corrupt(
        ids.repeat(n * s, 1), leading(P, n * s, len(ids)), torch.from_numpy(U.reshape(n * s, -1).astype(np.float32)),
        MaskingRates(drawn.rates.repeat(s), drawn.density.repeat(s)), MASK,
    )  # fmt: skip
    if reweigh is not None:
        masked_batch = reweigh(masked_batch, drawn.density.repeat(s * views))
    table = torch.tensor(ce((masked_batch.noisy == MASK).numpy()))
    losses = row_losses(table.flatten()[masked_batch.positions].float(), masked_batch)
    return losses.double().numpy().reshape(n, s, views).mean(axis=2), states * du[:, None]


def from_table(masked):
    return TABLE[masked @ 2 ** np.arange(L)]


def expectation(process, P, reweigh=None):
    values, probability = outcomes(process, IDS, P, from_table, reweigh)
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    return float((values * probability).sum())


# ---- every law against its target


def omega(choice, t, low, high):
    """Section 8, written out again."""
    named = {
        "nelbo": lambda: np.ones_like(t),
        "plain": lambda: 2 * t / (low + high),
        "bell": lambda: (
            stats.beta.pdf(t, 3, 3) / ((stats.beta.cdf(high, 3, 3) - stats.beta.cdf(low, 3, 3)) / (high - low))
        ),
    }[choice["objective"]]()
    return 0.5 * named + 0.5 if choice.get("anneal_fraction") else named


def target(choice, P, uncut=False):
    """sum_k omega_k c_k: what E[sum_i weight_i CE_i] has to be. The range of t is the one that section 5 gives."""
    cut = choice.get("rate_low", EPS), choice.get("rate_high", 1.0)
    low, high = (0.0, 1.0) if choice["masks"] == "counted" or uncut else cut
    high = 1 - EPS if choice["views"] == "complement" and choice["masks"] == "independent" else high
    nodes, dt = np.polynomial.legendre.leggauss(60)
    t, total = low + (high - low) * (nodes + 1) / 2, 0.0
    for k in range(1, P + 1):
        sets = [list(chosen) for chosen in combinations(range(P), k)]
        c = np.mean([TABLE[sum(1 << i for i in chosen), chosen].mean() for chosen in sets])
        beta = stats.beta.pdf(t, k, P - k + 1)
        total += c * float((omega(choice, t, low, high) * beta) @ dt) / 2
    return total


VIEWS = ("single", "mirror", "mirror_dedup", "complement")
WINDOW = dict(rate_low=0.3, rate_high=0.8)
COMBINATIONS = [
    *(dict(masks="independent", views=views, weights="rate") for views in VIEWS),
    dict(masks="independent", views="single", weights="count"),
    *(dict(masks="counted", views=views, weights=weights) for views in VIEWS for weights in ("rate", "count")),
    *(dict(masks="independent", views=views, weights="rate", schedule="cosine") for views in VIEWS[:3]),
    *(dict(masks="independent", views=views, weights="rate", **WINDOW) for views in VIEWS[:3]),
    dict(masks="independent", views="single", weights="count", **WINDOW),
]
OBJECTIVES = [
    dict(objective="nelbo"),
    *(dict(objective=name, **more) for name in ("plain", "bell") for more in ({}, {"anneal_fraction": 0.4})),
]


def objectives_of(choice):
    """The weightings that go with a choice: a window of rates has no NELBO to be annealed to."""
    return [o for o in OBJECTIVES if not ("rate_low" in choice and "anneal_fraction" in o)]


def names(choice):
    return "-".join(map(str, choice.values()))


@pytest.mark.parametrize(
    ("choice", "density"),
    [
        pytest.param(choice, density, id=names(choice) + ("-fitted" if density else ""))
        for choice, density in product(COMBINATIONS, (None, bumpy))
        if not (density and "schedule" in choice)  # the cosine schedule is a sampler itself
    ],
)
def test_every_combination_has_exactly_its_target(choice, density):
    """Full rows and padded ones, under every weighting, annealed half way too."""
    for objective, P in product(objectives_of(choice), (L, 3)):
        process = make_process(density, 0.8, **choice, **objective)
        assert expectation(process, P) == pytest.approx(target({**choice, **objective}, P), rel=3e-6), (objective, P)


def test_a_window_is_another_objective_and_its_rates_stay_inside():
    """The average over [.3, .8]: not the NELBO's, and not that of rates drawn elsewhere with the same weights."""
    choice = dict(masks="independent", views="single", weights="rate", objective="nelbo")
    inside = make_process(**choice, **WINDOW)
    rates = inside.rates_at(np.linspace(0, 1, 1001)[:-1]).rates
    assert rates.min() == pytest.approx(0.3) and rates.max() < 0.8
    assert not inside.config.trains_nelbo and make_process(**choice).config.trains_nelbo
    assert abs(target({**choice, **WINDOW}, L) / target(choice, L) - 1) > 0.01
    assert expectation(make_process(**choice), L) != pytest.approx(target({**choice, **WINDOW}, L), rel=0.01)
    with pytest.raises(ValidationError, match=r"no masking rates between 0\.6 and 0\.5"):
        DiffusionConfig(rate_low=0.6, rate_high=0.5)


def test_the_targets_themselves():
    """They meet at the any-order chain rule as eps vanishes, and differ before."""
    choice = dict(masks="independent", views="single", objective="nelbo")
    assert abs(target(choice, L) / target(choice, L, uncut=True) - 1) > 0.01
    assert expectation(make_process(eps=1e-9), L) == pytest.approx(target(choice, L, uncut=True), rel=1e-4)


def reweighted(new_weights):
    def reweigh(c, density):
        return MaskedBatch(c.noisy, c.positions, c.targets, new_weights(c, density), c.unit)

    return reweigh


def times_density(c, density):
    return c.weights * torch.from_numpy(density).float()[c.positions // L]


def counts_per_row(c):
    return torch.bincount(c.positions // L, minlength=len(c.noisy))


def twice_in_both(c, density):
    """dedup that forgets to halve a position masked in both views."""
    masked = (c.noisy == MASK).view(-1, 2, L)
    both = (masked[:, :1] & masked[:, 1:]).expand(-1, 2, -1).reshape(-1)[c.positions]
    return torch.where(both, 2 * c.weights, c.weights)


def uncut(c, density):
    """omega_k = 1 with rates cut at eps."""
    k = counts_per_row(c)[c.positions // L].numpy()
    return c.weights / torch.from_numpy(make_process(weights="count").omega.of_count(L, k)).float()


WRONG = {
    "1/p dropped": ({}, times_density),
    "1/p dropped, mirror": ({"views": "mirror"}, times_density),
    "weights clamped": ({}, lambda c, p: c.weights.clamp(max=4)),
    "mean over the masked": ({}, lambda c, p: L / counts_per_row(c)[c.positions // L].float()),
    "both views counted": ({"views": "mirror_dedup"}, twice_in_both),
    "uncut counts": ({"weights": "count"}, uncut),
    "pair weighed as counts of one": (
        {"views": "complement", "masks": "counted"},
        lambda c, p: c.weights * counts_per_row(c)[c.positions // L],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_miss_the_target_by_far_more_than_the_tolerance(name):
    choice, wrong = WRONG[name]
    choice = {"masks": "independent", "views": "single", "weights": "rate", "objective": "nelbo", **choice}
    process, right = make_process(bumpy, **choice), target(choice, L)
    assert expectation(process, L, reweighted(lambda c, density: c.weights)) == pytest.approx(right, rel=3e-6)
    assert abs(expectation(process, L, reweighted(wrong)) / right - 1) > 5e-3


def test_a_clamped_loss_is_rejected():
    process = make_process()
    values, probability = outcomes(process, IDS, L, from_table)
    right = target(dict(masks="independent", views="single", objective="nelbo"), L)
    assert abs((np.minimum(values, 10 * L) * probability).sum() / right - 1) > 0.01


def test_a_cut_support_is_rejected():
    """Rates in [1/30, 29/30] with weights as if they were uniform on [eps, 1]."""
    process = make_process(eps=1e-3)
    cut = ForwardProcess(process.config, uniform_density(1 / 30, 29 / 30, CELLS), process.omega)
    drawn = cut.density.draw((np.arange(64) + 0.5) / 64)
    values, probability = outcomes(cut, IDS, L, from_table, drawn=MaskingRates(*drawn))
    right = target(dict(masks="counted", views="single", objective="nelbo"), L)
    assert abs((values * probability).sum() / right - 1) > 5e-3
    assert expectation(process, L) == pytest.approx(right, rel=5e-3)


def test_rounded_counts_are_rejected():
    """k = round(t P) with weight 1/k: short of half the weight of k = P, and too much of none at all."""
    process = make_process(masks="counted")
    t = (np.arange(1000) + 0.5) / 1000
    k = np.maximum(np.round(t * L), 1)
    values, probability = outcomes(process, IDS, L, from_table, drawn=MaskingRates((k - 0.5) / L, np.ones(1000)))
    right = target(dict(masks="counted", views="single", objective="nelbo"), L)
    assert abs((values * probability).sum() / right - 1) > 0.01


# ---- isad: unbiased only without context


ISAD = [dict(views=views, **how) for views in ("single", "mirror") for how in ({}, dict(schedule="cosine"), WINDOW)]


@pytest.mark.parametrize("choice", ISAD, ids=names)
def test_isad_is_biased_where_context_matters_and_only_there(choice):
    listed = torch.zeros(10, dtype=torch.bool)
    listed[0] = True
    mu = np.array([4.0, 1, 2, 3, 0.5])
    for objective, density in product(objectives_of(choice), (None,) if "schedule" in choice else (None, bumpy)):
        process = make_process(density, 0.8, delimiters=listed, isad_tokens=(0,), **choice, **objective)
        values, probability = outcomes(process, IDS, L, lambda masked: np.broadcast_to(mu, masked.shape))
        assert (values * probability).sum() == pytest.approx(mu.sum(), rel=3e-6)
        right = target({"masks": "independent", **choice, **objective}, L)
        assert abs(expectation(process, L) / right - 1) > 0.01


def test_ar_is_the_mean_cross_entropy_of_the_next_token():
    """Nothing is masked; a row of P tokens has P - 1 targets, whose mean stands for all P."""
    process, ids = make_process(objective="ar"), torch.stack([IDS, IDS])
    eligible = torch.cat([leading(L, 1, L), leading(3, 1, L)])
    c = process.corrupt(ids, eligible, torch.zeros(2, L), MaskingRates(np.ones(2), np.ones(2)), MASK)
    assert torch.equal(c.noisy, ids) and c.positions.tolist() == [0, 1, 2, 3, L, L + 1]
    assert c.targets.tolist() == [*IDS[1:].tolist(), *IDS[1:3].tolist()]
    found = row_losses(torch.arange(1.0, 7.0), c).tolist()
    assert found == pytest.approx([L * (1 + 2 + 3 + 4) / 4, 3 * (5 + 6) / 2])


def copy_pair(masked):
    """CE = 3 where the twin is masked too."""
    return 3.0 * masked[:, ::-1]


def test_t9_isad_in_closed_form():
    listed = torch.tensor([True, False])
    process, at = make_process(delimiters=listed, isad_tokens=(0,)), MaskingRates(np.array([0.3]), np.ones(1))
    values, probability = outcomes(
        process, torch.tensor([0, 1]), 2, lambda m: np.array([[4.0, 1.0]] * len(m)), drawn=at
    )
    mean = (values / 2 * probability).sum()
    assert mean == pytest.approx(2.5, rel=1e-6)
    assert ((values / 2) ** 2 * probability).sum() - mean**2 == pytest.approx(4.583333, rel=1e-5)

    values, probability = outcomes(process, torch.tensor([0, 1]), 2, copy_pair, drawn=at)
    assert (values / 2 * probability).sum() == pytest.approx(1.2, rel=1e-6)  # the truth is .9: the bias
    values, probability = outcomes(make_process(), torch.tensor([0, 1]), 2, copy_pair, drawn=at)
    assert (values / 2 * probability).sum() == pytest.approx(0.9, rel=1e-6)


# ---- variances, section 9


def one_position(process, breaks=()):
    """(E[w | t], E[w^2 | t], probability of t) of the weight w that one position ends up with, over both views."""
    values, probability = outcomes(process, torch.tensor([0]), 1, lambda masked: np.ones(masked.shape), breaks=breaks)
    du = probability.sum(axis=1)
    return (values * probability).sum(axis=1) / du, (values**2 * probability).sum(axis=1) / du, du


FINE = np.geomspace(EPS, 1, 60)
M2, MEAN = 2.2925, 1.25  # of T1's mu


def weight_variance(process):
    """E_t Var(w | t). The mean of w at each rate is 1 where p is: no masking-rate noise without context."""
    mean, square, du = one_position(process, FINE)
    return float((square - mean**2) @ du)


@pytest.mark.parametrize(
    ("views", "total"), [("single", 0.771355 + 0.390625), ("mirror", 0.670028), ("mirror_dedup", 0.655052)]
)
def test_t1_totals(views, total):
    """E[s^2] m2 / L * Var(w) + Var(s) mubar^2. An independent second view would have half of single's A: .776303."""
    mu = np.array([0.2, 0.5, 1, 1, 2, 3, 0.7, 1.6])
    assert (mu**2).mean() == pytest.approx(M2, abs=1e-9) and mu.mean() == pytest.approx(MEAN)
    process = make_process(views=views)
    assert one_position(process)[0] == pytest.approx(1.0, rel=1e-6)
    found = 1.25 * M2 / 8 * weight_variance(process) + 0.25 * MEAN**2
    assert found == pytest.approx(total, abs=2e-6)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_t1_rho(t):
    """-min(t, 1-t)/max(t, 1-t), from Var(mirror) = v/2 (1 + rho)."""
    variances = []
    for views in ("single", "mirror"):
        at = MaskingRates(np.array([t]), np.ones(1))
        values, p = outcomes(make_process(views=views), torch.tensor([0]), 1, lambda m: np.ones(m.shape), drawn=at)
        variances.append((values**2 * p).sum() - (values * p).sum() ** 2)
    assert 2 * variances[1] / variances[0] - 1 == pytest.approx(-min(t, 1 - t) / max(t, 1 - t), abs=1e-5)


def test_one_weight_for_a_pair_of_complements_has_less_variance_than_1_over_p():
    """2/(p(t) + p(1-t)): the mean of 1/p given the pair. Both have the target; only one is ours."""
    process = make_process(bumpy, views="complement")
    mirrored = process.density.at(1 - nodes_of(process, 1 - process.density.edges)[0].rates)
    drawn, du = nodes_of(process, 1 - process.density.edges)
    ours = 2 / (drawn.density + mirrored)
    values, probability = outcomes(process, IDS, L, from_table, drawn=drawn, du=du)
    alone = values * (1 / drawn.density / ours)[:, None]
    assert (alone * probability).sum() == pytest.approx((values * probability).sum(), rel=1e-6)
    assert (values**2 * probability).sum() < 0.99 * (alone**2 * probability).sum()


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_statistics_know_neither_sampler_nor_weighting(name):
    """A refit or an annealed weighting would otherwise make the running sums a mixture of scales."""

    def moment(process, t):
        at = MaskingRates(np.array([t]), process.density.at(np.array([t])))
        U, states = enumerate_uniforms(process, IDS, at, L)
        n = U.shape[1]
        c = process.corrupt(
            IDS.repeat(n, 1), leading(L, n, L), torch.from_numpy(U[0].astype(np.float32)),
            MaskingRates(at.rates.repeat(n), at.density.repeat(n)), MASK,
        )  # fmt: skip
        ce = torch.tensor(from_table((c.noisy == MASK).numpy())).flatten()[c.positions].float()
        return float(row_statistics(ce, c, name).numpy() @ states[0])

    for t in (0.1, 0.8):
        plain = moment(make_process(), t)
        assert moment(make_process(bumpy, objective="bell"), t) == pytest.approx(plain, rel=1e-6)
        assert moment(make_process(bumpy, objective="plain", weights="count"), t) == pytest.approx(plain, rel=1e-6)


def test_each_row_is_counted_in_the_cell_of_its_own_rate():
    rates = MaskingRates(np.array([0.07, 0.3, 0.52]), np.ones(3))
    for views, expected in (
        ("single", rates.rates),
        ("mirror", rates.rates.repeat(2)),
        ("complement", [0.07, 0.93, 0.3, 0.7, 0.52, 0.48]),
    ):
        process = make_process(views=views)
        assert process.row_cells(rates).tolist() == process.density.cell(np.array(expected)).tolist()


def moments_by_cell(process, target, probabilities=(1.0,), cross_entropy=(0.0,)):
    """E[statistic | cell] of rows of two positions, tokens iid: what a run's bins converge to."""
    drawn, du = nodes_of(process, np.array([0.5]))
    U, states = enumerate_uniforms(process, torch.tensor([0, 0]), drawn, 2)
    n, s, _ = U.shape
    total, ce = np.zeros((n, s)), torch.tensor(cross_entropy)
    for pair in product(range(len(probabilities)), repeat=2):
        c = process.corrupt(
            torch.tensor(pair).repeat(n * s, 1), leading(2, n * s, 2),
            torch.from_numpy(U.reshape(-1, 2).astype(np.float32)),
            MaskingRates(drawn.rates.repeat(s), drawn.density.repeat(s)), MASK,
        )  # fmt: skip
        chance = probabilities[pair[0]] * probabilities[pair[1]]
        total += chance * row_statistics(ce[c.targets].float(), c, target).double().numpy().reshape(n, s)
    cell = process.density.cell(drawn.rates)
    weight = (states * total).sum(axis=1) * du
    return np.bincount(cell, weight) / np.bincount(cell, du)


def test_t2_the_fit_to_exact_moments_is_the_optimum():
    """L = 1, CE = 1: 1/t is the second moment, and the variance falls from 2.153402 to 1.671629."""
    edges = np.linspace(EPS, 1, 513)
    process = make_process(lambda low, high: uniform_density(low, high, 512))
    _, square, du = one_position(process)
    assert square @ du - 1 == pytest.approx(2.153402, abs=2e-5)
    middles = (edges[1:] + edges[:-1]) / 2
    best = fit(edges, 1 / middles, np.ones(512), 1e-9, "histogram")
    mean, square, du = one_position(make_process(lambda low, high: best))
    assert mean @ du == pytest.approx(1.0, rel=1e-6)
    assert square @ du - 1 == pytest.approx(1.671629, abs=2e-5)
    # Any other sampler has more: t^-1, uniform, and the inverse of the optimum.
    for power in (-1.0, 0.0, 0.5):
        other = fit(edges, middles ** (2 * power), np.ones(512), 1e-9, "histogram")
        _, square, du = one_position(make_process(lambda low, high, other=other: other))
        assert square @ du - 1 > 1.67163 + 1e-3


PI = (0.4, 0.2, 0.15, 0.1, 0.1, 0.05)


def test_t7_the_gradient_statistic_asks_for_the_inverse_root():
    process = make_process(lambda low, high: uniform_density(low, high, 64))
    edges, middles = process.density.edges, (process.density.edges[1:] + process.density.edges[:-1]) / 2
    ce = [-float(np.log(p)) for p in PI]
    gradient = moments_by_cell(process, "gradient", probabilities=PI, cross_entropy=ce)
    inverse = np.log(edges[1:] / edges[:-1]) / np.diff(edges)  # mean of 1/t in each cell
    np.testing.assert_allclose(gradient, inverse / 2 * sum(p * (1 - p) ** 2 for p in PI), rtol=1e-5)
    fitted = fit(edges, gradient, np.ones(64), 1e-9, "histogram")
    assert np.polyfit(np.log(middles), np.log(fitted.p), 1)[0] == pytest.approx(-0.5, abs=0.01)
    loss = moments_by_cell(process, "loss", probabilities=PI, cross_entropy=ce)
    flat = fit(edges, loss, np.ones(64), 1e-9, "histogram")
    assert fitted.p.max() / fitted.p.min() > 1.3 * flat.p.max() / flat.p.min()  # the two targets are not the same


def test_t7_trace_of_the_gradient_covariance():
    """Unigram softmax at its optimum, L = 8: residuals have mean 0, so only E[w^2] of a position counts."""
    spread = (1 - sum(p * p for p in PI)) / 8
    traces = []
    for views in ("single", "mirror"):
        _, square, du = one_position(make_process(views=views), FINE)
        traces.append(spread * float(square @ du))
    assert traces == pytest.approx([0.297602, 0.167989], abs=2e-6)
    assert 2 * traces[1] / traces[0] == pytest.approx(1.1289, abs=1e-4)  # at equal compute MIRROR loses
    for t, expected in ((0.1, 0.94375), (0.5, 0.18875), (1.0, 0.094375)):
        at = MaskingRates(np.array([t]), np.ones(1))
        values, p = outcomes(make_process(), torch.tensor([0]), 1, lambda m: np.ones(m.shape), drawn=at)
        assert spread * (values**2 * p).sum() == pytest.approx(expected, rel=1e-6)


def test_t4_copy_pair():
    """t ~ U[0, 1]: E[l^2 | t] = 9 at every rate, so P-POTS changes nothing; A = 6, B = .75."""
    pair, edges = torch.tensor([0, 1]), np.linspace(0, 1, 9)
    drawn, du = nodes_of(make_process(eps=1e-9), np.geomspace(1e-6, 1, 60))
    results = []
    for views in ("single", "mirror"):
        y, probability = outcomes(make_process(eps=1e-9, views=views), pair, 2, copy_pair, drawn=drawn, du=du)
        results.append([(power * probability).sum(axis=1) / du for power in (y / 2, (y / 2) ** 2)])
    (mean, square), (mirror_mean, mirror_square) = results
    pattern, rate = (square - mean**2) @ du, mean**2 @ du - (mean @ du) ** 2
    assert pattern == pytest.approx(6.0, abs=1e-4) and rate == pytest.approx(0.75, abs=1e-4)
    np.testing.assert_allclose(fit(edges, np.full(8, 9.0), np.ones(8), 0.2, "histogram").p, 1.0)
    np.testing.assert_allclose(square, 9.0, rtol=1e-5)
    total = mirror_square @ du - (mirror_mean @ du) ** 2
    assert total == pytest.approx(3.273351, abs=1e-4)
    assert 2 * total / (pattern + rate) == pytest.approx(0.969882, abs=1e-4)
    assert 2 * (total - rate) / pattern - 1 == pytest.approx(-0.158883, abs=1e-4)


def test_t4d_mirror_can_double_the_noise():
    """A loss that is high for one of two positions masked, at t = .5: rho = +1. Not monotone in the masked set."""
    at, pair = MaskingRates(np.array([0.5]), np.ones(1)), torch.tensor([0, 1])
    variances = []
    for views in ("single", "mirror"):
        values, p = outcomes(
            make_process(views=views), pair, 2, lambda m: np.ones(m.shape) * (m.sum(1, keepdims=True) == 1), drawn=at
        )
        variances.append((values**2 * p).sum() - (values * p).sum() ** 2)
    assert variances[1] == pytest.approx(variances[0], rel=1e-6) and variances[0] > 0


def test_t12_a_fixed_count_against_bernoulli():
    """t = .25, L = 8: .312857 against .859687."""
    mu = np.array([0.2, 0.5, 1, 1, 2, 3, 0.7, 1.6])
    sets = np.array([[i not in chosen for i in range(8)] for chosen in combinations(range(8), 2)], dtype=np.float32)
    U = torch.from_numpy(sets * 0.5 + np.arange(8, dtype=np.float32) / 100)
    process = make_process(masks="counted")
    n = len(sets)
    c = process.corrupt(
        torch.arange(8).repeat(n, 1), leading(8, n, 8), U, MaskingRates(np.full(n, 0.25), np.ones(n)), 99
    )
    assert ((c.noisy == 99).numpy() == (sets == 0)).all()
    y = row_losses(torch.from_numpy(mu).float()[c.targets], c).double().numpy() / 8
    assert y.mean() == pytest.approx(MEAN, rel=1e-6) and y.var() == pytest.approx(0.312857, abs=2e-6)
    bernoulli = (1 - 0.25) / (0.25 * 8) * M2
    at = MaskingRates(np.array([0.25]), np.ones(1))
    values, p = outcomes(make_process(), torch.tensor([0]), 1, lambda m: np.ones(m.shape), drawn=at)
    assert M2 / 8 * ((values**2 * p).sum() - 1) == pytest.approx(bernoulli, rel=1e-5)
    assert bernoulli == pytest.approx(0.859687, abs=1e-6)


# ---- T3 and T14: the loss depends on the masks through their number


def by_count(process, drawn, P=16):
    """(y of k masks, P(k | t)) for T3's model: float64 [nodes, P + 1]."""
    n = len(drawn.rates)
    k = np.tile(np.arange(P + 1), n)
    t = drawn.rates.repeat(P + 1)
    low, high = np.minimum(t, 0.999999) / 2, (1 + t) / 2
    U = np.where(np.arange(P)[None, :] < k[:, None], low[:, None], high[:, None]).astype(np.float32)
    U = np.where((t == 1)[:, None], low[:, None], U)
    c = process.corrupt(
        torch.zeros(len(k), P, dtype=torch.int64), leading(P, len(k), P), torch.from_numpy(U),
        MaskingRates(t, drawn.density.repeat(P + 1)), 1,
    )  # fmt: skip
    shown = (c.noisy == 1).sum(dim=1)
    y = row_losses((1 + 4 * (shown - 1) / (P - 1)).float()[c.positions // P], c).double().numpy().reshape(n, -1) / P
    if process.config.masks == "counted":
        return y, np.full((n, P + 1), 1 / (P + 1))  # the count is a function of t
    return y, stats.binom.pmf(np.arange(P + 1), P, drawn.rates[:, None])


def step_variance(process, slots, change=None):
    """(N times the variance of a step of N stratified slots, the same for independent ones, the mean)."""
    strata = np.arange(slots + 1) / slots
    kinks = process.density.cdf(np.concatenate([process.density.edges, np.geomspace(1e-3, 1, 40), np.arange(17) / 16]))
    at = np.unique(np.concatenate([strata, kinks]))
    at = at[(at >= 0) & (at <= 1)]
    u = np.concatenate([a + (b - a) * (NODES + 1) / 2 for a, b in pairwise(at)])
    du = np.concatenate([(b - a) * DT / 2 for a, b in pairwise(at)])
    y, probability = by_count(process, MaskingRates(*process.density.draw(u)))
    y = y if change is None else change(y)
    stratum = np.minimum((u * slots).astype(int), slots - 1)
    mean = np.bincount(stratum, (y * probability).sum(axis=1) * du) * slots
    square = np.bincount(stratum, (y**2 * probability).sum(axis=1) * du) * slots
    return (square - mean**2).mean(), square.mean() - mean.mean() ** 2, mean.mean()


def t3_process(density=None, **choice):
    return make_process(density, **{"eps": 1e-3, **choice})


def t3_second_moment(cells=1000):
    """Edges of fine cells, and E[l^2 | t] in each: a sum over the binomial counts."""
    edges = np.linspace(1e-3, 1, cells + 1)
    t = (edges[1:] + edges[:-1]) / 2
    k = np.arange(17)
    value = (1 + 4 * (k - 1) / 15) * k / 16 / t[:, None]
    return edges, (stats.binom.pmf(k, 16, t[:, None]) * value**2).sum(axis=1)


def test_t3_step_variances():
    """n Var: iid 2.9115, StraTS 1.5812, P-POTS 2.0176, both 1.8484 (N = 64)."""
    stratified, iid, mean = step_variance(t3_process(), 64)
    assert (stratified, iid, mean) == pytest.approx((1.58118, 2.91152, 3.002), abs=1e-4)
    edges, square = t3_second_moment()
    best = fit(edges, square, np.ones(1000), 1e-9, "histogram")
    stratified, iid, mean = step_variance(t3_process(lambda low, high: best), 64)
    assert (stratified, iid, mean) == pytest.approx((1.8484, 2.0176, 3.002), abs=1e-3)
    assert step_variance(t3_process(lambda low, high: best), 1024)[0] == pytest.approx(1.8466, abs=1e-3)


def test_t14_counts():
    """Cut counts keep the mean and lose variance; uncut ones are biased here; counted ones have none to lose."""
    process = t3_process(weights="count")
    stratified, iid, mean = step_variance(process, 64)
    assert mean == pytest.approx(3.002, abs=1e-4)
    assert stratified < 1.58118 and iid < 2.91152
    factor = np.append(0.0, 1 / process.omega.of_count(16, np.arange(1, 17)))
    stratified, iid, mean = step_variance(process, 64, lambda y: y * factor)
    assert (stratified, iid) == pytest.approx((0.25487, 2.15690), abs=1e-4)
    assert mean == pytest.approx(3.0, abs=1e-5)  # the exact NELBO: another target than the rates' 3.002
    assert step_variance(t3_process(masks="counted"), 64)[:3] == pytest.approx((0.0, 1.51111, 3.0), abs=1e-5)


def t3_pairs(process, drawn, P=16):
    """(y of both views, probability): float64 [nodes, triples, 2] and [nodes, triples] for T3's model.

    Three states of a position, counted: multinomial; each view's loss from its own number of masks.
    """
    triples = np.array([(a, b, P - a - b) for a in range(P + 1) for b in range(P + 1 - a)])
    ways = np.array([comb(P, a) * comb(P - a, b) for a, b, _ in triples], dtype=float)
    t = drawn.rates[:, None]
    edge = np.concatenate([0 * t, np.minimum(t, 1 - t), np.maximum(t, 1 - t), 0 * t + 1], axis=1)
    middle, mass = (edge[:, 1:] + edge[:, :-1]) / 2, np.diff(edge, axis=1)
    state = np.array([[0] * a + [1] * b + [2] * c for a, b, c in triples])
    U = middle[:, state].reshape(-1, P).astype(np.float32)
    rows = len(U)
    c = process.corrupt(
        torch.zeros(rows, P, dtype=torch.int64), leading(P, rows, P), torch.from_numpy(U),
        MaskingRates(drawn.rates.repeat(len(triples)), np.ones(rows)), 1,
    )  # fmt: skip
    k = (c.noisy == 1).sum(dim=1)
    y = row_losses((1 + 4 * (k - 1) / 15).float()[c.positions // P], c).double().numpy() / P
    return y.reshape(len(t), len(triples), 2), ways * np.prod(mass[:, None, :] ** triples[None], axis=2)


def test_t3_mirror():
    """Total 1.842479; rho(.25, .5, .75) = -.3144, -.9582, -.3297. Independent views would have rho 0 at every rate."""
    process = t3_process(views="mirror")
    drawn, du = nodes_of(process, np.concatenate([np.geomspace(1e-3, 1, 60), [0.5]]))
    y, probability = t3_pairs(process, drawn)
    mean = (y.mean(axis=2) * probability).sum(axis=1)
    square = (y.mean(axis=2) ** 2 * probability).sum(axis=1)
    assert mean @ du == pytest.approx(3.002, abs=1e-4)
    assert square @ du - (mean @ du) ** 2 == pytest.approx(1.842479, abs=2e-4)
    y, probability = t3_pairs(process, MaskingRates(np.array([0.25, 0.5, 0.75]), np.ones(3)))
    centred = y - (y * probability[..., None]).sum(axis=1, keepdims=True)
    first, second, both = (
        (centred[..., a] * centred[..., b] * probability).sum(axis=1) for a, b in ((0, 0), (1, 1), (0, 1))
    )
    assert both / np.sqrt(first * second) == pytest.approx([-0.3144, -0.9582, -0.3297], abs=1e-4)


def test_t15_rows_of_4096_positions():
    """CE = 1: variances of a row .001444, .0000880 and .003359, by the exact law of the number of masks."""
    P = 4096
    process = make_process(eps=1e-3, weights="count")
    k = np.arange(P + 1)
    q, every = process.count_probability(np.full(P + 1, P), k), np.full(P, P)
    omega = np.append(0.0, process.omega.of_count(every, k[1:]))
    assert q.sum() == pytest.approx(1, abs=1e-9)
    by_rate = (np.log(1e3) / (1 - 1e-3) - 1) / P  # E_t of (1 - t)/(P t)
    found = {"rate": by_rate}
    for name, weight in (("cut", omega), ("uncut", np.where(k > 0, 1.0, 0.0))):
        value = np.divide(weight, q * P, out=np.zeros(P + 1), where=q > 0)  # k masked tokens of weight omega_k/(P q k)
        assert value @ q == pytest.approx(1, abs=2e-3)
        found[name] = value**2 @ q - (value @ q) ** 2
    assert found == pytest.approx({"rate": 0.001444, "cut": 0.0000880, "uncut": 0.003359}, rel=0.02)
    # The weights that a step is given are these.
    at, U = MaskingRates(np.array([0.01]), np.ones(1)), torch.zeros(1, P) + (torch.arange(P) >= 40)
    for choice, weight in (({"weights": "count"}, omega[40] / (q[40] * 40)), ({}, 1 / 0.01)):
        c = make_process(eps=1e-3, **choice).corrupt(
            torch.zeros(1, P, dtype=torch.int64), leading(P, 1, P), U * 0.9, at, 1
        )
        assert len(c.positions) == 40 and c.weights.tolist() == pytest.approx([weight] * 40, rel=1e-5)


# ---- which combinations are legal

CHOICES = dict(
    schedule=("linear", "cosine"), sampler=("uniform", "ppots"), masks=("independent", "counted"), views=VIEWS,
    weights=("rate", "count"), objective=("nelbo", "plain", "bell", "ar"), anneal_fraction=(0.0, 0.4),
    isad_tokens=((), (1,)), syrm_tokens=((), (1,)), rate_low=(None, 0.3),
)  # fmt: skip
# Choices that are not among the combinations: they change the rates of a step and the fit of p, not the expected loss.
# `test_forward_process` samples all strata; `test_every_form_of_a_fit_has_its_target` fits to two statistics.
BESIDE = dict(
    strata=("none", "rank", "global"), target=("loss", "gradient"), form=("histogram", "epr"), when=("online", "once"),
)  # fmt: skip
# No two of these together, each row with its reason; everything else is legal.
APART = [
    *(("schedule", "cosine", name, value) for name, value in (("sampler", "ppots"), ("masks", "counted"))),
    *(("schedule", "cosine", name, value) for name, value in (("weights", "count"), ("views", "complement"))),
    *(("isad_tokens", (1,), name, "counted" if name == "masks" else "count") for name in ("masks", "weights")),
    *(("isad_tokens", (1,), "views", views) for views in ("mirror_dedup", "complement")),
    *(("anneal_fraction", 0.4, "objective", objective) for objective in ("nelbo", "ar")),
    *(("objective", "ar", name, value) for name, value in (("sampler", "ppots"), ("masks", "counted"))),
    *(("objective", "ar", name, value) for name, value in (("weights", "count"), ("schedule", "cosine"))),
    *(("objective", "ar", "views", views) for views in VIEWS[1:]),
    *(("objective", "ar", tokens, (1,)) for tokens in ("isad_tokens", "syrm_tokens")),
    *(("rate_low", 0.3, name, value) for name, value in (("masks", "counted"), ("views", "complement"))),
    *(("rate_low", 0.3, name, value) for name, value in (("schedule", "cosine"), ("objective", "ar"))),
    ("rate_low", 0.3, "anneal_fraction", 0.4),
]


def is_legal(choice):
    if choice["weights"] == "count" and choice["masks"] == "independent" and choice["views"] != "single":
        return False
    return not any(choice[a] == x and choice[b] == y for a, x, b, y in APART)


def is_tested(choice):
    """Has one of the tests above its target? (They go through OBJECTIVES and a fitted density by themselves.)"""
    if choice["objective"] == "ar":
        return True
    listed = (
        [dict(masks="independent", weights="rate", **process) for process in ISAD]
        if choice["isad_tokens"]
        else COMBINATIONS
    )
    usual = {"schedule": "linear", "rate_low": None}
    return any(
        all(choice[key] == value for key, value in {**usual, **process}.items() if key in choice) for process in listed
    )


def test_exactly_the_legal_combinations_are_accepted_and_each_has_its_test():
    legal = 0
    for values in product(*CHOICES.values()):
        choice = dict(zip(CHOICES, values, strict=True))
        if is_legal(choice):
            DiffusionConfig(**choice)
            legal += 1
            assert is_tested(choice), choice
        else:
            with pytest.raises(ValidationError, match=r"cannot be combined with|has no effect"):
                DiffusionConfig(**choice)
    assert legal > 100


def not_listed(section):
    """The literals of the fields of a configuration section that neither CHOICES nor BESIDE has, as (field, value)."""
    literals = {
        (name, value)
        for name, field in section.model_fields.items()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    }
    return literals - {(name, value) for name, values in {**CHOICES, **BESIDE}.items() for value in values}


def test_every_choice_of_the_configuration_is_listed():
    """A new literal needs its exactness test: in CHOICES, where the test above asks for it, or in BESIDE."""

    class Longer(DiffusionConfig):
        masks: Literal["independent", "counted", "span"] = "independent"
        order: Literal["random", "left"] = "random"

    assert not_listed(DiffusionConfig) == set()
    assert not_listed(Longer) == {("masks", "span"), ("order", "random"), ("order", "left")}


@pytest.mark.parametrize("form", BESIDE["form"])
@pytest.mark.parametrize("power", [-1.0, 1.0])
def test_every_form_of_a_fit_has_its_target(form, power):
    """Whatever the statistic is that p is fitted to: here t^-1 and t."""

    def fitted(low, high):
        edges = np.linspace(low, high, CELLS + 1)
        return fit(edges, ((edges[1:] + edges[:-1]) / 2) ** power, np.ones(CELLS), 0.2, form)

    choice = dict(masks="independent", views="single", weights="rate", objective="nelbo")
    process = make_process(fitted, sampler="ppots", form=form, **choice)
    assert not np.allclose(process.density.p, 1)
    assert expectation(process, L) == pytest.approx(target(choice, L), rel=3e-6)
