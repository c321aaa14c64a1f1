"""Measure the traffic that the engine really sends, with fake tensors and any number of ranks."""

from collections import Counter

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from mdmtrain.config import Config
from mdmtrain.model.presets import ModelShape
from mdmtrain.muon import newton_schulz_dtype
from mdmtrain.optim import MuonAndAdamW, build_optimizer
from mdmtrain.parallel.parallelize import build_model, data_mesh
from mdmtrain.parallel.world import World


def traced_traffic(
    config: Config, shape: ModelShape, world: int, rank: int = 0
) -> tuple[dict[str, float], dict[str, int]]:
    """(bytes that a rank sends in one micro-step, number of calls), by collective. With Muon, also in the optimizer's
    step (on GPUs).

    Runs the real model on fake tensors in a fake process group, which it creates and destroys. The result differs from
    the plan by padding, if numbers of rows are not divisible by the number of ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    copies = config.parallel.replicate
    parallel = config.parallel.model_copy(update={"compile": False, "float8": False})  # they do not change what is sent

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            before = set(sent.items())
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
            calls.update(kind for kind, _ in set(sent.items()) - before)
            return func(*args, **(kwargs or {}))

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
        group = dist.group.WORLD
        assert group is not None
        here = World(rank, world, torch.device("cpu"), mesh, group)
        data_mesh(config.parallel, here)  # made before tensors are fake
        rows = config.run.micro_batch
        length = config.data.sequence_length
        with FakeTensorMode(allow_non_fake_inputs=True), Watch():
            model = build_model(shape, parallel, here)
            ids = torch.zeros(rows, length, dtype=torch.long)
            model(ids, torch.arange(rows), torch.zeros(rows, dtype=torch.long)).sum().backward()
            if config.optim.name == "muon":
                optimizer = build_optimizer(model, config.optim)
                assert isinstance(optimizer, MuonAndAdamW)
                optimizer.muon.dtype = newton_schulz_dtype("cuda")
                optimizer.found_inf = torch.zeros(())
                optimizer.step()
    finally:
        data_mesh.cache_clear()  # its meshes belong to the process group that is destroyed here
        dist.destroy_process_group()
    return dict(sent), dict(calls)
