"""Products in float8: against the same written out, and training against bfloat16."""

import builtins

import pytest
import torch
import torchao
from torch import Tensor, nn

from mdmtrain import config as configuration
from mdmtrain.config import ParallelConfig
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Block
from mdmtrain.parallel.parallelize import build_model, multiply_in_float8
from mdmtrain.parallel.world import AgreedError
from tests.conftest import SOAK, read_metrics
from tests.spawn import fake_world, run_world

SHAPE = ModelShape(vocab_size=64, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=64)
CPU = torch.device("cpu")
STEPS = 200 if SOAK else 40


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with the digits of a float8 type, scaled so that its largest value is the type's."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).float() / scale


def test_products_are_those_that_are_written_out():
    """Values of 1e-6 too, which a product without scales rounds to zero."""
    torch.manual_seed(0)
    block = Block(SHAPE)
    weight = block.mlp.up_proj.weight.detach().clone()
    multiply_in_float8(block, CPU)
    layer = block.mlp.up_proj
    assert sum(type(module) is nn.Linear for module in block.modules()) == 0
    assert [name for name, _ in block.named_parameters()] == [name for name, _ in Block(SHAPE).named_parameters()]
    x = (1e-6 * torch.randn(48, 32)).requires_grad_()
    gradient = 1e-6 * torch.randn(48, 64)
    layer(x).backward(gradient)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x8, w8, g8 = rounded(x.detach(), e4m3), rounded(weight, e4m3), rounded(gradient, e5m2)
    for found, expected in ((layer(x), x8 @ w8.T), (x.grad, g8 @ w8), (layer.weight.grad, g8.T @ x8)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=float(1e-5 * expected.abs().max()))
        assert expected.abs().max() > 0


def train_all(world, trees: list[dict]) -> None:
    from mdmtrain.train import train

    for tree in trees:
        train(configuration.validate(tree, "test"), world)


def test_training_follows_bfloat16(small_run, tmp_path):
    """The same run in both, on two ranks: other digits, the same losses. Rows of any length are among them."""
    runs = {"bfloat16": {}, "float8": {"float8": True}}
    trees = [
        small_run(
            {
                "run": {"dir": str(tmp_path / name), "steps": STEPS, "global_batch": 8, "micro_batch": 4},
                "parallel": {"compute_dtype": "bfloat16", **parallel},
                "checkpoint": {"save_every": STEPS},
                "eval": {"every": STEPS, "rows": 8},
            }
        )
        for name, parallel in runs.items()
    ]
    run_world(train_all, 2, trees)
    losses = []
    for name in runs:
        records = [record for record in read_metrics(tmp_path / name) if "split" not in record]
        assert len(records) == STEPS and not any(record["skipped"] for record in records)
        losses.append(torch.tensor([record["loss"] for record in records]))
    learned = losses[0][:5].mean() - losses[0][-20:].mean()
    difference = (losses[1] - losses[0])[STEPS // 2 :]
    print(f"learned {learned:.3f} nats; float8 - bfloat16: mean {difference.mean():.5f}, std {difference.std():.5f}")
    assert difference.abs().max() > 0 and learned > 0.5
    assert abs(difference.mean()) < 0.005 * learned and difference.abs().max() < 0.02 * learned


@pytest.mark.parametrize(
    ("shape", "capability", "installed", "message"),
    [
        ({"d_ff": 72}, None, "0.18.0", "multiples of 16, but the model has 72"),
        ({}, None, None, r"needs torchao 0.18 or newer \(.*No module.*pip install mdmtrain\[float8\]"),
        ({}, None, "0.17.1", r"needs torchao 0.18 or newer \(.*this is 0.17.1\): pip install"),
        ({}, (8, 0), "0.18.0", "compute capability 8.9 or more, but this is A100"),
    ],
)
def test_refused(shape, capability, installed, message, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("torchao") and installed is None:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(torchao, "__version__", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    world = fake_world()
    if capability:
        object.__setattr__(world, "device", torch.device("cuda"))
    with pytest.raises(AgreedError, match=message):
        build_model(ModelShape(**{**vars(SHAPE), **shape}), ParallelConfig(float8=True), world)
