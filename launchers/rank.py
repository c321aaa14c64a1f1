"""One rank of a run: finds its place among the ranks, then trains.   python .../launchers/rank.py CONFIG

Started by srun, which says where the rank stands in SLURM_*, or by launchers.local, which says it as torchrun does.
Run by its path, so that it imports the copy of the code beside it and not what lies in the working directory.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launchers.lifecycle import this_job  # noqa: E402
from launchers.supervise import guard  # noqa: E402
from mdmtrain.exit_status import STOPPED_EARLY  # noqa: E402


def from_slurm() -> None:
    """Say what torchrun would: RANK, LOCAL_RANK and the sizes. MASTER_ADDR and MASTER_PORT come from the supervisor."""
    for name, theirs in {
        "RANK": "PROCID",
        "LOCAL_RANK": "LOCALID",
        "WORLD_SIZE": "NTASKS",
        "LOCAL_WORLD_SIZE": "NTASKS_PER_NODE",
    }.items():
        os.environ[name] = os.environ[f"SLURM_{theirs}"]


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup; else, until training has its own handlers:
            signal.signal(number, lambda *_: os._exit(STOPPED_EARLY))
    if "RANK" not in os.environ:
        from_slurm()
        if os.environ["RANK"] == "0":
            guard(this_job())

    from mdmtrain import train
    from mdmtrain.command import user_errors

    with user_errors():
        train.main(sys.argv[1:])


if __name__ == "__main__":
    main()
