"""Stop on request: all ranks stop after the same step."""

import signal
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist

from mdmtrain.parallel.world import World


class Interrupted(Exception):
    """All ranks stop in the middle of an operation and discard its result. number: see AgreedStop.poll."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class AgreedStop:
    """Lets all ranks stop after the same step.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 set a flag on the rank that receives them. The time limit (minutes from
    now) sets it too. SIGHUP stays ignored if the process was started that way (nohup). Each step starts an asynchronous
    all-reduce of the flags, and the next step reads its result. So no step waits, and the stop comes one step later. A
    second Ctrl-C has its default effect. The other signals may be repeated, as Slurm does before it sends SIGKILL.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    TIME_LIMIT = 1000  # the flag of the time limit, larger than any signal number

    def __init__(self, world: World, time_limit: float | None = None):
        self._world = world
        self._requested = 0
        self._deadline = float("inf") if time_limit is None else time.monotonic() + 60 * time_limit
        self._in_flight: tuple | None = None
        for number in handled_signals(self.SIGNALS):
            signal.signal(number, self._request)

    def _request(self, number: int, frame) -> None:
        self._requested = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    @property
    def requested(self) -> int:
        """The stop requested on this rank: the number of a signal, TIME_LIMIT, or 0."""
        return self._requested or (self.TIME_LIMIT if time.monotonic() > self._deadline else 0)

    def poll(self) -> int:
        """The stop requested on any rank by the previous call: a signal's number, TIME_LIMIT, or 0.

        A collective. All ranks call it once per step, and once per batch of an evaluation or a probe.
        """
        if self._world.size == 1:
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
        """Raise Interrupted if `poll` finds a stop. For operations of several batches, such as an evaluation."""
        if number := self.poll():
            raise Interrupted(number)

    def drain(self) -> None:
        """Wait for the last all-reduce, before the process group is destroyed."""
        if self._in_flight is not None:
            self._in_flight[0].wait()
            self._in_flight = None


def reason(number: int) -> str:
    """The text for a number of AgreedStop.poll: "" for 0."""
    if number == 0:
        return ""
    return "the time limit (run.time_limit)" if number == AgreedStop.TIME_LIMIT else signal.Signals(number).name


def handled_signals(numbers: Iterable[int]) -> list[int]:
    """The signals among these that the process may handle: all of them, except SIGHUP if it is ignored (nohup)."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
