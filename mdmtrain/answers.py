"""Measure how many prompts a model answers exactly right, and the NELBO of the right answers.

    python -m mdmtrain.answers RUN_OR_CHECKPOINT --tasks FILE.jsonl [--json FILE]

FILE has 'prompt', 'response' and 'kind' on every line; tools/make_tasks.py writes such files. Answers are generated
greedily. They have the same number of tokens as the right response with its eos. A masked diffusion model starts from
masks and unmasks its most confident token at each forward pass. An autoregressive model generates from left to right.
An answer is right if its text equals the response and ends with eos.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.loading import LoadedModel, load_model
from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.data.inputs import open_name
from mdmtrain.data.records import BadRecord, Reading, read_records, string_field
from mdmtrain.data.tasks import Task
from mdmtrain.data.text import pad_rows
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.generate import never_chosen
from mdmtrain.likelihood import NEXT_TOKEN, Estimator, estimate
from mdmtrain.model.transformer import Transformer
from mdmtrain.parallel.world import World, init_world
from mdmtrain.unmask import MaskedRow, Sampling, unmask_rows

BATCH = 300  # prompts in one batch
DRAWS = 8  # noise draws for the NELBO of a response
NOISE_SEED = 0


@dataclass(frozen=True)
class Score:
    """The result of a model on a file of tasks."""

    checkpoint: str
    tasks: str  # sha256 of the file
    accuracy: float  # share of the prompts that are answered exactly right
    by_kind: dict[str, float]
    nelbo: float  # nats per token of the right responses with eos; exact for an autoregressive model
    nelbo_se: float  # standard error over the tasks
    right: str  # "1" or "0" for each task


@torch.no_grad()
def continue_greedily(model: Transformer, rows: list[Tensor], lengths: list[int], forbidden: list[int]) -> list[Tensor]:
    """Extend each row greedily with a causal model, by one token per forward pass of all rows.

    rows: int64 [L] on the model's device, L may differ; lengths: number of tokens to add to each row; forbidden: ids
    that are never chosen. Returns int64 [L + length] for each row. A collective under FSDP.
    """
    starts = torch.tensor([len(row) for row in rows], device=rows[0].device)
    # Padding comes after a row, so a causal model does not see it.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, max(lengths)))
    first = torch.arange(len(rows), device=ids.device) * ids.shape[1]
    for step in range(max(lengths)):  # a complete row gets more tokens, which are cut off below
        logits = model(ids, first + starts + step - 1)
        logits[:, forbidden] = -torch.inf
        ids.view(-1)[first + starts + step] = logits.argmax(dim=1)
    return [row[: len(given) + length] for row, given, length in zip(ids, rows, lengths, strict=True)]


def answer(loaded: LoadedModel, rows: list[tuple[list[int], np.ndarray]], world: World) -> list[Tensor]:
    """Replace the response at the end of each row by the model's answer.

    rows: pairs of ids [L] and a bool array [L] that marks the response. Returns int64 [L] for each row. A collective
    under FSDP.
    """
    lengths = [int(wanted.sum()) for _, wanted in rows]
    forbidden = never_chosen(loaded)
    prompts = [
        torch.tensor(ids[: len(ids) - length], device=world.device)
        for (ids, _), length in zip(rows, lengths, strict=True)
    ]
    if loaded.model.shape.causal:
        return continue_greedily(loaded.model, prompts, lengths, forbidden)
    mask_id = loaded.tokenizer.mask_id
    masked = [
        MaskedRow(torch.cat([prompt, prompt.new_full((length,), mask_id)]), Sampling(length, length, length), 0)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return unmask_rows(loaded.model, masked, mask_id, forbidden)


def is_right(ids: list[int], response: str, tokenizer: Tokenizer) -> bool:
    """Whether the answer has an eos, and its text before the first eos equals the response."""
    return tokenizer.eos_id in ids and tokenizer.decode(ids[: ids.index(tokenizer.eos_id)]) == response


def score(path: str | Path, tasks_file: Path, tasks: list[Task], world: World) -> Score:
    """Answer every task with the newest checkpoint of a run (its weight average, if it has one). A collective.

    Raises ValueError for a task that is longer than the rows that the model was trained on.
    """
    loaded = load_model(path, None, world)
    tokenizer = loaded.tokenizer
    longest = loaded.config.data.sequence_length
    rows = []
    for number, task in enumerate(tasks, 1):
        prompt = [tokenizer.bos_id, *tokenizer.encode(task.prompt)]  # encoded separately, as in data/prepare.py
        response = [*tokenizer.encode(task.response), tokenizer.eos_id]
        rows.append((prompt + response, np.arange(len(prompt) + len(response)) >= len(prompt)))
        if len(rows[-1][0]) > longest:
            raise ValueError(
                f"{tasks_file}: task {number} has {len(rows[-1][0])} tokens with bos and eos, but the model was "
                f"trained on rows of {longest}: remove this task"
            )
    right = []
    for first in range(0, len(tasks), BATCH):
        part = rows[first : first + BATCH]
        filled = answer(loaded, part, world)
        for task, row, (_, wanted) in zip(tasks[first : first + BATCH], filled, part, strict=True):
            right.append(is_right(row.tolist()[int((~wanted).sum()) :], task.response, tokenizer))
    padded = pad_rows(rows, tokenizer.pad_id)
    name, draws = (NEXT_TOKEN, 1) if loaded.model.shape.causal else ("counted", DRAWS)
    found = estimate(loaded.model, padded, Estimator(name, draws, NOISE_SEED, 0.0), BATCH, tokenizer.mask_id, world)
    kinds = np.array([task.kind for task in tasks])
    return Score(
        checkpoint=str(loaded.folder),
        tasks=digest(tasks_file),
        accuracy=float(np.mean(right)),
        by_kind={str(kind): float(np.mean(np.array(right)[kinds == kind])) for kind in dict.fromkeys(kinds)},
        nelbo=found.nelbo,
        nelbo_se=found.standard_error,
        right="".join(str(int(one)) for one in right),
    )


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_tasks(file: Path) -> list[Task]:
    """The tasks of a jsonl file. Raises ValueError that names the bad line."""
    if not file.is_file():
        raise ValueError(f"--tasks {file}: no such file: make it with tools/make_tasks.py")
    tasks = [task for task, _, _ in read_records(open_name(file), Reading(), task_of)]
    if not tasks:
        raise ValueError(f"--tasks {file}: contains no tasks: make it with tools/make_tasks.py")
    return tasks


def task_of(fields: dict) -> Task:
    """The task in a record. Raises BadRecord."""
    wanted = "every record needs 'kind', 'prompt' and 'response', strings that are not empty"
    values = [string_field(fields, name, wanted) for name in ("kind", "prompt", "response")]
    if not all(values):
        raise BadRecord("an empty string", f": {wanted}")
    return Task(*values)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m mdmtrain.answers", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="run folder (its newest checkpoint is used) or checkpoint folder")
    parser.add_argument(
        "--tasks",
        type=Path,
        required=True,
        metavar="FILE",
        help="file of JSON lines with 'kind', 'prompt' and 'response'",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_args(arguments)
    tasks = read_tasks(args.tasks)
    world = init_world()
    found = score(args.checkpoint, args.tasks, tasks, world)
    if world.is_main:
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in found.by_kind.items())
        print(f"{found.accuracy:.1%} of {len(tasks):,} answers are exactly right ({kinds})")
        print(f"NELBO of the right responses {found.nelbo:.4f} +- {found.nelbo_se:.4f} nats/token")
        if args.json:
            store.write_atomically(args.json, json.dumps(asdict(found), indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
