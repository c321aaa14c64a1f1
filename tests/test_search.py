"""The search against brute force. Every arrangement that it returns is valid and fits into memory."""

import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain import config as configuration
from mdmtrain.config import resolve
from mdmtrain.cost import GPUS, Assumptions, collectives, cost, ring
from mdmtrain.model.presets import ModelShape, model_shape
from mdmtrain.search import divisible_batch, search
from tests.conftest import ROOT

SHAPE = dict(vocab_size=32768, d_model=1024, n_layers=8, n_heads=8, n_kv_heads=8, d_ff=2816)
ASSUMED, GPU = Assumptions(), GPUS["h100"]


def config_of(*more: str, batch: int = 64) -> configuration.Config:
    tree = {
        "run": {"dir": "x", "steps": 1000, "global_batch": batch, "micro_batch": 4},
        "model": SHAPE,
        "data": {"sources": [{"path": "x"}], "sequence_length": 2048},
        "optim": {"lr": 1e-3, "name": "muon"},
        "parallel": {"compute_dtype": "bfloat16"},
    }
    for change in more:
        key, value = change.split("=")
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = int(value) if value.isdecimal() else value
    return configuration.validate(tree, "test")


def test_it_finds_what_brute_force_finds():
    """A small space, written out here, gives the same arrangements in the same order. The slowest takes far longer."""
    config, shape, prices = config_of(batch=16), ModelShape(**SHAPE), {}
    for micro, recompute, copies, reshard, compiled, offload, chunk in product(
        (1, 2, 4), ("none", "selective", "ops", "full"), (1, 2, 4), *[(True, False)] * 3, (4096, None)
    ):
        parallel = {"activation_checkpointing": recompute, "replicate": copies, "reshard_after_forward": reshard,
                    "compile": compiled, "offload": offload, "head_chunk": chunk or micro * 2048}  # fmt: skip
        one = config.model_copy(update={
            "run": config.run.model_copy(update={"micro_batch": micro}),
            "parallel": config.parallel.model_copy(update=parallel),
        })  # fmt: skip
        price = cost(one, shape, 4, GPU, ASSUMED)
        if price.fits:
            prices[one.run, one.parallel] = price.step_seconds
    found = search(config, shape, 4, GPU, ASSUMED)
    assert {(one.config.run, one.config.parallel): one.cost.step_seconds for one in found} == prices
    assert [one.cost.step_seconds for one in found] == sorted(prices.values())
    assert found[0].cost.step_seconds < 0.7 * max(prices.values())


@pytest.mark.parametrize(
    ("name", "vocabulary", "gpus", "close"),
    [("170m", 32768, 1, 1.0), ("170m", 32768, 8, 1.0), ("1b", 32768, 8, 1.0), ("1b", 32768, 64, 1.0),
     ("8b", 126464, 64, 1.0), ("8b", 126464, 256, 1.0), ("8b", 126464, 1024, 1.01)],
)  # fmt: skip
def test_presets_are_what_the_search_finds(name, vocabulary, gpus, close):
    """As their comments say. Without compilation a step would take more than 1.1 times as long."""
    config = configuration.load([str(ROOT / f"configs/{name}.yaml"), f"model.vocab_size={vocabulary}"])
    shape = model_shape(config.model, vocabulary)
    assert divisible_batch(config, gpus)[1] is None
    planned, best = cost(config, shape, gpus, GPU, ASSUMED), search(config, shape, gpus, GPU, ASSUMED)[0]
    assert planned.fits and planned.step_seconds <= close * best.cost.step_seconds
    eager = config.parallel.model_copy(update={"compile": False, "head_chunk": 4096})
    slower = cost(config.model_copy(update={"parallel": eager}), shape, gpus, GPU, ASSUMED)
    assert slower.step_seconds > 1.1 * planned.step_seconds


@settings(max_examples=15, deadline=None)
@given(
    gpus=st.integers(1, 48),
    batch=st.integers(1, 300),
    views=st.sampled_from(["single", "mirror"]),
    gpu=st.sampled_from(sorted(GPUS)),
    layers=st.integers(1, 40),
    length=st.sampled_from([128, 4096]),
)
def test_every_proposal_fits_and_is_legal(gpus, batch, views, gpu, layers, length):
    config = config_of(f"diffusion.views={views}", batch=2 * batch if views == "mirror" else batch)
    config = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": length})})
    shape = ModelShape(**{**SHAPE, "n_layers": layers})
    found = search(config, shape, gpus, GPUS[gpu], ASSUMED)
    for one in found[:: max(1, len(found) // 10)]:
        tree = config.model_dump(mode="json")
        for section, values in one.overlay.items():
            tree[section].update(values)
        again = configuration.validate(tree, "the overlay")  # as a file after the others
        assert again == one.config and resolve(again, gpus).world_size == gpus
        price = cost(again, shape, gpus, GPUS[gpu], ASSUMED)
        assert price.fits and price.step_seconds == one.cost.step_seconds
        assert price.memory_total <= GPUS[gpu].memory * 0.9
        untouched = {"model", "data", "diffusion", "optim", "checkpoint", "monitor", "eval"}
        assert all(getattr(again, name) == getattr(config, name) for name in untouched)


@settings(max_examples=200, deadline=None)
@given(gpus=st.integers(1, 2048), batch=st.integers(1, 5000), steps=st.integers(100, 10**6))
def test_a_batch_that_does_not_divide_becomes_the_nearest_that_does(gpus, batch, steps):
    config = config_of(batch=batch)
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})
    new, why = divisible_batch(config, gpus)
    assert new.run.global_batch % gpus == 0
    if batch % gpus == 0:
        assert new is config and why is None
        return
    nearest = min(abs(batch - n * gpus) for n in (batch // gpus, batch // gpus + 1) if n)
    assert abs(batch - new.run.global_batch) == nearest
    assert abs(new.run.steps * new.run.global_batch - steps * batch) <= new.run.global_batch  # to one step
    assert f"changed to {new.run.global_batch}" in why and f"run.steps from {steps} to {new.run.steps}" in why


def test_latency_in_closed_form():
    """1,024 GPUs in nodes of 8: a ring has 127 hops between nodes and 896 inside."""
    assert ring(1024, 8, GPU, ASSUMED).latency == pytest.approx(127 * ASSUMED.far_hop + 896 * ASSUMED.near_hop)
    assert ring(8, 8, GPU, ASSUMED).latency == pytest.approx(7 * ASSUMED.near_hop)
    assert ring(1, 8, GPU, ASSUMED).latency == 0
    # Between nodes, a ring uses the cards of all its GPUs in a node, up to the speed inside a node.
    assert ring(1024, 8, GPU, ASSUMED).rate == pytest.approx(8 * GPU.far * ASSUMED.link_efficiency)
    assert ring(128, 1, GPU, ASSUMED).rate == pytest.approx(GPU.far * ASSUMED.link_efficiency)
    assert ring(8, 8, GPU, ASSUMED).rate == pytest.approx(GPU.near * ASSUMED.link_efficiency)
    config, shape = config_of(batch=4096), ModelShape(**SHAPE)
    groups = 8 + 2
    assert collectives(shape, config, 1, 1024, 3) == {
        "all_gather": 3 * (2 * groups - 1), "reduce_scatter": 3 * groups, "all_reduce": 0, "all_to_all": 2
    }  # fmt: skip
    one = cost(config, shape, 1024, GPU, ASSUMED)
    once = ASSUMED.collective + 127 * ASSUMED.far_hop + 896 * ASSUMED.near_hop
    assert one.latency_seconds == pytest.approx((3 * groups - 1) * once)
    assert one.latency_seconds > 0.05  # of a step that takes less than a second
    # 128 copies of 8 GPUs: a copy is a node, and every GPU has a ring of its own over the 128 nodes.
    config = config_of("parallel.replicate=128", batch=4096)
    apart = cost(config, shape, 1024, GPU, ASSUMED)
    inside, across = ASSUMED.collective + 7 * ASSUMED.near_hop, ASSUMED.collective + 2 * 127 * ASSUMED.far_hop
    assert apart.latency_seconds == pytest.approx((3 * groups - 1) * inside + groups * across)


def test_what_is_written_is_a_configuration(tmp_path):
    file = tmp_path / "best.yaml"
    arguments = ["configs/8b.yaml", "model.vocab_size=126464", "run.global_batch=1280"]
    command = [sys.executable, "tools/plan_run.py", *arguments, "--gpus", "1024", "--gpu", "h100", "--best"]
    done = subprocess.run([*command, "--write", str(file)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "run.global_batch=1280 does not divide over 1,024 GPUs" in done.stdout and "run.steps from" in done.stdout
    config = configuration.load([str(ROOT / "configs/8b.yaml"), str(file)])
    assert config.run.global_batch == 1024 and "changed to 1024" in file.read_text()
    price = cost(config, model_shape(config.model, 126464), 1024, GPU, ASSUMED)
    assert price.fits and f"{price.step_seconds:.3g} s a step" in file.read_text()
