"""Where the data goes on when a run starts again."""

import json
import threading
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdmtrain import command
from mdmtrain import config as configuration
from mdmtrain.checkpoint import resume
from mdmtrain.data.loader import mixture
from mdmtrain.data.order import START, Cursor, Mixture
from mdmtrain.model.presets import model_shape
from mdmtrain.parallel.world import WRITER_THREAD
from tests.conftest import SOAK

IDENTITY = {"data": [["a", 1.0]], "sequence_length": 64, "global_batch": 16}


def meta(small_run, **changes) -> dict:
    config = configuration.validate(small_run({"diffusion": changes.pop("diffusion", {})}), "test")
    return {"step": 6, "identity": IDENTITY, "config": config.model_dump(mode="json"), **changes}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), max_size=6))
def test_no_sample_is_skipped_or_repeated_when_the_batch_changes(phases):
    """Each phase of some steps with a batch of its own begins with the sample after the last one."""
    cursor, step, read = START, 0, []
    for steps, batch in phases:
        for at in range(step, step + steps):
            first = cursor.at(at, batch, 0).sample
            read += range(first, first + batch)
        step += steps
        cursor = cursor.at(step, batch, 0)
    assert read == list(range(sum(steps * batch for steps, batch in phases)))


@settings(max_examples=300 if SOAK else 40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_phases_are_exact_through_resumes_with_other_batches_and_phases(small_run, data):
    """Starts of a run, each with a batch of its own, and other phases from there on; against reading step by step."""
    weights, batches = st.sampled_from([[1, 3], [2, 1], [0, 1], [1, 0]]), st.sampled_from([4, 8, 16])
    phases, cursor, step, seen, meta = [], START, 0, [], None
    saved_phases = [(0, [1.0, 2.0])]  # as the run has had them
    counts, position, expected = np.zeros(2, dtype=int), 0, []
    for steps in data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)):
        later = sorted(data.draw(st.sets(st.integers(max(step, 1), step + 15), max_size=2)))
        phases = [phase for phase in phases if phase["from_step"] < step]
        phases += [{"from_step": at, "weights": data.draw(weights)} for at in later]
        sources = [{"path": "x", "weight": 1.0}, {"path": "y", "weight": 2.0}]
        changes = {"global_batch": data.draw(batches), "micro_batch": 1, "steps": 100}
        tree = small_run({"run": changes, "data": {"sources": sources, "phases": phases}})
        config = configuration.validate(tree, "test")
        tokenizer = SimpleNamespace(sha256="t")
        identity = resume.run_identity(config, model_shape(config.model, 512), tokenizer, ["x", "y"])
        if meta is not None:
            cursor = resume.continued(json.loads(json.dumps(meta)), identity)
        splits = [SimpleNamespace(prompts=False, tokens=64 * n, shards=1, folder="x", split="train") for n in (7, 30)]
        order = mixture(config, splits, cursor)
        for at in range(step, step + steps):
            first = cursor.at(at, config.slots_per_step, 0).sample
            source, row = order(first + np.arange(config.slots_per_step))
            seen += zip(source.tolist(), row.tolist(), strict=True)
            began = [phase for phase in phases if phase["from_step"] == at]
            if began:
                saved_phases.append((at, began[0]["weights"]))
                position = 0
            own = Mixture([(0, saved_phases[-1][1])], order.sources)  # the phase by itself, from its beginning
            for one in own(np.arange(position, position + config.slots_per_step))[0]:
                expected.append((int(one), int(order.sources[one](counts[one : one + 1])[0])))
                counts[one] += 1
            position += config.slots_per_step
        step += steps
        meta = {"step": step, "identity": identity, "cursor": asdict(cursor), "config": config.model_dump(mode="json")}
    assert seen == expected


def test_phases_that_have_begun_do_not_change(small_run, tmp_path, monkeypatch):
    config = configuration.validate(small_run({"checkpoint": {"allow_changed": ["phases"]}}), "test")
    saved = meta(small_run, has_average=True, identity=IDENTITY | {"phases": [[3, [1.0]], [9, [2.0]]]})
    monkeypatch.setattr(resume.store, "newest", lambda home, damaged: tmp_path)
    monkeypatch.setattr(resume.store, "read_meta", lambda folder: saved)
    for phases in ([[3, [1.0]]], [[3, [1.0]], [6, [5.0]]], [[3, [1.0]], [9, [2.0]]]):  # step 6 is yet to come
        assert resume.find_resume(config, tmp_path, IDENTITY | {"phases": phases}) == tmp_path
    for phases in (None, [[3, [2.0]]], [[4, [1.0]]], [[3, [1.0]], [5, [2.0]]]):
        with pytest.raises(ValueError, match=r"data.phases that begin before its step 6 were \[\[3, \[1.0\]\]\], not"):
            resume.find_resume(config, tmp_path, IDENTITY | {"phases": phases})
    plain = configuration.validate(small_run({}), "test")
    with pytest.raises(ValueError, match=r"its phases is .* with checkpoint.allow_changed='\[phases\]'"):
        resume.find_resume(plain, tmp_path, IDENTITY | {"phases": [[3, [1.0]]]})


def test_the_cursor_follows_what_changed(small_run):
    saved = {"step": 2, "sample": 100, "tokens": 7}
    assert resume.continued(meta(small_run), IDENTITY) == START  # written before there was a cursor
    assert resume.continued(meta(small_run, cursor=saved), IDENTITY) == Cursor(**saved)
    larger = IDENTITY | {"global_batch": 32}
    assert resume.continued(meta(small_run), larger) == Cursor(6, 6 * 16, 6 * 16 * 64)
    assert resume.continued(meta(small_run, cursor=saved), larger) == Cursor(6, 100 + 4 * 16, 7 + 4 * 16 * 64)
    paired = meta(small_run, diffusion={"views": "mirror"})  # two rows of each sample
    assert resume.continued(paired, larger) == Cursor(6, 6 * 8, 6 * 16 * 64)
    for name, value in (("data", [["b", 1.0]]), ("sequence_length", 32)):  # sample numbers stand for others
        assert resume.continued(meta(small_run, cursor=saved), larger | {name: value}) == Cursor(6, 0, 7 + 4 * 16 * 64)


def test_what_may_change_is_named(small_run, tmp_path, monkeypatch):
    config = configuration.validate(small_run({"checkpoint": {"allow_changed": ["data"]}}), "test")
    saved = meta(small_run, has_average=True)
    monkeypatch.setattr(resume.store, "newest", lambda home, damaged: tmp_path)
    monkeypatch.setattr(resume.store, "read_meta", lambda folder: saved)
    assert resume.find_resume(config, tmp_path, IDENTITY | {"data": []}) == tmp_path
    with pytest.raises(
        ValueError, match=r"its global_batch is 16, not 32: .* with checkpoint.allow_changed='\[global_batch\]'"
    ):
        resume.find_resume(config, tmp_path, IDENTITY | {"global_batch": 32})
    with pytest.raises(ValueError, match=r"its seed is None, not 5: use the settings it was trained with, or [^,]*$"):
        resume.find_resume(config, tmp_path, IDENTITY | {"seed": 5})


def test_a_run_does_not_change_its_optimizer(small_run, tmp_path, monkeypatch):
    """The state of the one is not the state of the other. Checkpoints from before Muon are AdamW's."""
    monkeypatch.setattr(resume.store, "newest", lambda home, damaged: tmp_path)
    wanted = {name: configuration.validate(small_run({"optim": {"name": name}}), "test") for name in ("adamw", "muon")}
    for saved in (None, "adamw", "muon"):
        was = meta(small_run, has_average=True)
        was["config"]["optim"]["name"] = saved
        if saved is None:
            del was["config"]["optim"]["name"]
        monkeypatch.setattr(resume.store, "read_meta", lambda folder, was=was: was)
        own, other = ("muon", "adamw") if saved == "muon" else ("adamw", "muon")
        assert resume.find_resume(wanted[own], tmp_path, IDENTITY) == tmp_path
        with pytest.raises(
            ValueError, match=f"with optim.name={own} and has no state of {other}: set optim.name={own}, or start"
        ):
            resume.find_resume(wanted[other], tmp_path, IDENTITY)


def test_a_run_that_fails_lets_its_checkpoint_finish():
    written, may_write = [], threading.Event()
    writer = threading.Thread(target=lambda: may_write.wait(60) and written.append(1), name=WRITER_THREAD)
    writer.start()
    threading.Timer(0.1, may_write.set).start()
    command._let_checkpoint_finish()
    assert written


def test_a_run_does_not_begin_anew_because_its_checkpoints_are_elsewhere(small_run, tmp_path):
    (tmp_path / "run/checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000003/meta.json").touch()
    config = configuration.validate(small_run({"checkpoint": {"dir": str(tmp_path / "new")}}), "test")
    with pytest.raises(
        ValueError, match=r"the checkpoints of .*run are in .*/run/checkpoints, and .*/new has none: copy them"
    ):
        resume.find_resume(config, resume.store.home(config), IDENTITY)
