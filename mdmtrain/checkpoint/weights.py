"""Read a model from a checkpoint, or from a folder of safetensors, one parameter at a time."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdmtrain.checkpoint import formats, store, version1
from mdmtrain.checkpoint.layout import Layout
from mdmtrain.checkpoint.storage import storage_of
from mdmtrain.checkpoint.tensor_files import TensorReader, tensor_bytes
from mdmtrain.config import Config, validate
from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer, read_folder
from mdmtrain.model.presets import ModelShape, model_shape
from mdmtrain.parallel.world import AgreedError, describe_error

log = logging.getLogger("mdmtrain")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's names -> safetensors' names
FACTS_FILE = "mdmtrain.json"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The parameters of a model, and what is known about their training."""

    place: Path
    shape: ModelShape
    tokenizer: bytes  # content of its model file
    facts: dict  # config, and if known: identity, weights (raw or average), step, tokens, git_revision, evaluation
    read: Callable[[str], Tensor]  # our name of a parameter -> the whole tensor on the CPU; raises ValueError
    changes: tuple[str, ...] = ()  # sentences on the changes that made a causal model bidirectional


# ---- checkpoints


def open_checkpoint(path: Path, weights: str | None = None) -> Weights:
    """Open the model of a run or a checkpoint, saved by any number of ranks. Raises ValueError.

    weights: "raw", "average", or None (the average if there is one). The checkpoint is held (Storage.hold) as long as
    the result exists.
    """
    folder = store.find(path)
    held = storage_of(folder).hold(folder)
    meta = store.read_meta(folder)
    source = chosen_weights(folder, meta, weights)
    tokenizer = (folder / store.TOKENIZER_FILE).read_bytes()
    _check_tokenizer(tokenizer, meta["identity"]["tokenizer"], folder / store.TOKENIZER_FILE)
    with _unreadable(folder):
        if meta["format_version"] == 1:
            tensor = version1.open_tensors(folder)
        else:
            tensor = TensorReader(folder, Layout.from_json(meta["layout"])).whole

    def read(name: str, _held=held) -> Tensor:
        with _unreadable(folder):
            return tensor(f"{source}.{name}")

    known = {key: meta[key] for key in ("identity", "config", "step", "tokens") if key in meta}
    facts = {"weights": "average" if source == "average" else "raw", **known, **_run_facts(folder, meta["step"])}
    return Weights(folder, ModelShape(**meta["identity"]["model"]), tokenizer, facts | meta.get("origin", {}), read)


def chosen_weights(folder: Path, meta: dict, weights: str | None) -> str:
    """The prefix of the tensors' names: "model" or "average".

    weights: "raw", "average", or None (the average if there is one). Raises AgreedError if there is no average.
    """
    if weights == "average" and not meta["has_average"]:
        raise AgreedError(f"{folder}: has no weight average (optim.ema_decay was null): leave out --weights")
    return "average" if weights != "raw" and meta["has_average"] else "model"


@contextmanager
def _unreadable(folder: Path) -> Iterator[None]:
    """Raise ValueError, one line, for any error while a checkpoint is read."""
    try:
        yield
    except Exception as error:  # unpickling a damaged file of format version 1 may raise any error
        raise ValueError(f"cannot read checkpoint {folder}: {describe_error(error)[:120]}: use another one") from None


def _run_facts(checkpoint: Path, step: int) -> dict:
    """Facts about a checkpoint from the run folder that contains it: git revision and evaluations."""
    environment, metrics = (checkpoint.parent.parent / name for name in ("environment.json", "metrics.jsonl"))
    facts = {}
    if environment.is_file():
        facts["git_revision"] = read_json(environment).get("git_revision")
    if metrics.is_file():
        with open(metrics, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if '"split"' in line and line.endswith("\n")]
        facts["evaluation"] = [record for record in records if record["step"] == step]
    return facts


def _check_tokenizer(model: bytes, sha256: str, file: Path) -> None:
    """Raise ValueError if a tokenizer's model file does not have the given SHA-256."""
    if hashlib.sha256(model).hexdigest() != sha256:
        raise ValueError(f"{file}: is not the tokenizer that the model was trained with: get the original folder")


# ---- folders


def open_folder(folder: Path, kind: str) -> Weights:
    """Open a folder of safetensors that `export` or another program wrote. Raises ValueError.

    A causal Llama or Qwen3 is made bidirectional, as a start for training. Special tokens that its tokenizer lacks
    (mask, often pad) are added. Their rows of embedding and head, and unused rows, are the mean of the old rows.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: is not a model folder (no config.json): name the folder that has this file")
    config = read_json(folder / "config.json")
    facts = read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
    if facts and not {"identity", "config", "sha256"} <= facts.keys():
        raise ValueError(f"{folder / FACTS_FILE}: incomplete: get the original file")
    try:
        stored, length = formats.shape_from(kind, config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: cannot be read as {kind}: {error}") from None
    facts.pop("minimum_transformers", None)
    files, stored = _locate_tensors(folder, kind, stored)
    start_anew = kind in formats.TRANSFORMERS and stored.causal
    tokenizer, known = read_folder(folder, config, add_missing=start_anew)
    if facts:
        _check_tokenizer(tokenizer.model, facts["identity"]["tokenizer"], folder / MODEL_FILE)
    pieces = tokenizer.vocab_size
    shape = replace(stored, causal=stored.causal and not start_anew)
    kept = stored.vocab_size  # rows of the embedding that are not replaced
    beyond = pieces > stored.vocab_size and (start_anew or known <= stored.vocab_size)
    if beyond or (start_anew and pieces > known):
        if start_anew:  # otherwise unused rows are kept, because they are part of the trained softmax
            kept = min(known, kept)
        shape = replace(shape, vocab_size=max(stored.vocab_size, -(-pieces // 64) * 64))
    if start_anew and known > stored.vocab_size:
        log.warning(
            "%s: the tokenizer has %d tokens, but the embedding has %d rows: new rows get the mean of the old ones",
            folder, known, stored.vocab_size,
        )  # fmt: skip
    try:
        bare = _bare_config(shape, length)
        model_shape(bare.model, pieces)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: describes a model that mdmtrain cannot build: {error}") from None
    hashes = facts.pop("sha256", None)
    sizes = formats.tensor_shapes(shape)

    def read(name: str) -> Tensor:
        theirs = formats.name_in(kind, name)
        with _opened(files[theirs]) as file:
            tensor = file.get_tensor(theirs).clone()  # the original is a view of the file, which is closed
        if hashes and hashlib.sha256(tensor_bytes(tensor)).hexdigest() != hashes.get(theirs):
            raise ValueError(f"{files[theirs]}: {theirs} has changed since the export: get the original file")
        if name in ("embed.weight", "head.weight") and kept < shape.vocab_size:
            more = tensor[:kept].float().mean(dim=0).to(tensor.dtype).expand(shape.vocab_size - kept, -1)
            tensor = torch.cat([tensor[:kept], more])
        assert tuple(tensor.shape) == sizes[name], name
        return tensor

    if not facts or ModelShape(**facts["identity"]["model"]) != shape:
        facts = {**facts, "config": bare.model_dump(mode="json")}
    changes = _changes(stored, shape, tokenizer, known, kept) if start_anew else ()
    return Weights(folder, shape, tokenizer.model, facts, read, changes)


def _changes(stored: ModelShape, shape: ModelShape, tokenizer: Tokenizer, known: int, kept: int) -> tuple[str, ...]:
    """Sentences on the changes that made a causal model bidirectional. known: number of tokens that it had before."""
    changes = ["attention is bidirectional now; it was causal"]
    numbers = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    if added := [f"{tokenizer.pieces()[number]} ({number})" for number in numbers if number >= known]:
        changes.append(f"new tokens: {', '.join(added)}")
    if kept < shape.vocab_size:
        rows = f"embedding: {stored.vocab_size} -> {shape.vocab_size} rows"
        changes.append(f"{rows}; rows from {kept} on are the mean of the earlier rows")
    return tuple(changes)


def read_json(file: Path) -> dict:
    """The JSON object in a file of a model folder. Raises ValueError."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: damaged (not a JSON object): get the original file") from None


def _locate_tensors(folder: Path, kind: str, shape: ModelShape) -> tuple[dict[str, Path], ModelShape]:
    """The file of each tensor by its name in the folder, and the shape of the model.

    The shape has no tied_embeddings if the head differs from the embedding. Raises ValueError for a missing or
    unexpected tensor, a wrong size or an unsupported dtype.
    """
    files: dict[str, Path] = {}
    for path in _shards(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in files:
                    raise ValueError(f"{path}: {name} is also in {files[name].name}: get the original files")
                files[name] = path
    head = formats.name_in(kind, "head.weight")
    if shape.tied_embeddings and head in files:
        if _equal(files, head, formats.name_in(kind, "embed.weight")):
            del files[head]  # older exports have a copy
        else:
            log.warning(
                "%s: config.json says that embedding and head are tied, but %s has other values: read as untied",
                folder, head,
            )  # fmt: skip
            shape = replace(shape, tied_embeddings=False)
    expected = {formats.name_in(kind, name): size for name, size in formats.tensor_shapes(shape).items()}
    found: dict[str, Path] = {}
    for name, path in files.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # older folders have it; it can be computed from config.json
        if name not in expected:
            raise ValueError(f"{path}: {name} does not exist in our model: the architecture is not supported")
        with _opened(path) as file:
            part = file.get_slice(name)
            if tuple(part.get_shape()) != expected[name]:
                raise ValueError(f"{path}: {name} is {part.get_shape()}, config.json says {[*expected[name]]}")
            if part.get_dtype() not in DTYPES.values():
                raise ValueError(f"{path}: {name} is {part.get_dtype()}: save it as {', '.join(DTYPES)}")
        found[name] = path
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)}): get all its files")
    return found, shape


def _shards(folder: Path) -> list[Path]:
    """The files with the tensors. Raises ValueError if there are none in this format, or if the index is damaged."""
    index = folder / INDEX_FILE
    single = folder / "model.safetensors"
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index}: has no weight_map, which names the file of each tensor: get the original file")
        return [folder / name for name in sorted(set(places.values()))]
    others = [
        file.name for ending in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(ending)
    ]
    if not single.is_file() and others:
        remedy = "load it with transformers and save it again with save_pretrained"
        if others[0].endswith(".safetensors"):
            remedy = f"several files need their {INDEX_FILE}"
        raise ValueError(f"{folder}: it has {sorted(others)[0]}, but no model.safetensors: {remedy}")
    return [single]


def _equal(files: dict[str, Path], one: str, other: str) -> bool:
    """Whether two tensors have the same values."""
    if other not in files:
        return False
    tensors = []
    for name in (one, other):
        with _opened(files[name]) as file:
            tensors.append(file.get_tensor(name))
    return tensors[0].shape == tensors[1].shape and bool((tensors[0] == tensors[1]).all())


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    """An open safetensors file. It is opened for each tensor, so that not more than one tensor is mapped in memory."""
    if not file.is_file():
        raise ValueError(f"{file}: missing: get all the model's files")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated ({error}): get the original file") from None


def _bare_config(shape: ModelShape, sequence_length: int) -> Config:
    """The configuration of a model whose training is unknown: only `model` and `data.sequence_length` are known."""
    tree = {
        "run": {"dir": "run", "steps": 1, "global_batch": 1, "micro_batch": 1},
        "model": asdict(shape),
        "data": {"sources": [{"path": "data"}], "sequence_length": sequence_length},
        "diffusion": {"objective": "ar" if shape.causal else "nelbo"},
        "optim": {"lr": 1e-4},
    }
    return validate(tree, "its sizes")
