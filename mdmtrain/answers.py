"""How many prompts does a model answer exactly right, and how likely are the right answers?

    python -m mdmtrain.answers RUN_OR_CHECKPOINT --tasks FILE.jsonl [--json FILE]

FILE has 'prompt', 'response' and a 'kind' on every line, as tools/make_tasks.py writes them. Each answer is generated
greedily. A masked diffusion model gets as many masks as the right response and its eos have tokens, and unmasks its
most confident token at each forward pass; an autoregressive model writes as many tokens from the left. The answer is
right if it has the same text, ended by eos.
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

BATCH = 300  # prompts that are answered at once
DRAWS = 8  # of a response's NELBO
NOISE_SEED = 0


@dataclass(frozen=True)
class Score:
    """What a model makes of a file of tasks."""

    checkpoint: str
    tasks: str  # sha256 of the file
    accuracy: float  # share of the prompts that are answered exactly right
    by_kind: dict[str, float]
    nelbo: float  # nats per token of the right responses, eos included; an autoregressive model's is exact
    nelbo_se: float  # standard error over the tasks
    right: str  # "1" or "0" for each task


@torch.no_grad()
def continue_greedily(model: Transformer, rows: list[Tensor], lengths: list[int], forbidden: list[int]) -> list[Tensor]:
    """The most probable next tokens of a causal model after each row, one at a forward pass of all rows.

    rows: int64 [L] on the model's device, unequal; lengths: how many tokens to add to each; forbidden: ids that are
    never chosen. Returns int64 [L + length] of each. A collective under FSDP.
    """
    starts = torch.tensor([len(row) for row in rows], device=rows[0].device)
    # Padding stands behind a row, where a causal model does not see it.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, max(lengths)))
    first = torch.arange(len(rows), device=ids.device) * ids.shape[1]
    for step in range(max(lengths)):  # a row that is complete goes on, and what it adds is cut off below
        logits = model(ids, first + starts + step - 1)
        logits[:, forbidden] = -torch.inf
        ids.view(-1)[first + starts + step] = logits.argmax(dim=1)
    return [row[: len(given) + length] for row, given, length in zip(ids, rows, lengths, strict=True)]


def answer(loaded: LoadedModel, rows: list[tuple[list[int], np.ndarray]], world: World) -> list[Tensor]:
    """Every row with the model's own tokens at the end.

    rows: (ids, which of them are to be the model's: the last ones). Returns int64 [L] of each. A collective under FSDP.
    """
    lengths, forbidden = [int(wanted.sum()) for _, wanted in rows], never_chosen(loaded)
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
    """Has the answer, up to its first eos, the text of the response? Without an eos it has no end, and is wrong."""
    return tokenizer.eos_id in ids and tokenizer.decode(ids[: ids.index(tokenizer.eos_id)]) == response


def score(path: str | Path, tasks_file: Path, tasks: list[Task], world: World) -> Score:
    """Answer every task with the newest weights of a run (the average, where it keeps one). A collective.

    Raises ValueError for a task that is longer than the rows that the model was trained on.
    """
    loaded = load_model(path, None, world)
    tokenizer, longest = loaded.tokenizer, loaded.config.data.sequence_length
    rows = []
    for number, task in enumerate(tasks, 1):
        prompt = [tokenizer.bos_id, *tokenizer.encode(task.prompt)]  # encoded apart, as data/prepare.py does
        response = [*tokenizer.encode(task.response), tokenizer.eos_id]
        rows.append((prompt + response, np.arange(len(prompt) + len(response)) >= len(prompt)))
        if len(rows[-1][0]) > longest:
            raise ValueError(
                f"{tasks_file}: task {number} has {len(rows[-1][0])} tokens with bos and eos, and the model was "
                f"trained on {longest}: leave it out"
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
        str(loaded.folder),
        digest(tasks_file),
        float(np.mean(right)),
        {str(kind): float(np.mean(np.array(right)[kinds == kind])) for kind in dict.fromkeys(kinds)},
        found.nelbo,
        found.standard_error,
        "".join(str(int(one)) for one in right),
    )


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_tasks(file: Path) -> list[Task]:
    """The tasks of a jsonl file. Raises ValueError naming the line that is none."""
    if not file.is_file():
        raise ValueError(f"--tasks {file}: no such file: make it with tools/make_tasks.py")
    tasks = [task for task, _, _ in read_records(open_name(file), Reading(), task_of)]
    if not tasks:
        raise ValueError(f"--tasks {file}: no tasks in it: make it with tools/make_tasks.py")
    return tasks


def task_of(fields: dict) -> Task:
    """The task in a record. Raises BadRecord."""
    wanted = "every line needs 'kind', 'prompt' and 'response', strings with text in them"
    values = [string_field(fields, name, wanted) for name in ("kind", "prompt", "response")]
    if not all(values):
        raise BadRecord("an empty string", f": {wanted}")
    return Task(*values)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m mdmtrain.answers", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="run folder (its newest checkpoint counts) or checkpoint folder")
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="jsonl: 'kind', 'prompt', 'response'")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the numbers here")
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
