"""What is due after a training step (probe, evaluation, checkpoint, log), and why."""

from dataclasses import dataclass

from mdmtrain.config import Config


@dataclass(frozen=True)
class Due:
    """Each field is the reason why this is due after the step, or "" if it is not due."""

    probe: str
    evaluation: str
    save: str
    log: str

    @property
    def interrupts(self) -> bool:
        """Is there an evaluation or a checkpoint between this step and the next one?"""
        return bool(self.evaluation or self.save)

    def __str__(self) -> str:
        return ", ".join(f"{what} ({why})" for what, why in vars(self).items() if why)


def due_after(config: Config, step: int, stop: str = "") -> Due:
    """What is due after `step` steps. stop: the reason why the run stops here, or "" if it does not stop.

    A stopping run saves at once. It skips the probe, and the evaluation is done when the run is resumed.
    """
    probe = ""
    evaluation = ""
    save = ""
    log = ""
    if config.monitor.probe_every and step % config.monitor.probe_every == 0 and not stop:
        probe = "monitor.probe_every"
    if config.evaluates(step) and not stop:
        evaluation = "eval.every, or the last step"
    if config.saves(step):
        save = "checkpoint.save_every"
    if step == config.run.steps:
        save = "the last step"
    if stop:
        save = stop
    if step % config.monitor.log_every == 0:
        log = "monitor.log_every"
    return Due(probe, evaluation, save, log or probe or evaluation or save)
