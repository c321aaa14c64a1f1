"""Text becomes a prepared folder, exactly its text, whatever the workers; or one line says why not."""

import gzip
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdmtrain import files
from mdmtrain.command import user_errors
from mdmtrain.data import parts as module
from mdmtrain.data import records, staging
from mdmtrain.data.inputs import Input, find_inputs
from mdmtrain.data.parts import work_folder
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.records import Reading, read_documents
from mdmtrain.data.shards import MANIFEST, PreparedSplit
from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer
from tests.conftest import ROOT

TOOL = [sys.executable, str(ROOT / "tools/prepare_data.py")]
OPTIONS = Options(vocab_size=300, validation_fraction=0.2, shard_tokens=4000)


def words(n: int, seed: int) -> str:
    rng = random.Random(seed)
    choice = ["alpha", "beta", "gamma", "delta", "return", "import", "self", "\n\n", "", "1234", "caf\u00e9"]
    return " ".join(rng.choice(choice) for _ in range(n))


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder with a document in every kind of file."""
    folder = tmp_path / "texts"
    (folder / "deep" / "skipped").mkdir(parents=True)
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(words(150, i), encoding="utf-8", newline="")
    (folder / "crlf.txt").write_bytes(b"one\r\ntwo\0three\r\n")
    (folder / "deep" / "a.txt.gz").write_bytes(gzip.compress(words(100, 50).encode()))
    records = [json.dumps({"text": words(20, 60 + i), "id": i}) for i in range(5)]
    (folder / "deep" / "b.jsonl").write_text("\n".join(records) + "\n\n")
    (folder / "deep" / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(records[:2]).encode()))
    (folder / "deep" / "skipped" / "d.txt").write_text("not this")
    (folder / "e.bin").write_bytes(b"\xff\xff")
    (folder / ".hidden.txt").write_text("nor this")
    (folder / "empty.txt").write_text("")
    return folder


PATTERNS = (["*.txt", "*.gz", "*.jsonl"], ["skipped"])


def expected(folder: Path) -> Counter[str]:
    """The documents of `texts`, read in the plainest way."""
    documents = [path.read_bytes().decode() for path in sorted(folder.glob("[0-9c]*.txt"))]
    records = [json.loads(line)["text"] for line in (folder / "deep/b.jsonl").read_text().split("\n") if line]
    return Counter([*documents, words(100, 50), *records, *records[:2]])


def documents_of(out: Path, split: str) -> list[str]:
    tokenizer, split = Tokenizer.load(out), PreparedSplit(out, split, verify="sha256")
    ids = split.read(0, split.tokens)
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id)[1:])
    assert all(piece[-1] == tokenizer.eos_id for piece in pieces) and len(pieces) == split.documents
    found = [tokenizer.decode(piece) for piece in pieces]
    assert sum(len(text.encode()) for text in found) == split.bytes
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_there_once_and_workers_change_nothing(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 1000)  # many batches, so that their order counts
    outs = [tmp_path / "one", tmp_path / "two"]
    for workers, out in enumerate(outs, 1):
        inputs = find_inputs([str(texts), str(texts / "00.txt")], *PATTERNS, out)
        summary = prepare(inputs, out, OPTIONS, workers)
        assert not summary.already and summary.reading.left_out == {"empty": 2}  # empty.txt and a blank line
    train, validation = documents_of(outs[0], "train"), documents_of(outs[0], "validation")
    assert Counter(train + validation) == expected(texts)
    assert not set(train) & set(validation) and 0 < len(validation) < len(train)
    assert len(list(outs[0].glob("train-*.bin"))) > 1
    assert tree(outs[0]) == tree(outs[1])


def test_a_second_run_changes_nothing_and_other_options_are_refused(texts, tmp_path):
    out = tmp_path / "out"
    inputs = find_inputs([str(texts)], *PATTERNS, out)
    prepare(inputs, out, OPTIONS, 1)
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    assert prepare(inputs, out, OPTIONS, 1).already
    assert before == {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    with pytest.raises(ValueError, match="other inputs or options"):
        prepare(inputs[1:], out, OPTIONS, 1)
    with pytest.raises(ValueError, match="other inputs or options"):
        prepare(inputs, out, Options(vocab_size=301, validation_fraction=0.2, shard_tokens=4000), 1)
    (out / MODEL_FILE).unlink()
    with pytest.raises(ValueError, match=r"tokenizer.model is missing"):
        prepare(inputs, out, OPTIONS, 1)


def test_a_taken_tokenizer_is_kept_byte_for_byte(texts, tmp_path):
    inputs = find_inputs([str(texts)], *PATTERNS, tmp_path)
    prepare(inputs, tmp_path / "first", OPTIONS, 1)
    taken = Options(tokenizer=str(tmp_path / "first"), validation_fraction=0.2)
    prepare(inputs[:20], tmp_path / "second", taken, 1)
    assert (tmp_path / "first" / MODEL_FILE).read_bytes() == (tmp_path / "second" / MODEL_FILE).read_bytes()
    assert documents_of(tmp_path / "second", "train")


def test_the_split_is_by_document_not_by_corpus(texts, tmp_path):
    inputs = find_inputs([str(texts)], *PATTERNS, tmp_path)
    prepare(inputs, tmp_path / "all", OPTIONS, 1)
    prepare(inputs[:25], tmp_path / "some", OPTIONS, 1)
    assert set(documents_of(tmp_path / "some", "validation")) <= set(documents_of(tmp_path / "all", "validation"))
    assert set(documents_of(tmp_path / "some", "train")) <= set(documents_of(tmp_path / "all", "train"))


@pytest.mark.parametrize("line_ends", [True, False])
def test_a_long_text_is_cut_between_characters_and_nothing_is_lost(line_ends, tmp_path, monkeypatch):
    text = ("\u00e9\u4e16\U0001f600ab" * 7 + ("\n" if line_ends else "")) * 60
    (tmp_path / "long.txt").write_bytes(text.encode())
    for limit in range(97, 110):
        monkeypatch.setattr(records, "LONGEST_TEXT", limit)
        pieces = [document.text for document, _ in read_documents(Input(str(tmp_path / "long.txt")), Reading())]
        assert "".join(pieces) == text and max(len(piece.encode()) for piece in pieces) <= limit
        assert not line_ends or all(piece.endswith("\n") for piece in pieces)


def test_inputs_are_files_folders_and_globs_each_file_once(texts):
    def names(*arguments, include=(), exclude=(), out=Path("/nowhere")):
        return [Path(one.name).name for one in find_inputs([str(texts / a) for a in arguments], include, exclude, out)]

    assert names("01.txt", "0[01].txt", "01.txt") == ["01.txt", "00.txt"]
    assert names("deep") == ["a.txt.gz", "b.jsonl", "c.jsonl.gz", "d.txt"]
    assert names("deep", exclude=["skipped", "*.gz"]) == ["b.jsonl"]
    assert names("**/*.jsonl") == ["b.jsonl"]
    assert ".hidden.txt" not in names(".") and names(".hidden.txt") == [".hidden.txt"]
    assert "a.txt.gz" not in names(".", out=texts / "deep")


def test_documents_that_are_not_utf8_can_be_left_out(texts, tmp_path):
    (texts / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n{"text": "fine"}\n')
    inputs = find_inputs([str(texts)], [], ["skipped"], tmp_path / "out")
    options = Options(vocab_size=300, validation_fraction=0.2, on_bad_record="skip")
    summary = prepare(inputs, tmp_path / "out", options, 1)
    assert summary.reading.left_out == {"not UTF-8": 1, "half a surrogate pair": 1, "empty": 2}
    everything = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "validation")
    assert Counter(everything) == expected(texts) + Counter(["fine"])


def test_a_failing_write_leaves_what_was_there(texts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", full)
    (tmp_path / "out").mkdir()
    inputs = find_inputs([str(texts)], *PATTERNS, tmp_path)
    with pytest.raises(ValueError, match="No space left on device; finished units kept: 1; the same command resumes"):
        prepare(inputs, tmp_path / "out", OPTIONS, 1)
    assert not tree(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(module.Preparation, "_write_part", None)  # nothing is done again
    prepare(inputs, tmp_path / "out", OPTIONS, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}


def test_the_folder_appears_whole_by_one_rename(texts, tmp_path, monkeypatch):
    out, rename, complete = tmp_path / "out", os.replace, []

    def watched(source, target):
        assert not out.exists()
        if target == out:
            complete.append(tree(source))
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", watched)
    prepare(find_inputs([str(texts)], *PATTERNS, tmp_path), out, OPTIONS, 1)
    assert complete == [tree(out)] and MANIFEST in complete[0]


def test_two_preparations_of_one_folder_do_not_meet(texts, tmp_path):
    with (
        staging.locked(work_folder(tmp_path / "out"), tmp_path / "out"),
        pytest.raises(ValueError, match="being prepared by another process"),
    ):
        prepare(find_inputs([str(texts)], *PATTERNS, tmp_path), tmp_path / "out", OPTIONS, 1)


# ---- the command


def run(arguments: list) -> subprocess.CompletedProcess:
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def run_forked(arguments: list, largest_file: int | None = None) -> subprocess.CompletedProcess:
    """The command in a fork of this process: as `run`, without seconds of imports."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        pid = os.fork()
        if not pid:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            status = 99
            try:
                if largest_file:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
                with user_errors():
                    runpy.run_path(TOOL[1])["main"](list(map(str, arguments)))
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0), errors.seek(0)
        return subprocess.CompletedProcess(arguments, status, output.read(), errors.read())


GOOD = words(2000, 1)
PAIR = json.dumps({"prompt": "a", "response": GOOD})
# name -> (files, arguments, words of the error); "{}" is the folder of the files.
BAD = {
    "no match": ({}, ["{}/*.txt"], "no input matches"),
    "no such file": ({}, ["{}/a.txt"], "no input matches"),
    "nothing included": ({"a.txt": GOOD}, ["{}", "--include", "*.py"], "matches --include and --exclude"),
    "empty corpus": ({"a.txt": "", "b.txt": ""}, ["{}"], "no text"),
    "empty corpus, tokenizer taken": (
        {"a.txt": ""},
        ["{}/a.txt", "--tokenizer", "{tokenizer}"],
        "no text in the 1 input files",
    ),
    "not UTF-8": (
        {"a.txt": GOOD, "b.txt": b"caf\xe9"},
        ["{}"],
        "b.txt:1: not UTF-8 text",
    ),
    "not JSON": ({"a.jsonl": '{"text": "a"}\n{"text": \n'}, ["{}"], "a.jsonl:2: not JSON"),
    "no text field": ({"a.jsonl": '{"text": "a"}\n\n{"txt": "b"}\n'}, ["{}"], "a.jsonl:3: no 'text' field"),
    "text is no string": ({"a.jsonl": '{"text": 3}\n'}, ["{}"], "a.jsonl:1: no 'text' field"),
    "no response": ({"a.jsonl": f"{PAIR}\n" + '{"prompt": "a"}\n'}, ["{}"], "a.jsonl:2: no 'response' field"),
    "no prompt": ({"a.jsonl": '{"response": "a"}\n'}, ["{}"], "a.jsonl:1: no 'prompt' field"),
    "response is no string": ({"a.jsonl": '{"prompt": "a", "response": ["b"]}\n'}, ["{}"], "no 'response' field"),
    "a text too": ({"a.jsonl": '{"text": "ab", "prompt": "a", "response": "b"}\n'}, ["{}"], "a.jsonl:1: both a 'text'"),
    "kinds in a file": ({"a.jsonl": f'{PAIR}\n{{"text": "a"}}\n'}, ["{}"], "a.jsonl:2: plain text among prompts"),
    "kinds in a folder": ({"a.txt": GOOD, "b.jsonl": PAIR}, ["{}", "--vocab-size", "280"], "b.jsonl:1: a prompt among"),
    "text after pairs": (
        {"a.jsonl": PAIR, "b.txt": "b"},
        ["{}", "--tokenizer", "{tokenizer}"],
        "b.txt:1: plain text",
    ),
    "surrogate in prompt": (
        {"a.jsonl": '{"prompt": "\\ud800", "response": "a"}\n'},
        ["{}"],
        "a.jsonl:1: half a surrogate",
    ),
    "surrogate in JSON": ({"a.jsonl": '{"text": "\\ud800"}\n'}, ["{}"], "a.jsonl:1: half a surrogate"),
    "not gzip": ({"a.txt.gz": b"plain"}, ["{}"], "a.txt.gz: named like a gzip file, but it begins with b'plain'"),
    "truncated gzip": ({"a.txt.gz": gzip.compress(GOOD.encode())[:-20]}, ["{}"], "a.txt.gz: damaged gzip file"),
    "damaged gzip": ({"a.gz": gzip.compress(GOOD.encode())[:200] + b"\0" * 99}, ["{}"], "a.gz: damaged gzip file"),
    "vocabulary too large": ({"a.txt": GOOD, "b.txt": "b"}, ["{}", "--vocab-size", "9999"], "too large for this"),
    "vocabulary too small": ({"a.txt": GOOD}, ["{}", "--vocab-size", "200"], "too small"),
    "no tokenizer": ({"a.txt": GOOD}, ["{}", "--tokenizer", "{}/none"], "no tokenizer at"),
    "not a tokenizer": ({"a.txt": GOOD}, ["{}", "--tokenizer", "{}/a.txt"], "is not a sentencepiece model"),
    "no validation": ({"a.txt": GOOD, "b.txt": "b"}, ["{}", "--vocab-size", "280"], "validation split: give --val"),
    "one document": ({"a.txt": GOOD}, ["{}", "--vocab-size", "280"], "give more documents"),
    "fraction": ({"a.txt": GOOD}, ["{}", "--validation-fraction", "1.5"], "not between 0 and 1"),
    "workers": ({"a.txt": GOOD}, ["{}", "--workers", "0"], "--workers 0 is not positive"),
    "disk full": ({"a.jsonl": f"{json.dumps({'text': GOOD})}\n" * 9}, ["{}", "--vocab-size", "280"], "File too large"),
    "out is a file": ({"a.txt": GOOD}, ["{}", "--out", "{}/a.txt"], "exists and is not a prepared folder"),
    "out under a file": ({"a.txt": GOOD}, ["{}", "--out", "{}/a.txt/out"], "a.txt"),
    "out holds something": ({"a.txt": GOOD}, ["{}", "--out", "{}"], "exists and is not a prepared folder"),
}


LIMIT = {"disk full": 20_000}  # bytes in a file: the nearest thing to a full disk that a process can give itself
IN_FULL = ("not UTF-8", "vocabulary too large")  # these as a user starts them, the others forked


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """name -> the result of each bad input, and what is left beside the input."""
    base = tmp_path_factory.mktemp("bad")
    tokenizer = base / "tokenizer.model"
    Tokenizer.train([GOOD], 280, tokenizer)

    def fail(name):
        files, arguments, _ = BAD[name]
        folder = base / name.replace(" ", "-").replace(",", "") / "in"
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        arguments = [a.replace("{}", str(folder)).replace("{tokenizer}", str(tokenizer)) for a in arguments]
        if "--out" not in arguments:
            arguments += ["--out", str(folder.parent / "out")]
        before = tree(folder)
        if name in IN_FULL:
            result = run(arguments)
        else:
            result = run_forked(
                [*arguments, "--workers", "1"] if "--workers" not in arguments else arguments, LIMIT.get(name)
            )
        assert tree(folder) == before
        return result, {path.name for path in folder.parent.iterdir()}

    return {name: fail(name) for name in BAD}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(failures, name):
    result, left = failures[name]
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert BAD[name][2] in lines[0]
    assert left == {"in"}


@pytest.mark.parametrize(("fraction", "split"), [(1e-7, "validation"), (1 - 1e-7, "train")])
def test_the_suggested_fraction_works(texts, tmp_path, fraction, split):
    """Where a split comes out empty, the error names the nearest fraction that gives it a document."""
    inputs = find_inputs([str(texts)], *PATTERNS, tmp_path)
    prepare(inputs, tmp_path / "tokenizer", OPTIONS, 1)
    taken = Options(tokenizer=str(tmp_path / "tokenizer"), validation_fraction=fraction)
    with pytest.raises(ValueError, match=f"fell into the {split} split: give --validation-fraction") as error:
        prepare(inputs, tmp_path / "out", taken, 1)
    suggested = float(str(error.value).split("--validation-fraction ")[1].split()[0])
    manifest = prepare(inputs, tmp_path / "out", replace(taken, validation_fraction=suggested), 1).manifest
    assert manifest["splits"][split]["documents"] == 1


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Text that takes the tool several seconds."""
    folder = tmp_path_factory.mktemp("large")
    text = words(30_000, 7)
    for i in range(60):
        (folder / f"{i}.txt").write_text(text[i * 100 :] + str(i))
    return folder


def start_until_shards(large: Path, out: Path) -> subprocess.Popen:
    """The tool, caught in the middle of its work."""
    options = ["--vocab-size", "300", "--validation-fraction", "0.1", "--workers", "2", "--out", str(out)]
    process = subprocess.Popen([*TOOL, str(large), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = work_folder(out)
    deadline = time.monotonic() + 60
    while not any(partial.glob("unfinished-*/train-*.bin")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def children(pid: int) -> list[int]:
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_nothing(large, tmp_path, number):
    process = start_until_shards(large, tmp_path / "out")
    helpers = children(process.pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == "stopped: nothing was written\n"
    assert not list(tmp_path.iterdir())
    wait_gone(helpers)


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_run_cleans_up(large, texts, tmp_path):
    out = tmp_path / "out"
    process = start_until_shards(large, out)
    helpers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not out.exists() and not list(tmp_path.rglob(MANIFEST))
    wait_gone(helpers)
    (work_folder(out) / "data" / "train-00099.bin").write_bytes(b"left over")
    prepare(find_inputs([str(texts)], *PATTERNS, out), out, OPTIONS, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}
    assert len(documents_of(out, "train")) > 0 and not (out / "train-00099.bin").exists()


def test_the_command_prepares_and_says_what_it_made(texts, tmp_path):
    arguments = [texts, "--include", *PATTERNS[0], "--exclude", *PATTERNS[1], "--vocab-size", 300]
    arguments += ["--validation-fraction", 0.2, "--workers", 1, "--out", tmp_path / "deeper" / "out"]
    first, second = run(arguments), run(arguments)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "bytes/token" in first.stdout and "left out 2 records: empty" in first.stdout and not first.stderr
    assert "files      2 of JSON lines, 33 of text" in first.stdout
    assert second.stdout.startswith("already prepared: ")


def test_help_names_every_option():
    text = run(["--help"]).stdout
    options = ["--out", "--tokenizer", "--vocab-size", "--include", "--exclude", "--validation-fraction"]
    assert all(option in text for option in [*options, "--shard-tokens", "--on-bad-record", "--workers", ".jsonl.gz"])
