"""How good is a model: its NELBO on held-out text, with its standard error.

    python -m mdmtrain.evaluate RUN_OR_CHECKPOINT [--data PATH...] [--json FILE]

The estimator draws the number of masked positions itself (k uniform on 1..L), so it is unbiased for the exact NELBO,
an upper bound on -log p(x)/L; no rate is cut off. The noise is fixed by eval.seed and stratified over all rows and
samples. On prompts and responses it bounds the responses given their prompts (and lengths): k counts the response's
tokens, and tokens, bytes and baselines are those of the responses, each token count with its eos.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mdmtrain.checkpoint import store
from mdmtrain.config import EvalConfig
from mdmtrain.data.loader import validation_rows, windows
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.diffusion import noise, strata
from mdmtrain.diffusion.noise import Stream
from mdmtrain.diffusion.objective import corrupt_counted, next_token, row_losses
from mdmtrain.model.transformer import Transformer
from mdmtrain.monitor.logs import CommandParser, output_file, user_errors
from mdmtrain.monitor.metrics import finite
from mdmtrain.parallel.world import World, init_world
from mdmtrain.parallel.wrap import reshard

BASELINE_PART = 1 << 20  # tokens read at once


@dataclass(frozen=True)
class Evaluation:
    """The NELBO of one split: of its tokens, or where it has prompts, of the responses (and eos) given these.

    bits_per_byte takes the eligible tokens per byte of the whole split.
    """

    split: str
    nelbo: float  # nats per token
    nelbo_se: float  # standard error over rows
    bits_per_byte: float
    bits_per_byte_se: float
    perplexity: float  # exp(nelbo), per token
    perplexity_se: float
    rows: int
    samples: int  # noise draws per row

    def __str__(self) -> str:
        return (
            f"{self.split}: NELBO {self.nelbo:.4f} +- {self.nelbo_se:.4f} nats/token, "
            f"{self.bits_per_byte:.4f} +- {self.bits_per_byte_se:.4f} bits/byte, perplexity {self.perplexity:.2f}"
        )


@torch.no_grad()
def row_values(
    model: Transformer, rows: tuple[Tensor, Tensor, Tensor | None], config: EvalConfig, mask_id: int, world: World
) -> np.ndarray:
    """One unbiased NELBO estimate per (row, sample), in nats of the whole row: float64 [R, samples]. A collective.

    rows: what `validation_rows` gives. Batches are formed by global index and dealt to the ranks in turn, so every
    number of ranks computes the same values; a rank left over in the last round repeats a batch and drops its result.
    """
    ids, eligible, segments = rows
    slots, length = len(ids) * config.samples, ids.shape[1]
    u = strata.uniforms(config.seed, 0, slots, "global", Stream.EVALUATION)
    batches = [np.arange(first, min(first + config.batch, slots)) for first in range(0, slots, config.batch)]
    mine = {}
    for first in range(0, len(batches), world.size):
        chosen = batches[number := min(first + world.rank, len(batches) - 1)]
        row = torch.from_numpy(chosen // config.samples)
        positions = noise.position_uniforms(config.seed, 1, chosen, length, Stream.EVALUATION)
        if model.shape.causal:
            corrupted = next_token(ids[row], eligible[row]).to(world.device)
        else:
            noise_of_rows = torch.from_numpy(positions)
            corrupted = corrupt_counted(ids[row], eligible[row], noise_of_rows, u[chosen], mask_id).to(world.device)
        visible = None if segments is None else segments[row].to(world.device)
        ce = model(corrupted.noisy, corrupted.positions, corrupted.targets, visible)
        mine[number] = row_losses(ce, corrupted).double().cpu().numpy()
    reshard(model)
    gathered = {number: values for part in world.gather(mine) for number, values in part.items()}
    return np.concatenate([gathered[number] for number in range(len(batches))]).reshape(len(ids), -1)


def evaluate_split(
    model: Transformer,
    split: PreparedSplit,
    name: str,
    config: EvalConfig,
    sequence_length: int,
    document_mask: bool,
    mask_id: int,
    world: World,
) -> Evaluation:
    """The NELBO on evenly spaced rows of a validation split, per eligible token: nats of all rows over tokens of all.

    A collective; the same on any number of ranks. The standard error is that of this ratio of two means.
    """
    rows = validation_rows(split, config.rows, sequence_length, document_mask)
    per_row = row_values(model, rows, config, mask_id, world).mean(axis=1)
    tokens = rows[1].sum(dim=1).double().numpy()
    nelbo = float(per_row.sum() / tokens.sum())
    off = (per_row - nelbo * tokens) / tokens.mean()
    se = float(off.std(ddof=1) / math.sqrt(len(off))) if len(off) > 1 else math.inf
    bits = split.eligible_tokens / split.bytes / math.log(2)
    perplexity = math.exp(min(nelbo, 700.0))  # a diverged model is reported, not a reason to stop
    return Evaluation(
        name, nelbo, se, nelbo * bits, se * bits, perplexity, perplexity * se, len(per_row), config.samples
    )


def split_names(splits: list[PreparedSplit], folders: list[str]) -> list[str]:
    """`validation` (or what split it is) for a single source, `validation/FOLDER` for several."""
    return [s.split if len(splits) == 1 else f"{s.split}/{Path(f).name}" for s, f in zip(splits, folders, strict=True)]


# ---- command


@dataclass(frozen=True)
class Baselines:
    """What the model has to beat, on the same tokens of the same split."""

    unigram_nats_per_token: float  # entropy of the split's token frequencies
    unigram_bits_per_byte: float
    gzip_bits_per_byte: float  # gzip -9 of the split's text


def baselines(split: PreparedSplit, decode: Callable[[list[int]], str]) -> Baselines:
    """One pass over the eligible tokens of a split, a part at a time. decode: token ids -> text."""
    counts, packer, packed = np.zeros(split.vocab_size), zlib.compressobj(9, wbits=31), 0  # 31: the gzip format
    for start in range(0, split.tokens, BASELINE_PART):
        length = min(BASELINE_PART, split.tokens - start)
        ids = split.read(start, length)[split.eligible(start, length)]
        counts += np.bincount(ids, minlength=split.vocab_size)
        packed += len(packer.compress(decode(ids.tolist()).encode("utf-8")))
    share = counts[counts > 0] / split.eligible_tokens
    entropy = float(-(share * np.log(share)).sum())
    packed += len(packer.flush())
    return Baselines(entropy, entropy * split.eligible_tokens / split.bytes / math.log(2), 8 * packed / split.bytes)


def _show(evaluation: Evaluation, base: Baselines, where: Path) -> None:
    table = Table(title=f"{evaluation.split}: {evaluation.rows} rows x {evaluation.samples} noise draws")
    for column in ("", "nats/token", "bits/byte", "perplexity"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "model (upper bound)",
        f"{evaluation.nelbo:.4f} +- {evaluation.nelbo_se:.4f}",
        f"{evaluation.bits_per_byte:.4f} +- {evaluation.bits_per_byte_se:.4f}",
        f"{evaluation.perplexity:.2f} +- {evaluation.perplexity_se:.2f}",
    )
    unigram = base.unigram_nats_per_token
    table.add_row("unigram", f"{unigram:.4f}", f"{base.unigram_bits_per_byte:.4f}", f"{math.exp(unigram):.2f}")
    table.add_row("gzip -9", "", f"{base.gzip_bits_per_byte:.4f}", "")
    console = Console()
    console.print(str(where), highlight=False)
    console.print(table)
    better = 1 - evaluation.nelbo / unigram
    console.print(f"{better:.1%} below the unigram baseline" if better > 0 else "no better than the unigram baseline")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m mdmtrain.evaluate", description="NELBO of a checkpoint on held-out text.")
    parser.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint counts) or checkpoint folder")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="prepared folders (default: those of the run)")
    parser.add_argument("--split", default="validation", help="split of the prepared folders (default: validation)")
    parser.add_argument("--rows", type=int, help="sequences per folder (default: the run's eval.rows)")
    parser.add_argument("--samples", type=int, help="noise draws per sequence (default: the run's eval.samples)")
    parser.add_argument("--weights", choices=["average", "raw"], help="default: the average where the run kept one")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(arguments)
    chosen = {name: getattr(args, name) for name in ("rows", "samples") if getattr(args, name) is not None}
    for option, value in chosen.items():
        if value < 1:
            raise ValueError(f"--{option} must be at least 1")
    world = init_world()
    loaded = store.load_model(args.checkpoint, args.weights, world)
    settings, data, mask_id = loaded.config.eval.model_copy(update=chosen), loaded.config.data, loaded.tokenizer.mask_id
    folders = args.data or [source.path for source in data.sources]
    splits = world.agree(lambda: [open_split(folder, args.split, loaded) for folder in folders])
    results = []
    for split, name in zip(splits, split_names(splits, folders), strict=True):
        evaluation = evaluate_split(
            loaded.model, split, name, settings, data.sequence_length, data.document_mask, mask_id, world
        )
        if world.is_main:
            base = baselines(split, loaded.tokenizer.decode)
            _show(evaluation, base, loaded.folder)
            numbers = {**asdict(evaluation), **asdict(base)}
            results.append({name: finite(v) if isinstance(v, float) else v for name, v in numbers.items()})
    if args.json and world.is_main:
        report = {"checkpoint": str(loaded.folder), "results": results}
        store.write_atomically(args.json, json.dumps(report, indent=1) + "\n")


def open_split(folder: str, split: str, loaded: store.LoadedModel) -> PreparedSplit:
    """A prepared split that was made with the model's own tokenizer and holds a row. Raises ValueError."""
    opened = PreparedSplit(folder, split)
    windows(opened, loaded.config.data.sequence_length)
    if opened.tokenizer_sha256 != loaded.tokenizer.sha256:
        raise ValueError(
            f"{folder}: prepared with another tokenizer than the model's: "
            "prepare it again with --tokenizer and the folder that the model was trained on"
        )
    return opened


if __name__ == "__main__":
    with user_errors():
        main()
