"""Run on this machine as launchers.slurm runs on a cluster: checked first, started again after a crash.

    python -m launchers.local configs/170m.yaml --gpus-per-node 8 [key=value ...]

It stays in the foreground. Ctrl-C, SIGTERM or a closed terminal: the run stops, saves, and the same command goes on.
SIGUSR1 or SIGUSR2: it stops, saves and starts again, as a requeued job does.
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
from mdmtrain.parallel.stop import AgreedStop, heard

KILL_WAIT = 10.0  # seconds that the other ranks have to notice that one has crashed


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
                start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
            )
            for rank in range(count)
        ]  # fmt: skip

    def signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def wait(self) -> Ended:
        """Until all have ended; one that crashes takes the others with it."""
        errors, running, status, deadline = ErrorLines(), dict(enumerate(self._processes)), 0, float("inf")
        readers = [threading.Thread(target=pass_on, args=(p.stderr, errors)) for p in self._processes]
        for reader in readers:
            reader.start()
        while running:
            for rank, process in list(running.items()):
                if process.poll() is not None:
                    del running[rank]
                    if process.returncode:
                        how = f"Exited with exit code {process.returncode}"
                        if process.returncode < 0:
                            how = signal.strsignal(-process.returncode)
                        errors.rank_ended(socket.gethostname(), str(rank), how)
                        status, deadline = status or process.returncode, min(deadline, time.monotonic() + KILL_WAIT)
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.1)
        for reader in readers:
            reader.join()
        return errors.ended(status)


def supervise(launch: Launch) -> State:
    """Start the ranks until the run is finished, has failed for good, or a person stops it."""
    state = replace(write(launch, "local"), job=f"{socket.gethostname()}:{os.getpid()}")
    most, stop, ranks = launch.options.max_crashes, False, None

    def handle(number: int, _frame) -> None:
        nonlocal stop
        stop |= number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if ranks is not None:
            ranks.signal(number)

    for number in heard(AgreedStop.SIGNALS):
        signal.signal(number, handle)
    while True:
        state = begin(state, newest_step(launch.run_dir), most)
        write_state(launch.run_dir, state)
        ranks = Ranks(launch)
        if stop:
            ranks.signal(signal.SIGTERM)
        ended = ranks.wait()
        state = conclude(state, ended, newest_step(launch.run_dir), launch.config.run.steps, most)
        if stop and state.phase == "requeued":
            state = replace(state, phase="stopped")
        write_state(launch.run_dir, state)
        if state.phase != "requeued":
            return state
        print(f"start {state.starts} ended{f' ({ended.error})' if ended.error else ''}; starting again", flush=True)


def launch(arguments: Sequence[str], defaults: dict | None = None) -> None:
    """Run as the command line says, on top of the options of an earlier launch. Raises ValueError."""
    options = parse(parser("local", __doc__.split("\n\n")[0]), arguments, defaults)
    if options.nodes > 1:
        raise ValueError(f"--nodes {options.nodes}: this machine is one node; use launchers.slurm on a cluster")
    gpus = torch.cuda.device_count()
    if options.gpus_per_node > gpus:
        raise ValueError(f"--gpus-per-node {options.gpus_per_node}: this machine has {gpus}; ask for fewer")
    prepared = prepare(options)
    if options.dry_run:
        print(*prepared.explanation, "nothing started (--dry-run)", sep="\n")
        return
    survive_terminal()
    state = supervise(prepared)
    if state.phase == "failed":
        raise ValueError(f"{prepared.run_dir}: given up after {state.crashes} crashes without a new checkpoint "
                         f"(--max-crashes): {state.last_error}: see {prepared.log}")  # fmt: skip


if __name__ == "__main__":
    with user_errors():
        launch(sys.argv[1:])
