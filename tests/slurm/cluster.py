"""A real Slurm cluster on this machine, in a temporary folder, for as long as a `with` block lasts.

Debian's slurm-wlm and munge, as root: one munged, one slurmctld and a slurmd for each of the nodes n1, n2, ..., with
ports, key, socket and configuration of their own, so that it touches no other Slurm. Partitions: `main`, the default,
whose jobs `urgent` preempts after a grace time, and `short`, with a limit of two minutes.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from launchers.supervise import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PACKAGES = "apt-get install slurm-wlm munge"
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"  # where Debian has the daemons
PATIENCE = 120.0  # seconds for anything that takes one on an idle machine

CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
KillWait=15
OverTimeLimit=0
JobRequeue=1
MaxArraySize=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=1-0 DefMemPerCPU=500
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=1-0 DefMemPerCPU=500
PartitionName=short Nodes=ALL PriorityTier=1 GraceTime=60 MaxTime=2 DefMemPerCPU=500
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 Gres=gpu:4"


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of one's own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(absent)} on this machine: {PACKAGES}" if absent else None


def die_with_parent() -> None:
    """In a child: go when the tests are killed, which then cannot stop their daemons."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


class Cluster:
    """The running daemons. `environment` is what a client needs to find them."""

    def __init__(self, nodes: int = 2):
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.root.chmod(0o755)  # munged wants its socket in a folder that all may enter; sockets want a short path
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_files()
            self._start("munged", "--foreground", "--force", f"--key-file={self.root}/munge.key",
                        f"--socket={self.root}/munge.socket", f"--pid-file={self.root}/munged.pid",
                        f"--log-file={self.root}/munged.log", f"--seed-file={self.root}/munged.seed")  # fmt: skip
            self.wait_for(lambda: (self.root / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            idle = f"idle {len(self.nodes)}"
            self.wait_for(lambda: self.run("sinfo", "-h", "-p", "main", "-o", "%T %D").strip() == idle, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--user=root")
            self.wait_for(lambda: not self.run("squeue", "-h").strip(), "an empty queue", 30)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:  # step daemons without their slurmd
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self.root, ignore_errors=True)

    def _write_files(self) -> None:
        (self.root / "state").mkdir()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(NODE.format(name=name, host=host, port=free_port()) for name in self.nodes)
        conf = CONF.format(root=self.root, ports=[free_port()], host=host, nodes=nodes)
        (self.root / "slurm.conf").write_text(conf)
        for number in range(4):  # something to schedule by, no devices
            (self.root / f"gpu{number}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-3]\n")

    def _start(self, name: str, *arguments: str) -> None:
        key = f"slurmd {arguments[-1]}" if name == "slurmd" else name
        with open(self.root / f"{key}.out", "ab") as out:
            self._daemons[key] = subprocess.Popen(
                [name, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the node's slurmd; the steps that it started live on, as they do after a real one."""
        daemon = self._daemons.pop(f"slurmd {node}")
        daemon.kill()
        daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """A Slurm command's standard output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[int]:
        """Every process that was started with this cluster's configuration, its daemons too."""
        mark, found = f"SLURM_CONF={self.root}/slurm.conf".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
            except OSError:
                pass
        return found

    def wait_for(self, condition, what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds:.0f} s for {what}\n{self.logs()}")
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not dead, f"{dead} ended\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = [*self.root.glob("*.log"), *self.root.glob("*.out")]
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)
