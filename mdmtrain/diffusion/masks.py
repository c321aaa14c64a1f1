"""Which positions are masked: one row of uniforms per slot, one masked row per view (VARIANCE.md sections 1, 4, 5).

Every law is written in terms of the same uniforms U in [0, 1), one per position, so a pair of views shares its noise:
that is what makes MIRROR antithetic. An independent second draw would not be MIRROR.
"""

import numpy as np


def eligible(shape: tuple[int, int], lengths: np.ndarray) -> np.ndarray:
    """Positions before each row's padding: bool [B, L]."""
    return np.arange(shape[1])[None, :] < lengths[:, None]


def bernoulli(uniforms: np.ndarray, rates: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mask each eligible position with its rate: U < q.

    uniforms: [B, L] on [0, 1); rates: [B], or [B, L] where positions differ; lengths: [B]. Returns bool [B, L].
    """
    return (uniforms < _columns(rates)) & eligible(uniforms.shape, lengths)


def mirrored(uniforms: np.ndarray, rates: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """MIRROR's second view: U >= 1 - q. The same marginal law as `bernoulli`, the opposite end of the same uniforms."""
    return (uniforms >= 1.0 - _columns(rates)) & eligible(uniforms.shape, lengths)


def counted(uniforms: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mask exactly counts[b] eligible positions, uniformly among all such sets: those with the smallest uniforms.

    uniforms: [B, L]; counts: int [B], 0 <= counts <= lengths; lengths: int [B]. Returns bool [B, L].
    """
    return _ranks(uniforms, lengths) < counts[:, None]


def counted_mirrored(uniforms: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """MIRROR's second view with counts: the positions with the largest uniforms."""
    ranks = _ranks(uniforms, lengths)
    return (ranks >= (lengths - counts)[:, None]) & (ranks < lengths[:, None])


def complement(masked: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Every eligible position that the first view left visible."""
    return ~masked & eligible(masked.shape, lengths)


def _columns(rates: np.ndarray) -> np.ndarray:
    return rates if rates.ndim == 2 else rates[:, None]


def _ranks(uniforms: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Place of each position among the row's eligible uniforms, smallest first; padding comes last: int [B, L]."""
    order = np.where(eligible(uniforms.shape, lengths), uniforms, np.inf).argsort(axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(uniforms.shape[1])[None, :], axis=1)
    return ranks
