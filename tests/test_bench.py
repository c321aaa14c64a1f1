"""The measuring tools: every door of the loop is hit, and gpu_check.py is not rotten on the day a GPU is lent."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from mdmtrain import train
from tests.conftest import ROOT, write_config


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_bench_step(small_run, tmp_path):
    tree = small_run({"monitor": {"log_every": 5, "tensorboard": False}, "run": {"global_batch": 8, "micro_batch": 4}})
    out, config = tmp_path / "bench.json", write_config(tree, tmp_path / "config.yaml")
    parts = "loop,recompute,memory,optimizer,machinery"
    done = tool("bench/step.py", str(config), "--only", parts, "--repeat", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    loop = result["loop"]
    # A function of the loop that has another name now leaves its part empty, and all its time to others.
    assert all(part["seconds"] > 0 for part in loop["parts"].values())
    assert sum(part["seconds"] for part in loop["parts"].values()) > 0 and loop["steps"] == 10
    assert 0 < loop["overhead"] < 1 and 0 < loop["mfu"] < 1
    assert result["recompute"]["full"]["memory_ratio"] < result["recompute"]["none"]["memory_ratio"] == 1
    assert result["machinery"]["machinery_seconds"] > 0 and result["machinery"]["bytes_per_step"] > 0
    by_muon = result["optimizer"]["muon"]  # one moment less; on one rank no buffers
    assert by_muon["memory_ratio"] < result["optimizer"]["adamw"]["memory_ratio"] == 1
    assert by_muon["time_ratio"]["median"] > 0  # times are measured, never required
    assert not (tmp_path / "run").exists(), "it trains in a folder of its own"


def calls_in(statements: list[ast.stmt]) -> set[str]:
    """The names of the functions that statements call, as "name" or "object.method"."""
    functions = [node.func for one in statements for node in ast.walk(one) if isinstance(node, ast.Call)]
    return {name for name in map(ast.unparse, functions) if name.replace(".", "").isidentifier()}


def parsed(function) -> ast.FunctionDef:
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(found, ast.FunctionDef)
    return found


def test_the_machinery_benchmark_makes_the_calls_of_the_loop(monkeypatch):
    """A call that a step gains or loses must reach tools/bench/machinery.py, which repeats the step."""
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    import machinery

    (loop,) = (node for node in ast.walk(parsed(train.take_steps)) if isinstance(node, ast.While))
    end = next(i for i, one in enumerate(loop.body) if "watch.stop.poll" in calls_in([one]))
    step = calls_in(loop.body[:end])
    nested = ast.walk(parsed(machinery.measure_machinery))
    (repeated,) = (node for node in nested if isinstance(node, ast.FunctionDef) and node.name == "machinery")
    benchmark = calls_in(repeated.body)
    assert len(benchmark & step) > 15
    assert step - benchmark == {name for names in machinery.LEFT_OUT.values() for name in names} | {"range"}
    assert benchmark - step == {"cross_entropy", "torch.zeros"}


def test_gpu_check_rehearsed(corpus, tmp_path):
    out, parts = tmp_path / "gpu.json", "device,corpus,attention,sync_free,nan_skip,saves,graphs,bench_170m"
    done = tool("gpu_check.py", "--cpu-rehearsal", "--only", parts, "--data", str(corpus), "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(parts.split(","), "passed")
    assert all(result["checks"] for name, result in results.items() if name != "device")


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    import gpu_check

    return gpu_check


def test_a_part_that_fails_hides_no_other(gpu_check, monkeypatch, tmp_path):
    def raises(report, place):
        report.note(number=1)
        raise RuntimeError("no such kernel")

    ways = {
        "raises": raises,
        "dies": lambda report, place: os.kill(os.getpid(), 9),
        "hangs": lambda report, place: time.sleep(600),
        "wrong": lambda report, place: report.check("sum", False, "2 + 2 = 5"),
        "good": lambda report, place: report.check("sum", True, "2 + 2 = 4"),
    }
    monkeypatch.setattr(gpu_check, "PARTS", {name: (way, 2 if name == "hangs" else 60) for name, way in ways.items()})
    out = tmp_path / "out.json"
    assert gpu_check.main(["--cpu-rehearsal", "--json", str(out)]) == 1
    results = json.loads(out.read_text())
    assert {n: r["status"] == "passed" for n, r in results.items()} == {n: n == "good" for n in ways}
    assert results["raises"]["problem"] == "RuntimeError: no such kernel" and results["raises"]["numbers"] == {
        "number": 1
    }
    assert results["dies"]["problem"] == "ended with status -9" and "within 2 s" in results["hangs"]["problem"]
    assert gpu_check.main(["--cpu-rehearsal", "--budget", "5", "--json", str(out)]) == 0
    assert {result["status"] for result in json.loads(out.read_text()).values()} == {"left out"}


def test_gpu_check_needs_a_gpu(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU, but there is none: .* --cpu-rehearsal"):
        gpu_check.main([])


def test_preparation_against_the_tokenizer_library(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("some text of a document\n" * 200)
    out = tmp_path / "bench.json"
    done = tool(
        "bench/prepare.py", str(tmp_path / "a.txt"), "--tokenizer", str(corpus), "--rounds", "1", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())
    assert parts["tokenizer library alone"]["ratio"] == 1 and len(parts) == 5
    assert all(part["megabytes_per_second"] > 0 for part in parts.values())
