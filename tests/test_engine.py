"""How the model is spread and recomputed changes speed and memory, never the run."""

import dataclasses
import hashlib
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from mdmtrain import config as configuration
from mdmtrain.config import ParallelConfig, resolve
from mdmtrain.diffusion import noise
from mdmtrain.model.presets import ModelShape, model_shape
from mdmtrain.model.transformer import Transformer, initial_std
from mdmtrain.parallel.parallelize import GraphCount, build_model, init_weights, recompute_options, set_up_compiler
from mdmtrain.parallel.world import AgreedError, set_up_allocator
from tests.conftest import read_metrics
from tests.spawn import fake_world, run_world
from tests.test_cost import saved_numbers
from tests.test_worlds import close
from tools.check_exactness import Row, measure
from tools.check_exactness import main as check_exactness

FUSED = ["fused head"] if hasattr(torch.nn.functional, "linear_cross_entropy") else []
SHAPE = ModelShape(vocab_size=64, d_model=16, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=32)


def train_each(world, trees: list[dict]) -> list[str]:
    """Train each configuration; the hash of the weights that each of them starts with."""
    from mdmtrain.train import train

    hashes = []
    for tree in trees:
        config = configuration.validate(tree, "test")
        model = build_model(model_shape(config.model, 512), config.parallel, world)
        init_weights(model, config.run.seed)
        hashes.append(hash_of({name: p.full_tensor().detach() for name, p in model.named_parameters()}))
        train(config, world)
    return hashes


def hash_of(weights: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def initial_hash(tree: dict) -> str:
    """The same from the definition alone: no FSDP, no shards."""
    config = configuration.validate(tree, "test")
    weights = {}
    shape = model_shape(config.model, 512)
    for name, p in Transformer(shape, 1).named_parameters():
        std = initial_std(name, shape)
        drawn = torch.from_numpy(noise.normals(config.run.seed, name, 0, p.numel())).view(p.shape)
        weights[name] = torch.ones_like(p.detach()) if std is None else drawn * std
    return hash_of(weights)


@pytest.fixture
def short_run(small_run, tmp_path):
    """short_run(name, {parallel settings}): the tree of a run of 6 steps, a checkpoint at 3, two micro-steps a rank."""

    def tree(name: str, parallel: dict, optim: dict | None = None) -> dict:
        run = {"dir": str(tmp_path / name), "seed": 5, "steps": 6, "global_batch": 16, "micro_batch": 2}
        small = {"run": run, "parallel": parallel, "checkpoint": {"save_every": 3}, "eval": {"every": 6, "rows": 8}}
        monitor = {
            "log_every": 5,
            "tensorboard": False,
            "probe_every": 2,
            "probe_sequences": 4,
            "probe_rates": 2,
            "probe_masks": 2,
        }
        return small_run({**small, "optim": {"warmup_steps": 2, **(optim or {})}, "monitor": monitor})

    return tree


def test_the_mesh_changes_nothing(short_run, tmp_path):
    hsdp, muon = (
        {"replicate": 2, "activation_checkpointing": "full", "offload": True},
        {"name": "muon", "muon_lr": 2e-3},
    )
    runs = {"fsdp": ({}, {}), "hsdp": (hsdp, {}), "muon": ({}, muon), "muon hsdp": (hsdp, muon)}
    trees = [short_run(name, *settings) for name, settings in runs.items()]
    assert run_world(train_each, 4, trees) == [[initial_hash(trees[0])] * 4] * 4
    metrics = {name: read_metrics(tmp_path / name) for name in runs}
    assert [r["step"] for r in metrics["fsdp"] if "grad_noise" in r] == [2, 6]  # not 4: step 3 saves
    # Two copies of two shards add up in another order; averaging over copies would halve the gradient, and gradient
    # noise added up over all ranks would count each copy.
    close(metrics["fsdp"], metrics["hsdp"], 1e-5)
    close(metrics["muon"], metrics["muon hsdp"], 1e-5)
    with pytest.raises(AssertionError):
        close(metrics["fsdp"], metrics["muon"], 1e-2)  # another optimizer is another run
    # Saved as two copies on 4 ranks, continued as one on 2.
    for name in ("hsdp", "muon hsdp"):
        shutil.rmtree(tmp_path / name / "checkpoints/step-00000006")
    run_world(train_each, 2, [short_run("hsdp", {}), short_run("muon hsdp", {}, muon)])
    for name in ("hsdp", "muon hsdp"):
        close(metrics[name], read_metrics(tmp_path / name), 1e-5)


def test_arrangements_are_one_run(corpus, tmp_path):
    """A short version of tools/check_exactness.py: what should be bitwise equal is, the rest to 1e-5."""
    names = ["plain", "recompute full", "recompute ops", "keep gathered", "offload", "average", "accumulate", *FUSED]
    names += ["muon", "muon offload", "muon accumulate"]
    rows = list(measure(3, ["1", "2x2"], names, corpus, tmp_path))
    assert len(rows) == 2 * len(names) and {row.verdict(3) for row in rows} == {"ok"}, rows
    assert any(row.loss_to_plain for row in rows), "nothing differs: was anything arranged?"


def test_exactness_is_judged_by_the_law():
    row = Row("2x2", "x", True, 9e-6, 0.3, 0.0, 0.0)
    close = dataclasses.replace(row, exact=False, loss_to_plain=1e-7)
    assert row.verdict(20) == close.verdict(20) == "ok"
    assert dataclasses.replace(close, exact=True).verdict(20) == "NOT BITWISE EQUAL"
    assert dataclasses.replace(row, weights_to_plain=1e-9).verdict(20) == "NOT BITWISE EQUAL"
    for beyond in (2e-5, float("nan")):
        assert "LOSS BEYOND 1e-05" in dataclasses.replace(close, loss_to_one=beyond).verdict(20)
    assert dataclasses.replace(close, loss_to_one=2e-5).verdict(21) == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),  # and the defaults of the others are good
        (["--worlds", "2,4"], "--worlds 2,4: must be 1, then"),
        (["--worlds", "1,3"], "--worlds 1,3: must be 1, then"),
        (["--only", "compile,muon again"], "--only compile,muon again: add muon, plain"),
        (["--only", "plain,fast"], "--only plain,fast: unknown fast: use plain, "),
    ],
)
def test_exactness_refuses_what_it_cannot_compare(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_exactness(arguments)


def test_recomputation_keeps_less():
    """Without it the equalities above would hold for a mode that is never switched on."""
    none, selective, full = (saved_numbers(SHAPE, mode) for mode in ("none", "selective", "full"))
    assert full < 0.4 * none and full < selective < none


def test_ops_keeps_products_and_attention_only(monkeypatch):
    """Under ops the backward pass repeats no matrix product of the forward pass; under full it repeats all."""
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
            layer.recompute = recompute_options(ParallelConfig(activation_checkpointing=mode), index)
        ids = torch.arange(64).view(2, 32) % 60
        loss = model(ids, torch.arange(4), ids.flatten()[:4]).sum()
        with Count() as count:
            loss.backward()
        counts[mode] = count.products
    # Seven products a block. early_stop ends the recomputation before the last one, whose output nothing needs.
    assert counts["ops"] == counts["none"] and counts["full"] == counts["none"] + 6 * SHAPE.n_layers


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler (g++)")
def test_compiled_blocks(short_run, tmp_path):
    eager, compiled = (
        short_run("eager", {}),
        short_run("compiled", {"compile": True, "activation_checkpointing": "ops"}),
    )
    ((graphs, budget, flex),) = run_world(train_and_count_graphs, 1, [eager, compiled])
    close(read_metrics(tmp_path / "eager"), read_metrics(tmp_path / "compiled"), 1e-4)
    # Blocks with and without a mask, and the head's loss, in training and in evaluation. Not once per layer or step.
    assert 1 <= graphs <= 6 and budget == 0.25
    for differences, graphs in flex:
        assert max(differences) < 1e-5 and graphs <= 1
    log = (tmp_path / "compiled/logs/rank-0.log").read_text()
    assert "torch.compile made" in log and "more graphs" not in log, "steady steps with other masked positions compile"
    assert Path(tmp_path / "compiled/checkpoints/step-00000006/meta.json").is_file()


def train_and_count_graphs(world, trees: list[dict]) -> tuple[int, float, list]:
    """Graphs of all runs, the budget that a further model would be compiled under, flex_against_sdpa."""
    train_each(world, trees)
    made = counters["stats"]["unique_graphs"]
    build_model(SHAPE, ParallelConfig(compile=True, activation_checkpointing="budget", recompute_budget=0.25), world)
    return made, torch._functorch.config.activation_memory_budget, flex_against_sdpa(world)


def flex_against_sdpa(world) -> list[tuple[tuple[float, float], int]]:
    """(Relative differences of losses and gradients, graphs made) with FlexAttention under FSDP, eager and compiled.

    Two batches of other documents. Its dense form, as in tests/model/test_attention.py; compiled, but for code of GPUs.
    """
    import torch.nn.attention.flex_attention as flex

    from mdmtrain.model import attention, head, transformer

    head.Head.compile_loss = lambda self: None
    flex._validate_device, attention._compiled = lambda *tensors: None, lambda function: function
    compile, sdpa = torch.nn.Module.compile, transformer.attention_mask
    torch.nn.Module.compile = lambda module, **options: compile(module, backend="aot_eager", **options)
    shape = ModelShape(vocab_size=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64)
    ids, positions, segments = torch.arange(300).view(2, 150) * 7 % 60, torch.arange(0, 300, 3), torch.zeros(2, 150)
    segments[0, 40:], segments[0, 130:], segments[1, 9:] = 1, -1, -1
    found = []
    for parallel in (
        ParallelConfig(activation_checkpointing="full"),
        ParallelConfig(activation_checkpointing="ops", compile=True),
    ):
        outcomes = []
        for mask in (sdpa, lambda seen, _: attention.block_mask(seen, False)):
            transformer.attention_mask = mask
            torch.compiler.reset()
            counters.clear()
            model = build_model(shape, parallel, world)
            init_weights(model, 0)
            for documents in (segments, segments.roll(1, 0)):
                losses = model(ids, positions, ids.flatten()[positions], documents)
                losses.sum().backward()
            gradient = torch.cat([p.grad.to_local().flatten() for p in model.parameters()])
            outcomes.append((losses.detach(), gradient))
        differences = tuple(float((a - b).norm() / a.norm()) for a, b in zip(*outcomes, strict=True))
        found.append((differences, counters["stats"]["unique_graphs"] if parallel.compile else 0))
    return found


def divisions_by_one(world) -> int:
    """The number of divisions of a tensor by 1 in a backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor) and args[1] == 1
            return func(*args, **(kwargs or {}))

    model = build_model(SHAPE, ParallelConfig(), world)
    init_weights(model, 0)
    ids = torch.arange(64).view(2, 32) % 60
    loss = model(ids, torch.arange(4), ids.flatten()[:4]).sum()
    with Count() as count:
        loss.backward()
    return count.found


def test_one_rank_divides_no_gradients():
    assert run_world(divisions_by_one, 1) == [0]


@pytest.mark.parametrize(("here", "cores", "workers"), [(1, 16, 16), (4, 16, 4), (8, 192, 24), (1, 192, 32), (8, 4, 1)])
def test_the_ranks_of_a_node_share_its_cores_for_compilation(monkeypatch, here, cores, workers):
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: cores)
    set_up_compiler(ParallelConfig())
    assert torch._inductor.config.compile_threads == workers
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    set_up_compiler(ParallelConfig())
    assert torch._inductor.config.compile_threads == 7


def test_the_allocator_of_the_user_is_kept(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that the end of the test removes what is set here
    for given, set_up in ({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1"):
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        set_up_allocator()
        assert os.environ["PYTORCH_ALLOC_CONF"] == set_up
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "x:1")
    set_up_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_graphs_made_late_are_reported(monkeypatch, caplog):
    """Not those that an evaluation makes between two reports, nor any of a run without compilation."""
    monkeypatch.setitem(counters, "stats", {"unique_graphs": 3})
    caplog.set_level(logging.INFO, "mdmtrain")
    graphs, eager = GraphCount(True), GraphCount(False)
    for step, made in ((10, 0), (20, 0), (30, 2)):
        counters["stats"]["unique_graphs"] += made
        graphs.report(step), eager.report(step)
        counters["stats"]["unique_graphs"] += 1
        graphs.resume()
    first, warning = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert first == ("INFO", "torch.compile made 3 graphs by step 10")
    assert warning[0] == "WARNING" and "2 more graphs by step 30, 7 in all" in warning[1]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"activation_checkpointing": "budget"},
            "activation_checkpointing=budget needs the compiler: set compile=true",
        ),
        (
            {"activation_checkpointing": "budget", "compile": True, "recompute_budget": 1.5},
            "'parallel.recompute_budget': input",
        ),
        ({"fused_head": True, "compute_dtype": "bfloat16"}, "fused_head=true would compute losses in bfloat16"),
    ],
)
def test_what_torch_cannot_do_is_refused(short_run, parallel, message):
    with pytest.raises(ValueError, match=message):
        configuration.validate(short_run("x", parallel), "test")


def test_a_torch_without_the_fused_head_refuses_it(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(AgreedError, match=r"parallel.fused_head=true needs torch 2.13"):
        build_model(SHAPE, ParallelConfig(fused_head=True), fake_world())


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
