"""Count the FLOPs and bytes of one micro-step of the real model, by kind of operation, on fake tensors.

In eager mode, every operation reads its inputs from memory and writes its outputs. In compiled mode, the graphs come
from the compiler's own partition, and all operations between two matrix products count as one kernel. RMSNorm is one
kernel in both, as on CUDA. Nothing is measured. The time to launch a kernel is not included.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import getitem
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import partitioners
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from mdmtrain.config import Config, resolve
from mdmtrain.cost import Assumptions, Gpu, copied_bytes, cost, mean_masked
from mdmtrain.model.attention import rotary_angles
from mdmtrain.model.head import cross_entropy
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Block, Transformer
from mdmtrain.parallel.parallelize import recompute_options, set_up_compiler

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
# The kernels of the CPU, where the fake tensors are. FlopCounterMode has no formulas for them.
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# The kind of an operation that is neither a matrix product nor attention, by a module that it belongs to.
KINDS = {"head": "head, cross-entropy", "attention": "rotary", "mlp": "elementwise"}
FUSED = "elementwise, norms and rotary, fused"


@dataclass
class Work:
    """The sums over all operations of one kind."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: int = 0


class Tally:
    """Work by kind."""

    def __init__(self):
        self.kinds: defaultdict[str, Work] = defaultdict(Work)

    def add(self, kind: str, bytes: float, flops: float = 0.0, kernels: int = 1) -> None:
        work = self.kinds[kind]
        work.flops, work.bytes, work.kernels = work.flops + flops, work.bytes + bytes, work.kernels + kernels

    def add_all(self, other: "Tally", times: int = 1) -> None:
        for kind, work in other.kinds.items():
            self.add(kind, work.bytes * times, work.flops * times, work.kernels * times)

    def operation(self, func, inputs: Iterable[Tensor], outputs: Iterable[Tensor], kind: str) -> None:
        """Add an operation that is one kernel. Matrix products and attention have their own kind instead of `kind`."""
        inputs = list(inputs)
        outputs = list(outputs)
        flops = 0.0
        if func in PRODUCTS:
            flops = float(flop_registry[func.overloadpacket](*inputs, out_val=outputs[0]))
            kind = "head, products" if kind == KINDS["head"] else "products"
        elif func in (ATTENTION, ATTENTION_BACKWARD):  # the backward pass computes the scores again
            query, key = inputs[:2] if func == ATTENTION else inputs[1:3]
            flops = (4.0 if func == ATTENTION else 10.0) * query.numel() * key.shape[-2]
            kind = "attention"
        self.add(kind, sum(map(size, {id(tensor): tensor for tensor in [*inputs, *outputs]}.values())), flops)


def size(tensor: Tensor) -> int:
    """The bytes that reading a tensor takes from memory. An expanded tensor is read once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class Roofline:
    """One micro-step of a rank, with its share of the optimizer's step."""

    rows: int  # of the micro-step
    kinds: dict[str, Work]
    milliseconds: dict[str, float]  # by kind; communication overlaps with the others
    model_milliseconds: float  # the FLOPs that MFU counts, at the peak

    @property
    def total(self) -> float:
        """Milliseconds of the micro-step. Communication counts only where it is longer than the computation."""
        hidden = {"communication", "optimizer"}
        compute = sum(ms for kind, ms in self.milliseconds.items() if kind not in hidden)
        return max(compute, self.milliseconds["communication"]) + self.milliseconds["optimizer"]

    def mfu(self, without: str | None = None) -> float:
        """MFU of the micro-step. `without`: a kind that is counted as if it took no time."""
        times = {kind: 0.0 if kind == without else ms for kind, ms in self.milliseconds.items()}
        return self.model_milliseconds / replace(self, milliseconds=times).total


def roofline(config: Config, shape: ModelShape, gpus: int, gpu: Gpu, assumed: Assumptions) -> Roofline:
    """The operations of the real model at the speeds that cost.py assumes.

    FSDP's copies, the optimizer and communication are those of cost.py. Raises ValueError if the configuration is not
    valid for this number of GPUs, or multiplies in float8, which is not counted here.
    """
    if config.parallel.float8:
        raise ValueError("parallel.float8=true: --roofline counts no float8 products: leave out --roofline or float8")
    plan = resolve(config, gpus)
    price = cost(config, shape, gpus, gpu, assumed)
    config = config.model_copy(update={"run": config.run.model_copy(update={"micro_batch": plan.micro_batch})})
    kinds = traced(config, shape, mean_masked(config, assumed))
    kinds["FSDP's copies"] = Work(bytes=copied_bytes(shape, config, gpus // config.parallel.replicate))
    moving = gpu.bandwidth * assumed.memory_efficiency
    times = {}
    for kind, work in kinds.items():
        share = assumed.attention_efficiency if kind == "attention" else assumed.compute_efficiency
        times[kind] = 1e3 * max(work.flops / (gpu.peak * share), work.bytes / moving)
    times["optimizer"] = 1e3 * price.optimizer_seconds / plan.accumulation
    times["communication"] = 1e3 * price.communication_seconds / plan.accumulation
    return Roofline(plan.micro_batch, kinds, times, 1e3 * price.model_flops / (gpus * plan.accumulation * gpu.peak))


def table_of_roofline(line: Roofline, gpus: int) -> Table:
    """One kind of operation in each row, the slowest first."""
    title = f"one micro-step of {line.rows} rows on {gpus:,} GPUs: a roofline, not a measurement"
    table = Table("operations", "TFLOP", "GB", "kernels", "ms", "share", "MFU without", title=title)
    for kind, ms in sorted(line.milliseconds.items(), key=lambda item: -item[1]):
        work = line.kinds.get(kind)
        counted = (
            [f"{work.flops / 1e12:.2f}", f"{work.bytes / 1e9:.1f}", str(work.kernels or "")] if work else ["", "", ""]
        )
        table.add_row(kind, *counted, f"{ms:.1f}", f"{ms / line.total:.0%}", f"{line.mfu(without=kind):.1%}")
    table.add_row("all (communication overlaps)", "", "", "", f"{line.total:.1f}", "", f"MFU {line.mfu():.1%}")
    return table


def traced(config: Config, shape: ModelShape, masked: float) -> dict[str, Work]:
    """The forward and backward pass of one micro-batch on one rank, without FSDP's copies and the optimizer.

    masked: the share of the positions that the head computes.
    """
    parallel = config.parallel
    length = config.data.sequence_length
    total = Tally()
    if parallel.compile:
        torch.compiler.reset()
        set_up_compiler(parallel)
    options = [recompute_options(parallel, layer) for layer in range(shape.n_layers)]
    recomputed = sum(one is not None for one in options)
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(getattr(torch, parallel.compute_dtype)):
        cos, sin = rotary_angles(length, shape.head_dim, shape.rope_theta, torch.device("cpu"))
        x = torch.zeros(config.run.micro_batch, length, shape.d_model, requires_grad=True)
        for recompute, count in (None, len(options) - recomputed), (options[0], recomputed):
            if count:
                block = Block(shape)
                block.recompute = recompute
                total.add_all((compiled if parallel.compile else eager)(block, x, cos, sin, None), count)
        total.add_all(ends(config, shape, masked))
    return dict(total.kinds)


def ends(config: Config, shape: ModelShape, masked: float) -> Tally:
    """The model without its blocks: embedding, gathering of the masked rows, their norm and the head."""
    model = Transformer(replace(shape, n_layers=0), config.parallel.head_chunk)
    ids = torch.zeros(config.run.micro_batch, config.data.sequence_length, dtype=torch.long)
    positions = torch.arange(int(ids.numel() * masked))
    targets = torch.zeros_like(positions)
    tally = Tally()
    if config.parallel.compile:  # count the loss alone, and leave it out of the rest
        rows = torch.zeros(len(positions), shape.d_model, requires_grad=True)
        again = len(rows) > model.head.chunk  # a chunk is recomputed as a whole
        tally = compiled(
            cross_entropy, rows, targets, model.embed.weight, kind=KINDS["head"], forwards=2 if again else 1
        )
        model.head.cross_entropy = lambda rows, targets, weight: OneKernel.apply(
            lambda _: None, targets.shape, rows, weight
        )
    tally.add_all(eager(model, ids, positions, targets))
    return tally


# ---- uncompiled


def eager(module: Callable[..., Tensor], *inputs: Tensor | None) -> Tally:
    """Count every operation of a forward and backward pass as one kernel, and every norm as one kernel."""
    tally = Tally()
    tracker = ModuleTracker()

    def norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
        return OneKernel.apply(lambda passes: tally.add("norms", passes * size(x)), x.shape, x, self.weight)

    with patch.object(nn.RMSNorm, "forward", norm), tracker, Watch(tally, tracker):
        module(*inputs).sum().backward()
    return tally


class Watch(TorchDispatchMode):
    """Adds each operation that reads or writes memory to a tally."""

    def __init__(self, tally: Tally, tracker: ModuleTracker):
        super().__init__()
        self.tally, self.tracker = tally, tracker

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        there = {t.untyped_storage()._cdata for t in inputs}
        view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in there for t in outputs)
        if not view and "empty" not in func.name():
            parts = {part for name in self.tracker.parents for part in name.split(".")}
            kind = next((kind for part, kind in KINDS.items() if part in parts), "elementwise")
            self.tally.operation(func, inputs, outputs, kind)
        return result


class OneKernel(torch.autograd.Function):
    """Stands for a kernel and its backward pass, and computes nothing.

    The kernel moves its input twice, and the backward pass moves it three times: it calls record(2) and record(3).
    """

    @staticmethod
    def forward(ctx, record, shape, x, weight):
        record(2)
        ctx.record = record
        ctx.save_for_backward(x, weight)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx, gradient):
        ctx.record(3)
        return None, None, *map(torch.empty_like, ctx.saved_tensors)


# ---- compiled


def compiled(function: Callable[..., Tensor], *inputs: Tensor | None, kind: str = FUSED, forwards: int = 1) -> Tally:
    """Count the graphs of `forwards` forward passes and one backward pass, as the compiler partitions them.

    kind: the kind of the fused operations.
    """
    tally = Tally()

    def count(graph: fx.GraphModule, _, times: int = 1) -> Callable:
        tally.add_all(count_graph(graph, kind), times)

        def run(arguments: list):  # on fake tensors, for the shapes of its outputs
            values = list(arguments)
            arguments.clear()
            return graph.forward(*values)

        run._boxed_call = True  # type: ignore[attr-defined]  # read by AOTAutograd
        return run

    backend = aot_autograd(
        fw_compiler=partial(count, times=forwards), bw_compiler=count, inference_compiler=count,
        decompositions=select_decomp_table(),
        partition_fn=partitioners.min_cut_rematerialization_partition,
    )  # fmt: skip
    # Attention without dropout draws no random numbers, so its recomputation needs no random state.
    with patch.object(partitioners, "functionalize_rng_ops", lambda joint, forward, backward, _: (forward, backward)):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs).sum().backward()
    return tally


def count_graph(graph: fx.GraphModule, kind: str) -> Tally:
    """Count the kernels of a graph.

    Matrix products and attention are one kernel each. Let the depth of a node be the largest number of them on a path
    to it, where every node runs as late as possible. All other nodes of one depth are one kernel. It reads the values
    of other kernels that it uses, and writes the values that other kernels use.
    """
    tally = Tally()
    origin: dict[fx.Node, fx.Node] = {}  # of a view: the node that allocated its memory
    depth: dict[fx.Node, int] = {}
    users: defaultdict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in graph.graph.nodes:
        inputs = {origin[one] for one in node.all_input_nodes}
        depth[node], origin[node] = max((depth[one] for one in inputs), default=0), node
        if node.op == "call_function" and (is_view(node) or is_widened(node)):
            (source,) = inputs
            origin[node] = source if isinstance(source.meta["val"], Tensor) else node
        if origin[node] is node:
            for one in inputs:
                users[one].add(node)
        if alone(node):
            depth[node] += 1
            outputs = [t for t in tree_leaves(node.meta["val"]) if isinstance(t, Tensor)]
            tally.operation(node.target, [one.meta["val"] for one in node.all_input_nodes], outputs, kind)
    fused = [n for n in graph.graph.nodes if n.op == "call_function" and origin[n] is n and n.target is not getitem]
    fused = [node for node in fused if not alone(node)]
    for node in reversed(fused):
        latest = [depth[user] - alone(user) for user in users[node] if user.op != "output"]
        depth[node] = max(depth[node], min(latest, default=0))
    kernels: defaultdict[int, set[fx.Node]] = defaultdict(set)
    for node in fused:
        kernels[depth[node]].add(node)
    for nodes in kernels.values():
        read = {origin[one] for node in nodes for one in node.all_input_nodes} - nodes
        written = {node for node in nodes if users[node] - nodes}
        tally.add(kind, sum(node.meta["val"].numel() * node.meta["val"].itemsize for node in read | written))
    return tally


def alone(node: fx.Node) -> bool:
    return node.target in (*PRODUCTS, ATTENTION, ATTENTION_BACKWARD)


def is_view(node: fx.Node) -> bool:
    views = (aten._unsafe_view.default, aten.reshape.default)
    return node.target is getitem or (
        isinstance(node.target, OpOverload) and (node.target.is_view or node.target in views)
    )


def is_widened(node: fx.Node) -> bool:
    """Whether a node only converts its input to a wider dtype. Each kernel that reads it converts it again."""
    value = node.meta["val"]
    inputs = node.all_input_nodes
    return (
        node.target in (torch.ops.prims.convert_element_type.default, aten._to_copy.default)
        and value.itemsize > inputs[0].meta["val"].itemsize
    )


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
