"""A stop on request that all ranks take at the same step."""

import signal
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist

from mdmtrain.parallel.world import World


class Interrupted(Exception):
    """A stop that all ranks take in the middle of something, which is given up. number: see AgreedStop.poll."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class AgreedStop:
    """A stop that all ranks take at the same step.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 set a flag on the rank that gets them, and so does the time limit
    (minutes from now). SIGHUP stays ignored where the process was started so (nohup). Each step sends the flag round
    without waiting, and the next step reads what arrived, so agreement costs no stall and comes one step late. A second
    Ctrl-C takes its default course; the others may come twice (Slurm does that), with SIGKILL to follow.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    TIME_LIMIT = 1000  # the flag where it was no signal

    def __init__(self, world: World, time_limit: float | None = None):
        self._world = world
        self._requested = 0
        self._deadline = float("inf") if time_limit is None else time.monotonic() + 60 * time_limit
        self._in_flight: tuple | None = None
        for number in heard(self.SIGNALS):
            signal.signal(number, self._request)

    def _request(self, number: int, frame) -> None:
        self._requested = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    @property
    def requested(self) -> int:
        """What this rank knows by itself: the number of a signal, TIME_LIMIT, or 0."""
        return self._requested or (self.TIME_LIMIT if time.monotonic() > self._deadline else 0)

    def poll(self) -> int:
        """Call once a step on every rank. What some rank had been told by the step before: a signal's number,
        TIME_LIMIT, or 0.
        """
        if self._world.size == 1:  # nobody to agree with
            return self.requested
        agreed = 0
        if self._in_flight is not None:
            work, flag = self._in_flight
            work.wait()
            agreed = int(flag.item())
        flag = torch.tensor([self.requested], dtype=torch.int32)
        self._in_flight = (dist.all_reduce(flag, dist.ReduceOp.MAX, self._world.control, async_op=True), flag)
        return agreed

    def check(self) -> None:
        """The same in the middle of something: raises Interrupted."""
        if number := self.poll():
            raise Interrupted(number)

    def drain(self) -> None:
        """Wait for the last exchange, before the process group goes away."""
        if self._in_flight is not None:
            self._in_flight[0].wait()
            self._in_flight = None


def reason(number: int) -> str:
    """Why a run stops, as AgreedStop numbers it; "" for 0, no stop."""
    if number == 0:
        return ""
    return "the time limit (run.time_limit)" if number == AgreedStop.TIME_LIMIT else signal.Signals(number).name


def heard(numbers: Iterable[int]) -> list[int]:
    """The signals among these that the process may handle: all but a SIGHUP that it was told to ignore (nohup)."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
