"""Shards of object stores on a local disk: bounded, the right content, shared by processes, kept through kills."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.data import remote
from mdmtrain.data.cache import PART, RemoteFile, ShardCache
from tests.conftest import SOAK


def content_of(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def put(folder: Path, number: int, size: int) -> RemoteFile:
    """A file behind fsspec."""
    content = content_of(number, size)
    (folder / f"{number}.bin").write_bytes(content)
    return RemoteFile(f"file://{folder}/{number}.bin", size, hashlib.sha256(content).hexdigest())


def read(cache: ShardCache, file: RemoteFile) -> bytes:
    descriptor = cache.open(file)
    try:
        return os.pread(descriptor, file.size + 1, 0)
    finally:
        os.close(descriptor)


def used(cache: ShardCache) -> int:
    """Bytes of the files, each once, while no process makes room."""
    with open(cache.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):  # an empty one, given up
                sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


SIZES = [10, 20, 30, 40, 50, 100]


@settings(max_examples=500 if SOAK else 60, deadline=None)
@given(st.lists(st.integers(0, len(SIZES) - 1), max_size=30), st.integers(100, 260))
def test_what_was_used_longest_ago_makes_room(tmp_path_factory, numbers, limit):
    """Against a model: an ordered dictionary."""
    folder = tmp_path_factory.mktemp("store")
    files, cache = [put(folder, n, size) for n, size in enumerate(SIZES)], ShardCache(folder / "c", limit)
    model = OrderedDict()
    for number in numbers:
        assert read(cache, files[number]) == content_of(number, SIZES[number])
        if number not in model:
            while sum(SIZES[n] for n in model) + SIZES[number] > limit:
                model.popitem(last=False)
        model[number] = None
        model.move_to_end(number)
        there = {path.name for path in cache.folder.iterdir() if path.name != ".lock"}
        assert there == {files[n].name for n in model} and used(cache) <= limit
    for file in folder.glob("*.bin"):
        file.unlink()
    for number in model:  # another start of the run, the store gone: what is there is enough
        assert read(ShardCache(folder / "c", limit), files[number]) == content_of(number, SIZES[number])


def test_read_ahead_counts_all_of_its_files_as_used(tmp_path):
    """What it wants must not make room for what else it wants."""
    files, cache = [put(tmp_path, n, 10) for n in range(5)], ShardCache(tmp_path / "c", 30)
    for number in (1, 0, 4):  # 1 is the oldest
        read(cache, files[number])
    steps = cache.fetch_ahead([files[1], files[2], files[0]])
    assert next(steps, "end") is None and next(steps, "end") == "end"  # a file was missing, one only
    assert {path.name for path in cache.folder.iterdir()} == {".lock", *(files[n].name for n in (0, 1, 2))}


def reader(cache: ShardCache, files: list[RemoteFile], seed: int, failed) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        number = chance.randrange(len(files))
        if chance.random() < 0.3:
            list(cache.fetch_ahead([files[number]]))
        elif read(cache, files[number]) != content_of(number, files[number].size):
            failed.value += 1
        if used(cache) > cache.limit:
            failed.value += 1


def test_processes_share_a_cache_that_holds_few_of_the_files(tmp_path):
    files = [put(tmp_path, n, 1000 * (n + 1)) for n in range(8)]
    cache, context = ShardCache(tmp_path / "c", 18_000), multiprocessing.get_context("fork")
    failed = context.Value("i", 0)
    processes = [context.Process(target=reader, args=(cache, files, seed, failed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and failed.value == 0
    assert not list(cache.folder.glob(f"*{PART}"))


def never_ends(cache: ShardCache, file: RemoteFile) -> None:
    whole = remote.read_piece
    remote.read_piece = lambda *arguments: whole(*arguments) and time.sleep(1000)
    cache.open(file)


def test_what_a_kill_has_left_is_downloaded_again_or_makes_room(tmp_path):
    files, cache = [put(tmp_path, n, 100) for n in range(2)], ShardCache(tmp_path / "c", 100)
    process = multiprocessing.get_context("fork").Process(target=never_ends, args=(cache, files[0]))
    process.start()
    part = cache.folder / (files[0].name + PART)
    while not part.exists() or part.stat().st_size < 100:
        time.sleep(0.01)
    assert not list(cache.fetch_ahead([files[0]]))[1:] and part.exists()  # left to the process that is at it
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert read(cache, files[1]) == content_of(1, 100) and not part.exists()
    assert read(cache, files[0]) == content_of(0, 100)


def test_a_file_that_its_reader_holds_may_make_room(tmp_path):
    files, cache = [put(tmp_path, n, 100) for n in range(2)], ShardCache(tmp_path / "c", 100)
    descriptor = cache.open(files[0])
    read(cache, files[1])
    assert os.pread(descriptor, 100, 0) == content_of(0, 100)
    os.close(descriptor)


def refused(cache: ShardCache, file: RemoteFile) -> str:
    """The one line; nothing half-written stays."""
    with pytest.raises(ValueError) as caught:
        cache.open(file)
    assert "\n" not in str(caught.value)
    assert not cache.folder.exists() or not [path for path in cache.folder.iterdir() if path.name != ".lock"]
    return str(caught.value)


def test_what_is_not_what_the_manifest_says_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    file, cache = put(tmp_path, 0, 100), ShardCache(tmp_path / "c", 1000)
    place = tmp_path / "0.bin"
    place.write_bytes(content_of(1, 100))
    assert "0.bin was altered (its sha256 is not the manifest's)" in refused(cache, file)
    place.write_bytes(content_of(0, 100)[:90])
    assert "0.bin has 90 bytes, the manifest says 100" in refused(cache, file)
    place.unlink()
    assert "0.bin: there is nothing of this name" in refused(cache, file)
    assert "raise data.cache_gb" in refused(ShardCache(tmp_path / "c", 99), file)
    assert "install its package" in refused(cache, RemoteFile("nowhere://0.bin", 100, "0" * 64))


def test_a_full_disk_and_a_folder_that_cannot_be_are_one_line(tmp_path, monkeypatch):
    file = put(tmp_path, 0, 100)
    assert "cannot write the cache" in refused(ShardCache(tmp_path / "0.bin" / "c", 1000), file)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    line = refused(ShardCache(tmp_path / "c", 1000), file)
    assert "No space left on device: make room there, lower data.cache_gb, or choose another data.cache_dir" in line
