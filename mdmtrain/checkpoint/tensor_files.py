"""Tensors in safetensors files, written and read one by one, on a disk or in an object store.

The format (github.com/huggingface/safetensors): the length of the header in 8 bytes, the header in JSON, the data. The
library's own writer wants all tensors of a file at once, and its reader a file on a disk.
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
    """The content of a file with this header, a tensor at a time. read: the tensor of a name, on the CPU."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, entry in header.items():
        if name != "__metadata__":
            content = tensor_bytes(read(name))
            first, end = entry["data_offsets"]
            assert len(content) == end - first, name
            yield content
            del content  # before the next one comes


def write_file(file: Path, blocks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file to the disk itself; its size in bytes and its checksum (see `storage.checksum`). Raises OSError.

    The checksum is of what was given to the operating system. Reading the file back would compare it with the page
    cache, which is no test of the disk either, and from an object store it would be a download.
    """
    size, value = 0, 0
    with storage_errors(file), file.open("wb") as stream:
        for block in blocks:
            stream.write(block)
            value, size = zlib.crc32(block, value), size + len(block)
            del block  # before the next one comes
        storage_of(file).sync(stream)
    return size, f"{value:08x}"


class TensorReader:
    """Reads any rows of a checkpoint's tensors, and nothing else of its files."""

    def __init__(self, folder: Path, layout: Layout):
        self._folder, self._layout = folder, layout
        self._headers: dict[int, tuple[dict, int]] = {}

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors: this rank's shards, or whole ones. Raises ValueError if the files are damaged, OSError."""
        by_file: dict[int, list[tuple[int, str, Tensor]]] = {}
        for name, tensor in tensors.items():
            if name not in self._layout.tensors:
                raise ValueError(f"{name} is not in it")
            entry, part = self._layout.tensors[name], local(tensor)
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{name} is {[*entry.shape]} in it, not {[*tensor.shape]}")
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
            raise ValueError(f"{name} is not in it")
        entry = self._layout.tensors[name]
        tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.read({name: tensor})
        return tensor

    def _header(self, number: int, stream: IO) -> tuple[dict, int]:
        """A file's header, and where its data begins. It says what the index of the checkpoint says."""
        if number not in self._headers:
            expected = self._layout.header(number)
            length = int.from_bytes(stream.read(8), "little")
            # So long at most: with every name and number in it, and JSON that is written with more space than ours.
            text = stream.read(length) if length <= 4 * len(json.dumps(expected)) + 4096 else b""
            try:
                found = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
            except (ValueError, AttributeError):
                found = None
            if found != expected:
                raise ValueError(f"{self._layout.file_name(number)} is damaged: its header is not what was written")
            self._headers[number] = expected, 8 + length
        return self._headers[number]

    def _values(self, number: int, stream: BufferedIOBase, dtype: str, like: Tensor) -> Tensor:
        """The next values of a file, in the shape of `like`."""
        values = torch.empty(like.shape, dtype=TORCH_DTYPES[dtype])
        if stream.readinto(tensor_bytes(values)) != values.nbytes:
            raise ValueError(f"{self._layout.file_name(number)} is damaged: it ends too early")
        return values


def own_rows(tensor: DTensor) -> range:
    """The rows of a tensor that this rank has: FSDP2 shards dimension 0 over the last dimension of the mesh."""
    assert tensor.placements[-1].is_shard(0), tensor.placements
    return chunk(tensor.shape[0], tensor.device_mesh.size(-1), tensor.device_mesh.get_local_rank(-1))
