"""Parts of tools/gpu_check.py on the fake device, in the sizes of a GPU. tests/test_bench.py rehearses all on the CPU.

Not here: nan_skip and saves, which compare values; save_stall, which starts processes; the benchmarks, which take long.
"""

import pytest

from tests.conftest import SOAK
from tests.gpu.conftest import FakeDevice

NAMES = ["device", "attention", *(["graphs", "sync_free", "sync_free, item"] if SOAK else [])]


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
