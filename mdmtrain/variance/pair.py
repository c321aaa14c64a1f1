"""Measure the noise of the step's gradient during training, without additional backward passes."""

import torch
from torch import Tensor, nn

from mdmtrain.muon import local_gradient


class GradientPair:
    """The noise of the step's gradient, from the gradients g and g' of two consecutive steps.

    |g' - g|^2 / 2 estimates Tr Cov of the step's gradient and <g, g'> estimates |E g|^2, both before clipping
    (mathematics.md section 2; the noise scale of arXiv 1812.06162 is Tr Cov times the step's tokens over |E g|^2).
    Both would be unbiased for fixed weights. But the second step has different weights. This adds half the squared
    change of E g to the first value. And because the update depends on g, both values shift with the curvature along
    the update. So use them as trends. A copy of this rank's part of the gradient is kept between the two steps.
    """

    def __init__(self, model: nn.Module):
        self._parameters = list(model.parameters())
        self._first: list[Tensor] = []

    @property
    def half(self) -> bool:
        """Has the first step of the pair been taken, but not the second?"""
        return bool(self._first)

    def keep(self) -> None:
        """The first step: after its backward pass."""
        self._first = [local_gradient(p).clone() for p in self._parameters]

    def compare(self) -> Tensor:
        """This rank's part of (|g' - g|^2 / 2, <g, g'>): float64 [2] on the device. Does not wait for the device.

        Call after the backward pass of the second step.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self._first[0].device)
        for first, p in zip(self._first, self._parameters, strict=True):
            second = local_gradient(p)
            total[0] += (second - first).square().sum(dtype=torch.float64) / 2
            total[1] += (second * first).sum(dtype=torch.float64)
        self._first = []
        return total.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # zeros if one of the steps is skipped
