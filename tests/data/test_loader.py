"""A row is a function of (seed, step, slot): the same on any ranks, micro-batches, workers and from any first step."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mdmtrain import config as configuration
from mdmtrain.data.loader import Batch, open_sources, train_loader, validation_rows
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion import noise


@pytest.fixture
def make(small_run):
    def config(run=None, data=None):
        return configuration.validate(small_run({"run": run or {}, "data": data or {}}), "test")

    return config


def batches(config, world_size=1, rank=0, first_step=0) -> list[Batch]:
    plan = configuration.resolve(config, world_size)
    sources = open_sources(config.data, "train")
    return list(train_loader(config, plan, rank, sources, first_step, pin_memory=False))


def rows(config, world_size=1, first_step=0) -> dict:
    """(step, slot) -> everything about the row."""
    found = {}
    per_step = configuration.resolve(config, world_size).accumulation
    for rank in range(world_size):
        for i, batch in enumerate(batches(config, world_size, rank, first_step)):
            for row, slot in enumerate(batch.slots.tolist()):
                segments = np.where(batch.eligible[row].numpy(), 0, -1).astype(np.int32)
                segments = segments if batch.segments is None else batch.segments[row].numpy()
                fields = [batch.ids[row], batch.eligible[row], batch.uniforms[row], batch.samples[row]]
                key = (first_step + i // per_step, slot)
                assert key not in found
                found[key] = [*(field.numpy().tobytes() for field in fields), segments.tobytes()]
    return found


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_row_is_a_function_of_seed_step_and_slot(make, document_mask):
    data = {"document_mask": document_mask, "random_length_fraction": 0.3}
    base = rows(make({"steps": 6}, data))
    assert sorted(base) == [(step, slot) for step in range(6) for slot in range(16)]
    assert rows(make({"steps": 6, "micro_batch": 16}, data)) == base
    assert rows(make({"steps": 6, "micro_batch": 1}, {**data, "workers": 2, "prefetch": 1}), world_size=2) == base
    assert rows(make({"steps": 6}, {**data, "workers": 2}), world_size=4) == base
    late = rows(make({"steps": 6}, {**data, "workers": 1}), world_size=2, first_step=4)
    assert late == {key: row for key, row in base.items() if key[0] >= 4}
    assert rows(make({"steps": 6, "seed": 6}, data)) != base


def test_rows_are_windows_of_the_stream_each_once_an_epoch(make):
    config = make({"steps": 600}, {"random_length_fraction": 0.0})
    split = open_sources(config.data, "train")[0]
    count = split.tokens // 64
    assert count < 16 * 600  # the run is longer than an epoch
    seen = []
    for batch in batches(config):
        assert batch.segments is None and batch.eligible.all() and batch.ids.dtype == torch.int64
        for ids, (source, window) in zip(batch.ids.numpy(), batch.samples.tolist(), strict=True):
            assert source == 0
            seen.append(window)
            if len(seen) % 37 == 0:
                assert (ids == split.read(window * 64, 64)).all()
    assert sorted(seen[:count]) == list(range(count))
    assert len(set(seen[count:])) == len(seen[count:]) and seen[count : count + 50] != seen[:50]


def test_short_rows_are_padded_at_the_stated_rate_and_lengths(make):
    config = make({"steps": 150, "micro_batch": 16}, {"random_length_fraction": 0.25})
    split = open_sources(config.data, "train")[0]
    lengths = []
    for batch in batches(config):
        pads = torch.arange(64) >= batch.eligible.sum(dim=1, keepdim=True)
        assert (batch.eligible == ~pads).all()
        assert (batch.ids[pads] == split.pad_id).all() and not (batch.ids[~pads] == split.pad_id).any()
        assert (batch.segments is None) == (not pads.any())
        if batch.segments is not None:
            assert batch.segments.dtype == torch.int32
            assert (batch.segments == torch.where(pads, -1, 0)).all()
        lengths += batch.eligible.sum(dim=1).tolist()
    short = [length for length in lengths if length < 64]
    assert set(lengths) == {4 * k for k in range(1, 17)}
    assert abs(len(short) / len(lengths) - 0.25 * 15 / 16) < 4 * np.sqrt(0.25 * 0.75 / len(lengths))


def test_rows_shorter_than_sixteen_tokens_have_a_token(make):
    config = make({"steps": 20}, {"random_length_fraction": 1.0, "sequence_length": 5})
    lengths = {length for batch in batches(config) for length in batch.eligible.sum(dim=1).tolist()}
    assert lengths == {1, 2, 3, 4, 5}


def test_segments_are_the_documents_of_the_window(make):
    config = make({"steps": 60}, {"document_mask": True, "random_length_fraction": 0.2})
    split, several = open_sources(config.data, "train")[0], 0
    for batch in batches(config):
        lengths = batch.eligible.sum(dim=1).tolist()
        for ids, segments, length in zip(batch.ids, batch.segments, lengths, strict=True):
            starts = ids[:length] == split.bos_id
            starts[0] = False
            assert (segments[:length] == starts.cumsum(0)).all() and (segments[length:] == -1).all()
            several += bool(segments.max() > 0)
    assert several > 5


def test_uniforms_are_the_position_noise_of_step_and_slot(make):
    batch = batches(make({"steps": 6}), first_step=2)[1]
    assert batch.uniforms.dtype == torch.float32
    assert (batch.uniforms.numpy() == noise.position_uniforms(5, 2, np.arange(4, 8), 64)).all()


def test_a_finished_run_has_no_batches(make):
    assert batches(make({"steps": 6}, {"workers": 1}), first_step=6) == []


@pytest.fixture
def second(corpus, tmp_path) -> Path:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i}\n" * 100)
    files = sorted(tmp_path.glob("*.txt"))
    prepare(files, tmp_path / "second", Options(tokenizer=str(corpus), validation_fraction=0.3), 1)
    return tmp_path / "second"


def test_sources_mix_by_weight_and_share_a_tokenizer(make, corpus, second, tmp_path):
    sources = [{"path": str(corpus), "weight": 3.0}, {"path": str(second), "weight": 1.0}]
    config = make({"steps": 30}, {"sources": sources, "random_length_fraction": 0.0})
    opened = open_sources(config.data, "train")
    source = []
    for batch in batches(config):
        for ids, (one, window) in zip(batch.ids.numpy(), batch.samples.tolist(), strict=True):
            source.append(one)
            assert (ids == opened[one].read(window * 64, 64)).all()
    ones = np.cumsum(source)
    assert np.abs(ones - np.arange(1, len(ones) + 1) / 4).max() < 1

    files = sorted(tmp_path.glob("*.txt"))
    Tokenizer.train(["other text " * 300], 265, tmp_path / "other.model")
    prepare(files, tmp_path / "third", Options(tokenizer=str(tmp_path / "other.model"), validation_fraction=0.3), 1)
    mixed = make({}, {"sources": [*sources, {"path": str(tmp_path / "third")}]})
    with pytest.raises(ValueError, match=r"third and .*corpus have different tokenizers"):
        open_sources(mixed.data, "train")


def test_rows_longer_than_a_split_are_refused(make, corpus):
    config = make({}, {"sequence_length": 10**7})
    with pytest.raises(ValueError, match=r"the train split has [\d,]+ tokens, not one row"):
        open_sources(config.data, "train")
    with pytest.raises(ValueError, match=r"the validation split has [\d,]+ tokens, not one row"):
        validation_rows(PreparedSplit(corpus, "validation"), 4, 10**7, False)


def test_an_altered_shard_stops_the_start(make, second):
    config = make({}, {"sources": [{"path": str(second)}]})
    file = second / "train-00000.bin"
    file.write_bytes(b"\x09" + file.read_bytes()[1:])
    open_sources(config.data, "train", verify="size")
    with pytest.raises(ValueError, match="altered"):
        open_sources(config.data, "train")


def test_validation_rows_are_spread_over_the_split(corpus):
    split = PreparedSplit(corpus, "validation")
    count = split.tokens // 64
    every, eligible, none = validation_rows(split, 10**6, 64, document_mask=False)
    assert none is None and eligible.all() and (every.flatten().numpy() == split.read(0, count * 64)).all()
    some, _, segments = validation_rows(split, 60, 64, document_mask=True)
    assert some.shape == segments.shape == (60, 64) and segments.dtype == torch.int32
    assert [int(torch.nonzero((every == row).all(1))[0]) for row in some] == [r * count // 60 for r in range(60)]
    segments = validation_rows(split, 10**6, 64, document_mask=True)[2]
    bos = every[:, 1:] == split.bos_id
    assert (segments[:, 1:] == bos.cumsum(1)).all() and (segments[:, 0] == 0).all() and bos.any()


def test_workers_leave_signals_to_the_parent_and_die_with_it(make):
    """A process with loader workers: signals to the workers change nothing, SIGKILL of the process ends them."""
    config = make({"steps": 1000}, {"workers": 2})
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        iterator = iter(
            train_loader(config, configuration.resolve(config, 1), 0, open_sources(config.data, "train"), 0, False)
        )
        next(iterator)
        workers = [w.pid for w in iterator._workers]
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                os.kill(worker, number)
        for _ in range(50):
            next(iterator)
        os.write(write, " ".join(map(str, workers)).encode())
        time.sleep(60)
        os._exit(0)
    try:
        os.close(write)
        workers = os.read(read, 100).decode().split()
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    assert len(workers) == 2
    deadline = time.monotonic() + 3  # torch's own watchdog takes 5 s
    while any(Path(f"/proc/{pid}").exists() and "Z (" not in _state(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text().split("State:")[1].strip()
    except OSError:
        return "Z ("
