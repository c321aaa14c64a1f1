"""metrics.jsonl is the truth: cut to the checkpoint on resume, drawn as it is, with numbers that a naive sum gives."""

import json
import math

import numpy as np
import pytest
import torch

from mdmtrain import config
from mdmtrain.diffusion.objective import MaskingRates, plain_process
from mdmtrain.monitor.metrics import (
    COMPONENTS,
    HISTOGRAM,
    LOSS_BY_SOURCE,
    OCTILES,
    MetricsLog,
    thinned,
    validation_scores,
)
from mdmtrain.monitor.recorder import Layout, StepRecorder, finite, peak_memory, sums_of_a_step
from tests.conftest import WALL_CLOCK

EPS, ROWS, LENGTH = 0.2, 4, 10


def record(step, **more):
    return {"step": step, "loss": 1.0 / step, **more}


def read(path):
    """The records, by a reader that knows JSON and nothing more."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (path / "metrics.jsonl").read_text().splitlines()]


# ---- the cut


def write(folder, text):
    (folder / "metrics.jsonl").write_text(text)


def lines(steps):
    return "".join(json.dumps(record(step)) + "\n" for step in steps)


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 3, "loss": 0.3}', "{"])
def test_a_resume_keeps_what_the_checkpoint_knows_and_moves_the_rest(tmp_path, torn):
    """Nothing is destroyed but a torn line: later records are in another file, once."""
    evaluation = json.dumps({"step": 3, "split": "validation", "nelbo": 2.0}) + "\n"
    kept = lines([1, 2, 3]) + evaluation
    write(tmp_path, kept + lines([4, 5]) + torn)
    for _ in range(2):  # idempotent: a resume that is itself killed and resumed
        MetricsLog(tmp_path, 3).close()
        assert (tmp_path / "metrics.jsonl").read_text() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.abandoned.jsonl", "metrics.jsonl"]
    assert (tmp_path / "metrics.abandoned.jsonl").read_text() == lines([4, 5])


def test_what_is_missing_or_moved_is_said(tmp_path):
    write(tmp_path, lines([1, 2, 3, 4]))
    assert MetricsLog(tmp_path, 4).notes == []
    (moved,) = MetricsLog(tmp_path, 2).notes
    assert moved.startswith("2 records of steps 3 to 4 moved from metrics.jsonl to metrics.abandoned.jsonl")
    (missing,) = MetricsLog(tmp_path, 5).notes
    assert "lacks the records of steps 3 to 5" in missing


def test_a_new_start_sets_the_old_records_and_events_aside(tmp_path):
    """Twice: the second one must not write over what the first one kept."""
    for _ in range(2):
        log = MetricsLog(tmp_path, 0)
        log.write([record(1)])
        log.close()
        (tmp_path / "events").mkdir()
    MetricsLog(tmp_path, 0).close()
    assert (tmp_path / "metrics.abandoned.jsonl").read_text() == lines([1, 1])
    assert (tmp_path / "events.abandoned").is_dir() and (tmp_path / "events.abandoned-2").is_dir()


def test_thinning_keeps_what_happened_in_between():
    """Every third; a skipped step, a probe, a gradient pair; and the last one where a checkpoint follows."""
    kept = {2: {"skipped": True}, 4: {COMPONENTS: {}}, 5: {"grad_noise": 1.0}}
    records = [{"step": step, "skipped": False, **kept.get(step, {})} for step in range(1, 9)]
    assert [r["step"] for r in thinned(records, 3, saving=False)] == [2, 3, 4, 5, 6]
    assert [r["step"] for r in thinned(records, 3, saving=True)] == [2, 3, 4, 5, 6, 8]
    assert thinned(records, 1, saving=False) == records


def test_the_best_evaluation_is_the_mean_over_splits(tmp_path):
    """A value that is not finite is never the best; training records do not count."""
    evaluations = [(2, "a", 3.0), (2, "b", 1.0), (4, "a", 1.0), (4, "b", None)]
    (tmp_path / "metrics.jsonl").write_text(
        lines([1])
        + "".join(json.dumps({"step": s, "split": name, "nelbo": n}) + "\n" for s, name, n in evaluations)
        + '{"step": 6, "split": "a", "nel'
    )
    assert validation_scores(tmp_path) == {2: 2.0, 4: math.inf}


def test_steps_from_another_course_are_cut_in_whatever_order_they_stand(tmp_path):
    write(tmp_path, lines([1, 2, 3, 4, 2, 3]))
    MetricsLog(tmp_path, 2).close()
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 2]


def test_a_run_that_starts_anew_has_no_records_before(tmp_path):
    write(tmp_path, lines([1, 2]))
    log = MetricsLog(tmp_path, 0)
    assert read(tmp_path) == []
    log.write([record(1)])
    log.close()
    assert read(tmp_path) == [record(1)]


def test_records_reach_the_file_when_written_not_when_closed(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write([record(1), record(2)])
    assert read(tmp_path) == [record(1), record(2)]
    log.sync()
    log.close()


def test_an_interrupted_cut_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write(tmp_path, lines([1, 2, 3]))

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(OSError):
        MetricsLog(tmp_path, 1)
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3]


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    """JSON has no NaN and no Infinity: jq, pandas and JavaScript stop at them. A single validation row has se = inf."""
    log = MetricsLog(tmp_path, 0)
    log.write([{"step": 1, "split": "validation", "nelbo": math.nan, "nelbo_se": math.inf}])
    log.close()
    assert read(tmp_path) == [{"step": 1, "split": "validation", "nelbo": None, "nelbo_se": None}]


# ---- the recorder


BINS = 64


def make_recorder(clip=1.0, world=1, rows=ROWS, rank=0, mfu_per_speed=None, sources=("p",), views="single"):
    tree = {
        "run": {"dir": "r", "steps": 9, "global_batch": rows, "micro_batch": 2},
        "model": {"preset": "2m"},
        "data": {"sources": [{"path": path} for path in sources], "sequence_length": LENGTH},
        "optim": {"lr": 0.1, "clip_norm": clip},
        "diffusion": {"eps": EPS, "views": views},
    }
    settings = config.validate(tree, "test")
    return StepRecorder(settings, config.resolve(settings, world), torch.device("cpu"), rank, mfu_per_speed)


def run_step(recorder, step, rates, losses, masked, eligible, norm=0.5, skipped=0.0, pair=None, others=0.0):
    """As the loop does it: micro-steps of two rows."""
    sums, process, drawn = (
        recorder.new_sums(),
        plain_process(config.DiffusionConfig(eps=EPS)),
        MaskingRates(rates, np.ones(ROWS)),
    )
    cells = process.row_cells(drawn)
    for k in range(0, ROWS, 2):
        two = slice(k, k + 2)
        mine = torch.tensor(losses[two])
        recorder.add_micro_step(sums, mine, mine**2, cells[two], sum(masked[two]), sum(eligible[two]))
    counts = np.bincount(cells, minlength=BINS)
    if pair is not None:
        recorder.add_pair(sums, torch.tensor(pair))
    sums += others  # of other ranks
    recorder.add_step(step, process, drawn, counts, sums, torch.tensor(norm), torch.tensor(skipped), 0.25)
    return sums


def layout_of(world=1):
    """The layout of the sums of a step of `make_recorder(world=world)`."""
    return Layout(sums_of_a_step(BINS, world, 0))


RATES = np.array([0.2, 0.99, 0.25, 1.0])  # octiles of [.2, 1]: 0, 7, 0, 7
LOSSES = [3.0, 5.0, 8.0, 6.5]


def test_the_parts_of_a_vector_lie_in_a_row():
    layout = Layout({"a": 2, "b": 1, "c": 3})
    assert layout.length == 6 and (layout["a"], layout["b"], layout["c"]) == (slice(0, 2), slice(2, 3), slice(3, 6))
    assert {name: part.tolist() for name, part in layout.split(np.arange(6)).items()} == {
        "a": [0, 1], "b": [2], "c": [3, 4, 5]
    }  # fmt: skip


@pytest.mark.parametrize("views", ["single", "mirror"])
def test_losses_by_source_are_the_means_of_its_rows(views):
    """Sources of the same last name get their number; one without a row in the step has no mean."""
    per = 1 if views == "single" else 2
    recorder = make_recorder(sources=("a/x", "b/y", "c/x"), views=views, rows=ROWS * per)
    sums, process = recorder.new_sums(), plain_process(config.DiffusionConfig(eps=EPS))
    losses = [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0][: ROWS * per]
    source = [0, 2, 0, 0]
    for k in range(0, ROWS, 2):
        mine = torch.tensor(losses[k * per : (k + 2) * per])
        recorder.add_sources(sums, mine, torch.tensor(source[k : k + 2]))
    recorder.add_step(1, process, MaskingRates(RATES, np.ones(ROWS)), np.ones(BINS), sums, *torch.zeros(2), 0.25)
    rows = np.repeat(source, per)
    (record,) = recorder.flush()
    means = [np.mean(np.array(losses)[rows == one]) / LENGTH for one in (0, 2)]
    assert record[LOSS_BY_SOURCE] == pytest.approx({"x-1": means[0], "y": None, "x-3": means[1]})
    assert LOSS_BY_SOURCE not in make_flushed(make_recorder())


def make_flushed(recorder) -> dict:
    sums = run_step(recorder, 1, RATES, LOSSES, [1, 9, 2, 10], [10, 10, 8, 10])
    recorder.add_sources(sums, torch.ones(2), torch.zeros(2, dtype=torch.int64))
    return recorder.flush()[0]


def test_a_record_is_the_naive_sum():
    recorder = make_recorder()
    sums = run_step(recorder, 3, RATES, LOSSES, [1, 9, 2, 10], [10, 10, 8, 10])
    parts = layout_of().split(sums)
    assert (parts["eligible"].item(), parts["masked"].item()) == (38, 22)
    assert not any(parts[name].any() for name in ("pair", "seconds", "memory"))
    assert recorder.statistics(sums).sum() == pytest.approx(sum(loss**2 for loss in LOSSES))
    (shown,) = recorder.flush()
    by_octile, histogram = [0.0] * OCTILES, [0] * OCTILES
    for rate, loss in zip(RATES, LOSSES, strict=True):
        octile = min(OCTILES - 1, math.floor((rate - EPS) / (1 - EPS) * OCTILES + 1e-12))
        by_octile[octile] += loss / LENGTH
        histogram[octile] += 1
    assert shown[HISTOGRAM] == histogram == [2, 0, 0, 0, 0, 0, 0, 2]
    assert shown["loss_by_octile"] == [
        pytest.approx(s / c) if c else None for s, c in zip(by_octile, histogram, strict=True)
    ]
    assert shown["loss"] == pytest.approx(sum(LOSSES) / (ROWS * LENGTH))  # the constant
    assert shown["nelbo"] == pytest.approx(sum(LOSSES) / 38)  # per eligible token
    assert shown["masked_fraction"] == pytest.approx(22 / 38)
    assert shown["statistic_by_octile"][0] == pytest.approx((3.0**2 + 8.0**2) / 2)
    assert shown["statistic_by_octile"][7] == pytest.approx((5.0**2 + 6.5**2) / 2) and "grad_noise" not in shown
    assert shown["step"] == 3 and shown["tokens"] == 3 * ROWS * LENGTH and shown["lr"] == 0.25
    assert shown["grad_norm"] == 0.5 and shown["clipped"] is False and shown["skipped"] is False
    assert shown["data_wait"] >= 0 and shown["tokens_per_second"] > 0 and shown["mfu"] is None
    # Without eps the octiles would be others: .25 * 8 is 2.
    assert [math.floor(rate * OCTILES) for rate in RATES[[0, 2]]] != [0, 0]


def test_mfu_follows_the_speed_and_memory_is_that_of_the_fullest_rank():
    recorder = make_recorder(world=2, mfu_per_speed=1e-3)
    sums = recorder.new_sums()
    recorder.add_own(sums)
    memory = layout_of(world=2)["memory"]
    mine, other = sums[memory]
    assert peak_memory(torch.device("cpu")) == mine > 2**20 and other == 0
    others = torch.zeros_like(sums)
    others[memory][1] = 2.0**50  # of the other rank
    run_step(recorder, 1, RATES, LOSSES, [1, 9, 2, 10], [10, 10, 8, 10], others=others)
    (shown,) = recorder.flush()
    assert shown["memory_gib"] == 2**20 and shown["mfu"] == pytest.approx(shown["tokens_per_second"] / 1000)


def test_octiles_have_eight_equal_parts_and_closed_ends():
    edges = EPS + (1 - EPS) * np.arange(OCTILES + 1) / OCTILES
    process = plain_process(config.DiffusionConfig(eps=EPS))
    middles, ends = (edges[1:] + edges[:-1]) / 2, np.array([EPS, 1.0, EPS * (1 - 1e-15)])

    def octile(rates):
        return (process.row_cells(MaskingRates(rates, np.ones(len(rates)))) // (BINS // OCTILES)).tolist()

    assert octile(middles) == list(range(8))
    assert octile(ends) == [0, 7, 0]  # a rate of 1 is in the last, not in a ninth; eps rounded down is in the first


def test_octile_means_weigh_into_the_loss():
    """sum_k rows_k * mean_k / rows = loss: the curve by rate and the curve agree."""
    generator = np.random.default_rng(0)
    recorder = make_recorder()
    for step in range(1, 4):
        rates = EPS + (1 - EPS) * generator.random(ROWS)
        run_step(recorder, step, rates, generator.random(ROWS).tolist(), [1] * ROWS, [LENGTH] * ROWS)
    records = recorder.flush()
    assert [r["step"] for r in records] == [1, 2, 3]
    for r in records:
        whole = sum(c * m for c, m in zip(r[HISTOGRAM], r["loss_by_octile"], strict=True) if c) / ROWS
        assert whole == pytest.approx(r["loss"])
    assert len({r["loss"] for r in records}) == 3  # each step has its own sums


def test_a_step_that_is_not_finite_is_null_and_counted():
    recorder = make_recorder()
    bad = [3.0, float("nan"), 8.0, 6.5]
    run_step(recorder, 1, RATES, bad, [1] * 4, [10] * 4, norm=float("nan"), skipped=1.0)
    run_step(recorder, 2, RATES, [3.0, float("inf"), 8.0, 6.5], [1] * 4, [10] * 4, norm=float("inf"), skipped=1.0)
    first, second = recorder.flush()
    for r in (first, second):
        assert r["loss"] is None and r["nelbo"] is None and r["grad_norm"] is None and r["skipped"] is True
        assert r["loss_by_octile"][0] == pytest.approx(11 / 2 / LENGTH) and r["loss_by_octile"][7] is None
        json.dumps(r, allow_nan=False)
    assert recorder.skips_in_a_row == 2
    run_step(recorder, 3, RATES, LOSSES, [1] * 4, [10] * 4)
    recorder.flush()
    assert recorder.skips_in_a_row == 0


def test_skips_in_a_row_are_counted_over_flushes():
    recorder = make_recorder()
    for step, skipped in enumerate([1.0, 0.0, 1.0], 1):
        run_step(recorder, step, RATES, LOSSES, [1] * 4, [10] * 4, skipped=skipped)
    recorder.flush()
    assert recorder.skips_in_a_row == 1
    run_step(recorder, 4, RATES, LOSSES, [1] * 4, [10] * 4, skipped=1.0)
    recorder.flush()
    assert recorder.skips_in_a_row == 2


@pytest.mark.parametrize(("clip", "norm", "clipped"), [(1.0, 1.5, True), (1.0, 0.9, False), (None, 99.0, False)])
def test_clipped_says_whether_the_norm_was_over_the_limit(clip, norm, clipped):
    recorder = make_recorder(clip)
    run_step(recorder, 1, RATES, LOSSES, [1] * 4, [10] * 4, norm=norm)
    assert recorder.flush()[0]["clipped"] is clipped


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf")])
def test_finite_turns_what_json_cannot_say_into_null(value):
    assert finite(value) is None
    assert json.dumps(finite(np.float32(1.5))) == "1.5"


def test_the_control_variate_keeps_the_mean_and_is_quieter():
    """T8 of mathematics.md: y = 1 + 5t; without the mean of each cell the curve varies less."""
    recorder, generator = make_recorder(), np.random.default_rng(1)
    for step in range(1, 3001):
        rates = EPS + (1 - EPS) * generator.random(ROWS)
        losses = ((1 + 5 * rates) * LENGTH).astype(np.float32).tolist()
        run_step(recorder, step, rates, losses, [1] * ROWS, [LENGTH] * ROWS)
    records = recorder.flush()[500:]
    raw, smooth = (np.array([r[name] for r in records]) for name in ("loss", "loss_smooth"))
    mean, se = 1 + 5 * (1 + EPS) / 2, raw.std() / np.sqrt(len(raw))
    assert abs(raw.mean() - mean) < 5 * se and abs(smooth.mean() - mean) < 5 * se
    assert smooth.var() < 0.05 * raw.var()
    assert records[-1]["loss_smooth_variance_ratio"] == pytest.approx(smooth.var() / raw.var(), rel=0.5)
    forgotten = smooth - 1.0  # without adding the baseline's mean back, the curve would be off
    assert abs(forgotten.mean() - mean) > 5 * se


def test_a_restored_recorder_goes_on_with_the_same_numbers():
    one, other = make_recorder(), make_recorder()
    run_step(one, 1, RATES, LOSSES, [1] * 4, [10] * 4, skipped=0.0)
    one.flush()
    other.restore(json.loads(json.dumps(one.state())))
    records = []
    for recorder in (one, other):
        run_step(recorder, 2, RATES, LOSSES[::-1], [1] * 4, [10] * 4, pair=[4.0, 0.5])
        run_step(recorder, 3, RATES, [1.0, 2.0, 3.0, 4.0], [1] * 4, [10] * 4)
        records.append([{k: v for k, v in r.items() if k not in WALL_CLOCK} for r in recorder.flush()])
    assert records[0] == records[1] and records[0][1]["loss_smooth_variance_ratio"] is not None
    assert one.state() == other.state()


def test_each_rank_has_a_place_for_its_masked_tokens():
    """Two ranks, of which this is the second: a rank's number must not be added to another's."""
    recorder = make_recorder(world=2, rank=1)
    layout = layout_of(world=2)
    others = torch.zeros(layout.length)
    others[layout["eligible"]] = 38
    others[layout["masked"]][0] = 30  # of the first rank
    run_step(recorder, 1, RATES, LOSSES, [1, 9, 2, 10], [10, 10, 8, 10], others=others)
    (shown,) = recorder.flush()
    assert (shown["masked_tokens_min"], shown["masked_tokens_max"]) == (22, 30)
    assert shown["masked_fraction"] == pytest.approx(52 / 76)


def test_what_a_step_sends_depends_on_the_bins_and_the_ranks_alone():
    sizes = {make_recorder(rows=rows, world=2).new_sums().numel() for rows in (4, 64, 4096)}
    assert sizes == {layout_of(world=2).length}


def test_gradient_noise_is_shown_where_both_steps_were_taken():
    recorder = make_recorder()
    for step, (skipped, pair) in enumerate([(0, [2.0, 0.5]), (1, [9.0, 9.0]), (0, [9.0, 9.0]), (0, [4.0, 1.5])], 1):
        run_step(recorder, step, RATES, LOSSES, [1] * 4, [10] * 4, skipped=float(skipped), pair=pair)
    run_step(recorder, 5, RATES, LOSSES, [1] * 4, [10] * 4, pair=[4.0, -99.0])
    records = recorder.flush()
    assert [r.get("grad_noise") for r in records] == [2.0, None, None, 4.0, 4.0]
    tokens = ROWS * LENGTH
    assert records[0]["noise_scale_tokens"] == pytest.approx(tokens * 2 / 0.5)
    assert records[3]["noise_scale_tokens"] == pytest.approx(tokens * (0.9 * 2 + 0.1 * 4) / (0.9 * 0.5 + 0.1 * 1.5))
    assert records[4]["noise_scale_tokens"] is None  # no signal: not a negative scale


def test_t8_an_exact_baseline_leaves_the_variance_within_a_cell():
    """y = 1 + 5t: 25/12 falls to 25/12 / cells^2 (ten cells: .020833), and adding the mean back keeps the mean."""
    recorder, generator, records = make_recorder(), np.random.default_rng(2), []
    means = 1 + 5 * (EPS + (1 - EPS) * (np.arange(BINS) + 0.5) / BINS)
    for step in range(1, 2001):
        recorder.restore({**recorder.state(), "baseline": means.tolist(), "seen": [True] * BINS})
        rates = EPS + (1 - EPS) * generator.random(ROWS)
        losses = ((1 + 5 * rates) * LENGTH).astype(np.float32).tolist()
        run_step(recorder, step, rates, losses, [1] * ROWS, [LENGTH] * ROWS)
        records += recorder.flush()
    smooth = np.array([r["loss_smooth"] for r in records])
    expected, squares = (5 * (1 - EPS) / BINS) ** 2 / 12, ROWS * (smooth - smooth.mean()) ** 2
    assert abs(squares.mean() - expected) < 5 * squares.std() / np.sqrt(len(squares))
    assert abs(smooth.mean() - (1 + 5 * (1 + EPS) / 2)) < 5 * smooth.std() / np.sqrt(len(smooth))


def test_t8_a_detached_baseline_leaves_every_bit_of_the_gradient():
    """The variate only adds a constant; one that followed the weights would move the gradient."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 8, generator=generator), torch.randn(8, generator=generator, requires_grad=True)
    cell = (torch.arange(64) // 10).clamp(max=3)  # unequal shares, as without strata

    def gradient(baseline):
        y = (x @ w).square()
        b = baseline(y)
        (y.sum() / 64 if b is None else (y - b[cell] + b.mean()).sum() / 64).backward()
        found, w.grad = w.grad.clone(), None
        return found

    def moving(y):
        return torch.stack([y[cell == k][:8].mean() for k in range(4)])

    plain = gradient(lambda y: None)
    assert torch.equal(plain, gradient(lambda y: moving(y).detach()))
    assert not torch.equal(plain, gradient(lambda y: moving(y)))
