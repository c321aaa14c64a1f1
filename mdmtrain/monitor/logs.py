"""What a person reads when something goes wrong: one line on the terminal, everything in the rank's log."""

import argparse
import atexit
import faulthandler
import io
import logging
import os
import select
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
STANDARD_OUTPUT = "standard output"
BROKEN_PIPE = 141  # exit status of a command whose reader has gone: 128 + SIGPIPE, as of any other command


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


class _StandardStream(io.FileIO):
    """Standard output or standard error, which may break at any time: its reader ends, a terminal closes, a disk fills.

    Standard error then loses what is written to it, and so does standard output once `survive` is set: one line in the
    log says so. Otherwise the first failed write raises OSError, and what comes after it is lost.
    """

    def __init__(self, descriptor: int, name: str, survive: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.title, self.survive, self._failed, self._said = name, survive, False, False

    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # a full pipe that somebody made non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            first, self._failed = not self._failed, True
            if first and not self.survive:
                raise OSError(error.errno, f"cannot write: {error.strerror}", self.title) from None
            if not self._said and log.isEnabledFor(logging.INFO):  # a record of this level goes to the file only
                self._said = True
                log.info("%s is gone (%s): the run continues, its lines are lost", self.title, describe_error(error))
            return len(data)


def _own_standard_streams() -> None:
    """Make the standard streams robust, those too that were closed when the process started."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # or the next file to be opened would become, say, standard output
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name, descriptor, title in (("stdout", 1, STANDARD_OUTPUT), ("stderr", 2, "standard error")):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):  # somebody collects it: not ours to replace
            continue
        if old is not None:
            old.flush()
        raw = _StandardStream(descriptor, title, survive=name == "stderr")
        encoding, errors = (old.encoding, old.errors) if old is not None else ("utf-8", "backslashreplace")
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def survive_terminal() -> None:
    """Continue when standard output breaks: for commands whose results are files."""
    buffer = getattr(sys.stdout, "buffer", None)
    if isinstance(getattr(buffer, "raw", None), _StandardStream):
        buffer.raw.survive = True


@contextmanager
def user_errors() -> Iterator[None]:
    """End a command: at its end in good order, with one `error:` line and status 2 on ValueError or OSError; with
    status EARLY where it was told to stop with something left to do that its last checkpoint does not tell.

    The traceback goes to the log file where there is one (DEBUG level), and to the terminal with MDMTRAIN_DEBUG=1.
    Identical errors of several ranks on a node are printed once; an error of a single rank names the rank. A command
    whose reader has gone (`| head`) ends without a word, unless it called `survive_terminal`.
    """
    _own_standard_streams()
    # Libraries may speak up about errors alone: DCP warns of every unreadable file, with its traceback.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    log.setLevel(logging.WARNING)
    try:
        yield
    except Interrupted:
        exit_at_once(EARLY)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and error.filename == STANDARD_OUTPUT:
            exit_at_once(BROKEN_PIPE)
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
