"""The command line of a command, its error line and its exit status."""

import argparse
import atexit
import io
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from mdmtrain.exit_status import BAD_INPUT, BROKEN_PIPE, STOPPED_EARLY
from mdmtrain.parallel.stop import Interrupted, reason
from mdmtrain.parallel.world import WRITER_THREAD, AgreedError, describe_error, exit_at_once, tell_torchrun

log = logging.getLogger("mdmtrain")
WRITER_PATIENCE = 120.0  # seconds
STANDARD_OUTPUT = "standard output"


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all other errors are."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}: see {self.prog} --help")


def output_file(argument: str) -> Path:
    """The type of an argument that names an output file. A file that cannot be written is an error before the work."""
    path = Path(argument)
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path}: it is a folder, or its folder is missing or read-only")
    return path


class _StandardStream(io.FileIO):
    """Standard output or standard error.

    A write may fail at any time, because the reader ends, the terminal is closed or the disk is full. With
    `survive` (always set for standard error), failed writes are dropped, and one line in the log says so. Without it,
    the first failed write raises OSError, and later ones are dropped.
    """

    def __init__(self, descriptor: int, name: str, survive: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.title = name
        self.survive = survive
        self._failed = False
        self._said = False

    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # a full pipe in non-blocking mode
                select.select([], [self], [])
            return written
        except OSError as error:
            first = not self._failed
            self._failed = True
            if first and not self.survive:
                raise OSError(error.errno, f"cannot write: {error.strerror}", self.title) from None
            if not self._said and log.isEnabledFor(logging.INFO):  # a record of this level goes only to the file
                self._said = True
                log.info("cannot write to %s (%s): the run continues without it", self.title, describe_error(error))
            return len(data)


def _own_standard_streams() -> None:
    """Replace the standard streams by robust ones, and open those that were closed when the process started."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next opened file would get its number, and would become standard output
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name, descriptor, title in (("stdout", 1, STANDARD_OUTPUT), ("stderr", 2, "standard error")):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):  # a test or a caller has redirected it
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
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _StandardStream):
        raw.survive = True


@contextmanager
def user_errors() -> Iterator[None]:
    """Run a command in the block, and end the process with the right message and exit status.

    ValueError and OSError print one `error:` line and exit with status BAD_INPUT. Interrupted (stopped on request, with
    work remaining that the last checkpoint does not show) exits with status STOPPED_EARLY. The traceback goes to the
    log file (level DEBUG) if there is one, and with MDMTRAIN_DEBUG=1 to the terminal. If several ranks on a node have
    the same error, it is printed once. The error of a single rank names the rank. If the reader of standard output has
    ended (`| head`), the command ends without a message, unless it has called `survive_terminal`.
    """
    _own_standard_streams()
    # Libraries may log errors only. DCP, for example, warns about every unreadable file with a traceback.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    log.setLevel(logging.WARNING)
    try:
        yield
    except Interrupted as interruption:
        tell_torchrun(f"stopped by {reason(interruption.number)} with work remaining: run the same command to resume")
        exit_at_once(STOPPED_EARLY)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and error.filename == STANDARD_OUTPUT:
            exit_at_once(BROKEN_PIPE)
        if os.environ.get("MDMTRAIN_DEBUG") == "1":
            raise
        log.debug("the command failed", exc_info=True)
        tell_torchrun(f"error: {describe_error(error)}")
        everywhere = isinstance(error, AgreedError) or not dist.is_initialized() or dist.get_world_size() == 1
        if not everywhere:
            print(f"error: rank {dist.get_rank()}: {describe_error(error)}", file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {describe_error(error)}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            _let_checkpoint_finish()
            # Other ranks may be waiting in a collective, and a normal shutdown would wait for the process group.
            exit_at_once(BAD_INPUT)
        sys.exit(BAD_INPUT)
    except Exception:
        tell_torchrun(traceback.format_exc())
        _let_checkpoint_finish()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads may still hold tensors. If they release them while the interpreter shuts down, the process
        # aborts with "terminate called without an active exception" (torch 2.13, pytorch issue 190489).
        atexit._run_exitfuncs()
        exit_at_once(0)


def _let_checkpoint_finish() -> None:
    """Wait until the asynchronous checkpoint in progress is committed, at most WRITER_PATIENCE seconds."""
    for thread in threading.enumerate():
        if thread.name == WRITER_THREAD:
            thread.join(WRITER_PATIENCE)
