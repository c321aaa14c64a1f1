"""The parts of tools/gpu_check.py on the fake device. tests/test_bench.py rehearses them on a CPU.

Values and times mean nothing here, because the device has no values and computes nothing. That a part runs to its end
is tested, and what does not depend on values: memory, waits, graphs.
"""

import pytest

from tests.conftest import SOAK
from tests.gpu.conftest import FakeDevice

SLOW = ["graphs", "sync_free", "sync_free, item", "nan_skip", "saves", "save_stall", "bench_170m", "bench_1b"]
NAMES = ["device", "attention", *(SLOW if SOAK else [])]


@pytest.fixture(scope="module")
def found(fake_device: FakeDevice, corpus) -> dict[str, dict]:
    return fake_device("check", corpus, *NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if "item" not in name])
def test_a_part_runs(found, name):
    assert found[name]["error"] is None, found[name]["output"][-4000:]
    assert found[name]["checks"] or found[name]["numbers"]


def test_the_device_is_described(found):
    assert found["device"]["numbers"]["name"] == "NVIDIA H100 80GB HBM3"


@pytest.mark.skipif(not SOAK, reason="two runs of 16 steps on the fake device: MDMTRAIN_SOAK=1")
def test_a_wait_is_found(found):
    assert found["sync_free"]["checks"]["16 steps"]["good"]
    assert "the host waits for the device in train.py:take_steps" in found["sync_free, item"]["error"]


@pytest.mark.skipif(not SOAK, reason="two runs of 12 steps on the fake device: MDMTRAIN_SOAK=1")
def test_a_run_on_the_device_is_saved_and_resumed(found):
    """Real files are written from the copies in host memory, and read back. All losses are zero, in both runs."""
    checks = found["saves"]["checks"]
    assert list(checks) == ["complete", "its own step", "same losses"]
    assert all(check["good"] for check in checks.values()), checks


@pytest.mark.skipif(not SOAK, reason="a run of 12 steps on the fake device: MDMTRAIN_SOAK=1")
def test_the_part_with_a_poisoned_step_reaches_its_end(found):
    """Its checks fail here: NaN is a value, so no step is skipped."""
    checks = found["nan_skip"]["checks"]
    assert list(checks) == ["counted", "no weight moved", "the next step learns", "finite after it"]
    assert checks["counted"]["detail"] == "skipped: [], poisoned: [6]"


@pytest.mark.skipif(not SOAK, reason="two models of 4 layers on the fake device: MDMTRAIN_SOAK=1")
def test_no_graph_is_made_late(found):
    checks = found["graphs"]["checks"]
    assert checks["steady"]["good"] and checks["few"]["good"], checks


@pytest.mark.skipif(not SOAK, reason="models of 170M and 1B parameters on the fake device: MDMTRAIN_SOAK=1")
@pytest.mark.parametrize("name", ["bench_170m", "bench_1b"])
def test_a_benchmark_measures_the_planned_memory(found, name):
    assert found[name]["checks"]["memory"]["good"], found[name]["checks"]
    planned, held = found[name]["numbers"]["memory_planned_and_measured"]["peak"]
    assert planned == pytest.approx(held, rel=0.03)
