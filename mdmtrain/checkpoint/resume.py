"""Choose the checkpoint that a run resumes from, and check which settings differ from it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mdmtrain.checkpoint import run_folder, store
from mdmtrain.config import Config, validate
from mdmtrain.data.order import Cursor
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.model.presets import ModelShape
from mdmtrain.optim import learning_rate
from mdmtrain.parallel.world import World

log = logging.getLogger("mdmtrain")
CHANGEABLE = ("global_batch", "data", "sequence_length", "phases")  # checkpoint.allow_changed
REORDERING = ("data", "sequence_length")  # changes after which sample numbers refer to other samples
MOST_SHOWN = 200  # characters of a setting's value that are shown


def run_identity(config: Config, shape: ModelShape, tokenizer: Tokenizer, fingerprints: list[str]) -> dict:
    """The settings that a resumed run must share with its checkpoint."""
    data = config.data
    order = [["shuffle_shards", data.shuffle_shards]] if data.shuffle_shards is not None else []
    return {
        "model": asdict(shape),
        "tokenizer": tokenizer.sha256,
        "data": [*map(list, zip(fingerprints, data.weights, strict=True)), *order],
        "phases": [[phase.from_step, list(phase.weights)] for phase in data.phases] or None,
        "sequence_length": config.data.sequence_length,
        "document_mask": config.data.document_mask,
        "random_length_fraction": config.data.random_length_fraction,
        "global_batch": config.run.global_batch,
        "seed": config.run.seed,
        "diffusion": config.diffusion.model_dump(mode="json"),
    }


def choose_checkpoint(config: Config, home: Path, identity: dict, world: World) -> Path | None:
    """The checkpoint to resume from, with verified checksums, or None for a new run. A collective.

    It is the newest that is not damaged, or the one of checkpoint.resume. Raises AgreedError if it belongs to a
    different run, or if all checkpoints are damaged.
    """
    damaged: list[Path] = []
    while True:
        folder = world.agree(lambda: find_resume(config, home, identity, damaged), main_only=True)
        problem = store.damage(folder, world) if folder is not None else None
        if folder is None or problem is None:
            return folder
        if world.is_main:
            log.warning("skipping a damaged checkpoint: %s", problem)
        damaged.append(folder)


def find_resume(config: Config, home: Path, identity: dict, damaged: list[Path] | None = None) -> Path | None:
    """The checkpoint that checkpoint.resume names, or the newest that is not in `damaged`, or None.

    Raises ValueError if it belongs to a different run, if the named one does not exist, or if the run has records but
    no checkpoints any more.
    """
    back = step_to_go_back_to(config)
    folder = store.newest(home, damaged or ()) if back is None else named(home, back, damaged or ())
    if folder is None:
        if before := store.complete_checkpoints(Path(config.run.dir)):
            raise ValueError(
                f"the checkpoints of {config.run.dir} are in {before[0].parent}, and {home} has none: copy them "
                "there, change checkpoint.dir back, or choose another run.dir"
            )
        lost = run_folder.lost_checkpoint(Path(config.run.dir))
        metrics = Path(config.run.dir) / "metrics.jsonl"
        if lost is not None and metrics.is_file() and metrics.stat().st_size > 0:
            raise ValueError(
                f"{config.run.dir} has metrics, but its checkpoints are missing (the last one was of step {lost}): "
                f"restore one, choose another run.dir, or move {metrics} away to start again from step 0"
            )
        return None
    if config.checkpoint.resume == "never":
        where = config.checkpoint.dir or config.run.dir
        raise ValueError(f"{where} already contains a run, and checkpoint.resume=never: choose another run.dir")
    meta = store.read_meta(folder)
    for name, value in identity.items():
        saved = meta["identity"].get(name)
        if saved != value and name not in config.checkpoint.allow_changed:
            instead = f", or allow the change with checkpoint.allow_changed='[{name}]'" if name in CHANGEABLE else ""
            raise ValueError(
                f"cannot resume {folder}: its {name} is {brief(saved, value)}: "
                f"use the settings it was trained with, or another run.dir{instead}"
            )
    began, begin = (
        [phase for phase in phases or [] if phase[0] < meta["step"]]
        for phases in (meta["identity"].get("phases"), identity.get("phases"))
    )
    if began != begin:
        raise ValueError(
            f"cannot resume {folder}: data.phases that begin before its step {meta['step']} were {began}, not {begin}: "
            "keep these phases as they were; only phases from this step on can be changed"
        )
    if meta["has_average"] != (config.optim.ema_decay is not None):
        raise ValueError(
            f"cannot resume {folder}: optim.ema_decay was switched on or off; use the setting it was trained with"
        )
    optimizer = meta["config"]["optim"].get("name", "adamw")  # older checkpoints have no name: only AdamW existed
    if optimizer != config.optim.name:
        raise ValueError(
            f"cannot resume {folder}: it was trained with optim.name={optimizer} and has no state of "
            f"{config.optim.name}: set optim.name={optimizer}, or start a new run.dir with "
            f"checkpoint.init_from={folder}"
        )
    return folder


def step_to_go_back_to(config: Config) -> int | None:
    """The step of checkpoint.resume, or None if the last start of the run has already resumed from it.

    If the same command is given again (by the user, torchrun or a scheduler), it resumes from the newest checkpoint.
    """
    wanted = config.checkpoint.resume
    before = run_folder.last_start(Path(config.run.dir)).get("config", {}).get("checkpoint", {}).get("resume")
    return wanted if isinstance(wanted, int) and wanted != before else None


def named(home: Path, step: int, damaged: Sequence[Path]) -> Path:
    """The checkpoint of a step. Raises ValueError if it does not exist or is in `damaged`."""
    folders = {store.step_of(folder): folder for folder in store.complete_checkpoints(home)}
    if step not in folders or folders[step] in damaged:
        state = "is damaged" if step in folders else "does not exist"
        steps = ", ".join(str(n) for n, folder in folders.items() if folder not in damaged)
        raise ValueError(
            f"checkpoint.resume={step}: the checkpoint of this step {state} in {home}; there are: {steps or 'none'}"
        )
    return folders[step]


def leave_behind(config: Config, home: Path, step: int) -> list[str]:
    """Rename the exports of steps after `step`. With checkpoint.resume=STEP, also rename the newer checkpoints.

    Otherwise they would be used as the newest of the resumed run. Returns a sentence that names them, or nothing.
    """
    moved = run_folder.abandon(Path(config.run.dir) / "exports", step)
    if step_to_go_back_to(config) is not None:
        moved += run_folder.abandon(home, step)
    if not moved:
        return []
    names = ", ".join(map(str, moved))
    return [f"renamed, because they are from after step {step} (remove what you do not need): {names}"]


def checkpoint_config(meta: dict) -> Config:
    """The configuration of a checkpoint. Raises ValueError if an older version wrote it and it is not valid now."""
    return validate(meta["config"], "the checkpoint's configuration")


def changed_settings(before: Config, after: Config) -> dict[str, str]:
    """Every setting that differs: its key, and "key old -> new"."""
    old, new = (flat(one.model_dump(mode="json")) for one in (before, after))
    return {key: f"{key} {shown(old[key])} -> {shown(value)}" for key, value in new.items() if old[key] != value}


def differences(meta: dict, config: Config) -> list[str]:
    """Every setting that differs from the checkpoint's, as "key old -> new", and the learning rate if it differs."""
    try:
        before = checkpoint_config(meta)
    except ValueError as error:  # it does not prevent resuming
        return [f"cannot compare with the configuration of the checkpoint ({error})"]
    found = list(changed_settings(before, config).values())
    step = meta["step"]
    was, becomes = (learning_rate(one.optim, step, one.run.steps) for one in (before, config))
    if was != becomes:
        found.append(f"learning rate of step {step + 1} {was:.4g} -> {becomes:.4g}")
    return found


def describe_resume(folder: Path, meta: dict, identity: dict, config: Config) -> str:
    """One line: the checkpoint that a run resumes from, and all settings that differ from it."""
    parts = [f"resumed from {folder}", *changes(meta, identity)]
    changed = differences(meta, config)
    if changed:
        parts.append(f"changed: {', '.join(changed)}")
    return "; ".join(parts)


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """The leaves of a tree by their dotted paths."""
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def shown(value: object) -> str:
    """A value as JSON, shortened if it is long."""
    text = json.dumps(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + " ..."


def changes(meta: dict, identity: dict) -> list[str]:
    """The settings of checkpoint.allow_changed that differ from the checkpoint, as phrases."""
    pairs = {name: (meta["identity"].get(name), identity.get(name)) for name in CHANGEABLE}
    return [f"its {name} was {brief(saved, wanted)}" for name, (saved, wanted) in pairs.items() if saved != wanted]


def continued(meta: dict, identity: dict) -> Cursor:
    """The cursor of a resumed run: the position from which its steps have the present number of samples and tokens.

    Without a change, it is the cursor of the checkpoint (older versions: step 0). After a change of the batch, it is
    the position of the checkpoint, so that no sample is skipped or read twice. After a change of the data or of
    sequence_length, sample numbers refer to other samples, so the order starts at its beginning.
    """
    saved = meta["identity"]
    cursor = Cursor(**meta.get("cursor", {}))
    cursor = replace(cursor, phases=tuple(cursor.phases))
    if not changes(meta, identity):
        return cursor
    config = validate(meta["config"], "the checkpoint's configuration")
    here = cursor.at(meta["step"], config.slots_per_step, config.run.global_batch * config.data.sequence_length)
    began = [phase.from_step for phase in config.data.phases if phase.from_step < meta["step"]][len(cursor.phases) :]
    here = replace(here, phases=(*cursor.phases, *(cursor.at(step, config.slots_per_step, 0).sample for step in began)))
    if any(saved[name] != identity[name] for name in REORDERING):
        return replace(here, sample=0, phases=(0,) * len(here.phases))
    return here


def brief(saved, wanted) -> str:
    """The difference between two values, as 'X, not Y'. Of dictionaries only the entries that differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [key for key in wanted if saved.get(key) != wanted[key]]
        saved = {key: saved.get(key) for key in keys}
        wanted = {key: wanted[key] for key in keys}
    return f"{str(saved)[:200]}, not {str(wanted)[:200]}"
