#!/usr/bin/env python
"""Convert a trained model for other programs (--to), or import a model of another program for training (--from).

  tools/convert_ckpt.py runs/quickstart --to qwen3 --out runs/quickstart-qwen3     for transformers
  tools/convert_ckpt.py models/LLaDA-8B-Base --from llada --out runs/start         for checkpoint.init_from=runs/start

With --to, SRC is a run, a checkpoint or an exported folder. The conversion needs a few times the memory of the largest
tensor. The self-check after --to also loads the whole model, once with our code and once with the target's.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from mdmtrain.checkpoint import formats
from mdmtrain.checkpoint.export import cast, export, import_checkpoint
from mdmtrain.checkpoint.loading import open_any
from mdmtrain.checkpoint.storage import place
from mdmtrain.checkpoint.weights import DTYPES, Weights, open_folder
from mdmtrain.command import CommandParser, user_errors
from mdmtrain.data.lossless import ROLES
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.model.transformer import Transformer

CHECK_TOKENS = 32
TOLERANCE = 1e-4  # relative to the largest logit in float32; sums may be computed in another order
CHECK_TEXT = Path(__file__).read_text()


def byte_size(argument: str) -> int:
    """The bytes of a size argument: 5GB, 200MB, 1000KB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", argument.upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a size: write it as 5GB, 200MB or 1000KB")
    return int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]])


# ---- the self-check


def self_check(folder: Path, weights: Weights, target: str, dtype: str) -> list[str]:
    """Compare an exported folder with its source. Returns lines of a report. Raises ValueError if they differ."""
    tokenizer = Tokenizer(weights.tokenizer, str(folder))
    found = []
    again = open_folder(folder, target)
    names = formats.tensor_shapes(weights.shape)
    if replace(again.shape, causal=weights.shape.causal) != weights.shape:
        raise ValueError(f"self-check: {folder} describes another model: {again.shape}")
    for name in names:
        if not torch.equal(again.read(name), cast(weights.read(name), dtype, name)):
            raise ValueError(f"self-check: {name} has other values in the folder")
    found.append(f"{len(names)} tensors read back, with equal hashes and values")
    if has_transformers():
        found.append(compare_tokenizer(folder, tokenizer))
    ids = torch.arange(CHECK_TOKENS)[None] * 7919 % tokenizer.vocab_size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % tokenizer.vocab_size
    ours = our_logits(weights, dtype, ids)
    if target in formats.TRANSFORMERS:
        theirs = transformers_logits(folder, ids, other)
        if theirs is None:
            return [*found, "logits not compared: pip install 'mdmtrain[transformers]'"]
    else:
        theirs = our_logits(again, "float32", torch.cat([ids, other])).chunk(2)
    difference = float((theirs[0] - ours).abs().max())
    largest = float(ours.abs().max())
    if not difference <= TOLERANCE * largest:
        raise ValueError(f"self-check: logits differ by {difference:.3g}, the largest is {largest:.3g}")
    found.append(f"logits equal: largest difference {difference:.3g} of {largest:.3g}")
    seen = float((theirs[0][0, 0] - theirs[1][0, 0]).abs().max())
    if (seen > 0) == weights.shape.causal:
        raise ValueError(f"self-check: the last token changes the first logits by {seen:.3g}: wrong attention")
    found.append(f"attention is correct: the last token changes the first logits by {seen:.3g}")
    return found


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


@torch.no_grad()
def our_logits(weights: Weights, dtype: str, ids: Tensor) -> Tensor:
    """Logits of weights rounded to `dtype`, computed in float32 by our model: float32 [B, L, V]. ids: int64 [B, L]."""
    with torch.device("meta"):
        model = Transformer(weights.shape, 4096)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(cast(weights.read(name), dtype, name))
    return model(ids, torch.arange(ids.numel())).view(*ids.shape, -1)


@torch.no_grad()
def transformers_logits(folder: Path, *batches: Tensor) -> list[Tensor] | None:
    """The logits of transformers for each batch, or None if it is not installed. Raises ValueError if it is too old."""
    if not has_transformers():
        return None
    installed = importlib.metadata.version("transformers")
    least = formats.MINIMUM_TRANSFORMERS
    if [int(n) for n in installed.split(".")[:2]] < [int(n) for n in least.split(".")[:2]]:
        raise ValueError(
            f"self-check: transformers {installed} is installed, and would load this folder with causal attention: "
            f"install {least} or newer, or skip the check with --no-check"
        )
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(input_ids=ids).logits for ids in batches]


def compare_tokenizer(folder: Path, tokenizer: Tokenizer) -> str:
    """Compare the tokenizer that transformers loads from a folder with ours. Raises ValueError if they differ.

    It compares the ids of texts, including one with all special and user-defined tokens, and the id of every token.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    count = 0
    for text in (CHECK_TEXT, *tokenizer.probes()):
        ids = tokenizer.encode(text)
        if theirs.encode(text, add_special_tokens=False) != ids or theirs.decode(ids) != text:
            raise ValueError(
                "self-check: transformers gives other token ids than ours: this tokenizer cannot be exported"
            )
        count += len(ids)
    for number, piece in enumerate(tokenizer.raw_pieces()):
        if piece and theirs.convert_tokens_to_ids(piece) != number:
            raise ValueError(f"self-check: transformers gives {piece!r} another id than {number}")
    for role in ROLES:
        if getattr(theirs, f"{role}_token_id") != getattr(tokenizer, f"{role}_id"):
            raise ValueError(f"self-check: transformers has another {role} token")
    return f"tokenizer gives the same {count} ids for texts, and every token has the same id"


# ---- command


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="tools/convert_ckpt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=place, metavar="SRC", help="run, checkpoint or model folder")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=list(formats.MODEL_TYPES), help="export SRC to a folder in this format")
    way.add_argument(
        "--from",
        dest="origin",
        choices=list(formats.MODEL_TYPES),
        help="import SRC, a folder in this format, into a checkpoint",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="dtype of the exported tensors (default: %(default)s)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        default="5GB",
        metavar="SIZE",
        help="largest size of a safetensors file (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        choices=["average", "raw"],
        help="weight average or raw weights (default: the average, if the run has one)",
    )
    parser.add_argument("--no-check", action="store_true", help="skip the self-check, which loads the whole model")
    args = parser.parse_args(arguments)
    source = open_folder(args.source, args.origin) if args.origin else open_any(args.source, args.weights)
    report: list[str] = []

    def check(folder: Path) -> None:
        if not args.no_check:
            report.extend(self_check(folder, source, args.to, args.dtype))

    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("converting", total=source.shape.parameters())

        def advance(values: int) -> None:
            bar.advance(task, values)

        if args.origin:
            import_checkpoint(source, args.out, advance)
        else:
            export(source, args.to, args.out, args.dtype, args.max_shard_size, check, advance)
    print(f"wrote {args.out}: {source.shape.parameters():,} parameters from {source.place}")
    for line in report:
        print(f"self-check: {line}")
    if args.origin and source.changes:
        print(f"changed for masked diffusion: {'; '.join(source.changes)}")
    if args.origin:
        print(f"start from it with checkpoint.init_from={args.out} model='{json.dumps(asdict(source.shape))}'")
        print(f"and data prepared with --tokenizer {args.out}")


if __name__ == "__main__":
    with user_errors():
        main()
