"""Where the loss's variance comes from: A (masking pattern), B_t + B_int (masking rate), C (data) (VARIANCE.md section 2).

Var(y) = A + B + C,  g(x0, t) = E_M[y | x0, t]
A = E[Var_M(y | x0, t)], B = E_x0[Var_t g], C = Var_x0(E_t g);  B = B_t + B_int, B_t = Var_t(E_x0 g)
"""

import numpy as np

from mdmtrain.diffusion import noise
from mdmtrain.diffusion.objective import Draws, Law


def paired_rates(law: Law, sequences: int, rates: int, bits: np.random.Philox) -> Draws:
    """Independent rates for each pair of neighbouring sequences: [sequences * rates], the rates of a sequence together."""
    u = noise.uniforms(bits, sequences // 2 * rates).astype(np.float64).reshape(-1, rates)
    return law.rates_at(u.repeat(2, axis=0).flatten())


def components(values: np.ndarray) -> dict[str, np.ndarray]:
    """Unbiased A, B_t, B_int and C of one row, from a nested sample: float64 [..., a, b, c] -> each [...].

    values: y of a sequences, b rates of each, c masks of each; everything independent, but sequences 2g and 2g + 1
    share their rates (a even and at least 4, b and c at least 2). Sharing is what makes B_t visible. With m_ij the mean over the
    masks and m_i that over rates and masks, and Var, Cov with the divisor n - 1:

        A      mean_ij Var_k(y_ijk)
        B      mean_i Var_j(m_ij) - A/c                    Var_j of m_ij sees g and the average of c masks
        B_t    mean_g Cov_j(m_2g,j, m_2g+1,j)              given t the two are independent with the same mean E_x0 g, so
                                                           their covariance is Var_t(E_x0 g); mask noise has none
        B_int  B - B_t
        C      Var_i(m_i) - B/b - A/(bc) + B_t/(b(a-1))    Var_i expects Var(m_i) less the mean covariance of two
                                                           sequences: B_t/b for one partner out of a - 1

    Each is linear in squares of y, hence unbiased, and negative at times where the true value is small.
    """
    a, b, c = values.shape[-3:]
    cells = values.mean(axis=-1)
    centred = cells - cells.mean(axis=-1, keepdims=True)
    A = values.var(axis=-1, ddof=1).mean(axis=(-1, -2))
    B = cells.var(axis=-1, ddof=1).mean(axis=-1) - A / c
    B_t = (centred[..., 0::2, :] * centred[..., 1::2, :]).sum(axis=-1).mean(axis=-1) / (b - 1)
    C = cells.mean(axis=-1).var(axis=-1, ddof=1) - B / b - A / (b * c) + B_t / (b * (a - 1))
    return {"A": A, "B_t": B_t, "B_int": B - B_t, "C": C}
