"""Write and read tensors in safetensors files, one tensor at a time, on a disk or in an object store.

The format (github.com/huggingface/safetensors): the length of the header in 8 bytes, the header in JSON, the data. The
safetensors library is not used here: its writer needs all tensors of a file in memory, and its reader needs a file on
a disk.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mdmtrain.checkpoint.layout import TORCH_DTYPES, Layout, chunk
from mdmtrain.checkpoint.storage import storage_errors, storage_of
from mdmtrain.optim import local


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as safetensors stores them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def file_blocks(header: dict, read: Callable[[str], Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a file with this header, one tensor at a time. read: returns the tensor of a name, on the CPU."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, entry in header.items():
        if name != "__metadata__":
            content = tensor_bytes(read(name))
            first, end = entry["data_offsets"]
            assert len(content) == end - first, name
            yield content
            del content  # frees the memory before the next tensor is read


def write_file(file: Path, blocks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file and flush it to the storage. Returns its size in bytes and its checksum (see `storage.checksum`).

    The checksum is of the bytes that were passed to the operating system. The file is not read back: from a disk, this
    would only read the page cache, and from an object store it would be a download. Raises OSError.
    """
    size, value = 0, 0
    with storage_errors(file), file.open("wb") as stream:
        for block in blocks:
            stream.write(block)
            value = zlib.crc32(block, value)
            size = size + len(block)
            del block  # frees the memory before the next block is made
        storage_of(file).sync(stream)
    return size, f"{value:08x}"


class TensorReader:
    """Reads selected rows of a checkpoint's tensors. It does not read the other parts of the files."""

    def __init__(self, folder: Path, layout: Layout):
        self._folder = folder
        self._layout = layout
        self._headers: dict[int, tuple[dict, int]] = {}

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Read values into tensors: into this rank's shards, or into whole tensors.

        Raises OSError, and ValueError if a tensor is missing or has another shape, or if a file is damaged.
        """
        by_file: dict[int, list[tuple[int, str, Tensor]]] = {}
        for name, tensor in tensors.items():
            if name not in self._layout.tensors:
                raise ValueError(f"{name} is missing")
            entry = self._layout.tensors[name]
            part = local(tensor)
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{name} has shape {[*entry.shape]} in the checkpoint, not {[*tensor.shape]}")
            part = part if entry.shape else part.view(1)
            mine = own_rows(tensor) if isinstance(tensor, DTensor) else range(entry.rows)
            assert len(mine) == len(part), name
            for number, rows, held_from in self._layout.pieces(name, mine):
                target = part[rows.start - mine.start : rows.stop - mine.start]
                by_file.setdefault(number, []).append(((rows.start - held_from) * entry.row_bytes, name, target))
        for number, pieces in sorted(by_file.items()):
            with storage_errors(self._folder), (self._folder / self._layout.file_name(number)).open("rb") as stream:
                header, data = self._header(number, stream)
                for start, name, target in sorted(pieces, key=lambda p: header[p[1]]["data_offsets"][0] + p[0]):
                    stream.seek(data + header[name]["data_offsets"][0] + start)
                    target.copy_(self._values(number, stream, self._layout.tensors[name].dtype, target))

    def whole(self, name: str) -> Tensor:
        """All of a tensor, on the CPU. Raises as `read` does."""
        if name not in self._layout.tensors:
            raise ValueError(f"{name} is missing")
        entry = self._layout.tensors[name]
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.read({name: tensor})
        return tensor

    def _header(self, number: int, stream: IO) -> tuple[dict, int]:
        """The header of a file, and the offset of its data. Raises ValueError if the header differs from the layout."""
        if number not in self._headers:
            expected = self._layout.header(number)
            length = int.from_bytes(stream.read(8), "little")
            # The limit rejects a damaged length. It leaves room for JSON with more spaces than ours.
            text = stream.read(length) if length <= 4 * len(json.dumps(expected)) + 4096 else b""
            try:
                found = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
            except (ValueError, AttributeError):
                found = None
            if found != expected:
                raise ValueError(f"{self._layout.file_name(number)} is damaged: its header differs from meta.json")
            self._headers[number] = expected, 8 + length
        return self._headers[number]

    def _values(self, number: int, stream: BufferedIOBase, dtype: str, like: Tensor) -> Tensor:
        """The next values of a file, in the shape of `like`."""
        values = torch.empty(like.shape, dtype=TORCH_DTYPES[dtype])
        if stream.readinto(tensor_bytes(values)) != values.nbytes:
            raise ValueError(f"{self._layout.file_name(number)} is damaged: it is truncated")
        return values


def own_rows(tensor: DTensor) -> range:
    """The rows of a tensor on this rank: FSDP2 shards dimension 0 over the last dimension of the mesh."""
    assert tensor.placements[-1].is_shard(0), tensor.placements
    return chunk(tensor.shape[0], tensor.device_mesh.size(-1), tensor.device_mesh.get_local_rank(-1))
