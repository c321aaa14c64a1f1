"""A launched run's Slurm job as submitit's job handle: state, cancel, output and result, from any machine, any time."""

from pathlib import Path

import submitit

from launchers import slurm_client
from launchers.lifecycle import State, read_state


class RunJob(submitit.SlurmJob):
    """submitit's handle, with states from scontrol: submitit itself asks sacct, which needs accounting."""

    def __init__(self, state: State):
        super().__init__(state.submitit, state.job)
        self._cluster = state.cluster

    def now(self) -> slurm_client.JobState:
        """Raises ValueError where Slurm does not answer."""
        return slurm_client.job_state(self.job_id, self._cluster)

    @property
    def state(self) -> str:
        return self.now().name

    def done(self, force_check: bool = False) -> bool:
        return self.paths.result_pickle.exists() or not self.now().lives

    def cancel(self, check: bool = True) -> None:
        slurm_client.slurm("scancel", self.job_id, cluster=self._cluster)


def run_job(run_dir: Path) -> RunJob | None:
    """The last job of a run, or None where none was submitted. Raises ValueError."""
    state = read_state(Path(run_dir))
    return RunJob(state) if state is not None and state.kind == "slurm" and state.job else None
