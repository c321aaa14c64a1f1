"""Which positions are masked, and what each masked position weighs (VARIANCE.md sections 1 and 5).

A mask law turns the uniforms of a row into `masked` (bool [B, L]) and `weights` (float64 [B], here one per row), such
that weights * sum(masked * CE) has the expectation it names.
"""

import numpy as np


def bernoulli(uniforms: np.ndarray, rates: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mask each eligible position independently with the row's rate.

    uniforms: [B, L] on [0, 1); rates: [B]; lengths: [B], positions from there on are padding and never masked.
    Returns bool [B, L].
    """
    return (uniforms < rates[:, None]) & _eligible(uniforms, lengths)


def counted(uniforms: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mask exactly counts[b] eligible positions, uniformly among all such sets: those with the smallest uniforms.

    uniforms: [B, L]; counts: int [B], 0 <= counts <= lengths; lengths: int [B]. Returns bool [B, L].
    """
    order = np.where(_eligible(uniforms, lengths), uniforms, np.inf).argsort(axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(uniforms.shape[1])[None, :], axis=1)
    return rank < counts[:, None]


def _eligible(uniforms: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.arange(uniforms.shape[1])[None, :] < lengths[:, None]
