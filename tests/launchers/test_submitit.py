"""What is handed to submitit and to Slurm, with stub commands in place of a cluster; tests/slurm has a real one."""

import io
import json
import os
import shutil
import subprocess
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import submitit

from launchers import slurm, slurm_client, status, sweep
from launchers.handle import run_job
from launchers.lifecycle import read_state
from launchers.supervise import supervise
from tests.conftest import write_config

# Each stub writes what it was called with to a file, then answers as a cluster named b with one partition does.
STUB = """#!/bin/bash
name=$(basename "$0")
echo "$name $*" >> "$STUB_LOG"
env > "$STUB_LOG.$name.env"
answer() {{ [[ "$*" != *--clusters=* ]] || echo "CLUSTER: b"; cat; }}
case "$name $*" in
    sbatch*--test-only*) exit 0 ;;
    sbatch*) {sbatch} ;;
    sinfo*%P*) echo "main*" | answer "$@" ;;
    sinfo*) printf 'n1|8|gpu:a100:4(S:0-1)|idle|1-0|n/a\\nn2|8|gpu:a100:4|idle|1-0|n/a\\n' | answer "$@" ;;
    scontrol*config*) printf 'MaxArraySize            = 4\\n' | answer "$@" ;;
    scontrol*job*) {job} ;;
    sacct*) {sacct} ;;
esac
"""
PENDING = "echo 'JobId=12 JobState=PENDING Reason=JobHeldUser Requeue=1 Restarts=0 Partition=main' | answer \"$@\""
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SUBMITTED = "echo 'Submitted batch job 12 on cluster b'"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A function that puts stub commands into PATH. Returns the path of the file with the calls."""

    def install(sbatch: str = SUBMITTED, job: str = PENDING, sacct: str = "exit 1") -> Path:
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        for name in ("sbatch", "srun", "scontrol", "sinfo", "scancel", "sacct"):
            (folder / name).write_text(STUB.format(sbatch=sbatch, job=job, sacct=sacct))
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("STUB_LOG", str(calls))
        return calls

    return install


@pytest.fixture
def run_file(small_run, tmp_path):
    return str(write_config(small_run(), tmp_path / "run.yaml"))


def printed_script(capsys) -> str:
    output = capsys.readouterr().out
    return output[output.index("#!/bin/bash") : output.index("\nnothing submitted")]


def test_the_printed_script_is_the_submitted_one(stub, run_file, tmp_path, capsys, monkeypatch):
    """Also on a machine without Slurm. Uses the private members that RunExecutor's docstring names."""
    options = [run_file, "--nodes", "2", "--gpus-per-node", "4", "--time", "2:00:00", "--sbatch", "comment=it's 50% #1"]
    with monkeypatch.context() as elsewhere:
        (tmp_path / "only").mkdir()
        (tmp_path / "only/git").symlink_to(shutil.which("git"))
        elsewhere.setenv("PATH", str(tmp_path / "only"))
        slurm.launch([*options, "--dry-run"])
    script = printed_script(capsys)
    assert not (tmp_path / "run").exists()
    stub()
    slurm.launch(options)
    job = run_job(tmp_path / "run")
    assert job.paths.submission_file.read_text() == script
    assert subprocess.run(["bash", "-n", job.paths.submission_file]).returncode == 0
    for line in ("nodes=2", "ntasks-per-node=4", "gres=gpu:4", "time=2:00:00", "signal=USR2@300", "requeue", "hold"):
        assert f"#SBATCH --{line}\n" in script
    assert "wckey" not in script and "srun" not in script and "gpus-per-node" not in script
    # One task, whose call is small and names the supervisor; the rest of the launch is readable in RUN/job.
    assert job.job_id == "12" and job.num_tasks == 1 and job.paths.submitted_pickle.stat().st_size < 1000
    call = job.submission()
    assert call.function is supervise and call.args == (tmp_path / "run",)
    assert job.state == "PENDING" and not job.done()


def test_gpus_may_be_asked_for_in_another_way(run_file, capsys):
    for wanted in ("gres=gpu:a100:2", "gpus-per-node=a100:2"):
        slurm.launch([run_file, "--gpus-per-node", "2", "--sbatch", wanted, "--dry-run"])
        script = printed_script(capsys)
        assert f"#SBATCH --{wanted}\n" in script and "gpu:2" not in script


def test_an_array_is_one_submission(stub, run_file, tmp_path, capsys, monkeypatch):
    calls = stub()
    runs = sweep.all_runs([run_file], ["standard"], [0, 1, 2], [()], tmp_path / "sweep")
    launches = [slurm.read_launch(run.arguments) for run in runs]
    assert slurm.submit(launches, tmp_path / "sweep", 2) == ["12_0", "12_1", "12_2"]
    assert sum(line.startswith("sbatch") and "test-only" not in line for line in calls.read_text().splitlines()) == 1
    job = run_job(runs[1].dir)
    script = job.paths.submission_file.read_text()
    assert "#SBATCH --array=0-2%2\n" in script and f"--output={tmp_path}/sweep/logs/job-%A_%a.log\n" in script
    assert script == slurm.executor(launches, tmp_path / "sweep", 2).script(3)
    assert job.submission().args == (runs[1].dir,) and read_state(runs[1].dir).log.endswith("logs/job-12_1.log")
    more = [slurm.read_launch([*runs[0].arguments, f"run.dir={tmp_path}/more/{n}"]) for n in range(5)]
    with pytest.raises(ValueError, match=r"5 runs: this cluster allows 4 tasks in a job array \(MaxArraySize\)"):
        slurm.submit(more, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_refused_submission_leaves_nothing_of_submitit(stub, run_file, tmp_path):
    stub(sbatch="echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(ValueError, match=r"^sbatch: .*QOSMaxSubmitJobPerUserLimit"):
        slurm.launch([run_file])
    assert said.getvalue() == "" and list((tmp_path / "run/job/submitit").iterdir()) == []
    assert run_job(tmp_path / "run") is None and status.run_status(tmp_path / "run").state == "not submitted"


def test_another_cluster_is_asked_about_its_own_jobs(stub, run_file, tmp_path):
    calls = stub()
    slurm.launch([run_file, "--clusters", "b"])
    state = read_state(tmp_path / "run")
    assert (state.job, state.cluster) == ("12", "b")
    assert "#SBATCH --clusters=b\n" in run_job(tmp_path / "run").paths.submission_file.read_text()
    status.cancel(tmp_path / "run")
    asked = [line for line in calls.read_text().splitlines() if not line.startswith("sbatch /")]
    assert asked[-1] == "scancel --clusters=b 12" and all("--clusters=b" in line for line in asked), asked
    with pytest.raises(ValueError, match="--clusters a,b: name one cluster"):
        slurm.launch([run_file, "--clusters", "a,b", "--dry-run"])


def test_what_an_interactive_allocation_has_set_does_not_reach_the_job(stub, run_file, tmp_path, capsys, monkeypatch):
    calls = stub()
    inherited = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_MEM_PER_CPU": "100", "SBATCH_NO_REQUEUE": "1"}
    for name, value in {**inherited, "SBATCH_TIMELIMIT": "3:00:00", "SLURM_CONF": "/conf"}.items():
        monkeypatch.setenv(name, value)
    slurm.launch([run_file])
    for command in ("sbatch", "scontrol", "sinfo"):
        theirs = dict(
            line.split("=", 1) for line in Path(f"{calls}.{command}.env").read_text().splitlines() if "=" in line
        )
        assert not {*inherited, "SBATCH_TIMELIMIT"} & set(theirs) and theirs["SLURM_CONF"] == "/conf"
    assert os.environ["SLURM_NTASKS"] == "3", "the caller's environment is as it was"
    assert "#SBATCH --time=3:00:00\n" in run_job(tmp_path / "run").paths.submission_file.read_text()
    assert "not passed on: SBATCH_NO_REQUEUE: give these options with --sbatch" in capsys.readouterr().out


def test_a_cluster_that_does_not_requeue_is_noticed(stub, run_file, capsys):
    stub(job=PENDING.replace("Requeue=1", "Requeue=0"))
    slurm.launch([run_file])
    assert "note: this cluster does not requeue the job: after a time limit or a preemption" in capsys.readouterr().out


def test_a_job_that_the_controller_has_forgotten(stub, run_file, tmp_path):
    stub()
    slurm.launch([run_file])
    for sacct, name, word in (("exit 1", "GONE", "gone"), ("echo 'CANCELLED by 0'", "CANCELLED", "cancelled"),
                              ("echo OUT_OF_MEMORY", "OUT_OF_MEMORY", "out_of_memory")):  # fmt: skip
        stub(job=FORGOTTEN, sacct=sacct)
        assert slurm_client.job_state("12").name == run_job(tmp_path / "run").state == name
        now = status.run_status(tmp_path / "run")
        assert now.state == word and "the job ended before its ranks started: see" in now.last_error
        assert run_job(tmp_path / "run").done()
    with pytest.raises(ValueError, match="nothing to cancel, the run is out_of_memory"):
        status.cancel(tmp_path / "run")


@pytest.mark.parametrize("mark", ["%j", "%A", "%t", "%a", "\\", "\n"])
def test_paths_that_slurm_or_submitit_would_change(mark, run_file, tmp_path):
    launch = slurm.read_launch([run_file, f'run.dir="{tmp_path}/a{json.dumps(mark)[1:-1]}b"'])
    assert mark in str(launch.run_dir)
    with pytest.raises(ValueError, match=r"replace .* in a path: choose another run\.dir"):
        slurm.job_parameters([launch])


def test_a_backslash_in_an_option_is_refused(run_file):
    with pytest.raises(ValueError, match=r"--comment: .*sbatch cannot read backslashes"):
        slurm.launch([run_file, "--sbatch", "comment=a\\b", "--dry-run"])


def test_a_node_that_does_not_see_the_run_says_so(run_file, tmp_path, capsys):
    """A home that is local to a node: the script ends with one line, before it starts Python."""
    slurm.launch([run_file, "--dry-run"])
    done = subprocess.run(
        ["bash", "-c", printed_script(capsys)],
        env={**os.environ, "SLURMD_NODENAME": "n7"},
        capture_output=True,
        text=True,
    )
    needed = tmp_path / "run/job/code"
    assert done.returncode == 2
    assert done.stdout == f"error: n7 does not see {needed}: it must be on a file system that all nodes share\n"


def test_a_handle_reads_what_submitit_wrote(stub, run_file, tmp_path):
    """Output and result come from submitit's files, whatever process asks."""
    stub()
    slurm.launch([run_file])
    job = run_job(tmp_path / "run")
    job.paths.stdout.write_text("start 1")
    submitit.core.utils.cloudpickle_dump(("success", {"phase": "finished"}), job.paths.result_pickle)
    again = run_job(tmp_path / "run")
    assert again.done() and again.stdout() == "start 1" and again.result() == {"phase": "finished"}
