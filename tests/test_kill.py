"""Killed or told to stop at any moment, the same command again: the run ends as if nothing had happened.

Bit for bit where it was always on the same number of ranks; where that changed at every other start, as equal as runs
on different numbers of ranks are (DESIGN.md, law 1).
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launchers.lifecycle import newest_step
from mdmtrain.checkpoint import store
from tests.conftest import ROOT, SOAK, read_metrics, write_config
from tests.test_worlds import close

STEPS, EVALUATE, SAVE = 60, 15, 4
KINDS = ("one rank killed", "all killed", "launcher killed", "one rank told", "all told")
MOMENTS = ("any time", "a step", "a save", "an evaluation")
DIAGNOSTICS = {"probe", "rate_density", "grad_noise", "noise_scale_tokens"}
SOAK_KILLS = 25  # of each of the two runs below


@dataclass
class Start:
    """One start of the command, by torchrun."""

    process: subprocess.Popen
    output: Path
    began_at: int  # step of the newest checkpoint
    at: float  # Unix time


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def start(config: Path, run_dir: Path, ranks: int, restarts: int = 0) -> Start:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += ["--max-restarts", str(restarts), "-m", "mdmtrain.train"]
    output = run_dir.with_suffix(f".{time.monotonic_ns()}.out")
    at = time.time()
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(config), f"run.dir={run_dir}"], cwd=ROOT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Start(process, output, newest_step(run_dir), at)


def last_record(run_dir: Path, since: float = 0.0) -> dict:
    """The newest record, if it was written after this time.

    A killed run leaves records of steps after its newest checkpoint.
    """
    try:
        if (run_dir / "metrics.jsonl").stat().st_mtime < since:
            return {}
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 5000))
            return json.loads(file.read().splitlines()[-1])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):  # not there yet, or just being written
        return {}


def unfinished(folder: Path, since: float) -> bool:
    """Is a checkpoint being written that was begun after this time? A killed run leaves folders that are not whole."""
    try:
        return folder.stat().st_mtime >= since and not (folder / "meta.json").exists()
    except FileNotFoundError:  # just being removed
        return False


def has_come(moment: str, run_dir: Path, running: Start) -> bool:
    """Is the run in such a moment, after this start?"""
    match moment:
        case "a step":
            return last_record(run_dir, running.at).get("step", 0) > running.began_at + SAVE
        case "a save":
            return any(unfinished(folder, running.at) for folder in (run_dir / "checkpoints").glob("step-*"))
        case "an evaluation":
            record = last_record(run_dir, running.at)
            return record.get("step", 1) % EVALUATE == 0 and "split" not in record
    return True


def disturb(kind: str, running: Start, chance: random.Random) -> None:
    victims = children(running.process.pid) or [running.process.pid]
    match kind:
        case "one rank killed":
            os.kill(chance.choice(victims), signal.SIGKILL)
        case "all killed":
            os.killpg(running.process.pid, signal.SIGKILL)
        case "launcher killed":  # its ranks must not live on and write into the folder
            os.kill(running.process.pid, signal.SIGKILL)
        case "one rank told":  # and all stop
            os.kill(chance.choice(victims), signal.SIGTERM)
        case "all told":
            for victim in victims:
                os.kill(victim, signal.SIGTERM)


def disturbed_run(
    config: Path, run_dir: Path, plan: list[tuple[str, str]], sizes: list[int], restarts: int, duration: float,
    check: Callable[[Path], None],
) -> list[str]:  # fmt: skip
    """Go through (moment, kind) after (moment, kind), the size changing every second start; returns what happened.

    A run that came to its end is checked, and another begun; so is the last one. duration: seconds of a calm run.
    """
    chance, sizes, happened, running = random.Random(0), itertools.cycle(sizes), [], None
    for moment, kind in [*plan, ("", "")]:
        while True:
            if running is None:
                running = start(config, run_dir, next(sizes), restarts)
            deadline = time.monotonic() + (chance.uniform(0.2, 0.8) * duration if moment == "any time" else 600)
            while running.process.poll() is None and time.monotonic() < deadline:
                if moment not in ("any time", "") and has_come(moment, run_dir, running):
                    time.sleep(chance.uniform(0.0, 0.1))
                    break
                time.sleep(0.003)
            if running.process.poll() is None:
                assert moment, f"no end: {running.output.read_text()}"
                break
            check_start(running, run_dir)
            finished = newest_step(run_dir) == STEPS and running.process.returncode == 0
            running = None
            if finished:
                check(run_dir)
                if not moment:
                    return happened
                shutil.rmtree(run_dir)
        before = newest_step(run_dir)
        disturb(kind, running, chance)
        happened.append(f"{kind} in {moment} at step {before} or later")
        if restarts and kind == "one rank killed":  # torchrun starts them again
            continue
        running.process.wait(timeout=120)
        assert newest_step(run_dir) >= before, "a committed checkpoint was lost"
        check_start(running, run_dir)
        for folder in store.complete_checkpoints(run_dir):
            store.read_meta(folder)  # what is committed is whole
        running = None
    raise AssertionError("the loop returns")


def check_start(ended: Start, run_dir: Path) -> None:
    """It went on from the newest checkpoint, and an orderly stop left one of the last step that was done."""
    output = ended.output.read_text()
    if "run folder" in output:
        origin = f"resumed from {run_dir}/checkpoints/step-{ended.began_at:08d}" if ended.began_at else "fresh weights"
        assert origin in output, output
    if "checkpoint saved; run the same command again" in output:
        assert newest_step(run_dir) == last_record(run_dir)["step"], output
    assert "]: Traceback (most recent call last)" not in output, output  # of a rank; torchrun has its own


@pytest.fixture
def calm(small_run, tmp_path) -> tuple[Path, Path, float]:
    """The configuration, an undisturbed run on two ranks, and its seconds."""
    changes = {
        "run": {"dir": str(tmp_path / "calm"), "seed": 5, "steps": STEPS, "global_batch": 16, "micro_batch": 8},
        "checkpoint": {"save_every": SAVE},
        "monitor": {"log_every": 3, "probe_every": 7, "probe_sequences": 4, "probe_rates": 2, "probe_masks": 2},
        "eval": {"every": EVALUATE, "rows": 32, "samples": 2, "batch": 4},
    }
    config = write_config(small_run(changes), tmp_path / "config.yaml")
    began = time.monotonic()
    running = start(config, tmp_path / "calm", 2)
    assert running.process.wait(timeout=300) == 0, running.output.read_text()
    return config, tmp_path / "calm", time.monotonic() - began


def chosen(short: list[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    if not SOAK:
        return short
    chance = random.Random(seed)
    return [(chance.choice(MOMENTS), chance.choice(KINDS)) for _ in range(SOAK_KILLS)]


def without(names: set[str], records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in names} for record in records]


def test_disturbed_runs_end_like_a_calm_one(calm, tmp_path):
    config, calm_dir, duration = calm
    last = f"checkpoints/step-{STEPS:08d}"
    # Always on two ranks; where one of them is killed, torchrun starts both again.
    short = chosen([("a save", "all killed"), ("a step", "one rank killed")], 1)
    # A stop does not wait for a diagnostic: what that would have measured is missing from the records.
    missing = DIAGNOSTICS if any(kind.endswith("told") for _, kind in short) else set()

    def equal(run_dir: Path) -> None:
        assert without(missing, read_metrics(run_dir)) == without(missing, read_metrics(calm_dir))
        for file in sorted((calm_dir / last).glob("*.safetensors")):
            assert file.read_bytes() == (run_dir / last / file.name).read_bytes(), "final weights differ"

    def nearly(run_dir: Path) -> None:
        close(without(DIAGNOSTICS, read_metrics(calm_dir)), without(DIAGNOSTICS, read_metrics(run_dir)), 1e-4)

    happened = disturbed_run(config, tmp_path / "same", short, [2], 3, duration, equal)
    assert any(
        " is not responding: the process or its node has died" in file.read_text()
        for file in tmp_path.glob("same.*.out")
    )
    # On 2, 4 and 1 ranks in turn.
    short = [("an evaluation", "one rank told"), ("any time", "launcher killed")]
    sizes = [2, 2, 4, 4, 1, 1] if SOAK else [2, 4, 1]
    happened += disturbed_run(config, tmp_path / "other", chosen(short, 2), sizes, 0, duration, nearly)
    print(*happened, sep="\n")
