"""Each check of test_arrangements.py rejects a fault that only a GPU run would show."""

import re

import pytest

from tests.gpu.test_arrangements import ALLOWED, problems

# By what each fault is found: an error that ends the run, or a finding.
ERRORS = {
    "CPU tensor": "two devices, cuda:0 and cpu",
    "values decide a shape": "DynamicOutputShapeException",
    "missing cast": "query, key, and value to have the same dtype",
    "graph break": "Unsupported: Call to `torch._dynamo.graph_break",
}
FINDINGS = {
    "item in the step": "waits",
    "blocking copy": "waits",
    "wide products": "products",
    "graph break in a mask": "breaks",
    "graph for each step": "graphs",
}


@pytest.fixture(scope="module")
def found(fake_device, corpus) -> dict[str, dict]:
    return fake_device("train", corpus, *ERRORS, *FINDINGS)


@pytest.mark.parametrize("name", ERRORS)
def test_a_fault_ends_the_run(found, name):
    assert re.search(ERRORS[name], found[name]["error"] or ""), found[name]["error"]


@pytest.mark.parametrize("name", FINDINGS)
def test_a_fault_is_found(found, name):
    one = found[name]
    assert one["error"] is None, one["output"][-4000:]
    assert problems(one, ALLOWED) == {FINDINGS[name]}
    if FINDINGS[name] == "waits":
        assert "train.py:take_steps" in one["waits"]
