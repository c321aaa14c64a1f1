"""The cosine noise schedule, written as a sampler of the masking rate (mathematics.md section 1).

The target is the average over rates t ~ U[eps, 1] of the loss weighted by 1/t. A schedule m(s) with uniform s draws
rates with a density p(t) ~ 1/m'(s) relative to that uniform. The importance weight 1/p keeps the target the same. The
linear schedule is p = 1.
"""

import numpy as np


def draw_cosine(u: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(t, p(t)) for uniforms u on [0, 1), all float64 [n]: t = sin(pi s / 2) in [eps, 1], s uniform.

    p is relative to U[eps, 1], so E[h(t)/p(t)] is the average of h over U[eps, 1] for any h.
    """
    s_min = 2.0 / np.pi * np.arcsin(eps)
    angle = np.pi / 2.0 * (s_min + (1.0 - s_min) * u)
    return np.sin(angle), (1.0 - eps) / ((1.0 - s_min) * np.pi / 2.0 * np.cos(angle))
