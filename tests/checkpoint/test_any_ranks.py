"""Saved on any number of ranks, read on any other, with HSDP and without, bit for bit; format version 1 too."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.loading import copy_into
from mdmtrain.checkpoint.weights import open_checkpoint
from mdmtrain.config import CheckpointConfig, DiffusionConfig, OptimConfig, ParallelConfig
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion.sampler import RateSampler
from mdmtrain.model.presets import ModelShape
from mdmtrain.optim import EMA, build_optimizer
from mdmtrain.parallel.parallelize import build_model
from mdmtrain.parallel.world import World
from tests.checkpoint.models import as_version1, in_memory
from tests.spawn import run_world

# Rows that 2 and 4 ranks divide unevenly, and with an empty shard (5 rows on 4 ranks: 2, 2, 1, 0).
SHAPE = ModelShape(vocab_size=5, d_model=18, n_layers=1, n_heads=3, n_kv_heads=1, d_ff=21, init_std=0.02)
META = {"identity": {}, "has_average": True, "config": {}}


def values(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What a tensor is filled with, by its name: no two elements are equal."""
    return (torch.arange(shape.numel()) + 1000 * (sum(name.encode()) % 977)).view(shape).to(dtype)


def tensors_of(world: World, replicate: int, optimizer: str = "adamw") -> dict[str, Tensor]:
    """All tensors of a run."""
    model = build_model(SHAPE, ParallelConfig(replicate=replicate), world)
    built = build_optimizer(model, OptimConfig(lr=1e-3, name=optimizer))
    return store.training_tensors(model, built, EMA(model, 0.9), RateSampler(DiffusionConfig(), world.device))


def optimizer_of(name: str) -> str:
    return "muon" if name.startswith("muon") else "adamw"


def save_and_read(world: World, home: Path, corpus: Path, saves: list, reads: list) -> None:
    """saves, reads: (name, copies of HSDP). The optimizer is Muon if the name begins with it."""
    config = CheckpointConfig(save_every=1, keep_last=9)
    tokenizer = Tokenizer.load(corpus)
    meta = {**META, "identity": {"model": SHAPE.__dict__, "tokenizer": tokenizer.sha256}}
    meta["config"] = in_memory(SHAPE, corpus).facts["config"]
    for name, replicate in saves:
        tensors = tensors_of(world, replicate, optimizer_of(name))
        for key, tensor in tensors.items():
            copy_into(tensor, values(key, tensor.shape, tensor.dtype))
        folder = store.save(home / name, 1, tensors, meta, (corpus / "tokenizer.model").read_bytes(), config, world)
        assert store.damage(folder, world) is None
        if world.is_main:
            assert len(list(folder.glob("*.safetensors"))) == world.size
    for name, replicate in reads:
        folder = home / name / "step-00000001"
        tensors = tensors_of(world, replicate, optimizer_of(name))
        store.load(folder, store.read_meta(folder), tensors, world)
        for key, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(whole, values(key, tensor.shape, tensor.dtype)), (name, key)
    if "1" in dict(reads):
        folder = home / "1/step-00000001"
        with pytest.raises(ValueError, match=r"cannot read checkpoint .*momentum\..* is missing: use another one"):
            store.load(folder, store.read_meta(folder), tensors_of(world, 1, "muon"), world)


def test_saved_on_one_number_of_ranks_and_read_on_another(tmp_path, corpus):
    run_world(save_and_read, 1, tmp_path, corpus, [("1", 1), ("muon 1", 1), ("old", 1)], [("1", 1)])
    as_version1(tmp_path / "old/step-00000001")
    saves = [("4", 1), ("2x2", 2), ("4x1", 4), ("muon 4", 1), ("muon 2x2", 2)]
    run_world(save_and_read, 4, tmp_path, corpus, saves, [("1", 2), ("4", 1), ("muon 1", 2), ("old", 2)])
    names = ["1", "4", "2x2", "4x1", "old", "muon 1", "muon 4", "muon 2x2"]
    run_world(save_and_read, 2, tmp_path, corpus, [("2", 1)], [(name, 1) for name in (*names, "2")] + [("2x2", 2)])
    run_world(save_and_read, 1, tmp_path, corpus, [], [(name, 1) for name in (*names, "2")])
    for name in (*names, "2"):  # and without ranks, for a conversion
        for source in ("raw", "average"):
            opened = open_checkpoint(tmp_path / name / "step-00000001", source)
            kind = "model" if source == "raw" else "average"
            for parameter in ("embed.weight", "layers.0.mlp.up_proj.weight", "norm.weight"):
                found = opened.read(parameter)
                assert torch.equal(found, values(f"{kind}.{parameter}", found.shape, found.dtype)), (name, parameter)
    # Under HSDP the copies share the writing: none of their files is without data.
    for name in ("4", "2x2", "4x1"):
        sizes = [file.stat().st_size for file in (tmp_path / name).glob("*/*.safetensors")]
        assert max(sizes) < 2.5 * min(sizes), (name, sizes)
