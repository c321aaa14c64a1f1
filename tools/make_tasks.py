#!/usr/bin/env python3
"""Make prompts with exact answers for the fine-tuning study: three jsonl files in DIR.

    python tools/make_tasks.py --out DIR [--text N] [--train N] [--test N] [--seed N]

text.jsonl has prompt and answer as plain text, for pretraining; train.jsonl and test.jsonl have 'prompt' and
'response', and a 'kind'. No prompt is in two of the files. Made again with the same numbers, they are the same.
"""

import json
from dataclasses import asdict
from pathlib import Path

from mdmtrain.checkpoint.storage import write_atomically
from mdmtrain.data.tasks import KINDS, make_tasks
from mdmtrain.monitor.logs import CommandParser, user_errors


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the three files")
    parser.add_argument("--text", type=int, default=60_000, help="tasks for pretraining (default: %(default)s)")
    parser.add_argument("--train", type=int, default=12_000, help="tasks for fine-tuning (default: %(default)s)")
    parser.add_argument("--test", type=int, default=900, help="tasks that are scored (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if min(args.text, args.train, args.test) < len(KINDS):
        raise ValueError(f"--text, --train and --test must be at least {len(KINDS)}, one task of each kind")
    if not 0 <= args.seed < 2**63:
        raise ValueError("--seed must be 0 or more and below 2^63")
    sizes = {"text": args.text, "train": args.train, "test": args.test}
    made = {split: make_tasks(split, number, args.seed) for split, number in sizes.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    for split, tasks in made.items():
        lines = "".join(json.dumps(asdict(task)) + "\n" for task in tasks)
        path = args.out / f"{split}.jsonl"
        if not path.is_file() or path.read_text(encoding="utf-8") != lines:  # what is prepared from it stays valid
            write_atomically(path, lines)
        print(f"{path}: {len(tasks):,} tasks")


if __name__ == "__main__":
    with user_errors():
        main()
