"""How the model is spread and recomputed changes speed and memory, never the run."""

import shutil
from pathlib import Path

import pytest
import torch

from mdmtrain import config as configuration
from mdmtrain.config import ParallelConfig, resolve
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer
from mdmtrain.parallel.wrap import recompute_options
from tests.conftest import read_metrics
from tests.spawn import run_world
from tests.test_plan import saved_numbers
from tests.test_worlds import close

SHAPE = ModelShape(vocab_size=64, d_model=16, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=32)


def train_each(world, trees: list[dict]) -> None:
    from mdmtrain.train import train

    for tree in trees:
        train(configuration.validate(tree, "test"), world)


@pytest.fixture
def short_run(small_run, tmp_path):
    """short_run(name, {parallel settings}): the tree of a run of 6 steps, a checkpoint at 3, two micro-steps a rank."""

    def tree(name: str, parallel: dict) -> dict:
        run = {"dir": str(tmp_path / name), "seed": 5, "steps": 6, "global_batch": 16, "micro_batch": 2}
        small = {"run": run, "parallel": parallel, "checkpoint": {"save_every": 3}, "eval": {"every": 6, "rows": 8}}
        monitor = {"log_every": 5, "tensorboard": False, "probe_every": 2, "probe": [4, 2, 2]}
        return small_run({**small, "optim": {"warmup_steps": 2}, "monitor": monitor})

    return tree


def test_mesh_and_recomputation_change_nothing(short_run, tmp_path):
    kinds = {
        "fsdp": {},
        "full": {"recompute": "full"},
        "ops": {"recompute": "ops", "reshard_after_forward": False},
        "hsdp": {"replicate": 2, "recompute": "full"},
    }
    run_world(train_each, 4, [short_run(name, parallel) for name, parallel in kinds.items()])
    metrics = {name: read_metrics(tmp_path / name) for name in kinds}
    for name in ("full", "ops"):
        assert metrics[name] == metrics["fsdp"], name
    assert [r["step"] for r in metrics["fsdp"] if "grad_noise" in r] == [2, 6]  # not 4: step 3 saves
    # Two copies of two shards add up in another order; averaging over copies would halve the gradient, and gradient
    # noise added up over all ranks would count each copy.
    close(metrics["fsdp"], metrics["hsdp"], 1e-5)
    # Saved as two copies on 4 ranks, continued as one on 2.
    shutil.rmtree(tmp_path / "hsdp/checkpoints/step-00000006")
    run_world(train_each, 2, [short_run("hsdp", {})])
    close(metrics["hsdp"], read_metrics(tmp_path / "hsdp"), 1e-5)


def test_recomputation_keeps_less():
    """Without it the equalities above would hold for a mode that is never switched on."""
    none, selective, full = (saved_numbers(SHAPE, mode) for mode in ("none", "selective", "full"))
    assert full < 0.4 * none and full < selective < none


def test_ops_keeps_products_and_attention_only(monkeypatch):
    """The backward pass of recompute=ops runs no matrix product of the forward pass again; full runs them all."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func == torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    counts = {}
    for mode in ("none", "ops", "full"):
        model = Transformer(SHAPE, 64)
        for index, layer in enumerate(model.layers):
            layer.recompute = recompute_options(ParallelConfig(recompute=mode), index)
        ids = torch.arange(64).view(2, 32) % 60
        loss = model(ids, torch.arange(4), ids.flatten()[:4]).sum()
        with Count() as count:
            loss.backward()
        counts[mode] = count.products
    # Seven products a block. early_stop ends the recomputation before the last one, whose output nothing needs.
    assert counts["ops"] == counts["none"] and counts["full"] == counts["none"] + 6 * SHAPE.n_layers


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler (g++)")
def test_compiled_blocks(short_run, tmp_path):
    eager, compiled = short_run("eager", {}), short_run("compiled", {"compile": True, "recompute": "ops"})
    (graphs,) = run_world(train_and_count_graphs, 1, [eager, compiled])
    close(read_metrics(tmp_path / "eager"), read_metrics(tmp_path / "compiled"), 1e-4)
    # With and without a mask, in training and in evaluation: not once per layer, nor once per step.
    assert 1 <= graphs <= 4
    assert Path(tmp_path / "compiled/checkpoints/step-00000006/meta.json").is_file()


def train_and_count_graphs(world, trees: list[dict]) -> int:
    from torch._dynamo.utils import counters

    train_each(world, trees)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("parallel", "ranks", "good"),
    [
        ({"replicate": 2}, 4, True),
        ({"replicate": 2, "shard": 2}, 4, True),
        ({"shard": 4}, 4, True),
        ({"replicate": 3}, 4, False),
        ({"shard": 2}, 4, False),
        ({"replicate": 8}, 4, False),
    ],
)
def test_a_mesh_must_hold_all_ranks(short_run, parallel, ranks, good):
    config = configuration.validate(short_run("x", parallel), "test")
    if good:
        resolve(config, ranks)
    else:
        with pytest.raises(ValueError, match=f"is not {ranks} ranks"):
            resolve(config, ranks)
