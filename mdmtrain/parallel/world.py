"""A rank and its process group: start-up, agreement between ranks, and collectives on Python objects."""

import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
WRITER_THREAD = "checkpoint writer"  # a process that ends normally waits for this thread


class AgreedError(ValueError):
    """A user's error that all ranks raise at the same point."""


@dataclass(frozen=True)
class World:
    """The rank of this process, and what it shares with the other ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # one dimension, "dp_shard"
    control: dist.ProcessGroup  # takes tensors on the CPU (gloo), for what must not touch the accelerator

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place. A collective."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all ranks (picklable objects), in rank order. A collective."""
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def deal(self, count: int, compute: Callable[[int], T]) -> list[T]:
        """compute(0) .. compute(count - 1), distributed round-robin over the ranks. A collective.

        Every rank gets all results. `compute` may be a collective too (a forward pass of FSDP), so all ranks call it
        equally often: ranks without work in the last round compute the last number again, and the result is dropped.
        """
        mine = {}
        for first in range(0, count, self.size):
            number = min(first + self.rank, count - 1)
            mine[number] = compute(number)
        gathered = {number: value for part in self.gather(mine) for number, value in part.items()}
        return [gathered[number] for number in range(count)]

    def agree(self, act: Callable[[], T], main_only: bool = False) -> T:
        """Run `act` on every rank, or on rank 0 only and broadcast its result. A collective.

        If `act` raises ValueError or OSError on any rank, all ranks raise the same AgreedError, so no rank waits for
        another one that has failed.
        """
        result: T | None = None
        failure = None
        if self.is_main or not main_only:
            try:
                result = act()
            except (ValueError, OSError) as error:
                failure = describe_error(error)
        failures = [(rank, failure) for rank, failure in enumerate(self.gather(failure)) if failure]
        if failures:
            rank, text = failures[0]
            raise AgreedError(text if rank == 0 else f"rank {rank}: {text}")
        if main_only and self.size > 1:
            box = [result]
            dist.broadcast_object_list(box, src=0, group=self.control)
            result = box[0]
        return cast(T, result)  # of every rank: one that failed has raised


def describe_error(error: BaseException) -> str:
    """A user's error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def exit_at_once(status: int) -> NoReturn:
    """End the process without the interpreter's shutdown, which may wait for threads or for ranks that have died."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of the stream may have ended
            stream.flush()
    os._exit(status)


def tell_torchrun(message: str) -> None:
    """Write the error file of torch.distributed.elastic. torchrun prints it at the end of its summary."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):  # a full disk must not hide the error itself
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def set_up_allocator() -> None:
    """Let the memory segments of CUDA grow, unless the user has configured the allocator. Call it before CUDA starts.

    The number of masked positions changes with every micro-batch, which would fragment segments of a fixed size.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def init_world(timeout: float = 30.0, logs: Path | None = None) -> World:
    """Join the process group that torchrun describes, or make a group of one rank when started with plain `python`.

    timeout: minutes after which a collective fails. logs: folder for the dumps of NCCL's flight recorder. Raises
    ValueError.
    """
    launched = "RANK" in os.environ
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    if launched and sys.platform == "linux":
        # Kill this rank when its launcher dies: an orphan would still write into the run folder.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        # Gloo has a connection to every rank in each of two groups, the loop's and the checkpoint writer's: at 1,000
        # ranks more than the usual soft limit.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        check_launcher()
    if torch.cuda.is_available():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count()
        if here > gpus:
            raise ValueError(
                f"{here} ranks on a node with {gpus} GPUs: start {gpus}, or hide them (CUDA_VISIBLE_DEVICES=)"
            )
        if logs is not None:
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
            dump = os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(logs / "nccl-trace-"))  # NCCL appends the rank
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", dump)
        set_up_allocator()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    longest = timedelta(minutes=timeout)
    dist.init_process_group(backend, store=meeting_point("ranks"), rank=rank, world_size=size, timeout=longest)
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp_shard",))
    # The default group has a gloo part on CUDA too. Another group would be a connection to every rank once more.
    everyone = dist.group.WORLD
    assert everyone is not None
    return World(rank, size, device, mesh, everyone)


def use_deterministic_algorithms() -> None:
    """Make torch use only algorithms that give the same bits each time. Call this before CUDA starts.

    An operation that has no such algorithm then raises RuntimeError. What torch does with this setting:
    docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS may use its workspaces in any order
    torch.use_deterministic_algorithms(True)
    # By default, torch would then also fill uninitialised memory. That only helps to find errors, and takes time.
    torch._C._set_deterministic_fill_uninitialized_memory(False)


def check_launcher() -> None:
    """Check that torchrun still runs. Raises ValueError if it has ended while this rank was starting.

    torchrun may end before `init_world` arranges that this rank is killed with it. The orphan would then try to reach
    torchrun's store until the timeout. torchrun opens the store before it starts the ranks.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(place, timeout=60).close()
        except OSError as error:
            where = f"{place[0]}:{place[1]}"
            raise ValueError(f"torchrun at {where} has ended ({describe_error(error)}): start it again") from None


def set_timeout(mesh: DeviceMesh, minutes: float) -> None:
    """Set the time after which a collective of the mesh fails. New groups do not inherit init_world's timeout."""
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def meeting_point(name: str) -> dist.Store:
    """A new connection to the key value store that all ranks share. name: a prefix for its keys.

    torchrun keeps its store when it restarts the ranks, and the store still has the addresses of the old processes. So
    each attempt has its own prefix.
    """
    if "RANK" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
