"""The memory that cost.py plans, against the bytes that the tensors of the real model and optimizer hold on the fake
device, in the sizes of a GPU.

    python -m tests.gpu memory DATA SCRATCH NAME...      one line of JSON for each name (DATA is not used)
"""

from contextlib import ExitStack
from pathlib import Path

import allocator
import gpu_parts

from mdmtrain.model.presets import model_shape
from tests.gpu.arrangements import CHECKPOINTING, COMPILE, OFFLOAD, compiled_by, fake_ranks, wide_products
from tests.gpu.fake_cuda import FakeCuda

FEW = "model.n_layers=3"
RESHARD = "parallel.reshard_after_forward=true"
# Preset, ranks, and changes of the configuration that the benchmarks of gpu_check.py use. 8b has no benchmark there.
CASES: dict[str, tuple[str, int, list[str]]] = {
    "one rank": ("170m", 1, [FEW]),
    "kept gathered": ("170m", 8, [FEW]),
    "reshard": ("170m", 8, [FEW, RESHARD]),
    "adamw": ("170m", 8, [FEW, "optim.name=adamw"]),
    "tied": ("170m", 8, [FEW, "model.tied_embeddings=true"]),
    "grouped": ("170m", 8, [FEW, "model.n_kv_heads=2"]),
    "offload": ("170m", 8, [FEW, OFFLOAD, RESHARD]),
    "recompute full": ("170m", 8, [FEW, CHECKPOINTING + "full"]),
    "recompute selective": ("170m", 8, [FEW, CHECKPOINTING + "selective"]),
    "recompute ops": ("170m", 8, [FEW, CHECKPOINTING + "ops"]),
    "compiled": ("170m", 8, [FEW, COMPILE]),
    "170m": ("170m", 8, []),
    "1b": ("1b", 8, []),
    "8b": ("8b", 64, ["run.micro_batch=2", "parallel.head_chunk=8192", "model.vocab_size=126464"]),
}
FAULT = "one rank, wide products"  # the feed-forward keeps float32 values


def compare(name: str) -> dict:
    """kinds: planned and measured bytes of a case by kind, as pairs (see allocator.compare_with_plan)."""
    preset, ranks, changes = CASES[name.removesuffix(", wide products")]
    with ExitStack() as stack:
        stack.enter_context(compiled_by("aot_eager"))
        stack.enter_context(FakeCuda())
        world = stack.enter_context(fake_ranks(ranks))
        if name == FAULT:
            stack.enter_context(wide_products())
        config = gpu_parts.example(gpu_parts.Place(Path(), Path(), rehearsal=False, repeat=1), preset, *changes)
        return {"name": name, "kinds": allocator.compare_with_plan(config, model_shape(config.model, 0), world)}
