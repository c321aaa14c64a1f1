"""submitit's job handle for the Slurm job of a launched run: its state, output and result, and a way to cancel it.

It works on any machine that sees the run folder, also after the process that submitted the job has ended.
"""

from pathlib import Path

import submitit

from launchers import slurm_client
from launchers.lifecycle import State, read_state


class RunJob(submitit.SlurmJob):
    """A submitit job that takes its state from scontrol. submitit uses sacct, which needs Slurm accounting."""

    def __init__(self, state: State):
        super().__init__(state.submitit, state.job)
        self._cluster = state.cluster

    def now(self) -> slurm_client.JobState:
        """The present state of the job. Raises ValueError if Slurm does not answer."""
        return slurm_client.job_state(self.job_id, self._cluster)

    @property
    def state(self) -> str:
        return self.now().name

    def done(self, force_check: bool = False) -> bool:
        return self.paths.result_pickle.exists() or not self.now().lives

    def cancel(self, check: bool = True) -> None:
        slurm_client.slurm("scancel", self.job_id, cluster=self._cluster)


def run_job(run_dir: Path) -> RunJob | None:
    """The last job of a run, or None if none was submitted. Raises ValueError if the run's state file is damaged."""
    state = read_state(Path(run_dir))
    return RunJob(state) if state is not None and state.kind == "slurm" and state.job else None
