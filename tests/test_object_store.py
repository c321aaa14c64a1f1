"""A run that reads its shards from a real S3 server, killed and resumed, is the run from a disk bit for bit.

With two sources, and weights that change on the way.
"""

import json
import time

import pytest

from launchers.lifecycle import newest_step
from mdmtrain.checkpoint import store
from tests.conftest import read_metrics, write_config
from tests.s3 import s3  # noqa: F401
from tests.test_kill import disturb, start
from tools.bench import read_ahead


def trained(config, run_dir, killed_at: int | None = None) -> list[dict]:
    """The records of a run on 2 ranks, which is killed after a step and started again."""
    running = start(config, run_dir, 2)
    if killed_at is not None:
        while newest_step(run_dir) < killed_at:
            assert running.process.poll() is None, running.output.read_text()
            time.sleep(0.05)
        disturb("all killed", running, None)
        running.process.wait()
        assert newest_step(run_dir) < 20
        running = start(config, run_dir, 2)
    assert running.process.wait() == 0, running.output.read_text()
    return read_metrics(run_dir)


@pytest.mark.usefixtures("s3")
def test_training_from_a_bucket_is_training_from_a_disk(s3, corpus, small_run, tmp_path):  # noqa: F811
    changes = {"checkpoint": {"save_every": 4}, "eval": {"every": 10, "rows": 8, "samples": 1, "batch": 8}}
    phases = [{"from_step": 10, "weights": [1.0, 3.0]}]
    data = {"workers": 1, "shuffle_shards": 2, "phases": phases, "cache_dir": str(tmp_path / "cache")}
    runs = {}
    for name, path, killed_at in [("disk", str(corpus), None), ("bucket", s3.upload(corpus), 8)]:
        config = small_run({**changes, "data": {**data, "sources": [{"path": path}, {"path": path}]}})
        runs[name] = trained(write_config(config, tmp_path / f"{name}.yaml"), tmp_path / name, killed_at)
    assert runs["disk"] == runs["bucket"] and runs["disk"][-1]["step"] == 20
    assert all(loss > 0 for loss in runs["disk"][0]["loss_by_source"].values())
    assert list((tmp_path / "cache").glob("*.bin")) and not list((tmp_path / "cache").glob("*.part"))
    folders = [store.newest(tmp_path / name / "checkpoints") for name in runs]
    sums = [store.read_meta(folder)["crc32"] for folder in folders]
    tensors = [{name: crc for name, crc in one.items() if name.endswith(".safetensors")} for one in sums]
    assert tensors[0] == tensors[1] and len(tensors[0]) == 2


def test_the_wait_for_data_is_measured(s3, corpus, small_run, tmp_path):  # noqa: F811
    """tools/bench/read_ahead.py, with runs of a few steps."""
    config = write_config(small_run({"run": {"steps": 12}}), tmp_path / "config.yaml")
    out = tmp_path / "waits.json"
    arguments = [str(config), "--folder", str(corpus), "--url", f"{s3.url}/copy", "--rounds", "1", "--json", str(out)]
    read_ahead.main(arguments)
    waits = json.loads(out.read_text())
    assert waits.keys() == {"disk", "object store"}
    assert all(0 <= share < 1 for shares in waits.values() for share in shares)
    assert s3.read(f"{s3.url}/copy/manifest.json") == (corpus / "manifest.json").read_bytes()
