"""What follows a step."""

import pytest

from mdmtrain import config as configuration
from mdmtrain.due import Due, due_after


@pytest.fixture
def config():
    tree = {
        "run": {"dir": "r", "steps": 23, "global_batch": 4, "micro_batch": 2},
        "model": {"preset": "2m"},
        "data": {"sources": [{"path": "p"}], "sequence_length": 64},
        "optim": {"lr": 0.1},
        "eval": {"every": 10},
        "checkpoint": {"save_every": 4},
        "monitor": {"probe_every": 6, "log_every": 5},
    }
    return configuration.validate(tree, "test")


def test_each_thing_comes_at_its_interval_and_the_last_step_has_all_but_the_probe(config):
    steps = range(1, 24)
    due = {step: due_after(config, step) for step in steps}
    assert [step for step in steps if due[step].probe] == [6, 12, 18]
    assert [step for step in steps if due[step].evaluation] == [10, 20, 23]
    assert [step for step in steps if due[step].save] == [4, 8, 12, 16, 20, 23]
    assert [step for step in steps if due[step].log] == [4, 5, 6, 8, 10, 12, 15, 16, 18, 20, 23]
    assert [step for step in steps if due[step].interrupts] == [4, 8, 10, 12, 16, 20, 23]
    assert due[7] == Due("", "", "", "") and str(due[7]) == ""


def test_reasons_are_said(config):
    assert str(due_after(config, 15)) == "log (monitor.log_every)"
    assert due_after(config, 23).save == "the last step"
    assert str(due_after(config, 12)).startswith("probe (monitor.probe_every), save (checkpoint.save_every), log (")


@pytest.mark.parametrize("step", [7, 10, 12, 23])
def test_a_stop_saves_and_does_nothing_else(config, step):
    due = due_after(config, step, "SIGTERM")
    assert due.save == "SIGTERM" and due.log and not due.evaluation and not due.probe
