"""A schedule is a sampler of the masking rate: whatever its density, the importance weight brings U[eps, 1] back."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion.rates import uniform_density
from mdmtrain.diffusion.schedule import draw_cosine

SCHEDULES = ["linear", "cosine"]
EPS = st.floats(1e-4, 0.9)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)
U, DU = (NODES + 1) / 2, WEIGHTS / 2  # quadrature on [0, 1]


def draw_rates(u, schedule, eps):
    """(t, importance weight) of a schedule."""
    t, p = draw_cosine(u, eps) if schedule == "cosine" else uniform_density(eps, 1.0, 64).draw(u)
    return t, 1 / p


def expectation(h, schedule, eps, reweigh=lambda t, iw: iw):
    t, iw = draw_rates(U, schedule, eps)
    return float((reweigh(t, iw) * h(t)) @ DU)


def average(h, eps):
    """h averaged over U[eps, 1], in pieces that grow with t: right for 1/t too."""
    edges = np.geomspace(eps, 1, 9)
    return sum((b - a) * float(h(a + (b - a) * U) @ DU) for a, b in pairwise(edges)) / (1 - eps)


TESTS = {
    **{f"t^{k}": lambda t, k=k: t**k for k in (0, 1, 2, 5, 16)},
    "exp(-3t)": lambda t: np.exp(-3 * t),
    "cos(5t)": lambda t: np.cos(5 * t),
    "sqrt(t)": np.sqrt,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(eps=EPS, u=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_rates_stay_within_eps_and_one(schedule, eps, u):
    t, iw = draw_rates(np.array([u]), schedule, eps)
    assert eps * (1 - 1e-12) <= t[0] <= 1
    assert iw[0] >= 0 and np.isfinite(iw[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_ends_of_the_support_and_order(schedule):
    """All of [eps, 1], rates growing with u, so strata of u are strata of t."""
    u = np.array([0.0, 1e-9, 0.25, 0.5, 0.75, 1 - 1e-9])
    t, _ = draw_rates(u, schedule, 1e-3)
    assert t[0] == pytest.approx(1e-3, rel=1e-9) and t[-1] == pytest.approx(1, abs=1e-8)
    assert np.all(np.diff(t) > 0)


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
def test_weighted_rates_integrate_to_the_average_over_eps_to_one(schedule, eps, name):
    h = TESTS[name]
    assert expectation(h, schedule, eps) == pytest.approx(average(h, eps), rel=1e-10)


def test_linear_weighs_one_and_is_affine():
    t, iw = draw_rates(U, "linear", 0.05)
    assert np.array_equal(iw, np.ones_like(U))
    np.testing.assert_allclose(t, 0.05 + 0.95 * U, rtol=1e-14)


def test_cosine_is_one_minus_alpha_of_the_cosine_schedule():
    """Masking rate sin(pi s / 2) with s uniform where the rate is at least eps (arXiv 2406.04329)."""
    s = np.linspace(0, 1, 200_001)
    s = s[np.sin(np.pi * s / 2) >= 0.05]
    t, _ = draw_rates((np.arange(len(s)) + 0.5) / len(s), "cosine", 0.05)
    np.testing.assert_allclose(t, np.sin(np.pi * s / 2), atol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
def test_the_weight_is_one_over_the_density_of_the_rates(schedule, eps):
    """p(t) = (1 - eps) du/dt, the derivative taken numerically."""
    u, h = np.linspace(0.02, 0.98, 97), 1e-5
    slope = (draw_rates(u + h, schedule, eps)[0] - draw_rates(u - h, schedule, eps)[0]) / (2 * h)
    np.testing.assert_allclose(draw_rates(u, schedule, eps)[1], slope / (1 - eps), rtol=1e-8)


def test_missing_inverted_and_interpolated_weights_are_rejected():
    """Each wrong weight misses the mean of h(t) = t by far more than the tolerance of the test above."""
    eps, h = 0.05, TESTS["t^1"]

    def interpolated(t, iw):
        """The density interpolated linearly between 16 nodes: unbiased at the nodes, biased between them."""
        nodes, at_nodes = draw_rates(np.linspace(0, 1, 16), "cosine", eps)
        at_nodes = np.maximum(at_nodes, 1e-3)
        return 1 / np.interp(t, nodes, 1 / at_nodes)

    wrong = {
        "missing": lambda t, iw: np.ones_like(iw),
        "density for weight": lambda t, iw: 1 / iw,
        "of the uncut schedule": lambda t, iw: np.pi / 2 * np.sqrt(1 - t**2),
        "interpolated": interpolated,
    }
    right = average(h, eps)
    assert abs(expectation(h, "cosine", eps) / right - 1) < 1e-10
    for name, weight in wrong.items():
        assert abs(expectation(h, "cosine", eps, weight) / right - 1) > 1e-4, name


def test_drawn_rates_have_the_density_that_they_claim():
    """A histogram of 200,000 rates against 1/weight: the weight alone could not show a wrong sampler AND a wrong weight
    that cancel for one h."""
    u = (np.arange(200_000) + 0.5) / 200_000
    t, _ = draw_rates(u, "cosine", 0.05)
    edges = np.linspace(0.05, 1, 21)
    cdf = (np.arcsin(edges) - np.arcsin(0.05)) / (np.pi / 2 - np.arcsin(0.05))
    counts = np.histogram(t, edges)[0]
    assert np.abs(counts - 200_000 * np.diff(cdf)).max() <= 2
    assert stats.chisquare(counts).pvalue < 1e-12  # uniform rates would be `linear`


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule"):
        DiffusionConfig(schedule="sqrt")
