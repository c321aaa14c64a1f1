"""Train on this machine without Slurm: validate the inputs, start the ranks, and restart them after a crash.

    python -m launchers.local configs/170m.yaml --gpus-per-node 8 [key=value ...]

The command stays in the foreground. On Ctrl-C, SIGTERM or SIGHUP (a closed terminal) the run saves and stops; the same
command resumes it. On SIGUSR1 or SIGUSR2 it saves, stops and starts again, like a requeued job.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from launchers.launch import Launch, environment, parse, parser, prepare, write
from launchers.lifecycle import Ended, ErrorLines, State, begin, conclude, newest_step, write_state
from launchers.supervise import free_port, pass_on, rank_command
from mdmtrain.checkpoint.run_folder import git_revision
from mdmtrain.command import survive_terminal, user_errors
from mdmtrain.parallel.stop import AgreedStop, handled_signals

KILL_WAIT = 10.0  # seconds after a rank has crashed in which the others may end by themselves; then SIGKILL


class Ranks:
    """The processes of one start."""

    def __init__(self, launch: Launch):
        count = launch.options.ranks_per_node
        threads = max(1, (os.cpu_count() or 1) // count)
        settings = {**environment(threads), **os.environ, "PYTHONUNBUFFERED": "1", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                    "MDMTRAIN_REVISION": git_revision() or ""}  # fmt: skip
        self._processes = [
            subprocess.Popen(
                rank_command(launch.run_dir), env={**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                start_new_session=True,  # so that Ctrl-C reaches only this process, which forwards it once
            )
            for rank in range(count)
        ]  # fmt: skip

    def signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def wait(self) -> Ended:
        """Wait until all ranks have ended. When one crashes, the others are killed after KILL_WAIT seconds."""
        errors = ErrorLines()
        running = dict(enumerate(self._processes))
        status = 0  # of the first rank that ended with an error
        deadline = float("inf")
        readers = [threading.Thread(target=pass_on, args=(p.stderr, errors)) for p in self._processes]
        for reader in readers:
            reader.start()
        while running:
            for rank, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[rank]
                if process.returncode == 0:
                    continue
                how = f"Exited with exit code {process.returncode}"
                if process.returncode < 0:
                    how = signal.strsignal(-process.returncode) or how
                errors.rank_ended(socket.gethostname(), str(rank), how)
                if status == 0:
                    status = process.returncode
                    deadline = time.monotonic() + KILL_WAIT
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.1)
        for reader in readers:
            reader.join()
        return errors.ended(status)


def supervise(launch: Launch) -> State:
    """Start the ranks again until the run is finished, has failed, or is stopped by a signal. Returns the state."""
    state = replace(write(launch, "local"), job=f"{socket.gethostname()}:{os.getpid()}")
    max_crashes = launch.options.max_crashes
    stop = False
    ranks = None

    def handle(number: int, _frame) -> None:
        nonlocal stop
        stop |= number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if ranks is not None:
            ranks.signal(number)

    for number in handled_signals(AgreedStop.SIGNALS):
        signal.signal(number, handle)
    while True:
        state = begin(state, newest_step(launch.run_dir), max_crashes)
        write_state(launch.run_dir, state)
        ranks = Ranks(launch)
        if stop:
            ranks.signal(signal.SIGTERM)
        ended = ranks.wait()
        state = conclude(state, ended, newest_step(launch.run_dir), launch.config.run.steps, max_crashes)
        if stop and state.phase == "requeued":
            state = replace(state, phase="stopped")
        write_state(launch.run_dir, state)
        if state.phase != "requeued":
            return state
        reason = f" ({ended.error})" if ended.error else ""
        print(f"start {state.starts} ended{reason}; starting again", flush=True)


def launch(arguments: Sequence[str], defaults: dict | None = None) -> None:
    """Train with the options of the command line. `defaults`: the options of an earlier launch. Raises ValueError."""
    options = parse(parser("local", __doc__.split("\n\n")[0]), arguments, defaults)
    if options.nodes > 1:
        raise ValueError(f"--nodes {options.nodes}: this machine is one node; to use more, submit with launchers.slurm")
    gpus = torch.cuda.device_count()
    if options.gpus_per_node > gpus:
        raise ValueError(f"--gpus-per-node {options.gpus_per_node}: this machine has {gpus} GPUs; request fewer")
    prepared = prepare(options)
    if options.dry_run:
        print(*prepared.explanation, "nothing started (--dry-run)", sep="\n")
        return
    survive_terminal()
    state = supervise(prepared)
    if state.phase == "failed":
        raise ValueError(f"{prepared.run_dir}: failed after {state.crashes} crashes without a new checkpoint "
                         f"(--max-crashes): {state.last_error}: see {prepared.log}")  # fmt: skip


if __name__ == "__main__":
    with user_errors():
        launch(sys.argv[1:])
