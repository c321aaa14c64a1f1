"""Noise schedules, as what they are: samplers of the masking rate (VARIANCE.md section 1).

The target is always the average over rates t ~ U[eps, 1] of the loss weighted by 1/t. A schedule m(s) with s uniform
draws rates with density p(t) ~ 1/m'(s) relative to that uniform; the importance weight 1/p brings the target back.
"""

import numpy as np


def draw_rates(u: np.ndarray, schedule: str, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Masking rates and importance weights from uniforms.

    u: float64 [N] on [0, 1). Returns (t, importance_weight), float64 [N], with t in [eps, 1]; the weight is 1/p(t), p
    the density of t relative to U[eps, 1], so E[weight * h(t)] is the average of h over U[eps, 1] for any h.
    """
    match schedule:
        case "linear":
            return eps + (1.0 - eps) * u, np.ones_like(u)
        case "cosine":  # t = sin(pi s / 2), s uniform on [s_min, 1]: 1 - alpha of the cosine schedule
            s_min = 2.0 / np.pi * np.arcsin(eps)
            angle = np.pi / 2.0 * (s_min + (1.0 - s_min) * u)
            weight = (1.0 - s_min) / (1.0 - eps) * np.pi / 2.0 * np.cos(angle)
            return np.sin(angle), weight
    raise AssertionError(schedule)
