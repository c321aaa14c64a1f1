"""Predict what a run costs on given GPUs: memory, communication and time. Pure arithmetic, fast for 1,024 GPUs.

The prediction follows from the configuration and a few data-sheet numbers of the GPU. Numbers that cannot be derived
(the share of the peak that a step reaches, the speed of a disk) are fields of `Assumptions` and are printed with the
result. tools/observed.py and tools/bench/allocator.py measure what the engine really sends and allocates. Tests and
tools compare this with the prediction.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from mdmtrain.config import Config, resolve
from mdmtrain.data.shards import location, read_manifest
from mdmtrain.diffusion.objective import plain_process, rate_range
from mdmtrain.files import on_disk
from mdmtrain.model.presets import ModelShape, model_shape
from mdmtrain.model.transformer import Transformer
from mdmtrain.muon import choose_owners, newton_schulz_dtype, orthogonalize_flops, rows_by_rank
from mdmtrain.optim import muon_matrices

GIB = 2.0**30


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of one GPU and its links."""

    memory: float  # bytes
    peak: float  # dense bfloat16 FLOP/s
    bandwidth: float  # bytes/s of its memory
    near: float  # bytes/s in each direction to GPUs of the same node
    far: float  # bytes/s in each direction to other nodes (one network card per GPU)
    per_node: int = 8


GPUS = {
    "a100": Gpu(80 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Gpu(79.6 * GIB, 989e12, 3.35e12, 450e9, 50e9),  # SXM
    # NVLink joins only two cards, or four of the H200 NVL. A ring over all cards of a node passes PCIe 5.
    "h100-pcie": Gpu(79.6 * GIB, 756e12, 2.04e12, 64e9, 50e9),
    "h100-nvl": Gpu(93.6 * GIB, 835e12, 3.9e12, 64e9, 50e9),
    "h200": Gpu(140.4 * GIB, 989e12, 4.8e12, 450e9, 50e9),  # SXM
    "h200-nvl": Gpu(140.4 * GIB, 835e12, 4.8e12, 64e9, 50e9),
    "b200": Gpu(179 * GIB, 2250e12, 8e12, 900e9, 50e9),
}


def _assumed(value: float | None, meaning: str) -> Any:
    return field(default=value, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """The numbers that cannot be derived. `masked` is derived unless it is given."""

    compute_efficiency: float = _assumed(0.6, "share of the peak that matrix products reach")
    attention_efficiency: float = _assumed(0.4, "share of the peak that fused attention reaches")
    memory_efficiency: float = _assumed(0.87, "share of the memory bandwidth that all other operations reach")
    link_efficiency: float = _assumed(0.7, "share of a link's data-sheet bandwidth that a large collective reaches")
    collective: float = _assumed(20e-6, "seconds before the first byte of each collective")
    near_hop: float = _assumed(2e-6, "seconds for each step of a ring from one GPU to the next in the same node")
    far_hop: float = _assumed(6e-6, "seconds for each step of a ring from one node to the next")
    masked: float | None = _assumed(
        None,
        "mean share of the positions that are masked, for the cost of the head (default: the mean masking rate; 1 for "
        "objective=ar)",
    )
    memory_reserve: float = _assumed(0.1, "share of the GPU's memory left for the allocator and the libraries")
    disk: float = _assumed(1e9, "bytes/s at which one rank writes a checkpoint")
    host_link: float = _assumed(25e9, "bytes/s in each direction between a GPU and host memory (saves, offload)")
    host_memory: float = _assumed(
        20e9, "bytes/s at which the optimizer of one rank reads and writes host memory (offload)"
    )


@dataclass(frozen=True)
class Cost:
    """The prediction for one configuration on one number of GPUs. All values are per rank unless stated otherwise."""

    gpus: int
    reasons: tuple[str, ...]  # of the resolved plan
    memory: dict[str, float]  # bytes of GPU memory by kind; the kinds of WORK are never in use at the same time
    host_bytes: float  # bytes of host memory for offloaded tensors
    fits: bool
    traffic: dict[str, float]  # bytes sent per step, by collective; "host": between GPU and host, in both directions
    link: str  # the link of the sharding collectives: "node" or "network"
    model_flops: float  # FLOPs of one step on all GPUs, as MFU counts them
    compute_seconds: float
    communication_seconds: float
    latency_seconds: float  # the part of it that depends on the number of collectives and hops, not on their bytes
    optimizer_seconds: float  # after the backward pass
    step_seconds: float
    mfu: float
    tokens_per_second: float  # all GPUs
    days: float
    gpu_hours: float
    checkpoint_bytes: float  # all ranks
    stall_seconds: float  # of a save: the copy to the host, for which training waits
    write_seconds: float  # of a save: the write to the disk, while training continues

    @property
    def memory_total(self) -> float:
        return peak(self.memory)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters in the groups that FSDP gathers together."""

    block: int
    blocks: int
    embed: int
    head: int  # norm and output head; 0 with tied embeddings, where the root holds both
    root: int

    @property
    def total(self) -> int:
        return self.blocks * self.block + self.embed + self.head + self.root


def shape_of(config: Config) -> ModelShape:
    """The model's shape. Its vocabulary is that of the prepared data if the configuration does not give it.

    Raises ValueError if neither says how large the vocabulary is.
    """
    if config.model.vocab_size is not None:
        return model_shape(config.model, config.model.vocab_size)
    folder = location(config.data.sources[0].path)
    if on_disk(folder) and not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder, so the vocabulary is unknown: give model.vocab_size=N or prepare it"
        )
    return model_shape(config.model, read_manifest(folder)["tokenizer"]["vocab_size"])


def compute_width(config: Config) -> int:
    """The size in bytes of a value in the compute dtype."""
    return getattr(torch, config.parallel.compute_dtype).itemsize


def sizes(shape: ModelShape) -> Sizes:
    matrix = shape.vocab_size * shape.d_model
    block = (shape.parameters() - matrix * (1 if shape.tied_embeddings else 2) - shape.d_model) // shape.n_layers
    if shape.tied_embeddings:
        return Sizes(block, shape.n_layers, 0, 0, matrix + shape.d_model)
    return Sizes(block, shape.n_layers, matrix, matrix + shape.d_model, 0)


def saved_per_token(
    shape: ModelShape, recompute: str, budget: float = 1.0, composed_norms: bool = False, compiled: bool = False
) -> float:
    """The number of values that one block keeps for the backward pass, per token.

    composed_norms: norms consist of several operations (on the CPU), which keep their inputs twice and a few
    statistics. compiled: the backward pass computes silu(gate) again. The budget is applied to all values that an
    uncompiled block keeps, except its input. torch applies it to the values that the compiler would keep, which are
    fewer.
    """
    d = shape.d_model
    q = shape.n_heads * shape.head_dim
    kv = shape.n_kv_heads * shape.head_dim
    ff = shape.d_ff
    match recompute:
        case "full":
            return d  # the block's input
        case "ops":  # the input, and the outputs of products and attention
            return d + (q + 2 * kv) + q + d + 2 * ff + d
        case "budget":
            return d + budget * (saved_per_token(shape, "none") - d)
    # Inputs and outputs of both norms; q, k, v (with qk_norm before and after it); the output of attention; the four
    # values of SwiGLU.
    values = 4 * d + (q + 2 * kv) + q + (3 if compiled else 4) * ff
    if shape.qk_norm:
        values += q + kv
    if composed_norms:
        values += 2 * d + 6
    return values


def activations(shape: ModelShape, config: Config, composed_norms: bool = False) -> tuple[float, float]:
    """Values per token: (kept by all blocks for the backward pass, added by a block while it recomputes its own)."""
    mode = config.parallel.activation_checkpointing
    every = config.parallel.recompute_every
    whole = saved_per_token(shape, "none", composed_norms=composed_norms, compiled=config.parallel.compile)
    if mode == "selective":
        recomputed = -(-shape.n_layers // every)
        least = saved_per_token(shape, "full")
        after = (shape.n_layers - 1) % every  # blocks after the last recomputed one, which have freed theirs
        return (shape.n_layers - recomputed) * whole + recomputed * least, whole - least - after * whole
    kept = whole if mode == "none" else saved_per_token(shape, mode, config.parallel.recompute_budget)
    return shape.n_layers * kept, whole - kept


WORK = ("head at work", "block at work")  # kinds of memory that are never in use at the same time
BACKWARD = ("gathered", "activations", *WORK)  # kinds that are freed before the optimizer's step


def peak(kinds: dict[str, float]) -> float:
    """The peak bytes of a step, which occur in the backward pass or in the optimizer's step."""
    backward = sum(kinds[kind] for kind in BACKWARD) - min(kinds[kind] for kind in WORK)
    working = kinds["optimizer at work"]
    return sum(kinds.values()) - sum(kinds[kind] for kind in BACKWARD) - working + max(backward, working)


def memory(
    shape: ModelShape, config: Config, shard: int, micro_batch: int, masked: float, on_cpu: bool = False
) -> dict[str, float]:
    """Peak bytes on one rank by kind, in the backward pass of a micro-batch and after it. `peak` combines the kinds.

    The backward pass begins with the head while all activations are in memory. The last block follows, while most
    activations are in memory and the gradient of the head is being reduced. masked: the share of the positions that
    are masked. on_cpu: norms are composed, and Muon computes in float32.
    """
    parts = sizes(shape)
    width = compute_width(config)
    tokens = micro_batch * config.data.sequence_length
    matrix = shape.vocab_size * shape.d_model
    stay = 0 if config.parallel.reshard_after_forward else parts.blocks
    gathered_blocks = 0 if stay else min(2, parts.blocks)  # the block in use, and the prefetched one
    rows = min(tokens * masked, config.parallel.head_chunk)
    kept, again = activations(shape, config, on_cpu)
    # Bytes for each logit of a chunk, in float32: the log-probabilities and two gradients.
    logit = 12
    if config.parallel.fused_head:
        logit = 4  # in place
    elif config.parallel.compile:
        logit = 2 * width  # the logits and their gradient, in the compute dtype
    # In the whole backward pass, in the compute dtype: a tied matrix, parameters that are not freed, and the buffer of
    # the last all-gather.
    gathered = parts.root + stay * parts.block
    if stay:
        gathered += parts.embed
    if shard > 1:
        gathered += parts.block
    # With offload, all of this is in host memory, except the float32 shard of the block that is being copied.
    states = state_bytes(config, shape, shard)
    offload = config.parallel.offload
    states = dict.fromkeys(states, 0.0) if offload else states
    return {
        **states,
        "gathered": float(width * gathered),
        "activations": width * tokens * kept,
        # The weight of the head and its gradient; the rows before and after the norm, and their gradient; the logits.
        "head at work": width * (parts.head + matrix)
        + 3 * width * tokens * masked * shape.d_model
        + logit * rows * shape.vocab_size,
        # Gathered parameters; recomputed activations, or later the gradients before and during their reduction;
        # gradients of the residual stream and inside SwiGLU; the gradient of the head during its reduction, or that of
        # a tied matrix.
        "block at work": width * gathered_blocks * parts.block
        + max(width * tokens * again, (width + 4) * parts.block)
        + width * tokens * (shape.d_model + 2 * shape.d_ff)
        + (4 * parts.head or width * matrix)
        + (4 * parts.block / shard if offload else 0.0),
        "optimizer at work": muon_memory(shape, shard, offload, on_cpu) if config.optim.name == "muon" else 0.0,
    }


def state_bytes(config: Config, shape: ModelShape, shard: int) -> dict[str, float]:
    """The bytes that a rank keeps between steps, by kind."""
    one = 4 * sizes(shape).total / shard
    moments = 2 * one - (4 * muon_parameters(shape) / shard if config.optim.name == "muon" else 0.0)  # Muon has one
    return {
        "parameters": one,
        "gradients": one,
        # The copy of the gradient of a GradientPair.
        "gradient pair": one if config.monitor.probe_every else 0.0,
        "optimizer": moments,
        "average": one if config.optim.ema_decay is not None else 0.0,
    }


def traffic(shape: ModelShape, config: Config, world: int, shard: int, accumulation: int) -> dict[str, float]:
    """Bytes that a rank sends in one step, by collective. All collectives are rings."""
    parts = sizes(shape)
    width = compute_width(config)
    again = regathered(shape, config)
    others = (shard - 1) / shard
    copies = world // shard
    # With offload, float32 shards are copied to the GPU before each all-gather, and gradients are copied back: after
    # each micro-step, or with several replicas after the all-reduce of the step.
    back = parts.total * (accumulation if copies == 1 else 1)
    host = 4 * (accumulation * (parts.total + again) + back) / shard
    if muon := config.optim.name == "muon":  # to the GPU and back
        host += 2 * muon_width() * muon_parameters(shape) / shard
    return {
        "all_gather": accumulation * width * (parts.total + again) * others,
        "reduce_scatter": accumulation * 4 * parts.total * others,
        "all_reduce": 2 * 4 * parts.total / shard * (copies - 1) / copies,
        "all_to_all": float(max(muon_traffic(shape, shard))) if muon else 0.0,
        "host": host if config.parallel.offload else 0.0,
    }


# ---- Muon (mdmtrain/muon.py)


@cache
def muon_shapes(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of each matrix that Muon updates, in the order of the optimizer."""
    with torch.device("meta"):
        return tuple((p.shape[0], p.shape[1]) for p in muon_matrices(Transformer(shape, 1)).values())


def muon_parameters(shape: ModelShape) -> int:
    return sum(rows * columns for rows, columns in muon_shapes(shape))


def muon_width(on_cpu: bool = False) -> int:
    """The size in bytes of each value that is sent to the owner of a matrix and back."""
    return newton_schulz_dtype("cpu" if on_cpu else "cuda").itemsize


@cache
def muon_traffic(shape: ModelShape, shard: int) -> tuple[int, ...]:
    """The bytes that each rank of a replica sends in one step: its rows to the owners, and the owners' results back.

    Ranks differ: some own one matrix more, and the last ones may have fewer rows.
    """
    shapes = muon_shapes(shape)
    sent = [0] * shard
    for (rows, columns), owner in zip(shapes, choose_owners(shapes, shard), strict=True):
        for rank, own in enumerate(rows_by_rank(rows, shard)):
            sent[rank] += columns * (own if rank != owner else rows - own)
    return tuple(muon_width() * count for count in sent)


@cache
def muon_memory(shape: ModelShape, shard: int, offload: bool, on_cpu: bool) -> float:
    """Peak bytes on one rank in Muon's step: both buffers, and the iterations on its largest matrix."""
    shapes = muon_shapes(shape)
    width = muon_width(on_cpu)
    buffers = [0] * shard
    work = [0.0] * shard
    for (rows, columns), owner in zip(shapes, choose_owners(shapes, shard), strict=True):
        size = rows * columns
        own = rows_by_rank(rows, shard)
        if shard > 1:
            buffers[owner] += width * size
            buffers = [count + width * part * columns for count, part in zip(buffers, own, strict=True)]
        # The matrix, two iterates, and two square matrices of the short side. Before that, old and new momentum in
        # float32.
        iterations = width * (3 * size + 2 * min(rows, columns) ** 2)
        momentum = 0 if offload else 8 * own[owner] * columns
        work[owner] = max(work[owner], iterations, momentum)
    return float(max(map(sum, zip(buffers, work, strict=True))))


@cache
def muon_flops(shape: ModelShape, shard: int) -> int:
    """The FLOPs of orthogonalisation on the busiest rank."""
    shapes = muon_shapes(shape)
    work = [0] * shard
    for one, owner in zip(shapes, choose_owners(shapes, shard), strict=True):
        work[owner] += orthogonalize_flops(*one)
    return max(work)


def step_flops(shape: ModelShape, config: Config, masked: float) -> tuple[float, float, float]:
    """FLOPs of one step on all ranks: (counted by MFU, computed by matrix products, computed by attention).

    The computed ones include recomputation. The backward pass of attention always computes its scores again. A head of
    more than one chunk recomputes its logits. With float8, the products of the blocks count half, because a GPU
    multiplies float8 twice as fast.
    """
    tokens = config.run.global_batch * config.data.sequence_length
    length = config.data.sequence_length
    matrices = tokens * 2 * sizes(shape).blocks * sizes(shape).block
    attention = tokens * 4 * length * shape.n_heads * shape.head_dim * shape.n_layers / (2 if shape.causal else 1)
    head = tokens * masked * 2 * shape.vocab_size * shape.d_model
    more = recomputed_products(shape, config)
    heads = 3 if head_at_once(config, masked) else 4
    products = (3 + more) * matrices / (2 if config.parallel.float8 else 1) + heads * head
    return 3 * (matrices + attention + head), products, (3.5 + more) * attention


def flops_per_token(config: Config) -> float:
    """FLOPs of training for each token, without recomputation: model, output head, and Muon's orthogonalisation.

    The head has the mean number of masked positions (`mean_masked`, which does not know what P-POTS will fit).
    Raises ValueError as `shape_of`.
    """
    shape = shape_of(config)
    counted, *_ = step_flops(shape, config, mean_masked(config, Assumptions()))
    if config.optim.name == "muon":
        counted += muon_flops(shape, 1)
    return counted / (config.run.global_batch * config.data.sequence_length)


def recomputed_products(shape: ModelShape, config: Config) -> float:
    """The share of the blocks' products and attention in the forward pass that the backward pass computes again.

    A budget with room for all of them recomputes none. With a smaller budget the share grows in proportion. This is an
    upper bound, because the compiler recomputes the cheapest ones.
    """
    match config.parallel.activation_checkpointing:
        case "full":
            return 1.0
        case "selective":
            return 1 / config.parallel.recompute_every
        case "budget":
            budget, ops = (saved_per_token(shape, m, config.parallel.recompute_budget) for m in ("budget", "ops"))
            return max(0.0, (ops - budget) / (ops - shape.d_model))  # the input of a block is always kept
    return 0.0


def head_at_once(config: Config, masked: float) -> bool:
    """Whether one chunk holds the masked positions of nearly every micro-batch. The head then recomputes nothing."""
    rows = min(config.run.micro_batch, config.run.global_batch)
    return rows * config.data.sequence_length * most_masked(config, masked) <= config.parallel.head_chunk


def most_masked(config: Config, masked: float) -> float:
    """The share of masked positions that 98% of the micro-batches do not exceed: its mean and two standard deviations.

    masked: the mean. The rows have independent rates. Their density is taken as uniform.
    """
    low, high = rate_range(config.diffusion)
    rows = min(config.run.micro_batch, config.run.global_batch)
    return min(1.0, masked + 2 * (high - low) / math.sqrt(12 * rows))


def mean_masked(config: Config, assumed: Assumptions) -> float:
    """The mean share of the positions of a row that the head computes: the mean masking rate, and 1 for next tokens.

    The density that P-POTS fits during training is not known here. Prompts, which are not masked, and the additional
    masks of ISAD and SyRM are ignored. `assumed.masked` replaces the result.
    """
    if assumed.masked is not None:
        return assumed.masked
    if config.diffusion.objective == "ar":
        return 1.0
    return float(plain_process(config.diffusion).rates_at((np.arange(1000) + 0.5) / 1000).rates.mean())


# Bytes that the operations of a block, except matrix products and attention, read and write in the forward and backward
# pass, per token and per value of (residual stream, queries and keys, feed-forward). For bfloat16, with QK-norm. The
# keys are (compiled, activation checkpointing). tools/roofline.py counts these bytes, and a test compares them.
BLOCK_BYTES = {
    (False, "none"): (62, 114, 28),
    (False, "ops"): (76, 170, 38),
    (False, "full"): (76, 170, 38),
    (True, "none"): (42, 10, 16),
    (True, "ops"): (68, 22, 26),
    (True, "full"): (68, 22, 18),
}
# Bytes that the cross-entropy reads and writes for each logit, by compiled: (in one chunk, added by recomputation).
LOGIT_BYTES = {False: (44, 22), True: (6, 2)}


def block_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes per token that a block's operations read and write, without products and attention. Mean over blocks."""
    parallel = config.parallel
    width = compute_width(config)
    numbers = shape.d_model, (shape.n_heads + shape.n_kv_heads) * shape.head_dim, shape.d_ff

    def moved(mode: str) -> float:
        return width / 2 * sum(a * b for a, b in zip(BLOCK_BYTES[parallel.compile, mode], numbers, strict=True))

    match parallel.activation_checkpointing:
        case "selective":
            return moved("none") + (moved("full") - moved("none")) / parallel.recompute_every
        case "budget":
            return moved("none") + (moved("ops") - moved("none")) * (1 - parallel.recompute_budget)
        case mode:
            return moved(mode)


def moved_bytes(shape: ModelShape, config: Config, shard: int, masked: float) -> float:
    """Bytes that a rank reads and writes in its memory in one micro-step, without products and attention."""
    tokens = config.run.micro_batch * config.data.sequence_length
    logit, again = LOGIT_BYTES[config.parallel.compile]
    if not head_at_once(config, masked):
        logit += again
    logit *= compute_width(config) / 2
    blocks = shape.n_layers * block_bytes(shape, config)
    scaled = float8_bytes(shape, tokens, recomputed_products(shape, config)) if config.parallel.float8 else 0
    return tokens * (blocks + masked * logit * shape.vocab_size) + scaled + copied_bytes(shape, config, shard)


def float8_bytes(shape: ModelShape, tokens: int, recomputed: float = 0.0) -> float:
    """Bytes that scaling to float8 reads and writes in one micro-step.

    An operand is read to find its largest value, and read and written to be rounded: 2 + 2 + 1 bytes per value. The
    operands are the inputs of the linear layers and the gradients of their outputs, and the weights in both passes.
    recomputed: the share of the products of the forward pass that the backward pass computes again.
    """
    d = shape.d_model
    queries = shape.n_heads * shape.head_dim
    keys = shape.n_kv_heads * shape.head_dim
    inputs = 5 * d + queries + shape.d_ff
    outputs = queries + 2 * keys + 2 * d + 2 * shape.d_ff
    weights = 2 * d * (queries + keys) + 3 * d * shape.d_ff
    return 5 * shape.n_layers * (tokens * (inputs + outputs) + 2 * weights + recomputed * (tokens * inputs + weights))


def copied_bytes(shape: ModelShape, config: Config, shard: int) -> float:
    """The part of FSDP in `moved_bytes`.

    It casts shards, gathers them into a buffer and copies them out of it. It copies gradients into a buffer, reduces
    them, and adds them to the gradients of the shard.
    """
    parameters = sizes(shape).total
    width = compute_width(config)
    gathered = (4 + width) / shard + (3 * width if shard > 1 else 0)
    return (parameters + regathered(shape, config)) * gathered + parameters * (width + 8 + 16 / shard)


# ---- the time of communication


def regathered(shape: ModelShape, config: Config) -> int:
    """The number of parameters that the backward pass gathers again. The head and a tied matrix are not freed."""
    parts = sizes(shape)
    return parts.blocks * parts.block + parts.embed if config.parallel.reshard_after_forward else 0


def collectives(shape: ModelShape, config: Config, copies: int, shard: int, accumulation: int) -> dict[str, int]:
    """The number of collectives that a rank joins in one step, by kind. FSDP has one for each group of parameters."""
    parts = sizes(shape)
    groups = parts.blocks + (1 if shape.tied_embeddings else 2)  # the root; embedding and head
    again = groups - 1 if config.parallel.reshard_after_forward else 0
    return {
        "all_gather": accumulation * (groups + again) if shard > 1 else 0,
        "reduce_scatter": accumulation * groups if shard > 1 else 0,
        "all_reduce": groups if copies > 1 else 0,
        "all_to_all": 2 if config.optim.name == "muon" and shard > 1 else 0,
    }


@dataclass(frozen=True)
class Ring:
    """The speed of a ring of GPUs, in which each sends to the next."""

    rate: float  # bytes/s that each GPU sends
    latency: float  # seconds in which a byte passes all GPUs


def ring(size: int, in_node: int, gpu: Gpu, assumed: Assumptions) -> Ring:
    """A ring of `size` GPUs, of which `in_node` are in each node.

    NCCL makes one ring for each network card. A group of several nodes uses as many cards as it has GPUs in a node.
    """
    in_node = min(size, in_node)
    nodes = -(-size // in_node)
    rate = gpu.near
    if nodes > 1:
        rate = gpu.far if in_node == 1 else min(gpu.near, in_node * gpu.far)
    latency = (size - nodes) * assumed.near_hop + (nodes - 1) * assumed.far_hop
    return Ring(rate * assumed.link_efficiency, latency)


def mfu_per_speed(shape: ModelShape, config: Config, ranks: int, device: torch.device) -> float | None:
    """The MFU (arXiv 2204.02311) of a run at one token per second over all ranks, or None if the GPU is not in GPUS."""
    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    counted, *_ = step_flops(shape, config, mean_masked(config, Assumptions()))
    return counted / (config.run.global_batch * config.data.sequence_length) / (ranks * gpu.peak)


def gpu_of(name: str) -> Gpu | None:
    """The GPU with this name of its driver, such as "NVIDIA H100 PCIe", or None if it is not in GPUS."""
    words = set(re.findall(r"\w+", name.lower()))
    known = [key for key in GPUS if words.issuperset(key.split("-"))]
    if not known or "mig" in words:  # a MIG instance is a part of a GPU
        return None
    return GPUS[max(known, key=len)]


def cost(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, assumed: Assumptions) -> Cost:
    """The prediction. Raises ValueError if the configuration is not valid for this number of GPUs."""
    plan = resolve(config, gpus)
    copies = config.parallel.replicate
    shard = gpus // config.parallel.replicate
    config = config.model_copy(update={"run": config.run.model_copy(update={"micro_batch": plan.micro_batch})})
    # The number of masked positions changes with every micro-batch. In one of a few rows it can be nearly all of them.
    kinds = memory(shape, config, shard, plan.micro_batch, masked=1.0)
    sent = traffic(shape, config, gpus, shard, plan.accumulation)
    calls = collectives(shape, config, copies, shard, plan.accumulation)
    within = ring(shard, gpu.per_node, gpu, assumed)
    across = ring(copies, max(1, gpu.per_node // shard), gpu, assumed)
    rings = {"all_gather": (within, 1), "reduce_scatter": (within, 1), "all_reduce": (across, 2)}
    latency = sum(calls[kind] * (assumed.collective + rounds * one.latency) for kind, (one, rounds) in rings.items())
    communication = latency + sum(sent[kind] / one.rate for kind, (one, _) in rings.items())
    communication = max(communication, sent["host"] / assumed.host_link)  # these use separate links
    masked = mean_masked(config, assumed)
    counted, products, attention = step_flops(shape, config, masked)
    flops = gpu.peak * assumed.compute_efficiency
    moving = gpu.bandwidth * assumed.memory_efficiency
    compute = products / gpus / flops + attention / gpus / (gpu.peak * assumed.attention_efficiency)
    compute += plan.accumulation * moved_bytes(shape, config, shard, masked) / moving
    muon = config.optim.name == "muon"
    host = config.parallel.offload
    matrices = muon_parameters(shape) if muon else 0
    parameters = sizes(shape).total
    # The norm reads the gradient, and clipping reads and writes it. AdamW reads parameter, gradient and two moments and
    # writes all but the gradient, in one pass. Muon makes eight passes, which read and write 18 values per parameter.
    passes = (40 * (parameters - matrices) + 84 * matrices) / shard
    optimizer = passes / (assumed.host_memory if host else moving)
    if muon:  # in an all-to-all, each rank sends to all others through its own card
        to_owners = gpu.near if shard <= gpu.per_node else gpu.far
        optimizer += muon_flops(shape, shard) / flops + sent["all_to_all"] / (to_owners * assumed.link_efficiency)
        optimizer += calls["all_to_all"] * (assumed.collective + within.latency)
    seconds = max(compute, communication) + optimizer  # collectives of one block overlap with computation of another
    states = sum(state_bytes(config, shape, shard).values())
    total = seconds * config.run.steps
    saved = parameters * (16 if config.optim.ema_decay is not None else 12) - 4 * matrices
    return Cost(
        gpus=gpus, reasons=plan.reasons, memory=kinds, host_bytes=states if host else 0.0,
        traffic=sent, link="node" if shard <= gpu.per_node else "network",
        fits=peak(kinds) <= gpu.memory * (1 - assumed.memory_reserve),
        model_flops=counted, compute_seconds=compute, communication_seconds=communication, latency_seconds=latency,
        optimizer_seconds=optimizer, step_seconds=seconds,
        mfu=counted / (seconds * gpus * gpu.peak), tokens_per_second=plan.tokens_per_step / seconds,
        days=total / 86400, gpu_hours=gpus * total / 3600, checkpoint_bytes=float(saved),
        stall_seconds=saved / gpus / assumed.host_link, write_seconds=saved / gpus / assumed.disk,
    )  # fmt: skip
