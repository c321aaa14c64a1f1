"""How noisy the gradient and the loss are, and where the noise comes from.

`probe.py` and `pair.py` measure during training, without a backward pass of their own. `gradients.py` measures the
gradients of a fixed checkpoint under each arm. `components.py` and `intervals.py` turn values into statements.
"""
