"""The supervisor in the batch step of a job: starts the ranks with srun, waits for their end, and requeues the job.

`supervise` is the callable that submitit runs in the batch step. launchers.slurm submits it, and your own submitit
script may do so too (docs/cluster.md). Slurm signals the ranks directly, before the time limit (--signal) and on
preemption (SIGTERM): they save and stop at the same step. The supervisor then requests the requeue. If the supervisor
was killed, `guard`, a child process of rank 0, requests it. lifecycle.py decides what the end of the ranks means.
"""

import ctypes
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from launchers import slurm_client
from launchers.lifecycle import (
    Ended,
    ErrorLines,
    State,
    begin,
    conclude,
    job_folder,
    newest_step,
    read_state,
    this_job,
    write_state,
)
from launchers.slurm_client import patiently


def free_port() -> int:
    """A free port below the range of outgoing connections, so that it stays free until the ranks need it."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def rank_command(run_dir: Path) -> list[str]:
    """The command of a rank. It starts with $RANK_PREFIX, if set, such as 'apptainer exec --nv image.sif'."""
    prefix = shlex.split(os.environ.get("RANK_PREFIX", ""))
    folder = job_folder(run_dir)
    return [*prefix, sys.executable, str(folder / "code/launchers/rank.py"), str(folder / "config.yaml")]


def pass_on(lines: Iterable[str], errors: ErrorLines) -> None:
    """Copy lines to our standard error, and record the errors in them."""
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        errors.feed(line)


def run_ranks(run_dir: Path, options: dict) -> Ended:
    """Start the ranks with srun, and wait for their end."""
    nodes = patiently(lambda: slurm_client.expand(os.environ["SLURM_JOB_NODELIST"]))
    per_node = options["ranks_per_node"]
    # Rank 0 will run on the first node, as this process does, so the port is free there.
    environment = {
        **os.environ,
        "MASTER_ADDR": patiently(lambda: slurm_client.address(nodes[0])),
        "MASTER_PORT": str(free_port()),
    }
    environment.pop("RANK", None)
    command = ["srun", "--kill-on-bad-exit=1", "--mpi=none", f"--nodes={len(nodes)}",
               f"--ntasks={len(nodes) * per_node}", f"--ntasks-per-node={per_node}",
               f"--cpus-per-task={options['cpus']}", *rank_command(run_dir)]  # fmt: skip
    print(f"ranks {len(nodes) * per_node} on {' '.join(nodes)}, rendezvous at "
          f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}", flush=True)  # fmt: skip
    errors = ErrorLines()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as srun:
        assert srun.stderr is not None  # a pipe, as asked for
        pass_on(srun.stderr, errors)
        return errors.ended(srun.wait())


# ---- requeueing


def excluded(options: dict, failed: str, partition: str) -> tuple[str, str]:
    """The nodes that the next start must not use, comma-separated, and a log line about the failed node (or "").

    failed: the node whose rank crashed first, or "".
    """
    wanted = slurm_client.expand(options["exclude"] or "")
    if not failed or failed in wanted:
        return ",".join(wanted), ""
    others = [n for n in slurm_client.partition(partition).nodes if n.usable and n.name not in (failed, *wanted)]
    if len(others) < options["nodes"]:
        return ",".join(wanted), f"{failed} is not excluded: without it, {len(others)} nodes are left"
    return ",".join([*wanted, failed]), f"{failed} is excluded from the next start"


def requeue(state: State, run_dir: Path, options: dict, failed: str, restarts: int) -> State:
    """Requeue the job, unless Slurm has requeued it, it was cancelled, or the cluster does not requeue jobs.

    state: after `conclude`, in phase `requeued`; failed: the node whose rank crashed first, or ""; restarts: how often
    Slurm had restarted the job when this start began. Returns the state with its new phase.
    """
    now = patiently(lambda: slurm_client.job_state(state.job))
    if now.restarts > restarts:
        return state  # Slurm or the user has requeued it before the ranks ended
    taken_by_slurm = now.reason == "TimeLimit" or (now.preempted and not now.requeue)
    if now.name != "RUNNING" and not taken_by_slurm:
        return replace(state, phase="cancelled")  # by scancel
    by_hand = f"resume it with python -m launchers.status resume {run_dir}"
    if not now.requeue:
        # This includes a preempted job that Slurm has cancelled because it may not be requeued.
        return replace(state, phase="stopped", last_error=f"this cluster does not requeue the job: {by_hand}")
    # Slurm sends SIGTERM to this process once the job is requeued. The excluded nodes must still be set after that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    nodes, sentence = excluded(options, failed, now.partition)
    try:
        patiently(lambda: slurm_client.requeue(state.job))
    except ValueError as error:
        return replace(state, phase="stopped", last_error=f"cannot requeue the job ({error}): {by_hand}")
    try:
        slurm_client.slurm("scontrol", "update", f"JobId={state.job}", f"ExcNodeList={nodes}")
    except ValueError as error:
        sentence = f"cannot set the excluded nodes: {error}"
    if sentence:
        print(sentence, flush=True)
    return state


def guard(job: str) -> None:
    """Fork a process that requeues the job if its batch step is killed and the supervisor cannot do so any more.

    Slurm then sends SIGTERM to the job's steps and ends the job as failed: the ranks save and stop, and this process
    requests the requeue. It ends together with the rank that forked it.
    """
    if os.fork():
        return
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG
    rank = os.getppid()
    while os.getppid() == rank:
        signal.sigwait([signal.SIGTERM])
        for _ in range(10):
            job_state = slurm_client.patiently(lambda: slurm_client.job_state(job))
            if job_state.batch_step_died:
                slurm_client.patiently(lambda: slurm_client.requeue(job))
                os._exit(0)
            if job_state.name == "RUNNING":  # the batch step is alive: the signal came from elsewhere
                break
            time.sleep(0.5)
    os._exit(0)


# ---- the callable


def supervise(run_dir: Path) -> dict:
    """Train the run that launch.write has prepared in RUN/job, in the batch step of a Slurm job.

    Returns the last state of RUN/job/state.json as a dictionary (its `phase` is finished, cancelled or stopped).
    Raises RuntimeError if the run has failed. Ends the process if the job is requeued: submitit would otherwise write
    a result, and `job.done()` would be true during the next start.
    """
    state = one_start(Path(run_dir))
    if state.phase == "requeued":
        os._exit(0)
    if state.phase == "failed":
        raise RuntimeError(f"{run_dir}: failed at step {newest_step(run_dir)}: {state.last_error}")
    return asdict(state)


def show_log_to_submitit(log: str) -> None:
    """Link submitit's path of the log to the log in RUN/logs, so that `job.stdout()` can read it."""
    import submitit  # imported here, because rank.py imports this module and does not need submitit

    link = submitit.JobEnvironment().paths.stdout
    if not os.path.lexists(link):
        link.symlink_to(log)


def one_start(run_dir: Path) -> State:
    """Start the ranks once, wait for their end, and requeue the job if needed. Returns the new state."""
    # Slurm's signals are for the ranks, but reach the batch step too. SIG_IGN would be inherited by the ranks, so an
    # empty handler takes its place.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGCONT):
        signal.signal(number, lambda *_: None)
    launch = json.loads((job_folder(run_dir) / "launch.json").read_text(encoding="utf-8"))
    os.chdir(launch["directory"])  # the job script changed to RUN/job/code for the imports
    options = launch["options"]
    max_crashes = options["max_crashes"]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    log = os.readlink("/proc/self/fd/1")
    show_log_to_submitit(log)
    launched = read_state(run_dir)
    assert launched is not None, "the launcher has written it"
    state = replace(launched, job=this_job(), submitit=os.environ["SUBMITIT_FOLDER"], log=log)
    state = begin(state, newest_step(run_dir), max_crashes)
    write_state(run_dir, state)
    if state.phase == "failed":
        print(f"failed: {state.last_error}", flush=True)
        return state
    print(f"start {state.starts} of {run_dir}, from step {state.began_at}", flush=True)
    ended = run_ranks(run_dir, options)
    state = conclude(state, ended, newest_step(run_dir), launch["steps"], max_crashes)
    if state.phase == "requeued":
        # Written before the request, because Slurm then ends this process.
        write_state(run_dir, state)
        state = requeue(state, run_dir, options, "" if ended.early else ended.node, restarts)
    write_state(run_dir, state)
    reason = ended.error or (state.last_error if state.phase == "stopped" else "")
    print(f"{state.phase} at step {newest_step(run_dir)} of {launch['steps']}" + (f": {reason}" if reason else ""),
          flush=True)  # fmt: skip
    return state
