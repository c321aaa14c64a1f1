"""Compute which file of a checkpoint has which rows of each tensor. This module reads and writes no files.

A sharded tensor is divided over dimension 0 as in FSDP2: into chunks of ceil(rows / shards) rows. The last chunks may
be short or empty. Each rank writes one file, so the chunks of a tensor are in consecutive files. With HSDP, only one
replica writes a tensor, and all replicas write about the same number of bytes.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of the dtypes in safetensors files."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def chunk(rows: int, parts: int, number: int) -> range:
    """The rows of part `number` of `parts`, as torch.chunk and FSDP2 divide them."""
    size = -(-rows // parts)
    return range(min(number * size, rows), min((number + 1) * size, rows))


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint. A scalar counts as one row."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    first: int  # number of the file that contains its first rows, from 0
    files: int  # number of consecutive files that contain its rows

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize * torch.Size(self.shape[1:]).numel()

    def rows_in(self, file: int) -> range:
        """The rows of the tensor that a file contains."""
        return chunk(self.rows, self.files, file - self.first) if 0 <= file - self.first < self.files else range(0)


@dataclass(frozen=True)
class Layout:
    """All tensors of a checkpoint, and the number of its files."""

    tensors: dict[str, Entry]
    files: int

    def to_json(self) -> dict:
        return {"files": self.files, "tensors": {name: asdict(entry) for name, entry in self.tensors.items()}}

    @classmethod
    def from_json(cls, value: dict) -> "Layout":
        """Raises ValueError, KeyError or TypeError if the value was not made by `to_json`."""
        entries = {name: Entry(**{**e, "shape": tuple(e["shape"])}) for name, e in value["tensors"].items()}
        if unknown := {entry.dtype for entry in entries.values()} - TORCH_DTYPES.keys():
            raise ValueError(f"unknown dtype {unknown.pop()}")
        return cls(entries, value["files"])

    def file_name(self, file: int) -> str:
        return f"shard-{file + 1:05d}-of-{self.files:05d}.safetensors"

    def header(self, file: int) -> dict[str, dict]:
        """The header of a file, as the safetensors format defines it: dtype, shape and offsets of each tensor."""
        header, offset = {}, 0
        for name, entry in self.tensors.items():
            if entry.first <= file < entry.first + entry.files:
                rows = len(entry.rows_in(file))
                size = rows * entry.row_bytes
                shape = [rows, *entry.shape[1:]] if entry.shape else []
                header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
        return header

    def pieces(self, name: str, wanted: range) -> Iterator[tuple[int, range, int]]:
        """Find the wanted rows of a tensor. Yields (file, the wanted rows in this file, the first row in this file)."""
        entry = self.tensors[name]
        size = -(-entry.rows // entry.files)
        if len(wanted):
            for number in range(wanted.start // size, (wanted.stop - 1) // size + 1):
                held = entry.rows_in(entry.first + number)
                rows = range(max(wanted.start, held.start), min(wanted.stop, held.stop))
                yield entry.first + number, rows, held.start


def divide(tensors: Mapping[str, Tensor], sharded: Container[str], copies: int, shards: int) -> Layout:
    """The layout for `copies` x `shards` ranks that write one file each. Uses only shapes and dtypes of the tensors.

    copies: number of replicas. sharded: names of the tensors that are sharded over the ranks of a replica. Each other
    tensor is written as a whole, by the first rank of a replica.
    """
    # The format allows no gaps between tensors. If the widest dtypes come first, all tensors are aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    entries, before = {}, 0
    for name, tensor in ordered:
        copy = min(before * copies // max(total, 1), copies - 1)
        files = shards if name in sharded else 1
        entries[name] = Entry(DTYPES[tensor.dtype], tuple(tensor.shape), copy * shards, files)
        before += tensor.numel() * tensor.dtype.itemsize
    return Layout(entries, copies * shards)
