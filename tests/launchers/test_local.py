"""launchers.local: a killed rank and a request to start again leave no trace in the metrics; a hopeless run ends."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launchers import status
from launchers.lifecycle import newest_step, read_state
from tests.conftest import ROOT, read_metrics, write_config
from tests.test_kill import children

PATIENCE = 300.0


def start(config: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launchers.local", str(config), "--ranks-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until_saved(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while newest_step(run_dir) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_disturbed_run_ends_like_an_undisturbed_one(small_run, tmp_path):
    changes = {
        "run": {"dir": str(tmp_path / "rough"), "seed": 5, "steps": 100, "global_batch": 8, "micro_batch": 4},
        "checkpoint": {"save_every": 10},
        "eval": {"every": 50, "rows": 16, "samples": 2, "batch": 8},
    }
    config = write_config(small_run(changes), tmp_path / "config.yaml")
    rough, calm = tmp_path / "rough", tmp_path / "calm"
    undisturbed, process = start(config, f"run.dir={calm}"), start(config)
    wait_until_saved(process, rough, 20)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    wait_until_saved(process, rough, 50)
    process.send_signal(signal.SIGUSR1)
    wait_until_saved(process, rough, 80)
    status.cancel(rough)  # SIGTERM: it must not start again by itself
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and read_state(rough).phase == "stopped", output
    with pytest.raises(ValueError, match="nothing to cancel, the run is stopped"):
        status.cancel(rough)
    for one in (start(config), undisturbed):
        output, _ = one.communicate(timeout=PATIENCE)
        assert one.returncode == 0, output
    assert read_state(rough).phase == "finished" and read_state(rough).starts == 4
    assert read_metrics(rough) == read_metrics(calm)


def test_crashes_without_progress_are_bounded(small_run, tmp_path):
    tree = small_run({"checkpoint": {"save_every": 1000}, "eval": {"every": 1000}})
    tree["run"]["steps"] = 10**6
    config = write_config(tree, tmp_path / "config.yaml")
    process = start(config, "--max-crashes", "2")
    ranks: set[int] = set()
    while process.poll() is None:
        for rank in set(children(process.pid)) - ranks:
            ranks.add(rank)
            with suppress(ProcessLookupError):  # the children also include a short git process
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.2)
    output = process.stdout.read()
    assert process.returncode == 2 and "failed after 2 crashes without a new checkpoint" in output, output
    assert "Traceback" not in output and read_state(tmp_path / "run").phase == "failed"
