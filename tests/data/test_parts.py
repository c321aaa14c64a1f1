"""Parts are a function of the inputs: whoever does them, in whichever order, killed or not, the folder is the same."""

import hashlib
import json
import os
import random
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.data import division, duplicates, parts, shards
from mdmtrain.data.division import Division, cut, draw
from mdmtrain.data.inputs import Input
from mdmtrain.data.parts import SOURCES, Preparation, encode_document, work_folder
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.records import Reading, read_documents
from mdmtrain.data.shards import PreparedSplit, ShardWriter, dtype_for
from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer
from tests.data.test_prepare import documents_of, tree, words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([words(3000, 1)], 300, folder / MODEL_FILE)
    return folder


@pytest.fixture
def corpus(tmp_path) -> list[Input]:
    """Twelve files of JSON lines, some of them empty, with documents that occur twice."""
    chance = random.Random(3)
    texts = [words(chance.randrange(1, 60), seed) for seed in range(60)]
    files = []
    for number in range(12):
        file = tmp_path / f"{number:02d}.jsonl"
        lines = [json.dumps({"text": chance.choice(texts)}) for _ in range(chance.choice([0, 3, 9, 20]))]
        file.write_text("\n".join(lines))
        files.append(Input(str(file)))
    return files


@pytest.fixture
def options(tokenizer) -> Options:
    return Options(str(tokenizer), validation_fraction=0.2, shard_tokens=700, part_bytes=4000)


def texts_of(corpus: list[Input]) -> list[str]:
    return [document.text for source in corpus for document, _ in read_documents(source, Reading())]


def everything(out: Path) -> list[str]:
    return documents_of(out, "train") + documents_of(out, "validation")


@given(st.lists(st.integers(0, 30), min_size=1), st.integers(1, 50))
def test_parts_are_consecutive_and_as_large_as_they_may_be(sizes, most):
    made = cut(sizes, most)
    assert [first for first, _ in made] == [0, *(end for _, end in made[:-1])] and made[-1][1] == len(sizes)
    for first, end in made:
        assert end - first == 1 or sum(sizes[first:end]) <= most
        assert end == len(sizes) or sum(sizes[first : end + 1]) > most


def test_one_part_is_what_one_pass_writes(corpus, options, tmp_path):
    """Folders that were prepared before there were parts have the same fingerprint."""
    made = prepare(corpus, tmp_path / "out", replace(options, part_bytes=1 << 30), 1).manifest
    tokenizer, folder = Tokenizer.load(options.tokenizer), tmp_path / "plain"
    folder.mkdir()
    writers = {split: ShardWriter(folder, split, options.shard_tokens) for split in ("train", "validation")}
    for source in corpus:
        for document, _ in read_documents(source, Reading()):
            ids, _ = encode_document(tokenizer, document)
            split = "validation" if draw(document.hash()) < options.validation_fraction else "train"
            tokens = np.array(ids, dtype_for(tokenizer.vocab_size))
            writers[split].add(tokens, len(document.text.encode()), document.hash())
    splits = {split: writer.close() for split, writer in writers.items()}
    plain = shards.write_manifest(folder, tokenizer, splits, "")
    assert made["fingerprint"] == plain["fingerprint"] and len(made["splits"]["train"]["shards"]) > 3


@pytest.mark.parametrize("dedup", [False, True])
def test_any_processes_in_any_order_make_the_same_folder(corpus, options, dedup, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "BUCKET", 30)
    options = replace(options, dedup=dedup, vocab_size=290, tokenizer=None if dedup else options.tokenizer)
    prepare(corpus, tmp_path / "calm", options, 1)
    many = Division.of(corpus, options)
    assert len(many.parts) > 3
    for seed in range(5):
        chance, out = random.Random(seed), tmp_path / f"out-{seed}"
        work = work_folder(out)
        work.mkdir()
        making = Preparation(many, work)
        making.begin()
        for stage in making.stages():
            units = making.pending(stage) * 2  # each one twice, as when a job comes back from the dead
            chance.shuffle(units)
            for unit in units:
                with Preparation(many, work).doing(stage, 1) as do:
                    do(unit, lambda done: None)
        making.finish(out)
        assert tree(out) == tree(tmp_path / "calm")
    expected = Counter(texts_of(corpus))
    assert Counter(everything(tmp_path / "calm")) == (Counter(set(expected)) if dedup else expected)
    counts = [json.loads(line) for line in (tmp_path / "calm" / SOURCES).read_text().splitlines()]
    assert [one["input"] for one in counts] == [source.name for source in corpus]
    for name in ("documents", "bytes", "tokens"):
        split = [PreparedSplit(tmp_path / "calm", split) for split in ("train", "validation")]
        assert sum(one[name] for one in counts) == sum(getattr(one, name) for one in split)


def test_a_source_that_changes_in_the_meantime_is_an_error(corpus, options, tmp_path):
    begun = Division.of(corpus, options)
    work = work_folder(tmp_path / "out")
    work.mkdir()
    making = Preparation(begun, work)
    making.begin()
    part, (first, _) = 2, begun.parts[2]
    with making.doing("parts", 1) as do:
        do(0, lambda done: None)
        with open(corpus[first].name, "a") as file:
            file.write('\n{"text": "more"}')
        with pytest.raises(ValueError, match=rf"{corpus[first].name} has changed since the preparation began"):
            do(part, lambda done: None)
        do(1, lambda done: None)
    assert making.pending("parts") == list(range(2, len(begun.parts))) and not list(work.glob("unfinished-*"))


def test_a_file_that_is_repaired_costs_its_part_alone(corpus, options, tmp_path, monkeypatch):
    """A bad record in the fourth part, then the file without it: three parts are not done again."""
    out, done, write = tmp_path / "out", [], Preparation._write_part

    def watched(self, part, *rest):
        done.append(part)
        write(self, part, *rest)

    monkeypatch.setattr(Preparation, "_write_part", watched)
    bad = corpus[Division.of(corpus, options).parts[3][0]].name
    good = Path(bad).read_text()
    Path(bad).write_text(good[:-1] + " ")
    with pytest.raises(ValueError, match=rf"{bad}:\d+: not JSON.*; finished units kept: 3; the same command resumes"):
        prepare(corpus, out, options, 1)
    assert done == [0, 1, 2, 3] and not out.exists()
    with pytest.raises(ValueError, match=r"\.out\.parts holds finished units that were made with other options"):
        prepare(corpus, out, replace(options, validation_fraction=0.3), 1)
    Path(bad).write_text(good)
    prepare(corpus, out, options, 1)
    assert done[4:] == list(range(3, len(Division.of(corpus, options).parts))) and not work_folder(out).exists()
    prepare(corpus, tmp_path / "calm", options, 1)
    assert {k: v for k, v in tree(out).items() if k != "manifest.json"} == {
        k: v for k, v in tree(tmp_path / "calm").items() if k != "manifest.json"
    }


def test_inputs_that_change_and_change_back(corpus, options, tmp_path, monkeypatch):
    """A part of other inputs has written shards under the same names: the older record of that part is void."""
    a, b, c, x = [one for one in corpus if one.size][:4]
    options, write, most = replace(options, part_bytes=1), Preparation._write_part, [0]

    def stopping(self, part, *rest):
        if part >= most[0]:
            raise ValueError("stopped")
        write(self, part, *rest)

    monkeypatch.setattr(Preparation, "_write_part", stopping)
    for inputs, most[0] in (([a, b, c], 2), ([a, x, b], 2)):
        with pytest.raises(ValueError, match="stopped"):
            prepare(inputs, tmp_path / "out", options, 1)
    most[0] = 3
    for name in ("out", "calm"):
        prepare([a, b, c], tmp_path / name, options, 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_short_and_long_documents_are_left_out_and_counted(corpus, options, tmp_path):
    bounded = replace(options, min_chars=100, max_chars=250)
    summary = prepare(corpus, tmp_path / "out", bounded, 1)
    every = texts_of(corpus)
    left = [text for text in every if 100 <= len(text) <= 250]
    assert Counter(everything(tmp_path / "out")) == Counter(left)
    assert summary.reading.left_out["shorter than --min-chars 100"] == sum(len(text) < 100 for text in every) > 0
    assert summary.reading.left_out["longer than --max-chars 250"] == sum(len(text) > 250 for text in every) > 0
    with pytest.raises(ValueError, match="--max-chars 5 is less than --min-chars 9"):
        replace(options, min_chars=9, max_chars=5)


def test_a_tokenizer_learns_from_each_input_in_proportion_to_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(division, "SAMPLE_CHARACTERS", 1000)
    files = {"small": 20, "large": 400}
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{name} {i:090d}"}) + "\n" for i in range(lines)))
    inputs = [Input(str(tmp_path / name)) for name in files]
    sample = list(Division.of(inputs, Options()).tokenizer_sample(Reading(), False))
    counts = Counter(text.split()[0] for text, _, _ in sample)
    assert 0.9 * 4000 < sum(len(text) for text, _, _ in sample) < 4000 + 2 * 100
    assert 17 < counts["large"] / counts["small"] < 23


# ---- duplicates

TEXTS = st.text(st.sampled_from("ab\0 \u00e9"), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TEXTS, max_size=8), min_size=1, max_size=6), st.integers(1, 5))
def test_duplicates_are_those_of_a_set(tmp_path_factory, texts, bucket):
    """Each document but the first of its text, in any number of parts and buckets; hashes that collide in half."""
    folder = tmp_path_factory.mktemp("hashes")

    def hash_of(text: str) -> bytes:
        whole = duplicates.text_hash(duplicates.Document(text))
        return whole[:8] + b"\0" * 8 if len(text) % 2 else b"\xff" * 8 + whole[8:]

    files = [folder / f"{part}.npy" for part in range(len(texts))]
    for file, part in zip(files, texts, strict=True):
        np.save(file, duplicates.sorted_hashes(map(hash_of, part)))
    of, found = bucket, []
    for number in range(of):
        found.append(folder / f"found-{number}.npy")
        np.save(found[-1], duplicates.duplicates(files, number, of))
    seen, expected = set(), []
    for part in texts:
        expected.append([n for n, text in enumerate(part) if text in seen or seen.add(text)])
    assert [duplicates.numbers_in(found, part).tolist() for part in range(len(texts))] == expected


def test_one_file_is_open_at_a_time(tmp_path):
    """With 40 parts and 40 buckets, in a process that can open 10 more files."""
    files, found = ([tmp_path / f"{name}-{number}.npy" for number in range(40)] for name in ("hashes", "found"))
    hashes = duplicates.sorted_hashes(hashlib.sha256(bytes([n])).digest()[:16] for n in range(200))
    for file in files:
        np.save(file, hashes)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(tmp_path, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 10, allowed[1]))
    try:
        for bucket, file in enumerate(found):
            np.save(file, duplicates.duplicates(files, bucket, len(found)))
        numbers = [duplicates.numbers_in(found, part).tolist() for part in (0, 1, 39)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert numbers == [[], list(range(200)), list(range(200))]


def test_the_number_of_buckets_is_bounded():
    assert [duplicates.buckets(n << 20) for n in (0, 1, 2, 3, 2047, 2048, 1 << 20)] == [1, 1, 1, 2, 1024, 1024, 1024]


def test_what_differs_is_no_duplicate():
    pairs = [("a", "bc"), ("ab", "c"), ("", "abc"), ("1 a", "bc"), ("a\0b", "c"), ("a", "b\0c")]
    documents = [duplicates.Document(text, prompt) for prompt, text in pairs]
    documents += [duplicates.Document(text) for text in ("abc", "a bc", "Abc", "abc ", "abc\n")]
    documents += [duplicates.Document("x", ids=np.array(ids)) for ids in ([1, 2], [1], [2, 1], [258])]
    assert len({duplicates.text_hash(document) for document in documents}) == len(documents)


def test_prepared_duplicates_are_counted(corpus, options, tmp_path):
    every = texts_of(corpus)
    summary = prepare(corpus, tmp_path / "out", replace(options, dedup=True), 1)
    assert summary.reading.left_out[parts.DUPLICATE] == len(every) - len(set(every)) > 0
    # The first one of each text stays, in the order of the inputs.
    train = [text for text in dict.fromkeys(every) if text in set(documents_of(tmp_path / "out", "train"))]
    assert documents_of(tmp_path / "out", "train") == train


def test_nothing_is_left_where_nothing_was_finished(corpus, options, tmp_path, monkeypatch):
    Path(corpus[0].name).write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        prepare(corpus, tmp_path / "out", options, 1)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
