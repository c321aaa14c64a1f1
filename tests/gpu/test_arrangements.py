"""The training loop on the fake device: it waits only where it may, mixes no devices or dtypes, and compiles once.

`pytest -rP` prints the waits of each arrangement.
"""

import pytest

from tests.conftest import SOAK
from tests.gpu.arrangements import ARRANGEMENTS, STEPS
from tests.gpu.conftest import FakeDevice

FSDP = "torch/distributed/fsdp/_fully_shard"
# Where the host may wait for the device, and why.
ALLOWED = {
    "monitor/recorder.py:flush": "the log interval: the host reads the records of the steps",
    "parallel/forward_passes.py:dealt_batch": "an evaluation or a probe reads the losses of each batch",
    "checkpoint/writer.py:_copy": "a save: the loop may change the tensors only after their copies are complete",
}
PROBE = {
    "diffusion/sampler.py:_sums_and_counts": "a probe records the statistics of the bins",
}
REFIT = {
    "diffusion/sampler.py:fitted": "every refit_every steps, the host reads the rows of each bin and fits p",
    "diffusion/sampler.py:_sums_and_counts": "the same: the statistics of the bins",
    "diffusion/sampler.py:use": "the same: the new p is copied to the device",
}
OFFLOAD = {
    "optim.py:optimizer_step": "AdamW runs on the host, which must know whether the step is skipped",
    f"{FSDP}/_fsdp_param_group.py:finalize_backward": "FSDP: the gradients must be in host memory; once per parameter",
}
ACCUMULATE = {
    f"{FSDP}/_fsdp_collectives.py:foreach_reduce": "FSDP adds each gradient on the host to that of the last micro-step"
}
MUON_OFFLOAD = {"muon.py:_step_together": "the directions go to the device, and orthogonalized they come back"}
ALSO_ALLOWED = {
    "probe": PROBE,
    "everything": PROBE,
    "refit": REFIT,
    "offload": OFFLOAD,
    "offload, accumulate": OFFLOAD | ACCUMULATE,
    "muon, offload": OFFLOAD | MUON_OFFLOAD,
}
QUICK = [
    "plain",
    "offload, accumulate",
    "recompute ops",
    "compiled",
    "mirror",
    "refit",
    "muon, offload",
    "float8, compiled",
    "everything",
]
BFLOAT16 = {"bfloat16"}
FLOAT8 = {"float8_e4m3fn", "float8_e5m2"}
NAMES = list(ARRANGEMENTS) if SOAK else QUICK


def problems(found: dict, allowed: dict[str, str], products: set[str] = BFLOAT16) -> set[str]:
    """The kinds of findings of a run that are not as they should be. products: the dtypes of its matrix products."""
    graphs = found["graphs"]
    good = {
        "waits": set(found["waits"]) <= set(allowed),
        "products": set(found["products"]) == products,
        "breaks": not found["breaks"],
        "graphs": graphs[2] == graphs[-1],  # evaluation, probe and save have happened once before the third step
    }
    return {kind for kind, is_good in good.items() if not is_good}


@pytest.fixture(scope="module")
def found(fake_device: FakeDevice, corpus) -> dict[str, dict]:
    return fake_device("train", corpus, *NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_arrangement(found, name):
    one = found[name]
    assert one["error"] is None, one["output"][-4000:]
    print(f"{name}: waits {one['waits']}; graphs {one['graphs']}; processor time {one['seconds']} s")
    products = BFLOAT16 | FLOAT8 if "float8" in name else BFLOAT16
    assert not problems(one, ALLOWED | ALSO_ALLOWED.get(name, {}), products), one
    compiles = name == "everything" or "compiled" in name or "documents" in name
    assert (one["graphs"][-1] > 0) == compiles


def test_each_allowed_wait_happens(found):
    """A place in the list where no run waits could hide a new wait."""
    happened = {place for one in found.values() for place in one["waits"]}
    assert happened == {*ALLOWED, *PROBE, *REFIT, *OFFLOAD, *ACCUMULATE, *MUON_OFFLOAD}


def test_the_step_waits_for_nothing(found):
    """Two flushes, evaluations and saves in four steps, and not one wait more."""
    assert found["plain"]["waits"] == dict.fromkeys(ALLOWED, 2)
    assert found["offload, accumulate"]["waits"]["optim.py:optimizer_step"] == 4
    assert found["muon, offload"]["waits"]["muon.py:_step_together"] == 2 * 4


def test_products_in_float8_are_not_computed_again(found):
    """Of each linear layer: one product forward, two backward. Their first operands are e4m3 and e5m2."""
    layers, evaluations = 2 * 7, 2
    counts = found["float8, compiled"]["products"]  # with activation checkpointing: ops
    assert counts["float8_e4m3fn"] == layers * (STEPS + evaluations)
    assert counts["float8_e5m2"] == 2 * layers * STEPS
