"""What a person reads when something goes wrong: one line on the terminal, everything in the rank's log."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from mdmtrain.parallel.world import AgreedError, describe

log = logging.getLogger("mdmtrain")


@contextmanager
def user_errors() -> Iterator[None]:
    """End a command with one `error:` line and status 2 on ValueError or OSError.

    The traceback goes to the log file where there is one (DEBUG level), and to the terminal with MDMTRAIN_DEBUG=1.
    Identical errors of several ranks on a node are printed once; an error of a single rank names the rank.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("MDMTRAIN_DEBUG") == "1":
            raise
        log.debug("the command failed", exc_info=True)
        everywhere = isinstance(error, AgreedError) or not dist.is_initialized()
        if not everywhere:
            print(f"error: rank {dist.get_rank()}: {describe(error)}", file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            # Other ranks may hang in a collective, and an orderly shutdown would wait for the process group.
            sys.stdout.flush()
            logging.shutdown()
            os._exit(2)
        sys.exit(2)


def log_to_file(folder: Path, rank: int) -> None:
    """Send this rank's log records to folder/rank-N.log, appending; warnings of rank 0 also reach the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    log.propagate = False
    file = logging.FileHandler(folder / f"rank-{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    if rank == 0:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        log.addHandler(terminal)
