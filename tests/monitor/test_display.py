"""What TensorBoard and W&B show is what metrics.jsonl says, in groups that begin with the overview."""

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdmtrain import config as configuration
from mdmtrain.monitor.display import BY_OCTILE, GROUPS, LAYOUT, TensorBoard, open_displays, scalars_of
from mdmtrain.monitor.metrics import COMPONENTS, DENSITY, HISTOGRAM, LOSS_BY_SOURCE, MetricsLog

COUNTS = [1, 0, 2, 1, 0, 0, 3, 1]
NOT_SCALAR = ("step", "time", "split", HISTOGRAM, COMPONENTS, DENSITY, LOSS_BY_SOURCE)


def config_of(folder, **monitor):
    tree = {
        "run": {"dir": str(folder), "steps": 9, "global_batch": 4, "micro_batch": 2},
        "model": {"preset": "2m"},
        "data": {"sources": [{"path": "p"}], "sequence_length": 16},
        "optim": {"lr": 0.1},
        "monitor": monitor,
    }
    return configuration.validate(tree, "test")


def training_record(step, loss):
    octiles = [loss * (k + 1) if count else None for k, count in enumerate(COUNTS)]
    more = {"skipped": step == 2, "grad_norm": None if step == 2 else 0.5, "mfu": None, "lr": 0.125, "time": 1e9}
    if step == 4:
        more |= {LOSS_BY_SOURCE: {"web": 3.5, "code": None}}
        more |= {COMPONENTS: {"A": 0.5, "B_t": -0.25, "C": None}, DENSITY: {"used": [0.5, 1.5], "wanted": [0.0, 2.0]}}
    return {"step": step, "loss": loss, **more, **dict.fromkeys(BY_OCTILE, octiles), HISTOGRAM: COUNTS}


def train(folder, resumed_at, records, **monitor):
    """Records as RunLog writes and shows them."""
    folder.mkdir(exist_ok=True)
    metrics = MetricsLog(folder, resumed_at)
    displays = open_displays(folder, resumed_at, config_of(folder, **monitor))
    for record in metrics.write(records):
        for display in displays:
            display.show(record)
    for display in displays:
        display.show_probe_cost(6, 0.5, 0.125)
        display.flush()
        display.close()
    metrics.close()


def test_tensorboard_shows_the_records_and_nothing_else(tmp_path):
    """Killed after step 5, resumed from step 3: the events are those of the file; the lost course is not shown."""
    run = tmp_path / "my-run"
    first = [training_record(step, 10.0 + step) for step in range(1, 6)]
    train(run, 0, [*first, {"step": 5, "split": "validation", "nelbo": 9.0}])
    second = [training_record(step, 20.0 + step) for step in (4, 5, 6)]
    train(run, 3, [*second, {"step": 6, "split": "validation", "nelbo": 2.5, "nelbo_se": 0.125}])

    expected = {}
    for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name, value in r.items():
            if name in BY_OCTILE:
                for k, mean in enumerate(value):
                    if mean is not None:
                        expected.setdefault(f"{name.split('_')[0]}_by_rate/octile_{k}", []).append((r["step"], mean))
            elif name not in NOT_SCALAR and value is not None:
                group = r.get("split") or GROUPS.get(name, "train")
                expected.setdefault(f"{group}/{name}", []).append((r["step"], float(value)))
    expected |= {"variance/A": [(4, 0.5)], "variance/B_t": [(4, -0.25)], "Overview/validation_nelbo": [(6, 2.5)]}
    expected |= {"sources/web": [(4, 3.5)]}
    expected |= {"variance/probe_seconds": [(6, 0.5)], "variance/probe_share_of_time": [(6, 0.125)]}
    (folder,) = (run / "events").iterdir()
    assert folder.name == "my-run"  # TensorBoard lists a run by its folder
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    drawn = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert drawn == expected
    assert [loss for _, loss in drawn["Overview/loss"]] == [11, 12, 13, 24, 25, 26]
    assert [step for step, _ in drawn["health/grad_norm"]] == [1, 3, 4, 5, 6]  # null is a gap, not a zero
    assert min(drawn).startswith("Overview/")  # TensorBoard sorts groups by character
    assert [image.step for image in board.Images("variance/rate_density")] == [4]
    histograms = board.Histograms("train/masking_rate")
    assert [h.step for h in histograms] == [1, 2, 3, 4, 5, 6]
    shown = histograms[-1].histogram_value
    assert shown.num == sum(COUNTS) and list(shown.bucket) == COUNTS
    assert shown.sum == pytest.approx(sum((k + 0.5) / 8 * c for k, c in enumerate(COUNTS)))
    assert {"configuration/text_summary", "custom_scalars__config__"} <= set(board.Tags()["tensors"])


def test_events_of_an_older_version_move_to_the_folder_with_the_name(tmp_path):
    (tmp_path / "events").mkdir()
    (tmp_path / "events/events.out.tfevents.1").write_bytes(b"old")
    TensorBoard(tmp_path, 0, config_of(tmp_path)).close()
    assert (tmp_path / "events" / tmp_path.name / "events.out.tfevents.1").read_bytes() == b"old"


def test_every_chart_of_the_overview_names_tags_that_exist():
    """A chart whose expression matches nothing stays empty, and nobody is told."""
    import re

    fields = [*GROUPS, "nelbo", "tokens"]
    record = {"step": 1, **dict.fromkeys(fields, 1.0), COMPONENTS: dict.fromkeys(["A", "B_t", "B_int", "C"], 1.0)}
    record |= dict.fromkeys(BY_OCTILE, [1.0] * 8)
    tags = scalars_of(record) | scalars_of({"step": 1, "split": "validation", "nelbo": 1.0, "bits_per_byte": 1.0})
    for charts in LAYOUT.values():
        for chart, (_, expressions) in charts.items():
            for expression in expressions:
                assert any(re.fullmatch(expression, tag) for tag in tags), chart


class FakeWandb:
    """The calls that W&B got."""

    Error = RuntimeError
    util = SimpleNamespace(generate_id=lambda: "id-1")

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, *arguments, **named):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_same_scalars_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "mine"
    for resumed_at in (0, 1):
        train(run, resumed_at, [training_record(resumed_at + 1, 3.0)], wandb="project", tensorboard=False)
    assert [s["id"] for s in fake.started] == ["id-1", "id-1"] and fake.started[0]["name"] == "mine"
    assert fake.started[0]["config"]["optim"]["lr"] == 0.1 and fake.finished == 2
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert fake.logged[0] == {"step": 1, **scalars_of(record)} and fake.logged[0]["Overview/loss"] == 3.0


def test_wandb_that_is_missing_or_refuses_is_one_line(tmp_path, monkeypatch):
    from mdmtrain.monitor import display

    monkeypatch.setattr(display, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"monitor\.wandb: the package wandb is not installed: pip install wandb"):
        display.check_displays(config_of(tmp_path, wandb="project"))
    fake = FakeWandb()

    def refuse(**settings):
        raise fake.Error("not logged in")

    fake.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match=r"monitor\.wandb: not logged in: log in .* WANDB_MODE=offline"):
        open_displays(tmp_path, 0, config_of(tmp_path, wandb="project"))
