"""Rules for helper processes: a helper ignores signals that are meant for its parent, and ends when its parent ends."""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Call first in a helper process.

    Ctrl-C and Slurm signal the whole process group, but only the parent decides whether to stop at once or after
    saving. If a helper ended first, the parent would crash instead of stopping in order. A parent that is killed by
    SIGKILL cannot end its helpers, so a thread of the helper waits for the end of the parent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "not in a helper process"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
