"""The fake device in a process of its own, because its library must be loaded before torch."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.gpu import shim

FakeDevice = Callable[..., dict[str, dict]]
TRITON = "MDMTRAIN_TRITON"  # a folder with triton (pip install --target); .ci/run makes one


@pytest.fixture(scope="module")
def fake_device(tmp_path_factory) -> FakeDevice:
    """fake_device(what, data, *names): what `python -m tests.gpu` found, by name."""
    if (reason := shim.missing()) is not None:
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("gpu")

    def run(what: str, where: Path, *names: str) -> dict[str, dict]:
        command = [sys.executable, "-m", "tests.gpu", what, str(where), str(scratch), *names]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert [one["name"] for one in found] == list(names), done.stderr[-4000:]
        return {one["name"]: {**one, "output": done.stderr} for one in found}

    return run


@pytest.fixture(scope="session")
def triton() -> Path:
    """The folder that has triton. It is not a requirement, because torch for CPUs compiles differently where it is."""
    if folder := os.environ.get(TRITON):
        assert (Path(folder) / "triton/backends/nvidia/bin/ptxas").is_file(), f"{TRITON}={folder} has no triton"
        return Path(folder)
    if (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        return Path(spec.origin).parent.parent
    pytest.skip(
        f"no kernels are compiled: set {TRITON} to a folder made with pip install --target FOLDER triton==3.7.1"
    )
