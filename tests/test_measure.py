"""The gradient's noise, measured two ways that must agree, and the intervals around it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mdmtrain import config as configuration
from mdmtrain.measure import components, mean_interval, ratio_interval
from tests.conftest import ROOT, write_config
from tests.spawn import run_world


def measure(world, tree: dict, pairs: int, rows: int) -> dict:
    from mdmtrain.config import DiffusionConfig
    from mdmtrain.data.loader import open_sources
    from mdmtrain.data.tokenizer import Tokenizer
    from mdmtrain.measure import Bench
    from mdmtrain.model.presets import model_shape
    from mdmtrain.parallel.wrap import build_model, init_weights

    config = configuration.validate(tree, "test")
    tokenizer = Tokenizer.load(config.data.sources[0].path)
    model = build_model(model_shape(config.model, tokenizer.vocab_size), config.parallel, world)
    init_weights(model, 1)
    bench = Bench(model, config, open_sources(config.data, "train"), tokenizer, world)
    standard = bench.arm_noise(DiffusionConfig(eps=0.2, strata="none"), pairs, lambda: None)
    kinds = bench.decompose(rows, lambda: None)
    return {"step": standard.gradient, "loss": standard.loss, "rows": kinds}


def test_a_step_of_independent_rows_has_the_variance_of_a_row_over_their_number(small_run):
    """Tr Cov of a step is (A + B + C)/N, for gradient and loss, on 1 and 2 ranks."""
    tree = small_run({"diffusion": {"eps": 0.2}})
    tree["data"]["random_length_fraction"] = 0.0
    tree["run"]["micro_batch"] = 8
    alone, both = run_world(measure, 1, tree, 40, 100)[0], run_world(measure, 2, tree, 3, 4)[0]
    np.testing.assert_allclose(alone["step"][:3], both["step"], rtol=1e-3)
    np.testing.assert_allclose(alone["rows"]["gradient"]["A"][:4], both["rows"]["gradient"]["A"], rtol=1e-3)

    def z_score(of_steps, of_rows):
        se = np.hypot(of_steps.std() / np.sqrt(len(of_steps)), of_rows.std() / np.sqrt(len(of_rows)))
        return (of_steps.mean() - of_rows.mean()) / se

    gradients, losses = alone["rows"]["gradient"]["ABC"], alone["rows"]["loss"]["ABC"]
    assert abs(z_score(16 * alone["step"], gradients)) < 5
    assert abs(z_score(16 * alone["loss"], losses)) < 5
    assert abs(z_score(2 * 16 * alone["step"], gradients)) > 5


def test_intervals_cover_and_tell():
    generator = np.random.default_rng(0)
    covered = sum(
        spread.low <= 1.0 <= spread.high
        for spread in (mean_interval(generator.gamma(2, 0.5, 100), seed) for seed in range(100))
    )
    assert 86 <= covered <= 100  # 95% of 100, four standard errors below
    ratio = ratio_interval(generator.gamma(2, 0.3, 400), generator.gamma(2, 0.5, 400))
    assert ratio.low < 0.6 < ratio.high < 1


def test_components_from_their_pair_forms():
    """A = 3, B_t = 1, B_int = 1, C = 2, rho = -.5: MIRROR's margin -rho A - (B_int + C) is -1.5."""
    ones = np.ones(50)
    found = components({"A": 3 * ones, "AB": 5 * ones, "AC": 6 * ones, "ABC": 7 * ones, "mirror": 4.5 * ones})
    values = {name: spread.value for name, spread in found.items()}
    assert values == {"A": 3, "B": 2, "B_t": 1, "B_int_plus_C": 3, "C": 2, "rho": -0.5, "mirror_margin": -1.5}


@pytest.fixture
def checkpoint(small_run, tmp_path):
    tree = small_run({"run": {"dir": str(tmp_path / "run"), "steps": 2, "global_batch": 16, "micro_batch": 8}})
    tree["optim"]["warmup_steps"] = 1
    run([sys.executable, "-m", "mdmtrain.train", str(write_config(tree, tmp_path / "config.yaml"))])
    return tmp_path / "run"


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_variance_report(checkpoint, tmp_path):
    tool, file, figure = str(ROOT / "tools/variance_report.py"), tmp_path / "out.json", tmp_path / "out.png"
    arms = ["--arms", "ppots-gradient,mirror-dedup,isad", "--pairs", "3", "--single-rows", "4"]
    done = run([sys.executable, tool, str(checkpoint), *arms, "--json", str(file), "--figure", str(figure)])
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert list(result["arms"]) == ["standard", "ppots-gradient", "mirror-dedup", "isad"]
    assert all(row["grad_var"] > 0 and row["ci"][0] <= row["ci"][1] for row in result["arms"].values())
    assert "take more --pairs" in done.stdout  # six steps cannot be precise, and it says so
    assert figure.read_bytes().startswith(b"\x89PNG")
    for wrong, word in (
        (["--arms", "nope"], "no arm 'nope'"),
        (["--arms", "ar"], "another model"),
        (["--pairs", "1"], "at least 2"),
    ):
        done = run([sys.executable, tool, str(checkpoint), *wrong])
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error:") and word in lines[0]
