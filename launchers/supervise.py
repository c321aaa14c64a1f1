"""The batch step of a job: starts the ranks with srun, and when they end asks Slurm for what comes next.

    python .../launchers/supervise.py RUN       (RUN/job/job.sh does this)

Slurm signals the ranks itself, before the time limit (--signal) and on preemption (SIGTERM): they stop together and
save. This process outlives them for the moment that a requeue takes.
"""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launchers import slurm_client
from launchers.lifecycle import (
    Ended,
    ErrorLines,
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
    """A port that nobody listens on, from below those that outgoing connections take: it is needed only later."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def rank_command(run_dir: Path) -> list[str]:
    """RANK_PREFIX, which --setup may export, puts the ranks into a container: 'apptainer exec --nv image.sif'."""
    prefix = shlex.split(os.environ.get("RANK_PREFIX", ""))
    folder = job_folder(run_dir)
    return [*prefix, sys.executable, str(folder / "code/launchers/rank.py"), str(folder / "config.yaml")]


def pass_on(lines: Iterable[str], errors: ErrorLines) -> None:
    """Copy standard error to ours, and remember what it says was wrong."""
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        errors.feed(line)


def run_ranks(run_dir: Path, options: dict) -> Ended:
    nodes = patiently(lambda: slurm_client.expand(os.environ["SLURM_JOB_NODELIST"]))
    per_node = options["ranks_per_node"]
    # This process runs on the first node, as rank 0 will, so a port that is free here is free there.
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
        pass_on(srun.stderr, errors)
        return errors.ended(srun.wait())


def excluded(options: dict, failed: str, partition: str) -> tuple[str, str]:
    """The nodes that the next start must not use, as Slurm writes a list, and a sentence about the failed one."""
    wanted = slurm_client.expand(options["exclude"] or "")
    if not failed or failed in wanted:
        return ",".join(wanted), ""
    others = [n for n in slurm_client.partition(partition).nodes if n.usable and n.name not in (failed, *wanted)]
    if len(others) < options["nodes"]:
        return ",".join(wanted), f"{failed} is not excluded: without it, {len(others)} nodes are left"
    return ",".join([*wanted, failed]), f"{failed} is excluded from the next start"


def go_on(job: str, options: dict, failed: str, restarts: int) -> str:
    """Have the job requeued, if that is for us to do. Returns the phase that the run is in, with a line of why."""
    now = patiently(lambda: slurm_client.job_state(job))
    if now.restarts > restarts:
        return "requeued"  # by Slurm or a person, before the ranks had stopped
    if now.name != "RUNNING" and now.reason != "TimeLimit":
        return "cancelled"  # scancel
    # Slurm ends the job as soon as it is requeued; what is left to do must outlive its SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    nodes, sentence = excluded(options, failed, now.partition)
    patiently(lambda: slurm_client.requeue(job))
    try:
        slurm_client.slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")
    except ValueError as error:
        sentence = f"cannot set the excluded nodes: {error}"
    if sentence:
        print(sentence, flush=True)
    return "requeued"


def main(run_dir: Path) -> int:
    # What Slurm sends to the batch step too is meant for the ranks. (A handler, because they would inherit SIG_IGN.)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    launch = json.loads((job_folder(run_dir) / "launch.json").read_text(encoding="utf-8"))
    options, most = launch["options"], launch["options"]["max_crashes"]
    job, restarts = this_job(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    state = begin(replace(read_state(run_dir), job=job), newest_step(run_dir), most)
    write_state(run_dir, state)
    if state.phase == "failed":
        print(f"given up: {state.last_error}", flush=True)
        return 1
    print(f"start {state.starts} of {run_dir}, from step {state.began_at}", flush=True)
    ended = run_ranks(run_dir, options)
    state = conclude(state, ended, newest_step(run_dir), launch["steps"], most)
    if state.phase == "requeued":
        # Said before it is asked for: Slurm ends this process with the job.
        write_state(run_dir, state)
        state = replace(state, phase=go_on(job, options, "" if ended.early else ended.node, restarts))
    write_state(run_dir, state)
    print(f"{state.phase} at step {newest_step(run_dir)} of {launch['steps']}"
          + (f": {ended.error}" if ended.error else ""), flush=True)  # fmt: skip
    return int(state.phase == "failed")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
