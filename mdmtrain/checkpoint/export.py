"""Weights into a folder that others load, and into a checkpoint that training starts from; tensor by tensor.

An exported folder holds safetensors, config.json, the tokenizer, a model card and `mdmtrain.json`: the facts of the
training and a SHA-256 of every tensor. A folder appears under its name when it is complete, never before.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mdmtrain import __version__
from mdmtrain.checkpoint import formats, storage, store
from mdmtrain.checkpoint.weights import DTYPES, FACTS_FILE, INDEX_FILE, Weights, open_checkpoint, tensor_bytes
from mdmtrain.config import Config, DiffusionConfig
from mdmtrain.data.hub import hub_files
from mdmtrain.data.processes import follow_parent
from mdmtrain.data.staging import staging
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.files import writing
from mdmtrain.parallel.world import describe_error

log = logging.getLogger("mdmtrain")


def cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """The tensor in another dtype. Raises ValueError where float16 cannot hold a value."""
    tensor = tensor.to(getattr(torch, dtype))
    if dtype == "float16" and not tensor.isfinite().all():
        raise ValueError(f"{name} has values that float16 cannot hold: use --dtype bfloat16 or float32")
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
    """Write a folder that `target`'s programs load. Raises ValueError, OSError; then nothing is left behind.

    check: called with the finished folder before it gets its name. advance: called with the number of values written.
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
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    with writing(out), staging(out) as folder:
        yield folder


def _write_tensors(weights: Weights, target: str, folder: Path, dtype: str, shard_bytes: int, advance) -> dict:
    """Write all tensors into files of at most `shard_bytes` (or one tensor); their SHA-256 by the target's names.

    The format (length of the header, header in JSON, data) is written here: the library's writer wants whole files.
    """
    width, shards, hashes, places = getattr(torch, dtype).itemsize, [], {}, {}
    for name, shape in formats.tensor_shapes(weights.shape).items():
        size = torch.Size(shape).numel() * width
        if not shards or sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size

    def parts(names: dict[str, int], file_name: str) -> Iterator[bytes]:
        shapes, offset, header = formats.tensor_shapes(weights.shape), 0, {"__metadata__": {"format": "pt"}}
        for name, size in names.items():
            entry = {"dtype": DTYPES[dtype], "shape": shapes[name], "data_offsets": [offset, offset + size]}
            header[formats.name_in(target, name)] = entry
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for name, size in names.items():
            content = tensor_bytes(cast(weights.read(name), dtype, name))
            assert len(content) == size, name
            theirs = formats.name_in(target, name)
            hashes[theirs], places[theirs] = hashlib.sha256(content).hexdigest(), file_name
            yield content
            del content  # before the next one comes
            advance(size // width)

    for number, names in enumerate(shards, start=1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        with open(folder / f"model{of}.safetensors", "wb") as file:
            file.writelines(parts(names, f"model{of}.safetensors"))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sum(names.values()) for names in shards)}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return hashes


def _card(weights: Weights, target: str, dtype: str, name: str) -> str:
    """The folder's README.md: what the model is, how to load it, and the facts of its training."""
    facts, config, shape = weights.facts, weights.facts["config"], weights.shape
    arm, usual = config["diffusion"], DiffusionConfig().model_dump(mode="json")
    hub = (
        f"`AutoModelForCausalLM` of transformers {formats.MINIMUM_TRANSFORMERS} or newer loads it. Older versions load "
        "it too, but with causal attention and without a warning: all results are then wrong. `generate()` writes from "
        "left to right, which is not how a masked diffusion model writes: fill mask tokens instead."
    )
    loading = {
        "native": "Our own names: `tools/convert_ckpt.py` of mdmtrain reads it (`--from native`).",
        **dict.fromkeys(formats.TRANSFORMERS, hub),
        "llada": "Names and configuration are those of LLaDA's own code (LLaDAModelLM), which is not included.",
    }
    rows = {
        "attention": "causal (an autoregressive reference)" if shape.causal else "bidirectional",
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

The tokenizer adds no bos or eos; in training a document began with the one and ended with the other. Text that spells a
reserved token (`<mask>`) stays text unless the tokenizer is loaded with `split_special_tokens=False`.
"""


# ---- the way back


def import_checkpoint(weights: Weights, out: Path, advance: Callable[[int], None] = lambda values: None) -> None:
    """Write a checkpoint of parameters alone, in float32, for `checkpoint.init_from`. Raises as `export` does.

    Such a checkpoint is at step 0 and knows no data: no run can resume from it, only start.
    """

    def read(name: str) -> Tensor:
        tensor = weights.read(name.removeprefix("model.")).float()
        assert tensor.shape == promised[name].shape, name
        advance(tensor.numel())
        return tensor

    shapes = formats.tensor_shapes(weights.shape)
    with _writing_new(out) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP's notes on its own internals
        promised = {f"model.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
        # A file for each tensor: DCP's writer keeps all tensors of a file until the file is done.
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
        try:
            dcp.save(promised, storage_writer=writer, planner=store.Streaming(read), no_dist=True)
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        (folder / store.TOKENIZER_FILE).write_bytes(weights.tokenizer)
        identity = {"model": asdict(weights.shape), "tokenizer": hashlib.sha256(weights.tokenizer).hexdigest()}
        origin = {key: weights.facts[key] for key in ("step", "tokens", "git_revision") if key in weights.facts}
        meta = {"step": 0, "identity": identity, "has_average": False, "config": weights.facts["config"]}
        sums = {file.name: storage.checksum(file) for file in folder.iterdir()}
        store.write_marker(folder, {**meta, "origin": {**origin, "imported_from": str(weights.place)}}, sums)


# ---- beside a run


class SideExports:
    """RUN/exports/step-NNNNNNNN from finished checkpoints, each by a process beside the run. Works on rank 0.

    A folder that transformers loads: qwen3 with qk_norm, llama without. A failure is a warning and no more.
    """

    def __init__(self, config: Config, resumed: Path | None, is_main: bool):
        """resumed: the checkpoint that the run goes on from; exports up to it may have gone with the process."""
        self._every, self._last = config.checkpoint.export_every if is_main else None, config.run.steps
        self._out = Path(config.run.dir) / "exports"
        self._running: list[tuple[Path, Future, IO]] = []
        for folder in store.complete_checkpoints(resumed.parent) if resumed is not None and is_main else []:
            if store.step_of(folder) <= store.step_of(resumed) and not (self._out / folder.name).exists():
                self.start(folder)

    def start(self, checkpoint: Path) -> None:
        """Export a checkpoint just committed, if it is due. Does not wait."""
        step, out = store.step_of(checkpoint), self._out / checkpoint.name
        if self._every is None or (step % self._every and step != self._last):
            return
        self._report([entry for entry in self._running if entry[1].done()])
        shutil.rmtree(out, ignore_errors=True)  # of a future that was given up
        try:
            held = storage.hold(checkpoint)  # from now on, not only when the process is up
            pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=follow_parent)
            self._running.append((checkpoint, pool.submit(_export_beside, checkpoint, out), held))
            pool.shutdown(wait=False)
        except OSError as error:
            log.warning("export of %s could not start, the run goes on: %s", checkpoint, describe_error(error))

    def finish(self) -> None:
        """Wait for the exports that still run."""
        self._report(list(self._running))

    def _report(self, entries: list[tuple[Path, Future, IO]]) -> None:
        for checkpoint, future, held in entries:
            if error := future.exception():
                log.warning("export of %s failed, the run goes on: %s", checkpoint, describe_error(error))
            else:
                log.info("exported %s", self._out / checkpoint.name)
            held.close()
            self._running.remove((checkpoint, future, held))


def _export_beside(checkpoint: Path, out: Path) -> None:
    os.nice(10)
    torch.set_num_threads(1)
    weights = open_checkpoint(checkpoint)
    export(weights, "qwen3" if weights.shape.qk_norm else "llama", out)
