"""Launching on a real Slurm cluster of two nodes: finish, be disturbed and recover, change nodes, be refused.

The undisturbed run and the disturbed one share the cluster. Every wait is generous: a busy machine must not fail them.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from launchers import slurm, slurm_client, status
from launchers.handle import run_job
from launchers.lifecycle import newest_step, read_state
from tests.conftest import ROOT, SOAK, read_metrics, write_config
from tests.slurm.cluster import Cluster
from tests.test_worlds import close

LONG = 400.0  # seconds


STEPS = 200
COMMENT = """it's "calm" #1, 100%"""


def write_run(corpus: Path, folder: Path, name: str, steps: int = STEPS, global_batch: int = 8) -> tuple[Path, Path]:
    """The configuration of a short run in folder/NAME, and that run folder."""
    tree = {
        "run": {"dir": str(folder / name), "seed": 5, "steps": steps, "global_batch": global_batch, "micro_batch": 4},
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": 64, "workers": 1},
        "optim": {"lr": 3e-3, "warmup_steps": 5, "ema_decay": 0.9},
        "checkpoint": {"save_every": 10},
        "monitor": {"log_every": 5, "probe_every": None},  # a stop leaves out what a probe would have measured
        "eval": {"every": 100, "rows": 16, "samples": 2, "batch": 8},
    }
    return write_config(tree, folder / f"{name}.yaml"), folder / name


@pytest.fixture(scope="module")
def calm(cluster, corpus, tmp_path_factory) -> Path:
    """The undisturbed run on two nodes: submitted here, and finished when a test has waited for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # From inside an interactive allocation, whose sizes are not the job's, with a profile's options of sbatch.
        inside = cluster.run("salloc", "--quiet", "--nodes=1", "--ntasks=3", "--mem-per-cpu=100", "env", "-0")
        theirs = dict(line.split("=", 1) for line in inside.split("\0") if line.startswith(("SLURM_", "SBATCH_")))
        assert theirs["SLURM_NTASKS"] == "3" and "SLURM_MEM_PER_CPU" in theirs
        for name, value in {**theirs, "SBATCH_NO_REQUEUE": "1", "SBATCH_SIGNAL": "KILL@10"}.items():
            patch.setenv(name, value)
        file, run_dir = write_run(corpus, tmp_path_factory.mktemp("runs"), "calm")
        # GPUs that Slurm counts and nobody has; a command before the ranks'; an option of sbatch's own.
        extras = ["--gpus-per-node", "1", "--mem", "1500", "--setup", "export RANK_PREFIX='nice -n 1'"]
        slurm.launch([str(file), "--nodes", "2", *extras, "--sbatch", f"comment={COMMENT}"])
        yield run_dir


def phase(run_dir: Path) -> str:
    return read_state(run_dir).phase


def logs(run_dir: Path) -> str:
    return "\n".join(f.read_text(errors="replace") for f in (run_dir / "logs").glob("job-*.log"))


def wait_until_saved(cluster: Cluster, run_dir: Path, step: int) -> None:
    def there() -> bool:
        assert phase(run_dir) not in ("finished", "failed", "cancelled"), logs(run_dir)
        return newest_step(run_dir) >= step

    cluster.wait_for(there, f"step {step} of {run_dir.name}", LONG)


def wait_until_started_again(cluster: Cluster, run_dir: Path, starts: int) -> None:
    def there() -> bool:
        assert phase(run_dir) not in ("finished", "failed", "cancelled"), logs(run_dir)
        return read_state(run_dir).starts > starts

    cluster.wait_for(there, f"start {starts + 1} of {run_dir.name}", LONG)


def wait_until_finished(cluster: Cluster, run_dir: Path, seconds: float = LONG) -> None:
    def there() -> bool:
        assert phase(run_dir) not in ("failed", "cancelled"), logs(run_dir)
        return phase(run_dir) == "finished"

    cluster.wait_for(there, f"the end of {run_dir.name}", seconds)


def processes_of(cluster: Cluster, run_dir: Path, program: str) -> list[int]:
    """Processes of a run that execute launchers/PROGRAM themselves, in the order of their start."""
    found = []
    for pid in sorted(cluster.processes()):
        with suppress(OSError):  # it has just ended
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if len(words) > 1 and words[1].decode() == str(run_dir / "job/code/launchers" / program):
                found.append(pid)
    return [pid for pid in found if parent(pid) not in found]  # a rank's guard is a child of the rank


def supervisor_of(cluster: Cluster, run_dir: Path) -> int:
    """The process that submitit started in the batch step of a run's job."""
    words = f"submitit.core._submit\0{run_dir}/job/submitit\0".encode()
    (found,) = (pid for pid in cluster.processes() if words in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Disturbance:
    """What happens to a job; each leads to another start."""

    def __init__(self, cluster: Cluster, run_dir: Path):
        self.cluster, self.run_dir = cluster, run_dir

    @property
    def job(self) -> str:
        return read_state(self.run_dir).job

    def signal(self) -> None:
        self.cluster.run("scancel", "--signal=USR2", self.job)

    def requeue(self) -> None:
        self.cluster.run("scontrol", "requeue", self.job)

    def kill_rank(self) -> None:
        os.kill(random.choice(processes_of(self.cluster, self.run_dir, "rank.py")), signal.SIGKILL)

    def kill_batch_step(self) -> None:
        os.kill(supervisor_of(self.cluster, self.run_dir), signal.SIGKILL)

    def preempt(self) -> None:
        self.cluster.run(
            "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
        )

    def time_limit(self) -> None:
        """SIGTERM, SIGCONT and SIGTERM again, between one minute and two of a start that first waits for one.

        (What the warning before it does is what `signal` does.)
        """
        before = slurm_client.job_state(self.job).restarts

        def running_again(times: int) -> bool:
            now = slurm_client.job_state(self.job)
            return now.restarts == before + times and (times > 1 or now.name == "RUNNING")

        (self.run_dir / "wait").touch()
        self.requeue()
        self.cluster.wait_for(lambda: running_again(1), "the start that waits", LONG)
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "TimeLimit=1")
        (self.run_dir / "wait").unlink()
        self.cluster.wait_for(lambda: running_again(2), "the time limit", LONG)
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "TimeLimit=60")

    def kill_slurmd(self) -> None:
        node = random.choice(["n1", "n2"])
        self.cluster.kill_node(node)
        state = lambda: self.cluster.run("scontrol", "show", "node", "-o", node)  # noqa: E731  (sinfo lags behind)
        self.cluster.wait_for(lambda: "State=DOWN" in state(), f"Slurm to miss {node}", LONG)
        self.cluster.start_node(node)  # as the machine's init would


def disturb_until_the_end(cluster: Cluster, run_dir: Path, names: list[str], every: int, seconds: float = LONG) -> None:
    """Each disturbance comes `every` steps after the start that the one before it led to."""
    disturbance = Disturbance(cluster, run_dir)
    for name in names:
        wait_until_saved(cluster, run_dir, newest_step(run_dir) + every)
        starts, saved = read_state(run_dir).starts, newest_step(run_dir)
        print(f"step {saved}: {name}", flush=True)  # for whoever watches the soak
        getattr(disturbance, name)()
        wait_until_started_again(cluster, run_dir, starts)
        assert newest_step(run_dir) >= saved, f"{name} lost a committed step"
    wait_until_finished(cluster, run_dir, seconds)


def test_finished_disturbed_and_equal(cluster, calm, corpus, tmp_path, capsys):
    """One command each; then a signal, a requeue and a killed rank; and the metrics do not tell the two runs apart."""
    file, rough = write_run(corpus, tmp_path, "rough")
    slurm.launch([str(file), "--nodes", "2", "--time", "30"])
    assert f"submitted job {read_state(rough).job}" in capsys.readouterr().out
    random.seed(0)
    disturb_until_the_end(cluster, rough, ["signal", "requeue", "kill_rank"], 20)
    wait_until_finished(cluster, calm)
    assert read_metrics(rough) == read_metrics(calm)
    assert len(read_metrics(calm)) == STEPS + 2
    # More than 4 where a busy Slurm repeats an old order to kill and hits the new start: one more stop.
    assert read_state(calm).starts == 1 and read_state(rough).starts >= 4
    assert read_state(rough).crashes == 0 and "Killed" in read_state(rough).last_error
    assert "is not excluded: without it, 1 nodes are left" in logs(rough)
    assert list((calm / "events/calm").glob("events.*")) and (calm / "logs/rank-1.log").is_file()
    environment = json.loads((calm / "environment.json").read_text())
    assert str(calm / "job/code/launchers/rank.py") in environment["command"]
    # Slurm must not start a finished run again.
    job = cluster.run("scontrol", "show", "job", "-o", read_state(calm).job)
    assert "JobState=COMPLETED" in job and "Restarts=0" in job
    assert f"Comment={COMMENT}" in job and "gres:gpu:1" in job and "Requeue=1" in job and "NumTasks=2" in job
    handle = run_job(calm)
    assert handle.done() and handle.result()["phase"] == "finished" and "finished at step 200" in handle.stdout()


def test_two_nodes_one_node_two_nodes(cluster, calm, corpus, tmp_path, capsys):
    """The same data, rates and masks when the number of nodes changes; a node that fails is not used next."""
    file, run_dir = write_run(corpus, tmp_path, "changing")
    slurm.launch([str(file), "--nodes", "2"])
    wait_until_saved(cluster, run_dir, 20)
    with pytest.raises(ValueError, match=r"in use by job .* cancel it with"):
        status.resume(run_dir, ["--nodes", "1"])
    status.cancel(run_dir)
    cluster.wait_for(lambda: phase(run_dir) == "cancelled", "the cancelled job", LONG)
    idle = lambda: not cluster.run("squeue", "-h", "--name=changing")  # noqa: E731
    cluster.wait_for(idle, "an empty queue", LONG)
    status.resume(run_dir, ["--nodes", "1"])
    wait_until_saved(cluster, run_dir, 60)
    job = read_state(run_dir).job
    first = cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    starts = read_state(run_dir).starts
    Disturbance(cluster, run_dir).kill_rank()
    wait_until_started_again(cluster, run_dir, starts)
    assert {first, cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()} == {"n1", "n2"}
    wait_until_saved(cluster, run_dir, 100)
    status.cancel(run_dir)
    cluster.wait_for(idle, "an empty queue", LONG)
    capsys.readouterr()
    status.main([str(tmp_path), "--json", str(tmp_path / "status.json")])
    (row,) = json.loads((tmp_path / "status.json").read_text())
    assert row["state"] == "cancelled" and row["restarts"] >= 2 and "Killed" in row["last_error"]
    assert row["step"] == row["saved"] >= 100 and "cancelled" in capsys.readouterr().out
    status.resume(run_dir, ["--nodes", "2"])
    wait_until_finished(cluster, run_dir)

    wait_until_finished(cluster, calm)
    changed, undisturbed = read_metrics(run_dir), read_metrics(calm)
    for one, other in zip(changed, undisturbed, strict=True):
        assert one["step"] == other["step"]
        for exact in ("tokens", "masked_fraction", "rate_histogram", "lr"):
            assert one.get(exact) == other.get(exact), (one["step"], exact)
    close(undisturbed, changed, 1e-4)


def test_a_submitit_script_of_ones_own(cluster, corpus, tmp_path):
    """The example of docs/cluster.md. A cluster that does not requeue: the run saves and says how to resume."""
    script = tmp_path / "submit.py"
    script.write_text(re.search(r"```python\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)[1])
    file, run_dir = write_run(corpus, tmp_path, "own", 100_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(file), "--nodes", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wait_until_saved(cluster, run_dir, 10)
    job = run_job(run_dir)
    assert done.stdout == f"submitted {job.job_id}\n" and job.state == "RUNNING" and not job.done()
    assert status.run_status(run_dir).state == "running"
    cluster.run("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
    Disturbance(cluster, run_dir).signal()
    cluster.wait_for(lambda: phase(run_dir) == "stopped" and job.done(), "the stop", LONG)
    result = job.result()
    assert result["phase"] == "stopped" and result["starts"] == 1
    assert (
        f"does not requeue the job: resume it with python -m launchers.status resume {run_dir}" in result["last_error"]
    )
    assert f"start 1 of {run_dir}" in job.stdout() and "stopped at step" in job.stdout()
    cluster.wait_for(lambda: not cluster.run("squeue", "-h", "--name=own"), "an empty queue", LONG)
    status.resume(run_dir, [])
    saved = newest_step(run_dir)
    wait_until_saved(cluster, run_dir, saved + 10)
    job = run_job(run_dir)
    cluster.run("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
    cluster.run("scontrol", "update", "PartitionName=main", "GraceTime=0")  # Slurm itself ends the preempted job
    try:
        Disturbance(cluster, run_dir).preempt()
        cluster.wait_for(lambda: phase(run_dir) not in ("queued", "running"), "the preempted run's end", LONG)
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "GraceTime=60")
    assert phase(run_dir) == "stopped" and newest_step(run_dir) > saved, logs(run_dir)


@pytest.mark.skipif(not SOAK, reason="twenty disturbances take half an hour: make soak")
def test_twenty_disturbances(cluster, corpus, tmp_path):
    kinds = ["kill_batch_step", "preempt", "time_limit", "kill_slurmd", "kill_rank", "requeue", "signal"]
    names = (kinds * 3)[:20]
    random.seed(1)
    random.shuffle(names)
    # Steps of 8 micro-steps: slow enough for a time limit that Slurm enforces twice a minute.
    steps = 20 * len(names) + 200 * names.count("time_limit")
    file, rough = write_run(corpus, tmp_path, "rough", steps, 64)
    calm_file, calm = write_run(corpus, tmp_path, "calm", steps, 64)
    slurm.launch([str(file), "--nodes", "2", "--time", "60", "--setup", f"[ ! -f {rough}/wait ] || sleep 55"])
    disturb_until_the_end(cluster, rough, names, 10, 3600)
    slurm.launch([str(calm_file), "--nodes", "2"])
    wait_until_finished(cluster, calm, 3600)
    assert read_metrics(rough) == read_metrics(calm)
    assert read_state(rough).starts >= 21 and read_state(rough).crashes == 0
