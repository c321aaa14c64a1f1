"""The runs of a sweep and their results: what is finished, what may be compared, and results kept in a file."""

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.resume import changed_settings, checkpoint_config
from mdmtrain.config import Config, upgrade, validate
from mdmtrain.cost import flops_per_token
from mdmtrain.data.shards import is_prepared, location, read_manifest

# Settings that do not change the result of a run, and the exceptions. A repeated sweep may have other values of them.
FREE = (
    "run.dir", "run.micro_batch", "run.max_skips", "run.deterministic", "run.time_limit", "run.step_timeout",
    "run.slow_timeout", "data.verify", "data.workers", "data.prefetch", "data.cache_dir", "data.cache_gb", "eval.batch",
    "parallel.", "checkpoint.", "monitor.",
)  # fmt: skip
BINDING = ("parallel.compute_dtype", "parallel.float8", "checkpoint.init_from", "checkpoint.resize_vocab")


@dataclass(frozen=True)
class Cell:
    """A row of the comparison: one arm with one value of each varied key. Its runs differ only in their seeds."""

    arm: str
    variation: tuple[str, ...]  # key=value

    @property
    def name(self) -> str:
        return " ".join([self.arm, *self.variation])

    @property
    def folder(self) -> str:
        return ",".join([self.arm, *self.variation])


@dataclass(frozen=True)
class Run:
    cell: Cell
    seed: int
    dir: Path
    arguments: list[str]  # of mdmtrain.train
    config: Config

    @property
    def key(self) -> tuple[Cell, int]:
        return self.cell, self.seed

    @property
    def name(self) -> str:
        return f"{self.cell.name} seed {self.seed}"

    def finished(self) -> bool:
        return self.finished_meta() is not None

    def finished_meta(self) -> dict | None:
        """The metadata of the last checkpoint. None if the run is not finished.

        Raises ValueError if the newest checkpoint was trained with other settings or other data than the run has.
        """
        newest = store.newest(self.dir) if self.dir.is_dir() else None
        if newest is None:
            return None
        meta = store.read_meta(newest)
        try:
            before = checkpoint_config(meta)
        except ValueError as error:
            raise ValueError(f"{self.dir}: {error}") from None
        self.check(before, trained_data(meta, before), f"{self.dir}: use the same settings and data, or another --dir")
        return meta if meta["step"] >= self.config.run.steps else None

    def check(self, before: Config, data: list[str], advice: str) -> None:
        """Raise ValueError if the run was trained with other settings or other data than it has now.

        before: the configuration that it was trained with. data: the fingerprints of its data.
        """
        changed = [
            text
            for key, text in changed_settings(without_paths(before), without_paths(self.config)).items()
            if key in BINDING or not key.startswith(FREE)
        ]
        if changed:
            raise ValueError(f"{self.name} was trained with other settings: {', '.join(changed)}: {advice}")
        for source, was in zip(self.config.data.sources, data, strict=True):
            now = present_fingerprint(source.path)
            if now is not None and now != was:
                raise ValueError(
                    f"{self.name} was trained on other data: {source.path} had the fingerprint {was[:12]} and has "
                    f"{now[:12]}: {advice}"
                )


def without_paths(config: Config) -> Config:
    """The configuration with a number for each path of a source: the data is compared by its fingerprint."""
    numbered = tuple(one.model_copy(update={"path": str(i)}) for i, one in enumerate(config.data.sources))
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": numbered})})


def trained_data(meta: dict, config: Config) -> list[str]:
    """The fingerprints of the sources that a checkpoint was trained on."""
    return [fingerprint for fingerprint, _ in meta["identity"]["data"][: len(config.data.sources)]]


@cache
def present_fingerprint(path: str) -> str | None:
    """The fingerprint of prepared data. None if the folder is not here."""
    return read_manifest(location(path))["fingerprint"] if is_prepared(path) else None


@dataclass(frozen=True)
class Curve:
    """The validation NELBO of one run as a function of its tokens."""

    tokens: np.ndarray  # float64 [evaluations]
    nelbo: np.ndarray  # float64 [evaluations], nats per token
    constant: int  # evaluations before the learning rate decays; runs of different lengths are comparable there


@dataclass(frozen=True)
class Result:
    """What a finished run gives to the comparison."""

    curve: Curve
    data: list[str]  # fingerprints of its sources
    config: Config  # that it was trained with


Results = dict[tuple[Cell, int], Result]  # by cell and seed


class StoredRun(BaseModel):
    """A result in a file that --json wrote."""

    model_config = ConfigDict(extra="forbid", strict=True)

    arm: str
    variation: list[str]
    seed: int
    tokens: list[float]
    nelbo: list[float | None]  # null: it was not finite
    constant: int
    data: list[str]
    config: dict


def to_json(results: Results) -> list[dict]:
    """The results as `read_stored` reads them."""
    return [
        StoredRun(
            arm=cell.arm,
            variation=list(cell.variation),
            seed=seed,
            tokens=one.curve.tokens.tolist(),
            nelbo=one.curve.nelbo.tolist(),
            constant=one.curve.constant,
            data=one.data,
            config=one.config.model_dump(mode="json"),
        ).model_dump()
        for (cell, seed), one in results.items()
    ]


def flops_of_cells(runs: list[Run]) -> dict[Cell, float]:
    """FLOPs of training per token. Without cells whose vocabulary is not known because the data is not here."""
    found = {}
    for cell, config in {run.cell: run.config for run in runs}.items():  # reads the data once for each cell
        with suppress(ValueError):
            found[cell] = flops_per_token(config)
    return found


def read_stored(file: Path, runs: list[Run]) -> tuple[Results, int]:
    """The results of the sweep's runs in a file that --json wrote, and the number of its other runs.

    Raises ValueError if --json did not write the file, or if a run had other settings or other data than the sweep's.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        records = [StoredRun.model_validate(one) for one in content["runs"]]
        if any(not len(one.tokens) == len(one.nelbo) > 0 for one in records):
            raise ValueError("a run has no curve")
    except KeyError:
        raise ValueError(f"{file} has no runs: an older version wrote it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file}: a run has a wrong {where}: {first['msg']}: --json did not write this file") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: launchers.sweep --json did not write this file: {error}") from None
    stored = {(Cell(one.arm, tuple(one.variation)), one.seed): one for one in records}
    found: Results = {}
    for run in runs:
        if (record := stored.get(run.key)) is not None:
            before = validate(upgrade(record.config), f"{file}: the configuration of {run.name}")
            run.check(before, record.data, f"use the same settings and data, or leave out --results {file}")
            nelbo = np.array([np.inf if value is None else value for value in record.nelbo])
            found[run.key] = Result(Curve(np.array(record.tokens), nelbo, record.constant), record.data, before)
    return found, len(stored) - len(found)


def read_curve(run: Run) -> Curve:
    """Read the evaluations of a run from its metrics.jsonl: the mean over the validation sets at each step."""
    records = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    at: dict[int, list[float]] = {}
    for record in records:
        if record.get("split", "").startswith("validation"):
            nelbo = record["nelbo"]
            at.setdefault(record["step"], []).append(np.inf if nelbo is None else nelbo)  # null: it was not finite
    steps = np.array(list(at))
    means = np.array([np.mean(values) for values in at.values()])
    optim = run.config.optim
    before = 0  # first step of the decay
    if optim.schedule == "wsd":
        before = run.config.run.steps - round(run.config.run.steps * optim.decay_fraction)
    tokens = steps * float(run.config.run.global_batch * run.config.data.sequence_length)
    return Curve(tokens, means, int((steps <= before).sum()))


def collect(runs: list[Run], stored: Results) -> Results:
    """The results of all finished runs. A result of a file comes before that of the run folder.

    Raises ValueError if runs of the same sources were trained on different data.
    """
    found: Results = {}
    first: dict[str, tuple[Run, list[str]]] = {}
    for run in runs:
        if run.key in stored:
            result = stored[run.key]
        elif (meta := run.finished_meta()) is not None:
            before = checkpoint_config(meta)
            result = Result(read_curve(run), trained_data(meta, before), before)
        else:
            continue
        found[run.key] = result
        other, data = first.setdefault(run.config.data.model_dump_json(include={"sources"}), (run, result.data))
        if data != result.data:
            raise ValueError(
                f"{run.name} and {other.name} were trained on different data (fingerprints {', '.join(result.data)} "
                f"and {', '.join(data)}): train both on the same data"
            )
    return found
