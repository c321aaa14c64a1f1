"""One cluster for all tests in this folder; where there can be none, they are skipped and say why."""

import os

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="package")
def cluster():
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as running, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", running.environment["SLURM_CONF"])
        yield running
