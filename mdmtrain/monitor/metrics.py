"""metrics.jsonl: the records of a run. Rank 0 writes them; TensorBoard and W&B show the same records."""

import json
import math
import os
from pathlib import Path

from mdmtrain.config import Config
from mdmtrain.files import replacing, writing
from mdmtrain.monitor.logs import log

METRICS = "metrics.jsonl"
RECORD_BYTES = (950, 1_850)  # measured bytes per step, and the additional bytes of a step with a probe
EVENT_BYTES = (1_250, 17_000)  # the same for TensorBoard
OCTILES = 8
LOSS_BY_OCTILE = "loss_by_octile"  # mean weighted loss of the rows whose rate falls into each eighth of [eps, 1]
STATISTIC_BY_OCTILE = "statistic_by_octile"  # mean of P-POTS' statistic there, without weights (diffusion.target)
LOSS_BY_SOURCE = "loss_by_source"  # {source: mean weighted loss of its rows}, where there are several sources
HISTOGRAM = "rate_histogram"  # rows of the global batch in each eighth
COMPONENTS = "probe"  # {"A", "B_t", "B_int", "C"}: the components of the loss's variance
DENSITY = "rate_density"  # {"used", "wanted"}: the density p in each cell of the rate


class MetricsLog:
    """Appends records to metrics.jsonl, one JSON object per line.

    On resume, records after the checkpoint's step are moved to another file first. notes: lines for the user about
    moved and missing records.
    """

    def __init__(self, run_dir: Path, resume_step: int):
        self.path = run_dir / METRICS
        self._skipped = run_dir / "skipped.jsonl"
        self.notes: list[str] = []
        events = run_dir / "events"
        with writing(run_dir):
            last, moved = cut(self.path, resume_step)
            cut(self._skipped, resume_step)
            if moved:
                where = f"{len(moved)} records of steps {moved[0]} to {moved[-1]}"
                self.notes.append(
                    f"{where} moved from {METRICS} to {abandoned(self.path).name}: resumed at {resume_step}"
                )
            if moved and resume_step == 0 and events.is_dir():  # TensorBoard would hide all of these events
                older = abandoned(events)
                events.rename(older)
                self.notes.append(f"{events.name} was renamed to {older.name}")
        if last < resume_step:
            self.notes.append(
                f"{self.path} lacks the records of steps {last + 1} to {resume_step}: they were removed or lost, and "
                "cannot be restored"
            )
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, records: list[dict]) -> list[dict]:
        """Append records and flush them to the operating system. Returns the records with non-finite values as None."""
        records = [{k: finite(value) if isinstance(value, float) else value for k, value in r.items()} for r in records]
        with writing(self.path.parent):
            for record in records:
                self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        return records

    def skipped(self, step: int, samples: dict[str, list[int]]) -> None:
        """Append a line to skipped.jsonl: the windows (or documents) of each source that a skipped step has read."""
        with writing(self._skipped), open(self._skipped, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": samples}) + "\n")

    def sync(self) -> None:
        """Sync all records to the disk. Called before a checkpoint is committed."""
        with writing(self.path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def abandoned(path: Path) -> Path:
    """The new name of something that a run abandons: the same file for all records, a new name for each folder."""
    new = path.with_name(f"{path.stem}.abandoned{path.suffix}")
    number = 1
    while not path.suffix and new.exists():
        number += 1
        new = path.with_name(f"{path.stem}.abandoned-{number}")
    return new


def cut(file: Path, step: int) -> tuple[int, list[int]]:
    """Keep the records of steps up to `step`, and append later ones to `abandoned(file)`.

    An incomplete last line (from a crash) is dropped. The file is replaced atomically. Returns the last step that was
    kept, and the steps of the moved records.
    """
    last = 0
    moved: list[int] = []
    if not file.exists():
        return last, moved
    others = []
    with open(file, encoding="utf-8", errors="replace") as old, replacing(file) as new:
        for number, line in enumerate(old, 1):
            try:
                if not line.endswith("\n"):
                    continue
                at = json.loads(line)["step"]
                if at <= step:
                    new.write(line)
                    last = max(last, at)
                else:
                    others.append(line)
                    moved.append(at)
            except (json.JSONDecodeError, KeyError, TypeError):
                # After a power failure, zeros may follow the synced part of a file.
                log.warning("%s line %d is damaged and was removed", file, number)
        if others:  # before the file is replaced: after a crash in between, both files have them, so none is lost
            with open(abandoned(file), "a", encoding="utf-8") as rest:
                rest.writelines(others)
                rest.flush()
                os.fsync(rest.fileno())
    return last, moved


def validation_scores(run_dir: Path) -> dict[int, float]:
    """The validation NELBO after each evaluated step, in nats per token: the mean over the validation splits."""
    nelbos: dict[int, list[float]] = {}
    if (run_dir / METRICS).exists():
        with open(run_dir / METRICS, encoding="utf-8", errors="replace") as lines:
            for record in (json.loads(line) for line in lines if '"split"' in line and line.endswith("\n")):
                value = record["nelbo"]
                nelbos.setdefault(record["step"], []).append(math.inf if value is None else value)
    return {step: sum(values) / len(values) for step, values in nelbos.items()}


def thinned(records: list[dict], every: int, saving: bool) -> list[dict]:
    """The records to write with monitor.record_every=every.

    They are those of every `every` steps, of skipped steps, and of steps with measurements. With `saving`, also the
    last record: a resumed run uses it to see that no record before the checkpoint is missing.
    """
    return [
        record
        for number, record in enumerate(records, 1)
        if record["step"] % every == 0
        or record["skipped"]
        or record.keys() & {COMPONENTS, "grad_noise"}
        or (saving and number == len(records))
    ]


def disk_use(config: Config) -> str:
    """A line for the user that says how much disk space the records take."""
    monitor = config.monitor
    counts = (1000 / monitor.record_every, 1000 / monitor.probe_every if monitor.probe_every else 0)
    files = {"metrics.jsonl": RECORD_BYTES} | ({"TensorBoard": EVENT_BYTES} if monitor.tensorboard else {})
    sizes = [
        f"{name} {sum(c * size for c, size in zip(counts, each, strict=True)) / 1e6:.2g} MB"
        for name, each in files.items()
    ]
    every = f"monitor.record_every={monitor.record_every}; a larger number keeps fewer records"
    return f"disk per 1,000 steps: {', '.join(sizes)} ({every})"


def evaluated(run_dir: Path, step: int) -> bool:
    """Has the evaluation after `step` been recorded?"""
    file = run_dir / METRICS
    if not file.exists():
        return False
    with open(file, encoding="utf-8", errors="replace") as lines:
        return any(line.startswith(f'{{"step": {step}, "split": ') for line in lines)


def finite(value: float) -> float | None:
    """The value, or None (null in JSON, which has no NaN and no infinity) if it is not finite."""
    return float(value) if math.isfinite(value) else None
