"""Setup of a worker process: it ignores signals, and ends when its parent process ends."""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Ignore signals and exit when the parent process ends. Call this first in a worker process.

    Ctrl-C and Slurm signal the whole process group, but only the parent decides whether to stop now or after saving. A
    worker that ended first would turn an orderly stop into a crash. A parent that is killed by SIGKILL cannot notify
    its workers, so a thread waits for its end.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "not in a worker process"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
