"""Load a model for use, from a run, one of its checkpoints, or an exported folder."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mdmtrain.checkpoint import formats, store
from mdmtrain.checkpoint.weights import Weights, chosen_weights, open_checkpoint, open_folder, read_json
from mdmtrain.config import Config, upgrade, validate
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.files import on_disk
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer
from mdmtrain.optim import local
from mdmtrain.parallel.parallelize import build_model
from mdmtrain.parallel.world import AgreedError, World


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and configuration. Its data paths are the present ones; see `find_data`."""

    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    config: Config
    meta: dict  # identity; for a checkpoint all of its meta.json


def load_model(path: str | Path, weights: str | None, world: World) -> LoadedModel:
    """Build and load the model of a run, checkpoint or exported folder, sharded over all ranks. A collective.

    weights: "raw", "average", or None (the average if there is one). Raises AgreedError.
    """
    if world.agree(lambda: is_exported(Path(path)), main_only=True):
        return _load_exported(Path(path), weights, world)
    folder = world.agree(lambda: store.find(path), main_only=True)
    meta = world.agree(lambda: store.read_meta(folder), main_only=True)
    source = chosen_weights(folder, meta, weights)
    config = world.agree(lambda: validate(meta["config"], str(folder / "meta.json")))
    file = folder / store.TOKENIZER_FILE
    tokenizer = world.agree(lambda: Tokenizer(file.read_bytes(), str(file)))
    if tokenizer.sha256 != meta["identity"]["tokenizer"]:
        raise AgreedError(f"{file}: is not the tokenizer that the model was trained with; use another checkpoint")
    config = _usable_here(config, [Path(path), folder], meta.get("working_directory"))
    model = build_model(ModelShape(**meta["identity"]["model"]), config.parallel, world)
    store.load(folder, meta, {f"{source}.{name}": p.detach() for name, p in model.named_parameters()}, world)
    model.eval()
    return LoadedModel(folder, model, tokenizer, config, meta)


def _load_exported(folder: Path, weights: str | None, world: World) -> LoadedModel:
    opened = world.agree(lambda: open_any(folder, weights))
    theirs = world.agree(lambda: formats.shape_from(exported_kind(folder), read_json(folder / "config.json"))[0])
    if theirs.causal:  # open_folder would make it bidirectional, to start training a masked diffusion model
        raise AgreedError(
            f"{folder}: is a causal model, which cannot fill masks: start a masked diffusion model from it "
            "(tools/convert_ckpt.py --from), or evaluate the run that it was exported from"
        )
    config = world.agree(lambda: validate(upgrade(opened.facts["config"]), str(folder)))
    config = _usable_here(config, [folder], _recorded_directory(folder))
    tokenizer = world.agree(lambda: Tokenizer(opened.tokenizer, str(folder)))
    model = build_model(opened.shape, config.parallel, world)
    for name, parameter in model.named_parameters():
        copy_into(parameter.detach(), world.agree(partial(opened.read, name)))
    model.eval()
    identity = opened.facts.get("identity", {}) | {"model": asdict(opened.shape), "tokenizer": tokenizer.sha256}
    return LoadedModel(folder, model, tokenizer, config, {**opened.facts, "identity": identity})


def copy_into(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which must be the same on every rank, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        whole = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    local(parameter).copy_(local(whole))


# ---- kinds of folders


def is_exported(path: Path) -> bool:
    """Whether a folder has safetensors with a config.json, written by us or by others. Runs have a config.yaml."""
    return (path / "config.json").is_file()


def exported_kind(folder: Path) -> str:
    """The format of an exported folder, a key of formats.MODEL_TYPES. Raises ValueError for an unknown one."""
    kind = read_json(folder / "config.json").get("model_type")
    kinds = {theirs: ours for ours, theirs in formats.MODEL_TYPES.items()}
    if kind not in kinds:
        raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} is not supported: use {', '.join(kinds)}")
    return kinds[kind]


def open_any(source: Path, weights: str | None) -> Weights:
    """Open a run, a checkpoint or an exported folder to read its tensors one by one. Raises ValueError."""
    if not is_exported(source):
        return open_checkpoint(source, weights)
    if weights is not None:
        raise ValueError(f"{source} is an exported folder, which has only one set of weights: leave out --weights")
    return open_folder(source, exported_kind(source))


# ---- data paths


def _usable_here(config: Config, places: list[Path], recorded: str | None) -> Config:
    """A copy of the configuration for any number of ranks and any torch version, with data paths as found now.

    places, recorded: see `find_data`.
    """
    elsewhere = {"replicate": 1, "shard": None, "compile": False, "offload": False, "fused_head": False}
    elsewhere |= {"float8": False}  # used only in training
    sources = tuple(
        source.model_copy(update={"path": find_data(source.path, places, config.run.dir, recorded)})
        for source in config.data.sources
    )
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=elsewhere),
            "data": config.data.model_copy(update={"sources": sources}),
        }
    )


def find_data(path: str, places: list[Path], run_dir: str, recorded: str | None) -> str:
    """The present location of a run's data folder `path`, from any working directory. `path` itself if it is not found.

    A relative path is relative to the directory in which training was started. That directory is derived from a place
    (of the run, or of something in it) that ends in run.dir. Else it is the recorded directory, or the present one.
    """
    if Path(path).is_absolute():
        return path
    bases = [store.started_in(place, run_dir) for place in places if on_disk(place)]
    bases += [Path(recorded)] if recorded else []
    return next((str(base / path) for base in [*bases, Path()] if base is not None and (base / path).is_dir()), path)


def _recorded_directory(folder: Path) -> str | None:
    """The working directory of the run that an export is part of (RUN/exports/step-NNNNNNNN), or None."""
    environment = folder.absolute().parent.parent / "environment.json"
    try:
        return str(json.loads(environment.read_text(encoding="utf-8"))["working_directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
