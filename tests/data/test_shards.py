"""A split reads as one stream across its shards, and a folder that is not what it was is refused."""

import json
import pickle

import numpy as np
import pytest

from mdmtrain.data.shards import MANIFEST, PreparedSplit, ShardWriter, dtype_for, fingerprint, write_manifest
from mdmtrain.data.tokenizer import MODEL_FILE, Tokenizer

VOCABULARY = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / MODEL_FILE
    Tokenizer.train(["def f(x):\n    return x and the quick brown fox, jumping over it\n" * 30], VOCABULARY, path)
    return path


@pytest.fixture
def prepared(model, tmp_path):
    """A folder with shards of at most 50 tokens, and its documents as written."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(model.read_bytes())
    tokenizer = Tokenizer.load(model)
    random = np.random.default_rng(0)
    documents = [random.integers(5, VOCABULARY, size=n) for n in (3, 20, 27, 90, 1, 2, 44, 50, 7)]
    splits = {}
    for split, part in (("train", documents), ("validation", documents[:2])):
        writer = ShardWriter(folder, split, shard_tokens=50)
        for document in part:
            writer.add(document.astype(dtype_for(VOCABULARY)), text_bytes=2 * len(document), hash=len(document))
        splits[split] = writer.close()
    write_manifest(folder, tokenizer, splits, made_from="test")
    return folder, documents


def test_the_stream_and_its_documents_read_across_shards(prepared):
    folder, documents = prepared
    split = PreparedSplit(folder, "train", verify="sha256")
    stream = np.concatenate(documents)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    assert len(list(folder.glob("train-*.bin"))) == 5  # 3+20+27 | 90 | 1+2+44 | 50 | 7
    assert (split.tokens, split.documents, split.bytes) == (len(stream), len(documents), 2 * len(stream))
    for start in range(len(stream)):
        for length in {1, 2, 50, 131, len(stream) - start}:
            if start + length <= len(stream):
                ids, inside = split.read(start, length), split.documents_in(start, length)
                assert ids.dtype == np.int64 and (ids == stream[start : start + length]).all()
                assert inside.dtype == np.int32
                assert (inside == owner[start : start + length] - owner[start]).all()


def test_a_split_goes_to_another_process(prepared):
    split = PreparedSplit(prepared[0], "train")
    before = split.read(0, 60)
    assert (pickle.loads(pickle.dumps(split)).read(0, 60) == before).all()
    assert len(pickle.dumps(split)) < 4000


def test_a_large_vocabulary_takes_four_bytes():
    assert [dtype_for(n).itemsize for n in (512, 65_536, 65_537)] == [2, 2, 4]


def truncate(folder):
    file = folder / "train-00001.bin"
    file.write_bytes(file.read_bytes()[:-2])


def alter(folder):
    file = folder / "train-00001.bin"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


def alter_offsets(folder):
    file = folder / "train-00000.docs"
    file.write_bytes(bytes([1]) + file.read_bytes()[1:])


def edit_manifest(**changes):
    def damage(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "verify", "words"),
    [
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "size", "no prepared data"),
        (remove(MANIFEST), "size", "not a finished prepared folder"),
        (remove("train-00002.bin"), "size", "train-00002.bin is missing"),
        (remove("train-00002.docs"), "size", "train-00002.docs is missing"),
        (remove(MODEL_FILE), "size", "tokenizer.model is missing"),
        (lambda folder: (folder / MODEL_FILE).write_bytes(b"other"), "size", "not the tokenizer"),
        (truncate, "size", "train-00001.bin has 178 bytes, the manifest says 180"),
        (alter, "sha256", "train-00001.bin was altered"),
        (alter_offsets, "sha256", "train-00000.docs was altered"),
        (edit_manifest(format=99), "size", "format 99, this version reads 1"),
        (edit_manifest(dtype="uint32"), "size", "manifest.json was altered"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1'), "size", "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "size", "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1}'), "size", "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "size", "manifest.json is damaged"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(prepared, damage, verify, words):
    folder, _ = prepared
    PreparedSplit(folder, "train", verify="sha256")
    damage(folder)
    with pytest.raises(ValueError, match=words) as error:
        PreparedSplit(folder, "train", verify=verify)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message and "tools/prepare_data.py" in message


def test_hashes_are_dealt_and_none_is_left_out(prepared):
    folder, _ = prepared
    for name in ("train-00000.bin", "train-00001.bin"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        found = []
        for share in range(2):
            try:
                PreparedSplit(folder, "train", "sha256", (share, 2))
            except ValueError as error:
                found.append(str(error))
        assert len(found) == 1 and name in found[0]
        (folder / name).write_bytes(kept)


def test_an_id_outside_the_vocabulary_is_found_when_read(prepared):
    folder, _ = prepared
    file = folder / "train-00001.bin"
    tokens = np.fromfile(file, dtype="<u2")
    tokens[5] = VOCABULARY
    tokens.tofile(file)
    split = PreparedSplit(folder, "train", verify="size")
    split.read(0, 55)
    with pytest.raises(ValueError, match="token id 300 in train at 55 is outside the vocabulary"):
        split.read(40, 30)


def test_an_unknown_split_is_named(prepared):
    with pytest.raises(ValueError, match="no split 'test': there are train, validation"):
        PreparedSplit(prepared[0], "test")


def test_the_fingerprint_is_of_the_meaning(prepared):
    manifest = json.loads((prepared[0] / MANIFEST).read_text())
    assert fingerprint({**manifest, "made_from": "elsewhere"}) == manifest["fingerprint"]
    assert fingerprint({**manifest, "dtype": "uint32"}) != manifest["fingerprint"]
