"""Text from a trained model: start from mask tokens and unmask a few at a time.

    python -m mdmtrain.generate RUN_OR_CHECKPOINT [--prefix TEXT] [--suffix TEXT] [--gen-length N] [--steps N] [--watch]
    python -m mdmtrain.generate RUN_OR_CHECKPOINT --input FILE.jsonl --output FILE.jsonl

The sampler and its words are LLaDA's (arXiv 2502.09992, section 2.4 and appendix B): at each step every masked position
of the present block proposes a token, and the most confident proposals (or random ones) stay. Attention is
bidirectional, so text before and after a gap both count, and a text may have any number of gaps.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor, nn

from mdmtrain.checkpoint import store
from mdmtrain.data.text import pad_rows, read_records
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion import noise
from mdmtrain.diffusion.noise import Stream
from mdmtrain.likelihood import Estimate, Estimator, estimate
from mdmtrain.monitor.logs import CommandParser, output_file, user_errors
from mdmtrain.parallel.world import AgreedError, World, init_world

GAP = "<mask>"  # stands for a gap in an input file's texts
QUALITY_DRAWS = 32  # noise draws of a sample's NELBO
OnStep = Callable[[Tensor], None]  # the row of tokens after a step


@dataclass(frozen=True)
class Sampling:
    """How masks become tokens. Raises ValueError, in the command's words, for what cannot be."""

    gen_length: int  # tokens in each gap
    steps: int  # forward passes, spread evenly over the blocks; each unmasks an equal share of its block
    block_length: int  # a gap is filled block by block from the left, all gaps at once; gen_length: in any order
    temperature: float = 0.0  # 0: the most probable token
    cfg_scale: float = 0.0  # logits u + (cfg_scale + 1) (c - u), u those with every given token masked
    remasking: str = "low_confidence"  # low_confidence | random: which proposals are put back
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gen_length", "steps", "block_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        length, block = self.gen_length, self.block_length
        if length % block:
            fitting = ", ".join(str(n) for n in range(1, length + 1) if length % n == 0)
            raise ValueError(f"--block-length {block} does not divide --gen-length {length}: choose one of {fitting}")
        if self.steps % self.blocks:
            raise ValueError(
                f"--steps {self.steps} does not spread evenly over {self.blocks} blocks (--gen-length {length} / "
                f"--block-length {block}): make it a multiple of {self.blocks}"
            )
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError("--seed must be 0 or more and below 2^63")

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length


@torch.no_grad()
def unmask(
    model: nn.Module,
    ids: Tensor,
    mask_id: int,
    forbidden: list[int],
    sampling: Sampling,
    sample: int,
    eos: tuple[int, int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Replace every mask_id in a row of tokens by the model's choice.

    ids: int64 [L] on the model's device, its masks in gaps of gen_length; forbidden: ids never chosen. `sample` numbers
    the draw: the same (seed, sample) gives the same text on any number of ranks. eos: (id, first position where the
    text may end); all after an end that nothing can change any more is set to eos without further steps. Returns int64
    [L]. A collective under FSDP.
    """
    ids, given = ids.clone(), ids != mask_id
    gaps = (~given).nonzero().squeeze(1)
    block_of = torch.arange(len(gaps), device=ids.device) % sampling.gen_length // sampling.block_length
    number = 0
    for block in range(sampling.blocks):
        inside = gaps[block_of == block]
        steps = min(sampling.steps // sampling.blocks, len(inside))
        for step in range(steps):
            positions = inside[ids[inside] == mask_id]
            logits = _logits(model, ids, given, positions, mask_id, sampling.cfg_scale)
            logits[:, forbidden] = -math.inf
            if eos is not None:
                logits[positions < eos[1], eos[0]] = -math.inf
            bits = noise.philox(sampling.seed, Stream.GENERATION, number, sample)
            tokens, confidence = _propose(logits, sampling.temperature, bits)
            if sampling.remasking == "random":
                confidence = torch.from_numpy(noise.uniforms(bits, len(positions))).to(ids.device)
            share = len(inside) // steps + (step < len(inside) % steps)  # LLaDA's: what is over goes to the first steps
            keep = confidence.argsort(descending=True, stable=True)[:share]
            ids[positions[keep]] = tokens[keep]
            number += 1
            if eos is not None and _ended(ids, mask_id, *eos):
                return ids.masked_fill(ids == mask_id, eos[0])
            if on_step is not None:
                on_step(ids)
    return ids


def _logits(model: nn.Module, ids: Tensor, given: Tensor, positions: Tensor, mask_id: int, cfg_scale: float) -> Tensor:
    """The logits of some positions, guided away from what the model says without the given tokens: float64 [K, V]."""
    if cfg_scale == 0:
        return model(ids[None], positions).double()
    both = torch.stack([ids, ids.masked_fill(given, mask_id)])
    known, unknown = model(both, torch.cat([positions, positions + len(ids)])).double().chunk(2)
    return unknown + (cfg_scale + 1) * (known - unknown)


def _propose(logits: Tensor, temperature: float, bits: np.random.Philox) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [K, V] and the model's probability of it: int64 [K], float64 [K]."""
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:  # the Gumbel-max trick, in float64: in float32 it lowers the effective temperature (arXiv 2409.02908)
        uniform = torch.from_numpy(noise.uniforms(bits, logits.numel())).double().view_as(logits).to(logits.device)
        gumbel = -(-(uniform + 2.0**-25).log()).log()
        tokens = (logits / temperature + gumbel).argmax(dim=-1)
    return tokens, logits.softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)


def _ended(ids: Tensor, mask_id: int, eos_id: int, first: int) -> bool:
    """Whether there is an eos from `first` on with no mask before it."""
    stops = ((ids == mask_id) | ((ids == eos_id) & (torch.arange(len(ids), device=ids.device) >= first))).nonzero()
    return len(stops) > 0 and int(ids[stops[0]]) == eos_id


# ---- texts


@dataclass(frozen=True)
class Filled:
    """A text whose gaps the model has filled."""

    spans: list[str]  # what was given and what the model put between, in turn
    ids: list[int]  # up to the eos, where it ended
    generated: np.ndarray  # bool, same length: which tokens are the model's
    ended: bool  # by an eos, in its last gap


def never_chosen(loaded: store.LoadedModel) -> list[int]:
    """Ids that no text has inside: reserved ones but for eos, and the rows that only round the vocabulary up."""
    tokenizer = loaded.tokenizer
    unused = range(tokenizer.vocab_size, loaded.model.shape.vocab_size)
    return [*sorted(tokenizer.reserved - {tokenizer.eos_id}), *unused]


def layout(parts: Sequence[str | list[int]], tokenizer: Tokenizer, gen_length: int) -> list[int]:
    """bos, then the given parts, texts or tokens, with a gap of masks between each two."""
    encoded = [tokenizer.encode(part) if isinstance(part, str) else part for part in parts]
    ids = [tokenizer.bos_id, *encoded[0]]
    for part in encoded[1:]:
        ids += [tokenizer.mask_id] * gen_length + part
    return ids


def fill(
    loaded: store.LoadedModel,
    parts: Sequence[str | list[int]],
    sampling: Sampling,
    sample: int,
    world: World,
    on_step: OnStep | None = None,
) -> Filled:
    """The text of `parts` (texts or tokens) with the model's tokens in the gaps between them. A collective.

    Given texts come back as they are. The tokenizer spells a part the same wherever it stands, so the spans together
    are what the whole row of tokens spells, but for characters that the model cuts at the edge of a gap.
    """
    tokenizer = loaded.tokenizer
    row = torch.tensor(layout(parts, tokenizer, sampling.gen_length), device=world.device)
    # A document does not end between two given parts; with nothing after the last gap it may.
    first = len(row) - sampling.gen_length if not parts[-1] else len(row)
    end = (tokenizer.eos_id, first)
    ids = unmask(loaded.model, row, tokenizer.mask_id, never_chosen(loaded), sampling, sample, end, on_step).tolist()
    generated = (row == tokenizer.mask_id).cpu().numpy()
    ended = tokenizer.eos_id in ids[first:]
    length = ids.index(tokenizer.eos_id, first) + 1 if ended else len(ids)
    places = generated.nonzero()[0].reshape(-1, sampling.gen_length)
    gaps = [tokenizer.decode(ids[place] for place in gap if place < length) for gap in places]
    given = [part if isinstance(part, str) else tokenizer.decode(part) for part in parts]
    spans = [span for pair in zip(given, gaps, strict=False) for span in pair] + given[-1:]
    return Filled(spans, ids[:length], generated[:length], ended)


def quality(loaded: store.LoadedModel, texts: list[Filled], seed: int, world: World) -> tuple[Estimate, np.ndarray]:
    """The model's own NELBO of each text's generated tokens, the rest given, and the entropy of their frequencies.

    The latter is in nats, float64 [texts]: 0 where one token is repeated, at most ln of their number. Low NELBO means
    little by itself: repetition has it too. A collective.
    """
    rows = pad_rows([(text.ids, text.generated) for text in texts], loaded.tokenizer.pad_id)
    found = estimate(
        loaded.model, rows, Estimator("counted", QUALITY_DRAWS, seed, 0.0), loaded.config.eval.batch,
        loaded.tokenizer.mask_id, world,
    )  # fmt: skip
    entropies = []
    for text in texts:
        share = np.unique(np.array(text.ids)[text.generated], return_counts=True)[1] / text.generated.sum()
        entropies.append(-(share * np.log(share)).sum())
    return found, np.array(entropies)


def show_step(live: Live, given: list[int], loaded: store.LoadedModel, ids: Tensor) -> None:
    """A text on its way: what was given dim, what came out bold, a _ for each mask. given: the tokens at the start."""
    mask_id, text = loaded.tokenizer.mask_id, Text()
    styles = [
        "" if now == mask_id else "bold" if start == mask_id else "dim" for now, start in zip(ids, given, strict=True)
    ]
    for style, run in groupby(zip(styles, ids.tolist(), strict=True), key=lambda pair: pair[0]):
        run = [token for _, token in run]
        text.append(loaded.tokenizer.decode(run) if style else "_" * len(run), style)
    live.update(text, refresh=True)


# ---- command


def utf8_text(argument: str) -> str:
    """The type of an argument that is text: bytes that are not UTF-8 reach Python as surrogates, which are none."""
    argument.encode()
    return argument


def read_prompts(path: Path) -> list[tuple[str, dict, list[str]]]:
    """(place, record, parts with gaps between them) of every line. Raises ValueError naming the line."""
    if not path.is_file():
        raise ValueError(f"--input {path}: no such file: check the path")
    prompts = []
    for place, record in read_records(path):
        text, around = record.get("text"), [record.get("prefix", ""), record.get("suffix", "")]
        if isinstance(text, str) and GAP in text:
            prompts.append((place, record, text.split(GAP)))
        elif text is None and record.keys() & {"prefix", "suffix"} and all(isinstance(part, str) for part in around):
            prompts.append((place, record, around))
        else:
            raise ValueError(f"{place}: needs 'text' with {GAP} for every gap, or 'prefix' and 'suffix', all strings")
    return prompts


def check_lengths(prompts: list[tuple[str, dict, list[str]]], sampling: Sampling, loaded: store.LoadedModel) -> None:
    """Raise ValueError for the first prompt that does not fit the model with its gaps."""
    longest = loaded.config.data.sequence_length
    for place, _, parts in prompts:
        gaps = len(parts) - 1
        given = len(layout(parts, loaded.tokenizer, 0))
        if given + gaps * sampling.gen_length > longest:
            raise ValueError(
                f"{place}: the given text ({given} tokens with bos) and {gaps} x --gen-length {sampling.gen_length} "
                f"exceed the {longest} tokens that the model was trained on: shorten them"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m mdmtrain.generate", description="Generate or infill text.")
    add = parser.add_argument
    add("checkpoint", help="run folder (its newest checkpoint counts) or checkpoint folder")
    add("--prefix", type=utf8_text, default="", help="text before the gap")
    add("--suffix", type=utf8_text, default="", help="text after the gap")
    add("--input", type=Path, metavar="FILE", help=f"jsonl: 'prefix' and 'suffix', or 'text' with {GAP} for each gap")
    add("--output", type=output_file, metavar="FILE", help="jsonl: each sample's record with text, gaps and quality")
    add("--gen-length", type=int, default=32, help="tokens in each gap (default: 32)")
    add("--steps", type=int, help="forward passes (default: --gen-length)")
    add("--block-length", type=int, help="fill gaps block by block from the left (default: --gen-length, any order)")
    add("--temperature", type=float, default=0.0, help="0: most probable token (default)")
    add("--cfg-scale", type=float, default=0.0, help="guidance by the given text; doubles the work (default: 0, none)")
    add("--remasking", choices=["low_confidence", "random"], default="low_confidence")
    add("--samples", type=int, default=1, help="texts to generate for each prompt (default: 1)")
    add("--seed", type=int, default=0)
    add("--watch", action="store_true", help="show the text while it is unmasked")
    add("--weights", choices=["average", "raw"], help="default: the average where the run kept one")
    add("--json", type=output_file, metavar="FILE", help="also write settings, samples and their quality here")
    args = parser.parse_args(arguments)
    sampling = Sampling(
        args.gen_length, args.gen_length if args.steps is None else args.steps,
        args.gen_length if args.block_length is None else args.block_length,
        args.temperature, args.cfg_scale, args.remasking, args.seed,
    )  # fmt: skip
    if args.samples < 1:
        raise ValueError("--samples must be at least 1")
    if args.input and (args.prefix or args.suffix):
        raise ValueError("--input already has the texts: leave out --prefix and --suffix")
    given = {"prefix": args.prefix, "suffix": args.suffix}
    prompts = read_prompts(args.input) if args.input else [("the prompt", given, list(given.values()))]
    world = init_world()
    loaded = store.load_model(args.checkpoint, args.weights, world)
    if loaded.model.shape.causal:
        raise AgreedError(f"{loaded.folder} is a causal model, the autoregressive reference: it has no masks to fill")
    world.agree(lambda: check_lengths(prompts, sampling, loaded))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    texts = []
    live = Live(console=console, transient=True, auto_refresh=False) if args.watch and world.is_main else None
    with live or nullcontext():
        for number in range(len(prompts) * args.samples):
            parts = prompts[number // args.samples][2]
            follow = live and partial(show_step, live, layout(parts, loaded.tokenizer, sampling.gen_length), loaded)
            texts.append(fill(loaded, parts, sampling, number, world, follow))
            if world.is_main and not args.output:
                console.print(
                    *(Text(t, "dim" if i % 2 == 0 else "bold") for i, t in enumerate(texts[-1].spans)), sep=""
                )
    found, entropies = quality(loaded, texts, sampling.seed, world)
    if not world.is_main:
        return
    records = []
    for number, (text, nats, noise_variance) in enumerate(zip(texts, found.nats, found.noise, strict=True)):
        tokens = int(text.generated.sum())
        records.append({
            **prompts[number // args.samples][1], "sample": number % args.samples, "text": "".join(text.spans),
            "gaps": text.spans[1::2], "ended": text.ended, "tokens": tokens, "nelbo": float(nats) / tokens,
            "nelbo_noise_se": float(noise_variance) ** 0.5 / tokens, "token_entropy": float(entropies[number]),
        })  # fmt: skip
    console.print(
        f"{len(texts)} texts, {found.tokens.sum():,} tokens: NELBO {found.nelbo:.3f} +- {found.noise_error:.3f} "
        f"nats/token by the model itself, token entropy {entropies.mean():.3f} nats",
        style="dim",
    )
    if args.output:
        store.write_atomically(args.output, "".join(json.dumps(record) + "\n" for record in records))
    if args.json:
        overall = {"nelbo": found.nelbo, "nelbo_noise_se": found.noise_error, "token_entropy": float(entropies.mean())}
        result = {"checkpoint": str(loaded.folder), **asdict(sampling), **overall, "samples": records}
        store.write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
