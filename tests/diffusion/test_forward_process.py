"""Every legal way to draw and weigh masks has the expectation that it names, and the variances of mathematics.md.

The model is a table: the cross-entropy of each position given the masked set and the sequence, arbitrary numbers. So
every target is a finite sum, and nothing that depends on context can hide.
"""

from itertools import product

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion import noise
from mdmtrain.diffusion.objective import ForwardProcess, MaskingRates, omega_at, rate_range, row_losses
from mdmtrain.diffusion.rates import Density, uniform_density

L, MASK, EPS = 5, 9, 0.05
SEQUENCES = 3
IDS = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0], [1, 0, 0, 2, 2]])
TABLE = torch.from_numpy(np.random.default_rng(4).gamma(2.0, 1.0, (SEQUENCES, 2**L, L)))
TABLE *= torch.tensor([1.0 + subset.bit_count() for subset in range(2**L)])[None, :, None]  # fewer visible, harder
COMBINATIONS = [
    *(("independent", views, "rate") for views in ("single", "mirror", "mirror_dedup", "complement")),
    ("independent", "single", "count"),
    *(("counted", views, "rate") for views in ("single", "mirror", "mirror_dedup", "complement")),
]
OBJECTIVES = [("nelbo", 0.0), ("plain", 0.0), ("bell", 0.0), ("bell", 0.4)]


def everywhere(rows):
    """Every position is eligible, as in a full row of plain text."""
    return torch.ones(rows.shape, dtype=torch.bool)


def mean_ce(subset):
    """Mean cross-entropy of the masked positions, over the sequences too."""
    inside = [i for i in range(L) if subset >> i & 1]
    return float(TABLE[:, subset, inside].mean())


BY_COUNT = [0.0] + [
    np.mean([mean_ce(subset) for subset in range(2**L) if subset.bit_count() == k]) for k in range(1, L + 1)
]


def make_process(masks, views, weights, objective="nelbo", anneal=0.0, uniform=True, strata="global", **more):
    config = DiffusionConfig(
        eps=EPS, masks=masks, views=views, weights=weights, objective=objective, strata=strata, bins=16,
        anneal_fraction=anneal, **more,
    )  # fmt: skip
    density = uniform_density(*rate_range(config), 16)
    if not uniform:
        p = np.linspace(2.0, 0.4, 16) * np.random.default_rng(1).uniform(0.7, 1.3, 16)
        density = Density(density.edges, p / (p * np.diff(density.edges)).sum() * np.ptp(density.edges))
    return ForwardProcess(config, density, omega_at(config, 0.8))


def target(process):
    """(1/P) sum_k omega_k c_k, omega_k averaged over the rates by quadrature, not by the code's closed forms."""
    low, high = rate_range(process.config)
    nodes, width = np.polynomial.legendre.leggauss(400)
    t, dt = low + (high - low) * (nodes + 1) / 2, width / 2
    k = np.arange(L + 1)[:, None]
    binomial = np.array([1, 5, 10, 10, 5, 1])[:, None] * t**k * (1 - t) ** (L - k)  # P(K = k | t)
    per_rate = (binomial * np.array(BY_COUNT)[:, None] * k / L).sum(axis=0) / t  # E[l | t]
    return float((process.omega(t) * per_rate) @ dt)


def run(process, step, slots, reweigh=lambda masked_batch, drawn, views: masked_batch.weights, seed=3):
    """The step's loss, exactly as a trainer has it: weighted sum over rows / (rows * L)."""
    ids = IDS.repeat(slots // SEQUENCES, 1)
    drawn = process.draw(seed, step, slots, blocks=4)
    uniforms = torch.from_numpy(noise.uniforms(noise.philox(seed, noise.Stream.POSITIONS, step), slots * L))
    masked_batch = process.corrupt(ids, everywhere(ids), uniforms.view(slots, L), drawn, MASK)
    views = process.config.rows_per_slot
    weights = reweigh(masked_batch, drawn, views)
    masked = (masked_batch.noisy == MASK).long()
    code = (masked * 2 ** torch.arange(L)).sum(dim=1)
    sequence = torch.arange(slots).remainder(SEQUENCES).repeat_interleave(views)
    ce = TABLE[sequence, code].flatten()[masked_batch.positions].float()
    per_row = torch.zeros(len(masked)).index_add(0, masked_batch.positions // L, weights * ce)
    if weights is masked_batch.weights:
        torch.testing.assert_close(per_row, row_losses(ce, masked_batch))
    return float(per_row.double().sum()) / (slots * views * L)


def z_score(values, expected):
    return (np.mean(values) - expected) / (np.std(values, ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize(("masks", "views", "weights"), COMBINATIONS)
@pytest.mark.parametrize("uniform", [True, False])
def test_every_legal_combination_has_its_target(masks, views, weights, uniform):
    for (objective, anneal), strata in product(OBJECTIVES, ("global", "none", "rank")):
        process = make_process(masks, views, weights, objective, anneal, uniform, strata)
        steps = [run(process, step, 240) for step in range(60)]
        assert abs(z_score(steps, target(process))) < 5, (objective, anneal, strata)


def drop_density(masked_batch, drawn, views):
    """1/p forgotten."""
    return (
        masked_batch.weights
        * torch.from_numpy(drawn.density).float().repeat_interleave(views)[masked_batch.positions // L]
    )


def mean_over_rows_with_a_mask(masked_batch, drawn, views):
    rows = len(masked_batch.noisy)
    return masked_batch.weights * rows / len((masked_batch.positions // L).unique())


def clamp(masked_batch, drawn, views):
    return masked_batch.weights.clamp(max=4.0)


@pytest.mark.parametrize(
    ("views", "wrong"),
    [("single", drop_density), ("mirror", drop_density), ("single", mean_over_rows_with_a_mask), ("single", clamp)],
)
def test_wrong_weights_are_rejected(views, wrong):
    """The defects of section 10: 1/p dropped (also in the mirror path), rows without a mask left out, clamping."""
    process = make_process("independent", views, "rate", uniform=False)
    steps = [run(process, step, 240, wrong) for step in range(200)]
    assert abs(z_score(steps, target(process))) > 5


def test_the_count_law_is_a_law_and_the_counts_follow_it():
    for masks, views, weights in COMBINATIONS:
        for uniform in (True, False):
            process = make_process(masks, views, weights, uniform=uniform)
            q = process.count_probability(L, np.arange(L + 1))
            assert q.sum() == pytest.approx(1.0, abs=1e-12)
            drawn = process.draw(1, 0, 60_000)
            U = torch.from_numpy(noise.uniforms(noise.philox(1, noise.Stream.POSITIONS, 0), 60_000 * L)).view(-1, L)
            masked_batch = process.corrupt(torch.zeros_like(U, dtype=torch.int64), everywhere(U), U, drawn, MASK)
            first = (masked_batch.noisy[:: process.config.rows_per_slot] == MASK).sum(dim=1)
            share = np.bincount(first.numpy(), minlength=L + 1) / 60_000
            assert np.abs(share - q).max() < 5 * np.sqrt(0.25 / 60_000)


ILLEGAL = [
    dict(weights="count", views="mirror"),
    dict(weights="count", views="mirror_dedup"),
    dict(weights="count", views="complement"),
    dict(schedule="cosine", sampler="ppots"),
    dict(schedule="cosine", masks="counted"),
    dict(schedule="cosine", weights="count"),
    dict(schedule="cosine", views="complement"),
    dict(isad_tokens=(1,), masks="counted"),
    dict(isad_tokens=(1,), weights="count"),
    dict(isad_tokens=(1,), views="mirror_dedup"),
    dict(isad_tokens=(1,), views="complement"),
    dict(objective="nelbo", anneal_fraction=0.5),
    dict(objective="ar", masks="counted"),
    dict(objective="ar", sampler="ppots"),
]


@pytest.mark.parametrize("choice", ILLEGAL)
def test_combinations_without_an_estimator_are_refused(choice):
    with pytest.raises(ValidationError, match=r"cannot be combined with|anneal"):
        DiffusionConfig(**choice)


# ---- variances in closed form, section 9


def context_free(process, mu, rows, seed=0, scale=False, isad=None):
    """Values of `rows` slots of a model whose cross-entropies do not depend on context: float64 [rows], per token."""
    mu = torch.as_tensor(mu)
    length = len(mu)
    drawn = process.draw(seed, 0, rows)
    U = torch.from_numpy(noise.uniforms(noise.philox(seed, noise.Stream.POSITIONS, 0), rows * length)).view(
        rows, length
    )
    ids = torch.arange(length).repeat(rows, 1)
    masked_batch = process.corrupt(ids, everywhere(ids), U, drawn, 99)
    views = process.config.rows_per_slot
    s = torch.ones(rows)
    if scale:
        s = 0.5 + (torch.from_numpy(noise.uniforms(noise.philox(seed, noise.Stream.ORDER, 0), rows)) < 0.5).float()
    ce = mu.float()[masked_batch.targets] * s.repeat_interleave(views)[masked_batch.positions // length]
    return row_losses(ce, masked_batch).view(rows, views).mean(dim=1).double().numpy() / length


def assert_variance(values, expected, sigmas=5):
    centred = (values - values.mean()) ** 2
    se = centred.std() / np.sqrt(len(values))
    assert abs(centred.mean() - expected) < sigmas * se, (centred.mean(), expected, se)


MU = np.array([0.2, 0.5, 1, 1, 2, 3, 0.7, 1.6])
ROWS = 200_000


def iid(masks="independent", views="single", weights="rate"):
    return make_process(masks, views, weights, strata="none")


def test_t1_mirror_and_dedup():
    single, mirror, dedup = (
        context_free(iid(views=v), MU, ROWS, scale=True) for v in ("single", "mirror", "mirror_dedup")
    )
    assert_variance(single, 0.771355 + 0.390625)
    assert_variance(mirror, 0.670028)
    assert_variance(dedup, 0.655052)
    assert abs(z_score(dedup, 1.25)) < 5 and abs(z_score(mirror, 1.25)) < 5


def views_at(t, views, rows=40_000, independent=False):
    """The two views' values at a fixed rate: float64 [rows, 2]."""
    process = iid(views=views)
    values = []
    for view in (0, 1):
        seed = 5 + view * independent
        U = torch.from_numpy(noise.uniforms(noise.philox(seed, noise.Stream.POSITIONS, 0), rows * 8)).view(rows, 8)
        drawn = MaskingRates(np.full(rows, t), np.ones(rows))
        c = process.corrupt(torch.arange(8).repeat(rows, 1), everywhere(U), U, drawn, 99)
        values.append(row_losses(torch.from_numpy(MU).float()[c.targets], c).view(rows, 2)[:, view].numpy())
    return np.stack(values, axis=1)


@pytest.mark.parametrize(("t", "rho"), [(0.1, -0.1111), (0.3, -0.4286), (0.5, -1.0), (0.7, -0.4286), (0.9, -0.1111)])
def test_t1_views_are_antithetic(t, rho):
    found = np.corrcoef(views_at(t, "mirror").T)[0, 1]
    assert abs(found - rho) < 5 / np.sqrt(40_000)
    again = np.corrcoef(views_at(t, "mirror", independent=True).T)[0, 1]
    assert abs(again - rho) > 5 / np.sqrt(40_000), "an independent second mask is not MIRROR"


def test_t2_ppots_reaches_its_optimum():
    """L = 1, CE = 1: p* ~ t^-1/2. On 1,000 cells the variance is that of the continuous optimum."""
    config = DiffusionConfig(eps=EPS, strata="none", bins=1000)
    edges = np.linspace(EPS, 1, 1001)
    p = ((edges[:-1] + edges[1:]) / 2) ** -0.5
    p /= p.mean()
    best = ForwardProcess(config, Density(edges, p), omega_at(config, 0.0))
    assert_variance(context_free(iid(), [1.0], ROWS), 2.153402)
    assert_variance(context_free(best, [1.0], ROWS), 1.671629)


def test_t9_isad_is_unbiased_without_context_only():
    table = torch.zeros(100, dtype=torch.bool)
    table[0] = True
    process = ForwardProcess(
        DiffusionConfig(isad_tokens=(0,), isad_delta=0.2), uniform_density(1e-3, 1), iid().omega, table
    )
    rows = 100_000
    U = torch.from_numpy(noise.uniforms(noise.philox(0, noise.Stream.POSITIONS, 0), rows * 2)).view(rows, 2)
    c = process.corrupt(
        torch.tensor([[0, 1]]).repeat(rows, 1), everywhere(U), U, MaskingRates(np.full(rows, 0.3), np.ones(rows)), 99
    )
    values = row_losses(torch.tensor([4.0, 1.0])[c.targets], c).double().numpy() / 2
    assert_variance(values, 4.583333)
    assert abs(z_score(values, 2.5)) < 5
    bug = c.weights * torch.where(c.targets == 0, 0.3 / 0.5, 1.0)  # t/q^2 instead of 1/q
    wrong = (
        torch.zeros(rows).index_add(0, c.positions // 2, bug * torch.tensor([4.0, 1.0])[c.targets]).double().numpy() / 2
    )
    assert abs(z_score(wrong, 1.7)) < 5 < abs(z_score(wrong, 2.5))


def test_t14_counting():
    """CE_i = 1 + 4 (K-1)/15 on 16 positions, 64 strata: N Var of the step loss. Counted: nothing is left at all."""
    length, slots = 16, 64

    def steps(process, count):
        values = []
        for step in range(count):
            drawn = process.draw(2, step, slots)
            U = torch.from_numpy(noise.position_uniforms(2, step, np.arange(slots), length))
            c = process.corrupt(torch.zeros(slots, length, dtype=torch.int64), everywhere(U), U, drawn, 1)
            k = (c.noisy == 1).sum(dim=1)
            ce = (1 + 4 * (k - 1) / 15)[c.positions // length]
            values.append(float(row_losses(ce, c).double().sum()) / (slots * length) * np.sqrt(slots))
        return np.array(values)

    config = DiffusionConfig(eps=1e-3)
    rate = ForwardProcess(config, uniform_density(1e-3, 1.0), omega_at(config, 0))
    assert_variance(steps(rate, 1500), 1.58118)
    config = DiffusionConfig(masks="counted")
    counted = ForwardProcess(config, uniform_density(0.0, 1.0), omega_at(config, 0))
    values = steps(counted, 50)
    assert np.abs(values / np.sqrt(slots) - 3.0).max() < 1e-6  # the exact NELBO, every step


def test_t15_count_weights_do_not_starve():
    """P = 4,096, eps = 1e-3, CE = 1: the cut law has less variance than rate weights, the uncut one would have more."""
    length, rows = 4096, 3000
    config = DiffusionConfig(eps=1e-3, weights="count", strata="none")
    process = ForwardProcess(config, uniform_density(1e-3, 1.0), omega_at(config, 0))
    drawn = process.draw(0, 0, rows)
    counts = np.random.default_rng(0).binomial(length, drawn.rates)
    used = counts > 0
    q, omega = process.count_probability(length, counts[used]), process.omega.of_count(length, counts[used])
    cut, uncut, rate = (np.zeros(rows) for _ in range(3))
    cut[used] = omega / q / length
    uncut[used] = 1 / q / length
    rate[:] = counts / (length * drawn.rates)
    assert cut.var() < 0.3 * rate.var()
    assert abs(z_score(cut, 1.0)) < 5 and abs(z_score(rate, 1.0)) < 5
    assert uncut.var() > 1.5 * cut.var()
