"""Kernels that a GPU run compiles, compiled here for an H100 in the shapes of the presets.

    python -m tests.gpu compile TRITON SCRATCH NAME...      one line of JSON for each name

Nothing is computed, so the shapes are those of real runs: a micro-batch of 2 rows of 4,096 tokens.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from mdmtrain.model import attention
from mdmtrain.model.head import Head
from mdmtrain.model.presets import PRESETS, ModelShape
from mdmtrain.model.transformer import Block
from mdmtrain.muon import orthogonalize
from mdmtrain.parallel.parallelize import multiply_in_float8
from tests.gpu import h100
from tests.gpu.fake_cuda import FakeCuda

ROWS, LENGTH = 2, 4096
VOCABULARY = {"170m": 32768, "1b": 32768, "8b": 126464}


def new(*size: int, **options) -> torch.Tensor:
    return torch.empty(*size, dtype=torch.bfloat16, device="cuda", **options)


def shape_of(preset: str) -> ModelShape:
    return ModelShape(vocab_size=VOCABULARY[preset], **PRESETS[preset])


def block(preset: str, documents: bool = False, float8: bool = False) -> None:
    """A compiled block, forward and backward, as parallel/parallelize.py compiles it."""
    shape = shape_of(preset)
    with torch.device("meta"):
        layer = Block(shape).bfloat16()
    if float8:
        multiply_in_float8(layer, torch.device("cuda"))
    layer.to_empty(device="cuda").compile(fullgraph=True, dynamic=False)
    angles = attention.rotary_angles(LENGTH, shape.head_dim, shape.rope_theta, torch.device("cuda"))
    segments = torch.zeros(ROWS, LENGTH, dtype=torch.int32, device="cuda") if documents else None
    mask = attention.attention_mask(segments, shape)
    layer(new(ROWS, LENGTH, shape.d_model, requires_grad=True), *angles, mask).sum().backward()


def flex_forward(preset: str, **options) -> torch.Tensor:
    """The flex attention of blocks that are not compiled, and its block mask. options: of flex_attention."""
    shape = shape_of(preset)
    mask = attention.attention_mask(torch.zeros(ROWS, LENGTH, dtype=torch.int32, device="cuda"), shape)
    q, k, v = (
        new(ROWS, heads, LENGTH, shape.head_dim, requires_grad=True)
        for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    )
    grouped = shape.n_heads != shape.n_kv_heads
    return attention._compiled(attention.flex_attention)(q, k, v, block_mask=mask, enable_gqa=grouped, **options)


def flex(preset: str) -> None:
    flex_forward(preset).sum().backward()


def cross_entropy(preset: str) -> None:
    """The head's compiled cross-entropy, forward and backward, for any number of masked positions."""
    shape = shape_of(preset)
    head = Head(shape.d_model, shape.vocab_size, tied=True, chunk=ROWS * LENGTH)
    head.compile_loss()
    weight = new(shape.vocab_size, shape.d_model, requires_grad=True)
    targets = torch.zeros(3001, dtype=torch.int64, device="cuda")
    head(new(3001, shape.d_model, requires_grad=True), targets, weight).sum().backward()


def newton_schulz(preset: str) -> None:
    shape = shape_of(preset)
    torch.compile(orthogonalize, fullgraph=True)(new(shape.d_ff, shape.d_model))


def fault(**options) -> Callable[[], object]:
    """Flex attention with tiles that do not fit."""
    tiles = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_warps": 8, "fwd_num_stages": 3, **options}
    return partial(flex_forward, "8b", kernel_options=tiles)


KERNELS: dict[str, Callable[[], object]] = {
    "too much shared memory": fault(fwd_num_stages=5),
    "too many registers": fault(fwd_num_warps=2),
}
for preset in ("170m", "1b", "8b"):
    KERNELS |= {
        f"{preset} block": partial(block, preset),
        f"{preset} block, documents": partial(block, preset, documents=True),
        f"{preset} block, float8": partial(block, preset, float8=True),
        f"{preset} flex": partial(flex, preset),
        f"{preset} head": partial(cross_entropy, preset),
        f"{preset} newton-schulz": partial(newton_schulz, preset),
    }


def compile_for_h100(name: str) -> dict:
    """Compile one of KERNELS. Returns the kernels, one entry for each configuration of tiles."""
    torch.compiler.reset()
    attention._compiled.cache_clear()
    h100.COMPILED.clear()
    with FakeCuda():
        KERNELS[name]()
    return {"name": name, "kernels": [asdict(one) for one in h100.COMPILED]}
