"""Slurm's commands, as little of them as launching needs. Each raises ValueError with Slurm's own words."""

import re
import subprocess
import time
from dataclasses import dataclass


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
    def batch_step_died(self) -> bool:
        return self.name in ("COMPLETING", "FAILED") and self.reason.startswith(("JobLaunchFailure", "RaisedSignal"))


def job_state(job: str) -> JobState:
    try:
        text = slurm("scontrol", "show", "job", "-o", job)
    except ValueError as error:
        if "Invalid job id" in str(error):
            return JobState("GONE")
        raise
    words = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return JobState(words["JobState"], words["Reason"], int(words["Restarts"]), words["Partition"])


def requeue(job: str) -> None:
    """Ask for the job to start again; patient with a controller that is being restarted."""
    for _ in range(30):
        try:
            slurm("scontrol", "requeue", job)
            return
        except ValueError as error:
            if "pending" in str(error):  # Slurm has done so itself
                return
            last = error
            time.sleep(10)
    raise last


@dataclass(frozen=True)
class Node:
    name: str
    cpus: int
    memory: int  # MiB
    gpus: int
    usable: bool


def nodes(partition: str | None) -> list[Node]:
    """The nodes of a partition, or of the default one."""
    if partition is None:
        names = slurm("sinfo", "-h", "-o", "%P").split()
        partition = next((name[:-1] for name in names if name.endswith("*")), None)
        if partition is None:
            raise ValueError(f"this cluster has no default partition: choose one with --partition: {', '.join(names)}")
    found = {}
    for line in slurm("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%G|%T").splitlines():
        name, cpus, memory, gres, state = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^,:()]+)?:(\d+)", gres))
        usable = re.match(r"(idle|alloc|mixed|compl|planned|reserved|resv)", state) is not None
        found[name] = Node(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus, usable)
    if not found:
        names = sorted({name.rstrip("*") for name in slurm("sinfo", "-h", "-o", "%P").split()})
        raise ValueError(f"unknown partition {partition!r}: this cluster has {', '.join(names)}")
    return list(found.values())


def expand(host_list: str) -> list[str]:
    """n[1-2] -> n1, n2"""
    return slurm("scontrol", "show", "hostnames", host_list).split() if host_list else []


def address(node: str) -> str:
    """Where Slurm itself reaches a node: that works where its name does not resolve."""
    text = slurm("scontrol", "show", "node", "-o", node)
    return re.search(r"\bNodeAddr=(\S+)", text).group(1)
