"""State to disk and back.

A checkpoint is a folder RUN/checkpoints/step-NNNNNNNN with torch.distributed.checkpoint files and `meta.json`, which is
written last: a folder without it does not count. It holds its tokenizer too, so it can be used by itself. Nothing in it
is keyed by rank, so any number of ranks can read what any other number wrote. Tensors are named `model.*`,
`exp_avg.*`, `exp_avg_sq.*`, `average.*`, `sampler.*` and `adam_step`.
"""

import fcntl
import json
import logging
import os
import shutil
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from mdmtrain.config import Config, validate
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion.sampler import RateSampler
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer
from mdmtrain.optim import WeightAverage
from mdmtrain.parallel.world import AgreedError, World, writing
from mdmtrain.parallel.wrap import build_model

FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.model"
log = logging.getLogger("mdmtrain")


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None, sampler: RateSampler
) -> dict[str, Tensor]:
    """Every tensor that a run needs to go on: the live ones, so that loading into them restores the run."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"{moment}.{name}": optimizer.state[p][moment] for moment in ("exp_avg", "exp_avg_sq")}
    # All parameters have taken the same number of steps; each has its own counter, and the first one is saved.
    tensors["adam_step"] = next(iter(optimizer.state.values()))["step"]
    tensors.update({f"sampler.{name}": tensor for name, tensor in sampler.tensors.items()})
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
    return tensors


def spread_adam_step(optimizer: torch.optim.Optimizer) -> None:
    """Copy the restored step count to every parameter's counter."""
    states = list(optimizer.state.values())
    for state in states[1:]:
        state["step"].copy_(states[0]["step"])


# ---- writing


def save(
    run_dir: Path, step: int, tensors: dict[str, Tensor], meta: dict, tokenizer: Path, keep_last: int, world: World
) -> Path:
    """Write the checkpoint of `step` and remove the oldest beyond `keep_last`. A collective.

    Raises AgreedError on every rank when any rank cannot write; what was complete before stays complete.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    world.agree(lambda: _remove(folder), main_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP's notes on its own internals
            dcp.save(tensors, checkpoint_id=folder, process_group=world.control)
    except (dcp.CheckpointException, RuntimeError, OSError) as error:
        world.agree(lambda: _remove(folder), main_only=True)
        cause = _root_cause(error)
        raise AgreedError(f"cannot write checkpoint {folder}: {cause}: free the disk and start again") from None
    world.agree(lambda: _commit(folder, step, meta, tokenizer, keep_last), main_only=True)
    return folder


def _remove(folder: Path) -> None:
    (folder / "meta.json").unlink(missing_ok=True)  # first, so that what is half removed does not count
    if folder.exists():
        shutil.rmtree(folder)


def _commit(folder: Path, step: int, meta: dict, tokenizer: Path, keep_last: int) -> None:
    with writing(folder):
        shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    write_marker(folder, {"step": step, **meta})
    # Later steps are of a future that was given up (damaged, passed over on resuming): they must not push this one out.
    kept = [f for f in complete_checkpoints(folder.parent.parent) if f <= folder][-keep_last:]
    for old in folder.parent.glob("step-*"):
        if old < folder and old not in kept and not _held(old):  # what a kill left half-written goes too
            _remove(old)


def write_marker(folder: Path, meta: dict) -> None:
    """Write meta.json, which makes a complete checkpoint of what else is in the folder."""
    files = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    whole = {"format_version": FORMAT_VERSION, **meta, "files": files}
    write_atomically(folder / "meta.json", json.dumps(whole, indent=1) + "\n")


def hold(folder: Path) -> IO:
    """Keep a checkpoint from being removed as too old until the returned file is closed, or the process ends."""
    file = open(folder / "meta.json", "rb")  # noqa: SIM115 (open, and locked, for as long as it is needed)
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _held(folder: Path) -> bool:
    try:
        with open(folder / "meta.json", "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:  # never completed
        return False
    return False


def _root_cause(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return textwrap.shorten(str(error), 120)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a crash leaves the old text or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- reading


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run that carry their commit marker, oldest first."""
    return sorted(p.parent for p in (run_dir / "checkpoints").glob("step-*/meta.json"))


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint whose files are all there in full; broken ones are passed over with a warning.

    None where there is none at all. Raises ValueError where all are broken: starting anew would cut the metrics away.
    """
    folders = complete_checkpoints(run_dir)
    for folder in reversed(folders):
        try:
            read_meta(folder)
        except ValueError as error:
            log.warning("passing over a broken checkpoint: %s", error)
        else:
            return folder
    if folders:
        raise ValueError(f"{run_dir}: all its checkpoints are damaged: bring one back, or choose another run.dir")
    return None


def find(path: Path) -> Path:
    """The checkpoint that a user means: itself, or the newest of a run folder. Raises ValueError."""
    if not path.exists():
        raise ValueError(f"{path}: no such run or checkpoint folder: check the path")
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
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
        raise ValueError(f"{folder}: not a complete checkpoint (no meta.json); name a run folder or another checkpoint")
    try:
        meta = json.loads(marker.read_text(encoding="utf-8"))
        version, files = meta["format_version"], dict(meta["files"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{marker}: damaged; use another checkpoint") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{marker}: format version {version}, this mdmtrain reads {FORMAT_VERSION}")
    if not {"step", "identity", "has_average", "config"} <= meta.keys():
        raise ValueError(f"{marker}: incomplete; use another checkpoint")
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found:,} bytes instead of {size:,}"
            raise ValueError(f"{folder / name}: {state}; the checkpoint is damaged, use another one")
    return meta


def load(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Read the named tensors from a checkpoint into the given ones, whatever the number of ranks. A collective."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=folder, process_group=world.control)
    except (dcp.CheckpointException, RuntimeError, OSError) as error:
        raise AgreedError(
            f"cannot read checkpoint {folder}: {_root_cause(error)}: "
            "use another one; without this one, its run goes on from the one before"
        ) from None


def chosen_weights(folder: Path, meta: dict, weights: str | None) -> str:
    """What the names of the wanted tensors begin with. weights: "raw", "average", or None for the average if any."""
    if weights == "average" and not meta["has_average"]:
        raise AgreedError(f"{folder}: holds no weight average (optim.ema_decay was null): leave out --weights")
    return "average" if weights != "raw" and meta["has_average"] else "model"


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model, ready to use, with what is needed to talk to it."""

    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    config: Config
    meta: dict


def load_model(path: Path, weights: str | None, world: World) -> LoadedModel:
    """Build and load the model of a run or checkpoint, sharded over the present ranks. A collective.

    weights: "raw", "average", or None for the average where there is one. Raises AgreedError.
    """
    folder = world.agree(lambda: find(path), main_only=True)
    meta = world.agree(lambda: read_meta(folder))
    source = chosen_weights(folder, meta, weights)
    config = world.agree(lambda: validate(meta["config"], str(folder / "meta.json")))
    tokenizer = world.agree(lambda: Tokenizer.load(folder / TOKENIZER_FILE))
    if tokenizer.sha256 != meta["identity"]["tokenizer"]:
        raise AgreedError(f"{folder / TOKENIZER_FILE}: not the tokenizer it was trained with; use another checkpoint")
    elsewhere = {"replicate": 1, "shard": None, "compile": False, "offload": False, "fused_head": False}
    here = config.parallel.model_copy(update=elsewhere)  # any number of ranks, any torch
    model = build_model(ModelShape(**meta["identity"]["model"]), here, world)
    load(folder, {f"{source}.{name}": p.detach() for name, p in model.named_parameters()}, world)
    model.eval()
    return LoadedModel(folder, model, tokenizer, config.model_copy(update={"parallel": here}), meta)
