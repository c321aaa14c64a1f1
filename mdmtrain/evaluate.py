"""Evaluate a model: its NELBO on held-out text, with a standard error.

    python -m mdmtrain.evaluate RUN_OR_CHECKPOINT [--data PATH...] [--estimator NAME...] [--json FILE]

The default estimator draws the number of masked positions (k uniform on 1..L). It is unbiased for the exact NELBO, an
upper bound on -log p(x)/L, because no rate is cut off. eval.seed fixes the noise, which is stratified over all rows and
samples. `likelihood.py` has other estimators to check the result; docs/evaluation.md explains which one to use. With
prompts and responses, the NELBO bounds the likelihood of the responses given the prompts (and the lengths of the
responses). Tokens, bytes and baselines then count only the responses.
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.loading import LoadedModel, load_model
from mdmtrain.command import CommandParser, output_file, survive_terminal, user_errors
from mdmtrain.config import EvalConfig
from mdmtrain.data.inputs import STANDARD_INPUT, Input, open_name
from mdmtrain.data.loader import shard_cache, validation_rows
from mdmtrain.data.records import (
    BadRecord,
    Reading,
    add_bad_record_option,
    add_format_option,
    present,
    read_records,
    string_field,
)
from mdmtrain.data.shards import PreparedSplit, is_prepared
from mdmtrain.data.text import Rows, TextSplit, continuation_rows, document_rows, encode_pair
from mdmtrain.likelihood import (
    ESTIMATORS,
    MOST_ERRORS,
    NEXT_TOKEN,
    Comparison,
    Estimate,
    Estimator,
    compare,
    estimate,
)
from mdmtrain.model.transformer import Transformer
from mdmtrain.monitor.logs import log
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World, init_world

BASELINE_PART = 1 << 20  # tokens that are read at once
UNITS = {"nelbo": 4, "bits_per_byte": 4, "perplexity": 2}  # fields of an evaluation, and the decimals shown


@dataclass(frozen=True)
class Evaluation:
    """The NELBO of one split. In a split with prompts: of the responses (with eos) given the prompts.

    bits_per_byte uses the number of eligible tokens per byte of the whole split.
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
        nelbo = with_error(self.nelbo, self.nelbo_se, 4)
        bits = with_error(self.bits_per_byte, self.bits_per_byte_se, 4)
        note = " (standard errors need more than one row)" if self.rows == 1 else ""
        return f"{self.split}: NELBO {nelbo} nats/token, {bits} bits/byte, perplexity {self.perplexity:.2f}{note}"


def with_error(value: float, error: float, digits: int) -> str:
    """A value with its standard error, or with ? if the error is not finite (a single row)."""
    return f"{value:.{digits}f}" + (f" +- {error:.{digits}f}" if math.isfinite(error) else " +- ?")


def evaluate_split(
    model: Transformer,
    split: PreparedSplit,
    name: str,
    config: EvalConfig,
    sequence_length: int,
    document_mask: bool,
    mask_id: int,
    world: World,
    watch: Watchdog | None = None,
) -> Evaluation:
    """The NELBO per eligible token on evenly spaced rows of a split. A collective; equal on any number of ranks.

    watch: the watchdog of a run in training. With it, a stop request raises Interrupted.
    """
    rows = validation_rows(split, config.rows, sequence_length, document_mask)
    counted = Estimator("counted", config.samples, config.seed, 0.0)
    found = estimate(model, rows, counted, config.batch, mask_id, world, watch)
    return in_units(name, found, config.samples, split.eligible_tokens / split.bytes)


def in_units(name: str, found: Estimate, samples: int, tokens_per_byte: float) -> Evaluation:
    """Convert an estimate to nats per token, bits per byte and perplexity."""
    nelbo = found.nelbo
    se = found.standard_error
    bits = tokens_per_byte / math.log(2)
    perplexity = math.exp(min(nelbo, 700.0))  # no overflow for a model that has diverged
    return Evaluation(name, nelbo, se, nelbo * bits, se * bits, perplexity, perplexity * se, len(found.nats), samples)


def split_names(splits: list[PreparedSplit], folders: list[str]) -> list[str]:
    """The names of validation splits: the split's name for a single source, `validation/FOLDER` for several."""
    if len(splits) == 1:
        return [splits[0].split]
    return [f"{split.split}/{Path(folder).name}" for split, folder in zip(splits, folders, strict=True)]


def set_names(paths: list[str], split: str) -> list[str]:
    """The names of the sets at `paths`: as in `split_names` for prepared folders, the file name for files."""
    names = []
    for path in paths:
        if is_prepared(path):
            names.append(split if len(paths) == 1 else f"{split}/{Path(path).name}")
        else:
            names.append("standard input" if path == STANDARD_INPUT else Path(path).name)
    return names


# ---- validation sets


@dataclass(frozen=True)
class Material:
    """The rows of one validation set, and how they were made from its text."""

    name: str
    rows: Rows
    policy: str  # how text is split into rows, and which tokens are scored
    tokens: int  # of the whole set, with bos and eos if these are scored
    bytes: int  # of its text in UTF-8
    documents: int
    stream: PreparedSplit | TextSplit | None  # for the baselines; None: no baselines
    details: dict = field(default_factory=dict)  # more counts for the report


def open_material(path: str, name: str, args: argparse.Namespace, count: int, loaded: LoadedModel) -> Material:
    """Open a prepared folder, a text file, or a jsonl file (texts, or prefixes and continuations).

    count: largest number of rows. Raises ValueError.
    """
    length = loaded.config.data.sequence_length
    pad_id = loaded.tokenizer.pad_id
    reading = Reading(args.on_bad_record, args.format)
    if is_prepared(path):
        stream = open_split(path, args.split, loaded)
    else:
        source = open_name(path)
        if _has_continuations(source, reading):
            return _continuations(source, name, reading, loaded)
        stream = TextSplit(source, loaded.tokenizer, reading, args.lines)
    left_out = {"left_out": dict(reading.left_out)}
    common = (stream.eligible_tokens, stream.bytes, stream.documents, stream)
    if stream.prompts:
        rows = validation_rows(stream, count, length, loaded.config.data.document_mask)
        policy = f"one prompt with its response per row, cut at {length} tokens; the response and its eos are scored"
        return Material(name, rows, policy, *common, left_out)
    scored = "bos and eos of each document are scored"
    if args.wrap == "no":
        rows, longer = document_rows(stream, count, length, args.long == "cut", pad_id)
        what = "cut" if args.long == "cut" else "split over several rows"
        policy = f"one document per row, padding is not scored; documents over {length} tokens are {what}; {scored}"
        return Material(name, rows, policy, *common, {"longer_documents": longer, **left_out})
    if stream.tokens < length:
        raise ValueError(
            f"{path}: the {stream.split} split has only {stream.tokens:,} tokens, less than one row of "
            f"data.sequence_length={length}: evaluate it with --wrap no, or prepare more text"
        )
    rows = validation_rows(stream, count, length, loaded.config.data.document_mask)
    sees = "its document" if loaded.config.data.document_mask else "its row"
    policy = f"wrapped: documents concatenated, in rows of {length} tokens; each token sees {sees}; {scored}"
    return Material(name, rows, policy, *common, left_out)


def _has_continuations(source: Input, reading: Reading) -> bool:
    """Whether the first readable record has a continuation."""
    first = next(read_records(source, Reading("skip", reading.format), dict), None)
    return first is not None and bool(present(first[0], "continuation"))


def _continuations(source: Input, name: str, reading: Reading, loaded: LoadedModel) -> Material:
    """The continuations of all records, each given its prefix. Raises ValueError."""
    length = loaded.config.data.sequence_length

    def as_pair(fields: dict) -> tuple[tuple[list[int], list[int]], int]:
        wanted = "every record needs 'continuation', a string that is not empty, and 'prefix', a string"
        prefix = string_field(fields, "prefix", wanted) if present(fields, "prefix") else ""
        continuation = string_field(fields, "continuation", wanted)
        if not continuation:
            raise BadRecord("an empty 'continuation'", f": {wanted}")
        pair = encode_pair(loaded.tokenizer, prefix, continuation)
        given, rest = (len(part) for part in pair)
        if given + rest > length:
            raise BadRecord(
                "longer than the model's rows",
                f": prefix ({given} tokens with bos) and continuation ({rest}) exceed the {length} tokens that the "
                "model was trained on: shorten them",
            )
        return pair, len(continuation.encode())

    read = [made for made, _, _ in read_records(source, reading, as_pair)]
    if not read:
        raise ValueError(f"{source.name}: has no usable record: {', '.join(reading.left_out)}")
    policy = "continuation given bos and prefix; only its own tokens are scored, without eos"
    rows = continuation_rows([pair for pair, _ in read], loaded.tokenizer.pad_id)
    size = sum(size for _, size in read)
    details = {"left_out": dict(reading.left_out)}
    return Material(name, rows, policy, int(rows.eligible.sum()), size, len(read), None, details)


# ---- command


@dataclass(frozen=True)
class Baselines:
    """Simple baselines on the same tokens of the same split."""

    unigram_nats_per_token: float  # entropy of the split's token frequencies
    unigram_bits_per_byte: float
    gzip_bits_per_byte: float  # gzip -9 of the split's text


def baselines(split: PreparedSplit | TextSplit, decode: Callable[[list[int]], str]) -> Baselines:
    """Compute the baselines in one pass over the eligible tokens of a split. decode: token ids -> text."""
    counts = np.zeros(split.vocab_size)
    packer = zlib.compressobj(9, wbits=31)  # 31: the gzip format
    packed = 0  # bytes
    for start in range(0, split.tokens, BASELINE_PART):
        length = min(BASELINE_PART, split.tokens - start)
        ids = split.read(start, length)[split.eligible(start, length)]
        counts += np.bincount(ids, minlength=split.vocab_size)
        packed += len(packer.compress(decode(ids.tolist()).encode("utf-8")))
    share = counts[counts > 0] / split.eligible_tokens
    entropy = float(-(share * np.log(share)).sum())
    packed += len(packer.flush())
    return Baselines(entropy, entropy * split.eligible_tokens / split.bytes / math.log(2), 8 * packed / split.bytes)


def report(material: Material, estimates: dict[Estimator, Estimate], comparisons: list[Comparison]) -> dict:
    """The numbers of one validation set, for JSON. The first estimator's are at the top level, all in `estimators`."""
    per_byte = material.tokens / material.bytes
    results = []
    for estimator, found in estimates.items():
        evaluation = asdict(in_units(material.name, found, estimator.draws, per_byte))
        own = {"estimator": estimator.name, "target": estimator.target, "seed": estimator.seed}
        if estimator.name == "continuous":
            own["eps"] = estimator.eps
        if found.by_rate is not None:
            own["nelbo_by_rate"] = [None if math.isnan(value) else value for value in found.by_rate.tolist()]
        results.append({**own, **evaluation, "noise_se": found.noise_error, "passes": found.passes})
    first = next(iter(estimates.values()))
    scored = int(first.tokens.sum())
    whole = {
        "policy": material.policy, "documents": material.documents, "tokens": material.tokens, "bytes": material.bytes,
        "tokens_scored": scored, "bytes_scored": round(scored / per_byte), **material.details,
    }  # fmt: skip
    units = {"nelbo": "nats/token", "bits_per_byte": "bits/byte", "perplexity": "exp(nats/token)"}
    numbers = {**results[0], **whole, "units": units, "estimators": results}
    numbers["comparisons"] = [{**asdict(comparison), "agree": comparison.agree} for comparison in comparisons]
    if material.stream is None:
        errors = np.sqrt(first.noise)
        numbers["continuations"] = [
            {"nats": float(n), "noise_se": float(e), "tokens": int(p)}
            for n, e, p in zip(first.nats, errors, first.tokens, strict=True)
        ]
    return numbers


def _show(numbers: dict, base: Baselines | None, console: Console) -> None:
    several = len(numbers["estimators"]) > 1
    table = Table(title=f"{numbers['split']}: {numbers['rows']} rows x {numbers['samples']} noise draws")
    for column in ("", "nats/token", "bits/byte", "perplexity", *(("+- by draws", "passes") if several else ())):
        table.add_column(column, justify="left" if not column else "right")
    for one in numbers["estimators"]:
        cells = [with_error(one[unit], one[unit + "_se"], digits) for unit, digits in UNITS.items()]
        if several:
            table.add_row(
                f"{one['estimator']} x {one['samples']}",
                *cells,
                f"{one['noise_se']:.4f}" if math.isfinite(one["noise_se"]) else "?",
                f"{one['passes']:,}",
            )
        else:
            table.add_row("model" if one["estimator"] == NEXT_TOKEN else "model (upper bound)", *cells)
    if base is not None:
        unigram = base.unigram_nats_per_token
        table.add_row("unigram", f"{unigram:.4f}", f"{base.unigram_bits_per_byte:.4f}", f"{math.exp(unigram):.2f}")
        table.add_row("gzip -9", "", f"{base.gzip_bits_per_byte:.4f}", "")
    console.print(table)
    for pair in numbers["comparisons"]:
        a, b = pair["between"]
        verdict = "agree" if pair["agree"] else "DISAGREE"
        if not math.isfinite(pair["standard_error"]):
            verdict = "cannot be compared: use more rows or more draws"
        console.print(f"{a} - {b}: {with_error(pair['difference'], pair['standard_error'], 4)}: {verdict}")
    if base is not None:
        better = 1 - numbers["nelbo"] / base.unigram_nats_per_token
        found = f"{better:.1%} below the unigram baseline" if better > 0 else "not better than the unigram baseline"
        console.print(found, highlight=False)
    if "nelbo_by_rate" in numbers:
        shares = ["-" if value is None else f"{value:.3f}" for value in numbers["nelbo_by_rate"]]
        line = f"nats/token by masking rate, in {len(shares)} steps from 0 to 1: {' '.join(shares)}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{numbers['policy']}; scored {numbers['tokens_scored']:,} of {numbers['tokens']:,} tokens "
        f"({numbers['bytes_scored']:,} of {numbers['bytes']:,} bytes), seed {numbers['seed']}",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip
    for reason, count in sorted(numbers["left_out"].items()):
        console.print(f"left out {count:,} records: {reason}", highlight=False)


def row_count(argument: str) -> int:
    """The value of --rows: a number, or all."""
    return sys.maxsize if argument == "all" else int(argument)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m mdmtrain.evaluate", description="NELBO of a checkpoint on held-out text.")
    add = parser.add_argument
    add("checkpoint", help="run folder (its newest checkpoint is used), checkpoint folder, or exported folder")
    inputs = (
        "prepared folders, text files, or files of JSON lines, Parquet or Arrow files whose records have 'text', "
        "'prompt' and 'response', or 'prefix' and 'continuation'; - is standard input (default: the data of the run)"
    )
    add("--data", nargs="+", metavar="PATH", help=inputs)
    add_format_option(parser)
    add_bad_record_option(parser)
    add("--split", default="validation", help="split of the prepared folders (default: validation)")
    add("--rows", type=row_count, help="evenly spaced rows (or documents) per set, or 'all' (default: eval.rows)")
    add(
        "--wrap",
        choices=["yes", "no"],
        default="yes",
        help="yes: documents are concatenated and cut into rows; no: one document per row (default: yes)",
    )
    add(
        "--long",
        choices=["split", "cut"],
        default="split",
        help="with --wrap no, what happens to documents longer than a row: split over several rows, or cut "
        "(default: split)",
    )
    add("--lines", action="store_true", help="every line of a text file is a document")
    add(
        "--estimator",
        nargs="+",
        choices=ESTIMATORS,
        default=["counted"],
        help="estimators of the NELBO; several are compared with each other (default: counted)",
    )
    add("--mc-num", "--samples", dest="samples", type=int, help="noise draws per row (default: the run's eval.samples)")
    add("--orders", type=int, default=4, help="orders per row, for --estimator orders (default: 4)")
    add("--eps", type=float, help="smallest rate, for --estimator continuous (default: the run's diffusion.eps)")
    add("--seed", type=int, help="seed of the noise (default: the run's eval.seed)")
    add(
        "--weights",
        choices=["average", "raw"],
        help="weight average or raw weights (default: the average, if the run has one)",
    )
    add("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_args(arguments)
    for option, value in (("rows", args.rows), ("mc-num", args.samples), ("orders", args.orders)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1")
    if args.eps is not None and not 0 < args.eps < 1:
        raise ValueError("--eps must be between 0 and 1")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ValueError("--seed must be 0 or more and below 2^63")
    world = init_world()
    loaded = load_model(args.checkpoint, args.weights, world)
    estimators = world.agree(lambda: choose_estimators(args, loaded))
    paths = args.data or world.agree(lambda: own_data(loaded))
    count = args.rows or loaded.config.eval.rows
    console = Console()
    results = []
    if args.json:
        survive_terminal()  # the results go to the file
    if world.is_main:
        console.print(str(loaded.folder), highlight=False)
    for path, name in zip(paths, set_names(paths, args.split), strict=True):
        opened = partial(open_material, path, name, args, count, loaded)
        material = world.agree(opened, main_only=True)  # only one rank has the standard input
        estimates = {
            one: estimate(loaded.model, material.rows, one, loaded.config.eval.batch, loaded.tokenizer.mask_id, world)
            for one in estimators
        }
        comparisons = compare(estimates)
        if world.is_main:
            base = None if material.stream is None else baselines(material.stream, loaded.tokenizer.decode)
            numbers = report(material, estimates, comparisons)
            results.append({**numbers, **(asdict(base) if base else {})})
            if args.json:
                write_json(args.json, {"checkpoint": str(loaded.folder), "results": results})
            _show(numbers, base, console)
            for pair in comparisons:
                if not pair.agree:
                    log.warning(
                        "%s: %s and %s differ by more than %g standard errors plus the effect of eps: one of them is "
                        "wrong, or there are too few rows to estimate the error",
                        material.name, *pair.between, MOST_ERRORS,
                    )  # fmt: skip


def write_json(file: Path, numbers: dict) -> None:
    """Write numbers as JSON. A value that is not finite becomes null."""
    whole = json.loads(json.dumps(numbers), parse_constant=lambda _: None)
    store.write_atomically(file, json.dumps(whole, indent=1) + "\n")


def own_data(loaded: LoadedModel) -> list[str]:
    """The data folders that the model was trained on. Raises ValueError if one is missing."""
    paths = [source.path for source in loaded.config.data.sources]
    for path in paths:
        if not is_prepared(path):
            raise ValueError(
                f"{loaded.folder}: its data folder {path} does not exist: give the data to evaluate with --data PATH"
            )
    return paths


def choose_estimators(args: argparse.Namespace, loaded: LoadedModel) -> list[Estimator]:
    """The estimators that the options select. Raises ValueError."""
    config = loaded.config
    draws = args.samples or config.eval.samples
    seed = config.eval.seed if args.seed is None else args.seed
    if loaded.model.shape.causal:
        if args.estimator != ["counted"]:
            raise ValueError(f"{loaded.folder} is a causal model with an exact likelihood: leave out --estimator")
        return [Estimator(NEXT_TOKEN, 1, seed, 0.0)]
    return [
        Estimator(name, args.orders if name == "orders" else draws, seed, args.eps or config.diffusion.eps)
        for name in dict.fromkeys(args.estimator)
    ]


def open_split(folder: str, split: str, loaded: LoadedModel) -> PreparedSplit:
    """A prepared split. Raises ValueError if its tokenizer is not the model's."""
    opened = PreparedSplit(folder, split, cache=shard_cache(loaded.config.data))
    if opened.tokenizer_sha256 != loaded.tokenizer.sha256:
        raise ValueError(
            f"{folder}: was prepared with another tokenizer than the model's: "
            "prepare it again, with the folder that the model was trained on as --tokenizer"
        )
    return opened


if __name__ == "__main__":
    with user_errors():
        main()
