"""A prepared folder in an object store: it reads as from a disk, and what fails is one clear line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdmtrain import config as configuration
from mdmtrain.data import remote
from mdmtrain.data.cache import ShardCache
from mdmtrain.data.checks import cache_need, describe_cache
from mdmtrain.data.loader import Dataset, check_splits, open_splits, train_loader
from mdmtrain.data.order import Cursor
from mdmtrain.data.shards import PreparedSplit, is_prepared
from tests.conftest import SOAK
from tests.s3 import s3  # noqa: F401

# The corpus of tests/conftest.py has shards of at most 100,000 tokens, two bytes each.


@pytest.fixture(scope="module")
def url(s3, corpus) -> str:  # noqa: F811
    return s3.upload(corpus)


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10_000_000)


@pytest.fixture
def make(small_run, tmp_path):
    def config(path: str, run: dict | None = None, **data) -> configuration.Config:
        where = {"sources": [{"path": path}], "cache_dir": str(tmp_path / "cache"), **data}
        return configuration.validate(small_run({"data": where, "run": run or {}}), "test")

    return config


def test_a_split_reads_as_from_a_disk(url, corpus, cache):
    assert is_prepared(url) and not is_prepared(f"{url}/train-00000.bin")
    for name in ("train", "validation"):
        there, here = PreparedSplit(url, name, cache=cache), PreparedSplit(corpus, name)
        assert there.fingerprint == here.fingerprint and there.tokenizer().sha256 == here.tokenizer().sha256
        assert name == "validation" or there.shards > 3
        for start in range(0, there.tokens - 700, there.tokens // 13):
            assert (there.read(start, 700) == here.read(start, 700)).all()
            assert (there.documents_in(start, 700) == here.documents_in(start, 700)).all()
    assert url == str(there.folder)


def test_only_what_is_read_is_copied(url, cache):
    split = PreparedSplit(url, "train", cache=cache)
    split.read(5, 10)
    assert [path.name[65:] for path in cache.folder.iterdir() if path.name != ".lock"] == ["train-00000.bin"]


def batches(config: configuration.Config) -> list:
    splits = open_splits(config.data, ("train", "validation"))
    check_splits(splits, ("size", "size"))
    plan = configuration.resolve(config, 1)
    return list(train_loader(config, plan, 0, splits[0], 0, False, validation=splits[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_those_from_a_disk_with_a_cache_of_the_stated_size(url, corpus, make, tmp_path, workers):
    """Two shards at a time, in a cache that holds just what describe_cache says. The run reads each shard again."""
    data = {"shuffle_shards": 2, "document_mask": True, "workers": workers, "random_length_fraction": 0.0}
    data["sequence_length"], run = 256, {"steps": 150, "micro_batch": 16}
    there, here = make(url, run, **data), make(str(corpus), run, **data)
    sources, validation = open_splits(there.data, ("train", "validation"))
    with pytest.raises(ValueError, match=r"more than data.cache_gb=0.0001: raise it, or lower data.shuffle_shards"):
        describe_cache(make(url, run, **data, cache_gb=1e-4), sources, validation)
    need = sum(int(split.row_bytes(True).sum()) for split in validation)
    need += 2 * int(np.sort(sources[0].row_bytes(True))[-2:].sum())
    there = make(url, run, **data, cache_gb=need / 1e9)
    (line,) = describe_cache(there, sources, validation)
    assert "twice data.shuffle_shards=2 shards of each source" in line
    assert sources[0].row_bytes(True).sum() + sum(v.row_bytes(True).sum() for v in validation) > need  # not all fits
    read = 0
    for mine, theirs in zip(batches(there), batches(here), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        read += len(mine.ids)
    assert read == 150 * 16 and read * 256 > 1.2 * sources[0].tokens
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= need


@settings(max_examples=200 if SOAK else 20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read_ahead_has_what_the_steps_read_and_no_more_than_stated(data, url, cache, small_run):
    """Against the rows themselves, with phases, from any step, after any change of the batch."""
    draw, together = data.draw, data.draw(st.sampled_from([None, 1, 2, 3]))
    steps = draw(st.integers(1, 300))
    phases = [{"from_step": at, "weights": draw(st.sampled_from([[1, 3], [1, 0], [2, 1]]))}
              for at in sorted(draw(st.sets(st.integers(1, 300), max_size=2)))]  # fmt: skip
    tree = small_run({
        "run": {"steps": steps},
        "data": {"sources": [{"path": url}, {"path": url}], "phases": phases, "shuffle_shards": together,
                 "cache_dir": str(cache.folder), "random_length_fraction": 0.0},
    })  # fmt: skip
    config = configuration.validate(tree, "test")
    sources, validation = ([PreparedSplit(url, name, None, cache=cache)] * 2 for name in ("train", "validation"))
    first = draw(st.integers(0, steps - 1))
    began = tuple(100 * n for n, phase in enumerate(phases) if phase["from_step"] < first)
    dataset = Dataset(config, sources, Cursor(first, draw(st.integers(200, 20_000)) if first else 0, 0, began))
    step = draw(st.integers(first, steps - 1))
    listed = dataset._ahead.files(step)
    assert sum(file.size for file in set(listed)) <= cache_need(config, sources, validation)
    for number, rows in enumerate(_rows(dataset, step)):
        for row in rows:
            first_token = row * 64
            if together:
                firsts = dataset._first_rows[number]
                shard = int(np.searchsorted(firsts, row, side="right")) - 1
            else:
                shard = int(np.searchsorted(sources[number].first_tokens, first_token, side="right")) - 1
            assert sources[number].remote_files(shard, False)[0] in listed


def _rows(dataset: Dataset, step: int) -> list[list[int]]:
    """The rows of each source that a step reads."""
    first = dataset._cursor.at(step, dataset._slots_per_step, 0).sample
    source, row = dataset.order(first + np.arange(dataset._slots_per_step))
    return [row[source == number].tolist() for number in range(2)]


def refused(act) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_or_cut_is_found_before_training(s3, corpus, cache, make, tmp_path):  # noqa: F811
    assert "give data.cache_dir" in refused(lambda: PreparedSplit("s3://bucket/x", "train"))
    assert "s3://bucket/x/manifest.json: no such file or folder" in refused(
        lambda: PreparedSplit("s3://bucket/x", "train", cache=cache)
    )
    url = s3.upload(corpus)
    shard = f"{url}/train-00001.bin"
    whole = s3.read(shard)
    s3.write(shard, whole[:-2])
    words = f"{shard} has {len(whole) - 2:,} bytes, the manifest says {len(whole):,}"
    assert words in refused(lambda: PreparedSplit(url, "train", cache=cache))
    s3.remove(shard)
    assert f"{shard} is missing" in refused(lambda: PreparedSplit(url, "train", cache=cache))
    s3.write(shard, whole)
    s3.write(f"{url}/tokenizer.model", b"other")
    split = PreparedSplit(url, "train", cache=cache)
    assert "tokenizer" in refused(split.tokenizer)
    manifest = s3.read(f"{url}/manifest.json")
    s3.write(f"{url}/manifest.json", manifest[:-9])
    assert "manifest.json is damaged" in refused(lambda: PreparedSplit(url, "train", cache=cache))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_changes_during_the_run_is_found_when_it_arrives(s3, corpus, make, workers):  # noqa: F811
    """In the training process, or in a loader's process: the same line."""
    from mdmtrain.data.loader import loader_errors

    url = s3.upload(corpus)
    config = make(url, {"steps": 6}, workers=workers)
    splits = open_splits(config.data, ("train", "validation"))
    check_splits(splits, ("size", "size"))
    plan = configuration.resolve(config, 1)
    for number in range(splits[0][0].shards):
        shard = f"{url}/train-{number:05d}.bin"
        s3.write(shard, bytes([s3.read(shard)[0] ^ 1]) + s3.read(shard)[1:])

    def read() -> None:
        with loader_errors():
            list(train_loader(config, plan, 0, splits[0], 0, False))

    line = refused(read)
    assert line.startswith(url) and line.endswith("was altered (its sha256 is not the manifest's): copy it there again")


def test_a_bucket_that_denies_and_a_server_that_hangs(s3, url, cache, monkeypatch):  # noqa: F811
    monkeypatch.setattr(remote, "PAUSES", (0.1,))
    split = PreparedSplit(url, "train", cache=cache)
    s3.deny(True)
    try:
        assert "manifest.json: access denied" in refused(lambda: PreparedSplit(url, "train", cache=cache))
        assert "train-00000.bin: access denied" in refused(lambda: split.read(0, 10))
    finally:
        s3.deny(False)
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    s3.hang(True)
    try:
        assert "no answer within 1 s, 2 times in a row" in refused(lambda: split.read(0, 10))
    finally:
        s3.hang(False)
    monkeypatch.setattr(remote, "TIMEOUT", 60.0)
    assert len(split.read(0, 10)) == 10


def test_a_folder_on_a_disk_has_no_cache(corpus, cache, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    PreparedSplit(folder, "train", cache=cache).read(0, 10)
    assert not Path(cache.folder).exists()
