"""Densities of the masking rate, their fit, and the sampler that learns one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion import noise, rates, strata
from mdmtrain.diffusion.objective import row_statistics
from mdmtrain.diffusion.rates import Density, fit, uniform_density
from mdmtrain.diffusion.sampler import RateSampler, token_table


@st.composite
def densities(draw):
    cells = draw(st.integers(1, 40))
    p = np.array(draw(st.lists(st.floats(0.05, 20), min_size=cells, max_size=cells)))
    low = draw(st.sampled_from([0.0, 1e-3, 0.05]))
    edges = np.linspace(low, 1, cells + 1)
    return Density(edges, p / p.mean())


@given(density=densities(), u=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, derandomize=True)
def test_drawing_is_the_inverse_of_the_distribution_function(density, u):
    t, p = density.draw(np.array([u]))
    assert density.edges[0] <= t[0] <= 1
    assert density.cdf(t)[0] == pytest.approx(u, abs=1e-9)
    assert p[0] in density.p and density.masses.sum() == pytest.approx(1.0)


def test_uniform_weighs_exactly_one():
    u = strata.uniforms(0, 0, 1000, "global")
    t, p = uniform_density(1e-3, 1.0, 64).draw(u)
    assert (p == 1.0).all()
    np.testing.assert_allclose(t, 1e-3 + 0.999 * u, rtol=1e-12)


@given(density=densities())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_importance_weights_bring_the_average_back(density):
    """T11: with one weight per cell the mean is exact; with an interpolated density it is not."""
    edges = density.edges
    nodes, dt = np.polynomial.legendre.leggauss(20)
    total, high = 0.0, edges[-1] - edges[0]
    for a, b, p in zip(edges[:-1], edges[1:], density.p, strict=True):
        t = a + (b - a) * (nodes + 1) / 2
        total += (dt / 2 * np.exp(t) / density.at(t) * p).sum() * (b - a) / high
    assert total == pytest.approx((np.exp(edges[-1]) - np.exp(edges[0])) / high)


@pytest.mark.parametrize(("ratio", "bias"), [(1.2, 1.002769), (1.5, 1.013663), (2.0, 1.039721)])
def test_t11_interpolated_weights_are_biased(ratio, bias):
    """The wrong way, for the record: t from an interpolated CDF, weighed by the interpolated density."""
    t, dt = np.polynomial.legendre.leggauss(50)
    t = (t + 1) / 2
    slope = 1 + (ratio - 1) * t
    assert float((dt / 2 * ((1 + ratio) / 2) / slope).sum()) == pytest.approx(bias, abs=1e-6)
    density = Density(np.array([0.0, 0.5, 1.0]), np.array([2 / (1 + ratio), 2 * ratio / (1 + ratio)]))
    assert (density.masses / density.p).sum() == pytest.approx(1.0, abs=1e-15)


# ---- fitting


def test_t7_the_gradient_optimum_is_the_inverse_root():
    edges = np.linspace(0.05, 1, 65)
    middles = (edges[1:] + edges[:-1]) / 2
    density = fit(edges, 1 / middles, np.ones(64), 1e-9, "histogram")
    assert np.polyfit(np.log(middles), np.log(density.p), 1)[0] == pytest.approx(-0.5, abs=1e-6)
    omega = 2 * middles
    weighed = fit(edges, 1 / middles, omega, 1e-9, "histogram")
    np.testing.assert_allclose(weighed.p / density.p, omega * (weighed.p / density.p / omega)[0])


@given(p=st.lists(st.floats(0.05, 20), min_size=1, max_size=40))
@settings(deadline=None, derandomize=True)
def test_no_density_is_below_the_floor_and_the_fit_reaches_it(p):
    """s2 = 1/t on [1e-3, 1]: the second moment of any density over uniform's is at least .5436 (mathematics.md, 3)."""

    def second_moment(density):
        """int s2/p, with int s2 of a cell in closed form."""
        return (np.diff(np.log(density.edges)) / density.p).sum() / np.log(1e3)

    floor = 4 * (1 - np.sqrt(1e-3)) ** 2 / (0.999 * np.log(1e3))
    assert floor == pytest.approx(0.5436, abs=1e-4)
    assert second_moment(Density(np.linspace(1e-3, 1, len(p) + 1), np.array(p) / np.mean(p))) >= floor
    edges = np.geomspace(1e-3, 1, 400)
    fitted = fit(edges, np.diff(np.log(edges)) / np.diff(edges), np.ones(399), 1e-9, "histogram")
    assert second_moment(fitted) == pytest.approx(floor, rel=1e-4)


def test_the_floor_of_drawn_counts():
    """P = 128, s2(k) = P^2/k against standard's int P/t: uniform .786, best .508, best with a share of .2 .514."""
    P, k = 128, np.arange(1, 129)
    moment, standard = P**2 / k, P * np.log(1e3) / 0.999
    best = fit(np.arange(P + 1) / P, moment, np.ones(P), 1e-9, "histogram").p
    mixed = fit(np.arange(P + 1) / P, moment, np.ones(P), 0.2, "histogram").p
    found = [(moment / p).mean() / standard for p in (np.ones(P), best, mixed)]
    assert found == pytest.approx([0.7857, 0.5083, 0.5137], abs=1e-4)


@given(moments=st.lists(st.floats(0, 1e6), min_size=16, max_size=16), floor=st.floats(0.05, 1))
@settings(deadline=None, derandomize=True)
def test_the_floor_bounds_every_weight(moments, floor):
    density = fit(np.linspace(1e-3, 1, 17), np.array(moments), np.ones(16), floor, "histogram")
    assert density.masses.sum() == pytest.approx(1.0)
    assert (1 / density.p).max() <= 1 / floor * (1 + 1e-12)


def test_nothing_learned_is_uniform():
    assert (fit(np.linspace(0, 1, 9), np.zeros(8), np.ones(8), 0.2, "histogram").p == 1).all()


def test_epr_finds_its_own_family_and_does_not_echo_its_input():
    edges = np.linspace(1e-3, 1, 513)
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 0.999
    member = rates._epr(np.array([1.0, 0.5, -1.0, -0.5, 0.3, 0.2, 0.1]), middles)
    member = member / (member * widths).sum()
    found = fit(edges, member**2, np.ones(512), 1e-9, "epr").p
    assert np.abs(found - member).max() < 0.02 * member.max()
    noisy = member * np.random.default_rng(0).uniform(0.5, 1.5, 512)
    smooth = fit(edges, noisy**2, np.ones(512), 1e-9, "epr").p
    assert np.abs(np.diff(smooth)).max() < 0.1 * np.abs(np.diff(noisy)).max(), "it returned what it was given"


# ---- the sampler of a run


def learning(**more):
    return RateSampler(DiffusionConfig(sampler="ppots", bins=8, min_hits=10, **more), torch.device("cpu"))


def step(sampler, sums, skipped=0.0, counts=5):
    sampler.add(torch.tensor(sums, dtype=torch.float64), np.full(8, counts), torch.tensor(skipped))


RISING = [1.0, 2, 3, 4, 5, 6, 7, 8]


def test_it_waits_for_enough_rows_then_fits_past_steps():
    sampler = learning()
    step(sampler, RISING)
    assert (sampler.fitted() == 1).all()
    step(sampler, RISING)
    p = sampler.fitted()
    raw = np.sqrt(RISING)
    np.testing.assert_allclose(p, 0.8 * raw / raw.mean() + 0.2)
    assert (sampler.density.p == 1).all(), "a fit counts from the next step on"
    sampler.use(p)
    assert (sampler.process(0.0).density.p == p).all()


def test_old_statistics_fade_and_the_weighting_enters_the_fit():
    sampler = learning(objective="plain", statistics_decay=0.5)
    for _ in range(3):
        step(sampler, [9.0] * 8)
    for _ in range(20):
        step(sampler, RISING)
    np.testing.assert_allclose(sampler.tensors["sums"].numpy(), 2 * np.array(RISING), rtol=1e-4)
    middles = (sampler.density.edges[1:] + sampler.density.edges[:-1]) / 2
    raw = middles * np.sqrt(RISING)  # p ~ omega sqrt(E[statistic | t]), omega ~ t
    np.testing.assert_allclose(sampler.fitted(), 0.8 * raw / raw.mean() + 0.2, rtol=1e-4)


def test_a_skipped_step_leaves_no_trace():
    sampler = learning()
    step(sampler, RISING)
    before = {name: tensor.clone() for name, tensor in sampler.tensors.items()}
    step(sampler, [float("nan")] * 8, skipped=1.0)
    assert all(torch.equal(sampler.tensors[name], tensor) for name, tensor in before.items())


def test_once_is_never_due_in_training_and_the_picture_says_what_would_be_fitted():
    once, online = learning(when="once", refit_every=1), learning(refit_every=1)
    assert once.fits("once") and not once.due(1) and online.due(1) and not online.fits("once")
    assert once.picture() == {"used": [1.0] * 8, "wanted": [1.0] * 8}  # before any step
    step(once, RISING)
    assert once.picture()["wanted"] == pytest.approx(np.sqrt(RISING) / np.sqrt(RISING).mean())


def test_a_restored_sampler_draws_the_same():
    one, other = learning(), learning()
    for _ in range(3):
        step(one, RISING)
    one.use(one.fitted())
    for name, tensor in one.tensors.items():
        other.tensors[name].copy_(tensor)
    other.restored()
    assert one.process(0.5).draw(0, 7, 64).rates.tobytes() == other.process(0.5).draw(0, 7, 64).rates.tobytes()


# ---- law 1 of DESIGN.md: one run, however its slots are dealt out

SLOTS, LENGTH, STEPS = 16, 12, 8
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (SLOTS, LENGTH)))


def simulate(config, ranks, micro, resume_at, alone=False):
    """(masked rows, rates) of each step of a run that refits every two: ranks that take turns, micro-batch by
    micro-batch, and one resume. alone: each rank fits what it saw itself; the last one's course is returned."""
    sampler, course = RateSampler(config, torch.device("cpu")), []
    for step in range(STEPS):
        if step == resume_at:  # a checkpoint keeps the tensors
            tensors = {name: tensor.clone() for name, tensor in sampler.tensors.items()}
            sampler = RateSampler(config, torch.device("cpu"))
            for name, tensor in tensors.items():
                sampler.tensors[name].copy_(tensor)
            sampler.restored()
        process = sampler.process(step / STEPS)
        draws = process.draw(7, step, SLOTS, ranks)
        noisy, parts = np.empty((SLOTS, LENGTH * config.rows_per_slot), dtype=np.int64), []
        for rank in range(ranks):
            sums = torch.zeros(config.bins, dtype=torch.float64)
            for first in range(rank * SLOTS // ranks, (rank + 1) * SLOTS // ranks, micro):
                slots = np.arange(first, first + micro)
                uniforms = torch.from_numpy(noise.position_uniforms(7, step, slots, LENGTH))
                drawn, eligible = draws.at(slots), torch.ones(micro, LENGTH, dtype=torch.bool)
                masked_batch = process.corrupt(IDS[slots], eligible, uniforms, drawn, mask_id=9)
                ce = 1 + torch.sin(masked_batch.targets + masked_batch.weights)
                cells = torch.from_numpy(process.row_cells(drawn))
                sums.index_add_(0, cells, row_statistics(ce, masked_batch, config.target).double())
                noisy[slots] = masked_batch.noisy.reshape(micro, -1)
            parts.append(sums)
        counts = np.bincount(process.row_cells(draws), minlength=config.bins)
        sampler.add(parts[-1] if alone else sum(parts), counts, torch.tensor(0.0))
        if sampler.due(step + 1):
            sampler.use(sampler.fitted())
        course.append((noisy.tobytes(), draws.rates))
    return course


def fitted_config(views, target, **more):
    settings = dict(sampler="ppots", bins=8, min_hits=4, refit_every=2, floor=0.3, views=views, target=target)
    return DiffusionConfig(**settings, **more)


@given(
    ranks=st.sampled_from([1, 2, 4, 8]), micro=st.sampled_from([1, 2]), resume_at=st.integers(0, STEPS),
    masks=st.sampled_from(["independent", "counted"]), target=st.sampled_from(["loss", "gradient"]),
    views=st.sampled_from(["single", "mirror_dedup", "complement"]),
)  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=25)
def test_any_ranks_micro_batch_and_resume_are_the_same_run(ranks, micro, resume_at, masks, target, views):
    """Bit for bit while p is fixed, and at the same world; to float tolerance through every refit."""
    config = fitted_config(views, target, masks=masks)
    whole, parts = simulate(config, 1, SLOTS, 0), simulate(config, ranks, micro, resume_at)
    assert np.abs(whole[-1][1] - simulate(config.model_copy(update={"floor": 1.0}), 1, 4, 0)[-1][1]).max() > 1e-3
    for step, ((rows, t), (other_rows, other_t)) in enumerate(zip(whole, parts, strict=True)):
        np.testing.assert_allclose(t, other_t, rtol=1e-9)
        assert step >= 2 or (rows == other_rows and t.tobytes() == other_t.tobytes())
    again = simulate(config, ranks, micro, (resume_at + 3) % STEPS)
    assert all(a[0] == b[0] and a[1].tobytes() == b[1].tobytes() for a, b in zip(parts, again, strict=True))


def test_a_rank_that_fits_its_own_density_leaves_the_run():
    config = fitted_config("single", "gradient")
    together, own = simulate(config, 4, 2, 0), simulate(config, 4, 2, 0, alone=True)
    assert [a[0] == b[0] for a, b in zip(together, own, strict=True)] == [True] * 2 + [False] * 6
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(together[-1][1], own[-1][1], rtol=1e-9)


def test_listed_tokens():
    assert token_table((), ["a"], "isad_tokens") is None
    assert token_table(("b", 0), ["a", "b", "c"], "isad_tokens").tolist() == [True, True, False]
    for missing in ("z", 3, -1):
        with pytest.raises(ValueError, match="no piece"):
            token_table((missing,), ["a", "b", "c"], "isad_tokens")
