"""State to disk and back.

A checkpoint is a folder RUN/checkpoints/step-NNNNNNNN with torch.distributed.checkpoint files and `meta.json`, which is
written last: a folder without it does not count. It holds its tokenizer too, so it can be used by itself. Nothing in it
is keyed by rank, so any number of ranks can read what any other number wrote. Tensors are named `model.*`,
`exp_avg.*`, `exp_avg_sq.*`, `momentum.*` (Muon's), `average.*`, `sampler.*` and `adam_step`. docs/checkpoints.md says
the rest.
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
    held,
    place,
    remove,
    storage_errors,
    storage_reader,
    storage_writer,
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
RETRY_SECONDS = (1.0, 5.0, 25.0)  # before the second attempt to write a checkpoint, and so on
NO_SCORES: Mapping[int, float] = {}
HOPELESS = (ENOSPC, EDQUOT, EROFS, EACCES, EPERM, ENOTDIR)  # waiting heals none
log = logging.getLogger("mdmtrain")
# DCP's notes on its own internals. For the whole process: `catch_warnings` is not made for threads.
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")


def training_tensors(
    model: nn.Module, optimizer: Optimizer, average: EMA | None, sampler: RateSampler
) -> dict[str, Tensor]:
    """Every tensor that a run needs to go on: the live ones, so that loading into them restores the run."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"{key}.{name}": moment for key, moment in optimizer.state[p].items() if key != "step"}
    # All of AdamW's parameters have taken the same number of steps; each has its own counter: the first one is saved.
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
    """The step counters of AdamW's parameters; Muon has none."""
    return [state["step"] for state in optimizer.state.values() if "step" in state]


# ---- writing


class Streaming(DefaultSavePlanner):
    """Gives DCP each tensor when it writes it: read(name) is the whole tensor, or this rank's part of it."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def lookup_object(self, index) -> Tensor:
        return self._read(index.fqn)


def save(
    home: Path, step: int, tensors: dict[str, Tensor], meta: dict, tokenizer: Path, config: CheckpointConfig,
    world: World, copies: dict[str, Tensor] | None = None, scores: Mapping[int, float] = NO_SCORES,
) -> Path:  # fmt: skip
    """Write the checkpoint of `step` into `home`, then remove those that are not to be kept. A collective.

    copies: this rank's part of each tensor; `tensors` then only say what is a part of what. scores: the validation
    NELBO after a step, of those that were evaluated, for checkpoint.keep_best; needed on rank 0. An attempt that failed
    is made again, but for failures that no waiting heals (a full disk). Raises AgreedError on every rank when the last
    one failed on any; what was complete before stays complete.
    """
    folder = home / f"step-{step:08d}"
    for pause in (*RETRY_SECONDS, None):
        try:
            _write(folder, tensors, {"step": step, **meta}, tokenizer, world, copies)
            break
        except AgreedError as error:
            with suppress(AgreedError):  # what then stays of it has no marker, and goes with the next checkpoint
                world.agree(lambda: remove(folder), main_only=True)
            if pause is None or isinstance(error, _Hopeless):
                raise
            if world.is_main:
                log.warning("%s (trying once more in %g s)", error, pause)
            time.sleep(pause)
    if world.is_main:
        retain(folder, config, scores)
    return folder


class _Hopeless(AgreedError):
    """A failure that no waiting heals."""


def _write(folder: Path, tensors: dict, meta: dict, tokenizer: Path, world: World, copies: dict | None) -> None:
    world.agree(lambda: remove(folder), main_only=True)
    planner = Streaming(copies.__getitem__) if copies is not None else DefaultSavePlanner()
    try:
        dcp.save(tensors, storage_writer=storage_writer(folder), planner=planner, process_group=world.control)
    except (dcp.CheckpointException, RuntimeError, OSError) as error:
        cause = _root_cause(error)  # of the first rank that failed: the same on all of them
        problem = f"cannot write checkpoint {folder}: {textwrap.shorten(str(cause), 120)}: "
        number = cause.errno if isinstance(cause, OSError) else None
        problem += f"{'free the disk' if number in (ENOSPC, EDQUOT) else 'see to the storage'} and start again"
        raise (_Hopeless if number in HOPELESS else AgreedError)(problem) from None

    def add_tokenizer() -> list[str]:
        with writing(folder), storage_errors(folder):
            (folder / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
            return [file.name for file in folder.iterdir()]

    def commit() -> None:
        with writing(folder), storage_errors(folder):
            write_marker(folder, meta, sums)

    sums = _checksums(folder, world.agree(add_tokenizer, main_only=True), world)
    world.agree(commit, main_only=True)


def write_marker(folder: Path, meta: dict, sums: dict[str, str]) -> None:
    """Write meta.json, which makes a complete checkpoint of what else is in the folder. sums: checksums by file."""
    files = {f.name: f.stat().st_size for f in sorted(folder.iterdir(), key=str)}
    whole = {"format_version": FORMAT_VERSION, **meta, "files": files, "crc32": sums}
    whole["own_crc32"] = _own_checksum(whole)
    write_atomically(folder / "meta.json", json.dumps(whole, indent=1) + "\n")


def _own_checksum(meta: dict) -> str:
    return f"{zlib.crc32(json.dumps(meta).encode()):08x}"


def retain(newest: Path, config: CheckpointConfig, scores: Mapping[int, float] = NO_SCORES) -> None:
    """Remove checkpoints older than `newest` that are not to be kept, and what a kill left half-written.

    scores: see `save`. What cannot be removed is a warning: the run must not stop for it.
    """

    def stays(old: Path) -> bool:
        for_good = config.keep_every is not None and step_of(old) % config.keep_every == 0
        return old in last or old in best or (for_good and (old / "meta.json").exists()) or held(old)

    try:
        with storage_errors(newest.parent):
            # Later steps are of a future that was given up (damaged, passed over on resuming): they are not counted.
            until = [folder for folder in complete_checkpoints(newest.parent) if step_of(folder) <= step_of(newest)]
            last, best = until[-config.keep_last :], best_of(until, scores)[: config.keep_best or 0]
            for old in newest.parent.glob(FOLDERS):
                if step_of(old) < step_of(newest) and not stays(old):
                    remove(old)
    except OSError as error:
        log.warning("cannot remove old checkpoints in %s, the run goes on: %s", newest.parent, describe_error(error))


def best_of(folders: Sequence[Path], scores: Mapping[int, float]) -> list[Path]:
    """The checkpoints that have a finite score, best (lowest) first; of equals the older one."""
    scored = [folder for folder in folders if math.isfinite(scores.get(step_of(folder), math.inf))]
    return sorted(scored, key=lambda folder: (scores[step_of(folder)], step_of(folder)))


def _root_cause(error: BaseException) -> BaseException:
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


# ---- checksums


def _checksums(folder: Path, names: list[str], world: World) -> dict[str, str]:
    """The checksums of a checkpoint's files. A collective: each rank reads what it wrote, which is in its cache."""

    def reader(name: str) -> int:
        rank = name.removeprefix("__").split("_")[0]  # DCP names files __RANK_NUMBER.distcp
        return int(rank) % world.size if rank.isdigit() else 0

    def mine() -> dict[str, str]:
        with storage_errors(folder):
            return {name: checksum(folder / name) for name in names if reader(name) == world.rank}

    return {name: value for part in world.gather(world.agree(mine)) for name, value in part.items()}


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with the content of a checkpoint's files, None where nothing is known to be. A collective.

    Reads all of them once, each rank its share. Checkpoints from before there were checksums count as sound.
    """
    stated = world.agree(lambda: read_meta(folder).get("crc32", {}), main_only=True)
    found = _checksums(folder, list(stated), world)
    changed = [name for name in stated if found[name] != stated[name]]
    return f"{folder / changed[0]}: its content has changed (checksum)" if changed else None


# ---- reading


def home(config: Config) -> Path:
    """Where a run keeps its checkpoints. Raises ValueError."""
    return place(config.checkpoint.dir) if config.checkpoint.dir else Path(config.run.dir) / "checkpoints"


def home_of(run: Path) -> Path:
    """Where the checkpoints of a run folder are. A folder that is none, or has some in it, is the place itself."""
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
    """The working directory where a run was started, from its place and its relative run.dir; None: they do not fit.

    folder: the run's, or one inside it.
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
    """Checkpoint folders of a run, or of the place where it keeps them, that carry their marker, oldest first."""
    with storage_errors(run):
        return sorted((p.parent for p in home_of(run).glob(FOLDERS + "/meta.json")), key=step_of)


def newest(run: Path, damaged: Container[Path] = ()) -> Path | None:
    """The newest complete checkpoint whose files are all there in full; broken ones are passed over with a warning.

    damaged: to be passed over without a word. None where there is no checkpoint at all. Raises ValueError where all are
    broken: starting anew would cut the metrics away.
    """
    folders = complete_checkpoints(run)
    for folder in reversed(folders):
        if folder in damaged:
            continue
        try:
            read_meta(folder)
        except ValueError as error:
            log.warning("passing over a broken checkpoint: %s", error)
        else:
            return folder
    if folders:
        raise ValueError(f"{run}: all its checkpoints are damaged: bring one back, or choose another run.dir")
    return None


def find(path: str | Path) -> Path:
    """The checkpoint that a user means: itself, or the newest of a run folder. Raises ValueError."""
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
    """A checkpoint's meta.json, if every file has the size it was committed with. Raises ValueError."""
    marker = folder / "meta.json"
    if not marker.is_file():
        raise ValueError(
            f"{folder}: not a complete checkpoint (no meta.json) and no exported folder (no config.json): name a run, "
            "a checkpoint or an exported folder"
        )
    try:
        meta = json.loads(marker.read_text(encoding="utf-8"))
        version, files, stated = meta["format_version"], dict(meta["files"]), meta.pop("own_crc32", None)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{marker}: damaged; use another checkpoint") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{marker}: format version {version}, this mdmtrain reads {FORMAT_VERSION}")
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
    """Settings that an older version stored, under today's keys; keys that it did not know have their defaults."""
    config, identity = upgrade(meta["config"]), dict(meta["identity"])
    if "diffusion" in identity:
        stored = upgrade({"diffusion": identity["diffusion"]})["diffusion"]
        identity["diffusion"] = {**DiffusionConfig().model_dump(mode="json"), **stored}
    if "model" in identity:
        identity["model"] = asdict(ModelShape(**identity["model"]))
    return {**meta, "config": config, "identity": identity}


def load(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Read the named tensors from a checkpoint into the given ones, whatever the number of ranks. A collective."""
    try:
        dcp.load(tensors, storage_reader=storage_reader(folder), process_group=world.control)
    except (dcp.CheckpointException, OSError) as error:  # a RuntimeError: a rank has died
        raise AgreedError(
            f"cannot read checkpoint {folder}: {textwrap.shorten(str(_root_cause(error)), 120)}: "
            "use another one; without this one, its run goes on from the one before"
        ) from None


def chosen_weights(folder: Path, meta: dict, weights: str | None) -> str:
    """What the names of the wanted tensors begin with. weights: "raw", "average", or None for the average if any."""
    if weights == "average" and not meta["has_average"]:
        raise AgreedError(f"{folder}: holds no weight average (optim.ema_decay was null): leave out --weights")
    return "average" if weights != "raw" and meta["has_average"] else "model"
