"""Which checkpoints stay, and which count."""

import json
from pathlib import Path

import pytest

from mdmtrain.checkpoint import storage, store
from mdmtrain.checkpoint.layout import Layout
from mdmtrain.config import CheckpointConfig
from tests.spawn import fake_world


def folder(home: Path, step: int, complete: bool = True) -> Path:
    made = home / f"step-{step:08d}"
    made.mkdir(parents=True)
    (made / "weights").write_bytes(b"0" * step)
    if complete:
        meta = {"step": step, "identity": {}, "has_average": False, "config": {}}
        store.write_marker(made, meta, Layout({}, 1), {"weights": (step, storage.checksum(made / "weights"))})
    return made


@pytest.fixture(params=["disk", "memory://", "file://"])
def home(request, tmp_path) -> Path:
    """Where checkpoints may lie: on a disk, and behind fsspec."""
    where = {"disk": str(tmp_path), "memory://": f"memory://{tmp_path}", "file://": f"file://{tmp_path}"}
    return storage.place(where[request.param])


def steps(home: Path) -> list[int]:
    return sorted(store.step_of(found) for found in home.iterdir())


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_new_checkpoint_is_kept_and_leftovers_go(home, keep_last):
    """Steps 6 and 7 are a damaged future that the run resumed from before: they must not push out what is new."""
    for step in (2, 4, 6, 7):
        folder(home, step)
    folder(home, 3, complete=False)  # killed while it was written
    store.retain(folder(home, 5), CheckpointConfig(keep_last=keep_last, save_every=1))
    assert steps(home) == [*[4, 5][-keep_last:], 6, 7]


def test_some_stay_for_good(home):
    """Every fourth, beside the last one; what a kill left of a fourth does not."""
    for step in range(1, 14):
        folder(home, step, complete=step != 12)
    (home / "step-00000002-my-copy").mkdir()  # a user's: none of ours
    store.retain(home / "step-00000013", CheckpointConfig(keep_last=1, keep_every=4, save_every=1))
    assert sorted(found.name for found in home.iterdir()) == [
        "step-00000002-my-copy", *(f"step-{step:08d}" for step in (4, 8, 13))
    ]  # fmt: skip


def test_a_removal_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    """The new checkpoint is there: the run must not stop for an old one that stays."""
    folder(tmp_path, 1)

    def refuse(old):
        raise OSError(30, "Read-only file system", str(old))

    monkeypatch.setattr(store, "remove", refuse)
    store.retain(folder(tmp_path, 2), CheckpointConfig(keep_last=1, save_every=1))
    assert "cannot remove old checkpoints" in caplog.text and steps(tmp_path) == [1, 2]


def test_a_flipped_byte_is_found(home, caplog):
    """In a file by its checksum, in the marker by its own; one from before there were any counts as sound."""
    for step in (2, 4, 6):
        folder(home, step)
    world = fake_world()
    assert store.damage(home / "step-00000006", world) is None
    (home / "step-00000006/weights").write_bytes(b"000100")
    assert "weights: its content has changed" in store.damage(home / "step-00000006", world)
    marker = home / "step-00000004/meta.json"
    marker.write_text(marker.read_text().replace('"step": 4', '"step": 5'))
    assert store.newest(home, [home / "step-00000006"]) == home / "step-00000002"
    assert "skipping a damaged checkpoint" in caplog.text and "meta.json: its content has changed" in caplog.text
    meta = json.loads((home / "step-00000006/meta.json").read_text())
    old = {name: value for name, value in meta.items() if "crc32" not in name}
    (home / "step-00000006/meta.json").write_text(json.dumps(old))
    assert store.newest(home) == home / "step-00000006" and store.damage(home / "step-00000006", world) is None


def test_places_that_nothing_reaches():
    for place in ("nosuchstore://bucket/run", "abfs://container/run"):
        with pytest.raises(ValueError, match=f"^{place}: .*install its package"):
            storage.place(place)


def test_the_tokenizer_of_a_run_is_that_of_its_newest_checkpoint(tmp_path):
    """--tokenizer of the preparation takes a run; any other path is left to `Tokenizer.load`."""
    newest = [folder(tmp_path / "run/checkpoints", step) for step in (2, 4)][-1]
    assert store.tokenizer_path(str(tmp_path / "run")) == str(newest)
    assert store.tokenizer_path(str(newest)) == str(newest)
    assert store.tokenizer_path("org/model/tokenizer.json") == "org/model/tokenizer.json"
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty: no complete checkpoint in this run"):
        store.tokenizer_path(str(tmp_path / "empty"))
