"""The life cycle of a launched run: what follows from the end of its ranks.

    queued -> running -> finished     the newest checkpoint is at run.steps
                      -> requeued     an agreed stop (time limit, preemption), or a crash: it runs again
                      -> failed       --max-crashes crashes in a row without a new checkpoint
                      -> cancelled    by a person (scancel, status cancel)
                      -> stopped      by a person (launchers.local), or the cluster does not requeue: resume it by hand

`begin` and `conclude` decide; supervise.py acts on Slurm, local.py on one machine. RUN/job/state.json keeps the
state. Only the standard library is needed here and in the modules that run inside a job (supervise.py, rank.py): the
node that supervises has better uses for its memory than another torch.
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
    """Where a launched run stands. Phases: queued, running, requeued, stopped, cancelled, finished, failed."""

    kind: str  # slurm, or local
    job: str = ""  # Slurm's job id, or HOST:PID of the process that supervises the ranks
    phase: str = "queued"
    starts: int = 0
    crashes: int = 0  # in a row without a new checkpoint
    began_at: int = 0  # step of the newest checkpoint when the ranks last started
    last_error: str = ""
    log: str = ""  # what the ranks print
    cluster: str = ""  # of the job, where it is not this machine's own (--clusters)
    submitit: str = ""  # folder of the job's pickles


@dataclass(frozen=True)
class Ended:
    """How the ranks ended."""

    status: int  # of the command that ran them
    early: bool = False  # told to stop before they had begun, or before the last evaluation
    error: str = ""  # what was wrong, one line
    node: str = ""  # where the first rank crashed, if it is known


def job_folder(run_dir: Path) -> Path:
    return run_dir / "job"


def this_job() -> str:
    """The id of the job, or of the task of a job array, that this process belongs to."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # SLURM_JOB_ID may stand for the whole array there
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def read_state(run_dir: Path) -> State | None:
    """The state of a launched run, or None where none was launched. Raises ValueError."""
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
    """The state at the start of the ranks. Phase `failed`: do not start them."""
    if state.phase == "running":  # nobody was left to say how the last start ended
        died = Ended(1, error=f"start {state.starts} was cut off: its node, or the process that supervises, died")
        state = conclude(state, died, step, step + 1, max_crashes)
    if state.phase == "failed":
        return state
    return replace(state, phase="running", starts=state.starts + 1, began_at=step)


def conclude(state: State, ended: Ended, step: int, steps: int, max_crashes: int) -> State:
    """The state after the ranks have ended. Phase `requeued`: start them again.

    step: of the newest checkpoint; steps: of the whole run. A crash counts when it left no new checkpoint behind.
    """
    if step >= steps and ended.status == 0:
        return replace(state, phase="finished", crashes=0)
    progress = step > state.began_at
    if ended.status == 0 or ended.early:  # an agreed stop: as often as it takes
        return replace(state, phase="requeued", crashes=0 if progress else state.crashes)
    crashes = 0 if progress else state.crashes + 1
    phase = "failed" if crashes >= max_crashes else "requeued"
    return replace(state, phase=phase, crashes=crashes, last_error=ended.error)


class ErrorLines:
    """Picks what was wrong from the lines that ranks and srun write to standard error."""

    def __init__(self) -> None:
        self._ours = self._python = self._death = ""  # the first line of each kind
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
        """how: as srun says it, such as 'Killed' or 'Exited with exit code 1'."""
        self.early |= how.endswith(f"exit code {STOPPED_EARLY}")
        if self._death:
            return  # the first death says more than those of peers that were left alone
        self._death, self._killed = f"rank {ranks} on {node}: {how}", "exit code" not in how
        if not how.endswith(f"exit code {BAD_INPUT}"):  # no node's fault
            self.node = node

    def ended(self, status: int) -> Ended:
        if status == 0:
            return Ended(0)
        said = [self._ours, self._python]
        error = next(filter(None, [self._death, *said] if self._killed else [*said, self._death]), f"status {status}")
        return Ended(status, self.early, error[:300], self.node)
