"""A run used the way people use it: trained, evaluated and sampled from the command line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mdmtrain.generate import Sampling, unmask
from tests.conftest import ROOT, read_metrics, write_config


def run(*arguments: str, ranks: int | None = None) -> str:
    """A module's command as a user starts it; its standard output."""
    launcher = (
        ["-m"]
        if ranks is None
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    )
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A finished run of one process, with TensorBoard, document masks, a cosine schedule and a weight average."""
    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "run": {"dir": str(folder / "run"), "steps": 30, "global_batch": 16, "micro_batch": 8},
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64, "qk_norm": True},
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": 64, "document_mask": True, "workers": 1},
        "diffusion": {"schedule": "cosine"},
        "optim": {"lr": 3e-3, "schedule": "wsd", "ema_decay": 0.8},
        "checkpoint": {"save_every": 10, "keep_last": 2},
        "monitor": {"log_every": 5, "probe_every": 15, "probe": [4, 2, 2]},
        "eval": {"every": 15, "rows": 16, "samples": 2, "batch": 8},
    }
    output = run("mdmtrain.train", str(write_config(tree, folder / "config.yaml")))
    assert "step 30/30  100%" in output and "accumulation 2 = 16 / (1 ranks x 8)" in output
    return folder / "run"


def test_run_folder(trained):
    """DESIGN.md, run folder: everything where it says, one record a step, the last two checkpoints only."""
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "environment.json", "events", "metrics.jsonl", "checkpoints", "logs"} <= names
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]
    records = read_metrics(trained)
    training = [r for r in records if "split" not in r]
    assert [r["step"] for r in training] == list(range(1, 31))
    assert [r["step"] for r in records if r.get("split") == "validation"] == [15, 30]
    for record in training:
        assert record["tokens"] == record["step"] * 16 * 64
        assert sum(record["rate_histogram"]) == 16
        assert 0 < record["masked_fraction"] < 1 and not record["skipped"]
    assert training[-1]["nelbo"] < training[0]["nelbo"]
    assert [r["step"] for r in training if "probe" in r] == [15, 30]


def test_tensorboard_shows_what_metrics_say(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "events"), size_guidance={"scalars": 0})
    events.Reload()
    drawn = {event.step: event.value for event in events.Scalars("train/loss")}
    written = {r["step"]: r["loss"] for r in read_metrics(trained) if "split" not in r}
    assert drawn.keys() == written.keys()
    assert [image.step for image in events.Images("train/rate_density")] == [15, 30]
    assert all(drawn[step] == pytest.approx(value, rel=1e-6) for step, value in written.items())


def test_finished_run_is_left_alone(trained):
    before = (trained / "metrics.jsonl").read_bytes()
    assert "is complete" in run("mdmtrain.train", str(trained.parent / "config.yaml"))
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_evaluation_is_the_same_on_any_number_of_ranks(trained, tmp_path):
    """And the same as the one in the loop, which used the same rows, noise and averaged weights."""
    results = []
    for ranks in (None, 2):
        file = tmp_path / f"{ranks}.json"
        output = run("mdmtrain.evaluate", str(trained), "--json", str(file), ranks=ranks)
        assert "unigram" in output and "gzip" in output
        results.append(json.loads(file.read_text())["results"])
    assert results[0] == results[1]
    in_loop = [r for r in read_metrics(trained) if r.get("split") == "validation"][-1]
    result = results[0][0]
    assert result["nelbo"] == pytest.approx(in_loop["nelbo"], rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(result["nelbo"]))
    raw = tmp_path / "raw.json"
    run("mdmtrain.evaluate", str(trained), "--weights", "raw", "--json", str(raw))
    assert json.loads(raw.read_text())["results"][0]["nelbo"] != result["nelbo"], "the average is not the raw weights"


def test_generation(trained, tmp_path):
    prefix, suffix = "import \u2581 os\n\ndef f(x):\n", "    return x\n"
    texts = []
    for ranks in (None, 2):
        file = tmp_path / f"{ranks}.json"
        options = ["--prefix", prefix, "--suffix", suffix, "--length", "12", "--steps", "5", "--temperature", "0.7"]
        output = run("mdmtrain.generate", str(trained), *options, "--samples", "2", "--json", str(file), ranks=ranks)
        assert output.count(prefix) == 2 and output.count(suffix) == 2
        texts.append(json.loads(file.read_text())["texts"])
    assert texts[0] == texts[1], "every number of ranks draws the same"
    assert texts[0][0] != texts[0][1], "two samples differ"


def test_init_from_starts_a_new_run_from_other_weights(trained, tmp_path):
    changes = [f"run.dir={tmp_path / 'new'}", f"checkpoint.init_from={trained}", "run.steps=15", "optim.lr=1e-9"]
    output = run("mdmtrain.train", str(trained.parent / "config.yaml"), *changes)
    assert f"weights of {trained / 'checkpoints/step-00000030'}" in output
    new = next(r for r in read_metrics(tmp_path / "new") if r.get("split") == "validation")
    old = [r for r in read_metrics(trained) if r.get("split") == "validation"][-1]
    assert new["step"] == 15
    assert new["nelbo"] == pytest.approx(old["nelbo"], rel=1e-4), "it does not start where the other run ended"


# ---- the sampler by itself


class Oracle:
    """A model that always gives the same logits to a position."""

    def __init__(self, logits: torch.Tensor):
        self.logits, self.calls = logits, 0

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.logits[positions]


MASK = 9


def test_unmask_takes_the_most_confident_first():
    """With as many steps as gaps and temperature 0, each step fixes the surest position that is left."""
    logits = torch.zeros(4, 10)
    logits[torch.arange(4), torch.tensor([5, 6, 7, 8])] = torch.tensor([3.0, 1.0, 4.0, 2.0])
    logits[:, MASK] = 50.0  # the likeliest, and forbidden
    seen = []

    class Watching(Oracle):
        def __call__(self, ids, positions):
            seen.append(positions.tolist())
            return super().__call__(ids, positions)

    model = Watching(logits)
    out = unmask(model, torch.full((4,), MASK), MASK, [MASK], Sampling(4, 0.0, "low_confidence", 0), 0)
    assert out.tolist() == [5, 6, 7, 8]
    assert seen == [[0, 1, 2, 3], [0, 1, 3], [1, 3], [1]]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("steps", [1, 3, 5, 99])
def test_unmask_fills_every_gap_and_keeps_the_rest(remasking, steps):
    ids = torch.tensor([1, MASK, 2, MASK, MASK, MASK, 3, MASK])
    model = Oracle(torch.zeros(8, 10))
    out = unmask(model, ids, MASK, [0, MASK], Sampling(steps, 1.0, remasking, 3), 0)
    assert model.calls == min(steps, 5)
    assert (out[ids != MASK] == ids[ids != MASK]).all()
    assert not set(out.tolist()) & {0, MASK}


def test_unmask_samples_from_the_model():
    """At temperature 1 a single position follows softmax(logits), within 4.5 standard errors; argmax would not."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    model, draws = Oracle(probabilities.log()[None]), 4000
    counts = np.zeros(5)
    for sample in range(draws):
        sampling = Sampling(1, 1.0, "low_confidence", 11)
        counts[unmask(model, torch.tensor([4]), 4, [], sampling, sample).item()] += 1
    for count, p in zip(counts, probabilities.tolist(), strict=False):
        assert abs(count / draws - p) < 4.5 * math.sqrt(p * (1 - p) / draws)
