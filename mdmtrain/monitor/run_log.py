"""The output of a run while it trains: records, displays, progress and messages."""

from dataclasses import asdict
from pathlib import Path

from mdmtrain.config import Config
from mdmtrain.data.loader import Dataset
from mdmtrain.files import writing
from mdmtrain.monitor.display import Display, open_displays
from mdmtrain.monitor.logs import log
from mdmtrain.monitor.metrics import MetricsLog, thinned
from mdmtrain.monitor.progress import TrainingProgress
from mdmtrain.monitor.recorder import StepRecorder
from mdmtrain.parallel.world import AgreedError, World


class RunLog:
    """Writes metrics.jsonl, skipped.jsonl, the displays and the terminal. All ranks call it, only rank 0 writes."""

    def __init__(self, config: Config, step: int, world: World, bits_per_nat: float):
        """step: the step from which the run starts; later records are moved away.

        bits_per_nat: converts nats per eligible token to bits per byte.

        A collective. Raises AgreedError.
        """
        self._config = config
        folder = Path(config.run.dir)
        self._metrics = world.agree(lambda: MetricsLog(folder, step) if world.is_main else None)
        self._displays: list[Display] = world.agree(
            lambda: open_displays(folder, step, config) if world.is_main else []
        )
        is_bound = config.diffusion.trains_nelbo or config.diffusion.objective == "ar"
        self._progress = TrainingProgress(step, config.run.steps, bits_per_nat if is_bound else None, world.is_main)
        self.notes = self._metrics.notes if self._metrics is not None else []  # see MetricsLog

    def start_clock(self) -> None:
        """Call when the steps begin."""
        self._progress.start()

    def steps(self, records: list[dict], recorder: StepRecorder, dataset: Dataset, keep_last: bool) -> None:
        """Write the records of the steps since the last call. keep_last: always write the last one (see `thinned`).

        Raises AgreedError if too many steps in a row were skipped.
        """
        self._write(thinned(records, self._config.monitor.record_every, keep_last))
        for record in records:
            if record["skipped"]:
                self._skipped(record["step"], dataset)
        self._progress.update(records[-1])
        in_a_row = recorder.skips_in_a_row
        if in_a_row >= self._config.run.max_skips:
            raise AgreedError(
                f"{in_a_row} steps in a row had a non-finite loss or gradient: lower optim.lr or raise "
                f"optim.warmup_steps; {self._config.run.dir} resumes from its last checkpoint"
            )
        if slow := recorder.slow_rank():
            log.warning("step %d: %s", records[-1]["step"], slow)

    def _skipped(self, step: int, dataset: Dataset) -> None:
        log.warning("step %d skipped: its loss or gradient was not finite", step)
        if self._metrics is not None:
            self._metrics.skipped(step, dataset.samples(step - 1))

    def evaluation(self, step: int, found: list) -> None:
        """Write an evaluation. found: one Evaluation per validation split."""
        for one in found:
            self._progress.note(f"step {step}  {one}")
        self._write([{"step": step, **asdict(one)} for one in found])

    def probe_cost(self, step: int, seconds: float, share: float) -> None:
        """Show the time that a probe took. It is not recorded, so that equal runs have equal records."""
        for display in self._displays:
            display.show_probe_cost(step, seconds, share)

    def checkpoint(self, committed: Path | None) -> None:
        """Print a note about a committed checkpoint. None: nothing was committed."""
        if committed is not None:
            self._progress.note(f"step {int(committed.name.removeprefix('step-'))}  checkpoint {committed}")

    def sync(self) -> None:
        """Sync the records to the disk. Called before a checkpoint is committed."""
        if self._metrics is not None:
            self._metrics.sync()
            with writing(self._metrics.path.parent):
                for display in self._displays:
                    display.flush()

    def close(self) -> None:
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
        for display in self._displays:
            display.close()

    def _write(self, records: list[dict]) -> None:
        """Append records to metrics.jsonl, and show the same records in the displays."""
        if self._metrics is not None:
            written = self._metrics.write(records)
            with writing(self._metrics.path.parent):
                for display in self._displays:
                    for record in written:
                        display.show(record)
