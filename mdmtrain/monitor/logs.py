"""What a person reads when something goes wrong: one line on the terminal, everything in the rank's log."""

import argparse
import atexit
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from mdmtrain.parallel.world import EARLY, WRITER_THREAD, AgreedError, Interrupted, describe_error, exit_at_once

log = logging.getLogger("mdmtrain")
WRITER_PATIENCE = 120.0  # seconds


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}: see {self.prog} --help")


def output_file(argument: str) -> Path:
    """The type of an argument that names a file to write: refused at once where it cannot be, not after the work."""
    path = Path(argument)
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path}: it is a folder, or its folder is missing or read-only")
    return path


@contextmanager
def user_errors() -> Iterator[None]:
    """End a command: at its end in good order, with one `error:` line and status 2 on ValueError or OSError; with
    status EARLY where it was told to stop with something left to do that its last checkpoint does not tell.

    The traceback goes to the log file where there is one (DEBUG level), and to the terminal with MDMTRAIN_DEBUG=1.
    Identical errors of several ranks on a node are printed once; an error of a single rank names the rank.
    """
    # Libraries may speak up about errors alone: DCP warns of every unreadable file, with its traceback.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    log.setLevel(logging.WARNING)
    try:
        yield
    except Interrupted:
        exit_at_once(EARLY)
    except (ValueError, OSError) as error:
        if os.environ.get("MDMTRAIN_DEBUG") == "1":
            raise
        log.debug("the command failed", exc_info=True)
        everywhere = isinstance(error, AgreedError) or not dist.is_initialized() or dist.get_world_size() == 1
        if not everywhere:
            print(f"error: rank {dist.get_rank()}: {describe_error(error)}", file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {describe_error(error)}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            _let_checkpoint_finish()
            # Other ranks may hang in a collective, and an orderly shutdown would wait for the process group.
            exit_at_once(2)
        sys.exit(2)
    except Exception:
        _let_checkpoint_finish()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads may still hold tensors; if the interpreter is going down when they let go, the process aborts
        # with "terminate called without an active exception" (torch 2.13, pytorch issue 190489).
        atexit._run_exitfuncs()
        exit_at_once(0)


def _let_checkpoint_finish() -> None:
    """A checkpoint that is being written beside the training may yet be committed, unless ranks are gone."""
    for thread in threading.enumerate():
        if thread.name == WRITER_THREAD:
            thread.join(WRITER_PATIENCE)


def log_to_file(folder: Path, rank: int) -> None:
    """Send this rank's log records to folder/rank-N.log, appending; warnings of rank 0 also reach the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    # A thread that fails (TensorBoard's, on a full disk) tells the one that uses it, and that one the user.
    threading.excepthook = lambda failure: log.debug("a thread failed", exc_info=failure[:3])
    logging.raiseExceptions = False  # a full disk fails the run elsewhere, with one line: no report for each record
    log.propagate = False
    file = logging.FileHandler(folder / f"rank-{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    faulthandler.enable(file.stream)  # SIGSEGV, SIGBUS, SIGABRT: every thread's stack, in this process and its helpers
    if rank == 0:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        log.addHandler(terminal)
