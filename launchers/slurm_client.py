"""Slurm's commands, as little of them as launching needs. Each raises ValueError with Slurm's own words."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def slurm(*command: str, stdin: str | None = None) -> str:
    """Standard output of one of Slurm's commands."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise ValueError(
            f"no Slurm on this machine ({command[0]} is not in PATH): log in to the cluster, or use launchers.local"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} has not answered for two minutes: ask whether slurmctld runs") from None
    if done.returncode:
        words = re.sub(r"\b\w+: (error|fatal): ", "", done.stderr or done.stdout)
        raise ValueError(f"{command[0]}: {'; '.join(words.strip().splitlines()) or done.returncode}")
    return done.stdout


@dataclass(frozen=True)
class JobState:
    name: str  # as Slurm has it, or GONE where it has forgotten the job
    reason: str = ""
    restarts: int = 0
    partition: str = ""

    @property
    def lives(self) -> bool:
        return self.name in ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")

    @property
    def batch_step_died(self) -> bool:
        return self.name in ("COMPLETING", "FAILED") and self.reason.startswith(("JobLaunchFailure", "RaisedSignal"))


def job_state(job: str) -> JobState:
    try:
        text = slurm("scontrol", "show", "job", "-o", job)
    except ValueError as error:
        if "Invalid job id" in str(error):
            return JobState("GONE")
        raise
    words = dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)
    return JobState(words["JobState"], words["Reason"], int(words["Restarts"]), words["Partition"])


def requeue(job: str) -> None:
    """Ask for the job to start again."""
    try:
        slurm("scontrol", "requeue", job)
    except ValueError as error:
        if "pending" not in str(error):  # Slurm, or someone else, has done so already
            raise


def patiently(act: Callable[[], T]) -> T:
    """What `act` returns, tried for five minutes: a controller may be restarting while a job needs it."""
    for _ in range(30):
        try:
            return act()
        except ValueError as error:
            last = error
            time.sleep(10)
    raise last


@dataclass(frozen=True)
class Node:
    name: str
    cpus: int
    gpus: int
    usable: bool


@dataclass(frozen=True)
class Partition:
    name: str
    nodes: list[Node]
    limit: float  # seconds that a job may run
    default: float  # seconds that it may run when it does not say


def partition(name: str | None) -> Partition:
    """A partition, or the default one; several, as in `a,b`, count as one. Raises ValueError."""
    names = slurm("sinfo", "-h", "-o", "%P").split()
    if name is None:
        name = next((one[:-1] for one in names if one.endswith("*")), None)
        if name is None:
            raise ValueError(f"this cluster has no default partition: choose one with --partition: {', '.join(names)}")
    found, limits = {}, []
    for line in slurm("sinfo", "-h", "-N", "-p", name, "-o", "%N|%c|%G|%T|%l|%L").splitlines():
        node, cpus, gres, state, limit, default = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^,:()]+)?:(\d+)", gres))
        usable = re.match(r"(idle|alloc|mix|compl|plan|res)", state) is not None
        found[node] = Node(node, int(cpus.rstrip("+")), gpus, usable)
        limits.append((seconds(limit), seconds(limit if default == "n/a" else default)))
    if not found:
        known = ", ".join(sorted({one.rstrip("*") for one in names}))
        raise ValueError(f"unknown partition {name!r}: this cluster has {known}")
    return Partition(name, list(found.values()), max(limit for limit, _ in limits), min(d for _, d in limits))


def seconds(limit: str) -> float:
    """A time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ValueError."""
    if limit.lower() in ("infinite", "unlimited"):
        return float("inf")
    if re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit) is None:
        raise ValueError(f"--time {limit}: not a time limit; write minutes, hours:minutes:seconds or days-hours")
    days, dash, clock = limit.rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(unit * field for unit, field in zip(units, fields, strict=False))


def expand(host_list: str) -> list[str]:
    """n[1-2] -> n1, n2"""
    return slurm("scontrol", "show", "hostnames", host_list).split() if host_list else []


def address(node: str) -> str:
    """Where Slurm itself reaches a node: that works where its name does not resolve."""
    text = slurm("scontrol", "show", "node", "-o", node)
    return re.search(r"\bNodeAddr=(\S+)", text).group(1)
