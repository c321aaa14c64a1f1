#!/usr/bin/env python3
"""Generate tasks (prompts with exact answers) for the fine-tuning study, in four jsonl files.

    python tools/make_tasks.py --out DIR [--pretrain N] [--train N] [--test N] [--seed N]

pretrain.jsonl, train.jsonl and test.jsonl have 'prompt', 'response' and 'kind'. Each prompt is in only one of these
files. text.jsonl has the tasks of pretrain.jsonl as plain text, to train a tokenizer and a model. The same options
always generate the same files.
"""

import json
from dataclasses import asdict
from pathlib import Path

from mdmtrain.checkpoint.storage import write_atomically
from mdmtrain.command import CommandParser, user_errors
from mdmtrain.data.tasks import KINDS, Split, make_tasks


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--pretrain", type=int, default=60_000, help="tasks for pretraining (default: %(default)s)")
    parser.add_argument("--train", type=int, default=30_000, help="tasks for fine-tuning (default: %(default)s)")
    parser.add_argument("--test", type=int, default=900, help="tasks for scoring (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks (default: %(default)s)")
    args = parser.parse_args(arguments)
    if min(args.pretrain, args.train, args.test) < len(KINDS):
        raise ValueError(f"--pretrain, --train and --test must be at least {len(KINDS)}, one task of each kind")
    if not 0 <= args.seed < 2**63:
        raise ValueError("--seed must be 0 or more and below 2^63")
    sizes: dict[Split, int] = {"pretrain": args.pretrain, "train": args.train, "test": args.test}
    made = {split: make_tasks(split, number, args.seed) for split, number in sizes.items()}
    records: dict[str, list[dict]] = {split: [asdict(task) for task in tasks] for split, tasks in made.items()}
    records["text"] = [{"text": f"{task.prompt}{task.response}\n"} for task in made["pretrain"]]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, lines in records.items():
        path = args.out / f"{name}.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        # A file with the same content keeps its modification time, so that its data is not prepared again.
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
        print(f"{path}: {len(lines):,} tasks")


if __name__ == "__main__":
    with user_errors():
        main()
