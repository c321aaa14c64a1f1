"""One model on many ranks: FSDP2, as one page to read and change.

Parameters live in float32, sharded over dimension 0. A block's parameters are gathered in the compute dtype just before
they are used. Gradients are reduced in float32 by SUM: the loss is already divided by the global constant N L, and
averaging over ranks would divide twice. The order matters: recomputation inside a block, compilation around it, FSDP
around that, the root last.
"""

from functools import cache, partial

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from mdmtrain.config import ParallelConfig
from mdmtrain.diffusion import noise
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer, initial_std
from mdmtrain.parallel.world import World

# What recompute=ops keeps: the products and the attention, which take most of the time and little of the memory.
_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
INIT_CHUNK = 1 << 22  # initial values drawn at once: bounds the host memory of a start


def build_model(shape: ModelShape, config: ParallelConfig, world: World) -> Transformer:
    """The sharded model with uninitialised parameters: call init_weights, or load a checkpoint into it."""
    with torch.device("meta"):
        model = Transformer(shape, config.head_chunk)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.compute_dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options = {"mesh": data_mesh(config, world), "mp_policy": policy}
    for index, layer in enumerate(model.layers):
        layer.recompute = recompute_options(config, index)
        if config.compile:
            layer.compile(fullgraph=True, dynamic=False)
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    if not shape.tied_embeddings:  # a tied matrix is used at both ends: it stays with the root, gathered throughout
        fully_shard(model.embed, reshard_after_forward=config.reshard_after_forward, **options)
        # The backward pass starts here: freeing these between would only gather them twice.
        fully_shard([model.norm, model.head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model.to_empty(device=world.device)


@cache
def data_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """All ranks in one row; or, for HSDP, a row a copy: parameters are sharded along rows, copied along columns.

    Made once: it makes process groups.
    """
    if config.replicate == 1:
        return world.mesh
    grid = (config.replicate, world.size // config.replicate)
    return init_device_mesh(world.device.type, grid, mesh_dim_names=("dp_replicate", "dp_shard"))


def recompute_options(config: ParallelConfig, layer: int) -> dict | None:
    """Options of torch.utils.checkpoint for a block, or None where it keeps its activations."""
    plain = {"preserve_rng_state": False}  # nothing in a block is random
    match config.recompute:
        case "none":
            return None
        case "full":
            return plain
        case "selective":
            return plain if layer % config.recompute_every == 0 else None
        case "ops":
            return {**plain, "context_fn": partial(create_selective_checkpoint_contexts, KEPT)}
    raise AssertionError(config.recompute)


def reshard(model: Transformer) -> None:
    """Free gathered parameters after a forward pass without a backward pass.

    FSDP keeps the head's and the root's parameters gathered until the backward pass. Without one they would be what
    `named_parameters` shows, and what the next forward pass uses, whatever happened to the shards in between.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Initial weights as a pure function of (seed, parameter name): the same for any number of ranks, bit for bit."""
    for name, parameter in model.named_parameters():
        std, flat = initial_std(name, model.shape), parameter.to_local().view(-1)
        if std is None:
            flat.fill_(1.0)
            continue
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        first = offset[0] * (parameter.numel() // parameter.shape[0])  # index of the shard's first element in the whole
        for start in range(0, flat.numel(), INIT_CHUNK):
            count = min(INIT_CHUNK, flat.numel() - start)
            values = torch.from_numpy(noise.normals(seed, name, first + start, count))
            flat[start : start + count].copy_(values * std)
