#!/usr/bin/env python3
"""Train one run in many arrangements and compare the losses and weights, bit for bit where they should be equal.

    python tools/check_exactness.py [--steps N] [--worlds 1,2,4,2x2] [--only NAME,...] [--data DIR] [--json FILE]

Trains a small model with one seed on the CPU (gloo), once for each arrangement and each world. A world is a number of
ranks, or AxB for HSDP with A replicas of B shards. Each run is compared with the plain run of its world and with the
plain run on one rank. The exit status is 1 if a run that should be bitwise equal to the plain run of its world is not,
or if its losses differ from those on one rank by more than the tolerance of law 1 (docs/DESIGN.md). Arrangements whose
name begins with "muon" are compared with the plain run under Muon. docs/engine.md has the table for the default
arguments.
"""

import contextlib
import json
import os
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from mdmtrain import config as configuration
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.checkpoint.weights import open_checkpoint
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.model.transformer import Transformer

ROWS, ACCUMULATED = 16, 4  # rows of the global batch; micro-steps per step with accumulation
FEW, AT_FIRST, AFTER_MANY = 20, 1e-5, 1e-4  # law 1: relative tolerance of losses up to step FEW, and after it


@dataclass(frozen=True)
class Arrangement:
    """One way to compute the same run. exact: bitwise equal to the plain run of the same world and optimizer."""

    parallel: dict
    exact: bool
    accumulate: int = 1
    ema: bool = False
    optimizer: str = "adamw"

    @property
    def plain(self) -> str:
        """The arrangement to compare with."""
        return "plain" if self.optimizer == "adamw" else self.optimizer


ARRANGEMENTS = {
    "plain": Arrangement({}, True),
    "plain again": Arrangement({}, True),
    "recompute full": Arrangement({"activation_checkpointing": "full"}, True),
    "recompute selective": Arrangement({"activation_checkpointing": "selective"}, True),
    "recompute ops": Arrangement({"activation_checkpointing": "ops"}, True),
    "keep gathered": Arrangement({"reshard_after_forward": False}, True),
    "offload": Arrangement({"offload": True}, True),
    "average": Arrangement({}, True, ema=True),
    # Not exact: accumulation changes the order of sums; compiled blocks and the fused head round differently.
    "fused head": Arrangement({"fused_head": True}, False),
    "accumulate": Arrangement({}, False, accumulate=ACCUMULATED),
    "compile": Arrangement({"compile": True}, False),
    "compile ops": Arrangement({"compile": True, "activation_checkpointing": "ops"}, False),
    "compile budget": Arrangement({"compile": True, "activation_checkpointing": "budget"}, False),
    "muon": Arrangement({}, True, optimizer="muon"),
    "muon again": Arrangement({}, True, optimizer="muon"),
    "muon recompute full": Arrangement({"activation_checkpointing": "full"}, True, optimizer="muon"),
    "muon offload": Arrangement({"offload": True}, True, optimizer="muon"),
    "muon accumulate": Arrangement({}, False, accumulate=ACCUMULATED, optimizer="muon"),
}


@dataclass(frozen=True)
class Row:
    """The largest relative differences of one run, to the plain run on one rank and to the plain run of its world."""

    world: str
    arrangement: str
    exact: bool
    loss_to_one: float  # of any step's loss
    weights_to_one: float  # |a - b| / |b| over all weights (L2), with the EMA if there is one
    loss_to_plain: float
    weights_to_plain: float

    def verdict(self, steps: int) -> str:
        most = AT_FIRST if steps <= FEW else AFTER_MANY
        if self.exact and (self.loss_to_plain or self.weights_to_plain):
            return "NOT BITWISE EQUAL"
        return f"LOSS BEYOND {most:g}" if not self.loss_to_one <= most else "ok"


def tree_of(world: str, arrangement: Arrangement, steps: int, data: Path, run_dir: Path) -> tuple[int, dict]:
    """(ranks, configuration) of one run."""
    copies, _, shard = world.rpartition("x")
    copies = int(copies or 1)
    shard = int(shard)
    ranks = copies * shard
    micro = ROWS // ranks // arrangement.accumulate
    return ranks, {
        "run": {"dir": str(run_dir), "seed": 7, "steps": steps, "global_batch": ROWS, "micro_batch": micro},
        "model": {"d_model": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128},
        "data": {
            "sources": [{"path": str(data)}],
            "sequence_length": 64,
            "document_mask": True,
            "random_length_fraction": 0.1,
            "workers": 0,
        },
        "optim": {
            "name": arrangement.optimizer,
            "lr": 3e-3,
            "warmup_steps": min(5, steps),
            "ema_decay": 0.9 if arrangement.ema else None,
        },
        "parallel": {"replicate": copies, **arrangement.parallel},
        "checkpoint": {"save_every": steps},
        "monitor": {"log_every": steps, "tensorboard": False, "probe_every": 0},
        "eval": {"every": steps, "rows": 8, "samples": 1, "batch": 8},
    }


def train_all(ranks: int, trees: list[dict]) -> None:
    """Train all configurations one after the other, in the same new processes."""
    mp.start_processes(_rank, (ranks, get_free_port(), trees), ranks, start_method="spawn")


def _rank(rank: int, ranks: int, port: int, trees: list[dict]) -> None:
    from mdmtrain.parallel.world import init_world
    from mdmtrain.train import train

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        world = init_world()
        for tree in trees:
            train(configuration.validate(tree, "check_exactness"), world)
            if tree["parallel"].get("compile"):
                torch.compiler.reset()  # cached graphs do not record their budget
    torch.distributed.destroy_process_group()


def outcome(run_dir: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses by step, and the final weights."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    raw = open_checkpoint(run_dir, "raw")
    tensors: dict[str, Tensor] = {}
    with torch.device("meta"):
        names = [name for name, _ in Transformer(raw.shape, 1).named_parameters()]
    for kind in ("raw", "average") if raw.facts["config"]["optim"]["ema_decay"] else ("raw",):
        read = open_checkpoint(run_dir, kind).read
        tensors |= {f"{kind}.{name}": read(name) for name in names}
    return losses, tensors


def difference(run: tuple, reference: tuple) -> tuple[float, float]:
    """(largest relative difference of a loss, relative difference of the weights that both runs have)."""
    (losses, weights), (others, those) = run, reference
    assert len(losses) == len(others) and losses
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))
    common = weights.keys() & those.keys()
    apart = sum(float((weights[n] - those[n]).double().square().sum()) for n in common)
    return loss, (apart / sum(float(those[n].double().square().sum()) for n in common)) ** 0.5


def measure(steps: int, worlds: list[str], names: list[str], data: Path, folder: Path) -> Iterator[Row]:
    """Run all arrangements in all worlds. The first world must be "1", the reference."""
    assert worlds[0] == "1" and {ARRANGEMENTS[name].plain for name in names} <= set(names)
    references: dict[str, tuple] = {}
    for world in worlds:
        ranks, trees = 0, []
        for name in names:
            ranks, tree = tree_of(world, ARRANGEMENTS[name], steps, data, folder / f"{world} {name}")
            trees.append(tree)
        train_all(ranks, trees)
        outcomes = {name: outcome(folder / f"{world} {name}") for name in names}
        for name, run in outcomes.items():
            base = ARRANGEMENTS[name].plain
            plain = outcomes[base]
            if world == "1":  # take the EMA from the run that has one: its weights equal those of the plain run
                _, weights = references.setdefault(base, (plain[0], dict(plain[1])))
                weights |= {n: tensor for n, tensor in run[1].items() if n not in weights}
            reference = references[base]
            yield Row(world, name, ARRANGEMENTS[name].exact, *difference(run, reference), *difference(run, plain))


def corpus(folder: Path) -> Path:
    """Prepare a few packages of Python's standard library as data."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    inputs = sorted(file for name in ("json", "email", "logging", "asyncio") for file in (stdlib / name).glob("*.py"))
    return prepare(inputs, folder, Options(vocab_size=512, validation_fraction=0.1), workers=1).out


def table_of(rows: list[Row], steps: int) -> Table:
    title = f"largest relative differences after {steps} steps (weights: L2)"
    columns = ("loss / 1 rank", "weights / 1 rank", "loss / plain", "weights / plain", "should be", "is")
    table = Table("world", "arrangement", *columns, title=title)
    before = None
    for row in rows:
        numbers = (row.loss_to_one, row.weights_to_one, row.loss_to_plain, row.weights_to_plain)
        first = row.world if row.world != before else ""
        should = "bitwise" if row.exact else "close"
        shown = [f"{number:.1e}" if number else "0" for number in numbers]
        table.add_row(first, row.arrangement, *shown, should, row.verdict(steps))
        before = row.world
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=FEW, help="steps of each run (default: %(default)s)")
    parser.add_argument(
        "--worlds", default="1,2,4,2x2", help="worlds, first 1, which is the reference (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        default=",".join(ARRANGEMENTS),
        help="arrangements, with the plain or muon run to compare with (default: %(default)s)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="a prepared folder (default: a small new one)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_args(arguments)
    worlds = args.worlds.split(",")
    names = args.only.split(",")
    sizes = [world.split("x") for world in worlds]
    if worlds[0] != "1" or not all(len(size) < 3 and all(n in {"1", "2", "4"} for n in size) for size in sizes):
        raise ValueError(f"--worlds {args.worlds}: must be 1, then numbers of ranks (2, 4) or REPLICASxSHARDS (2x2)")
    if unknown := set(names) - ARRANGEMENTS.keys():
        raise ValueError(f"--only {args.only}: unknown {', '.join(sorted(unknown))}: use {', '.join(ARRANGEMENTS)}")
    if missing := {ARRANGEMENTS[name].plain for name in names} - set(names):
        raise ValueError(f"--only {args.only}: add {', '.join(sorted(missing))}, to compare with")
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: must be at least 1")
    console = Console(width=120)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or corpus(Path(folder) / "corpus")
        rows = []
        for row in measure(args.steps, worlds, names, data, Path(folder)):
            rows.append(row)
            print(f"{row.world} {row.arrangement}: {row.verdict(args.steps)}", file=sys.stderr, flush=True)
    console.print(table_of(rows, args.steps))
    bad = sum(row.verdict(args.steps) != "ok" for row in rows)
    console.print(f"{len(rows)} runs, {bad} bad; torch {torch.__version__}, {time.monotonic() - begin:.0f} s")
    if args.json:
        report = [{**asdict(row), "verdict": row.verdict(args.steps)} for row in rows]
        result = {"torch": torch.__version__, "steps": args.steps, "rows": report}
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
