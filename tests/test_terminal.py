"""The person at the terminal leaves: a run saves and stops in order, or continues, and says so in its log.

Real processes, real pipes, a real pseudo-terminal. Where SIGHUP is not handled, or a broken standard output ends the
run, no checkpoint is left and the status is another.
"""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launchers.lifecycle import newest_step
from tests.conftest import ROOT, write_config
from tests.test_kill import last_record

LIMIT = 240  # seconds, on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LONG = 100_000  # steps: it does not end by itself


class Run:
    """A training process whose standard streams the test holds."""

    def __init__(self, folder: Path, tree: dict, steps: int, launcher: tuple[str, ...] = (), **streams):
        self.dir = folder / "run"
        tree["run"] |= {"dir": str(self.dir), "steps": steps}
        config = write_config(tree, folder / "config.yaml")
        command = [sys.executable, *launcher, "-m", "mdmtrain.train", str(config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, **{"stdin": subprocess.DEVNULL, **streams}
        )

    def wait_for_step(self, step: int, reading: int | None = None) -> None:
        """reading: the other end of a terminal, which would block the run when nobody reads."""
        deadline = time.monotonic() + LIMIT
        while last_record(self.dir).get("step", 0) < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            if reading is not None and select.select([reading], [], [], 0)[0]:
                os.read(reading, 1 << 16)
            time.sleep(0.01)

    def hang_up(self) -> None:
        os.killpg(self.process.pid, signal.SIGHUP)

    def log(self) -> str:
        file = self.dir / "logs/rank-0.log"
        return file.read_text() if file.exists() else "no log"

    def saved_and_stopped(self) -> None:
        """By SIGHUP, after the last step that was done."""
        self.process.wait(LIMIT)
        assert newest_step(self.dir) == last_record(self.dir)["step"] > 0, self.log()
        assert f"stopped by SIGHUP after step {newest_step(self.dir)}, checkpoint saved" in self.log()


def ranks_whose_reader_and_terminal_leave(folder: Path, tree: dict) -> None:
    """`nohup torchrun ... 2>&1 | head -1`, then SIGHUP to the group: torchrun passes it on, despite nohup."""
    readable, writable = os.pipe()
    run = Run(
        folder, tree, LONG, TORCHRUN, stdout=writable, stderr=writable,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    os.close(writable)
    os.read(readable, 1)
    os.close(readable)
    run.wait_for_step(4)
    gone = last_record(run.dir)["step"]
    run.wait_for_step(gone + 4)
    assert run.log().count("cannot write to standard output (Broken pipe)") == 1
    run.hang_up()
    run.saved_and_stopped()


def a_terminal_that_closes(folder: Path, tree: dict) -> None:
    """The process leads the terminal's session: it gets SIGHUP from the system, and its writes fail from then on."""
    master, slave = pty.openpty()
    run = Run(
        folder, tree, LONG, stdin=slave, stdout=slave, stderr=slave,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    run.wait_for_step(3, reading=master)
    os.close(master)
    run.saved_and_stopped()
    assert run.process.returncode == 0
    assert run.log().count("cannot write to standard output (Input/output error)") == 1


def a_hangup_that_nohup_keeps_away(folder: Path, tree: dict) -> None:
    """Without torchrun an ignored SIGHUP stays ignored; here the disk of standard output is full, too."""
    with open("/dev/full", "w") as full:
        run = Run(
            folder, tree, 30, stdout=full, stderr=full,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )  # fmt: skip
    run.wait_for_step(3)
    run.hang_up()
    assert run.process.wait(LIMIT) == 0
    assert newest_step(run.dir) == 30 and "stopped" not in run.log()
    assert run.log().count("cannot write to standard output (No space left on device)") == 1


def streams_that_were_closed_from_the_start(folder: Path, tree: dict) -> None:
    """No file of the run becomes standard output or standard error by taking their numbers."""
    shell = ("sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-')
    tree["run"] |= {"dir": str(folder / "run"), "steps": 6}
    config = write_config(tree, folder / "config.yaml")
    command = [*shell, sys.executable, "-m", "mdmtrain.train", str(config)]
    assert subprocess.run(command, cwd=ROOT, timeout=LIMIT).returncode == 0
    assert newest_step(folder / "run") == 6
    assert (folder / "run/.lock").read_text().startswith("process ")
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 7 and all(line.startswith('{"step"') for line in lines)


SCENES = (
    ranks_whose_reader_and_terminal_leave,
    a_terminal_that_closes,
    a_hangup_that_nohup_keeps_away,
    streams_that_were_closed_from_the_start,
)


@pytest.fixture(scope="module")
def played(corpus, tmp_path_factory):
    """All scenes at once: each waits most of its time for Python and torch to start."""
    tree = {
        "run": {"seed": 5, "global_batch": 8, "micro_batch": 4},
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": 32, "workers": 1},
        "optim": {"lr": 3e-3},
        "checkpoint": {"save_every": LONG},
        "monitor": {"log_every": 1, "tensorboard": False, "probe_every": None},
        "eval": {"every": LONG, "rows": 8, "samples": 1, "batch": 8},
    }
    with ThreadPoolExecutor(len(SCENES)) as pool:
        yield {
            scene: pool.submit(scene, tmp_path_factory.mktemp("scene"), {k: dict(v) for k, v in tree.items()})
            for scene in SCENES
        }


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_nothing_is_lost(played, scene: Callable):
    played[scene].result()


def test_a_command_whose_output_is_its_result_says_that_it_was_lost(tmp_path):
    """A full disk is an error with the place in it; a reader that leaves (`| head`) ends it quietly."""
    script = tmp_path / "command.py"
    script.write_text(
        "from mdmtrain.command import user_errors\n"
        "with user_errors():\n    for number in range(100000):\n        print(number)\n"
    )
    command = f"{sys.executable} {script}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    full = subprocess.run(f"{command} >/dev/full", shell=True, capture_output=True, text=True, env=environment)
    assert full.returncode == 2
    assert full.stderr == "error: standard output: cannot write: No space left on device\n"
    left = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, env=environment
    )
    assert (left.returncode, left.stdout, left.stderr) == (141, "0\n", "")
