"""Which positions are masked: one row of uniforms per slot, one masked row per view (mathematics.md sections 1, 4, 5).

Every law is written in terms of the same uniforms U in [0, 1), one per position, so a pair of views shares its noise:
that is what makes MIRROR antithetic. An independent second draw would not be MIRROR. `eligible`, bool [B, L], says
which positions may be masked; P of them in a row, and a row may have none.
"""

import numpy as np


def bernoulli(uniforms: np.ndarray, rates: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Mask each eligible position with its rate: U < q.

    uniforms: [B, L] on [0, 1); rates: [B], or [B, L] where positions differ; eligible and the result: bool [B, L].
    """
    return (uniforms < _columns(rates)) & eligible


def mirrored(uniforms: np.ndarray, rates: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """MIRROR's second view: U >= 1 - q. The same marginal law as `bernoulli`, the opposite end of the same uniforms."""
    return (uniforms >= 1.0 - _columns(rates)) & eligible


def counted(uniforms: np.ndarray, counts: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Mask exactly counts[b] eligible positions, uniformly among all such sets: those with the smallest uniforms.

    uniforms: [B, L]; counts: int [B], from 0 to the row's P; eligible: bool [B, L]. Returns bool [B, L].
    """
    return _ranks(uniforms, eligible) < counts[:, None]


def counted_mirrored(uniforms: np.ndarray, counts: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """MIRROR's second view with counts: the positions with the largest uniforms."""
    return (_ranks(uniforms, eligible) >= (eligible.sum(axis=1) - counts)[:, None]) & eligible


def complement(masked: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Every eligible position that the first view left visible."""
    return ~masked & eligible


def _columns(rates: np.ndarray) -> np.ndarray:
    return rates if rates.ndim == 2 else rates[:, None]


def _ranks(uniforms: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Place of each position among the row's eligible uniforms, smallest first; the others come last: int [B, L]."""
    order = np.where(eligible, uniforms, np.inf).argsort(axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(uniforms.shape[1])[None, :], axis=1)
    return ranks
