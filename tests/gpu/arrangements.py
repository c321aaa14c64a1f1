"""The training loop as rank 0 of 8 on the fake device, in every arrangement, and with faults that it must not pass.

python -m tests.gpu train DATA SCRATCH NAME...       one line of JSON for each name
"""

import json
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import mdmtrain.train as loop
from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.config import Config
from mdmtrain.diffusion.objective import MaskedBatch
from mdmtrain.model import attention
from mdmtrain.model.transformer import FeedForward
from mdmtrain.parallel import parallelize
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World
from tests.gpu.fake_cuda import FakeCuda

RANKS = 8
STEADY = 2  # steps after which there are no new graphs: evaluation, probe and save have happened once by then
STEPS = 2 * STEADY
SIZES = {
    "run": {"steps": STEPS, "global_batch": 16, "micro_batch": 2},
    "model": {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 256, "vocab_size": 4096},
    "data": {"sequence_length": 128, "workers": 0},
    "optim": {"lr": 1e-3},
    "parallel": {"compute_dtype": "bfloat16"},
    "monitor": {"tensorboard": False, "log_every": 2, "probe_every": None},
    "eval": {"every": STEADY, "rows": 8, "samples": 1, "batch": 4},
    "checkpoint": {"save_every": STEADY},
}
COMPILE = "parallel.compile=true"
DOCUMENTS = "data.document_mask=true"
CHECKPOINTING = "parallel.activation_checkpointing="
PROBE = ["monitor.probe_every=2", "monitor.probe_sequences=4", "monitor.probe_rates=2", "monitor.probe_masks=2"]
EMA = "optim.ema_decay=0.99"
MUON = "optim.name=muon"
FLOAT8 = "parallel.float8=true"
OFFLOAD = "parallel.offload=true"
ACCUMULATE = "run.micro_batch=1"  # two micro-steps
# Every arrangement evaluates and saves twice.
ARRANGEMENTS: dict[str, list[str]] = {
    "plain": [],
    "accumulate": [ACCUMULATE],
    "hsdp": ["parallel.replicate=2", ACCUMULATE],
    "kept gathered": ["parallel.reshard_after_forward=false"],
    "offload": [OFFLOAD, EMA],
    "offload, accumulate": [OFFLOAD, ACCUMULATE],
    "recompute full": [CHECKPOINTING + "full"],
    "recompute selective": [CHECKPOINTING + "selective"],
    "recompute ops": [CHECKPOINTING + "ops"],
    "compiled": [COMPILE],
    "compiled, recompute full": [COMPILE, CHECKPOINTING + "full"],
    "compiled, recompute ops": [COMPILE, CHECKPOINTING + "ops"],
    "compiled, budget": [COMPILE, CHECKPOINTING + "budget"],
    "documents": [DOCUMENTS],
    "documents, recompute ops": [DOCUMENTS, CHECKPOINTING + "ops"],
    "compiled, documents": [COMPILE, DOCUMENTS, CHECKPOINTING + "ops"],
    "mirror": ["diffusion.views=mirror"],
    "documents, mirror": [DOCUMENTS, "diffusion.views=mirror"],
    "complement": ["diffusion.views=complement"],
    "average": [EMA],
    "probe": PROBE,
    "refit": ["diffusion.sampler=ppots", "diffusion.when=online", "diffusion.refit_every=2"],
    "fit once": [
        "diffusion.sampler=ppots",
        "diffusion.when=once",
        "diffusion.fit_rates=8",
        "diffusion.fit_sequences=4",
        "diffusion.bins=16",
        "diffusion.fit_masks=1",
    ],
    "tied, chunks": ["model.tied_embeddings=true", "parallel.head_chunk=64"],
    "muon": [MUON, "model.qk_norm=true"],
    "muon, hsdp, compiled": [MUON, "parallel.replicate=2", COMPILE],
    "muon, offload": [MUON, OFFLOAD],
    "float8": [FLOAT8, ACCUMULATE],
    "float8, recompute ops": [FLOAT8, CHECKPOINTING + "ops"],
    "float8, compiled": [FLOAT8, COMPILE, CHECKPOINTING + "ops"],
    "everything": [COMPILE, CHECKPOINTING + "full", "parallel.replicate=2", ACCUMULATE, DOCUMENTS, EMA, MUON, *PROBE],
}


# ---- the world


@dataclass(frozen=True)
class AloneWorld(World):
    """Rank 0 of many, of which the others do not exist: each of them says what rank 0 says."""

    def gather(self, value):
        return [value] * self.size

    def agree(self, act, main_only=False):
        return act()

    def deal(self, count, compute):
        found = {number: compute(number) for number in range(0, count, self.size)}
        return [found[number - number % self.size] for number in range(count)]


@contextmanager
def fake_ranks(size: int) -> Iterator[World]:
    """The world of rank 0. Its collectives leave their tensors as they are."""
    new_group = dist.new_group

    def fake_group(*arguments, **options):
        return new_group(*arguments, **{**options, "backend": "fake"})

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        with patch.object(dist, "new_group", fake_group):
            mesh = init_device_mesh("cuda", (size,), mesh_dim_names=("dp_shard",))
            yield AloneWorld(0, size, torch.device("cuda", 0), mesh, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@contextmanager
def compiled_by(backend: str) -> Iterator[None]:
    """In this context, torch.compile uses this backend."""
    torch.compiler.reset()
    counters.clear()
    attention._compiled.cache_clear()
    compile_module, compile_function = torch.nn.Module.compile, torch.compile
    with (
        patch.object(torch.nn.Module, "compile", lambda m, **o: compile_module(m, **{**o, "backend": backend})),
        patch.object(torch, "compile", lambda f, **o: compile_function(f, **{**o, "backend": backend})),
        patch.object(parallelize, "check_compiler"),  # it asks for Triton, which these backends do not need
    ):
        yield


class StepWatch(Watchdog):
    """Calls begin(step) when the loop begins a step, counted from 0."""

    def __init__(self, world: World, config: Config, begin: Callable[[int], None]):
        super().__init__(world, config.run)
        self._begin = begin

    def at(self, phase: str, step: int | None = None) -> None:
        super().at(phase, step)
        if step is not None:
            self._begin(step)


# ---- a run


def configuration_of(data: str, folder: Path, changes: list[str]) -> Config:
    tree = {**SIZES, "run": {**SIZES["run"], "dir": str(folder / "run")}}
    tree["data"] = {**SIZES["data"], "sources": [{"path": data}]}
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return configuration.load([str(folder / "config.yaml"), *changes])


def run(data: str, scratch: Path, name: str, backend: str = "aot_eager") -> dict:
    """Train in an arrangement, or with a fault. What was noted from the first step on.

    graphs: how many torch.compile had made at the start of each step, and at the end. breaks: reasons of graph breaks.
    error: the last line of an exception that ended the run, or None.
    """
    changes, fault = FAULTS[name] if name in FAULTS else (ARRANGEMENTS[name], nothing)
    config = configuration_of(data, Path(tempfile.mkdtemp(dir=scratch)), changes)
    graphs = []
    error = None

    def begin(step: int) -> None:
        if step == 0:
            FakeCuda.forget()
        graphs.append(counters["stats"]["unique_graphs"])
        STEP[0] = step

    with ExitStack() as stack:
        stack.enter_context(compiled_by(backend))
        # The files of 7 ranks are missing, so the checkpoint could not be completed.
        stack.enter_context(patch.object(store, "save", lambda home, step, *_, **__: home / f"step-{step:08d}"))
        stack.enter_context(patch.object(loop, "record_start"))  # lists all packages, which takes a second
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(FakeCuda())
        world = stack.enter_context(fake_ranks(RANKS))
        stack.enter_context(fault())
        try:
            loop.train(config, world, StepWatch(world, config, begin))
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
    graphs.append(counters["stats"]["unique_graphs"])
    return {
        "name": name,
        "waits": dict(FakeCuda.waits),
        "products": dict(FakeCuda.products),
        "graphs": graphs,
        "breaks": list(counters["graph_break"]),
        "error": error,
    }


# ---- faults


STEP = [0]  # the present step


@contextmanager
def nothing() -> Iterator[None]:
    yield


def losses_through(change: Callable[[torch.Tensor], torch.Tensor]):
    """A fault: the losses of the rows are changed before the backward pass."""
    row_losses = loop.row_losses
    return patch.object(loop, "row_losses", lambda ce, batch: change(row_losses(ce, batch)))


def item_in_the_step():
    return losses_through(lambda losses: losses / losses.sum().item() if STEP[0] else losses)


def blocking_copy():
    """The batch is copied to the device without non_blocking."""

    def to(batch: MaskedBatch, device: torch.device) -> MaskedBatch:
        return replace(batch, **{name: getattr(batch, name).to(device) for name in batch.__dataclass_fields__})

    return patch.object(MaskedBatch, "to", to)


def cpu_tensor():
    return losses_through(lambda losses: losses * torch.ones(len(losses)))


def values_decide_a_shape():
    return losses_through(lambda losses: losses[losses > 0])


def missing_cast():
    """Queries and keys stay float32 after their rotation."""

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return x.float() * cos + torch.cat([-second, first], dim=-1) * sin

    return patch.object(attention, "rotate", rotate)


def wide_products():
    """The feed-forward is computed in float32, without any error: four times slower."""

    def forward(mlp: FeedForward, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        inner = F.silu(F.linear(wide, mlp.gate_proj.weight.float())) * F.linear(wide, mlp.up_proj.weight.float())
        return F.linear(inner, mlp.down_proj.weight.float()).to(x.dtype)

    return patch.object(FeedForward, "forward", forward)


def graph_break():
    forward = FeedForward.forward

    def broken(mlp: FeedForward, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(mlp, x)

    return patch.object(FeedForward, "forward", broken)


def graph_break_in_a_mask():
    """The function that makes block masks is compiled too, but without fullgraph, so a break in it is no error."""
    create = attention.create_block_mask

    def broken(*arguments, **options):
        torch._dynamo.graph_break()
        return create(*arguments, **options)

    return patch.object(attention, "create_block_mask", broken)


def graph_for_each_step():
    forward = FeedForward.forward
    return patch.object(FeedForward, "forward", lambda mlp, x: forward(mlp, x) * (1 + STEP[0]))


FAULTS: dict[str, tuple[list[str], Callable]] = {
    "item in the step": ([], item_in_the_step),
    "blocking copy": ([], blocking_copy),
    "CPU tensor": ([], cpu_tensor),
    "values decide a shape": ([], values_decide_a_shape),
    "missing cast": ([], missing_cast),
    "wide products": ([], wide_products),
    "graph break": ([COMPILE], graph_break),
    "graph break in a mask": ([DOCUMENTS], graph_break_in_a_mask),
    "graph for each step": ([COMPILE], graph_for_each_step),
}
