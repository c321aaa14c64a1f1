"""A preparation as a job array: the same folder, also where the launcher is killed and comes again."""

import os
import signal
import time

import pytest

from launchers import prepare as launcher
from mdmtrain.data.inputs import find_inputs
from mdmtrain.data.parts import JOB, work_folder
from mdmtrain.data.prepare import prepare
from tests.data.test_prepare import tree
from tests.launchers.test_prepare import ARGUMENTS, OPTIONS, corpus, signals, start, status_of  # noqa: F401


def test_a_job_array_makes_the_same_folder(cluster, corpus, tmp_path, monkeypatch, capsys, signals):  # noqa: F811
    out, calm = tmp_path / "out", tmp_path / "calm"
    work = work_folder(out)
    monkeypatch.setattr(launcher, "POLL", 0.5)
    monkeypatch.chdir(tmp_path)  # inputs are named from here, in the jobs too
    command = ["corpus", *ARGUMENTS, "--out", "out", "--tasks", "2", "--slurm", "--time 10 --mem 1000"]
    with pytest.raises(ValueError, match=r"9 tasks: this cluster allows 8 tasks in a job array .*: give fewer --tasks"):
        launcher.main([*command, "--tasks", "9"])
    assert not work.exists()
    pid = start(command)
    cluster.wait_for(lambda: (work / JOB).exists(), "a job")
    os.kill(pid, signal.SIGKILL)
    status_of(pid)
    job = (work / JOB).read_text()
    time.sleep(1)
    capsys.readouterr()
    launcher.main(command)  # waits for that job first
    said = capsys.readouterr().out
    assert "submitted job" in said and f'"{said.split("submitted job ")[1].split(":")[0]}"' not in job
    assert "reading for the tokenizer, 1 tasks" not in said, "the job of the killed launcher has done this step"
    prepare(find_inputs(["corpus"], [], [], calm), calm, OPTIONS, 1)
    assert tree(out) == tree(calm) and not work.exists() and cluster.run("squeue", "-h") == ""
