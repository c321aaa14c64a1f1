"""Generate or infill text: start from mask tokens, and unmask a few at each step.

    python -m mdmtrain.generate RUN_OR_CHECKPOINT [--prefix TEXT] [--suffix TEXT] [--gen-length N] [--steps N] [--watch]
    python -m mdmtrain.generate RUN_OR_CHECKPOINT --input FILE --output FILE.jsonl

The sampler is in `unmask.py`. Attention is bidirectional, so the model uses the text before and after a gap. A text may
have any number of gaps.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.loading import LoadedModel, load_model
from mdmtrain.command import CommandParser, output_file, survive_terminal, user_errors
from mdmtrain.data.inputs import open_name
from mdmtrain.data.records import BadRecord, Reading, add_bad_record_option, present, read_records, string_field
from mdmtrain.data.text import pad_rows
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.files import writing
from mdmtrain.likelihood import Estimate, Estimator, estimate
from mdmtrain.parallel.world import AgreedError, World, init_world
from mdmtrain.unmask import MaskedRow, OnStep, Sampling, unmask_rows

GAP = "<mask>"  # marks a gap in the texts of an input file
QUALITY_DRAWS = 32  # noise draws for the NELBO of a sample


# ---- texts


@dataclass(frozen=True)
class Filled:
    """A text whose gaps the model has filled."""

    spans: list[str]  # given and generated text in turn
    ids: list[int]  # tokens, up to and with the eos if there is one
    generated: np.ndarray  # bool, same length: which tokens were generated
    ended: bool  # whether the last gap has an eos


def never_chosen(loaded: LoadedModel) -> list[int]:
    """Ids that cannot be part of a text: reserved tokens except eos, and the unused rows of the embedding."""
    tokenizer = loaded.tokenizer
    unused = range(tokenizer.vocab_size, loaded.model.shape.vocab_size)
    return [*sorted(tokenizer.reserved - {tokenizer.eos_id}), *unused]


def layout(parts: Sequence[str | list[int]], tokenizer: Tokenizer, gaps: Sequence[int]) -> list[int]:
    """The tokens of a row: bos, then the given parts (texts or tokens) with a gap of masks between each two.

    gaps: the number of tokens in each gap.
    """
    encoded = [tokenizer.encode(part) if isinstance(part, str) else part for part in parts]
    ids = [tokenizer.bos_id, *encoded[0]]
    for length, part in zip(gaps, encoded[1:], strict=True):
        ids += [tokenizer.mask_id] * length + part
    return ids


@dataclass(frozen=True)
class Prompt:
    """A text with gaps, and the settings to fill them with."""

    place: str  # where it comes from, for messages
    record: dict  # the fields of the input record
    parts: Sequence[str | list[int]]  # given texts or tokens, with a gap between each two
    gaps: tuple[int, ...]  # number of tokens in each gap
    sampling: Sampling


def fill(
    loaded: LoadedModel,
    parts: Sequence[str | list[int]],
    sampling: Sampling,
    sample: int,
    world: World,
    on_step: OnStep | None = None,
) -> Filled:
    """Fill the gaps between `parts` (texts or tokens). A collective.

    Given texts are returned unchanged. The tokenizer decodes a part in the same way at any place, so the concatenated
    spans are the text of the whole row, except for characters that the model has cut at the edge of a gap.
    """
    prompt = Prompt("the prompt", {}, parts, (sampling.gen_length,) * (len(parts) - 1), sampling)
    return fill_batch(loaded, [(prompt, sample)], world, on_step)[0]


def fill_batch(
    loaded: LoadedModel, batch: Sequence[tuple[Prompt, int]], world: World, on_step: OnStep | None = None
) -> list[Filled]:
    """Fill several prompts in shared forward passes. batch: (prompt, number of its draw) pairs. A collective."""
    tokenizer = loaded.tokenizer
    rows = []
    for prompt, sample in batch:
        ids = torch.tensor(layout(prompt.parts, tokenizer, prompt.gaps), device=world.device)
        # The text may end in the last gap if nothing follows that gap, but never between two given parts.
        first = len(ids) - prompt.gaps[-1] if not prompt.parts[-1] else len(ids)
        rows.append(MaskedRow(ids, prompt.sampling, sample, prompt.gaps, (tokenizer.eos_id, first)))
    filled = unmask_rows(loaded.model, rows, tokenizer.mask_id, never_chosen(loaded), on_step)
    return [
        as_text(prompt, row, ids.tolist(), tokenizer) for (prompt, _), row, ids in zip(batch, rows, filled, strict=True)
    ]


def as_text(prompt: Prompt, row: MaskedRow, ids: list[int], tokenizer: Tokenizer) -> Filled:
    """Convert a filled row to text, up to the eos if there is one."""
    generated = (row.ids == tokenizer.mask_id).cpu().numpy()
    assert row.eos is not None, "fill_batch sets it"
    first = row.eos[1]
    ended = tokenizer.eos_id in ids[first:]
    length = ids.index(tokenizer.eos_id, first) + 1 if ended else len(ids)
    gaps = [
        tokenizer.decode(ids[place] for place in places if place < length)
        for places in np.split(generated.nonzero()[0], np.cumsum(prompt.gaps)[:-1])
    ]
    given = [part if isinstance(part, str) else tokenizer.decode(part) for part in prompt.parts]
    spans = [span for pair in zip(given, gaps, strict=False) for span in pair] + given[-1:]
    return Filled(spans, ids[:length], generated[:length], ended)


def quality(loaded: LoadedModel, text: Filled, seed: int, world: World) -> tuple[Estimate, float]:
    """The NELBO of the generated tokens given the rest, under the same model, and the entropy of their frequencies.

    The entropy is in nats: 0 if one token is repeated, at most ln of the number of tokens. Repetition also has a low
    NELBO, so read both numbers together. A collective.
    """
    rows = pad_rows([(text.ids, text.generated)], loaded.tokenizer.pad_id)
    found = estimate(
        loaded.model, rows, Estimator("counted", QUALITY_DRAWS, seed, 0.0), loaded.config.eval.batch,
        loaded.tokenizer.mask_id, world,
    )  # fmt: skip
    share = np.unique(np.array(text.ids)[text.generated], return_counts=True)[1] / text.generated.sum()
    return found, float(-(share * np.log(share)).sum())


def result(prompt: Prompt, sample: int, text: Filled, found: Estimate, entropy: float) -> dict:
    """A line of the output: the fields of the input record, then the results.

    A field of the input that has the name of a result is moved into the field "input".
    """
    tokens = int(text.generated.sum())
    results = {
        "sample": sample, "text": "".join(text.spans), "gaps": text.spans[1::2], "ended": text.ended, "tokens": tokens,
        "nelbo": found.nelbo, "nelbo_noise_se": found.noise_error, "token_entropy": entropy,
    }  # fmt: skip
    taken = {name: value for name, value in prompt.record.items() if name in results or name == "input"}
    return {**prompt.record, **results, **({"input": taken} if taken else {})}


def show_step(live: Live, given: list[int], loaded: LoadedModel, ids: Tensor) -> None:
    """Show a text while it is generated: given text dim, generated text bold, _ for a mask. given: the first tokens."""
    mask_id = loaded.tokenizer.mask_id
    text = Text()
    styles = []
    for now, start in zip(ids, given, strict=True):
        if now == mask_id:
            styles.append("")
        else:
            styles.append("bold" if start == mask_id else "dim")
    for style, run in groupby(zip(styles, ids.tolist(), strict=True), key=lambda pair: pair[0]):
        run = [token for _, token in run]
        text.append(loaded.tokenizer.decode(run) if style else "_" * len(run), style)
    live.update(text, refresh=True)


# ---- command


def utf8_text(argument: str) -> str:
    """The value of a text argument. Raises UnicodeEncodeError for bytes that are not UTF-8 (surrogates in Python)."""
    argument.encode()
    return argument


def parts_around_gaps(fields: dict) -> tuple[dict, list[str]]:
    """A record, and its given parts, which have gaps between them. Raises BadRecord."""
    wanted = f"every record needs 'text' with {GAP} for every gap, or 'prefix' and 'suffix', or 'prompt', all strings"
    around = present(fields, "prefix", "suffix")
    if present(fields, "text"):
        parts = string_field(fields, "text", wanted).split(GAP)
        if len(parts) == 1:
            raise BadRecord(f"a 'text' without {GAP}", f": {wanted}")
    elif around:
        parts = [string_field(fields, name, wanted) if name in around else "" for name in ("prefix", "suffix")]
    elif present(fields, "prompt"):
        parts = [string_field(fields, "prompt", wanted), ""]
    else:
        raise BadRecord("no text to fill", f": {wanted}")
    try:
        json.dumps(fields)  # the output repeats the record
    except TypeError as error:  # of a table: times, bytes
        raise BadRecord("a column that JSON cannot hold", f" ({error}): convert or remove it") from None
    return fields, parts


def read_prompts(name: str, reading: Reading) -> list[tuple[str, dict, list[str]]]:
    """(place, record, given parts) of every record of an input. Raises ValueError that names the line or the row."""
    found = read_records(open_name(name), reading, parts_around_gaps)
    prompts = [(str(place), record, parts) for (record, parts), place, _ in found]
    if not prompts:
        raise ValueError(f"{name}: has no usable record: {', '.join(reading.left_out)}")
    return prompts


def temperature(text: str) -> float:
    """The value of --temperature. A number that is rounded to 0 is an error."""
    try:
        value = float(text)
        exact = Decimal(text)
    except (ValueError, InvalidOperation):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if value == 0 and exact != 0:
        raise argparse.ArgumentTypeError(f"{text} is too small to differ from 0: give 0 for the most probable token")
    return value


def gap_lengths(place: str, record: dict, parts: Sequence, wanted: list[int]) -> tuple[int, ...]:
    """The number of tokens in each gap of a text, from the record's "gen_length" or else from --gen-length.

    Either is one number, or one for each gap. Raises ValueError.
    """
    own = record.get("gen_length")
    count = len(parts) - 1
    if own is None:
        lengths = wanted
        name = "--gen-length"
        where = ""
    else:
        lengths = own if isinstance(own, list) else [own]
        name = "'gen_length'"
        where = f"{place}: "
    if not lengths or not all(type(length) is int and length >= 1 for length in lengths):
        raise ValueError(f"{where}{name} must be a whole number of at least 1, or one such number for each gap")
    if len(lengths) not in (1, count):
        raise ValueError(f"{place}: {name} has {len(lengths)} numbers for {count} gaps: give one, or one for each gap")
    return tuple(lengths * count if len(lengths) == 1 else lengths)


def check_lengths(prompts: list[Prompt], loaded: LoadedModel) -> None:
    """Raise ValueError for the first prompt that is, with its gaps, longer than the model's rows."""
    longest = loaded.config.data.sequence_length
    for prompt in prompts:
        whole = len(layout(prompt.parts, loaded.tokenizer, prompt.gaps))
        if whole > longest:
            equal = len(set(prompt.gaps)) == 1
            gaps = f"{len(prompt.gaps)} x --gen-length {prompt.gaps[0]}" if equal else f"gaps of {prompt.gaps} tokens"
            raise ValueError(
                f"{prompt.place}: the given text ({whole - sum(prompt.gaps)} tokens with bos) and {gaps} "
                f"exceed the {longest} tokens that the model was trained on: shorten them"
            )


def as_prompt(args: argparse.Namespace, place: str, record: dict, parts: list[str]) -> Prompt:
    """The prompt of a record, with the settings of the command line. Raises ValueError."""
    gaps = gap_lengths(place, record, parts, args.gen_length)
    longest = max(gaps)
    sampling = Sampling(
        longest, longest if args.steps is None else args.steps,
        longest if args.block_length is None else args.block_length,
        args.temperature, args.cfg_scale, args.remasking, args.seed, args.top_k, args.top_p, args.eos,
    )  # fmt: skip
    return Prompt(place, record, parts, gaps, sampling)


def parser() -> CommandParser:
    made = CommandParser(prog="python -m mdmtrain.generate", description="Generate or infill text.")
    add = made.add_argument
    add("checkpoint", help="run folder (its newest checkpoint is used), checkpoint folder, or exported folder")
    add("--prefix", type=utf8_text, default="", help="text before the gap")
    add("--suffix", type=utf8_text, default="", help="text after the gap")
    fields = f"'prefix' and 'suffix', or 'prompt', or 'text' with {GAP} for each gap"
    add(
        "--input",
        metavar="FILE",
        help=f"JSON lines (also compressed), Parquet or Arrow file, or URL of one; each record has {fields}; - is "
        "standard input",
    )
    add_bad_record_option(made)
    add(
        "--output",
        type=output_file,
        metavar="FILE",
        help="write a JSON line to this file for each generated text, when it is finished",
    )
    add(
        "--gen-length",
        type=int,
        nargs="+",
        default=[32],
        metavar="N",
        help="tokens in each gap: one number, or one for each gap; 'gen_length' in a record overrides it (default: 32)",
    )
    add("--steps", type=int, help="number of forward passes (default: the length of the longest gap)")
    add(
        "--block-length",
        type=int,
        help="fill gaps from left to right in blocks of this length (default: the whole gap in any order)",
    )
    add(
        "--temperature", type=temperature, default=0.0, help="sampling temperature; 0: most probable token (default: 0)"
    )
    add("--top-k", type=int, metavar="K", help="draw among the K most probable tokens (default: all)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the fewest most probable tokens with total probability P (default: 1)",
    )
    add(
        "--eos",
        choices=["any", "last", "never"],
        default="any",
        help="how the end-of-text token is chosen: any: like other tokens; last: only when no other proposal is left; "
        "never (default: any)",
    )
    add(
        "--cfg-scale",
        type=float,
        default=0.0,
        help="strength of classifier-free guidance by the given text; doubles the work (default: 0, none)",
    )
    add(
        "--remasking",
        choices=["low_confidence", "random"],
        default="low_confidence",
        help="which proposals are masked again at each step (default: low_confidence)",
    )
    add("--samples", type=int, default=1, help="texts to generate for each prompt (default: 1)")
    add("--batch", type=int, default=8, metavar="N", help="texts in one forward pass (default: 8)")
    add("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")
    add("--watch", action="store_true", help="show each text while it is generated, one at a time")
    add(
        "--weights",
        choices=["average", "raw"],
        help="weight average or raw weights (default: the average, if the run has one)",
    )
    add("--json", type=output_file, metavar="FILE", help="write settings, samples and their quality to this file too")
    return made


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, if their values fit together. Raises ValueError."""
    for name in ("samples", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if args.input is not None and (args.prefix or args.suffix):
        raise ValueError("--input cannot be combined with --prefix or --suffix: the texts are in the input file")
    return args


def wanted_prompts(args: argparse.Namespace, reading: Reading, world: World) -> list[Prompt]:
    """The prompts of the input file, or the one of the command line. A collective. Raises AgreedError."""
    given = {"prefix": args.prefix, "suffix": args.suffix}
    read = [("the prompt", given, list(given.values()))]
    if args.input is not None:  # only one rank reads, because only one rank has the standard input
        read = world.agree(lambda: read_prompts(args.input, reading), main_only=True)
    return world.agree(lambda: [as_prompt(args, *one) for one in read])


def generate(
    prompts: list[Prompt], args: argparse.Namespace, loaded: LoadedModel, world: World, console: Console
) -> tuple[list[dict], list[Estimate]]:
    """Fill each prompt --samples times, and write or print each text when its batch is done.

    Returns the output record and the NELBO of each text. A collective.
    """
    draws = [(prompt, number) for number, prompt in enumerate(p for p in prompts for _ in range(args.samples))]
    size = 1 if args.watch else args.batch
    results: list[dict] = []
    estimates: list[Estimate] = []
    with ExitStack() as stack:
        live = None
        if args.watch and world.is_main:
            live = stack.enter_context(Live(console=console, transient=True, auto_refresh=False))
        output = None
        for start in range(0, len(draws), size):
            batch = draws[start : start + size]
            prompt = batch[0][0]
            follow = None
            if live is not None:
                follow = partial(show_step, live, layout(prompt.parts, loaded.tokenizer, prompt.gaps), loaded)
            texts = fill_batch(loaded, batch, world, follow)
            if args.output and world.is_main and output is None:  # not before: an earlier error keeps an old file
                output = stack.enter_context(open(args.output, "w", encoding="utf-8"))
            for (prompt, number), text in zip(batch, texts, strict=True):
                found, entropy = quality(loaded, text, (args.seed + number) % 2**63, world)
                estimates.append(found)
                results.append(result(prompt, number % args.samples, text, found, entropy))
                if output is not None:
                    with writing(args.output):
                        output.write(json.dumps(results[-1]) + "\n")
                        output.flush()
                elif world.is_main:
                    styled = (Text(t, "dim" if i % 2 == 0 else "bold") for i, t in enumerate(text.spans))
                    console.print(*styled, sep="")
    return results, estimates


def report(
    results: list[dict], estimates: list[Estimate], prompts: list[Prompt], args: argparse.Namespace, folder: Path,
    console: Console,
) -> None:  # fmt: skip
    """Print the quality of all texts together, and write it with the texts to --json. folder: the checkpoint."""
    whole = Estimate(
        nats=np.concatenate([one.nats for one in estimates]),
        noise=np.concatenate([one.noise for one in estimates]),
        tokens=np.concatenate([one.tokens for one in estimates]),
        passes=sum(one.passes for one in estimates),
    )
    overall = {
        "nelbo": whole.nelbo, "nelbo_noise_se": whole.noise_error,
        "token_entropy": float(np.mean([one["token_entropy"] for one in results])),
    }  # fmt: skip
    if args.json:
        settings = asdict(prompts[0].sampling)
        numbers = {"checkpoint": str(folder), **settings, **overall, "samples": results}
        store.write_atomically(args.json, json.dumps(numbers, indent=1) + "\n")
    console.print(
        f"{len(results)} texts, {whole.tokens.sum():,} tokens: NELBO {whole.nelbo:.3f} +- {whole.noise_error:.3f} "
        f"nats/token under the same model, token entropy {overall['token_entropy']:.3f} nats",
        style="dim",
    )


def main(arguments: list[str] | None = None) -> None:
    args = checked(parser().parse_args(arguments))
    reading = Reading(args.on_bad_record, "jsonl")  # for any file name, because plain text has no gaps
    if args.output or args.json:
        survive_terminal()  # the results go to the file
    world = init_world()
    prompts = wanted_prompts(args, reading, world)
    loaded = load_model(args.checkpoint, args.weights, world)
    if loaded.model.shape.causal:
        raise AgreedError(f"{loaded.folder} is a causal model, which cannot fill masks: use a masked diffusion model")
    world.agree(lambda: check_lengths(prompts, loaded))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    results, estimates = generate(prompts, args, loaded, world, console)
    if world.is_main:
        report(results, estimates, prompts, args, loaded.folder, console)
        for line in reading.summary():
            console.print(line)


if __name__ == "__main__":
    with user_errors():
        main()
