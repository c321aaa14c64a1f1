"""The planned memory against the tensors of the real model on the fake device."""

import pytest

from tests.conftest import SOAK
from tests.gpu.conftest import FakeDevice
from tests.gpu.memory import CASES

STATES = ("parameters", "gradients", "optimizer")
QUICK = ["one rank", "reshard", "recompute ops"]


@pytest.fixture(scope="module")
def found(fake_device: FakeDevice, tmp_path_factory) -> dict[str, dict]:
    return fake_device("memory", tmp_path_factory.mktemp("no-data"), *(CASES if SOAK else QUICK))


@pytest.mark.parametrize("name", list(CASES) if SOAK else QUICK)
def test_the_plan_is_what_the_tensors_hold(found, name):
    """States to the byte, activations to 1%, peaks to 3%: without the gradients inside SwiGLU, the peak of a block
    would be 7% off, and with composed norms the activations 50%.
    """
    both = {kind: pair for kind, pair in found[name].items() if kind not in ("name", "seconds", "output")}
    if name == "offload":  # its states are in host memory
        both = {kind: pair for kind, pair in both.items() if kind not in (*STATES, "peak")}
    if name == "compiled":  # the backend of this device compiles nothing: it does not fuse the cross-entropy
        both = {kind: both[kind] for kind in (*STATES, "activations", "block at work")}
    for kind, (planned, held) in both.items():
        exact = kind in (*STATES, "optimizer at work")
        limit = 0.0 if exact else 0.01 if kind == "activations" else 0.03
        assert planned == pytest.approx(held, rel=limit, abs=1.0), (kind, planned, held)
