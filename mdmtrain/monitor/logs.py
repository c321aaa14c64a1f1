"""Logging: one log file per rank, and lines on the terminal from rank 0."""

import faulthandler
import logging
import threading
from pathlib import Path

from mdmtrain.parallel.world import World

log = logging.getLogger("mdmtrain")


def say(world: World, text: str) -> None:
    """Print a line on the terminal and write it to the log, on rank 0 only."""
    if world.is_main:
        print(text, flush=True)
        log.info("%s", text)  # also here, because the terminal may be closed


def log_to_file(folder: Path, rank: int) -> None:
    """Append this rank's log records to folder/rank-N.log. Rank 0 also prints its warnings on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    # A thread that fails (TensorBoard's, on a full disk) tells the one that uses it, and that one the user.
    threading.excepthook = lambda failure: log.debug("a thread failed", exc_info=failure.exc_value)
    logging.raiseExceptions = False  # a full disk fails the run elsewhere, with one line: no report for each record
    log.propagate = False
    file = logging.FileHandler(folder / f"rank-{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    assert file.stream is not None  # open: its handler does not wait for the first record
    faulthandler.enable(file.stream)  # SIGSEGV, SIGBUS, SIGABRT: every thread's stack, in this process and its helpers
    if rank == 0:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        log.addHandler(terminal)
