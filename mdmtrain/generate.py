"""Text from a trained model: start from mask tokens and unmask a few at a time.

    python -m mdmtrain.generate RUN_OR_CHECKPOINT [--prefix TEXT] [--suffix TEXT] [--length N] [--steps N] [--json FILE]

The sampler is LLaDA's (arXiv 2502.09992, section 2.4): at each step every masked position proposes a token, and the
most confident proposals (or random ones) stay. Attention is bidirectional, so text before and after a gap both count.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from mdmtrain.checkpoint import store
from mdmtrain.diffusion import noise
from mdmtrain.diffusion.noise import Stream
from mdmtrain.monitor.logs import CommandParser, output_file, user_errors
from mdmtrain.parallel.world import AgreedError, World, init_world


@dataclass(frozen=True)
class Sampling:
    """How masks become tokens."""

    steps: int  # forward passes; each unmasks an equal share of the gap
    temperature: float  # 0: the most probable token
    remasking: str  # low_confidence | random: which proposals are put back
    seed: int


@torch.no_grad()
def unmask(
    model: nn.Module, ids: Tensor, mask_id: int, forbidden: list[int], sampling: Sampling, sample: int
) -> Tensor:
    """Replace every mask_id in a row of tokens by the model's choice.

    ids: int64 [L] on the model's device; forbidden: ids never chosen. `sample` numbers the draw: the same
    (seed, sample) gives the same text on any number of ranks. Returns int64 [L]. A collective under FSDP.
    """
    ids = ids.clone()
    gaps = int((ids == mask_id).sum())
    steps = min(sampling.steps, gaps)
    for step in range(steps):
        positions = (ids == mask_id).nonzero().squeeze(1)
        logits = model(ids[None], positions).double()
        logits[:, forbidden] = -math.inf
        bits = noise.philox(sampling.seed, Stream.GENERATION, step, sample)
        tokens, confidence = _propose(logits, sampling.temperature, bits)
        if sampling.remasking == "random":
            confidence = torch.from_numpy(noise.uniforms(bits, len(positions))).to(ids.device)
        remaining = gaps * (steps - step - 1) // steps
        keep = confidence.argsort(descending=True, stable=True)[: len(positions) - remaining]
        ids[positions[keep]] = tokens[keep]
    return ids


def _propose(logits: Tensor, temperature: float, bits: np.random.Philox) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [K, V] and the model's probability of it: int64 [K], float64 [K]."""
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:  # the Gumbel-max trick, in float64: in float32 it lowers the effective temperature (arXiv 2409.02908)
        uniform = torch.from_numpy(noise.uniforms(bits, logits.numel())).double().view_as(logits).to(logits.device)
        gumbel = -(-(uniform + 2.0**-25).log()).log()
        tokens = (logits / temperature + gumbel).argmax(dim=-1)
    return tokens, logits.softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)


def infill(
    loaded: store.LoadedModel, prefix: str, suffix: str, length: int, sampling: Sampling, sample: int, world: World
) -> str:
    """The text that the model puts between prefix and suffix. Raises ValueError where it does not fit the model."""
    tokenizer = loaded.tokenizer
    before, after = [tokenizer.bos_id, *tokenizer.encode(prefix)], tokenizer.encode(suffix)
    longest = loaded.config.data.sequence_length
    if len(before) + length + len(after) > longest:
        raise AgreedError(
            f"prefix ({len(before)} tokens with bos), --length {length} and suffix ({len(after)}) exceed the "
            f"{longest} tokens that the model was trained on: shorten them"
        )
    ids = torch.tensor(before + [tokenizer.mask_id] * length + after, device=world.device)
    # Between a prefix and a suffix a document neither starts nor ends; without a suffix it may end (eos).
    forbidden = [tokenizer.mask_id, tokenizer.pad_id, tokenizer.bos_id] + ([tokenizer.eos_id] if after else [])
    forbidden += list(range(tokenizer.vocab_size, loaded.model.shape.vocab_size))
    filled = unmask(loaded.model, ids, tokenizer.mask_id, forbidden, sampling, sample).tolist()
    gap = filled[len(before) : len(before) + length]
    if tokenizer.eos_id in gap:
        gap = gap[: gap.index(tokenizer.eos_id)]
    return tokenizer.decode(gap)


def utf8_text(argument: str) -> str:
    """The type of an argument that is text: bytes that are not UTF-8 reach Python as surrogates, which are none."""
    argument.encode()
    return argument


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m mdmtrain.generate", description="Generate or infill text.")
    parser.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint counts) or checkpoint folder")
    parser.add_argument("--prefix", type=utf8_text, default="", help="text before the gap")
    parser.add_argument("--suffix", type=utf8_text, default="", help="text after the gap")
    parser.add_argument("--length", type=int, default=32, help="tokens in the gap (default: 32)")
    parser.add_argument("--steps", type=int, help="forward passes (default: one for each token)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: most probable token (default)")
    parser.add_argument("--remasking", choices=["low_confidence", "random"], default="low_confidence")
    parser.add_argument("--samples", type=int, default=1, help="texts to generate (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=["average", "raw"], help="default: the average where the run kept one")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the texts here")
    args = parser.parse_args(arguments)
    for option in ("length", "samples", "steps"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError("--temperature must be 0 or more")
    if not 0 <= args.seed < 2**63:
        raise ValueError("--seed must be 0 or more and below 2^63")
    world = init_world()
    loaded = store.load_model(args.checkpoint, args.weights, world)
    if loaded.model.shape.causal:
        raise AgreedError(f"{loaded.folder} is a causal model, the autoregressive reference: it has no masks to fill")
    sampling = Sampling(args.steps or args.length, args.temperature, args.remasking, args.seed)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    texts = []
    for sample in range(args.samples):
        texts.append(infill(loaded, args.prefix, args.suffix, args.length, sampling, sample, world))
        if world.is_main:
            console.print(args.prefix, end="", style="dim")
            console.print(texts[-1], end="", style="bold")
            console.print(args.suffix, style="dim")
    if args.json and world.is_main:
        settings = {"prefix": args.prefix, "suffix": args.suffix, "length": args.length, **asdict(sampling)}
        result = {"checkpoint": str(loaded.folder), **settings, "texts": texts}
        store.write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
