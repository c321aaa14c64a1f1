"""Arms against seeds: what runs, what is compared, and what a second start leaves alone."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launchers.comparison import compare, draw, interval, show, tokens_to_level, tokens_to_reach
from launchers.results import BINDING, FREE, Curve, Run, collect, flops_of_cells, present_fingerprint, read_curve
from launchers.sweep import all_runs, all_variations, main
from mdmtrain import config as configuration
from mdmtrain.checkpoint.resume import flat
from mdmtrain.cost import flops_per_token
from tests.conftest import ROOT, write_config


def curve(nelbo: list[float], constant: int) -> Curve:
    return Curve(100.0 * np.arange(1, len(nelbo) + 1), np.array(nelbo), constant)


def test_tokens_to_reach_interpolates_and_stops_at_the_decay():
    falling = curve([5.0, 4.0, 3.0, 1.0], constant=3)
    assert tokens_to_reach(falling, 4.0) == 200.0
    assert tokens_to_reach(falling, 3.75) == 225.0
    assert tokens_to_reach(falling, 9.0) == 100.0
    assert tokens_to_reach(falling, 2.0) == np.inf  # only reached in the decay, where prefixes do not compare
    bumpy = curve([5.0, 3.0, 4.0, 2.0], constant=4)
    assert tokens_to_reach(bumpy, 3.5) == 175.0  # the first time, not the last


def test_interval_is_students():
    # t(0.975, 2) = 4.302653: a normal quantile (1.96) would claim less than half of this width.
    assert interval(np.array([1.0, 2.0, 3.0])) == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])
    assert interval(np.array([1.0])) is None


def write_run(run: Run, nelbo: list[float]) -> Run:
    """A run folder as a finished run leaves it, as far as the sweep reads it."""
    run.dir.mkdir(parents=True)
    records = [{"step": 4 * (i + 1), "split": "validation", "nelbo": value} for i, value in enumerate(nelbo)]
    lines = [json.dumps(record) + "\n" for record in [{"step": 1, "nelbo": 9.9}, *records]]
    (run.dir / "metrics.jsonl").write_text("".join(lines))
    checkpoint = run.dir / "checkpoints/step-00000020"
    checkpoint.mkdir(parents=True)
    data = [[present_fingerprint(source.path), source.weight] for source in run.config.data.sources]
    meta = {
        "format_version": 1, "step": 20, "identity": {"data": data}, "has_average": False,
        "config": run.config.model_dump(mode="json"), "files": {},
    }  # fmt: skip
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    return run


def test_comparison_is_paired_by_seed(small_run, tmp_path):
    tree = small_run({"optim": {"lr": 1e-3, "schedule": "wsd", "decay_fraction": 0.2}, "eval": {"every": 4}})
    base = str(write_config(tree, tmp_path / "config.yaml"))
    runs = all_runs(
        [base], ["standard", "strats"], [0, 1], [("optim.lr=1e-3",), ("optim.lr=2e-3",)], tmp_path / "sweep"
    )
    assert [(run.cell.arm, run.seed) for run in runs[:4]] == [
        ("standard", 0), ("strats", 0), ("standard", 1), ("strats", 1)
    ]  # fmt: skip
    assert runs[-1].config.optim.lr == 2e-3 and runs[-1].config.diffusion.strata == "global"
    # Seeds differ a lot, arms by 0.1 within a seed: paired, the difference has no spread at all.
    for run, end in zip(runs[:4], (3.0, 2.9, 5.0, 4.9), strict=True):
        write_run(run, [7.0, 6.0, 5.5, 5.0 - (run.cell.arm == "strats"), end])
    first, second = compare(collect(runs, {}), "standard", flops_of_cells(runs))
    assert first["arm"] == "standard" and first["nelbo"] == 4.0 and first["nelbo_sd"] == pytest.approx(2**0.5)
    assert second["difference"] == pytest.approx(-0.1) and second["difference_ci"] == pytest.approx([-0.1, -0.1])
    # 5.5 -> 4.0 passes 5.0 a third of the way from evaluation 3 to 4: 10/3 of 4 evaluations.
    assert second["tokens_ratio"] == pytest.approx((3 + 1 / 3) / 4)
    assert first["tokens_ratio"] == first["flops_ratio"] == 1.0
    assert all(row["variation"] == ["optim.lr=1e-3"] for row in (first, second))  # nothing ran at the other rate
    # One cell as the reference of all, also of those with other values.
    for run, end in zip(runs[4:], (2.0, 2.4, 4.0, 4.4), strict=True):
        write_run(run, [7.0, 6.0, 5.5, 5.0, end])
    rows = compare(collect(runs, {}), "strats optim.lr=1e-3", flops_of_cells(runs))
    assert [row["difference"] for row in rows] == pytest.approx([0.1, 0.0, -0.9, -0.5])
    printed = io.StringIO()
    show(rows, "strats optim.lr=1e-3", Console(file=printed, width=130))  # one table for all variations
    cells = [[one.strip() for one in line.split("│")[1:4]] for line in printed.getvalue().splitlines() if "│" in line]
    assert cells == [[arm, f"optim.lr={lr}", "2"] for lr in ("1e-3", "2e-3") for arm in ("standard", "strats")]
    named = [base, "--arms", "standard", "--vary", "optim.lr=1e-3", "--dir", str(tmp_path / "sweep"), "--report"]
    with pytest.raises(ValueError, match=r"--reference best: not one of standard optim\.lr=1e-3"):
        main([*named, "--reference", "best"])


def test_flops_to_the_level_depend_on_the_arm_and_need_the_data(small_run, corpus, tmp_path):
    moved = tmp_path / "corpus"
    shutil.copytree(corpus, moved)
    tree = small_run({"optim": {"lr": 1e-3, "schedule": "wsd", "decay_fraction": 0.2}, "eval": {"every": 4}})
    tree["data"]["sources"] = [{"path": str(moved)}]
    base, table = str(write_config(tree, tmp_path / "config.yaml")), tmp_path / "table.json"
    runs = all_runs(
        [base], ["standard", "clipped"], [0], [("optim.name=adamw",), ("optim.name=muon",)], tmp_path / "sweep"
    )
    for run, before_decay in zip(runs, (5.0, 4.5, 5.0, 5.2), strict=True):
        write_run(run, [7.0, 6.0, 5.5, before_decay, 4.0])
    command = [base, "--arms", "standard,clipped", "--seeds", "0", "--vary", "optim.name=adamw,muon", "--report"]
    command += ["--dir", str(tmp_path / "sweep"), "--reference", "standard optim.name=adamw", "--json", str(table)]
    main(command)
    flops = [flops_per_token(run.config) for run in runs]
    assert flops[0] < flops[1] < flops[2] < flops[3]  # more masked positions, and Muon's iterations
    found = [row["flops_ratio"] for row in json.loads(table.read_text())["cells"]]
    shares = (1.0, 3.5 / 4, 1.0)  # of the tokens to 5.0, which the last run does not reach
    assert found == [
        *(pytest.approx(share * own / flops[0]) for share, own in zip(shares, flops[:3], strict=True)),
        None,
    ]
    shutil.rmtree(moved)
    main([*command, "--results", str(table)])
    assert [row["flops_ratio"] for row in json.loads(table.read_text())["cells"]] == [None] * 4
    cells = json.loads(table.read_text())["cells"]
    assert [tokens_to_level(row) for row in cells] == ["1.00", "0.88", "1.00", "not reached"]
    assert tokens_to_level({}) == ""  # nothing to compare with


def test_the_figure_marks_what_has_no_comparison():
    rows = [
        {"arm": arm, "variation": [variation], "difference": -0.5, "difference_ci": None}
        for arm, variation in (("standard", "a=1"), ("best", "a=1"), ("standard", "a=2"))
    ]
    texts = [[text.get_text().strip() for text in panel.texts] for panel in draw(rows, "standard a=1").axes]
    assert texts == [[], ["no comparison"]]  # an empty bar would look like a difference of 0


def test_a_repeated_sweep_with_other_settings_is_refused(small_run, tmp_path):
    base = str(write_config(small_run({"optim": {"lr": 1e-3}}), tmp_path / "config.yaml"))
    command = [base, "--arms", "standard", "--seeds", "0", "--dir", str(tmp_path / "sweep")]
    write_run(all_runs([base], ["standard"], [0], [()], tmp_path / "sweep")[0], [5.0, 4.0])
    main([*command, "--report"])
    free = ["run.micro_batch=2", "parallel.compile=true", "checkpoint.keep_last=5", "eval.batch=3"]
    main([*command, "--report", *free])  # these change no result
    for change in (
        "optim.lr 0.001 -> 0.002", "diffusion.eps 0.001 -> 0.01", "run.steps 20 -> 10", "run.steps 20 -> 30",
        'parallel.compute_dtype "float32" -> "bfloat16"',
    ):  # fmt: skip
        key, _, _, value = change.replace('"', "").split()
        for report in ([], ["--report"]):
            with pytest.raises(
                ValueError, match=rf"^standard seed 0 was .* settings: {change}: .*seed-0: use the same"
            ):
                main([*command, *report, f"{key}={value}"])


def test_each_free_setting_exists():
    keys = flat(configuration.load([str(ROOT / "configs/quickstart.yaml")]).model_dump(mode="json"))
    assert all(any(key.startswith(free) for key in keys) for free in (*FREE, *BINDING))


def test_stored_results_replace_run_folders(small_run, tmp_path):
    tree = small_run({"eval": {"every": 4}})
    base = str(write_config(tree, tmp_path / "config.yaml"))
    here, there, table = tmp_path / "here", tmp_path / "there", tmp_path / "table.json"
    first, second = all_runs([base], ["standard", "strats"], [0], [()], here)
    write_run(first, [5.0, 4.5, 4.0, 3.5, 3.0])
    write_run(second, [5.0, 4.4, 3.9, 3.4, np.inf])
    both, results = [base, "--arms", "standard,strats"], ["--dir", str(there), "--results", str(table)]
    main([*both, "--seeds", "0", "--dir", str(here), "--json", str(table), "--report"])
    whole = table.read_text()
    assert [one["nelbo"][-1] for one in json.loads(whole)["runs"]] == [3.0, None]
    # The folders are not needed any more, and a diverged run stays diverged.
    main([*both, "--seeds", "0", *results, "--json", str(table)])
    assert table.read_text() == whole and not there.exists()
    # A run of another machine, where the same data has another path, is compared with one of a folder.
    moved = tmp_path / "moved"
    shutil.copytree(tree["data"]["sources"][0]["path"], moved)
    elsewhere = [*both, f"data.sources=[{{path: {moved}}}]"]
    [run] = all_runs([base, elsewhere[-1]], ["standard"], [1], [()], there)
    write_run(run, [5.0, 4.5, 4.0, 3.5, 3.2])
    more = [*elsewhere, "--seeds", "0,1", *results, "--report"]
    main([*more, "--json", str(tmp_path / "more.json")])
    assert json.loads((tmp_path / "more.json").read_text())["cells"][0]["nelbo"] == pytest.approx(3.1)
    # Nothing is lost, mixed or guessed.
    with pytest.raises(ValueError, match=r"table\.json would lose 1 runs that are not part of this sweep"):
        main([base, "--arms", "standard", "--seeds", "0", *results, "--json", str(table), "--report"])
    with pytest.raises(ValueError, match=r"^standard seed 0 was .* settings: optim\.lr .*leave out --results"):
        main([*both, "--seeds", "0", *results, "--report", "optim.lr=0.5"])
    table.write_text(whole.replace(json.loads(whole)["runs"][0]["data"][0], "0" * 64))
    with pytest.raises(ValueError, match=r"other data: .* had the fingerprint 000000000000 and has "):
        main([*both, "--seeds", "0", *results])
    shutil.rmtree(moved)  # without the data, only the runs can be compared
    present_fingerprint.cache_clear()
    with pytest.raises(ValueError, match=r"standard seed 1 and standard seed 0 were trained on different data"):
        main(more)
    for broken, message in (
        ("{", "did not write this file"), ("[1]", "did not write"), ('{"cells": []}', "has no runs: an older version"),
        ('{"runs": [{"arm": "standard"}]}', "a run has a wrong variation"),
        (re.sub(r"4\.0,\s*", "", whole), "a run has no curve"),
    ):  # fmt: skip
        table.write_text(broken)
        with pytest.raises(ValueError, match=rf"table\.json.*{message}"):
            main(more)
    with pytest.raises(FileNotFoundError):
        main([*both, "--dir", str(there), "--results", str(tmp_path / "nosuch.json")])


def test_a_curve_is_the_mean_over_validation_sets_and_keeps_what_diverged(small_run, tmp_path):
    base = str(write_config(small_run(), tmp_path / "config.yaml"))
    run = all_runs([base], ["standard"], [0], [()], tmp_path / "sweep")[0]
    write_run(run, [])
    values = [("a", 4, 5.0), ("b", 4, 3.0), ("a", 8, 4.0), ("b", 8, None)]
    lines = [json.dumps({"step": s, "split": f"validation/{k}", "nelbo": v}) + "\n" for k, s, v in values]
    (run.dir / "metrics.jsonl").write_text("".join(lines))
    assert read_curve(run).nelbo.tolist() == [4.0, np.inf]  # the last good value would hide that it diverged


def test_a_sweep_trains_compares_and_goes_on(small_run, tmp_path):
    tree = small_run({"run": {"steps": 4}, "optim": {"warmup_steps": 0}, "eval": {"every": 2, "rows": 4}})
    base = str(write_config(tree, tmp_path / "config.yaml"))
    command = [sys.executable, "-m", "launchers.sweep", base, "--arms", "standard,counted", "--seeds", "3",
               "--dir", str(tmp_path / "sweep"), "--workers", "2",
               "--json", str(tmp_path / "table.json"), "--figure", str(tmp_path / "table.png")]  # fmt: skip

    def start(*more: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command + list(more), cwd=ROOT, env=environment, capture_output=True, text=True)

    done = start()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert [(row["arm"], row["seeds"]) for row in rows] == [("standard", [3]), ("counted", [3])]
    saved = configuration.load([str(tmp_path / "sweep/counted/seed-3/config.yaml")])
    assert saved.run.seed == 3 and saved.diffusion.masks == "counted"
    stamps = {path: path.stat().st_mtime_ns for path in Path(tmp_path / "sweep").rglob("*") if path.is_file()}
    again = start()
    assert again.returncode == 0 and json.loads((tmp_path / "table.json").read_text())["cells"] == rows
    assert stamps == {path: path.stat().st_mtime_ns for path in Path(tmp_path / "sweep").rglob("*") if path.is_file()}
    # A run that cannot train is named, and the status is not 0.
    failing = start("model.d_model=31", "--arms", "standard", "--seeds", "4")
    assert failing.returncode == 2 and "1 of 1 runs failed" in failing.stderr and failing.stderr.count("\n") == 1
    assert "failed: standard seed 4, status 2" in failing.stdout
    assert "is not a multiple of model.n_heads" in (tmp_path / "sweep/standard/seed-4/output.log").read_text()


def test_a_variant_changes_settings_together():
    # `optim.muon_lr` needs Muon, so the product of these keys has combinations that do not exist.
    variants = ["optim.name=adamw optim.muon_lr=null", "optim.name=muon optim.muon_lr=5e-3"]
    adamw, muon = (tuple(variant.split()) for variant in variants)
    assert all_variations(variants, ["optim.lr=1e-3,2e-3"]) == [
        (*adamw, "optim.lr=1e-3"), (*adamw, "optim.lr=2e-3"), (*muon, "optim.lr=1e-3"), (*muon, "optim.lr=2e-3")
    ]  # fmt: skip
    assert all_variations([], []) == [()]


@pytest.mark.parametrize(
    "target", ["study", "study-muon", "study-recipe", "study-quickstart", "study-search", "study-medium"]
)
def test_every_run_of_a_study_is_valid(target, tmp_path, monkeypatch):
    """The sweeps of the Makefile, with --report: all their configurations are validated, and nothing is trained."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, text=True, capture_output=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    sweeps = [shlex.split(line.partition("launchers.sweep")[2]) for line in lines if "-m launchers.sweep" in line]
    assert sweeps
    monkeypatch.chdir(ROOT)
    outputs = {"--dir": tmp_path / "sweep", "--json": tmp_path / "a.json", "--figure": tmp_path / "a.png"}
    for arguments in sweeps:
        for option in outputs.keys() & set(arguments):
            arguments[arguments.index(option) + 1] = str(outputs[option])
        main([*arguments, "--report"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "nosuch"], "unknown arm 'nosuch'"),
        (["--arms", "standard", "--seeds", "a"], "whole numbers"),
        (["--arms", "standard", "--vary", "optim.lr"], "expected KEY=A,B"),
        (["--arms", "standard", "--variant", "optim.lr"], "optim.lr is not KEY=A"),
        (["--arms", "standard", "--vary", "optim.lr=1e-3", "--vary", "optim.lr=2e-3"], r"give optim\.lr twice in"),
        (["--arms", "standard", "--variant", "optim.lr=1e-3", "--vary", "optim.lr=2e-3"], r"give optim\.lr twice in"),
        (["--arms", "standard", "--workers", "0"], "--workers must be at least 1"),
        (["--arms", "standard", "--slurm", "--time 1 optim.lr=0.1"], r"give optim\.lr=0\.1 outside of --slurm"),
        (["--arms", "standard,mirror", "run.global_batch=31", "run.micro_batch=31"], "a multiple of 2"),
    ],
)
def test_bad_sweeps_start_nothing(small_run, tmp_path, arguments, message):
    base = str(write_config(small_run(), tmp_path / "config.yaml"))
    with pytest.raises(ValueError, match=message):
        main([base, "--dir", str(tmp_path / "sweep"), *arguments])
    assert not (tmp_path / "sweep").exists()
