"""The noise of the gradient from two consecutive steps, against closed forms."""

import math

import numpy as np
import torch

from mdmtrain.variance.pair import GradientPair
from tests.test_optim import Small, set_gradients, total_norm


def test_two_gradients_in_a_row_give_their_noise_and_their_mean():
    """g = G + n, Tr Cov = 51 spread^2: unbiased; without the half, or with |g|^2 for |G|^2, it is not."""
    model, spread, found, squares = Small(), 1.5, [], []
    mean = [torch.full_like(p, 0.3) for p in model.parameters()]
    generator, pair = torch.Generator().manual_seed(3), GradientPair(model)
    for _ in range(2000):
        for keep in (True, False):
            for p, m in zip(model.parameters(), mean, strict=True):
                p.grad = m + spread * torch.randn(p.shape, generator=generator)
            if keep:
                pair.keep()
                squares.append(total_norm(model) ** 2)
                for p in model.parameters():
                    p.grad.mul_(0.1)  # clipping, in place
            else:
                assert pair.half
                found.append(pair.compare())
    assert not pair.half
    noise, signal = torch.stack(found).T.numpy()
    count = sum(p.numel() for p in model.parameters())

    def z(values, expected):
        return abs(values.mean() - expected) / (values.std() / math.sqrt(len(values)))

    trace, square = count * spread**2, count * 0.3**2
    assert z(noise, trace) < 5 and z(signal, square) < 5
    assert z(2 * noise, trace) > 5 and z(np.array(squares), square) > 5


def test_a_pair_with_a_step_that_is_not_finite_is_finite():
    """Its numbers ride with the sums, by which the next step is judged."""
    model = Small()
    pair = GradientPair(model)
    set_gradients(model, 0)
    model.cube.grad[0] = math.inf
    pair.keep()
    set_gradients(model, 1)
    assert pair.compare().isfinite().all()
