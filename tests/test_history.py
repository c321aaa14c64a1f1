"""What a run remembers when it starts again: nothing is destroyed, and nothing changes without a word.

Commands as a user gives them (tests/test_bad_inputs.py says how), each on a copy of one finished run.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from mdmtrain.checkpoint import initial_weights, run_folder, store
from mdmtrain.checkpoint.export import export
from mdmtrain.checkpoint.weights import open_checkpoint
from tests.conftest import read_metrics, write_config
from tests.test_bad_inputs import Outcome, server, warm  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def finished(server, corpus, tmp_path_factory) -> Path:  # noqa: F811
    """A finished run of six steps, with checkpoints and (empty) exports of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("history")
    tree = {
        "run": {"dir": str(folder / "run"), "seed": 5, "steps": 6, "global_batch": 8, "micro_batch": 4},
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": 32, "workers": 0},
        "optim": {"lr": 3e-3},
        "checkpoint": {"save_every": 2, "keep_last": 3},
        "monitor": {"log_every": 1, "tensorboard": False, "probe_every": None},
        "eval": {"every": 2, "rows": 8, "samples": 1, "batch": 8},
    }
    done = warm("train", [str(write_config(tree, folder / "config.yaml"))], folder / "train")
    assert done.status == 0 and not done.err, done
    for step in (2, 4, 6):
        (folder / f"run/exports/step-{step:08d}").mkdir(parents=True)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def train(run: Path, finished: Path, *changes: str) -> Outcome:
    arguments = [str(finished.parent / "config.yaml"), f"run.dir={run}", *changes]
    return warm("train", arguments, run.parent / "command")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def resume_line(outcome: Outcome) -> str:
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("resumed from")]
    return line


def test_records_outlive_their_checkpoints(run, finished):
    """Removed to save disk, then the same command: without the refusal metrics.jsonl would be empty afterwards."""
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    line = train(run, finished).refusal()
    assert "its checkpoints are missing (the last one was of step 6)" in line and "choose another run.dir" in line
    assert (run / "metrics.jsonl").read_bytes() == before
    # What the line advises: it starts again from step 0, and the old exports do not pass for the new run's.
    (run / "metrics.jsonl").rename(run / "old.jsonl")
    done = train(run, finished)
    assert done.status == 0 and "fresh weights" in done.out
    assert read_metrics(run) == read_metrics(finished)
    assert "abandoned-step-00000006" in names(run / "exports")


def test_a_run_that_was_killed_before_its_first_save_starts_again(run, finished):
    shutil.rmtree(run / "checkpoints")
    history = [line for line in (run / "history.jsonl").read_text().splitlines() if '"checkpoint", "step"' not in line]
    assert len(history) == 1
    (run / "history.jsonl").write_text(history[0] + "\n" + '{"time": "torn')
    old = (run / "metrics.jsonl").read_text()
    done = train(run, finished)
    assert done.status == 0
    assert "9 records of steps 1 to 6 moved from metrics.jsonl to metrics.abandoned.jsonl" in done.out
    assert read_metrics(run) == read_metrics(finished)
    assert (run / "metrics.abandoned.jsonl").read_text() == old
    assert [e["event"] for e in run_folder.read_history(run)] == ["start", "start", *["checkpoint"] * 3]


def test_lost_records_are_named(run, finished):
    (run / "metrics.jsonl").unlink()
    done = train(run, finished, "run.steps=8")
    assert done.status == 0 and "metrics.jsonl lacks the records of steps 1 to 6" in done.out
    assert [r["step"] for r in read_metrics(run) if "split" not in r] == [7, 8]


def test_every_change_is_named_and_every_configuration_kept(run, finished):
    changes = {"run.steps": 12, "optim.lr": 0.3, "optim.clip_norm": None, "optim.beta1": 0.8, "eval.seed": 4}
    done = train(run, finished, *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    line = resume_line(done)
    before = "run.steps 6 -> 12, optim.lr 0.003 -> 0.3, optim.beta1 0.9 -> 0.8, optim.clip_norm 1.0 -> null"
    assert before in line and "eval.seed 0 -> 4" in line
    assert "learning rate of step 7 0.0003 -> 0.165" in line
    # run.dir is the copy's, and nothing else differs.
    assert line.count(" -> ") == len(changes) + 2 and f'run.dir "{finished}" -> "{run}"' in line
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 0.3
    starts = [entry for entry in run_folder.read_history(run) if entry["event"] == "start"]
    assert [(s["step"], s["config"]["optim"]["lr"], s["ranks"]) for s in starts] == [(0, 0.003, 1), (6, 0.3, 1)]
    assert [r["lr"] for r in read_metrics(run) if r["step"] == 7] == [pytest.approx(0.165)]
    calm = train(run, finished, *(f"{key}={json.dumps(value)}" for key, value in changes.items()), "run.steps=14")
    assert "changed: run.steps 12 -> 14" in resume_line(calm), "compared to the checkpoint, not to the first start"


def test_going_back_to_a_step_happens_once(run, finished):
    back = train(run, finished, "checkpoint.resume=2", "run.steps=5")
    assert back.status == 0, back
    assert "step-00000002; changed:" in resume_line(back) and 'checkpoint.resume "auto" -> 2' in back.out
    gone = {f"abandoned-step-0000000{step}" for step in (4, 6)}
    assert gone <= set(names(run / "exports")) and gone <= set(names(run / "checkpoints"))
    assert store.newest(run).name == "step-00000005"
    moved = [json.loads(line)["step"] for line in (run / "metrics.abandoned.jsonl").read_text().splitlines()]
    assert moved == [3, 4, 4, 5, 6, 6]
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 2, 3, 4, 4, 5, 5]
    # The same command, as torchrun or a scheduler gives it after a crash, resumes from what has been reached.
    again = train(run, finished, "checkpoint.resume=2", "run.steps=6")
    assert "step-00000005; changed: run.steps 5 -> 6" in resume_line(again)
    missing = train(run, finished, "checkpoint.resume=3").refusal()
    assert "checkpoint.resume=3: the checkpoint of this step does not exist" in missing
    assert "there are: 4, 5, 6" in missing


def test_fewer_steps_than_done(run, finished):
    done = train(run, finished, "run.steps=4")
    assert done.status == 0 and done.out.startswith(f"{run} has done 6 steps, more than run.steps=4: nothing to train")
    assert read_metrics(run) == read_metrics(finished)


def test_the_best_checkpoints_stay(finished, tmp_path):
    """A learning rate at which the loss rises: the best evaluation is an early one, which keep_last would remove."""
    run = tmp_path / "run"
    changes = ["run.steps=12", "optim.lr=2.0", "checkpoint.keep_last=1", "checkpoint.keep_best=1"]
    changes += ["optim.min_lr_ratio=1.0"]
    done = train(run, finished, *changes, "monitor.record_every=5")
    assert done.status == 0, done
    records = read_metrics(run)
    scores = {r["step"]: r["nelbo"] for r in records if "split" in r}
    best = min(scores, key=scores.get)
    assert best not in (10, 12), "the case shows nothing"
    assert names(run / "checkpoints") == [f"step-{best:08d}", "step-00000012"]
    assert f"best checkpoint by validation NELBO ({scores[best]:.4f}): {run}/checkpoints/step-{best:08d}" in done.out
    # Thinned: every fifth, and the last one before each checkpoint.
    assert [r["step"] for r in records if "split" not in r] == [2, 4, 5, 6, 8, 10, 12]
    assert "monitor.record_every=5" in done.out
    refused = train(run, finished, "checkpoint.keep_best=1", "eval.every=5", "checkpoint.save_every=2").refusal()
    assert "checkpoint.keep_best needs an evaluation at its checkpoints" in refused


def test_another_vocabulary_is_refused_with_an_offer(finished, tmp_path):
    new = [f"checkpoint.init_from={finished}", "model.vocab_size=640", "optim.lr=1e-9"]
    line = train(tmp_path / "new", finished, *new).refusal()
    assert "its vocabulary has 512 rows, not 640" in line and "checkpoint.resize_vocab=true" in line
    done = train(tmp_path / "new", finished, *new, "checkpoint.resize_vocab=true")
    assert done.status == 0 and "resized: 512 of 512 tokens keep their rows" in done.out
    # 128 more rows with the mean logit: the loss rises, by no more than their share of the softmax.
    was, now = ([r["nelbo"] for r in read_metrics(run) if "split" in r][-1] for run in (finished, tmp_path / "new"))
    assert was < now < was + 0.5


def test_rows_follow_their_pieces():
    import torch

    rows = initial_weights.rows_by_piece(["<s>", "a", "b"], ["b", "<s>", "c"], 4)
    assert rows.tolist() == [2, 0, -1, -1]
    old = torch.tensor([[0.0, 3.0], [3.0, 0.0], [6.0, 6.0], [100.0, 100.0]])  # the last is no piece's
    assert initial_weights.resized(old, rows, 3).tolist() == [[6.0, 6.0], [0.0, 3.0], [3.0, 3.0], [3.0, 3.0]]


# ---- evaluate and generate on what there is


def from_elsewhere(directory: Path, module: str, arguments: list[str], files: Path) -> Outcome:
    """A warm command in a working directory of its own."""
    before = os.getcwd()
    os.chdir(directory)  # a forked process starts where the one that asks for it is
    try:
        return warm(module, arguments, files)
    finally:
        os.chdir(before)


def results(folder: Path, directory: Path, out: Path, *options: str) -> dict:
    done = from_elsewhere(directory, "evaluate", [str(folder), "--json", str(out), *options], out)
    assert done.status == 0, done
    return {**json.loads(out.read_text())["results"][0], "shown": done.out}


def test_a_run_is_evaluated_from_anywhere_and_so_is_its_export(server, corpus, finished, tmp_path):  # noqa: F811
    """Its data, checkpoints and run folder have relative names; the same numbers come out, digit for digit."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus").symlink_to(corpus)
    relative = ["run.dir=runs/one", "checkpoint.dir=kept/one", "data.sources=[{path: data/corpus}]", "run.steps=2"]
    done = from_elsewhere(tmp_path, "train", [str(finished.parent / "config.yaml"), *relative], tmp_path / "train")
    assert done.status == 0, done
    run, away = tmp_path / "runs/one", tmp_path / "away"
    (away / "data/corpus").mkdir(parents=True)  # has the name of the run's data, and is not it
    here = results(run, tmp_path, tmp_path / "here.json")
    there = results(run, away, tmp_path / "there.json")
    assert there["nelbo"] == here["nelbo"] and there["rows"] == 8
    export_to = run / "exports/step-00000002"
    export(open_checkpoint(tmp_path / "kept/one/step-00000002"), "llama", export_to)
    assert results(export_to, away, tmp_path / "export.json")["nelbo"] == here["nelbo"]
    one = results(run, away, tmp_path / "row.json", "--rows", "1", "--estimator", "counted", "continuous")
    assert (
        one["nelbo_se"] is None and "inf" not in one["shown"] and "nan" not in one["shown"] and "+- ?" in one["shown"]
    )
    made = from_elsewhere(away, "generate", [str(export_to), "--gen-length", "4"], tmp_path / "generate")
    assert made.status == 0 and "1 texts, " in made.out
    moved = Path(shutil.move(export_to, tmp_path / "moved"))
    line = from_elsewhere(away, "evaluate", [str(moved), "--weights", "raw"], tmp_path / "refused").refusal()
    assert "is an exported folder, which has only one set of weights" in line
    (away / "data/corpus").rmdir()
    line = from_elsewhere(away, "evaluate", [str(moved)], tmp_path / "refused").refusal()
    assert "its data folder data/corpus does not exist: give the data to evaluate with --data" in line
    line = from_elsewhere(away, "evaluate", [str(tmp_path / "data")], tmp_path / "refused").refusal()
    assert "name a run, a checkpoint or an exported folder" in line
