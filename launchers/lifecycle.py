"""The life cycle of a launched run: which phase follows when its ranks end.

    queued -> running -> finished     the newest checkpoint is at run.steps
                      -> requeued     stopped on request (time limit, preemption), or crashed: start the ranks again
                      -> failed       --max-crashes crashes in a row without a new checkpoint
                      -> cancelled    by the user (scancel, status cancel)
                      -> stopped      by the user (launchers.local), or the cluster does not requeue: resume it by hand

`begin` and `conclude` decide the phase. supervise.py acts on it with Slurm, local.py on one machine. The state is
stored in RUN/job/state.json. This module and those that run inside a job (supervise.py, rank.py) import only the
standard library and modules without torch, so that the supervisor does not take the memory of a second torch.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mdmtrain.exit_status import BAD_INPUT, STOPPED_EARLY
from mdmtrain.files import replacing

SRUN_ERROR = re.compile(r"srun: error: (\S+): tasks? (\S+): (.+)")
NOT_STARTED = re.compile(r"slurmstepd\S*: error: execve\(\): (.+)")  # Python or the container is not on the node
PYTHON_ERROR = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")


@dataclass(frozen=True)
class State:
    """The state of a launched run. Phases: queued, running, requeued, stopped, cancelled, finished, failed."""

    kind: str  # slurm, or local
    job: str = ""  # Slurm's job id, or HOST:PID of the process that supervises the ranks
    phase: str = "queued"
    starts: int = 0
    crashes: int = 0  # in a row without a new checkpoint
    began_at: int = 0  # step of the newest checkpoint when the ranks last started
    last_error: str = ""
    log: str = ""  # file with the output of the ranks
    cluster: str = ""  # the job's cluster (--clusters); empty for the cluster of this machine
    submitit: str = ""  # folder of the job's pickles


@dataclass(frozen=True)
class Ended:
    """How the ranks ended."""

    status: int  # exit status of the command that ran them
    early: bool = False  # stopped on request before the first step or the last evaluation (status 75)
    error: str = ""  # the error, one line
    node: str = ""  # node of the rank that crashed first, if it is known


def job_folder(run_dir: Path) -> Path:
    return run_dir / "job"


def this_job() -> str:
    """The id of the job, or of the job array's task, that this process belongs to."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # SLURM_JOB_ID may be the id of the whole array here
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def read_state(run_dir: Path) -> State | None:
    """The state of a launched run, or None if no run was launched here. Raises ValueError if the file is damaged."""
    path = job_folder(run_dir) / "state.json"
    try:
        return State(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{path}: damaged: remove it, and launch the run again") from None


def write_state(run_dir: Path, state: State) -> None:
    path = job_folder(run_dir) / "state.json"
    with replacing(path) as file:
        file.write(json.dumps(asdict(state), indent=1) + "\n")


def newest_step(run_dir: Path) -> int:
    """The step of the newest committed checkpoint, 0 without one."""
    return max((int(p.parent.name[5:]) for p in (run_dir / "checkpoints").glob("step-*/meta.json")), default=0)


# ---- decisions


def begin(state: State, step: int, max_crashes: int) -> State:
    """The state at the start of the ranks. In phase `failed`, do not start them.

    step: of the newest checkpoint.
    """
    if state.phase == "running":  # the last start ended without `conclude`: count it as a crash
        died = Ended(1, error=f"start {state.starts} was interrupted: its node or its supervising process died")
        state = conclude(state, died, step, step + 1, max_crashes)
    if state.phase == "failed":
        return state
    return replace(state, phase="running", starts=state.starts + 1, began_at=step)


def conclude(state: State, ended: Ended, step: int, steps: int, max_crashes: int) -> State:
    """The state after the ranks have ended. In phase `requeued`, start them again.

    step: of the newest checkpoint; steps: of the whole run. A crash is counted only if its start saved no checkpoint.
    """
    if step >= steps and ended.status == 0:
        return replace(state, phase="finished", crashes=0)
    progress = step > state.began_at
    if ended.status == 0 or ended.early:  # a stop on request may happen any number of times
        return replace(state, phase="requeued", crashes=0 if progress else state.crashes)
    crashes = 0 if progress else state.crashes + 1
    phase = "failed" if crashes >= max_crashes else "requeued"
    return replace(state, phase=phase, crashes=crashes, last_error=ended.error)


class ErrorLines:
    """Finds the cause of an error in the lines that ranks and srun write to standard error."""

    def __init__(self) -> None:
        # The first line of each kind: ours (`error: ...`), a Python exception, the end of a rank as srun reports it.
        self._ours = ""
        self._python = ""
        self._death = ""
        self._killed = False
        self.early = False
        self.node = ""

    def feed(self, line: str) -> None:
        line = line.strip()
        if line.startswith("error: "):
            self._ours = self._ours or line.removeprefix("error: ")
        elif absent := NOT_STARTED.match(line):
            self._ours = self._ours or f"cannot execute {absent[1]}"
        elif exited := SRUN_ERROR.match(line):
            self.rank_ended(*exited.groups())
        elif raised := PYTHON_ERROR.match(line):
            self._python = self._python or raised[1]

    def rank_ended(self, node: str, ranks: str, how: str) -> None:
        """how: in srun's words, such as 'Killed' or 'Exited with exit code 1'."""
        self.early |= how.endswith(f"exit code {STOPPED_EARLY}")
        if self._death:
            return  # the first rank that ended is the cause; the others ended because they lost their peer
        self._death = f"rank {ranks} on {node}: {how}"
        self._killed = "exit code" not in how
        if not how.endswith(f"exit code {BAD_INPUT}"):  # with bad input, the node is not at fault
            self.node = node

    def ended(self, status: int) -> Ended:
        """How the ranks ended. status: the exit status of the command that ran them."""
        if status == 0:
            return Ended(0)
        written = self._ours or self._python
        # A rank that was killed wrote no error line. If there is a line, it is from a peer and not the cause.
        first, second = (self._death, written) if self._killed else (written, self._death)
        error = first or second or f"status {status}"
        return Ended(status, self.early, error[:300], self.node)
