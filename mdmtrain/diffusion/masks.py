"""Which positions are masked: one row of uniforms per slot, one masked row per view (mathematics.md sections 1, 4, 5).

All functions use the same uniforms U in [0, 1), one per position. The two views of a pair share them, which makes
MIRROR antithetic; a second independent draw would not be MIRROR. `eligible`, bool [B, L], marks the positions that may
be masked. P is their number in a row, which may be 0.
"""

import numpy as np


def bernoulli(uniforms: np.ndarray, rates: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Mask each eligible position with the probability q of its row or position: U < q.

    uniforms: [B, L] on [0, 1); rates: q, [B], or [B, L] if positions differ; eligible and the result: bool [B, L].
    """
    return (uniforms < _columns(rates)) & eligible


def mirrored(uniforms: np.ndarray, rates: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """MIRROR's second view: U >= 1 - q. Each position has the same probability as in `bernoulli`, same shapes."""
    return (uniforms >= 1.0 - _columns(rates)) & eligible


def counted(uniforms: np.ndarray, counts: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Mask the counts[b] eligible positions with the smallest uniforms. All sets of that size are equally probable.

    uniforms: [B, L]; counts: int [B], from 0 to the row's P; eligible: bool [B, L]. Returns bool [B, L].
    """
    return _ranks(uniforms, eligible) < counts[:, None]


def counted_mirrored(uniforms: np.ndarray, counts: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """MIRROR's second view with counts: the positions with the largest uniforms. Shapes as in `counted`."""
    return (_ranks(uniforms, eligible) >= (eligible.sum(axis=1) - counts)[:, None]) & eligible


def complement(masked: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """All eligible positions that the first view does not mask: bool [B, L]."""
    return ~masked & eligible


def _columns(rates: np.ndarray) -> np.ndarray:
    return rates if rates.ndim == 2 else rates[:, None]


def _ranks(uniforms: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Rank of each position's uniform in its row, smallest first, eligible before other positions: int [B, L]."""
    order = np.where(eligible, uniforms, np.inf).argsort(axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(uniforms.shape[1])[None, :], axis=1)
    return ranks
