"""One rank of a run: finds its place among the ranks, then trains.   python .../launchers/rank.py CONFIG

Started by srun, which says where the rank stands in SLURM_*, or by launchers.local, which says it as torchrun does.
Run by its path, so that it imports the copy of the code beside it and not what lies in the working directory.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launchers import slurm_client  # noqa: E402
from launchers.lifecycle import EARLY, this_job  # noqa: E402


def from_slurm() -> None:
    """Say what torchrun would: RANK, LOCAL_RANK and the sizes. MASTER_ADDR and MASTER_PORT come from the supervisor."""
    for name, theirs in {
        "RANK": "PROCID",
        "LOCAL_RANK": "LOCALID",
        "WORLD_SIZE": "NTASKS",
        "LOCAL_WORLD_SIZE": "NTASKS_PER_NODE",
    }.items():
        os.environ[name] = os.environ[f"SLURM_{theirs}"]


def guard(job: str) -> None:
    """Leave a process behind that requeues the job when its batch step is killed: nobody else would be left to do it.

    Slurm then ends the job as failed and sends SIGTERM to its steps: the ranks stop in good order and this process asks
    for the requeue. It goes when its rank does.
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
            if job_state.name == "RUNNING":  # a signal from a person, or none yet
                break
            time.sleep(0.5)
    os._exit(0)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup; else, until training has its own handlers:
            signal.signal(number, lambda *_: os._exit(EARLY))
    if "RANK" not in os.environ:
        from_slurm()
        if os.environ["RANK"] == "0":
            guard(this_job())

    from mdmtrain import train
    from mdmtrain.monitor.logs import user_errors

    with user_errors():
        train.main(sys.argv[1:])


if __name__ == "__main__":
    main()
