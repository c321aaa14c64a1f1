"""Write and read checkpoints.

A checkpoint is a folder RUN/checkpoints/step-NNNNNNNN with one safetensors file from each rank, the tokenizer, and
`meta.json`. That file is written last: a folder without it is not complete and is ignored. It contains the layout of
the tensors (layout.py), so any number of ranks can read a checkpoint. Tensors are named `model.*`, `exp_avg.*`,
`exp_avg_sq.*`, `momentum.*` (Muon's), `average.*`, `sampler.*` and `adam_step`. See docs/checkpoints.md.
"""

import json
import logging
import math
import textwrap
import time
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from errno import EACCES, EDQUOT, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mdmtrain import yaml12
from mdmtrain.checkpoint import version1
from mdmtrain.checkpoint.layout import Layout, divide
from mdmtrain.checkpoint.storage import (
    checksum,
    place,
    remove,
    storage_errors,
    storage_of,
    write_atomically,
)
from mdmtrain.checkpoint.tensor_files import TensorReader, file_blocks, write_file
from mdmtrain.config import CheckpointConfig, Config, DiffusionConfig, upgrade
from mdmtrain.diffusion.sampler import RateSampler
from mdmtrain.model.presets import ModelShape
from mdmtrain.optim import EMA, Optimizer, local
from mdmtrain.parallel.world import AgreedError, T, World, describe_error

FORMAT_VERSION = 2
TOKENIZER_FILE = "tokenizer.model"
FOLDERS = "step-" + 8 * "[0-9]"
RETRY_SECONDS = (1.0, 5.0, 25.0)  # pauses before the second and later attempts to write a checkpoint
NO_SCORES: Mapping[int, float] = {}
HOPELESS = (ENOSPC, EDQUOT, EROFS, EACCES, EPERM, ENOTDIR)  # errors that a retry does not fix
log = logging.getLogger("mdmtrain")


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


def layout_of(tensors: Mapping[str, Tensor], world: World) -> Layout:
    """Which rank writes which rows. Every rank writes about the same number of bytes."""
    sharded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    shards = next(iter(sharded.values())).device_mesh.size(-1) if sharded else 1
    return divide(tensors, sharded, world.size // shards, shards)


def save(
    home: Path, step: int, tensors: Mapping[str, Tensor], meta: dict, tokenizer: bytes, config: CheckpointConfig,
    world: World, copies: dict[str, Tensor] | None = None, scores: Mapping[int, float] = NO_SCORES,
) -> Path:  # fmt: skip
    """Write the checkpoint of `step` into `home`, then remove checkpoints that are not kept. A collective.

    copies: this rank's part of each tensor that it writes, on the CPU; without copies the live tensors are written.
    scores: the validation NELBO by step, for checkpoint.keep_best; needed on rank 0. A failed attempt is repeated,
    except after an error that a retry does not fix (a full disk). Raises AgreedError on every rank if the last attempt
    failed on any rank. A failure does not change earlier checkpoints.
    """
    folder = home / f"step-{step:08d}"
    layout = layout_of(tensors, world)
    read = (lambda name: local(tensors[name]).cpu()) if copies is None else copies.__getitem__
    for pause in (*RETRY_SECONDS, None):
        try:
            _write(folder, layout, read, {"step": step, **meta}, tokenizer, world)
            break
        except AgreedError as error:
            with suppress(AgreedError):  # if this fails, `retain` removes the folder after the next save
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


def _write(
    folder: Path, layout: Layout, read: Callable[[str], Tensor], meta: dict, tokenizer: bytes, world: World
) -> None:
    def prepare() -> None:
        remove(folder)
        folder.mkdir(parents=True, exist_ok=True)

    def commit() -> None:
        names = map(layout.file_name, range(layout.files))
        files = dict(zip(names, written, strict=True))
        files[TOKENIZER_FILE] = write_file(folder / TOKENIZER_FILE, [tokenizer])
        write_marker(folder, meta, layout, files)

    _write_together(prepare, folder, world, main_only=True)
    blocks = file_blocks(layout.header(world.rank), read)
    written = _write_together(lambda: write_file(folder / layout.file_name(world.rank), blocks), folder, world)
    _write_together(commit, folder, world, main_only=True)


def _write_together(act: Callable[[], T], folder: Path, world: World, main_only: bool = False) -> list[T]:
    """Call `act` on each rank, or only on rank 0 (main_only), and return all results. A collective.

    If `act` fails on any rank, all ranks raise the same AgreedError.
    """
    result: list[T] = []
    failure = None
    if world.is_main or not main_only:
        try:
            with storage_errors(folder):
                result.append(act())
        except (OSError, ValueError) as error:
            failure = str(error), getattr(error, "errno", None)
    outcomes = world.gather((result, failure))
    if failures := [failure for _, failure in outcomes if failure]:
        text, number = failures[0]
        remedy = "free disk space" if number in (ENOSPC, EDQUOT) else "check the storage"
        problem = f"cannot write checkpoint {folder}: {textwrap.shorten(text, 120)}: {remedy} and start again"
        raise (_Hopeless if number in HOPELESS else AgreedError)(problem)
    return [value for result, _ in outcomes for value in result]


def write_marker(folder: Path, meta: dict, layout: Layout, files: Mapping[str, tuple[int, str]]) -> None:
    """Write meta.json, which marks the checkpoint as complete. files: the size and checksum of each file."""
    sizes, sums = ({name: both[part] for name, both in files.items()} for part in (0, 1))
    whole = {"format_version": FORMAT_VERSION, **meta, "layout": layout.to_json(), "files": sizes, "crc32": sums}
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
            # Later checkpoints exist if they were damaged and the run resumed before them. They do not count.
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


# ---- checksums


def damage(folder: Path, world: World) -> str | None:
    """Verify the checksums of a checkpoint's files. Returns what is wrong, or None. A collective.

    All files are read once, and each rank reads a share of them. An older checkpoint without checksums is assumed to be
    intact.
    """
    stated = world.agree(lambda: read_meta(folder).get("crc32", {}), main_only=True)

    def changed() -> list[str]:
        with storage_errors(folder):
            mine = list(stated)[world.rank :: world.size]  # with the same number of ranks: the file that it wrote
            return [name for name in mine if checksum(folder / name) != stated[name]]

    found = sorted(name for part in world.gather(world.agree(changed)) for name in part)
    return f"{folder / found[0]}: its content has changed (checksum)" if found else None


# ---- reading


def home(config: Config) -> Path:
    """The place of a run's checkpoints. Raises ValueError."""
    return place(config.checkpoint.dir) if config.checkpoint.dir else Path(config.run.dir) / "checkpoints"


def home_of(run: Path) -> Path:
    """The place of the checkpoints of a run folder: the folder itself if it has checkpoints or is not a run."""
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
    """The newest complete checkpoint whose files have the right sizes, or None. Broken ones are skipped with a warning.

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
            log.warning("skipping a damaged checkpoint: %s", error)
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


def tokenizer_path(path: str) -> str:
    """The path of --tokenizer for `Tokenizer.load`: the newest checkpoint if `path` is a run, otherwise `path`.

    Raises ValueError if the run has no complete checkpoint.
    """
    return str(find(path)) if (Path(path) / "checkpoints").is_dir() else path


def read_meta(folder: Path) -> dict:
    """The meta.json of a checkpoint. Raises ValueError if it is missing or damaged, or if a file has the wrong size."""
    marker = folder / "meta.json"
    if not marker.is_file():
        raise ValueError(
            f"{folder}: neither a complete checkpoint (no meta.json) nor an exported folder (no config.json): name a "
            "run, a checkpoint or an exported folder"
        )
    try:
        meta = json.loads(marker.read_text(encoding="utf-8"))
        version = meta["format_version"]
        files = dict(meta["files"])
        stated = meta.pop("own_crc32", None)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{marker}: damaged; use another checkpoint") from None
    if version not in (1, FORMAT_VERSION):
        raise ValueError(f"{marker}: has format version {version}, but this mdmtrain reads 1 and {FORMAT_VERSION}")
    if stated is not None and stated != _own_checksum(meta):
        raise ValueError(f"{marker}: its content has changed (checksum); use another checkpoint")
    if not {"step", "identity", "has_average", "config"} | ({"layout"} if version > 1 else set()) <= meta.keys():
        raise ValueError(f"{marker}: incomplete; use another checkpoint")
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found:,} bytes instead of {size:,}"
            raise ValueError(f"{folder / name}: {state}; the checkpoint is damaged, use another one")
    return _today(meta)


def _today(meta: dict) -> dict:
    """Convert the meta.json of an older version to the present keys. Keys that did not exist get their defaults."""
    config = upgrade(meta["config"])
    identity = dict(meta["identity"])
    if "diffusion" in identity:
        stored = upgrade({"diffusion": identity["diffusion"]})["diffusion"]
        identity["diffusion"] = {**DiffusionConfig().model_dump(mode="json"), **stored}
    if "model" in identity:
        identity["model"] = asdict(ModelShape(**identity["model"]))
    return {**meta, "config": config, "identity": identity}


def load(folder: Path, meta: dict, tensors: Mapping[str, Tensor], world: World) -> None:
    """Read tensors from a checkpoint, by name, into the given tensors, on any number of ranks. A collective.

    meta: the content of its meta.json. Raises AgreedError.
    """

    def read() -> None:
        try:
            if meta["format_version"] == 1:
                version1.load(folder, dict(tensors), world.control)
            else:
                TensorReader(folder, Layout.from_json(meta["layout"])).read(tensors)
        # RuntimeError is not caught, because it means that a rank has died.
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"cannot read checkpoint {folder}: {textwrap.shorten(describe_error(error), 120)}: use another one; "
                "if you remove this one, its run resumes from the one before it"
            ) from None

    world.agree(read)
