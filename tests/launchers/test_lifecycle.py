"""What is decided when ranks have ended, and what is read from their last words."""

import subprocess
import sys
from dataclasses import replace

import pytest

from launchers.lifecycle import Ended, ErrorLines, State, begin, conclude, read_state, write_state
from launchers.slurm_client import seconds
from mdmtrain.exit_status import STOPPED_EARLY
from tests.conftest import ROOT

RUNNING = State("slurm", "7", "running", starts=1, began_at=20)
CRASH = Ended(1, error="it broke", node="n2")


def test_stops_go_on_without_end_and_crashes_without_progress_do_not():
    state = RUNNING
    for _ in range(50):  # time limits: each start gets a little further, or nowhere
        state = conclude(begin(state, 20, 3), Ended(0), 20, 100, 3)
        assert state.phase == "requeued"
    assert conclude(RUNNING, Ended(STOPPED_EARLY, early=True), 20, 100, 1).phase == "requeued"
    state = RUNNING
    for crashes, expected in ((1, "requeued"), (2, "requeued"), (3, "failed")):
        state = conclude(begin(replace(state, phase="requeued"), 20, 3), CRASH, 20, 100, 3)
        assert (state.crashes, state.phase, state.last_error) == (crashes, expected, "it broke")
    assert begin(state, 20, 3).phase == "failed", "a job that gave up must not start again"


def test_progress_forgives_crashes():
    state = replace(RUNNING, crashes=2)
    for step in range(30, 90, 10):  # more crashes than --max-crashes, each after a new checkpoint
        state = conclude(state, CRASH, step, 100, 3)
        assert state.phase == "requeued" and state.crashes == 0
        state = begin(state, step, 3)
    assert conclude(replace(state, crashes=2), Ended(0), step, 100, 3).crashes == 2, "a stop does not forgive"


def test_finished_is_what_the_last_checkpoint_says():
    assert conclude(RUNNING, Ended(0), 100, 100, 3).phase == "finished"
    # A crash may have been in an evaluation that was left: the next start sees that nothing is, and ends in order.
    assert conclude(RUNNING, CRASH, 100, 100, 3).phase == "requeued"
    assert conclude(RUNNING, Ended(0), 99, 100, 3).phase == "requeued"


def test_a_start_that_nobody_saw_end_is_a_crash():
    state = begin(replace(RUNNING, crashes=1), 20, 3)
    assert (state.crashes, state.starts, state.phase) == (2, 2, "running") and "was interrupted" in state.last_error
    assert begin(replace(RUNNING, crashes=2), 20, 3).phase == "failed"
    assert begin(replace(RUNNING, crashes=2), 21, 3).crashes == 0  # it had got further


KILLED = """\
[rank0]: RuntimeError: Connection closed by peer
srun: error: n2: task 1: Killed
srun: error: n1: task 0: Exited with exit code 1
"""
REFUSED = """\
error: run.global_batch=16 does not divide over 3 ranks
srun: error: n1: tasks 0-2: Exited with exit code 2
"""
RAISED = """\
Traceback (most recent call last):
  File "train.py", line 1, in <module>
[rank3]: torch.OutOfMemoryError: CUDA out of memory.
srun: error: n1: task 3: Exited with exit code 1
srun: error: n2: task 7: Aborted
"""
INVISIBLE = """\
slurmstepd: error: execve(): /home/me/.venv/bin/python: No such file or directory
srun: error: n2: task 1: Exited with exit code 2
"""
TOLD_TO_STOP = "srun: error: n1: task 0: Killed\nsrun: error: n2: task 1: Exited with exit code 75\n"


@pytest.mark.parametrize(
    ("text", "error", "node", "early"),
    [
        (KILLED, "rank 1 on n2: Killed", "n2", False),
        (REFUSED, "run.global_batch=16 does not divide over 3 ranks", "", False),
        (RAISED, "torch.OutOfMemoryError: CUDA out of memory.", "n1", False),
        (INVISIBLE, "cannot execute /home/me/.venv/bin/python: No such file or directory", "", False),
        (TOLD_TO_STOP, "rank 0 on n1: Killed", "n1", True),
        ("", "status 9", "", False),
    ],
)
def test_last_words(text, error, node, early):
    lines = ErrorLines()
    for line in text.splitlines():
        lines.feed(line)
    assert lines.ended(9) == Ended(9, early, error, node)
    assert lines.ended(0) == Ended(0)


def test_a_supervisor_needs_no_torch():
    heavy = "{'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    program = f"import sys, launchers.supervise; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_state_on_disk(tmp_path):
    assert read_state(tmp_path) is None
    (tmp_path / "job").mkdir()
    write_state(tmp_path, RUNNING)
    assert read_state(tmp_path) == RUNNING
    (tmp_path / "job/state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json: damaged: remove it"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("infinite", float("inf"))],
)
def test_time_limits(text, expected):
    assert seconds(text) == expected
