"""The checkpoint format: writing and reading.

A checkpoint is a folder RUN/checkpoints/step-NNNNNNNN with files of torch.distributed.checkpoint (DCP) and `meta.json`.
That file is written last: a folder without it is not complete and is ignored. The tokenizer is in the folder too, so
the folder can be used without others. Nothing in it is keyed by rank, so any number of ranks can read it. Tensors are
named `model.*`, `exp_avg.*`, `exp_avg_sq.*`, `momentum.*` (Muon's), `average.*`, `sampler.*` and `adam_step`. See
docs/checkpoints.md.
"""

import json
import logging
import math
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from errno import EACCES, EDQUOT, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from mdmtrain import yaml12
from mdmtrain.checkpoint.storage import (
    checksum,
    place,
    remove,
    storage_errors,
    storage_of,
    write_atomically,
)
from mdmtrain.config import CheckpointConfig, Config, DiffusionConfig, upgrade
from mdmtrain.diffusion.sampler import RateSampler
from mdmtrain.files import writing
from mdmtrain.model.presets import ModelShape
from mdmtrain.optim import EMA, Optimizer
from mdmtrain.parallel.world import AgreedError, World, describe_error

FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.model"
FOLDERS = "step-" + 8 * "[0-9]"
RETRY_SECONDS = (1.0, 5.0, 25.0)  # pauses before the second and later attempts to write a checkpoint
NO_SCORES: Mapping[int, float] = {}
HOPELESS = (ENOSPC, EDQUOT, EROFS, EACCES, EPERM, ENOTDIR)  # errors that a retry does not fix
log = logging.getLogger("mdmtrain")
# DCP warns about its own internals. The filter is for the whole process, because `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")


def training_tensors(
    model: nn.Module, optimizer: Optimizer, average: EMA | None, sampler: RateSampler
) -> dict[str, Tensor]:
    """All tensors that a run needs to resume. They are not copies, so loading into them restores the run."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"{key}.{name}": moment for key, moment in optimizer.state[p].items() if key != "step"}
    # Each of AdamW's parameters has its own step counter. They are equal, so only the first one is saved.
    tensors["adam_step"] = adam_steps(optimizer)[0]
    tensors.update({f"sampler.{name}": tensor for name, tensor in sampler.tensors.items()})
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
    return tensors


def spread_adam_step(optimizer: Optimizer) -> None:
    """Copy the restored step count to every parameter's counter."""
    first, *others = adam_steps(optimizer)
    for step in others:
        step.copy_(first)


def adam_steps(optimizer: Optimizer) -> list[Tensor]:
    """The step counters of AdamW's parameters. Muon has none."""
    return [state["step"] for state in optimizer.state.values() if "step" in state]


# ---- writing


class Streaming(DefaultSavePlanner):
    """A planner that reads each tensor when DCP writes it. read(name): the whole tensor, or this rank's part of it."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def lookup_object(self, index) -> Tensor:
        return self._read(index.fqn)


def save(
    home: Path, step: int, tensors: dict[str, Tensor], meta: dict, tokenizer: bytes, config: CheckpointConfig,
    world: World, copies: dict[str, Tensor] | None = None, scores: Mapping[int, float] = NO_SCORES,
) -> Path:  # fmt: skip
    """Write the checkpoint of `step` into `home`, then remove checkpoints that are not kept. A collective.

    copies: this rank's part of each tensor; `tensors` then only give the shapes and the sharding. scores: the
    validation NELBO by step, for checkpoint.keep_best; needed on rank 0. A failed attempt is repeated, except after an
    error that a retry does not fix (a full disk). Raises AgreedError on every rank if the last attempt failed on any
    rank. A failure does not change earlier checkpoints.
    """
    folder = home / f"step-{step:08d}"
    for pause in (*RETRY_SECONDS, None):
        try:
            _write(folder, tensors, {"step": step, **meta}, tokenizer, world, copies)
            break
        except AgreedError as error:
            with suppress(AgreedError):  # a rest without meta.json is removed after the next checkpoint
                world.agree(lambda: remove(folder), main_only=True)
            if pause is None or isinstance(error, _Hopeless):
                raise
            if world.is_main:
                log.warning("%s (trying again in %g s)", error, pause)
            time.sleep(pause)
    if world.is_main:
        retain(folder, config, scores)
    return folder


class _Hopeless(AgreedError):
    """An error that a retry does not fix."""


def _write(folder: Path, tensors: dict, meta: dict, tokenizer: bytes, world: World, copies: dict | None) -> None:
    world.agree(lambda: remove(folder), main_only=True)
    planner = Streaming(copies.__getitem__) if copies is not None else DefaultSavePlanner()
    try:
        writer = storage_of(folder).writer(folder)
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=world.control)
    except (dcp.CheckpointException, RuntimeError, OSError) as error:
        cause = _root_cause(error)  # of the first rank that failed, so it is the same on all ranks
        number = cause.errno if isinstance(cause, OSError) else None
        remedy = "free disk space" if number in (ENOSPC, EDQUOT) else "check the storage"
        problem = f"cannot write checkpoint {folder}: {textwrap.shorten(str(cause), 120)}: {remedy} and start again"
        raise (_Hopeless if number in HOPELESS else AgreedError)(problem) from None

    def add_tokenizer() -> list[str]:
        with writing(folder), storage_errors(folder):
            (folder / TOKENIZER_FILE).write_bytes(tokenizer)
            return [file.name for file in folder.iterdir()]

    def commit() -> None:
        with writing(folder), storage_errors(folder):
            write_marker(folder, meta, sums)

    sums = _checksums(folder, world.agree(add_tokenizer, main_only=True), world)
    world.agree(commit, main_only=True)


def write_marker(folder: Path, meta: dict, sums: dict[str, str]) -> None:
    """Write meta.json, which marks the checkpoint in `folder` as complete. sums: checksums by file name."""
    files = {f.name: f.stat().st_size for f in sorted(folder.iterdir(), key=str)}
    whole = {"format_version": FORMAT_VERSION, **meta, "files": files, "crc32": sums}
    whole["own_crc32"] = _own_checksum(whole)
    write_atomically(folder / "meta.json", json.dumps(whole, indent=1) + "\n")


def _own_checksum(meta: dict) -> str:
    return f"{zlib.crc32(json.dumps(meta).encode()):08x}"


def retain(newest: Path, config: CheckpointConfig, scores: Mapping[int, float] = NO_SCORES) -> None:
    """Remove incomplete checkpoints before `newest`, and complete ones that the configuration does not keep.

    scores: see `save`. A checkpoint that cannot be removed is only a warning, because training can continue.
    """

    def stays(old: Path) -> bool:
        for_good = config.keep_every is not None and step_of(old) % config.keep_every == 0
        return old in last or old in best or (for_good and (old / "meta.json").exists()) or storage_of(old).held(old)

    try:
        with storage_errors(newest.parent):
            # Later steps exist if damaged checkpoints were skipped when the run resumed. They do not count.
            until = [folder for folder in complete_checkpoints(newest.parent) if step_of(folder) <= step_of(newest)]
            last = until[-config.keep_last :]
            best = best_of(until, scores)[: config.keep_best or 0]
            for old in newest.parent.glob(FOLDERS):
                if step_of(old) < step_of(newest) and not stays(old):
                    remove(old)
    except OSError as error:
        log.warning("cannot remove old checkpoints in %s, training continues: %s", newest.parent, describe_error(error))


def best_of(folders: Sequence[Path], scores: Mapping[int, float]) -> list[Path]:
    """The checkpoints that have a finite score, lowest (best) first, then oldest first."""
    scored = [folder for folder in folders if math.isfinite(scores.get(step_of(folder), math.inf))]
    return sorted(scored, key=lambda folder: (scores[step_of(folder)], step_of(folder)))


def _root_cause(error: BaseException) -> BaseException:
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


# ---- checksums


def _checksums(folder: Path, names: list[str], world: World) -> dict[str, str]:
    """The checksums of a checkpoint's files. A collective. Each rank reads the files that it wrote (page cache)."""

    def reader(name: str) -> int:
        rank = name.removeprefix("__").split("_")[0]  # DCP names files __RANK_NUMBER.distcp
        return int(rank) % world.size if rank.isdigit() else 0

    def mine() -> dict[str, str]:
        with storage_errors(folder):
            return {name: checksum(folder / name) for name in names if reader(name) == world.rank}

    return {name: value for part in world.gather(world.agree(mine)) for name, value in part.items()}


def damage(folder: Path, world: World) -> str | None:
    """Verify the checksums of a checkpoint's files. Returns what is wrong, or None. A collective.

    All files are read once, each rank reads its share. Older checkpoints without checksums are assumed to be intact.
    """
    stated = world.agree(lambda: read_meta(folder).get("crc32", {}), main_only=True)
    found = _checksums(folder, list(stated), world)
    changed = [name for name in stated if found[name] != stated[name]]
    return f"{folder / changed[0]}: its content has changed (checksum)" if changed else None


# ---- reading


def home(config: Config) -> Path:
    """The place of a run's checkpoints. Raises ValueError."""
    return place(config.checkpoint.dir) if config.checkpoint.dir else Path(config.run.dir) / "checkpoints"


def home_of(run: Path) -> Path:
    """The place of the checkpoints of a run folder. For a folder that has checkpoints, or is not a run: itself."""
    if (run / "config.yaml").is_file():
        tree = yaml12.parse((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
        section = tree.get("checkpoint") if isinstance(tree, dict) else None
        if isinstance(section, dict) and section.get("dir"):
            base = started_in(run, str((tree.get("run") or {}).get("dir")))
            there = "://" not in section["dir"] and base is not None and (base / section["dir"]).is_dir()
            return base / section["dir"] if there else place(section["dir"])
    if any(run.glob(FOLDERS)):
        return run
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


def started_in(folder: Path, run_dir: str) -> Path | None:
    """The directory in which a run was started, from the place of its folder and its relative run.dir, or None.

    folder: the run folder, or a folder inside it.
    """
    wanted = Path(run_dir).parts
    for whole in (folder.absolute(), folder.resolve()):
        for place_of_run in (whole, *whole.parents):
            if not Path(run_dir).is_absolute() and place_of_run.parts[-len(wanted) :] == wanted:
                return Path(*place_of_run.parts[: -len(wanted)])
    return None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints (with meta.json) of a run, or of the place of its checkpoints, oldest first."""
    with storage_errors(run):
        return sorted((p.parent for p in home_of(run).glob(FOLDERS + "/meta.json")), key=step_of)


def newest(run: Path, damaged: Container[Path] = ()) -> Path | None:
    """The newest complete checkpoint whose files have their sizes, or None. Broken ones are skipped with a warning.

    damaged: checkpoints to skip without a warning. Raises ValueError if all checkpoints are broken, because a new run
    would truncate the metrics.
    """
    folders = complete_checkpoints(run)
    for folder in reversed(folders):
        if folder in damaged:
            continue
        try:
            read_meta(folder)
        except ValueError as error:
            log.warning("skipping a broken checkpoint: %s", error)
        else:
            return folder
    if folders:
        raise ValueError(f"{run}: all its checkpoints are damaged: restore one, or choose another run.dir")
    return None


def find(path: str | Path) -> Path:
    """The checkpoint at `path`: the folder itself, or the newest of a run. Raises ValueError."""
    path = place(str(path))
    with storage_errors(path):
        if not path.exists():
            raise ValueError(f"{path}: no such run, checkpoint or exported folder: check the path")
        run = (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()
    if run or complete_checkpoints(path):
        folder = newest(path)
        if folder is None:
            raise ValueError(f"{path}: no complete checkpoint in this run; train it first")
        return folder
    read_meta(path)
    return path


def read_meta(folder: Path) -> dict:
    """The meta.json of a checkpoint. Raises ValueError if it is missing or damaged, or if a file has another size."""
    marker = folder / "meta.json"
    if not marker.is_file():
        raise ValueError(
            f"{folder}: neither a complete checkpoint (no meta.json) nor an exported folder (no config.json): name a "
            "run, a checkpoint or an exported folder"
        )
    try:
        meta = json.loads(marker.read_text(encoding="utf-8"))
        version, files, stated = meta["format_version"], dict(meta["files"]), meta.pop("own_crc32", None)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{marker}: damaged; use another checkpoint") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{marker}: has format version {version}, but this mdmtrain reads {FORMAT_VERSION}")
    if stated is not None and stated != _own_checksum(meta):
        raise ValueError(f"{marker}: its content has changed (checksum); use another checkpoint")
    if not {"step", "identity", "has_average", "config"} <= meta.keys():
        raise ValueError(f"{marker}: incomplete; use another checkpoint")
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found:,} bytes instead of {size:,}"
            raise ValueError(f"{folder / name}: {state}; the checkpoint is damaged, use another one")
    return _today(meta)


def _today(meta: dict) -> dict:
    """The meta.json of an older version with today's keys. Keys that did not exist have their defaults."""
    config = upgrade(meta["config"])
    identity = dict(meta["identity"])
    if "diffusion" in identity:
        stored = upgrade({"diffusion": identity["diffusion"]})["diffusion"]
        identity["diffusion"] = {**DiffusionConfig().model_dump(mode="json"), **stored}
    if "model" in identity:
        identity["model"] = asdict(ModelShape(**identity["model"]))
    return {**meta, "config": config, "identity": identity}


def load(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Read tensors from a checkpoint, by name, into the given tensors, on any number of ranks. A collective."""
    try:
        dcp.load(tensors, storage_reader=storage_of(folder).reader(folder), process_group=world.control)
    except (dcp.CheckpointException, OSError) as error:  # not RuntimeError, which means that a rank has died
        raise AgreedError(
            f"cannot read checkpoint {folder}: {textwrap.shorten(str(_root_cause(error)), 120)}: use another one; "
            "if you remove this one, its run resumes from the one before it"
        ) from None
