"""run.deterministic: torch refuses what may give other bits, and a run on a CPU stays as it is."""

import os

import pytest
import torch

import mdmtrain.train as loop
from mdmtrain import config as configuration
from mdmtrain.parallel.world import use_deterministic_algorithms
from tests.conftest import read_metrics, write_config
from tests.spawn import run_world


class Started(Exception):
    """The process group would start now."""


def test_it_is_set_before_cuda_starts(small_run, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def start(*_):
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
        raise Started

    monkeypatch.setattr(loop, "init_world", start)
    config = write_config(small_run({"run": {"deterministic": True}}), tmp_path / "config.yaml")
    try:
        with pytest.raises(Started):
            loop.main([str(config)])
    finally:
        torch.use_deterministic_algorithms(False)


def train_both(world, plain: dict, deterministic: dict) -> None:
    loop.train(configuration.validate(plain, "test"), world)
    use_deterministic_algorithms()
    loop.train(configuration.validate(deterministic, "test"), world)


def test_a_cpu_run_stays_as_it_is(small_run, tmp_path):
    trees = [small_run({"run": {"steps": 8, "dir": str(tmp_path / name)}}) for name in ("plain", "deterministic")]
    run_world(train_both, 1, *trees)
    plain, deterministic = (read_metrics(tree["run"]["dir"]) for tree in trees)
    assert len(plain) > 8 and plain == deterministic
