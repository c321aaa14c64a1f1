"""Manners of a helper process: it leaves signals to its parent and never outlives it."""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Call first in a helper process.

    Ctrl-C and Slurm signal the whole process group, but only the parent knows whether to stop now or after saving; a
    helper that dies first would turn its orderly stop into a crash. A parent killed by SIGKILL cannot say goodbye, so a
    thread waits for its end.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "not in a helper process"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
