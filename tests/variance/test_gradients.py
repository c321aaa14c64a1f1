"""The gradient's noise, measured two ways that must agree, and the intervals around it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdmtrain import config as configuration
from mdmtrain.config import DiffusionConfig
from mdmtrain.data.loader import Batch
from mdmtrain.diffusion import noise, strata
from mdmtrain.diffusion.objective import rate_range, row_losses
from mdmtrain.diffusion.rates import fit, uniform_density
from mdmtrain.variance import gradients
from mdmtrain.variance.gradients import SLOT_STEP, Bench, SlotNoise, fitted_settings
from mdmtrain.variance.intervals import density_floor, gradient_components, mean_interval, ratio_interval
from tests.conftest import ROOT, write_config
from tests.diffusion.test_exact import t3_second_moment
from tests.spawn import run_world


def measure(world, tree: dict, pairs: int, slots: int, rows: int) -> dict:
    from mdmtrain.data.loader import open_sources
    from mdmtrain.data.tokenizer import Tokenizer
    from mdmtrain.model.presets import model_shape
    from mdmtrain.parallel.parallelize import build_model, init_weights

    config = configuration.validate(tree, "test")
    tokenizer = Tokenizer.load(config.data.sources[0].path)
    model = build_model(model_shape(config.model, tokenizer.vocab_size), config.parallel, world)
    init_weights(model, 1)
    bench = Bench(model, config, open_sources(config.data, "train"), tokenizer, world)
    arms = {name: DiffusionConfig(eps=0.2, **choice) for name, choice in ARMS.items()}
    return {
        "steps": {name: bench.step_noise(arm, pairs, lambda: None)[0] for name, arm in arms.items()},
        "slots": bench.slot_noise(arms, slots, lambda: None),
        "rows": bench.decompose(rows, lambda: None),
    }


ARMS = {"standard": {"strata": "none"}, "mirror": {"views": "mirror"}, "counted": {"masks": "counted"}}


def z_score(a, b):
    return (a.mean() - b.mean()) / np.hypot(a.std() / np.sqrt(len(a)), b.std() / np.sqrt(len(b)))


def test_slots_and_rows_have_the_noise_of_real_steps(small_run):
    """Tr Cov of a step from |g - g'|^2/2, from single slots, and (A + B + C)/N; on 2 ranks the numbers of 1."""
    tree = small_run({"diffusion": {"eps": 0.2}})
    tree["data"]["random_length_fraction"] = 0.0
    tree["run"]["micro_batch"] = 8
    (alone,) = run_world(measure, 1, tree, 20, 120, 60)
    (small,), (both, _) = run_world(measure, 1, tree, 2, 4, 4), run_world(measure, 2, tree, 2, 4, 4)
    for arm in ARMS:
        for what in ("gradient", "loss"):
            steps, slots = getattr(alone["steps"][arm], what), getattr(alone["slots"][arm], what)
            assert abs(z_score(steps, slots)) < 5, (arm, what)
            for source in ("steps", "slots"):
                one, two = getattr(small[source][arm], what), getattr(both[source][arm], what)
                np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)
    rows = alone["rows"]["gradient"]["ABC"] / 16
    assert abs(z_score(alone["steps"]["standard"].gradient, rows)) < 5
    np.testing.assert_allclose(small["rows"]["gradient"]["A"], both["rows"]["gradient"]["A"], rtol=1e-3)


# ---- in closed form: a "model" whose gradient is its loss, T3's of mathematics.md


class CountBench(Bench):
    """CE = 1 + 4 (k - 1)/15 in a row of 16 with k masks, 64 rows a step."""

    def __init__(self):
        tree = {
            "run": {"dir": "r", "steps": 1, "global_batch": 64, "micro_batch": 64}, "model": {"preset": "2m"},
            "optim": {"lr": 1.0},
            "data": {"sources": [{"path": "p"}], "sequence_length": 16, "random_length_fraction": 0.0},
        }  # fmt: skip
        self.config, self.mask_id, self._pieces, self.densities = configuration.validate(tree, "test"), 1, [], {}
        self.world = SimpleNamespace(
            rank=0, size=1, is_main=True, device=torch.device("cpu"), sum=lambda tensor: tensor
        )
        self._nothing = torch.zeros(1)

    def _dataset(self, _):
        return self

    def __getitems__(self, places):
        step, slots = places[0][0], np.array([slot for _, slot in places])
        n, uniforms = len(slots), torch.from_numpy(noise.position_uniforms(0, step, slots, 16))
        ids = torch.zeros(n, 16, dtype=torch.int64)
        return Batch(
            ids, torch.ones(n, 16, dtype=torch.bool), None, uniforms, torch.from_numpy(slots), torch.zeros(n, 2)
        )

    def _backward(self, masked_batch, _segments, _views, tokens, share=1.0):
        k = (masked_batch.noisy == 1).sum(dim=1)
        ce = (1 + 4 * (k - 1) / 15)[masked_batch.positions // 16]
        self.gradient = row_losses(ce, masked_batch).sum() / tokens
        return self.gradient

    def _take_gradient(self):
        return self.gradient[None]


T3_ARMS = {
    "standard": ({"strata": "none"}, 2.91152),
    "strats": ({}, 1.58118),
    "ppots": ({"sampler": "ppots", "target": "loss"}, 1.8484),
    "mirror": ({"views": "mirror", "strata": "none"}, 2 * 1.842479),
    "counted": ({"masks": "counted"}, 0.0),
    "counted-iid": ({"masks": "counted", "strata": "none"}, 1.51111),
}


def test_each_arm_has_the_density_of_its_own_rates():
    """P-POTS on all rates and on a window, in one report: a density of other rates would draw outside the window."""
    bench = CountBench()
    bench.sources = []
    bench._probe = SimpleNamespace(fit=lambda process, _: uniform_density(*rate_range(process.config), 8))
    for low, high in ((None, None), (0.3, 0.8), (0.4, 0.6)):
        arm = DiffusionConfig(sampler="ppots", rate_low=low, rate_high=high)
        assert bench._process(arm).density.edges[[0, -1]].tolist() == [low or arm.eps, high or 1.0]


def test_arms_share_a_density_only_where_no_setting_of_the_fit_differs():
    """Each field of the section is a part of the key, except those that the fit does not read."""
    bench, fits = CountBench(), []
    bench.sources = []
    bench._probe = SimpleNamespace(fit=lambda process, _: fits.append(process.config) or object())
    arm = DiffusionConfig(sampler="ppots")
    others = [
        arm.model_copy(update=change)
        for change in (
            {"eps": 0.01}, {"rate_high": 0.8}, {"target": "loss"}, {"form": "epr"}, {"bins": 32}, {"floor": 0.5},
            {"masks": "counted"}, {"views": "mirror"}, {"objective": "bell"}, {"objective": "bell", "bell": 9.0},
        )
    ]  # fmt: skip
    densities = [bench._process(one).density for one in (arm, *others)]
    assert len(fits) == len(set(map(id, densities))) == len(others) + 1
    same = [arm, arm.model_copy(update={"strata": "none"}), arm.model_copy(update={"fit_rates": 99})]
    assert all(bench._process(one).density is densities[0] for one in same) and len(fits) == len(others) + 1
    assert all(one.sampler == "uniform" and one.fit_rates == gradients.FIT["fit_rates"] for one in fits)


def test_slots_give_the_closed_forms(monkeypatch):
    """N Var of section 9 (T3, T14) for each arm; not without the weight p/r, and not with another's strata."""
    bench = CountBench()
    edges, square = t3_second_moment()
    arms = {name: DiffusionConfig(eps=1e-3, **choice) for name, (choice, _) in T3_ARMS.items()}
    bench.densities[fitted_settings(arms["ppots"])] = fit(edges, square, np.ones(1000), 1e-9, "histogram")

    def scores(slots, *names):
        found = bench.slot_noise({name: arms[name] for name in names}, slots, lambda: None)
        return {
            name: (64 * noise.loss.mean() - T3_ARMS[name][1]) / (64 * noise.loss.std() / np.sqrt(slots) + 1e-9)
            for name, noise in found.items()
        }, found

    right, found = scores(1500, *arms)
    assert all(abs(score) < 5 for score in right.values()), right
    for name, of in found.items():
        assert abs(z_score(of.gradient, np.full(2, T3_ARMS[name][1] / 64))) < 5, name
    stratified = 64 * found["strats"].loss
    assert abs(stratified.mean() - 2.91152) > 5 * stratified.std() / np.sqrt(len(stratified))
    # Partners by the parity of the index: a stratified index says in which half of the rates a slot lies.
    uniforms = strata.uniforms
    with monkeypatch.context() as patched:
        parity = np.arange(1000) % 2
        patched.setattr(
            strata, "uniforms", lambda *a, **more: parity if a[1] == SLOT_STEP + 2 else uniforms(*a, **more)
        )
        assert abs(scores(1000, "counted")[0]["counted"]) > 5
    drawn = gradients._drawn
    monkeypatch.setattr(gradients, "_drawn", lambda *a: (drawn(*a)[0], 1.0))
    assert all(abs(score) > 5 for score in scores(500, "counted", "ppots")[0].values())


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
    found = gradient_components({"A": 3 * ones, "AB": 5 * ones, "AC": 6 * ones, "ABC": 7 * ones, "mirror": 4.5 * ones})
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
    arms = ["--arms", "ppots-gradient,mirror-dedup,isad", "--slots", "6", "--pairs", "2", "--single-rows", "4"]
    done = run([sys.executable, tool, str(checkpoint), *arms, "--json", str(file), "--figure", str(figure)])
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert list(result["arms"]) == ["standard", "ppots-gradient", "mirror-dedup", "isad"]
    for row in result["arms"].values():
        assert row["grad_var_ci"][0] <= row["grad_var"] <= row["grad_var_ci"][1] and row["real_steps_grad_var"] > 0
    assert "use more --slots" in done.stdout  # six slots cannot be precise, and it says so
    assert figure.read_bytes().startswith(b"\x89PNG")
    for wrong, word in (
        (["--arms", "nope"], "unknown arm 'nope'"),
        (["--arms", "ar"], "another model"),
        (["--pairs", "1"], "at least 2"),
    ):
        done = run([sys.executable, tool, str(checkpoint), *wrong])
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error:") and word in lines[0]


def test_the_floor_of_a_density_is_found_from_slots_drawn_elsewhere():
    """s2 = 1/t: .5436, from slots drawn by t^-1 with noise; without the weights p/r it would be far off."""
    rng = np.random.default_rng(0)
    t = 1e-3 ** rng.random(20_000)
    weight = t * np.log(1e3) / 0.999  # uniform over the density that t was drawn with
    square = rng.exponential(1 / t)
    nothing = np.zeros_like(t)
    found = density_floor(SlotNoise(nothing, nothing, t, weight, square))
    assert found.low < 0.5436 < found.high and found.high - found.low < 0.02
    unweighted = density_floor(SlotNoise(nothing, nothing, t, np.ones_like(t), square))
    assert not unweighted.low < 0.5436 < unweighted.high
