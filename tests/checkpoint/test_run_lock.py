"""One process at a time writes a run folder."""

import socket
import subprocess
import sys

import pytest

from mdmtrain.checkpoint import run_lock
from mdmtrain.checkpoint.run_lock import RunLock, lock_holder
from tests.conftest import ROOT

HOLDER = """
import sys, pathlib
from mdmtrain.checkpoint.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_holder_is_named_until_its_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    assert lock_holder(tmp_path) is None
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        holder = f"process {other.pid} on {socket.gethostname()}"
        assert lock_holder(tmp_path) == holder
        with pytest.raises(ValueError, match=f"is in use by {holder}: stop that run, or choose another run.dir"):
            RunLock(tmp_path)
        other.kill()
    assert lock_holder(tmp_path) is None
    RunLock(tmp_path)
