"""Run a function on the ranks of a real gloo world, each rank a process of its own."""

import os
import pickle
import traceback
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

from mdmtrain.parallel.world import World, init_world


def fake_world(gather: Callable = lambda value: [value], rank: int = 0, size: int = 1) -> World:
    """A rank without a process group, whose exchanges are `gather`."""

    class Fake(World):
        def gather(self, value):
            return gather(value)

    return Fake(rank, size, torch.device("cpu"), None, None)


def run_world(function: Callable, size: int, *arguments) -> list:
    """Call function(world, *arguments) on every rank and return the results in the order of the ranks.

    `function` must be importable (defined at the top of a module). A failure on any rank fails the caller with that
    rank's traceback.
    """
    context = mp.get_context("spawn")
    results, port = context.SimpleQueue(), get_free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, size, port, arguments, results)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    collected, failure = {}, None
    while len(collected) < size and failure is None:
        while not results._reader.poll(1.0):
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in collected]
            assert not dead, f"ranks {dead} of {size} died without a word: {[processes[r].exitcode for r in dead]}"
        rank, result, failure = results.get()
        collected[rank] = result
    for process in processes:
        if failure is not None:
            process.kill()
        process.join()
    if failure is not None:
        raise AssertionError(f"rank {rank} of {size} failed:\n{failure}")
    return [pickle.loads(collected[rank]) for rank in range(size)]


def _rank(function, rank, size, port, arguments, results) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        world = init_world()
        # As bytes: a tensor in a queue is a handle to memory that goes away with this process.
        results.put((rank, pickle.dumps(function(world, *arguments)), None))
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
