#!/usr/bin/env python
"""Show what a prepared folder contains: documents, lengths, bytes per token by source, frequent and repeated content.

tools/inspect_data.py DATA [--figure FILE] [--json FILE]
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mdmtrain.command import CommandParser, output_file, user_errors
from mdmtrain.data.inspection import inspect
from mdmtrain.evaluate import write_json

SHOWN = 300  # characters of a document that are printed


def show(report: dict, console: Console) -> None:
    splits = report["splits"]
    table = Table("", *splits, box=None)
    rows = {
        "tokens": lambda one: f"{one['tokens']:,}",
        "documents": lambda one: f"{one['documents']:,}",
        "bytes": lambda one: f"{one['bytes']:,}",
        "bytes/token": lambda one: f"{one['bytes_per_token']:.2f}",
        "shards read": lambda one: f"{one['shards_looked_at']:,} of {one['shards']:,}",
        "tokens per document": lambda one: ", ".join(f"{name} {n:,.0f}" for name, n in one["length"].items()),
        "byte fallback": lambda one: (
            "this tokenizer has no byte fallback" if one["byte_fallback"] is None else f"{one['byte_fallback']:.2%}"
        ),
        "unused tokens": lambda one: f"{one['unused_pieces']:,} of {report['vocabulary']:,}",
        "repeated documents": lambda one: (
            "unknown (prepared by an older version)"
            if one["repeated_documents"] is None
            else f"{one['repeated_documents']:,} ({one['repeated_documents'] / one['documents_looked_at']:.2%})"
        ),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(one) for one in splits.values()))
    console.print(table)

    table = Table("source", "documents", "bytes", "tokens", "bytes/token", box=None)
    for one in report["sources"]:
        ratio = "" if one["bytes_per_token"] is None else f"{one['bytes_per_token']:.2f}"
        numbers = (f"{one[key]:,}" for key in ("documents", "bytes", "tokens"))
        table.add_row(escape(one["input"]), *numbers, ratio)
    console.print(table if report["sources"] else "sources: unknown (prepared by an older version)", "")

    for split, one in splits.items():
        words = [f"{token['piece']!r} {token['share']:.2%}" for token in one["frequent"]]
        console.print(f"most frequent tokens of {split}: {escape(', '.join(words))}", "")
    for split, documents in report["documents"].items():
        for one in documents:
            parts = {"prompt": one["prompt"], "response": one["text"]} if "prompt" in one else {"": one["text"]}
            console.rule(f"{split}, document {one['document']:,}")
            for name, text in parts.items():
                more = f" ... ({len(text):,} characters)" if len(text) > SHOWN else ""
                console.print(escape(f"{name}: " * bool(name) + text[:SHOWN] + more), highlight=False)


def draw(lengths: dict[str, np.ndarray], path: Path) -> None:
    """Draw a histogram of the lengths of the documents, for each split."""
    longest = max(int(one.max()) for one in lengths.values())
    edges = np.unique(np.geomspace(1, longest + 1, 60).astype(int))
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for split, one in lengths.items():
        axes.stairs(np.histogram(one, edges)[0] / len(one), edges, label=split, fill=split == "train", alpha=0.8)
    axes.set(xscale="log", xlabel="tokens per document, with bos and eos", ylabel="share of documents")
    axes.legend()
    figure.savefig(path, dpi=120)


def number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="inspect_data.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="prepared folder")
    add("--documents", type=number, default=2, metavar="N", help="documents of each split to show (default: 2)")
    add("--most", type=number, default=20, metavar="N", help="sources and frequent tokens to show (default: 20)")
    add(
        "--shards",
        type=number,
        default=100,
        metavar="N",
        help="read at most N shards of each split, evenly spaced (default: 100)",
    )
    add("--figure", type=output_file, metavar="FILE", help="draw the lengths of the documents to this file (PNG)")
    add("--json", type=output_file, metavar="FILE", help="write the report to this file too")
    args = parser.parse_args(arguments)
    report, lengths = inspect(args.data, args.shards, args.most, args.documents)
    show(report, Console())
    if args.json:
        write_json(args.json, report)
    if args.figure:
        draw(lengths, args.figure)


if __name__ == "__main__":
    with user_errors():
        main()
