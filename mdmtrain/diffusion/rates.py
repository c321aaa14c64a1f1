"""Densities of the masking rate t: how to draw from one, and how P-POTS fits one.

Densities are relative to the uniform density on [edges[0], edges[-1]], so uniform is p = 1 (mathematics.md section 1).
P-POTS is the Pareto-optimal t sampler of arXiv 2511.18159. Here it is also fitted during training, and also to
gradients (section 3).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize


@dataclass(frozen=True)
class Density:
    """A piecewise-constant density of t. Its importance weight 1/p needs no interpolation, so it is exact."""

    edges: np.ndarray  # float64 [cells + 1], increasing
    p: np.ndarray  # float64 [cells], with mean 1 over the range

    @property
    def masses(self) -> np.ndarray:
        """Probability of each cell: float64 [cells]."""
        return self.p * np.diff(self.edges) / (self.edges[-1] - self.edges[0])

    def draw(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(t, p(t)) for uniforms on [0, 1), float64 of the same shape. Uses the inverse CDF, which keeps the strata."""
        before = np.concatenate([[0.0], np.cumsum(self.masses)])[:-1]
        cell = np.maximum(np.searchsorted(before, u, side="right") - 1, 0)
        t = self.edges[cell] + (u - before[cell]) * (self.edges[-1] - self.edges[0]) / self.p[cell]
        return np.minimum(t, self.edges[cell + 1]), self.p[cell]

    def cell(self, t: np.ndarray) -> np.ndarray:
        """The cell of each t: int64."""
        return np.clip(np.searchsorted(self.edges, t, side="right") - 1, 0, len(self.p) - 1)

    def at(self, t: np.ndarray) -> np.ndarray:
        """p(t): float64."""
        return self.p[self.cell(t)]

    def cdf(self, t: np.ndarray) -> np.ndarray:
        """The probability of a rate up to t. t may lie outside the range."""
        before = np.concatenate([[0.0], np.cumsum(self.masses)])
        return np.interp(t, self.edges, before / before[-1])


def uniform_density(low: float, high: float, cells: int = 1) -> Density:
    return Density(np.linspace(low, high, cells + 1), np.ones(cells))


def fit(edges: np.ndarray, second_moment: np.ndarray, omega: np.ndarray, floor: float, form: str) -> Density:
    """The density with the least variance for given second moments, mixed with the uniform density.

    It is proportional to omega sqrt(E[statistic | t]). second_moment, omega: float64 [cells]. floor: the share of the
    uniform density, so that no importance weight exceeds omega/floor; weights are not clamped. form: "histogram", or
    "epr", the parametric family of arXiv 2511.18159 fitted to the cells. The loss is unbiased with any density. Only
    its variance depends on the quality of the fit.
    """
    widths = np.diff(edges) / (edges[-1] - edges[0])
    p = optimum(edges, second_moment, omega)
    if form == "epr":
        p = _fit_epr((edges[:-1] + edges[1:]) / 2, p, widths)
    return Density(edges, (1.0 - floor) * p + floor)


def optimum(edges: np.ndarray, second_moment: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """omega sqrt(second moment) with mean 1 over the range, or the uniform density if all moments are 0."""
    p = omega * np.sqrt(np.maximum(second_moment, 0.0))
    mass = (p * np.diff(edges)).sum() / (edges[-1] - edges[0])
    return p / mass if mass > 0 else np.ones_like(p)


def _epr(parameters: np.ndarray, t: np.ndarray) -> np.ndarray:
    """sqrt(a t^r + b (1-t)^q + A^2 exp(2 kappa t^m)), with a, b, A, kappa > 0 and r, q, m >= 1 (arXiv 2511.18159)."""
    a, b, amplitude, kappa = np.exp(parameters[:4])
    r, q, m = 1.0 + np.exp(parameters[4:])
    return np.sqrt(a * t**r + b * (1 - t) ** q + amplitude**2 * np.exp(2 * kappa * t**m))


def _fit_epr(t: np.ndarray, target: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The member of the EPR family with the smallest KL divergence to `target`, the best of several starts."""

    def divergence(parameters: np.ndarray) -> float:
        p = _epr(parameters, t)
        return -float((target * widths * np.log(p / (p * widths).sum())).sum())

    starts = [np.array([a, b, 0.0, k, 0.0, 0.0, 0.0]) for a in (-3.0, 2.0) for b in (-3.0, 2.0) for k in (-3.0, 0.0)]
    fits = [minimize(divergence, start, method="L-BFGS-B", bounds=[(-12, 12)] * 4 + [(-8, 4)] * 3) for start in starts]
    p = _epr(min(fits, key=lambda fit: fit.fun).x, t)
    return p / (p * widths).sum()
