"""The command line and the end of a command: one error line for a person, an exit status for whoever started it."""

import argparse
import atexit
import io
import json
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from mdmtrain.exit_status import BAD_INPUT, BROKEN_PIPE, STOPPED_EARLY
from mdmtrain.parallel.stop import Interrupted
from mdmtrain.parallel.world import WRITER_THREAD, AgreedError, describe_error, exit_at_once

log = logging.getLogger("mdmtrain")
WRITER_PATIENCE = 120.0  # seconds
STANDARD_OUTPUT = "standard output"


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
        self.title = name
        self.survive = survive
        self._failed = False
        self._said = False

    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # a full pipe that somebody made non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            first = not self._failed
            self._failed = True
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
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _StandardStream):
        raw.survive = True


@contextmanager
def user_errors() -> Iterator[None]:
    """End a command: at its end in good order; with one `error:` line and status BAD_INPUT on ValueError or OSError;
    with status STOPPED_EARLY where it was stopped on request with work left that its last checkpoint does not show.

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
        exit_at_once(STOPPED_EARLY)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and error.filename == STANDARD_OUTPUT:
            exit_at_once(BROKEN_PIPE)
        if os.environ.get("MDMTRAIN_DEBUG") == "1":
            raise
        log.debug("the command failed", exc_info=True)
        _tell_torchrun(f"error: {describe_error(error)}")
        everywhere = isinstance(error, AgreedError) or not dist.is_initialized() or dist.get_world_size() == 1
        if not everywhere:
            print(f"error: rank {dist.get_rank()}: {describe_error(error)}", file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {describe_error(error)}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            _let_checkpoint_finish()
            # Other ranks may hang in a collective, and an orderly shutdown would wait for the process group.
            exit_at_once(BAD_INPUT)
        sys.exit(BAD_INPUT)
    except Exception:
        _tell_torchrun(traceback.format_exc())
        _let_checkpoint_finish()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads may still hold tensors; if the interpreter is going down when they let go, the process aborts
        # with "terminate called without an active exception" (torch 2.13, pytorch issue 190489).
        atexit._run_exitfuncs()
        exit_at_once(0)


def _tell_torchrun(message: str) -> None:
    """Write the error file of torch.distributed.elastic, which torchrun prints at the end of its summary."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):  # a full disk must not hide the error itself
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def _let_checkpoint_finish() -> None:
    """A checkpoint that is being written asynchronously may yet be committed, unless ranks are gone."""
    for thread in threading.enumerate():
        if thread.name == WRITER_THREAD:
            thread.join(WRITER_PATIENCE)
