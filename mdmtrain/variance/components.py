"""The components of the loss's variance: masking pattern (A), masking rate (B), data (C) (mathematics.md section 2).

With g(x0, t) = E_M[y | x0, t]:  Var(y) = A + B + C,  A = E[Var_M(y | x0, t)],  B = E_x0[Var_t g],  C = Var_x0(E_t g).
B = B_t + B_int, where B_t = Var_t(E_x0 g) is the part that stratified rates remove.
"""

import numpy as np

from mdmtrain.diffusion import noise
from mdmtrain.diffusion.objective import ForwardProcess, MaskingRates


def paired_rates(process: ForwardProcess, sequences: int, rates: int, bits: np.random.Philox) -> MaskingRates:
    """Independent rates for each pair of adjacent sequences: [sequences * rates], grouped by sequence."""
    u = noise.uniforms(bits, sequences // 2 * rates).astype(np.float64).reshape(-1, rates)
    return process.rates_at(u.repeat(2, axis=0).flatten())


def loss_components(values: np.ndarray) -> dict[str, np.ndarray]:
    """Unbiased estimates of A, B_t, B_int and C of one row, from a nested sample: float64 [..., a, b, c] -> [...] each.

    values: y for a sequences, b rates per sequence and c masks per rate (a even and at least 4; b and c at least 2).
    All draws are independent, except that sequences 2g and 2g + 1 share their rates, which separates B_t from B_int.
    m_ij is the mean over masks, m_i the mean over rates and masks. Var and Cov divide by n - 1.

        A      mean_ij Var_k(y_ijk)
        B      mean_i Var_j(m_ij) - A/c                   m_ij is g(x_i, t_j) plus the noise of c masks
        B_t    mean_g Cov_j(m_2g,j, m_2g+1,j)             given t, two independent values with the same mean E_x0 g
        B_int  B - B_t
        C      Var_i(m_i) - B/b - A/(bc) + B_t/(b(a-1))   E Var_i = C + B/b + A/(bc), minus the mean covariance of two
                                                          sequences: B_t/b for one pair in a - 1

    The estimates are linear in products of two values, so they are unbiased. They may be negative if the true value is
    small.
    """
    a, b, c = values.shape[-3:]
    cells = values.mean(axis=-1)
    centred = cells - cells.mean(axis=-1, keepdims=True)
    A = values.var(axis=-1, ddof=1).mean(axis=(-1, -2))
    B = cells.var(axis=-1, ddof=1).mean(axis=-1) - A / c
    B_t = (centred[..., 0::2, :] * centred[..., 1::2, :]).sum(axis=-1).mean(axis=-1) / (b - 1)
    C = cells.mean(axis=-1).var(axis=-1, ddof=1) - B / b - A / (b * c) + B_t / (b * (a - 1))
    return {"A": A, "B_t": B_t, "B_int": B - B_t, "C": C}
