#!/usr/bin/env python
"""Measure the speed of data preparation on one core, relative to the tokenizer library alone on the same text.

Example:
  tools/bench/prepare.py corpus.jsonl.gz --tokenizer data/corpus --json bench.json

Every part runs on the same documents. In each round all parts run once, and the fastest round of each part is reported,
because other processes only make it slower. Times are CPU times.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from mdmtrain.data.inputs import find_inputs
from mdmtrain.data.parts import encode_document
from mdmtrain.data.records import Document, Fields, Reading, read_documents
from mdmtrain.data.shards import ShardWriter, dtype_for
from mdmtrain.data.tokenizer import Tokenizer

LIBRARY = "tokenizer library alone"


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    tokenizer = Tokenizer.load(args.tokenizer)
    fields = Fields(args.field)
    inputs = find_inputs(args.inputs, [], [], Path("/nowhere"))

    def read() -> Iterator[Document]:
        for one in inputs:
            for document, _ in read_documents(one, Reading(fields=fields)):
                if document.prompt is not None:
                    raise ValueError(f"{one.name}: has prompts and responses: give plain text, or use --field")
                yield document

    documents, size = [], 0
    for document in read():
        documents.append(document)
        size += len(document.text.encode())
        if size >= args.megabytes * 1e6:
            break
    if not documents:
        raise ValueError("no text in the inputs: give files that contain text")

    def library() -> None:
        for document in documents:
            tokenizer.encode_unchecked(document.text)

    def prepared(checked: bool, from_files: bool) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                writer = ShardWriter(Path(folder), "train", 1 << 40)
                for document in islice(read(), len(documents)) if from_files else documents:
                    if checked:
                        tokens, _ = encode_document(tokenizer, document)
                    else:
                        tokens = [tokenizer.bos_id, *tokenizer.encode_unchecked(document.text), tokenizer.eos_id]
                    ids = np.array(tokens, dtype=dtype_for(tokenizer.vocab_size))
                    writer.add(ids, len(document.text.encode()), document.hash())
                writer.close()

        return run

    parts = {
        LIBRARY: library,
        "documents in memory to shards, without the check": prepared(False, False),
        "documents in memory to shards": prepared(True, False),
        "files to shards, without the check": prepared(False, True),
        "files to shards": prepared(True, True),
    }
    seconds = dict.fromkeys(parts, float("inf"))
    for _ in range(args.rounds):
        for name, part in parts.items():
            begin = time.process_time()
            part()
            seconds[name] = min(seconds[name], time.process_time() - begin)
    result = {
        name: {"megabytes_per_second": size / 1e6 / took, "ratio": seconds[LIBRARY] / took}
        for name, took in seconds.items()
    }
    print(f"{size / 1e6:.1f} MB in {len(documents):,} documents, vocabulary {tokenizer.vocab_size:,}")
    for name, numbers in result.items():
        print(f"{name:<50} {numbers['megabytes_per_second']:7.2f} MB/s  {numbers['ratio']:6.1%} of the library")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders or globs, as for tools/prepare_data.py")
    add("--tokenizer", required=True, metavar="PATH", help="as for tools/prepare_data.py")
    add("--megabytes", type=float, default=8, metavar="N", help="megabytes of text (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="runs of each part (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the numbers to this file too")
    add("--field", metavar="NAME", help="field or column with the text of a document (default: text)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    from mdmtrain.command import user_errors

    with user_errors():
        main()
