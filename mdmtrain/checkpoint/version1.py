"""Checkpoints of format version 1, whose tensors torch.distributed.checkpoint (DCP) wrote: read, and no longer written.

DCP's index is unpickled, so such a checkpoint must be one that you trust.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mdmtrain.checkpoint.storage import on_disk

# DCP's notes on its own internals. For the whole process: `catch_warnings` is not made for threads.
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")


def _reader(folder: Path) -> dcp.StorageReader:
    return dcp.FileSystemReader(folder) if on_disk(folder) else FsspecReader(str(folder))


def load(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Fill the named tensors, sharded in whatever way. A collective. Raises ValueError on every rank."""
    try:
        dcp.load(tensors, storage_reader=_reader(folder), process_group=group)
    except dcp.CheckpointException as error:  # a RuntimeError: a rank has died
        cause = next(iter(error.failures.values()))[0] if error.failures else error
        raise ValueError(str(cause)) from None


def open_tensors(folder: Path) -> Callable[[str], Tensor]:
    """A function that reads all of a tensor, by its name. Raises whatever unpickling meets in a damaged file."""
    reader = _reader(folder)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, True)

    def read(name: str) -> Tensor:
        entry = index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        planner = DefaultLoadPlanner()
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner.set_up_planner({name: tensor}, index, True)
        reader.read_data(planner.create_local_plan(), planner).wait()
        return tensor

    return read
