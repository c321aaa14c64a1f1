"""Read checkpoints of format version 1. Their tensors were written by torch.distributed.checkpoint (DCP).

The index of DCP is unpickled, so load only checkpoints that you trust.
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

from mdmtrain.files import on_disk

# Hide DCP's warnings about its internals, in the whole process, because `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")


def _reader(folder: Path) -> dcp.StorageReader:
    return dcp.FileSystemReader(folder) if on_disk(folder) else FsspecReader(str(folder))


def load(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Read values into the named tensors, with any sharding. A collective. Raises ValueError on every rank."""
    try:
        dcp.load(tensors, storage_reader=_reader(folder), process_group=group)
    except dcp.CheckpointException as error:  # not RuntimeError, which means that a rank has died
        cause = next(iter(error.failures.values()))[0] if error.failures else error
        raise ValueError(str(cause)) from None


def open_tensors(folder: Path) -> Callable[[str], Tensor]:
    """A function that reads a whole tensor by its name. If a file is damaged, unpickling may raise any exception."""
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
