"""Small models to convert: shapes, weights as a function of their names, checkpoints with and without ranks."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mdmtrain.checkpoint import storage, store
from mdmtrain.checkpoint.export import import_checkpoint
from mdmtrain.checkpoint.formats import tensor_shapes
from mdmtrain.checkpoint.layout import Layout
from mdmtrain.checkpoint.tensor_files import TensorReader
from mdmtrain.checkpoint.weights import Weights
from mdmtrain.config import CheckpointConfig, ParallelConfig
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion import noise
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer, initial_std
from mdmtrain.parallel.parallelize import build_model, init_weights
from mdmtrain.parallel.world import World

SEED = 11
BASE = dict(vocab_size=576, d_model=48, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=80, init_std=0.2)
SHAPES = {
    "tied-mha": ModelShape(**BASE, tied_embeddings=True),
    "tied-gqa": ModelShape(**{**BASE, "n_kv_heads": 2}, tied_embeddings=True, rope_theta=500.0),
    "untied-mha": ModelShape(**BASE, norm_eps=1e-3),
    "untied-gqa": ModelShape(**{**BASE, "n_kv_heads": 1}),
    "wide-heads": ModelShape(**{**BASE, "n_kv_heads": 2}, head_dim=20),
    "qk-norm": ModelShape(**{**BASE, "n_kv_heads": 2}, head_dim=16, qk_norm=True, tied_embeddings=True),
}


def parameters(shape: ModelShape) -> dict[str, Tensor]:
    """What init_weights gives them, computed without ranks; the norms are not all ones, so that they count."""
    tensors = {}
    for name, size in tensor_shapes(shape).items():
        values = torch.from_numpy(noise.normals(SEED, name, 0, torch.Size(size).numel())).view(size)
        std = initial_std(name, shape)
        tensors[name] = 1 + 0.3 * values if std is None else values * std
    return tensors


def in_memory(shape: ModelShape, corpus: Path, length: int = 64) -> Weights:
    tensors = parameters(shape)
    config = {
        "run": {"dir": "run", "steps": 1, "global_batch": 1, "micro_batch": 1},
        "model": asdict(shape),
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": length},
        "diffusion": {"objective": "ar" if shape.causal else "nelbo"},
        "optim": {"lr": 1e-4},
    }
    return Weights(Path("memory"), shape, (corpus / "tokenizer.model").read_bytes(), {"config": config}, tensors.get)


def checkpoint(folder: Path, shape: ModelShape, corpus: Path) -> Path:
    import_checkpoint(in_memory(shape, corpus), folder)
    return folder


def our_model(tensors: dict[str, Tensor], shape: ModelShape) -> Transformer:
    model = Transformer(shape, 4096)
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def our_logits(model: Transformer, ids: Tensor) -> Tensor:
    return model(ids, torch.arange(ids.numel())).view(*ids.shape, -1)


def save_on_ranks(world: World, folder: Path, corpus: Path) -> None:
    """The checkpoints that training would write of all SHAPES, each in a run folder of its own. A collective."""
    for name, shape in SHAPES.items():
        model = build_model(shape, ParallelConfig(), world)
        init_weights(model, SEED)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if initial_std(key, shape) is None:
                    whole = torch.from_numpy(noise.normals(SEED, key, 0, parameter.numel()))
                    local = parameter.to_local()
                    first = world.rank * -(-parameter.numel() // world.size)
                    local.copy_(1 + 0.3 * whole[first : first + local.numel()])
        tensors = {f"model.{key}": p.detach() for key, p in model.named_parameters()}
        identity = {"model": asdict(shape), "tokenizer": Tokenizer.load(corpus).sha256}
        meta = {
            "identity": identity,
            "has_average": False,
            "tokens": 640,
            "config": in_memory(shape, corpus).facts["config"],
        }
        home, tokenizer = folder / name / "checkpoints", (corpus / "tokenizer.model").read_bytes()
        store.save(home, 10, tensors, meta, tokenizer, CheckpointConfig(), world)


def as_version1(folder: Path) -> None:
    """Write a checkpoint anew as mdmtrain wrote them before format version 2: tensors by DCP, an index by pickle."""
    meta = json.loads((folder / "meta.json").read_text())
    layout = Layout.from_json(meta.pop("layout"))
    tensors = {name: TensorReader(folder, layout).whole(name) for name in layout.tensors}
    for old in folder.glob("*.safetensors"):
        old.unlink()
    (folder / "meta.json").unlink()
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    meta["files"] = {file.name: file.stat().st_size for file in folder.iterdir()}
    meta["crc32"] = {name: storage.checksum(folder / name) for name in meta["files"]}
    meta["format_version"] = 1
    del meta["own_crc32"]
    meta["own_crc32"] = f"{zlib.crc32(json.dumps(meta).encode()):08x}"
    (folder / "meta.json").write_text(json.dumps(meta))
