"""Which checkpoints stay."""

import json
from pathlib import Path

import pytest

from mdmtrain.checkpoint import store


def folder(run: Path, step: int, complete: bool = True) -> Path:
    made = run / "checkpoints" / f"step-{step:08d}"
    made.mkdir(parents=True)
    (made / "weights.distcp").write_bytes(b"0" * step)
    if complete:
        (made / "meta.json").write_text("{}")
    return made


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_new_checkpoint_is_kept_and_leftovers_go(tmp_path, keep_last):
    """Steps 6 and 7 are a damaged future that the run resumed from before: they must not push out what is new."""
    for step in (2, 4, 6, 7):
        folder(tmp_path, step)
    folder(tmp_path, 3, complete=False)  # killed while it was written
    new = folder(tmp_path, 5, complete=False)
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    store._commit(new, 5, {"config": {}}, tmp_path / "tokenizer.model", keep_last)
    left = sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir())
    assert left == [*[4, 5][-keep_last:], 6, 7]
    assert json.loads((new / "meta.json").read_text())["files"] == {"tokenizer.model": 5, "weights.distcp": 5}
