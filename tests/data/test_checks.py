"""What is said of a run's data before training: epochs, and validation documents that train has too."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mdmtrain.config import load
from mdmtrain.data import checks
from mdmtrain.data.checks import describe_mixture, shared_documents
from mdmtrain.data.loader import mixture
from mdmtrain.data.order import START, Cursor
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.shards import MANIFEST, PreparedSplit, fingerprint
from tests.conftest import write_config


def words(number: int) -> str:
    return f"Document {number} is about topic {number % 7} and little else.\n"


def changed(text: str, number: int) -> str:
    """The same document in another form."""
    return [text, text.rstrip("\n"), text.replace(" ", "  "), text.upper(), text.replace("\n", "\r\n")][number % 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders that share documents 100..299, each in a form of its own, and keep other shares for validation."""
    folder = tmp_path_factory.mktemp("checks")
    made = {}
    for name, numbers, fraction in (("a", range(300), 0.5), ("b", range(100, 400), 0.1), ("c", range(300), 0.5)):
        texts = [words(n) if name != "b" else changed(words(n), n) for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = Options(str(made["a"]) if made else None, 300, fraction, shard_tokens=2000)
        made[name] = folder / name
        prepare([folder / f"{name}.jsonl"], made[name], options, 1)
    return made


def opened(folders, *names) -> tuple[list[PreparedSplit], list[PreparedSplit]]:
    return tuple([PreparedSplit(folders[name], split) for name in names] for split in ("train", "validation"))


def test_validation_documents_in_the_train_split_of_another_source_are_counted(folders):
    train, validation = opened(folders, "a", "b")
    hashes = [[np.concatenate(list(split.document_hashes())) for split in splits] for splits in (train, validation)]
    expected = sum(int(hash) in set(hashes[0][1].tolist()) for hash in hashes[1][0])
    assert 60 < expected < 110  # of the 200 shared, those with a draw between .1 and .5
    (line,) = shared_documents(train, validation)
    share = (
        f"{expected} of its {validation[0].documents} validation documents ({expected / validation[0].documents:.1%})"
    )
    assert line.startswith(f"{folders['a']}: {share} are also in the train split of {folders['b']}")


def test_equal_fractions_and_single_folders_share_nothing(folders):
    """The draw is of the normalised text, so like documents are on the same side everywhere."""
    for names in (("a",), ("b",), ("a", "c"), ("a", "a")):
        assert not shared_documents(*opened(folders, *names))


def test_like_documents_go_to_one_split(tmp_path):
    """With a draw of the bytes as they are, 47 of 53 validation documents were also in train."""
    texts = [changed(words(n % 60), n // 60) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", Options(None, 300, 0.3), 1)
    splits = [PreparedSplit(tmp_path / "out", split) for split in ("train", "validation")]
    train, validation = (np.concatenate(list(split.document_hashes())) for split in splits)
    assert len(train) + len(validation) == 300 and len(set(train)) + len(set(validation)) == 60
    assert not set(train) & set(validation)


def test_folders_of_older_versions_are_said(folders, tmp_path):
    """Preparation has not always kept hashes."""
    old = Path(shutil.copytree(folders["a"], tmp_path / "a"))
    manifest = json.loads((old / MANIFEST).read_text())
    for shard in manifest["splits"]["validation"]["shards"]:
        (old / shard.pop("hashes_file")).unlink()
        del shard["hashes_sha256"]
    (old / MANIFEST).write_text(json.dumps({**manifest, "fingerprint": fingerprint(manifest)}))
    train, validation = opened({**folders, "old": old}, "old", "b")
    assert [line for line in shared_documents(train, validation) if "not known" in line and "a: made" in line]


def test_a_sample_of_a_large_split_says_so(folders, monkeypatch):
    train, validation = opened(folders, "a", "b")
    monkeypatch.setattr(checks, "MOST_COMPARED", 60)
    assert 30 < len(np.concatenate(list(train[1].document_hashes(60)))) < 90 < train[1].documents
    (line,) = shared_documents(train, validation)
    assert f"of its {train[1].documents} documents)" in line and "(of " in line


@pytest.fixture
def table(small_run, tmp_path):
    """The table of a run of 20 steps on sources x (weight 3) and y (1), of 10 and 11 rows; and its order."""
    splits = [
        SimpleNamespace(folder=name, prompts=False, tokens=640 + 64 * n, shards=1, split="train")
        for n, name in enumerate("xy")
    ]

    def describe(cursor=START, **data) -> tuple[list[str], np.ndarray]:
        sources = [{"path": "x", "weight": 3.0, **data.pop("x", {})}, {"path": "y", "weight": 1.0}]
        changes = {"sources": sources, "sequence_length": 64, **data}
        tree = small_run({"data": changes, "run": {"dir": "r", "steps": 20}})
        config = load([str(write_config(tree, tmp_path / "config.yaml"))])
        order = mixture(config, splits, cursor)
        source, _ = order(np.arange(cursor.at(20, config.slots_per_step, 0).sample))
        return describe_mixture(config, splits, order, cursor), np.bincount(source)

    return describe


@pytest.mark.parametrize("cursor", [START, Cursor(step=3, sample=500, tokens=0)])
def test_epochs_are_what_the_mixture_reads(cursor, table):
    """Against the reads of every row, counted."""
    lines, counts = table(cursor)
    assert lines == [
        "source  tokens  weight  epochs by step 20",
        *(
            f"{name:6}  {size * 64:6}  {share:>6}  {count / size:>17.2f}"
            for name, count, size, share in zip("xy", counts, (10, 11), ("75.0%", "25.0%"), strict=True)
        ),
    ]


def test_phases_are_in_the_table(table):
    lines, counts = table(phases=[{"from_step": 15, "weights": [0.0, 2.0]}])
    assert "75.0%, 0.0% from step 15" in lines[1] and lines[1].endswith(f" {counts[0] / 10:.2f}")
    assert counts.tolist() == [15 * 12, 15 * 4 + 5 * 16]  # of 16 samples a step


def test_more_epochs_than_a_source_may_have_are_refused(table):
    exactly = 20 * 16 * 0.75 / 10
    assert table(x={"max_epochs": exactly})
    with pytest.raises(ValueError, match=r"^x: 24.00 epochs by step 20 are more than its max_epochs=23.9: lower its"):
        table(x={"max_epochs": 23.9})
