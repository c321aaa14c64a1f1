"""Measure the noise of the gradient and of the loss, and where it comes from.

`probe.py` and `pair.py` measure during training, without additional backward passes. `gradients.py` measures the
gradients of a fixed checkpoint under each arm. `components.py` and `intervals.py` compute variance components, means,
ratios and intervals from the measured values.
"""
