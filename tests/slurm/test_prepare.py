"""A preparation as a job array: the same folder, also where the launcher is killed and comes again."""

import os
import shutil
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


KILL = """#!/bin/bash
{sbatch} "$@"
[[ "$*" == *--test-only* ]] || kill -9 $PPID
"""
COUNT = """#!/bin/bash
echo "{name} $({squeue} -h -r -o %j | grep -c {job})" >> {calls}
exec {path} "$@"
"""


def test_a_launcher_that_is_killed_while_it_submits_leaves_no_second_array(
    cluster,
    corpus,  # noqa: F811
    tmp_path,
    monkeypatch,
    signals,  # noqa: F811
):
    """sbatch kills the launcher before it returns: nobody has seen the array's number."""
    out, programs, calls = tmp_path / "out", tmp_path / "programs", tmp_path / "calls"
    sbatch, squeue = shutil.which("sbatch"), shutil.which("squeue")
    programs.mkdir()

    def install(name: str, text: str) -> None:
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    install("sbatch", KILL.format(sbatch=sbatch))
    command = [str(corpus), *ARGUMENTS, "--out", str(out), "--tasks", "2", "--slurm", "--time 10 --mem 1000"]
    assert status_of(start(command)) == -signal.SIGKILL
    job = launcher.job_name(work_folder(out))
    assert cluster.run("squeue", "-h", "-o", "%j").split() == [job]
    for name, path in (("sbatch", sbatch), ("squeue", squeue)):
        install(name, COUNT.format(name=name, path=path, squeue=squeue, job=job, calls=calls))
    pid = start(command)
    cluster.wait_for(lambda: calls.exists() and calls.read_text().count("squeue 1") > 1, "the launcher to wait")
    cluster.run("scancel", f"--name={job}")  # its task would wait a minute for the rest of its submission
    assert status_of(pid) == 0 and not work_folder(out).exists()
    submissions = [line for line in calls.read_text().splitlines() if line.startswith("sbatch")]
    assert submissions and set(submissions) == {"sbatch 0"}, "an array was submitted while another one was there"
    prepare(find_inputs([str(corpus)], [], [], tmp_path / "calm"), tmp_path / "calm", OPTIONS, 1)
    assert tree(out) == tree(tmp_path / "calm")
