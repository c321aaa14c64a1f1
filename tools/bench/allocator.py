"""Measure the memory that the engine really allocates in a small run, to compare with the plan."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from mdmtrain.config import Config
from mdmtrain.cost import WORK, Assumptions, mean_masked, memory, peak
from mdmtrain.model.presets import ModelShape
from mdmtrain.muon import local, local_gradient
from mdmtrain.optim import build_optimizer
from mdmtrain.parallel.parallelize import build_model
from mdmtrain.parallel.world import World

Spans = dict[str, tuple[int, int]]
Marks = tuple[Callable[[str], None], Spans]


def allocations(device: torch.device) -> AbstractContextManager[Marks]:
    """(mark, spans): after the block, spans[name] = (bytes in use at mark(name), most of them from there to the next
    mark), both over those in use at the first one. The allocator's own books, exact on the CPU too.
    """
    return _cuda_allocations() if device.type == "cuda" else _cpu_allocations()


@contextmanager
def _cuda_allocations() -> Iterator[Marks]:
    spans: Spans = {}
    levels: list[tuple[str, int, int]] = []  # at a mark, and the most since the one before

    def mark(name: str) -> None:
        levels.append((name, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        torch.cuda.reset_peak_memory_stats()

    yield mark, spans
    mark("")
    for (name, level, _), (_, _, most) in pairwise(levels):
        spans[name] = level - levels[0][1], most - levels[0][1]


@contextmanager
def _cpu_allocations() -> Iterator[Marks]:
    spans: Spans = {}

    def mark(name: str) -> None:
        with record_function(f"mark:{name}"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield mark, spans
    level, current = 0, None
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("mark:"):
            level, current = (level, event.name()[5:]) if current is not None else (0, event.name()[5:])
            spans[current] = level, level
        elif event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            level += event.nbytes()
            if current is not None:
                spans[current] = spans[current][0], max(spans[current][1], level)


def measured_memory(config: Config, shape: ModelShape, world: World, masked: float) -> dict[str, float]:
    """The bytes on this rank in a micro-step with accumulation and in the optimizer's step, by kind. A collective.

    The kinds are those of mdmtrain/cost.py. "activations" are the values that the blocks keep. The peaks with the head
    and with a block at work include everything except the states (parameters, gradients, optimizer). masked: share of
    the positions that the head computes.
    """
    model = build_model(shape, config.parallel, world)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).fill_(0.01)  # any values, because real initial values take minutes at 1B
    optimizer = build_optimizer(model, config.optim)
    ids = torch.zeros(config.run.micro_batch, config.data.sequence_length, dtype=torch.long, device=world.device)
    positions = torch.arange(int(masked * ids.numel()), device=world.device)
    targets = ids.flatten()[positions]

    def micro_step() -> None:
        model(ids, positions, targets).sum().backward()

    gathered: dict[str, int] = {}

    def reached(name: str) -> None:
        gathered[name] = sum(p.nbytes for p in model.layers.parameters() if not isinstance(p, DTensor))
        mark(name)

    def watch_gradient(rows: Tensor) -> None:
        rows.register_hook(lambda _: mark("block at work"))  # the backward pass of the head is done

    micro_step()
    with allocations(world.device) as (mark, spans):
        mark("start")
        model.layers[0].register_forward_pre_hook(lambda *_: reached("blocks"))
        model.layers[-1].register_forward_hook(lambda *_: reached("head at work"))
        model.head.register_forward_pre_hook(lambda _, inputs: watch_gradient(inputs[0]))
        micro_step()
    optimizer.found_inf = torch.zeros((), device=local(next(model.parameters())).device)
    optimizer.step()  # the first step makes lasting allocations
    with allocations(world.device) as (mark, after):
        mark("optimizer at work")
        optimizer.step()
        mark("end")
    parameters = list(model.parameters())
    first, last = (spans[name][0] - gathered[name] for name in ("blocks", "head at work"))
    states = {
        "parameters": sum(local(p).nbytes for p in parameters),
        "gradients": sum(local_gradient(p).nbytes for p in parameters),
        "optimizer": sum(local(s).nbytes for p in parameters for s in optimizer.state[p].values() if s.ndim),
    }
    if config.parallel.offload:  # they are in host memory
        states = dict.fromkeys(states, 0)
    return {
        **states,
        "activations": last - first,
        **{kind: spans[kind][1] for kind in ("head at work", "block at work")},
        "optimizer at work": after["optimizer at work"][1],
    }


def compare_with_plan(config: Config, shape: ModelShape, world: World) -> dict[str, tuple[float, float]]:
    """(planned, measured) bytes by kind, and "peak", the peak of a step. A collective.

    The peaks "head at work" and "block at work" do not include the states. Nothing includes the batch, and the plan is
    taken without the gradient pair and the average, which the measurement does not have.
    """
    masked = mean_masked(config, Assumptions())
    shard = world.size // config.parallel.replicate
    on_cpu = world.device.type == "cpu"
    planned = memory(shape, config, shard, config.run.micro_batch, masked, on_cpu)
    measured = measured_memory(config, shape, world, masked)
    kept = planned["gathered"] + planned["activations"]
    both = {kind: (planned[kind] + (kept if kind in WORK else 0), held) for kind, held in measured.items()}
    states = sum(measured[kind] for kind in ("parameters", "gradients", "optimizer"))
    most = states + max(measured[kind] for kind in (*WORK, "optimizer at work"))
    return {**both, "peak": (peak(planned) - planned["gradient pair"] - planned["average"], most)}
