"""Muon against torch's own and against exact arithmetic; on the shards of real ranks bit for bit what one rank does."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mdmtrain import muon
from mdmtrain.config import OptimConfig, ParallelConfig
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer
from mdmtrain.optim import build_optimizer, muon_matrices, optimizer_step
from mdmtrain.parallel.parallelize import build_model
from tests.spawn import run_world

HEALTHY = torch.tensor(True)
# On 4 ranks, chunks of 2 and 3 rows: of matrices with 6 rows the last rank has none, of those with 10 a single one.
UNEVEN = ModelShape(vocab_size=32, d_model=6, n_layers=3, n_heads=3, n_kv_heads=1, d_ff=10)


def fill(parameters, seed: int, write) -> None:
    """write(parameter, values) for each: the same random values, whatever the shards."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        write(p, torch.randn(p.shape, generator=generator))


def like(values: Tensor, p: nn.Parameter) -> Tensor:
    """Values that all ranks have, sharded as a parameter is."""
    if not isinstance(p, DTensor):
        return values
    return distribute_tensor(values, p.device_mesh, p.placements, src_data_rank=None)


def set_gradient(p: nn.Parameter, values: Tensor) -> None:
    p.grad = like(values, p)


@torch.no_grad()
def set_values(p: nn.Parameter, values: Tensor) -> None:
    p.copy_(like(values, p))


# ---- the iterations


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_the_iterations_act_on_the_singular_values_alone(shape):
    """In exact arithmetic: the polynomial of each singular value, once the matrix has norm 1."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s /= s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = muon.orthogonalize(matrix)
    torch.testing.assert_close(found.double(), u @ s.diag() @ v, rtol=1e-4, atol=1e-4)
    assert found.dtype == torch.float32 and not muon.orthogonalize(0 * matrix).any()


def test_singular_values_come_near_one():
    """Over four orders of magnitude below the largest: above a third where they were above a thousandth."""
    u, v = (torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(n)))[0] for n in (1, 2))
    before = torch.logspace(0, -4, 40)
    after = torch.linalg.svdvals(muon.orthogonalize(u @ before.diag() @ v))
    assert after.max() < 1.25 and after[before / before.norm() > 1e-3].min() > 0.33


# ---- the step


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_a_step_is_torchs_own(muon_lr):
    """In bfloat16, in which torch.optim.Muon always computes; matrices of every form, with decay, at changing rates."""
    config = OptimConfig(name="muon", lr=0.1, muon_lr=muon_lr, weight_decay=0.3)
    model, twin = (nn.Module() for _ in range(2))
    for each in (model, twin):
        each.layers = nn.ParameterList(torch.zeros(shape) for shape in ((6, 10), (10, 6), (8, 8), (1, 7)))
        fill(each.layers, 0, set_values)
    optimizer = build_optimizer(model, config)
    optimizer.muon.dtype = torch.bfloat16
    reference = torch.optim.Muon(twin.layers, lr=1, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed, lr in enumerate((0.1, 0.03, 0.2)):
        for each in (model, twin):
            fill(each.layers, seed, set_gradient)
        optimizer_step(optimizer, HEALTHY, lr, None)
        reference.param_groups[0]["lr"] = lr if muon_lr is None else lr * muon_lr / 0.1
        reference.step()
        for ours, theirs in zip(model.layers, twin.layers, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
            assert ours.grad is None


def test_an_update_has_the_size_of_adamws():
    """One learning rate serves both: AdamW's updates have a root mean square of .2 to .4 of it."""
    model = nn.Module()
    model.layers = nn.ParameterList(torch.zeros(shape) for shape in ((64, 192), (192, 64), (64, 64)))
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.1))
    fill(model.layers, 0, set_gradient)
    optimizer_step(optimizer, HEALTHY, 0.1, None)
    for p in model.layers:
        assert 0.15 < float(p.detach().square().mean().sqrt()) / 0.1 < 0.25


@pytest.mark.parametrize("tied", [False, True])
def test_all_but_the_blocks_matrices_is_adamws(tied):
    shape = ModelShape(vocab_size=32, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=12, qk_norm=True,
                       tied_embeddings=tied)  # fmt: skip
    stepped = {}
    for name in ("adamw", "muon"):
        model = Transformer(shape, 1)
        fill(model.parameters(), 0, set_values)
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1))
        fill(model.parameters(), 1, set_gradient)
        optimizer_step(optimizer, HEALTHY, 0.1, None)  # the norm of all adds up in another order
        stepped[name] = dict(model.named_parameters())
    other = {n for n, p in stepped["adamw"].items() if not torch.equal(p, stepped["muon"][n])}
    parts = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    names = [f"{module}.{part}" for module, own in zip(("attention", "mlp"), parts, strict=True) for part in own]
    assert other == {f"layers.{layer}.{name}.weight" for layer in range(2) for name in names}


# ---- who does what


@given(st.integers(1, 300), st.integers(1, 40))
def test_rows_are_those_of_fsdp2(rows, ranks):
    """Which shards as torch.chunk does, and leaves nothing for the rest."""
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
    assert muon.rows_by_rank(rows, ranks) == chunks + [0] * (ranks - len(chunks))


shapes = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=30)


@given(shapes, st.integers(1, 9))
def test_work_is_spread_by_cost(shapes, ranks):
    """The bound of list scheduling: no rank has more than the mean and one matrix. Taking turns would break it."""
    work = [0] * ranks
    for shape, owner in zip(shapes, muon.choose_owners(shapes, ranks), strict=True):
        work[owner] += muon.orthogonalize_flops(*shape)
    assert max(work) <= sum(work) / ranks + max(muon.orthogonalize_flops(*shape) for shape in shapes)


@given(shapes, st.integers(2, 9))
def test_what_is_sent_is_what_is_received(shapes, ranks):
    exchanges = [muon.Exchange(shapes, ranks, rank) for rank in range(ranks)]
    for sender in exchanges:
        assert sum(sender.sent_to) == sum(sender.sent) and sorted(sender.order) == list(range(len(shapes)))
    assert [[e.sent_to[r] for e in exchanges] for r in range(ranks)] == [e.received_from for e in exchanges]
    assert sorted(index for e in exchanges for index in e.mine) == list(range(len(shapes)))


# ---- on real ranks

SEEDS, POISONED = range(4), 2  # the step whose gradient is not finite, in one row of one matrix


class Collectives(TorchDispatchMode):
    """Counts the collectives of this rank."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def steps(model: nn.Module, config: OptimConfig) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and momentum after a few steps, one of them skipped, and whether each was."""
    optimizer = build_optimizer(model, config)
    fill(model.parameters(), 10, set_values)
    skips = []
    for seed in SEEDS:
        fill(model.parameters(), seed, set_gradient)
        if seed == POISONED:
            gradient = muon.local(model.layers[0].mlp.up_proj.weight.grad)
            gradient[:1] = math.nan  # on every rank that has a row of it
        skips.append(float(optimizer_step(optimizer, HEALTHY, 0.1, None)[1]))
    state = dict(model.named_parameters())
    state |= {f"momentum.{name}": optimizer.state[p]["momentum"] for name, p in muon_matrices(model).items()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}, skips


MESHES = ({}, {"replicate": 2}, {"replicate": 4}, {"offload": True})


def sharded_steps(world, config: OptimConfig) -> list[tuple]:
    """For each mesh: parameters and skips, and of one step more: its collectives and the matrices it orthogonalised."""
    found = []
    for parallel in MESHES:
        model = build_model(UNEVEN, ParallelConfig(**parallel), world)
        state, skips = steps(model, config)
        optimizer = build_optimizer(model, config)
        fill(model.parameters(), 0, set_gradient)
        optimizer.found_inf, original, done = torch.zeros(()), muon.orthogonalize, []

        def counted(matrix, original=original, done=done):
            done.append(tuple(matrix.shape))
            return original(matrix)

        muon.orthogonalize = counted
        try:
            with Collectives() as collectives:
                optimizer.step()
        finally:
            muon.orthogonalize = original
        found.append((state, skips, dict(collectives.calls), done))
    return found


def test_shards_change_nothing():
    config = OptimConfig(name="muon", lr=0.1, muon_lr=0.05)
    alone, skips = steps(model := Transformer(UNEVEN, 1), config)
    assert skips == [float(seed == POISONED) for seed in SEEDS]
    shapes = sorted(tuple(p.shape) for p in muon_matrices(model).values())
    ranks = run_world(sharded_steps, 4, config)
    for index, parallel in enumerate(MESHES):
        copies = parallel.get("replicate", 1)
        for state, skipped, calls, _ in (rank[index] for rank in ranks):
            assert skipped == skips and [n for n in alone if not torch.equal(alone[n], state[n])] == []
            # There and back, for all matrices together; one rank that has them whole sends nothing.
            assert calls == ({"c10d.alltoall_base_.default": 2} if copies < 4 else {})
        done = [rank[index][3] for rank in ranks]
        assert sorted(shape for own in done for shape in own) == sorted(shapes * copies)  # once in each copy
        work = [sum(muon.orthogonalize_flops(*shape) for shape in own) for own in done]
        assert max(work) < 1.3 * sum(work) / len(work)


def test_the_iterations_run_on_the_meshs_device(monkeypatch):
    """Parameters in host memory, the mesh elsewhere (on torch's meta device): what comes back goes to the host."""
    assert muon.newton_schulz_dtype("cuda") == torch.bfloat16 and muon.newton_schulz_dtype("cpu") == torch.float32
    model, seen = nn.Module(), []
    model.layers = nn.ParameterList([torch.zeros(4, 6)])
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.1))
    optimizer.muon.device, optimizer.muon.dtype = torch.device("meta"), torch.bfloat16
    monkeypatch.setattr(muon, "orthogonalize", lambda matrix: seen.append(matrix) or torch.ones(4, 6))
    fill(model.layers, 0, set_gradient)
    optimizer_step(optimizer, HEALTHY, 0.1, 1.0)
    assert [(matrix.device.type, matrix.dtype) for matrix in seen] == [("meta", torch.bfloat16)]
    torch.testing.assert_close(model.layers[0].detach(), torch.full((4, 6), -0.1 * 0.2 * 6**0.5))
