"""One rank of a launched run: sets the variables that torchrun would set, then trains.

    python RUN/job/code/launchers/rank.py CONFIG

srun starts it, with the rank in SLURM_* variables, or launchers.local does, with torchrun's variables. It is started by
its path, so that it imports the copy of the code in RUN/job and not the code in the working directory.
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
    """Set torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE) from Slurm's.

    The supervisor has set MASTER_ADDR and MASTER_PORT.
    """
    for name, theirs in {
        "RANK": "PROCID",
        "LOCAL_RANK": "LOCALID",
        "WORLD_SIZE": "NTASKS",
        "LOCAL_WORLD_SIZE": "NTASKS_PER_NODE",
    }.items():
        os.environ[name] = os.environ[f"SLURM_{theirs}"]


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # Until training installs its own handlers, a signal ends the rank with status 75. What nohup ignores stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
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
