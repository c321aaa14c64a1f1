"""Detect hangs and dead ranks, and report which rank is at fault and what it was doing.

The main thread of each rank records the phase that it is in, and a second thread checks it. If a rank makes no progress
for too long, or loses the connection to another rank, the watchdog threads of all ranks exchange reports (the roll
call). They use a key value store, because collectives hang at this point. Each thread writes the stacks of its process
to the rank's log, and all agree on one error line for the terminal. Then all processes exit with status 1, so that
torchrun or a launcher can restart them. The watchdog also ends a run that is stopped during preparation: the main
thread may be in a collective then, and Python runs no signal handlers there.
"""

import faulthandler
import json
import logging
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from torch._C import _distributed_c10d as c10d

from mdmtrain.config import RunConfig
from mdmtrain.exit_status import STOPPED_EARLY
from mdmtrain.parallel.stop import AgreedStop, reason
from mdmtrain.parallel.world import World, describe_error, exit_at_once, meeting_point, tell_torchrun

POLL = 1.0  # seconds between two checks
PATIENCE = 4.0  # seconds in which a live rank answers the roll call
DEPUTIES = 64  # if rank 0 does not answer, one rank in this many reads the answers
UNLIMITED = "export"  # everything is saved; rank 0 waits for the export process
SLOW = ("preparation", "evaluation", "probe", "checkpoint", UNLIMITED)
FROZEN = 300.0  # seconds after which the process exits if the watchdog itself hangs (the store's host is frozen)
# Parts of the error messages of gloo and NCCL when the other process has died.
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "NCCL error", "connectFullMesh", "Socket")
log = logging.getLogger("mdmtrain")


class Watchdog:
    """The watchdog of one rank. A `with` block runs its thread; without it, `at` only records the phase.

    `at` takes less than a microsecond.
    """

    def __init__(self, world: World, config: RunConfig):
        self.stop = AgreedStop(world, config.time_limit)
        self._world = world
        self._log = Path(config.dir) / "logs" / f"rank-{world.rank}.log"
        self._timeouts = 60 * config.step_timeout, 60 * config.slow_timeout
        self._count = 0
        self._first: int | None = None
        self._step = 0
        self._place = ("preparation", 0, True, time.monotonic())
        self._closed = threading.Event()
        self._lost = ""
        self._store_closed = False

    def at(self, phase: str, step: int | None = None) -> None:
        """Record that the main thread begins `phase`. step: the step, from 0, if a new one begins."""
        if step is not None:
            if self._first is None:
                self._first = step
            self._step = step
        self._count += 1  # the ranks run the same program, so these counts can be compared
        slow = phase in SLOW or self._first is None or self._step < self._first + 2
        since = float("inf") if phase == UNLIMITED else time.monotonic()
        self._place = (phase, self._step, slow, since)  # one assignment, because the other thread reads it

    def progress(self) -> None:
        """Record that the main thread makes progress in its present phase."""
        self.at(self._place[0])

    # ---- the thread

    def __enter__(self) -> "Watchdog":
        self._signals, woken = socket.socketpair()
        woken.setblocking(False)
        self._woken = woken  # keeps it open
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self._store = meeting_point("watchdog")  # a connection of its own: the main thread's may be blocked
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        lost = isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)
        if lost and self._world.size > 1:
            log.debug("a collective failed", exc_info=error)
            self._write_key("news", "a connection broke")
            self._thread.join()  # usually does not return, because the thread ends this process
        self._closed.set()
        signal.set_wakeup_fd(-1)
        self._woken.send(b"\0")
        if error is not None:  # this rank will say why itself
            self._answer({"left": describe_error(error) if str(error) else repr(error)})
        self._thread.join()

    def _look_on(self) -> None:
        while not self._closed.is_set():
            # In C: it waits for no lock of Python's.
            faulthandler.dump_traceback_later(FROZEN, exit=True, file=sys.__stderr__ or 2)
            signals = self._signals.recv(64) if select.select([self._signals], [], [], POLL)[0] else b""
            phase, _, slow, since = self._place
            requested = next((number for number in signals if number in AgreedStop.SIGNALS), self.stop.requested)
            if phase == "preparation" and requested:
                self._write_key("news", f"stop {requested}")
            if time.monotonic() - since > self._timeouts[slow]:
                self._write_key("news", f"no progress for {self._timeouts[slow] / 60:g} minutes")
            news = self._read_key("news")
            if news.startswith("stop"):
                self._leave_early(int(news.split()[1]))
            elif (news or self._lost) and not self._closed.is_set():
                try:
                    self._roll_call(news or self._lost)
                except Exception as error:
                    line = f"error: {news or self._lost}; cannot find the rank at fault: {error!r}"
                    tell_torchrun(line)
                    print(line, file=sys.stderr)
                finally:
                    exit_at_once(1)
        faulthandler.cancel_dump_traceback_later()

    def _write_key(self, key: str, text: str) -> None:
        """Write a key of the store, unless it has a value already."""
        try:
            self._store.compare_set(key, "", text)
        except RuntimeError:  # the rank or launcher that hosted the store has died
            self._lost = self._lost or text

    def _read_key(self, key: str) -> str:
        """The value of a key of the store, or "" if it has none."""
        try:
            if not self._store_closed and self._store.check([key]):
                return self._store.get(key).decode()
        except RuntimeError:  # the store's host has ended, which is normal at the end of a run
            self._store_closed = True
        return ""

    # ---- the end

    def _leave_early(self, number: int) -> None:
        line = f"stopped by {reason(number)} in preparation, before any step: run the same command to start again"
        tell_torchrun(line)
        if self._world.is_main:
            print(line)
        exit_at_once(STOPPED_EARLY)

    def _roll_call(self, why: str) -> None:
        if self._log.exists():
            with open(self._log, "a", encoding="utf-8") as file:
                print(f"---- {why}: the stack of every thread", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        size = self._world.size
        rank = self._world.rank
        self._answer(self._report())
        # Rank 0 reads the answers. If it does not respond, one rank in 64 does, and after that every rank.
        wait = 4 * PATIENCE
        if rank == 0 or self._lost:
            wait = 0.0
        elif rank % DEPUTIES == 1:
            wait = 2 * PATIENCE
        deadline = time.monotonic() + wait
        while not (verdict := self._read_key("verdict")) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not verdict:
            named, line = [0], f"{why}: rank 0 has died"
            if not self._lost:
                named, line = judge(why, self._answers(), size)
            mine = verdict = json.dumps([named, line, rank])
            self._write_key("verdict", mine)
            verdict = self._read_key("verdict") or mine
        named, line, by = json.loads(verdict)
        log.info("%s", line or f"ranks {named} ended with an error of their own")
        if line:
            advice = "run the same command again to resume from the last checkpoint"
            line = f"error: {line}: stacks are in {self._log.parent}; {advice}"
            tell_torchrun(line)
            if by == rank:
                print(line, file=sys.stderr)
        if torch.cuda.is_available():  # for torchfrtrace; NCCL's own comes too late
            (self._log.parent / f"nccl-trace-{rank}").write_bytes(c10d._dump_nccl_trace())  # type: ignore[attr-defined]
        time.sleep(POLL / 4 if rank in named else POLL)  # launchers report the rank that ends first as the cause

    def _answer(self, answer: dict) -> None:
        """All answers are lines of one key: at 1,024 ranks, a query for each would take longer than PATIENCE."""
        try:
            line = json.dumps({"rank": self._world.rank, **answer}) + "\n"
            self._store.append("answers", line)  # type: ignore[attr-defined] # torch's stubs lack it
        except RuntimeError:  # the rank or launcher that hosted the store has died
            self._lost = self._lost or "the connection to the store broke"

    def _answers(self) -> dict[int, dict]:
        """The report of each rank that answered, or its error message if it has ended."""
        answers: dict[int, dict] = {}
        deadline = time.monotonic() + PATIENCE
        while len(answers) < self._world.size and time.monotonic() < deadline:
            time.sleep(0.1)
            lines = [json.loads(line) for line in self._read_key("answers").splitlines()]
            answers = {line.pop("rank"): line for line in sorted(lines, key=lambda line: "left" in line)}
        return answers

    def _report(self) -> dict:
        phase, step, _, since = self._place
        counts, last = collectives()
        place = phase if phase == "preparation" else f"{phase} (step {step})"
        return {"place": place, "seconds": time.monotonic() - since, "progress": [self._count, *counts], "last": last}


def judge(why: str, answers: dict[int, dict], size: int) -> tuple[list[int], str]:
    """The ranks at fault, and a sentence about them ("" if a rank ended with an error message of its own).

    why: what was noticed. answers: the report of each rank that answered: {"left": its error message}, or its place,
    the seconds it has been there, its progress (a list of counters, compared in order) and its last collective.
    """
    if left := [rank for rank, answer in answers.items() if "left" in answer]:
        return left, ""
    common = Counter(answer["place"] for answer in answers.values()).most_common(1)
    if missing := [rank for rank in range(size) if rank not in answers]:
        line = f"{why}: {ranks(missing)} not responding: the process or its node has died or is frozen"
        return missing, line + (f"; the other ranks are in {common[0][0]}" if common else "")
    least = min(answer["progress"] for answer in answers.values())
    behind = [rank for rank in range(size) if answers[rank]["progress"] == least]
    one = answers[behind[0]]
    stand = f"in {one['place']} for {one['seconds']:.0f} s, after {one['last']}"
    if len(behind) == size:
        return [], f"{why}: all ranks have been {stand}"
    ahead = next(answers[rank] for rank in range(size) if rank not in behind)
    line = f"{why}: {ranks(behind)} behind, {stand}; the other ranks wait in {ahead['place']}, in {ahead['last']}"
    return behind, line


def ranks(numbers: list[int]) -> str:
    few = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank {few} is" if len(numbers) == 1 else f"ranks {few} are"


def collectives() -> tuple[list[int], str]:
    """The numbers of collectives that this process has begun and completed, and its newest one.

    From torch's flight recorder.
    """
    entries = []
    counts = [0, 0]
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # of gloo, and of NCCL if torch has it
        if hasattr(c10d, dump):
            trace = json.loads(getattr(c10d, dump)())
            entries += trace.get("entries", [])
            for status in trace.get("pg_status", {}).values():
                for index, name in enumerate(("last_enqueued_collective", "last_completed_collective")):
                    counts[index] += max(0, int(status[name]))
    if not entries:
        return counts, "no collective"
    newest = max(entries, key=lambda entry: entry["time_created_ns"])
    return counts, f"{newest['profiling_name']} {newest['input_sizes']} (collective {counts[0]})"
