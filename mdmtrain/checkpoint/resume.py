"""What a run goes on from: a checkpoint of its own, or another run's weights."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

from mdmtrain.checkpoint import store
from mdmtrain.config import Config, validate
from mdmtrain.data.order import Cursor
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.model.presets import ModelShape
from mdmtrain.parallel.world import AgreedError, World

log = logging.getLogger("mdmtrain")
CHANGEABLE = ("global_batch", "data", "sequence_length")  # checkpoint.allow_changed
REORDERING = ("data", "sequence_length")  # sample numbers then stand for other samples


def run_identity(config: Config, shape: ModelShape, tokenizer: Tokenizer, fingerprints: list[str]) -> dict:
    """What a checkpoint and the run that continues it must have in common."""
    weights = [source.weight for source in config.data.sources]
    return {
        "model": asdict(shape),
        "tokenizer": tokenizer.sha256,
        "data": [list(pair) for pair in zip(fingerprints, weights, strict=True)],
        "sequence_length": config.data.sequence_length,
        "document_mask": config.data.document_mask,
        "random_length_fraction": config.data.random_length_fraction,
        "global_batch": config.run.global_batch,
        "seed": config.run.seed,
        "diffusion": config.diffusion.model_dump(mode="json"),
    }


def choose_checkpoint(config: Config, home: Path, identity: dict, world: World) -> Path | None:
    """The checkpoint to go on from, None for a new run: the newest whose content is what was written. A collective.

    Raises AgreedError where it belongs to a different run, and where all are damaged.
    """
    damaged: list[Path] = []
    while True:
        folder = world.agree(lambda: find_resume(config, home, identity, damaged), main_only=True)
        problem = store.damage(folder, world) if folder is not None else None
        if problem is None:
            return folder
        if world.is_main:
            log.warning("passing over a damaged checkpoint: %s", problem)
        damaged.append(folder)


def find_resume(config: Config, home: Path, identity: dict, damaged: list[Path] | None = None) -> Path | None:
    """The newest checkpoint but for damaged ones, or None. Raises ValueError where it belongs to a different run."""
    folder = store.newest(home, damaged or ())
    if folder is None:
        if before := store.complete_checkpoints(Path(config.run.dir)):
            raise ValueError(
                f"{config.run.dir} kept its checkpoints in {before[0].parent} and {home} has none: copy them "
                "there, change checkpoint.dir back, or choose another run.dir"
            )
        return None
    if config.checkpoint.resume == "never":
        where = config.checkpoint.dir or config.run.dir
        raise ValueError(f"{where} holds a run already and checkpoint.resume=never: choose another run.dir")
    meta = store.read_meta(folder)
    for name, value in identity.items():
        saved = meta["identity"].get(name)
        if saved != value and name not in config.checkpoint.allow_changed:
            instead = f", or allow the change with checkpoint.allow_changed='[{name}]'" if name in CHANGEABLE else ""
            raise ValueError(
                f"cannot resume {folder}: its {name} is {brief(saved, value)}: "
                f"use the settings it was trained with, or another run.dir{instead}"
            )
    if meta["has_average"] != (config.optim.ema_decay is not None):
        raise ValueError(
            f"cannot resume {folder}: optim.ema_decay was switched on or off; use the setting it was trained with"
        )
    optimizer = meta["config"]["optim"].get("name", "adamw")  # checkpoints from before Muon do not say
    if optimizer != config.optim.name:
        raise ValueError(
            f"cannot resume {folder}: it was trained with optim.name={optimizer}, not {config.optim.name}, whose state "
            f"it does not hold: set optim.name={optimizer}, or start a new run.dir with checkpoint.init_from={folder}"
        )
    return folder


def changes(meta: dict, identity: dict) -> list[str]:
    """What is another than in the checkpoint, a phrase each."""
    saved = meta["identity"]
    return [f"its {n} was {brief(saved[n], identity[n])}" for n in CHANGEABLE if saved[n] != identity[n]]


def continued(meta: dict, identity: dict) -> Cursor:
    """From where on every step takes as many samples and tokens as this run's steps do.

    The cursor that the checkpoint brings (from step 0 on, in one of an older version). After a change of the batch: the
    checkpoint's own place, so that no sample is skipped and none comes twice. After a change of the data or of the
    length of rows, whose sample numbers stand for other samples, the order begins at its beginning.
    """
    saved, cursor = meta["identity"], Cursor(**meta.get("cursor", {}))
    if not changes(meta, identity):
        return cursor
    config = validate(meta["config"], "the checkpoint's configuration")
    here = cursor.at(meta["step"], config.slots_per_step, config.run.global_batch * config.data.sequence_length)
    return replace(here, sample=0) if any(saved[name] != identity[name] for name in REORDERING) else here


def brief(saved, wanted) -> str:
    """The difference between two values, named as 'X, not Y'."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [key for key in wanted if saved.get(key) != wanted[key]]
        saved, wanted = {key: saved.get(key) for key in keys}, {key: wanted[key] for key in keys}
    return f"{str(saved)[:200]}, not {str(wanted)[:200]}"


def load_initial_weights(config: Config, identity: dict, model, world: World) -> Path:
    """Fill the model with another run's weights (its average, where it kept one). Returns their folder."""
    folder = world.agree(lambda: store.find(config.checkpoint.init_from), main_only=True)
    meta = world.agree(lambda: store.read_meta(folder), main_only=True)
    for name in ("model", "tokenizer"):
        if meta["identity"][name] != identity[name]:
            raise AgreedError(
                f"checkpoint.init_from={folder}: its {name} is {brief(meta['identity'][name], identity[name])}: "
                "start from weights of the same model and tokenizer"
            )
    if problem := store.damage(folder, world):
        raise AgreedError(f"checkpoint.init_from={folder}: {problem}: use another checkpoint")
    source = "average" if meta["has_average"] else "model"
    store.load(folder, {f"{source}.{name}": p.detach() for name, p in model.named_parameters()}, world)
    return folder
