"""Where a checkpoint's rows are: what any number of ranks writes, any other number reads, bit for bit."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mdmtrain.checkpoint.layout import DTYPES, Layout, chunk, divide
from mdmtrain.checkpoint.tensor_files import TensorReader, file_blocks, write_file

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.tuples(st.integers(0, 40), st.integers(1, 3))
TENSORS = st.lists(st.tuples(SHAPES, st.sampled_from(list(DTYPES)), st.booleans()), min_size=1, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def numbered(shape: tuple[int, ...], dtype: torch.dtype, first: int) -> torch.Tensor:
    """Values that no other element nearby has, as far as the dtype goes."""
    return (torch.arange(torch.Size(shape).numel()) + first).reshape(shape).to(dtype)


def written(folder: Path, tensors: dict, sharded: set, copies: int, shards: int) -> Layout:
    """The files that copies x shards ranks write."""
    layout = divide(tensors, sharded, copies, shards)
    for number in range(copies * shards):

        def part(name: str, shard: int = number % shards) -> torch.Tensor:
            """What the rank holds of a tensor, as FSDP2 shards it: torch.chunk, and empty shards after its last one."""
            if name not in sharded:
                return tensors[name]
            whole = tensors[name]
            parts = whole.chunk(shards) if len(whole) else ()
            return parts[shard] if shard < len(parts) else whole[:0]

        write_file(folder / layout.file_name(number), file_blocks(layout.header(number), part))
    return Layout.from_json(json.loads(json.dumps(layout.to_json())))


@given(tensors=TENSORS, copies=st.integers(1, 4), shards=st.integers(1, 9), readers=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_what_is_read_is_what_was_written(tmp_path_factory, tensors, copies, shards, readers):
    """All shapes (empty and scalar ones too) and dtypes; the whole tensor, and each of the shards of `readers` ranks.

    A floor instead of the ceiling in the chunks, a copy that is not written, or an offset that forgets an empty shard
    would differ.
    """
    folder = tmp_path_factory.mktemp("files")
    sharded = {f"t{n}" for n, (shape, _, divided) in enumerate(tensors) if divided and shape}
    values = {f"t{n}": numbered(shape, dtype, 7 * n) for n, (shape, dtype, _) in enumerate(tensors)}
    layout = written(folder, values, sharded, copies, shards)
    reader = TensorReader(folder, layout)
    for name, value in values.items():
        whole = reader.whole(name)
        assert whole.dtype == value.dtype and torch.equal(whole, value), name
        for number in range(readers if value.ndim else 0):
            rows = chunk(len(value), readers, number)
            assert [*rows] == [r for file, held, _ in layout.pieces(name, rows) for r in held]
            places = [layout.tensors[name].rows_in(file) for file, _, _ in layout.pieces(name, rows)]
            assert all(len(held) > 0 for held in places), "a file is opened that has none of the rows"
    # Other programs read them too; every row is in one file, once.
    files = [load_file(folder / layout.file_name(number)) for number in range(copies * shards)]
    for name, value in values.items():
        parts = [file[name] for file in files if name in file]
        assert len(parts) == (shards if name in sharded else 1)
        assert torch.equal(torch.cat(parts) if value.ndim else parts[0], value)


@given(rows=st.integers(0, 200), parts=st.integers(1, 40))
def test_chunks_are_those_of_torch(rows, parts):
    theirs = [part.tolist() for part in torch.arange(rows).chunk(parts)] if rows else []
    theirs += [[]] * (parts - len(theirs))
    assert [[*chunk(rows, parts, number)] for number in range(parts)] == theirs


@pytest.mark.parametrize("copies", [1, 2, 5, 16])
def test_copies_share_the_writing_by_bytes(copies):
    """No rank writes more than its share and one tensor's shard (the tensors here have very different sizes)."""
    tensors = {f"t{n}": torch.empty((16 * (1 + n % 27) ** 2, 4), device="meta") for n in range(300)}
    layout = divide(tensors, tensors, copies, 8)
    ends = [[0, *(entry["data_offsets"][1] for entry in layout.header(n).values())] for n in range(8 * copies)]
    sizes = [max(one) for one in ends]
    total, largest = (f(t.nbytes for t in tensors.values()) for f in (sum, max))
    assert sum(sizes) == total and max(sizes) <= total / (8 * copies) + largest / 8


def test_damage_is_said(tmp_path):
    """A header of another file or of nonsense, a file cut short, a tensor that is not there, another shape."""
    values = {"a": torch.ones(6, 2), "b": torch.zeros(3)}
    layout = written(tmp_path, values, {"a"}, 1, 2)
    files = [tmp_path / layout.file_name(number) for number in (0, 1)]
    good = [file.read_bytes() for file in files]
    for content, problem in (
        (bytes(len(good[1])), "header"),
        (b"\xff" * len(good[1]), "header"),
        (good[0], "header"),
        (good[1][:-1], "is truncated"),
    ):
        files[1].write_bytes(content)
        with pytest.raises(ValueError, match=f"shard-00002-of-00002.safetensors is damaged: .*{problem}"):
            TensorReader(tmp_path, layout).whole("a")
    with pytest.raises(ValueError, match="c is missing"):
        TensorReader(tmp_path, layout).whole("c")
    with pytest.raises(ValueError, match=r"b has shape \[3\] in the checkpoint, not \[4\]"):
        TensorReader(tmp_path, layout).read({"b": torch.zeros(4)})
