#!/usr/bin/env python3
"""Measure how long a checkpoint delays training: synchronous and asynchronous saves, alternately.

    python tools/bench/save.py --out DIR [--layers N] [--saves N] [--json FILE]
    torchrun --standalone --nproc-per-node 2 tools/bench/save.py --out DIR

A model with random weights is trained on random tokens. The stall of a save is the time until training can continue (on
the slowest rank). Steps during an asynchronous save may be slower, because both use the same processors. This
additional time is measured too. The whole cost of a save is its stall plus this time.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.checkpoint.writer import CheckpointWriter
from mdmtrain.command import CommandParser, user_errors
from mdmtrain.config import CheckpointConfig, DiffusionConfig, OptimConfig, ParallelConfig
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion.sampler import RateSampler
from mdmtrain.model.presets import ModelShape, describe_shape
from mdmtrain.optim import build_optimizer, optimizer_step
from mdmtrain.parallel.parallelize import build_model, init_weights
from mdmtrain.parallel.world import World, init_world

META = {"identity": {}, "has_average": False, "config": {}}


def measure_saves(
    tensors: dict, step: Callable[[], None], out: Path, tokenizer: bytes, saves: int, world: World
) -> dict:
    """Seconds of `saves` saves of each kind, alternately, with training steps between them. A collective.

    step: does a training step. The medians exclude the first save of each kind, which allocates memory.
    """

    def slowest(act: Callable[[], object]) -> float:
        start = time.monotonic()
        act()
        return max(world.gather(time.monotonic() - start))

    kinds = {"synchronous": False, "asynchronous": True}
    writers = {
        kind: CheckpointWriter(out / kind, tokenizer, CheckpointConfig(keep_last=1, asynchronous=value), world, 60.0)
        for kind, value in kinds.items()
    }
    stalls: dict = {kind: [] for kind in kinds}
    alone = []
    shared = []
    extra = []
    commits = []
    step()
    for number in range(saves + 1):
        for kind, writer in writers.items():
            alone += [slowest(step) for _ in range(3)]
            writer.finish()
            start = time.monotonic()
            stalls[kind].append(slowest(partial(writer.save, number, tensors, META, {})))
            if kind == "asynchronous":
                times = []
                while writer.poll() is None:
                    times.append(slowest(step))
                commits.append(time.monotonic() - start)
                shared += times
                extra.append(sum(times) - len(times) * statistics.median(alone))
    first = {kind: values[0] for kind, values in stalls.items()}
    synchronous, asynchronous = (statistics.median(values[1:]) for values in stalls.values())
    cost = statistics.median(stall + more for stall, more in zip(stalls["asynchronous"][1:], extra[1:], strict=True))
    newest = store.newest(out / "asynchronous")
    assert newest is not None, "nothing was saved"
    return {
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "stall_synchronous": synchronous,
        "stall_asynchronous": asynchronous,
        "stall_ratio": asynchronous / synchronous,
        "first_stalls": first,
        "step_alone": statistics.median(alone),
        "step_during_save": statistics.median(shared) if shared else None,
        "cost_asynchronous": cost,
        "cost_ratio": cost / synchronous,
        "committed_after": statistics.median(commits[1:]),
        "verifying": slowest(lambda: store.damage(newest, world)),
    }


def build(shape: ModelShape, world: World) -> tuple[dict, Callable[[], None]]:
    """The tensors of a run, and a function that does a training step."""
    model = build_model(shape, ParallelConfig(), world)
    init_weights(model, 0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))
    tensors = store.training_tensors(model, optimizer, None, RateSampler(DiffusionConfig(), world.device))
    ids = torch.randint(5, shape.vocab_size, (2, 64), device=world.device)

    def step() -> None:
        model(ids, torch.arange(0, 128, 2, device=world.device), ids.flatten()[::2]).mean().backward()
        optimizer_step(optimizer, torch.ones((), dtype=torch.bool, device=world.device), 1e-4, 1.0)
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    return tensors, step


def main(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="tools/bench/save.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="scratch folder; it must not exist")
    parser.add_argument("--layers", type=int, default=8, help="layers; 8 make 34M parameters (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_args(arguments)
    world = init_world()
    shape = ModelShape(8192, 512, args.layers, 8, 8, 1408)
    tensors, step = build(shape, world)
    tokenizer = args.out / "tokenizer.model"

    def prepare() -> None:
        args.out.mkdir(parents=True)
        Tokenizer.train([Path(__file__).read_text()], 300, tokenizer)

    world.agree(prepare, main_only=True)
    try:
        found = measure_saves(tensors, step, args.out, tokenizer.read_bytes(), args.saves, world)
    finally:
        world.agree(lambda: shutil.rmtree(args.out), main_only=True)
    if not world.is_main:
        return
    table = Table("", "seconds", "ratio to synchronous", title=f"{describe_shape(shape)}; {world.size} ranks")
    for label, name, ratio in (
        ("stall, synchronous", "stall_synchronous", None),
        ("stall, asynchronous", "stall_asynchronous", "stall_ratio"),
        ("whole cost, asynchronous", "cost_asynchronous", "cost_ratio"),
        ("committed after", "committed_after", None),
        ("step without a save", "step_alone", None),
        ("step during a save", "step_during_save", None),
        ("verification", "verifying", None),
    ):
        seconds = "-" if found[name] is None else f"{found[name]:.3f}"
        table.add_row(label, seconds, f"{found[ratio]:.3f}" if ratio else "")
    Console().print(table, f"{found['bytes'] / 1e6:,.0f} MB per checkpoint")
    if args.json:
        whole = {"torch": torch.__version__, "device": str(world.device), "ranks": world.size, **found}
        write_atomically(args.json, json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
