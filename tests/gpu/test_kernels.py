"""The kernels of a GPU run, compiled for an H100 in the shapes of the presets: they fit, and do not spill registers."""

import pytest

from tests.conftest import SOAK
from tests.gpu.conftest import FakeDevice

SHARED = 232448  # bytes of shared memory that a block may have on an H100
SPILLED = 64  # bytes of a thread's registers that may be spilled: flex attention's backward pass spills 24
PARTS = ("block", "block, documents", "block, float8", "flex", "head", "newton-schulz")
ALL = [f"{size} {part}" for size in ("170m", "1b", "8b") for part in PARTS]
QUICK = ["170m block, documents", "170m head", "8b head", "170m newton-schulz"]
FAULTS = {"too much shared memory": "shared", "too many registers": "spilled"}
NAMES = [*(ALL if SOAK else QUICK), *FAULTS]


def problems(kernels: list[dict]) -> dict[str, str]:
    """The kernels of which no configuration of tiles is good, with what is wrong. Inductor takes the fastest."""
    bad: dict[str, str] = {}
    for name in {kernel["name"] for kernel in kernels}:
        tiles = [kernel for kernel in kernels if kernel["name"] == name]
        fitting = [kernel for kernel in tiles if kernel["shared"] <= SHARED]
        if not fitting:
            bad[name] = "shared"
        elif all(kernel["spilled"] > SPILLED for kernel in fitting):
            bad[name] = "spilled"
    return bad


@pytest.fixture(scope="module")
def found(fake_device: FakeDevice, triton) -> dict[str, dict]:
    return fake_device("compile", triton, *NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FAULTS])
def test_kernels(found, name):
    kernels = found[name]["kernels"]
    most = {what: max(kernel[what] for kernel in kernels) for what in ("registers", "spilled", "shared")}
    print(f"{name}: {len(kernels)} kernels, at most {most}; processor time {found[name]['seconds']} s")
    assert not problems(kernels)
    if "documents" in name or "flex" in name:
        assert sum("flex_attention" in kernel["name"] for kernel in kernels) >= 2, "forward and backward"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(found, name):
    assert FAULTS[name] in problems(found[name]["kernels"]).values()
