"""The fine-tuning study: what it compares, what it says is missing, and a tiny study from end to end."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launchers.finetune import (
    EQUAL_COMPUTE,
    EQUAL_STEPS,
    TWICE,
    compare,
    flips,
    main,
    sd_ratio,
    show,
    spread,
    study_runs,
)
from mdmtrain.answers import Score
from mdmtrain.data.prepare import Options, prepare
from tests.conftest import ROOT, write_config
from tests.test_commands import run


def score(accuracy: float, nelbo: float, right: str = "10") -> Score:
    return Score("checkpoint", "digest", accuracy, {"a": accuracy, "b": 0.0}, nelbo, 0.1, right)


def test_spread_and_ratios_are_the_classical_intervals():
    # Of 1, 2, 3: sd 1; chi2(.975, 2) = 7.377759, chi2(.025, 2) = .0506356; t(.975, 2) = 4.302653.
    found = spread(np.array([1.0, 2.0, 3.0]))
    assert found["sd"] == pytest.approx(1.0)
    assert found["sd_ci"] == pytest.approx([(2 / 7.377759) ** 0.5, (2 / 0.0506356) ** 0.5], rel=1e-5)
    assert found["mean_ci"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])
    # F(.975; 2, 2) = 39, so a ratio of three runs to three is known to a factor of 6.2 either way.
    ratio = sd_ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert ratio["ratio"] == pytest.approx(2.0)
    assert ratio["ci"] == pytest.approx([2 / 39**0.5, 2 * 39**0.5])
    assert sd_ratio(np.array([1.0, 2.0]), np.array([1.0])) is None
    assert spread(np.array([1.0]))["sd_ci"] is None


def test_flips_is_the_spread_of_runs_that_are_equally_good():
    generator = np.random.default_rng(0)
    chance = generator.random(400)
    runs = ["".join("1" if hit else "0" for hit in generator.random(400) < chance) for _ in range(300)]
    accuracies = np.array([run.count("1") / 400 for run in runs])
    assert flips(runs) == pytest.approx(accuracies.std(ddof=1), rel=0.15)
    assert flips(["1100", "1100"]) == 0.0 and flips(["1"]) is None


def configuration_of(folder: Path) -> str:
    """The file of a run of a few steps, on what `tiny` prepares."""
    tree = {
        "run": {"dir": str(folder / "base"), "steps": 4, "global_batch": 8, "micro_batch": 8},
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64},
        "data": {"sources": [{"path": str(folder / "pretrain")}], "sequence_length": 48, "workers": 0},
        "optim": {"lr": 1e-2},
        "monitor": {"tensorboard": False, "probe_every": 0},
        "eval": {"every": 4, "rows": 4, "samples": 1},
    }
    return str(write_config(tree, folder / "config.yaml"))


def runs_of(folder: Path, arms: list[str]):
    return study_runs(
        [configuration_of(folder), "checkpoint.init_from=base"], arms, [0, 1], "causal-base", folder / "study"
    )


def test_paired_arms_are_planned_by_both_rules_and_causal_ones_from_their_base(tmp_path):
    runs = runs_of(tmp_path, ["standard", "paper-mirror", "ar"])
    assert [(p.run.seed, p.rule, p.run.cell.arm) for p in runs[:5]] == [
        (0, EQUAL_COMPUTE, "standard"), (0, EQUAL_COMPUTE, "paper-mirror"), (0, EQUAL_STEPS, "paper-mirror"),
        (0, EQUAL_COMPUTE, "ar"), (0, TWICE, "standard"),
    ]  # fmt: skip
    assert [p.run.config.run.global_batch for p in runs[:5]] == [8, 8, 16, 8, 16]
    assert [p.run.config.slots_per_step for p in runs[:5]] == [8, 4, 8, 8, 16]
    assert [p.run.config.checkpoint.init_from for p in runs[:5]] == ["base", "base", "base", "causal-base", "base"]
    assert len({p.run.dir for p in runs}) == 10
    assert TWICE not in {p.rule for p in runs_of(tmp_path, ["standard", "ar"])}


def test_comparison_is_paired_and_names_what_is_missing(tmp_path):
    runs = runs_of(tmp_path, ["standard", "paper-mirror", "ar"])
    at = {(p.rule, p.run.cell.arm, p.run.seed): p.run.dir for p in runs}
    # Seeds differ a lot, arms by .1 within a seed: paired, the difference has no spread at all.
    scores = {
        at[EQUAL_COMPUTE, "standard", 0]: score(0.3, 1.0), at[EQUAL_COMPUTE, "standard", 1]: score(0.7, 2.0),
        at[EQUAL_COMPUTE, "paper-mirror", 0]: score(0.4, 0.9), at[EQUAL_COMPUTE, "paper-mirror", 1]: score(0.8, 1.9),
        at[EQUAL_COMPUTE, "ar", 1]: score(0.9, 0.5),
        at[TWICE, "standard", 0]: score(0.35, 0.8), at[TWICE, "standard", 1]: score(0.75, 1.8),
    }  # fmt: skip
    standard, mirror, steps, ar, twice = compare(runs, scores)
    assert standard["accuracy"]["mean"] == pytest.approx(0.5) and "difference" not in standard["accuracy"]
    assert mirror["accuracy"]["difference"] == pytest.approx(0.1)
    assert mirror["by_kind_values"] == {"a": [0.4, 0.8], "b": [0.0, 0.0]}, "in the order of the seeds"
    assert mirror["accuracy"]["difference_ci"] == pytest.approx([0.1, 0.1])
    assert mirror["nelbo"]["difference"] == pytest.approx(-0.1)
    assert mirror["accuracy"]["sd_over_standard"]["ratio"] == pytest.approx(1.0)
    assert mirror["accuracy"]["sd_over_ar"] is None, "one run of ar has no spread"
    assert (steps["seeds"], steps["missing_seeds"]) == ([], [0, 1]) and "accuracy" not in steps
    assert (twice["rule"], twice["seeds"]) == (TWICE, [0, 1])
    assert twice["accuracy"]["difference_ci"] == pytest.approx([0.05, 0.05]), "against standard at equal compute"
    assert twice["accuracy"]["sd_over_standard"]["ratio"] == pytest.approx(1.0)
    assert (ar["seeds"], ar["missing_seeds"]) == ([1], [0])
    assert ar["accuracy"]["difference"] == pytest.approx(0.2), "against the same seed of standard"
    written = io.StringIO()
    show([standard, mirror, steps, ar, twice], {"base": score(0.1, 3.0)}, Console(width=200, file=written))
    text = written.getvalue()
    assert "| a, b " in text and "| 10.0%, 0.0% |" in text and "| 60.0%, 0.0% |" in text, "by kind of task"
    assert text.count("missing") == 4 and "1, 1 missing" in text and "-0.100 (-0.100..-0.100)" in text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Tasks, both kinds of prepared folders, and the configuration of runs of a few steps."""
    folder = tmp_path_factory.mktemp("finetune")
    sizes = ["--pretrain", "600", "--train", "300", "--test", "9"]
    run_tool = [sys.executable, str(ROOT / "tools/make_tasks.py"), "--out", str(folder / "tasks"), *sizes]
    subprocess.run(run_tool, check=True, capture_output=True, cwd=ROOT)
    for name, tokenizer in (("pretrain", None), ("train", str(folder / "pretrain"))):
        options = Options(tokenizer=tokenizer, vocab_size=330, validation_fraction=0.1)
        prepare([folder / f"tasks/{name}.jsonl"], folder / name, options, 1)
    configuration_of(folder)
    return folder


def test_a_tiny_study_from_end_to_end(tiny):
    config, train = str(tiny / "config.yaml"), f"data.sources=[{{path: {tiny / 'train'}}}]"
    run("mdmtrain.train", config)
    run("mdmtrain.train", config, "configs/arms/ar.yaml", f"run.dir={tiny / 'base-ar'}")
    command = ["launchers.finetune", config, train, "--tasks", str(tiny / "tasks/test.jsonl"), "--seeds", "3"]
    command += ["--base", str(tiny / "base"), "--ar-base", str(tiny / "base-ar"), "--dir", str(tiny / "study")]
    command += ["--json", str(tiny / "table.json"), "--figure", str(tiny / "table.png")]
    arms = ["--arms", "paper-mirror,ar"]
    output = run(*command, *arms)
    assert "missing" not in output
    table = json.loads((tiny / "table.json").read_text())
    assert table["tasks"] == 9 and set(table["before"]) == {"base", "base-ar"}
    assert [(c["rule"], c["arm"], c["seeds"]) for c in table["cells"]] == [
        (EQUAL_COMPUTE, "paper-mirror", [3]), (EQUAL_STEPS, "paper-mirror", [3]), (EQUAL_COMPUTE, "ar", [3])
    ]  # fmt: skip
    assert all(0 <= c["accuracy"]["mean"] <= 1 and c["nelbo"]["mean"] > 0 for c in table["cells"])
    assert (tiny / "table.png").read_bytes().startswith(b"\x89PNG")
    alone = tiny / "alone.json"
    printed = run("mdmtrain.answers", str(tiny / "study/ar/seed-3"), "--tasks", command[4], "--json", str(alone))
    assert "answers are exactly right" in printed
    assert json.loads(alone.read_text()) == json.loads((tiny / "study/ar/seed-3/answers.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in (tiny / "study").rglob("*") if path.is_file()}
    again = run(*command, "--arms", "standard,paper-mirror,ar", "--report")
    assert "missing" in again, "standard has not been trained"
    assert stamps == {path: path.stat().st_mtime_ns for path in (tiny / "study").rglob("*") if path.is_file()}
    assert [c["seeds"] for c in json.loads((tiny / "table.json").read_text())["cells"]] == [[], [3], [3], [3], []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "nosuch"], "unknown arm 'nosuch'"),
        (["--arms", "standard", "--seeds", "a"], "whole numbers"),
        (["--arms", "standard", "--workers", "0"], "--workers must be at least 1"),
        (["--arms", "standard", "--tasks", "nosuch.jsonl"], "no such file"),
    ],
)
def test_bad_studies_start_nothing(tmp_path, arguments, message):
    base = configuration_of(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"kind": "k", "prompt": "a", "response": "b"}\n')
    options = ["--tasks", str(tmp_path / "t.jsonl"), "--base", "b", "--ar-base", "b", "--dir", str(tmp_path / "study")]
    with pytest.raises(ValueError, match=message):
        main([base, *options, *arguments])
    assert not (tmp_path / "study").exists()
