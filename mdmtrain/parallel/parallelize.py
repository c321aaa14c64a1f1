"""Shard a model over many ranks with FSDP2.

Parameters are stored in float32, sharded over dimension 0. The parameters of a block are gathered in the compute dtype
just before they are used. Gradients are reduced in float32 with SUM, because the loss is already divided by the global
constant N L, and an average over ranks would divide it again. The order matters: first activation checkpointing inside
a block, then compilation of the block, then FSDP around it. The root module comes last.
"""

import logging
import os
import shutil
from functools import cache, partial
from importlib import import_module
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from mdmtrain.config import ParallelConfig
from mdmtrain.diffusion import noise
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Block, Transformer, initial_std
from mdmtrain.parallel.world import AgreedError, World, describe_error

# The ops whose outputs activation_checkpointing=ops keeps: matrix products and attention. They take most of the time
# but little of the memory.
_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten._scaled_mm.default,  # in float8
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch._higher_order_ops.flex_attention,  # only in a compiled block; outside of one it is recomputed
]
INIT_CHUNK = 1 << 22  # initial values drawn at once; limits the host memory
MOST_GRAPHS = 64  # of a block; each evaluated source may have shapes of its own, and its last batch another one
# Older ones compile some float8 values to NaN on torch 2.14 (triton-lang/triton#11111), or do not import on torch 2.13.
TORCHAO = "0.18"
log = logging.getLogger("mdmtrain")


def build_model(shape: ModelShape, config: ParallelConfig, world: World) -> Transformer:
    """The sharded model with uninitialised parameters. Call init_weights or load a checkpoint afterwards.

    Raises AgreedError if this version of torch lacks a configured feature.
    """
    if config.fused_head and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise AgreedError(
            f"parallel.fused_head=true needs torch 2.13, but this is {torch.__version__}: remove the setting"
        )
    if config.float8:
        world.agree(lambda: refuse_float8(shape, world.device))
    with torch.device("meta"):
        model = Transformer(shape, config.head_chunk, config.fused_head)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.compute_dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"mesh": data_mesh(config, world), "mp_policy": policy}
    if config.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    if config.compile:
        world.agree(lambda: check_compiler(world.device))
        set_up_compiler(config)
        model.head.compile_loss()
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        layer.recompute = recompute_options(config, index)
        if config.float8:
            multiply_in_float8(layer, world.device)
        if config.compile:
            layer.compile(fullgraph=True, dynamic=False)
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    if not shape.tied_embeddings:  # a tied matrix is used first and last, so it stays gathered as part of the root
        fully_shard(model.embed, reshard_after_forward=config.reshard_after_forward, **options)
        # The backward pass starts with these parameters. If they were freed, they would be gathered again at once.
        fully_shard([model.norm, model.head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if world.size > 1:  # on one rank, FSDP would spend a pass over all gradients on dividing them by 1
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model.to_empty(device="cpu" if config.offload else world.device)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if torch.compile cannot make code here: torch itself would fail in the middle of a step."""
    try:
        if device.type == "cuda":
            import_module("triton.language")
            if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
                raise RuntimeError("Triton builds its launchers with a C compiler, and there is none")
        else:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except (ImportError, RuntimeError) as error:
        lacks = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise ValueError(
            f"parallel.compile=true needs {lacks} on this machine ({describe_error(error)}): install it, or set "
            "parallel.compile=false"
        ) from None


def refuse_float8(shape: ModelShape, device: torch.device) -> None:
    """Raise ValueError if float8 products are not possible: the sizes, torchao, or the GPU."""
    linear = (module for module in Block(shape).modules() if isinstance(module, torch.nn.Linear))
    sizes = {size for layer in linear for size in (layer.in_features, layer.out_features)}
    if odd := sorted(size for size in sizes if size % 16):
        raise ValueError(f"parallel.float8=true needs layer sizes that are multiples of 16, but the model has {odd[0]}")
    try:
        import torchao.float8

        if TorchVersion(torchao.__version__) < TORCHAO:
            raise ImportError(f"this is {torchao.__version__}")
    except Exception as error:  # a torchao that does not fit this torch raises many kinds of errors
        raise ValueError(
            f"parallel.float8=true needs torchao {TORCHAO} or newer ({describe_error(error)}): "
            "pip install mdmtrain[float8]"
        ) from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"parallel.float8=true needs a GPU of compute capability 8.9 or more, but this is {name}")


def multiply_in_float8(layer: Block, device: torch.device) -> None:
    """Replace the linear layers of a block by those of torchao, with the same parameters.

    Operands are scaled by the largest value of each tensor, computed at each product: weights and inputs to e4m3,
    gradients to e5m2 (arXiv 2209.05433). Sums are float32. On a CPU the same values are multiplied in float32. The
    gradient of a weight sums over tokens, whose number the GPU needs to be a multiple of 16: zeros are added.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(layer, config=Float8LinearConfig(pad_inner_dim=True, emulate=device.type != "cuda"))


def set_up_compiler(config: ParallelConfig) -> None:
    """Set torch's compiler options, which are global to the process."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    workers = torch._inductor.config.decide_compile_threads()
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:  # each rank would start one worker for each core of the node
        workers = max(1, min(workers, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    torch._inductor.config.compile_threads = workers
    budget = config.recompute_budget if config.activation_checkpointing == "budget" else 1.0
    torch._functorch.config.activation_memory_budget = budget
    torch._dynamo.config.recompile_limit = MOST_GRAPHS  # more than 8, the default, would be an error


@cache
def data_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """The device mesh. With FSDP it has one dimension. With HSDP it is [replicas, ranks of a replica].

    Cached, because each new mesh would create process groups.
    """
    if config.replicate == 1:
        return world.mesh
    grid = (config.replicate, world.size // config.replicate)
    return init_device_mesh(world.device.type, grid, mesh_dim_names=("dp_replicate", "dp_shard"))


def recompute_options(config: ParallelConfig, layer: int) -> dict | None:
    """Options of torch.utils.checkpoint for a block, or None if the block keeps its activations."""
    plain = {"preserve_rng_state": False}  # a block uses no random numbers
    match config.activation_checkpointing:
        case "none" | "budget":  # for the budget, the compiler decides what to recompute
            return None
        case "full":
            return plain
        case "selective":
            return plain if layer % config.recompute_every == 0 else None
        case "ops":
            return {**plain, "context_fn": partial(create_selective_checkpoint_contexts, KEPT)}
    raise AssertionError(config.activation_checkpointing)


class GraphCount:
    """Reports how many graphs torch.compile makes. After the first steps, training should make no new ones.

    Training, evaluation and the probe have separate graphs, and so have rows with and without an attention mask. The
    number of masked positions is a symbol in the graph of the head's loss. No other graph depends on it.
    """

    def __init__(self, compiling: bool):
        self._compiling = compiling
        self._seen = 0
        self._steady = False

    def report(self, step: int) -> None:
        """Log the number of graphs at the first call. Later calls warn if training steps have made more graphs."""
        if self._compiling and not self._steady:
            log.info("torch.compile made %d graphs by step %d", self._made(), step)
        elif self._compiling and self._made() > self._seen:
            log.warning(
                "torch.compile made %d more graphs by step %d, %d in all: harmless if it happens once, for the first "
                "rows with (or without) an attention mask; if it happens often, shapes change between steps, and "
                "each compilation takes minutes",
                self._made() - self._seen, step, self._made(),
            )  # fmt: skip
        self._seen = self._made()
        self._steady = True

    def resume(self) -> None:
        """Call when training continues after an evaluation or a probe, so that their graphs are not reported."""
        self._seen = self._made()

    def _made(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]


def reshard(model: Transformer) -> None:
    """Free gathered parameters after a forward pass without a backward pass.

    FSDP keeps the parameters of the head and the root gathered until the backward pass. Without a backward pass,
    `named_parameters` would return the gathered parameters, and the next forward pass would use them even if the shards
    have changed.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Initialise the weights as a pure function of (seed, parameter name): bit for bit equal on any number of ranks."""
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
