"""One model on many ranks: FSDP2, as one page to read and change.

Parameters live in float32, sharded over dimension 0. A block's parameters are gathered in the compute dtype just before
they are used. Gradients are reduced in float32 by SUM: the loss is already divided by the global constant N L, and
averaging over ranks would divide twice. The order matters: recomputation inside a block, compilation around it, FSDP
around that, the root last.
"""

import logging
from functools import cache, partial
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from mdmtrain.config import ParallelConfig
from mdmtrain.diffusion import noise
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Block, Transformer, initial_std
from mdmtrain.parallel.world import AgreedError, World

# What activation_checkpointing=ops keeps: products and attention, which take most of the time, little of the memory.
_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch._higher_order_ops.flex_attention,  # as part of a compiled block; by itself it runs again
]
INIT_CHUNK = 1 << 22  # initial values drawn at once: bounds the host memory of a start
MOST_GRAPHS = 64  # of a block: evaluations of several sources have their own shapes, and so has each one's last batch
log = logging.getLogger("mdmtrain")


def build_model(shape: ModelShape, config: ParallelConfig, world: World) -> Transformer:
    """The sharded model with uninitialised parameters: call init_weights, or load a checkpoint into it.

    Raises AgreedError where this torch lacks what the configuration asks for.
    """
    if config.fused_head and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise AgreedError(f"parallel.fused_head=true needs torch 2.13, this is {torch.__version__}: leave it out")
    with torch.device("meta"):
        model = Transformer(shape, config.head_chunk, config.fused_head)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.compute_dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"mesh": data_mesh(config, world), "mp_policy": policy}
    if config.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    if config.compile:
        set_up_compiler(config)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
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
    return model.to_empty(device="cpu" if config.offload else world.device)


def set_up_compiler(config: ParallelConfig) -> None:
    """For the whole process: torch takes both from its own configuration when it compiles."""
    import torch._dynamo.config
    import torch._functorch.config

    budget = config.recompute_budget if config.activation_checkpointing == "budget" else 1.0
    torch._functorch.config.activation_memory_budget = budget
    torch._dynamo.config.recompile_limit = MOST_GRAPHS  # at 8, its default, a block compiled as one graph raises


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
    match config.activation_checkpointing:
        case "none" | "budget":  # the compiler's partition of a block's graph follows the budget
            return None
        case "full":
            return plain
        case "selective":
            return plain if layer % config.recompute_every == 0 else None
        case "ops":
            return {**plain, "context_fn": partial(create_selective_checkpoint_contexts, KEPT)}
    raise AssertionError(config.activation_checkpointing)


class GraphCount:
    """Reports the graphs that torch.compile makes. In steady training there are no new ones.

    Rows with masks and without, training, evaluation and the probe have graphs of their own. The number of masked
    positions is not a shape of any: the head, the only part that sees it, is not compiled.
    """

    def __init__(self, compiling: bool):
        self._compiling, self._seen, self._steady = compiling, 0, False

    def report(self, step: int) -> None:
        """Call when steps of training have been read: how many graphs, then a warning for each time they grew."""
        if self._compiling and not self._steady:
            log.info("torch.compile made %d graphs by step %d", self._made(), step)
        elif self._compiling and self._made() > self._seen:
            log.warning(
                "torch.compile made %d more graphs by step %d, %d in all: once, for the first rows with or without a "
                "mask, is no harm; if it goes on, shapes change from step to step and each costs minutes",
                self._made() - self._seen, step, self._made(),
            )  # fmt: skip
        self._seen, self._steady = self._made(), True

    def resume(self) -> None:
        """Call before training goes on after something else: what that compiled is its own."""
        self._seen = self._made()

    def _made(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]


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
        sharded = cast(DTensor, parameter)  # as build_model makes all of them
        std = initial_std(name, model.shape)
        flat = sharded.to_local().view(-1)
        if std is None:
            flat.fill_(1.0)
            continue
        _, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
        first = offset[0] * (parameter.numel() // parameter.shape[0])  # index of the shard's first element in the whole
        for start in range(0, flat.numel(), INIT_CHUNK):
            count = min(INIT_CHUNK, flat.numel() - start)
            values = torch.from_numpy(noise.normals(seed, name, first + start, count))
            flat[start : start + count].copy_(values * std)
