"""Export weights to a folder for other programs, and import them into a checkpoint that training can start from.

An exported folder has safetensors, config.json, the tokenizer, a model card and `mdmtrain.json`, with facts about the
training and a SHA-256 of every tensor. A folder gets its name only when it is complete. Tensors are processed one by
one.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mdmtrain import __version__
from mdmtrain.checkpoint import formats, store
from mdmtrain.checkpoint.layout import divide
from mdmtrain.checkpoint.storage import storage_of
from mdmtrain.checkpoint.tensor_files import file_blocks, tensor_bytes, write_file
from mdmtrain.checkpoint.weights import FACTS_FILE, INDEX_FILE, Weights, open_checkpoint
from mdmtrain.config import Config, DiffusionConfig
from mdmtrain.data.hub import hub_files
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.staging import staging
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.files import writing
from mdmtrain.parallel.world import describe_error

log = logging.getLogger("mdmtrain")


def cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """The tensor in another dtype. Raises ValueError if float16 cannot represent a value."""
    tensor = tensor.to(getattr(torch, dtype))
    if dtype == "float16" and not tensor.isfinite().all():
        raise ValueError(f"{name} has values that float16 cannot represent: use --dtype bfloat16 or float32")
    return tensor


def export(
    weights: Weights,
    target: str,
    out: Path,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    check: Callable[[Path], None] = lambda folder: None,
    advance: Callable[[int], None] = lambda values: None,
) -> None:
    """Write a folder in the format `target`. Raises ValueError or OSError, and then leaves no partial folder.

    check: is called with the complete folder before it is renamed to `out`. advance: is called with the number of
    values that were written.
    """
    formats.check_expressible(weights.shape, target)
    tokenizer = Tokenizer(weights.tokenizer, str(weights.place))
    length = weights.facts["config"]["data"]["sequence_length"]
    config = formats.config_for(target, weights.shape, tokenizer, length, dtype)
    identity = {"model": asdict(weights.shape), "tokenizer": tokenizer.sha256}
    with _writing_new(out) as folder:
        facts = {**weights.facts, "identity": weights.facts.get("identity", {}) | identity, "mdmtrain": __version__}
        if target in formats.TRANSFORMERS:
            facts["minimum_transformers"] = formats.MINIMUM_TRANSFORMERS
        facts["sha256"] = _write_tensors(weights, target, folder, dtype, shard_bytes, advance)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        files = {"config.json": config, "generation_config.json": ids, FACTS_FILE: facts}
        contents = {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in files.items()}
        contents |= {**hub_files(weights.tokenizer), "README.md": _card(weights, target, dtype, out.name).encode()}
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        check(folder)


@contextmanager
def _writing_new(out: Path) -> Iterator[Path]:
    """A staging folder, which is renamed to `out` at the end. Raises ValueError if `out` exists."""
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    with writing(out), staging(out) as folder:
        yield folder


def _write_tensors(weights: Weights, target: str, folder: Path, dtype: str, shard_bytes: int, advance) -> dict:
    """Write all tensors into files of at most `shard_bytes` (or one tensor). Returns {name in `target`: SHA-256}."""
    stored = getattr(torch, dtype)
    shards: list[dict[str, Tensor]] = []
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    for name, shape in formats.tensor_shapes(weights.shape).items():
        promised = torch.empty(shape, dtype=stored, device="meta")
        if not shards or sum(tensor.nbytes for tensor in shards[-1].values()) + promised.nbytes > shard_bytes:
            shards.append({})
        shards[-1][formats.name_in(target, name)] = promised
    ours = {formats.name_in(target, name): name for name in formats.tensor_shapes(weights.shape)}

    def read(theirs: str) -> Tensor:
        tensor = cast(weights.read(ours[theirs]), dtype, ours[theirs])
        hashes[theirs] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        advance(tensor.numel())
        return tensor

    for number, tensors in enumerate(shards, start=1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"model{of}.safetensors"
        header = {"__metadata__": {"format": "pt"}, **divide(tensors, (), 1, 1).header(0)}
        with open(file, "wb") as stream:
            stream.writelines(file_blocks(header, read))
        places |= dict.fromkeys(tensors, file.name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensors in shards for tensor in tensors.values())},
            "weight_map": places,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return hashes


def _card(weights: Weights, target: str, dtype: str, name: str) -> str:
    """The README.md of an exported folder: what the model is, how to load it, and facts about its training."""
    facts = weights.facts
    shape = weights.shape
    config = facts["config"]
    arm = config["diffusion"]
    usual = DiffusionConfig().model_dump(mode="json")
    hub = (
        f"`AutoModelForCausalLM` of transformers {formats.MINIMUM_TRANSFORMERS} or newer loads it. Older versions load "
        "it too, but with causal attention and without a warning: all results are then wrong. Do not use `generate()`, "
        "which generates from left to right: a masked diffusion model fills mask tokens instead."
    )
    loading = {
        "native": "It uses mdmtrain's own names; `tools/convert_ckpt.py` of mdmtrain reads it (`--from native`).",
        **dict.fromkeys(formats.TRANSFORMERS, hub),
        "llada": "It uses the names and the configuration of LLaDA's own code (LLaDAModelLM), which is not included.",
    }
    rows = {
        "attention": "causal (an autoregressive model)" if shape.causal else "bidirectional",
        "parameters": f"{shape.parameters():,} ({dtype}, {facts.get('weights', 'raw')} weights)",
        "steps": facts.get("step") or None,
        "tokens": facts.get("tokens"),
        "sequence length": config["data"]["sequence_length"],
        "objective": ", ".join(f"{k} {v}" for k, v in arm.items() if v != usual[k] or k == "objective"),
        "data (fingerprint, weight)": facts.get("identity", {}).get("data"),
        "git revision": facts.get("git_revision") or "not recorded",
        "made from": facts.get("imported_from"),
    }
    for e in facts.get("evaluation", []):
        rows[f"NELBO, {e['split']}"] = f"{e['nelbo']:.4f} +- {e['nelbo_se']:.4f} nats/token"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return f"""---
library_name: {"transformers" if target in formats.TRANSFORMERS else "mdmtrain"}
tags: [masked-diffusion]
---
# {name}

A language model trained with mdmtrain {__version__}. {loading[target]}

| | |
|---|---|
{table}

The tokenizer does not add bos or eos. In training, each document began with bos and ended with eos. Text that looks
like a reserved token (`<mask>`) is encoded as text, unless the tokenizer is loaded with `split_special_tokens=False`.
"""


# ---- importing


def import_checkpoint(weights: Weights, out: Path, advance: Callable[[int], None] = lambda values: None) -> None:
    """Write a checkpoint that has only parameters, in float32, for `checkpoint.init_from`. Raises as `export` does.

    The checkpoint is at step 0 and has no optimizer state and no data: a run can start from it, but not resume.
    """

    def read(name: str) -> Tensor:
        tensor = weights.read(name.removeprefix("model.")).float()
        advance(tensor.numel())
        return tensor

    shapes = formats.tensor_shapes(weights.shape)
    layout = divide({f"model.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}, (), 1, 1)
    contents = {layout.file_name(0): file_blocks(layout.header(0), read), store.TOKENIZER_FILE: [weights.tokenizer]}
    with _writing_new(out) as folder:
        files = {name: write_file(folder / name, blocks) for name, blocks in contents.items()}
        identity = {"model": asdict(weights.shape), "tokenizer": hashlib.sha256(weights.tokenizer).hexdigest()}
        origin = {key: weights.facts[key] for key in ("step", "tokens", "git_revision") if key in weights.facts}
        origin |= {"imported_from": str(weights.place)}
        meta = {"step": 0, "identity": identity, "has_average": False, "config": weights.facts["config"]}
        store.write_marker(folder, {**meta, "origin": origin}, layout, files)


# ---- exports during a run


class SideExports:
    """Exports checkpoints of a running run to RUN/exports/step-NNNNNNNN, each in its own process. Works on rank 0.

    The folders are for transformers: qwen3 if the model has qk_norm, otherwise llama. A failure is only a warning.
    """

    def __init__(self, config: Config, resumed: Path | None, is_main: bool):
        """resumed: the checkpoint that the run resumes from. Missing exports up to it are started again."""
        self._every = config.checkpoint.export_every if is_main else None
        self._last = config.run.steps
        self._out = Path(config.run.dir) / "exports"
        self._running: list[tuple[Path, Future, IO]] = []
        if resumed is None or not is_main:
            return
        for folder in store.complete_checkpoints(resumed.parent):
            if store.step_of(folder) <= store.step_of(resumed) and not (self._out / folder.name).exists():
                self.start(folder)

    def start(self, checkpoint: Path) -> None:
        """Start the export of a committed checkpoint, if checkpoint.export_every asks for it. Does not wait."""
        step = store.step_of(checkpoint)
        out = self._out / checkpoint.name
        if self._every is None or (step % self._every and step != self._last):
            return
        self._report([entry for entry in self._running if entry[1].done()])
        shutil.rmtree(out, ignore_errors=True)  # an old export of this step, if the run resumed from an earlier step
        try:
            held = storage_of(checkpoint).hold(checkpoint)  # held from now on, because the process starts later
            pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=follow_parent)
            self._running.append((checkpoint, pool.submit(_export_in_process, checkpoint, out), held))
            pool.shutdown(wait=False)
        except OSError as error:
            log.warning("export of %s could not start, training continues: %s", checkpoint, describe_error(error))

    def finish(self) -> None:
        """Wait for the exports in progress."""
        self._report(list(self._running))

    def _report(self, entries: list[tuple[Path, Future, IO]]) -> None:
        for checkpoint, future, held in entries:
            if error := future.exception():
                log.warning("export of %s failed, training continues: %s", checkpoint, describe_error(error))
            else:
                log.info("exported %s", self._out / checkpoint.name)
            held.close()
            self._running.remove((checkpoint, future, held))


def _export_in_process(checkpoint: Path, out: Path) -> None:
    os.nice(10)
    torch.set_num_threads(1)
    weights = open_checkpoint(checkpoint)
    export(weights, "qwen3" if weights.shape.qk_norm else "llama", out)
