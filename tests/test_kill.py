"""SIGKILL at any moment, the same command again: the run ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from mdmtrain.checkpoint import store
from tests.conftest import ROOT, SOAK, read_metrics, write_config

KILLS = 10 if SOAK else 3


def start(config: Path, ranks: int = 2, *overrides: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "mdmtrain.train", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def test_killed_runs_end_like_an_undisturbed_one(small_run, tmp_path):
    changes = {
        "run": {"dir": str(tmp_path / "calm"), "seed": 5, "steps": 60, "global_batch": 16, "micro_batch": 8},
        "checkpoint": {"save_every": 4},
        "monitor": {"log_every": 3, "probe_every": 7, "probe": [4, 2, 2]},
        "eval": {"every": 15, "rows": 16, "samples": 2, "batch": 8},
    }
    config = write_config(small_run(changes), tmp_path / "config.yaml")
    began = time.monotonic()
    finish(start(config))
    duration = time.monotonic() - began

    disturbed = tmp_path / "disturbed"
    chance = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start(config, 2, f"run.dir={disturbed}")
        time.sleep(chance.uniform(0.3, 1.0) * duration)
        if process.poll() is not None:  # it got through before the kill: begin again, or there is nothing left to kill
            subprocess.run(["rm", "-rf", str(disturbed)], check=True)
            continue
        match chance.choice(["everything", "launcher", "one rank"]):
            case "everything":
                os.killpg(process.pid, signal.SIGKILL)
            case "launcher":  # its ranks must not live on and write into the folder
                os.kill(process.pid, signal.SIGKILL)
            case "one rank":
                victims = children(process.pid)
                os.kill(chance.choice(victims) if victims else process.pid, signal.SIGKILL)
        process.wait(timeout=120)
        kills += 1
        for folder in store.complete_checkpoints(disturbed):
            store.read_meta(folder)  # what is committed is whole
    finish(start(config, 2, f"run.dir={disturbed}"))
    assert read_metrics(disturbed) == read_metrics(tmp_path / "calm")
    last = store.newest(tmp_path / "calm").name
    for file in sorted((tmp_path / "calm/checkpoints" / last).glob("*.distcp")):
        assert file.read_bytes() == (disturbed / "checkpoints" / last / file.name).read_bytes(), "final weights differ"


def test_sigterm_saves_and_the_run_goes_on(small_run, tmp_path):
    changes = {
        "run": {"dir": str(tmp_path / "run"), "seed": 5, "steps": 100_000, "global_batch": 16, "micro_batch": 8},
        "checkpoint": {"save_every": 100_000},
        "eval": {"every": 100_000, "rows": 16, "samples": 2, "batch": 8},
    }
    config = write_config(small_run(changes), tmp_path / "config.yaml")
    process = start(config)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.kill(children(process.pid)[1], signal.SIGTERM)  # one rank gets it, both stop
    output = finish(process)
    assert "stopped by signal 15" in output
    step = store.read_meta(store.newest(tmp_path / "run"))["step"]
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, step + 1))
