"""A run used the way people use it: trained, evaluated and sampled from the command line."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from tests.conftest import ROOT, SOAK, read_metrics, write_config
from tests.spawn import run_world


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
        "monitor": {"log_every": 5, "probe_every": 15, "probe_sequences": 4, "probe_rates": 2, "probe_masks": 2},
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

    events = EventAccumulator(str(trained / "events" / trained.name), size_guidance={"scalars": 0})
    events.Reload()
    drawn = {event.step: event.value for event in events.Scalars("Overview/loss")}
    written = {r["step"]: r["loss"] for r in read_metrics(trained) if "split" not in r}
    assert drawn.keys() == written.keys()
    assert [image.step for image in events.Images("variance/rate_density")] == [15, 30]
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


def test_the_variance_of_the_estimators(trained, tmp_path):
    """tools/bench/estimators.py: every estimator targets the NELBO, so their means agree within their errors."""
    file = tmp_path / "variance.json"
    options = ["--rows", "2", "--mc-num", "4", "--seeds", "3", "--estimator", "counted", "systematic"]
    command = [sys.executable, "tools/bench/estimators.py", str(trained), *options, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counted, systematic = json.loads(file.read_text())["results"].values()
    assert counted["passes"] == systematic["passes"] == 2 * 4
    errors = math.hypot(counted["nelbo_se"], systematic["nelbo_se"])
    assert abs(counted["nelbo"] - systematic["nelbo"]) < 5 * errors
    assert all(row["low"] < row["pass_variance"] < row["high"] for row in (counted, systematic))


def test_evaluation_of_other_text(trained, tmp_path):
    """All estimators at once, on text, documents and continuations; the result of two ranks is that of one."""
    text = tmp_path / "lines.txt"
    text.write_text("import os\n" * 30 + "def f(x):\n    return x\n" * 20)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"prefix": "import ", "continuation": "os"}\n{"prefix": "", "continuation": "def f(x): return"}\n'
    )
    options = ["--data", str(text), str(pairs), "--lines", "--wrap", "no", "--rows", "all", "--mc-num", "8"]
    options += ["--estimator", "systematic", "continuous", "orders", "--eps", "0.01", "--orders", "2", "--seed", "4"]
    reports = []
    for ranks in (None, 2, 4) if SOAK else (None, 2):
        file = tmp_path / f"{ranks}.json"
        output = run("mdmtrain.evaluate", str(trained), *options, "--json", str(file), ranks=ranks)
        assert "one document per row" in output and "agree" in output
        reports.append(json.loads(file.read_text())["results"])
    assert all(report == reports[0] for report in reports)
    lines, conditional = reports[0]
    assert lines["rows"] == lines["documents"] == 70 and lines["split"] == "lines.txt"
    assert lines["tokens_scored"] == lines["tokens"] and lines["bytes_scored"] == lines["bytes"] == 30 * 9 + 20 * 21
    assert [(e["estimator"], e["samples"], e["seed"]) for e in lines["estimators"]] == [
        ("systematic", 8, 4), ("continuous", 8, 4), ("orders", 2, 4)
    ]  # fmt: skip
    assert lines["estimators"][1]["eps"] == 0.01 and lines["estimators"][2]["passes"] == 2 * lines["tokens"]
    assert len(lines["comparisons"]) == 3
    assert lines["bits_per_byte"] == pytest.approx(lines["nelbo"] * lines["tokens"] / lines["bytes"] / math.log(2))
    few, more = (one["tokens"] for one in conditional["continuations"])
    assert 0 < few < more
    assert conditional["bytes"] == len("os" + "def f(x): return") and conditional["documents"] == 2
    nats = sum(c["nats"] for c in conditional["continuations"])
    assert conditional["nelbo"] * conditional["tokens"] == pytest.approx(nats)


def test_generation(trained, tmp_path):
    prefix, suffix = "import \u2581 os\n\ndef f(x):\n", "    return x\n"
    results = []
    for ranks in (None, 2):
        file = tmp_path / f"{ranks}.json"
        options = ["--prefix", prefix, "--suffix", suffix, "--gen-length", "12", "--steps", "5", "--temperature", "0.7"]
        output = run("mdmtrain.generate", str(trained), *options, "--samples", "2", "--json", str(file), ranks=ranks)
        assert output.count(prefix) == 2 and output.count(suffix) == 2
        results.append(json.loads(file.read_text())["samples"])
    assert results[0] == results[1], "every number of ranks draws the same"
    first, second = results[0]
    assert first["text"] == prefix + first["gaps"][0] + suffix
    assert first["gaps"] != second["gaps"], "two samples differ"
    assert first["tokens"] == 12 and first["nelbo"] > 0 and 0 <= first["token_entropy"] <= math.log(12) + 1e-9


def test_batch_generation(trained, tmp_path):
    """Two gaps in one text, a given text kept byte for byte, other fields passed through, guidance and blocks."""
    records = [{"id": 7, "text": "a \u2581<mask>b <pad>\n<mask>"}, {"prefix": "x = ", "suffix": ""}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--watch"]
    options += [
        "--gen-length",
        "6",
        "--block-length",
        "3",
        "--steps",
        "4",
        "--cfg-scale",
        "1.5",
        "--remasking",
        "random",
    ]
    run("mdmtrain.generate", str(trained), *options)
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first["id"] == 7 and first["text"] == f"a \u2581{first['gaps'][0]}b <pad>\n{first['gaps'][1]}"
    assert len(first["gaps"]) == 2 and 6 < first["tokens"] <= 12
    assert second["text"] == "x = " + second["gaps"][0] and second["prefix"] == "x = "


def ask_the_harness_adapter(world, path):
    """The harness's requests, as the harness makes them; runs in a process of its own."""
    spec = importlib.util.spec_from_file_location("harness", ROOT / "tools/harness.py")
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    with patch.object(harness, "init_world", lambda: world):
        adapter = harness.Adapter(path, mc_num=8, gen_length=8)

    def requests(*arguments):
        return [SimpleNamespace(args=one) for one in arguments]

    long = "import os\n" * 40
    scored = adapter.loglikelihood(
        requests(("import", " os\n"), ("import", " zq\u00e9 9 9 9"), (long, " x"), ("", "a"))
    )
    longer = adapter.loglikelihood(requests(("import", long))), adapter.loglikelihood_rolling(requests((long,)))
    greedy = adapter.generate_until(requests(("import os\n", {"until": []}), (long, {"until": ["\n", "i"]})))
    rolling = adapter.loglikelihood_rolling(requests(("import os",), (long,)))
    filled = harness.fill(adapter._loaded, ["def ", ""], harness.Sampling(4, 4, 4), 0, world)
    given = [i for i, own in zip(filled.ids, filled.generated, strict=True) if not own]
    rest = filled.ids[len(given) :]
    return (
        scored,
        longer,
        rolling,
        greedy,
        adapter._is_greedy(given, rest),
        adapter._is_greedy(given, [*rest[:-1], rest[-1] - 1]),
    )


def test_the_harness_adapter(trained):
    """Without the harness, whose requests are objects with `args`. tools/harness.py was run with lm_eval by hand."""
    [(scored, longer, rolling, texts, greedy, other)] = run_world(ask_the_harness_adapter, 1, str(trained))
    (likelier, _), (less, no), (cut, _), (unconditional, _) = scored
    assert less < likelier < 0 and cut < 0 and unconditional < 0 and no is False
    [(whole, is_greedy)], [pieces] = longer
    assert whole == pieces and is_greedy is False, "a continuation that is longer than the model is scored in pieces"
    assert rolling[1] < rolling[0] < 0, "the longer text, in pieces"
    assert len(texts) == 2 and not set(texts[1]) & set("\ni")
    assert greedy is True and other is False, "what greedy unmasking gives, and one token of it changed"


def test_init_from_starts_a_new_run_from_other_weights(trained, tmp_path):
    changes = [f"run.dir={tmp_path / 'new'}", f"checkpoint.init_from={trained}", "run.steps=15", "optim.lr=1e-9"]
    output = run("mdmtrain.train", str(trained.parent / "config.yaml"), *changes)
    assert f"weights of {trained / 'checkpoints/step-00000030'}" in output
    new = next(r for r in read_metrics(tmp_path / "new") if r.get("split") == "validation")
    old = [r for r in read_metrics(trained) if r.get("split") == "validation"][-1]
    assert new["step"] == 15
    assert new["nelbo"] == pytest.approx(old["nelbo"], rel=1e-4), "it does not start where the other run ended"
