"""The weight omega(t) of a masking rate in the training objective (mathematics.md section 8).

The target is the average of omega(t) l over t uniform on [low, high]. The average of omega is 1. omega = 1 is the
NELBO; other choices are other objectives. Evaluation always reports the NELBO.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import betainc, betaln


@dataclass(frozen=True)
class Omega:
    """A weighting on [low, high], interpolated to the NELBO by `anneal` (0: the named weighting, 1: the NELBO)."""

    name: str  # nelbo | plain | bell
    bell: float  # a of the Beta(a, a) density of `bell`
    low: float
    high: float
    anneal: float = 0.0

    def __call__(self, t: np.ndarray) -> np.ndarray:
        """omega(t): float64, like t."""
        return self._mix(self._named(np.asarray(t, dtype=np.float64)))

    def _mix(self, named: np.ndarray) -> np.ndarray:
        return named if self.name == "nelbo" else (1.0 - self.anneal) * named + self.anneal

    def _named(self, t: np.ndarray) -> np.ndarray:
        match self.name:
            case "nelbo":
                return np.ones_like(t)
            case "plain":  # times 1/t this is constant: the plain sum of the cross-entropies
                return 2.0 * t / (self.low + self.high)
            case "bell":
                density = np.exp((self.bell - 1) * (np.log(t) + np.log1p(-np.minimum(t, 1 - 1e-12))) - self._log_beta())
                return density / self._bell_mean()
        raise AssertionError(self.name)

    def of_count(self, P: np.ndarray, k: np.ndarray) -> np.ndarray:
        """omega_k for k >= 1 masks at P eligible positions (mathematics.md section 5). P, k: int64 [n]. float64 [n].

        It is the weight of a loss that is a function of the number of masks: the average over t uniform on [low, high]
        of omega(t) times the density of Beta(k, P - k + 1). omega_0 would be 0.
        """
        rest = P - k + 1.0
        k = np.asarray(k, dtype=np.float64)
        one = self._beta_mass(k, rest)
        match self.name:
            case "nelbo":
                return one
            case "plain":
                named = 2.0 / (self.low + self.high) * k / (P + 1) * self._beta_mass(k + 1, rest)
            case "bell":
                ratio = np.exp(betaln(k + self.bell - 1, rest + self.bell - 1) - betaln(k, rest) - self._log_beta())
                named = ratio * self._beta_mass(k + self.bell - 1, rest + self.bell - 1) / self._bell_mean()
        return (1.0 - self.anneal) * named + self.anneal * one

    def _beta_mass(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The average of the Beta(a, b) density over [low, high]."""
        return (betainc(a, b, self.high) - betainc(a, b, self.low)) / (self.high - self.low)

    def _log_beta(self) -> float:
        return float(betaln(self.bell, self.bell))

    def _bell_mean(self) -> float:
        return float(self._beta_mass(np.float64(self.bell), np.float64(self.bell)))
