"""Means, ratios and components of measured gradients, with bootstrap intervals."""

from dataclasses import dataclass

import numpy as np

from mdmtrain.variance.gradients import SlotNoise

RESAMPLES = 2000
FLOOR_BINS = 24  # number of bins of the rate in `density_floor`


@dataclass(frozen=True)
class Spread:
    """A mean with its bootstrap interval (95%)."""

    value: float
    low: float
    high: float


def mean_interval(values: np.ndarray, seed: int = 0) -> Spread:
    """The mean of independent values with its bootstrap interval."""
    means = values[_resamples(len(values), seed)].mean(axis=1)
    return Spread(float(values.mean()), *_bounds(means))


def ratio_interval(values: np.ndarray, reference: np.ndarray, shared: bool = True, seed: int = 0) -> Spread:
    """The ratio of two means. shared: values of equal index share their data, so both are resampled together."""
    chosen = _resamples(len(values), seed)
    chosen_too = chosen if shared else _resamples(len(reference), seed + 1)
    ratios = values[chosen].mean(axis=1) / reference[chosen_too].mean(axis=1)
    return Spread(float(values.mean() / reference.mean()), *_bounds(ratios))


def density_floor(noise: SlotNoise, seed: int = 0) -> Spread:
    """The smallest second moment of the gradient that any density of the rate can reach, as a share of this arm's.

    noise: of an arm with uniform rates. Computes (mean sqrt(s2))^2 / mean s2 with s2(t) = E[|H|^2 | t] (mathematics.md,
    section 3), with bins of the rate that have equal numbers of slots.
    """
    order = np.argsort(noise.rate)
    bins = np.empty(len(order), dtype=np.int64)
    bins[order] = np.arange(len(order)) * FLOOR_BINS // len(order)

    def ratio(chosen: np.ndarray) -> float:
        weight = noise.weight[chosen]
        square = noise.square[chosen]
        mass = np.bincount(bins[chosen], weight, FLOOR_BINS)
        moment = np.bincount(bins[chosen], weight * square, FLOOR_BINS)
        return float(np.sqrt(mass * moment).sum() ** 2 / (mass.sum() * moment.sum()))

    ratios = [ratio(chosen) for chosen in _resamples(len(order), seed)]
    return Spread(ratio(np.arange(len(order))), *_bounds(ratios))


def gradient_components(kinds: dict[str, np.ndarray], seed: int = 0) -> dict[str, Spread]:
    """A, B, B_t, B_int + C, C, rho and `mirror_margin` = -rho A - (B_int + C), each with its bootstrap interval."""

    def named(mean: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rest = mean["AC"] - mean["A"]
        return {
            "A": mean["A"],
            "B": mean["AB"] - mean["A"],
            "B_t": mean["ABC"] - mean["AC"],
            "B_int_plus_C": rest,
            "C": mean["ABC"] - mean["AB"],
            "rho": 1 - mean["mirror"] / mean["A"],
            "mirror_margin": mean["mirror"] - mean["A"] - rest,
        }

    chosen = _resamples(len(kinds["A"]), seed)
    value = named({kind: values.mean() for kind, values in kinds.items()})
    spread = named({kind: values[chosen].mean(axis=1) for kind, values in kinds.items()})
    return {name: Spread(float(value[name]), *_bounds(spread[name])) for name in value}


def _bounds(values: np.ndarray | list[float]) -> tuple[float, float]:
    """The limits of the 95% interval of bootstrap values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resamples(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
