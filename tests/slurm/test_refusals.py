"""What a job must not be submitted for: refused with one line that says what is wrong, where, and what to do."""

import re
import subprocess
import sys

import pytest

from launchers import local, slurm, slurm_client
from tests.conftest import ROOT, write_config


@pytest.fixture
def run_file(small_run, tmp_path):
    return str(write_config(small_run(), tmp_path / "run.yaml"))


def refusal(capsys, *arguments: str, launch=slurm.launch) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        launch(list(arguments))
    text = str(caught.value)
    assert "\n" not in text and "submitted" not in capsys.readouterr().out
    return text


ON_THE_CLUSTER = {
    "unknown partition": (["--partition", "gpu"], r"unknown partition 'gpu': this cluster has main, short, urgent"),
    "too many nodes": (["--nodes", "4"], r"--nodes 4: partition main has 2 nodes; request fewer"),
    "nodes excluded": (["--nodes", "2", "--exclude", "n1"], r"has 1 nodes after --exclude n1; request fewer"),
    "too many GPUs": (["--gpus-per-node", "8"], r"--gpus-per-node 8: 0 of the 2 nodes .*\(most: 4\).*request fewer"),
    "too many cores": (["--ranks-per-node", "2", "--cpus", "4"], r"--ranks-per-node 2 x --cpus 4: 0 of the 2 nodes"),
    "too much memory": (["--mem", "1T"], r"Slurm would refuse this job: .*[Mm]emory|node configuration"),
    "malformed memory": (["--mem", "lots"], r"Slurm would refuse this job: .*--mem"),
    "malformed time": (["--time", "soon"], r"--time soon: not a time limit; write"),
    "unknown feature": (["--constraint", "h100"], r"Slurm would refuse this job: .*[Ff]eature"),
    "time over the limit": (["--partition", "short", "--time", "10"], r"--time 10: longer than partition short allows"),
    "no time to stop": (["--time", "5"], r"--stop-before 300: leaves no time to train within the time limit of 300 s"),
    "unknown sbatch option": (["--sbatch", "colour=red"], r"Slurm would refuse this job: .*colour"),
}


@pytest.mark.parametrize("case", ON_THE_CLUSTER)
def test_what_the_cluster_cannot_give(case, cluster, run_file, tmp_path, capsys):
    arguments, pattern = ON_THE_CLUSTER[case]
    text = refusal(capsys, run_file, *arguments)
    assert re.search(pattern, text), text
    assert not (tmp_path / "run").exists() and cluster.run("squeue", "-h") == ""


def test_no_default_partition(cluster, run_file, tmp_path, capsys):
    cluster.run("scontrol", "update", "PartitionName=main", "Default=NO")
    try:
        text = refusal(capsys, run_file)
        assert re.search(r"Slurm would refuse this job: .*: choose one with --partition: main, urgent, short", text), (
            text
        )
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "Default=YES")
    assert slurm_client.partitions() == ["main*", "urgent", "short"]


def test_what_slurm_says_of_itself(cluster):
    assert slurm_client.expand("n[08-10,2],m1") == ["n08", "n09", "n10", "n2", "m1"]
    assert slurm_client.most_array_tasks() == 8
    assert slurm_client.job_state("4000000").name == "GONE"  # no accounting to ask


WITHOUT_A_CLUSTER = {
    "no configuration": ([], r"no configuration file given"),
    "unknown key": (["run.stepz=3"], r"unknown key 'run.stepz': did you mean 'run.steps'\?"),
    "batch over ranks": (["--nodes", "3"], r"run.global_batch=16 does not divide over 3 ranks"),
    "no data": (["data.sources=[{path: /nowhere}]"], r"/nowhere"),
    "a shape that cannot be": (["model.n_heads=5"], r"n_heads"),
    "no nodes": (["--nodes", "0"], r"--nodes: '0' is not a positive number"),
    "no crashes": (["--max-crashes", "0"], r"--max-crashes: '0' is not a positive number"),
    "ranks without GPUs": (["--gpus-per-node", "2", "--ranks-per-node", "4"], r"each rank needs its own GPU"),
    "our own option": (["--sbatch", "nodes=3"], r"--sbatch nodes=3: launchers.slurm sets nodes itself"),
    "line end": (["--account", "a\nb"], r"--account: 'a\\nb': sbatch cannot read"),
    "stop too late": (["--stop-before", "-5"], r"--stop-before: '-5' is not a positive number"),
}


@pytest.mark.parametrize("case", WITHOUT_A_CLUSTER)
def test_what_cannot_be_right(case, run_file, tmp_path, capsys):
    arguments, pattern = WITHOUT_A_CLUSTER[case]
    text = refusal(capsys, *([run_file] if case != "no configuration" else []), *arguments, "--dry-run")
    assert re.search(pattern, text), text
    assert not (tmp_path / "run").exists()


def test_no_slurm_here(run_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "no Slurm on this machine" in refusal(capsys, run_file)
    assert not (tmp_path / "run").exists()


def test_slurm_does_not_answer(cluster, run_file, tmp_path, capsys, monkeypatch):
    conf = (cluster.root / "slurm.conf").read_text().replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=1#")
    (tmp_path / "slurm.conf").write_text(conf)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert "sinfo: " in refusal(capsys, run_file)


def test_a_folder_in_use(run_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold + "; f.write('process 1 on n7'); f.flush(); time.sleep(600)", run_dir / ".lock"],
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        for launch in (slurm.launch, local.launch):
            assert f"run folder {run_dir} is in use by" in refusal(capsys, run_file, launch=launch)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_logs_that_cannot_be_written(cluster, run_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/logs").write_text("a file")
    text = refusal(capsys, run_file)
    assert f"{tmp_path}/run/logs" in text and "cannot write" in text
    assert cluster.run("squeue", "-h") == ""


def test_local_is_one_machine(run_file, capsys):
    assert "--nodes 2: this machine is one node" in refusal(capsys, run_file, "--nodes", "2", launch=local.launch)
    assert "this machine has" in refusal(capsys, run_file, "--gpus-per-node", "16", launch=local.launch)


def test_a_command_says_it_in_one_line(run_file):
    done = subprocess.run(
        [sys.executable, "-m", "launchers.slurm", run_file, "--nodes", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: argument --nodes") and len(done.stderr.splitlines()) == 1
