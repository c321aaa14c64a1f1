"""What the engine itself sends and holds, for the plan to be held against: traffic of a world of any size on fake
tensors, memory of a small real one by the allocator's books.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from mdmtrain.config import Config
from mdmtrain.model.presets import ModelShape
from mdmtrain.muon import newton_schulz_dtype
from mdmtrain.optim import build_optimizer, local
from mdmtrain.parallel.parallelize import build_model, data_mesh
from mdmtrain.parallel.world import World


def traced_traffic(config: Config, shape: ModelShape, world: int, rank: int = 0) -> dict[str, float]:
    """Bytes that a rank sends in one micro-step, by collective: the real model on fake tensors in a fake process group.

    With Muon, also in the optimizer's step, as on GPUs. Starts and ends a process group of its own. Differs from the
    plan by the padding of rows that do not divide.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sent: Counter[str] = Counter()
    copies = config.parallel.replicate

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            match str(func):
                case "c10d._allgather_base_.default":
                    sent["all_gather"] += args[0].nbytes - args[1].nbytes
                case "c10d._reduce_scatter_base_.default":
                    sent["reduce_scatter"] += args[1].nbytes - args[0].nbytes
                case "c10d.allreduce_.default":
                    sent["all_reduce"] += 2 * sum(tensor.nbytes for tensor in args[0]) * (copies - 1) // copies
                case "c10d.alltoall_base_.default":
                    _, buffer, _, _, counts, *_ = args
                    own = counts[rank % len(counts)]
                    sent["all_to_all"] += (sum(counts) - own) * buffer.itemsize
            return func(*args, **(kwargs or {}))

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
        here = World(rank, world, torch.device("cpu"), mesh, dist.group.WORLD)
        data_mesh(config.parallel, here)  # made before tensors are fake
        rows, length = config.run.micro_batch, config.data.sequence_length
        with FakeTensorMode(allow_non_fake_inputs=True), Watch():
            model = build_model(shape, config.parallel, here)
            ids = torch.zeros(rows, length, dtype=torch.long)
            model(ids, torch.arange(rows), torch.zeros(rows, dtype=torch.long)).sum().backward()
            if config.optim.name == "muon":
                optimizer = build_optimizer(model, config.optim)
                optimizer.muon.dtype, optimizer.found_inf = newton_schulz_dtype("cuda"), torch.zeros(())
                optimizer.step()
    finally:
        data_mesh.cache_clear()  # its meshes belong to the process group that ends here
        dist.destroy_process_group()
    return dict(sent)


@contextmanager
def allocations(device: torch.device) -> Iterator[tuple[Callable[[str], None], dict[str, tuple[int, int]]]]:
    """(mark, spans): after the block, spans[name] = (bytes in use at mark(name), most of them from there to the next
    mark), both over those in use at the first one. The allocator's own books, exact on the CPU too.
    """
    spans: dict[str, tuple[int, int]] = {}
    if device.type == "cuda":
        levels: list[tuple[str, int, int]] = []  # at a mark, and the most since the one before

        def mark(name: str) -> None:
            levels.append((name, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
            torch.cuda.reset_peak_memory_stats()

        yield mark, spans
        mark("")
        for (name, level, _), (_, _, most) in pairwise(levels):
            spans[name] = level - levels[0][1], most - levels[0][1]
        return

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
    """Bytes on this rank in a micro-step that adds to gradients, and in the optimizer's step after it, by the kinds of
    mdmtrain/cost.py. A collective.

    "activations" are what the blocks keep; the peaks with the head and with a block at work come with all that is
    there but the states (parameters, gradients, optimizer). masked: share of the positions that pass the head.
    """
    model = build_model(shape, config.parallel, world)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).fill_(0.01)  # any numbers; a run's own take minutes at 1B
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
        rows.register_hook(lambda _: mark("block at work"))  # the head has gone back

    micro_step()
    with allocations(world.device) as (mark, spans):
        mark("start")
        model.layers[0].register_forward_pre_hook(lambda *_: reached("blocks"))
        model.layers[-1].register_forward_hook(lambda *_: reached("head at work"))
        model.head.register_forward_pre_hook(lambda _, inputs: watch_gradient(inputs[0]))
        micro_step()
    optimizer.found_inf = torch.zeros((), device=local(next(model.parameters())).device)
    optimizer.step()  # libraries take what they keep
    with allocations(world.device) as (mark, after):
        mark("optimizer at work")
        optimizer.step()
        mark("end")
    parameters = list(model.parameters())
    first, last = (spans[name][0] - gathered[name] for name in ("blocks", "head at work"))
    return {
        "parameters": sum(local(p).nbytes for p in parameters),
        "gradients": sum(local(p.grad).nbytes for p in parameters),
        "optimizer": sum(local(s).nbytes for p in parameters for s in optimizer.state[p].values() if s.ndim),
        "activations": last - first,
        **{kind: spans[kind][1] for kind in ("head at work", "block at work")},
        "optimizer at work": after["optimizer at work"][1],
    }
