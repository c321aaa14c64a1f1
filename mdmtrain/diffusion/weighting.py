"""The objective's weight of a masking rate, omega(t): which average over t is trained (mathematics.md section 8).

Target: the average of omega(t) l over t uniform on [low, high], where omega itself averages to 1. omega = 1 is the
NELBO; everything else is another objective, named so. Whatever is trained, evaluation is the NELBO.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import betainc, betaln


@dataclass(frozen=True)
class Omega:
    """A weighting on [low, high], moved towards 1 by `anneal` (0: the named one, 1: the NELBO)."""

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
            case "plain":  # with 1/t it leaves the plain sum of the cross-entropies
                return 2.0 * t / (self.low + self.high)
            case "bell":
                density = np.exp((self.bell - 1) * (np.log(t) + np.log1p(-np.minimum(t, 1 - 1e-12))) - self._log_beta())
                return density / self._bell_mean()
        raise AssertionError(self.name)

    def of_count(self, P: np.ndarray, k: np.ndarray) -> np.ndarray:
        """omega_k of k >= 1 masked of P eligible positions: int64 [n] each; float64 [n] (mathematics.md section 5).

        The average over t uniform on [low, high] of omega(t) times the density of Beta(k, P - k + 1): what omega
        becomes when the loss is seen as a function of the number of masked positions. (omega_0 is 0: no mask, no loss.)
        """
        k, rest = np.asarray(k, dtype=np.float64), P - k + 1.0
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
        """Average over [low, high] of the Beta(a, b) density."""
        return (betainc(a, b, self.high) - betainc(a, b, self.low)) / (self.high - self.low)

    def _log_beta(self) -> float:
        return float(betaln(self.bell, self.bell))

    def _bell_mean(self) -> float:
        return float(self._beta_mass(np.float64(self.bell), np.float64(self.bell)))
