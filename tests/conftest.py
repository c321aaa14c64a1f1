"""What many tests share: a small prepared corpus of real text and the configuration of a run on it."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOAK = os.environ.get("MDMTRAIN_SOAK") == "1"  # the full counts: make soak


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder: a few packages of the standard library, vocabulary 512."""
    out = tmp_path_factory.mktemp("data") / "corpus"
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    inputs = [str(stdlib / name) for name in ("json", "email", "logging", "asyncio")]
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), *inputs, "--include", "*.py", "--vocab-size", "512"]
    options = ["--validation-fraction", "0.1", "--workers", "1", "--shard-tokens", "100000", "--out", str(out)]
    subprocess.run(command + options, check=True, capture_output=True)
    return out


@pytest.fixture
def small_run(corpus, tmp_path):
    """A function that gives the configuration tree of a short run, with changes: small_run({"run": {"steps": 3}})."""

    def tree(changes: dict | None = None) -> dict:
        base = {
            "run": {"dir": str(tmp_path / "run"), "seed": 5, "steps": 20, "global_batch": 16, "micro_batch": 4},
            "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
            "data": {
                "sources": [{"path": str(corpus)}],
                "sequence_length": 64,
                "random_length_fraction": 0.1,
                "workers": 0,
            },
            "optim": {"lr": 3e-3, "warmup_steps": 5, "ema_decay": 0.9},
            "checkpoint": {"save_every": 10},
            "monitor": {"log_every": 5, "tensorboard": False},
            "eval": {"every": 10, "rows": 16, "samples": 2, "batch": 8},
        }
        for section, values in (changes or {}).items():
            base[section] = {**base.get(section, {}), **values}
        return base

    return tree


def write_config(tree: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


WALL_CLOCK = ("time", "tokens_per_second", "data_wait", "slowest_rank", "slowest_over_median", "mfu", "memory_gib")


def read_metrics(run_dir: Path | str) -> list[dict]:
    """The records of a run without their wall-clock fields."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]
