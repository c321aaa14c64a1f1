#!/usr/bin/env python3
"""Measure, on one machine, costs that grow with the number of ranks.

    python tools/bench/scale.py --only checkpoint --ranks 64 256 1024
    python tools/bench/scale.py --only groups --ranks 16 32 64 96
    python tools/bench/scale.py --only roll-call --ranks 64 256 1024

checkpoint: CPU seconds of rank 0's thread for one save of an 8B model with both moments, and for resuming on the same
number of ranks and on half as many. Messages and files of the other ranks are simulated, and their time is subtracted.
Rows have 1/1024 of their real width, because copying bytes does not hold Python's lock. Everything else is as in a real
run.

groups: the cost of a gloo group over all ranks, in connections of one process and in traffic. The ranks are real
processes, connected over the loopback device.

roll-call: seconds until the watchdog has read the answers of all ranks. It compares one shared key, as the watchdog
uses it, with the earlier method of one key for each rank. If rank 0 does not ask, other ranks do, and the store serves
them one after the other, so their number is multiplied by the time of one.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.formats import tensor_shapes
from mdmtrain.checkpoint.layout import Layout, chunk
from mdmtrain.checkpoint.tensor_files import file_blocks, write_file
from mdmtrain.command import CommandParser, user_errors
from mdmtrain.config import CheckpointConfig, RunConfig
from mdmtrain.model.presets import PRESETS, ModelShape
from mdmtrain.parallel.watchdog import DEPUTIES, Watchdog
from mdmtrain.parallel.world import World

PARTS = ("checkpoint", "groups", "roll-call")
CUT = 1024
NO_GROUP = cast(dist.ProcessGroup, None)  # a simulated rank does not communicate


class Simulated(World):
    """Rank 0 of many. It creates the messages of the other ranks when they are needed; `apart` sums up that time."""

    apart = 0.0
    folder: Path
    layout: Layout

    def gather(self, value) -> list:
        start = time.thread_time()
        values = [value] * self.size
        if isinstance(value, tuple) and value[0] and isinstance(value[0][0], tuple):  # size and checksum of a file
            values = [value, *(([self._write(number)], None) for number in range(1, self.size))]
        messages = [pickle.dumps(one) for one in values]
        type(self).apart += time.thread_time() - start
        return [pickle.loads(message) for message in messages]

    def _write(self, number: int) -> tuple[int, str]:
        header = self.layout.header(number)
        shapes = {name: entry["shape"] for name, entry in header.items()}
        return write_file(
            self.folder / self.layout.file_name(number), file_blocks(header, lambda name: torch.zeros(shapes[name]))
        )


def shards(ranks: int) -> tuple[dict[str, DTensor], Simulated]:
    """The parameters and moments of an 8B model, as sharded on rank 0 of `ranks`."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    tensors = {}
    for name, (rows, *columns) in tensor_shapes(ModelShape(vocab_size=126_464, **PRESETS["8b"])).items():
        columns = [max(1, width // CUT) for width in columns]
        for kind in ("model", "exp_avg", "exp_avg_sq"):
            part = torch.zeros(len(chunk(rows, ranks, 0)), *columns)
            whole = torch.empty(rows, *columns, device="meta")
            tensors[f"{kind}.{name}"] = DTensor.from_local(
                part, mesh, (Shard(0),), run_check=False, shape=whole.shape, stride=whole.stride()
            )
    return tensors, Simulated(0, ranks, torch.device("cpu"), mesh, NO_GROUP)


def measure_checkpoint(ranks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        tensors, world = shards(ranks)
        folder = Path(scratch) / "step-00000001"
        Simulated.folder, Simulated.layout, Simulated.apart = folder, store.layout_of(tensors, world), 0.0
        copies = {name: tensor.to_local() for name, tensor in tensors.items()}
        meta = {"identity": {}, "has_average": False, "config": {}}
        start = time.thread_time()
        store.save(Path(scratch), 1, tensors, meta, bytes(500_000), CheckpointConfig(), world, copies)
        found = {
            "tensors": len(tensors),
            "save, s": time.thread_time() - start - Simulated.apart,
            "meta.json, kB": (folder / "meta.json").stat().st_size / 1e3,
        }
        for name, readers in (("resume, s", ranks), ("resume on half, s", ranks // 2)):
            tensors, world = shards(readers)
            start = time.thread_time()
            Simulated.apart = 0.0
            meta = pickle.loads(pickle.dumps(store.read_meta(folder)))  # rank 0 reads it and sends it to the others
            found["of this the index, s"] = time.thread_time() - start
            store.load(folder, meta, tensors, world)
            found[name] = time.thread_time() - start - Simulated.apart
    return found


# ---- gloo groups


def measure_groups(ranks: int) -> dict[str, float]:
    """Create three groups one after the other. A run now has two; earlier versions had three."""
    context = multiprocessing.get_context("fork")  # torch is imported once
    found = context.SimpleQueue()
    port = get_free_port()
    processes = [context.Process(target=open_groups, args=(n, ranks, port, found)) for n in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return found.get()


def open_groups(rank: int, ranks: int, port: int, found) -> None:
    meeting = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    result: dict[str, float] = {}

    def counted(group: str, make: Callable[[], Any]) -> None:
        before = traffic()
        dist.barrier(make())
        meeting.add(group, 1)
        while meeting.add(group, 0) < ranks:
            time.sleep(0.05)
        result[f"connections, {group}"] = sockets()
        result[f"MB sent, {group}"] = (traffic() - before) / 1e6

    def first() -> None:
        limit = timedelta(minutes=5)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks, timeout=limit)

    counted("1 group", first)
    counted("2 groups", lambda: dist.new_group(backend="gloo"))
    counted("3 groups", lambda: dist.new_group(backend="gloo"))
    if rank == 1:  # rank 0 also has the connections of the store
        found.put(result)
    meeting.add("left", 1)
    while rank == 0 and meeting.add("left", 0) < ranks:  # rank 0 hosts the store until all have left
        time.sleep(0.05)
    os._exit(0)


def sockets() -> int:
    return sum(os.readlink(f).startswith("socket:") for f in Path("/proc/self/fd").iterdir() if f.is_symlink())


def traffic() -> int:
    """Bytes that the loopback device has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


# ---- the roll call


def measure_roll_call(ranks: int) -> dict[str, float]:
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reader = dist.PrefixStore("watchdog/0", dist.TCPStore("127.0.0.1", meeting.port, is_master=False))
    config = RunConfig(dir="run", steps=1, global_batch=1, micro_batch=1)
    watch = Watchdog(Simulated(0, ranks, torch.device("cpu"), cast(DeviceMesh, None), NO_GROUP), config)
    watch._store = reader
    report = watch._report()
    for rank in range(ranks):
        line = json.dumps({"rank": rank, **report}) + "\n"
        reader.append("answers", line)  # type: ignore[attr-defined] # torch's stubs lack it
        reader.set(f"at {rank}", json.dumps(report))
    start = time.monotonic()
    assert len(watch._answers()) == ranks
    now = time.monotonic() - start - 0.1  # the pause before it reads
    start = time.monotonic()
    for rank in range(ranks):
        assert not reader.check([f"left {rank}"]) and reader.check([f"at {rank}"])
        json.loads(reader.get(f"at {rank}"))
    before = time.monotonic() - start
    return {
        "rank 0 asks, s": now,
        "rank 0 does not ask, s": now * -(-ranks // DEPUTIES),
        "rank 0 asks, one key per rank, s": before,
        "rank 0 does not ask, all others do, s": before * (ranks - 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="tools/bench/scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, default=PARTS[0], help="what to measure (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256], help="numbers of ranks (default: 64 256)")
    args = parser.parse_args(arguments)
    measure = {"checkpoint": measure_checkpoint, "groups": measure_groups, "roll-call": measure_roll_call}[args.only]
    rows = {ranks: measure(ranks) for ranks in args.ranks}
    table = Table("ranks", *next(iter(rows.values())), title=args.only)
    for ranks, found in rows.items():
        table.add_row(str(ranks), *(f"{value:,.3f}".rstrip("0").rstrip(".") for value in found.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    with user_errors():
        main()
