"""The training loop on the fake device: it waits only where it may, mixes no devices or dtypes, and compiles once.

`pytest -rA` shows the waits of each arrangement.
"""

import pytest

from tests.conftest import SOAK

# Where the host may wait for the device, and why. FSDP's own functions begin with torch/.
ALLOWED = {
    "monitor/recorder.py:flush": "the log interval: the host reads the records of the steps",
    "likelihood.py:dealt_batch": "an evaluation reads the losses of each batch",
    "variance/probe.py:values": "a probe reads the losses of each batch",
    "checkpoint/writer.py:_copy": "a save: the loop may change the tensors only when their copies are complete",
}
REFIT = {
    "diffusion/sampler.py:fitted": "every refit_every steps the host fits p, and reads the number of rows in each bin",
    "diffusion/sampler.py:_sums_and_counts": "the same: the statistics of each bin",
    "diffusion/sampler.py:use": "the same: the new p is copied to the device",
}
FSDP = "torch/distributed/fsdp/_fully_shard"
OFFLOAD = {
    "optim.py:optimizer_step": "the optimizer runs on the host: it needs to know whether the step is skipped",
    f"{FSDP}/_fsdp_param_group.py:finalize_backward": "the gradients must be in host memory before the optimizer runs",
}
ACCUMULATED = {f"{FSDP}/_fsdp_collectives.py:foreach_reduce": "FSDP adds each gradient to the earlier one on the host"}
MORE = {
    "refit": REFIT,
    "offload": OFFLOAD,
    "offload, accumulate": OFFLOAD | ACCUMULATED,
    "muon, offload": OFFLOAD,
}
QUICK = (
    ["plain", "hsdp", "offload, accumulate", "recompute ops", "compiled", "documents", "compiled, documents"]
    + ["mirror", "complement", "average", "probe", "refit", "muon", "muon, offload", "8b"]
)  # fmt: skip
SLOW = (
    ["accumulate", "kept gathered", "offload", "recompute full", "recompute selective", "compiled, recompute full"]
    + ["compiled, recompute ops", "compiled, budget", "documents, recompute ops", "fit once", "tied, chunks"]
    + ["saves at once", "muon, hsdp, compiled"]
)  # fmt: skip
NAMES = QUICK + SLOW if SOAK else QUICK
# What each fault is found by. The first is the error that the fault leads to, or None if the run ends well.
FAULTS = {
    "item in the step": (None, "waits"),
    "blocking copy": (None, "waits"),
    "CPU tensor": ("on device 'meta'|two different devices|device", None),
    "values decide a shape": ("DynamicOutputShapeException", None),
    "missing cast": ("same dtype", None),
    "wide products": (None, "products"),
    "graph break": ("Unsupported", None),
    "graph break in a mask": (None, "breaks"),
    "graph for each step": (None, "graphs"),
}


def problems(found: dict, allowed: dict[str, str]) -> set[str]:
    """What of a run's findings is not as it should be."""
    steady = found["graphs"][2]  # when the third step begins; evaluation and save have happened once
    return {
        name
        for name, good in {
            "waits": set(found["waits"]) <= set(allowed),
            "products": set(found["products"]) == {"bfloat16"},
            "breaks": not found["breaks"],
            "graphs": steady == found["graphs"][-1],
        }.items()
        if not good
    }


@pytest.fixture(scope="module")
def found(fake_device, corpus) -> dict[str, dict]:
    return fake_device("train", corpus, *NAMES)


@pytest.fixture(scope="module")
def faulty(fake_device, corpus) -> dict[str, dict]:
    return fake_device("train", corpus, *FAULTS)


@pytest.mark.parametrize("name", NAMES)
def test_arrangement(found, name):
    one = found[name]
    print(f"{name}: {one['seconds']} s, waits {one['waits']}, graphs {one['graphs']}, products {one['products']}")
    assert one["error"] is None, one["output"][-4000:]
    allowed = ALLOWED | MORE.get(name, {})
    assert not problems(one, allowed), (one, allowed)
    assert ("compiled" in name or "8b" in name) <= (one["graphs"][-1] > 0), "nothing was compiled"


def test_each_allowed_wait_happens(found):
    """A place in the list where no run waits would hide a new wait."""
    happened = {place for one in found.values() for place in one["waits"]}
    assert happened == {*ALLOWED, *REFIT, *OFFLOAD, *ACCUMULATED}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(faulty, name):
    one, (error, finding) = faulty[name], FAULTS[name]
    if error is None:
        assert one["error"] is None and finding in problems(one, ALLOWED), one
    else:
        assert one["error"] is not None
        pytest.fail(one["error"]) if not __import__("re").search(error, one["error"]) else None
