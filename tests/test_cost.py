"""The planner against the engine: parameters, bytes on the wire, activations and FLOPs of the real model."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mdmtrain import config as configuration
from mdmtrain import cost, muon
from mdmtrain.config import ParallelConfig
from mdmtrain.diffusion.objective import plain_process
from mdmtrain.model.presets import PRESETS, ModelShape
from mdmtrain.model.transformer import Block, Transformer
from mdmtrain.parallel.parallelize import recompute_options, set_up_compiler
from tests.conftest import ROOT, SOAK
from tests.spawn import run_world
from tools import observed
from tools.bench import allocator

SHAPE = dict(vocab_size=64, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=176)


def config_of(parallel: dict, optimizer: str = "adamw", **run):
    tree = {
        "run": {"dir": "x", "steps": 10, "global_batch": 32, "micro_batch": 4, **run},
        "model": SHAPE,
        "data": {"sources": [{"path": "x"}], "sequence_length": 32},
        "optim": {"lr": 1e-3, "name": optimizer},
        "parallel": parallel,
    }
    return configuration.validate(tree, "test")


def config_with(diffusion: dict):
    """The plain configuration with another section `diffusion`."""
    model = {**SHAPE, "causal": diffusion.get("objective") == "ar"}
    return configuration.validate({**config_of({}).model_dump(), "model": model, "diffusion": diffusion}, "test")


@pytest.mark.parametrize("name", PRESETS)
def test_groups_add_up_to_the_model(name):
    shape = ModelShape(vocab_size=1000, **PRESETS[name])
    assert cost.sizes(shape).total == shape.parameters()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "parallel", [{}, {"replicate": 2}, {"reshard_after_forward": False, "activation_checkpointing": "full"}]
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_traffic_is_what_the_engine_sends(tied, parallel, optimizer):
    """To the byte, where every dimension divides. Leaving out the backward pass' gathering would be far off."""
    config, shape = config_of(parallel, optimizer), ModelShape(**SHAPE, tied_embeddings=tied)
    planned = cost.traffic(shape, config, 8, 8 // config.parallel.replicate, accumulation=1)
    by_rank = cost.muon_traffic(shape, 8 // config.parallel.replicate)
    traced, calls = observed.traced_traffic(config, shape, 8, rank=by_rank.index(max(by_rank)))
    counted = cost.collectives(shape, config, config.parallel.replicate, 8 // config.parallel.replicate, 1)
    assert {kind: count for kind, count in counted.items() if count} == calls
    assert {kind: sent for kind, sent in planned.items() if sent} == traced
    twice = cost.traffic(shape, config, 8, 8 // config.parallel.replicate, accumulation=2)
    assert twice["all_gather"] == 2 * planned["all_gather"]
    assert all(twice[kind] == planned[kind] for kind in ("all_reduce", "all_to_all"))  # once a step


def test_muon_sends_what_each_rank_is_planned_to_send():
    """To the byte, also where rows do not divide and where a rank has none. In all, each row goes and comes once."""
    shape = ModelShape(**{**SHAPE, "d_model": 24, "d_ff": 40})
    planned = cost.muon_traffic(shape, 7)
    for world, parallel, ranks in ((7, {}, (0, 3, 6)), (14, {"replicate": 2}, (7,))):
        config = config_of(parallel, "muon")
        traced = [observed.traced_traffic(config, shape, world, rank)[0]["all_to_all"] for rank in ranks]
        assert traced == [planned[rank % 7] for rank in ranks]
    assert len(set(planned)) > 1
    rows = [(muon.rows_by_rank(rows, 7), columns) for rows, columns in cost.muon_shapes(shape)]
    owners = muon.choose_owners(cost.muon_shapes(shape), 7)
    kept = sum(own[owner] * columns for (own, columns), owner in zip(rows, owners, strict=True))
    assert sum(planned) == 2 * 2 * (cost.muon_parameters(shape) - kept)


def saved_numbers(shape: ModelShape, recompute: str, budget: float | None = None) -> float:
    """What a forward pass keeps for the backward pass, in float32 numbers per token, parameters aside.

    With a budget, blocks are compiled (partitioned as on a GPU, run without a C++ compiler).
    """
    model, kept = Transformer(shape, 1 << 20), {}
    more = {} if budget is None else {"compile": True, "recompute_budget": budget}
    parallel = ParallelConfig(activation_checkpointing=recompute, **more)
    for index, layer in enumerate(model.layers):
        layer.recompute = recompute_options(parallel, index)
        if parallel.compile:
            layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    if parallel.compile:
        torch.compiler.reset()
        set_up_compiler(parallel)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, torch.arange(1), ids.flatten()[:1]).sum()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values()) / 4 / ids.numel()


@pytest.mark.parametrize("change", [{}, {"d_ff": 320}, {"n_kv_heads": 4}, {"head_dim": 24}])
def test_activations_are_what_autograd_keeps(change):
    shapes = [ModelShape(**{**SHAPE, **change, "n_layers": layers}) for layers in (2, 6)]
    for mode in ("none", "full"):
        two, six = (saved_numbers(shape, mode) for shape in shapes)
        # On the CPU a norm is composed of products and keeps its input twice; statistics are a few numbers a token.
        composed = {"none": 2 * 64 + 2 + 4, "full": 0}[mode]
        assert (six - two) / 4 == cost.saved_per_token(shapes[0], mode) + composed


def test_a_budget_is_kept():
    """The plan bounds it from above: what is not compiled keeps more. All or nothing would be far off in the middle."""
    shapes = [ModelShape(**{**SHAPE, "n_layers": layers}) for layers in (1, 3)]
    for budget in (0.0, 0.5):
        one, three = (saved_numbers(shape, "budget", budget) for shape in shapes)
        planned = cost.saved_per_token(shapes[0], "budget", budget)
        assert 0.75 * planned <= (three - one) / 2 <= planned
    set_up_compiler(ParallelConfig())


def test_offloaded_states_leave_the_gpu_for_its_host():
    shape, gpu, assumed = ModelShape(**SHAPE), cost.GPUS["h100"], cost.Assumptions()
    here, there = (cost.cost(config_of({"offload": o}), shape, 4, gpu, assumed) for o in (False, True))
    assert there.host_bytes == 5 * 4 * shape.parameters() / 4  # parameter, gradient, its pair, two moments
    assert here.host_bytes == 0 and here.memory_total - there.memory_total > 0.8 * there.host_bytes
    # Two micro-steps: in float32, blocks and embedding come twice, head and norm once; gradients go.
    block, matrix = cost.sizes(shape).block * 3, 64 * 64
    assert there.traffic["host"] == 4 * 2 * (2 * block + 2 * matrix + (matrix + 64) + shape.parameters()) / 4
    assert there.step_seconds > here.step_seconds
    muons = [config_of({"offload": offload}, "muon") for offload in (False, True)]
    muon_here, muon_there = (cost.cost(config, shape, 4, gpu, assumed) for config in muons)
    matrices = cost.muon_parameters(shape)
    assert there.host_bytes - muon_there.host_bytes == 4 * matrices / 4  # one moment less
    assert muon_there.traffic["host"] - there.traffic["host"] == 2 * 2 * matrices / 4  # in bfloat16, both ways
    assert here.checkpoint_bytes - muon_here.checkpoint_bytes == 4 * matrices
    assert muon_there.step_seconds > muon_here.step_seconds > here.step_seconds


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_are_those_of_the_model(recompute):
    config, shape = config_of({"activation_checkpointing": recompute, "head_chunk": 16}), ModelShape(**SHAPE)
    model = Transformer(shape, 16)  # the head in chunks: it recomputes its logits
    for index, layer in enumerate(model.layers):
        layer.recompute = recompute_options(config.parallel, index)
    rows, length = config.run.global_batch, config.data.sequence_length
    ids = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.arange(rows * length // 2)
    with FlopCounterMode(display=False) as counter:
        model(ids, positions, ids.flatten()[positions]).sum().backward()
    _, products, attention = cost.step_flops(shape, config, masked=0.5)
    # What the planner counts and the counter does not: the weights of the norms, and attention (it has no formula for
    # the CPU's kernel). What the planner leaves out: recomputation stops before a block's last product, as
    # nothing needs its output.
    passes, tokens = (4 if recompute == "full" else 3), rows * length
    norms = passes * 2 * 2 * shape.d_model * shape.n_layers * tokens
    last = 2 * shape.d_ff * shape.d_model * shape.n_layers * tokens if recompute == "full" else 0
    assert products == counter.get_total_flops() + norms + last
    assert attention == (passes + 0.5) * 4 * length * shape.d_model * shape.n_layers * tokens


def test_flops_per_token_have_muon_and_the_head_on_masked_positions():
    shape = ModelShape(**SHAPE)
    adamw, muon_too = (config_of({}, optimizer) for optimizer in ("adamw", "muon"))
    tokens = adamw.run.global_batch * adamw.data.sequence_length
    with FlopCounterMode(display=False) as counter:
        for parameter in Transformer(shape, None).layers.parameters():
            if parameter.ndim == 2:
                muon.orthogonalize(parameter.detach())
    more = cost.flops_per_token(muon_too) - cost.flops_per_token(adamw)
    assert more * tokens == pytest.approx(counter.get_total_flops())
    # Rates in [.3, .8] mask a share of .55 on average. Next-token loss has the head everywhere and half of attention.
    high, low = (config_with({"rate_low": a, "rate_high": b}) for a, b in ((0.3, 0.8), (0.1, 0.4)))
    assert cost.flops_per_token(high) - cost.flops_per_token(low) == pytest.approx(3 * 2 * 64 * 64 * (0.55 - 0.25))
    ar = config_with({"objective": "ar", "strata": "none"})
    attention = 4 * ar.data.sequence_length * shape.d_model * shape.n_layers
    difference = 3 * (2 * 64 * 64 * (1 - 0.55) - attention / 2)
    assert cost.flops_per_token(ar) - cost.flops_per_token(high) == pytest.approx(difference)


def test_float8_is_priced():
    """The products of the blocks take half the time. Scaling reads and writes every operand of a linear layer."""
    shape, plain = ModelShape(**SHAPE), config_of({"head_chunk": 4096})
    float8 = config_of({"head_chunk": 4096, "float8": True})
    counted, products, attention = cost.step_flops(shape, plain, masked=0.5)
    counted8, products8, attention8 = cost.step_flops(shape, float8, masked=0.5)
    block = Block(shape)
    linear = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in linear)
    norms = sum(p.numel() for p in block.parameters()) - weights  # counted with the products
    tokens = plain.run.global_batch * plain.data.sequence_length
    assert (counted8, attention8) == (counted, attention)
    assert products - products8 == 3 * tokens * 2 * (weights + norms) * shape.n_layers / 2
    operands = sum(7 * (layer.in_features + layer.out_features) + 2 * layer.weight.numel() for layer in linear)
    assert cost.float8_bytes(shape, 7) == 5 * shape.n_layers * operands
    again = sum(7 * layer.in_features + layer.weight.numel() for layer in linear)  # a whole forward pass
    assert cost.float8_bytes(shape, 7, recomputed=0.5) == 5 * shape.n_layers * (operands + again / 2)
    every = {mode: config_of({"activation_checkpointing": mode, "float8": True}) for mode in ("none", "full")}
    moved = {mode: cost.moved_bytes(shape, config, 1, 0.5) for mode, config in every.items()}
    tokens = plain.run.micro_batch * plain.data.sequence_length
    blocks = {mode: tokens * shape.n_layers * cost.block_bytes(shape, config) for mode, config in every.items()}
    scaled = cost.float8_bytes(shape, tokens, 1.0) - cost.float8_bytes(shape, tokens)
    assert moved["full"] - moved["none"] == pytest.approx(blocks["full"] - blocks["none"] + scaled)


def test_a_chunk_of_the_mean_is_exceeded():
    """The number of masked positions varies. A chunk that holds only their mean is planned to recompute its logits."""
    positions = 4 * 32
    most = cost.most_masked(config_of({}), 0.5)
    assert most == pytest.approx(0.5 + 2 * 0.999 * (1 / 12 / 4) ** 0.5)  # the rate of a row is uniform
    assert cost.most_masked(config_of({}), 1.0) == 1
    window = config_with({"rate_low": 0.3, "rate_high": 0.8})
    assert cost.most_masked(window, 0.55) == pytest.approx(0.55 + 2 * 0.5 / 48**0.5)
    for share, at_once in ((0.5, False), (most - 0.01, False), (most + 0.01, True)):
        config = config_of({"head_chunk": int(share * positions)})
        assert cost.head_at_once(config, masked=0.5) is at_once
    averages = torch.rand(100_000, 4, generator=torch.Generator().manual_seed(0)).mean(1)
    assert (averages <= most).float().mean() == pytest.approx(0.977, abs=0.01)


@pytest.mark.parametrize(
    "diffusion",
    [{}, {"rate_low": 0.3, "rate_high": 0.8}, {"schedule": "cosine"}, {"masks": "counted"}, {"objective": "ar"}],
)
def test_the_mean_share_of_masks(diffusion):
    """As many as a forward process really masks. A half for all would be off by .05, .14 and .5."""
    config = config_with(diffusion)
    process = plain_process(config.diffusion)
    ids = torch.ones(1000, 512, dtype=torch.int64)
    uniforms = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    eligible = torch.ones_like(ids, dtype=torch.bool)
    batch = process.corrupt(ids, eligible, uniforms, process.draw(0, 0, len(ids)), 0)
    ends = len(ids) if config.diffusion.objective == "ar" else 0  # the last token of a row predicts none
    planned = cost.mean_masked(config, cost.Assumptions())
    assert len(batch.positions) + ends == pytest.approx(planned * ids.numel(), abs=0.005 * ids.numel())
    assert cost.mean_masked(config, cost.Assumptions(masked=0.2)) == 0.2


MEMORY_CASES = [
    ({}, {}),
    ({}, {"activation_checkpointing": "ops"}),
    ({}, {"activation_checkpointing": "full"}),
    ({}, {"activation_checkpointing": "selective"}),
    ({"tied_embeddings": True}, {"activation_checkpointing": "full"}),
    ({"vocab_size": 2048, "n_kv_heads": 1}, {"activation_checkpointing": "full", "reshard_after_forward": False}),
    ({}, {"activation_checkpointing": "full"}, "muon"),
    ({"d_model": 96, "d_ff": 512, "n_layers": 3}, {}, "muon"),
]


def measure_memory(world) -> list[dict[str, float]]:
    """In the order of MEMORY_CASES."""
    return [allocator.measured_memory(*memory_case(world.size, *case), world, 0.5) for case in MEMORY_CASES]


def memory_case(ranks: int, change: dict, parallel: dict, optimizer: str = "adamw") -> tuple:
    shape = dict(vocab_size=512, d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, d_ff=352)
    config = config_of({"head_chunk": 256, **parallel}, optimizer, global_batch=8 * ranks, micro_batch=8)
    data = config.data.model_copy(update={"sequence_length": 128})
    return config.model_copy(update={"data": data}), ModelShape(**{**shape, **change})


@pytest.mark.parametrize("ranks", [1, 2, 4] if SOAK else [2])
def test_memory_is_what_the_allocator_hands_out(ranks):
    """States to the byte, activations to 1%, peaks to 10%. A plan that adds up head and block would be off by more."""
    worst = 0.0
    for case, measured in zip(MEMORY_CASES, run_world(measure_memory, ranks)[0], strict=True):
        config, shape = memory_case(ranks, *case)
        planned = cost.memory(shape, config, ranks, 8, 0.5, on_cpu=True)
        for kind in ("parameters", "gradients", "optimizer"):
            assert planned[kind] == measured[kind], (case, kind)
        assert planned["activations"] == pytest.approx(measured["activations"], rel=0.01), case
        assert planned["optimizer at work"] == pytest.approx(measured["optimizer at work"], rel=0.1, abs=1024), case
        there = planned["gathered"] + planned["activations"]
        for kind in cost.WORK:
            assert there + planned[kind] == pytest.approx(measured[kind], rel=0.1), (case, kind)
        most = max(measured[kind] for kind in cost.WORK)
        worst = max(worst, (there + sum(planned[kind] for kind in cost.WORK)) / most - 1)
    assert worst > 0.2


def test_mfu_is_the_counted_flops_over_the_peak(monkeypatch):
    """At the planned speed it is the planned MFU; a GPU that is not listed, and the CPU, have none."""
    config, shape = config_of({}), ModelShape(**SHAPE)
    planned = cost.cost(config, shape, 8, cost.GPUS["h100"], cost.Assumptions())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert cost.mfu_per_speed(shape, config, 8, gpu) * planned.tokens_per_second == pytest.approx(planned.mfu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    assert cost.mfu_per_speed(shape, config, 8, gpu) is None
    assert cost.mfu_per_speed(shape, config, 8, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, peak):
    gpu = cost.gpu_of(name)
    assert (gpu and gpu.peak) == peak


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/plan_run.py"), *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_plan_of_8b(tmp_path):
    out = tmp_path / "plan.json"
    done = command("configs/8b.yaml", "model.vocab_size=126464", "--gpus", "64,256,1024",
                   "--gpu", "h100", "--json", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    plans = json.loads(out.read_text())["plans"]
    assert [p["gpus"] for p in plans] == [64, 256, 1024] and all(p["fits"] for p in plans)
    states = [p["memory"]["parameters"] + p["memory"]["gradients"] + p["memory"]["optimizer"] for p in plans]
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 12288)  # Muon's: one momentum; the rest has AdamW's two moments
    total = 8_015_581_184 + 32 * 2 * 128  # with the gains of queries and keys
    assert states == [pytest.approx((16 * total - 4 * matrices) / gpus) for gpus in (64, 256, 1024)]
    assert plans[0]["model_flops"] == plans[2]["model_flops"] and plans[0]["days"] > plans[1]["days"]
    assert all(p["mfu"] > 0.3 for p in plans)


def test_what_does_not_fit_gets_a_proposal_that_does(tmp_path):
    config = [
        "configs/8b.yaml",
        "model.vocab_size=126464",
        "parallel.activation_checkpointing=none",
        "run.micro_batch=4",
    ]
    out = tmp_path / "plan.json"
    tight = command(*config, "--gpus", "8,7", "--gpu", "h100", "--json", str(out))
    result = json.loads(out.read_text())
    proposal = result["plans"][0]["best"]["arguments"]
    assert tight.returncode == 0 and not result["plans"][0]["fits"] and proposal in tight.stdout
    assert "7 GPUs: run.global_batch=1024 does not divide" in result["refused"][0]
    assert command(*config, *proposal.split(), "--gpus", "8", "--gpu", "h100", "--json", str(out)).returncode == 0
    assert json.loads(out.read_text())["plans"][0]["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "eight", "--gpu", "h100"], "expected numbers of GPUs"),
        (["--gpus", "7", "--gpu", "h100"], "does not divide over 7 ranks"),
        (["--gpus", "8", "--gpu", "h100", "--disk", "0"], "assumptions must be greater than 0"),
        (["--gpus", "8,16", "--gpu", "h100", "--best", "--write", "x.yaml"], "one number of GPUs"),
        (["--gpus", "64", "--gpu", "h100", "--best", "--write", "README.md"], "the file exists"),
        (["--gpus", "8", "--gpu", "h100", "--best", "--memory-reserve", "0.99"], "nothing fits"),
    ],
)
def test_bad_plans(arguments, message):
    done = command("configs/8b.yaml", "model.vocab_size=126464", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
