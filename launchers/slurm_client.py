"""The Slurm commands that the launchers need. Each function raises ValueError with Slurm's own message.

`cluster` is a name for Slurm's `--clusters` option. Empty: the cluster of this machine.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Variables that change what Slurm's commands do. Those in KEEP locate and authenticate the cluster.
OPTIONS = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SINFO_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SACCT_")
KEEP = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


def is_option(variable: str) -> bool:
    return variable.startswith(OPTIONS) and variable not in KEEP


@contextmanager
def outside_allocations() -> Iterator[None]:
    """Remove the variables that an interactive allocation (salloc, srun --pty) or a shell profile has set.

    sbatch reads SBATCH_* as options that override the script. It passes SLURM_* on to the job, where srun reads them as
    options.
    """
    removed = {name: os.environ.pop(name) for name in list(os.environ) if is_option(name)}
    try:
        yield
    finally:
        os.environ.update(removed)


def slurm(*command: str, stdin: str | None = None, cluster: str = "") -> str:
    """The standard output of a Slurm command. Raises ValueError if it fails or takes longer than two minutes."""
    if cluster:
        command = (command[0], f"--clusters={cluster}", *command[1:])
    environment = {name: value for name, value in os.environ.items() if not is_option(name)}
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, env=environment)
    except FileNotFoundError:
        raise ValueError(
            f"no Slurm on this machine ({command[0]} is not in PATH): log in to the cluster, or use launchers.local"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} did not answer for two minutes: check that slurmctld is running") from None
    if done.returncode:
        words = re.sub(r"\b\w+: (error|fatal): ", "", done.stderr or done.stdout)
        raise ValueError(f"{command[0]}: {'; '.join(words.strip().splitlines()) or done.returncode}")
    return "".join(line for line in done.stdout.splitlines(True) if not line.startswith("CLUSTER: "))


@dataclass(frozen=True)
class JobState:
    name: str  # Slurm's name of the state, or GONE for a job that Slurm has no record of
    reason: str = ""
    restarts: int = 0
    partition: str = ""
    requeue: bool = True  # whether Slurm may requeue the job
    preempted: bool = False  # whether another job takes or has taken its nodes

    @property
    def lives(self) -> bool:
        return self.name in ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")

    @property
    def batch_step_died(self) -> bool:
        return self.name in ("COMPLETING", "FAILED") and self.reason.startswith(("JobLaunchFailure", "RaisedSignal"))


def job_state(job: str, cluster: str = "") -> JobState:
    """The state of a job from the controller, or from the accounting if the controller has no record of it any more."""
    try:
        text = slurm("scontrol", "show", "job", "-o", job, cluster=cluster)
    except ValueError as error:
        if "Invalid job id" not in str(error):
            raise
        try:
            recorded = slurm("sacct", "-n", "-X", "-P", "-o", "State", "-j", job, cluster=cluster).split()
        except ValueError:  # the cluster has no accounting
            recorded = []
        known = JobState(recorded[0]) if recorded else JobState("GONE")
        return JobState("GONE") if known.lives else known
    words = dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)
    return JobState(
        name=words["JobState"],
        reason=words["Reason"],
        restarts=int(words["Restarts"]),
        partition=words["Partition"],
        requeue=words["Requeue"] == "1",
        preempted=words.get("PreemptTime", "None") != "None",
    )


def tasks_left(name: str, cluster: str = "") -> int:
    """How many tasks of the jobs and job arrays with this name are queued or running. The name has no comma."""
    return len(slurm("squeue", "-h", "-r", f"--name={name}", "-o", "%T", cluster=cluster).split())


def requeue(job: str) -> None:
    """Requeue a job. A job that is already pending again is not an error."""
    try:
        slurm("scontrol", "requeue", job)
    except ValueError as error:
        if "pending" not in str(error):
            raise


def patiently(act: Callable[[], T]) -> T:
    """Call `act`, and retry it for five minutes on ValueError: the controller may be restarting. Returns its result."""
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
    default: float  # seconds that a job may run if it gives no time limit


def partitions(cluster: str = "") -> list[str]:
    """The names of all partitions. The default partition, if there is one, ends in `*`."""
    return list(dict.fromkeys(slurm("sinfo", "-h", "-o", "%P", cluster=cluster).split()))


def partition(name: str, cluster: str = "") -> Partition:
    """The nodes and limits of a partition, or of several (`a,b`) together. Raises ValueError for an unknown name."""
    found, limits = {}, []
    for line in slurm("sinfo", "-h", "-N", "-p", name, "-o", "%N|%c|%G|%T|%l|%L", cluster=cluster).splitlines():
        node, cpus, gres, state, limit, default = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^,:()]+)?:(\d+)", gres))
        usable = re.match(r"(idle|alloc|mix|compl|plan|res)", state) is not None
        found[node] = Node(node, int(cpus.rstrip("+")), gpus, usable)
        limits.append((seconds(limit), seconds(limit if default == "n/a" else default)))
    if not found:
        known = ", ".join(sorted(one.rstrip("*") for one in partitions(cluster)))
        raise ValueError(f"unknown partition {name!r}: this cluster has {known}")
    return Partition(name, list(found.values()), max(limit for limit, _ in limits), min(d for _, d in limits))


def most_array_tasks(cluster: str = "") -> int:
    """The largest number of tasks in a job array (MaxArraySize)."""
    text = slurm("scontrol", "show", "config", cluster=cluster)
    return int(_found(r"^MaxArraySize\s*=\s*(\d+)", text))


def _found(pattern: str, text: str) -> str:
    """The group of a pattern in what Slurm has printed."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, f"{pattern} does not match {text[:200]!r}"
    return match[1]


def seconds(limit: str) -> float:
    """The seconds of a Slurm time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError."""
    if limit.lower() in ("infinite", "unlimited"):
        return float("inf")
    if re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit) is None:
        raise ValueError(f"--time {limit}: not a time limit; write minutes, hours:minutes:seconds or days-hours")
    days, dash, clock = limit.rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(unit * field for unit, field in zip(units, fields, strict=False))


def expand(host_list: str) -> list[str]:
    """The names in a host list: n[08-10] -> n08, n09, n10."""
    return slurm("scontrol", "show", "hostnames", host_list).split() if host_list else []


def address(node: str) -> str:
    """The address at which Slurm reaches a node. It works also where the node's name does not resolve."""
    text = slurm("scontrol", "show", "node", "-o", node)
    return _found(r"\bNodeAddr=(\S+)", text)
