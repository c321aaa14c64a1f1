"""Files of token ids give the documents and the shards that their text gives, or one line says why not."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdmtrain.data.inputs import find_inputs, open_name
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.records import Ids, Reading, check_inputs, read_documents
from mdmtrain.data.tokenizer import Tokenizer
from tests.data.foreign import CONFIGURATIONS

TEXTS = [f"{i} caf\u00e9 {'word ' * (i % 7)}\r\n\U0001f600" for i in range(60)]
EOS, BOS, PAD = 2, 1, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Tokenizer.train(TEXTS, 300, file)


def stream_of(documents: list[list[int]], eos_first: bool = False) -> list[int]:
    return [i for ids in documents for i in ([EOS, *ids] if eos_first else [*ids, EOS])]


def megatron(documents: list[list[int]], folder: Path, dtype: str = "<u2", code: int = 8, eos: bool = True) -> Path:
    """As IndexedDatasetBuilder writes it, every document of one sequence, or of two where it is long."""
    documents = [[*ids, EOS] if eos else ids for ids in documents]
    sequences = [part for ids in documents for part in ([ids[:5], ids[5:]] if len(ids) > 5 else [ids])]
    ends = np.cumsum([0, *(1 + (len(ids) > 5) for ids in documents)])
    sizes = np.array([len(part) for part in sequences], dtype="<i4")
    pointers = (np.cumsum([0, *sizes])[: len(sizes)] * np.dtype(dtype).itemsize).astype("<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sizes), len(ends))
    (folder / "a.idx").write_bytes(head + sizes.tobytes() + pointers.tobytes() + ends.astype("<i8").tobytes())
    np.array([i for ids in documents for i in ids], dtype=dtype).tofile(folder / "a.bin")
    return folder / "a.bin"


def raw(name: str, dtype: str) -> Callable[[list[list[int]], Path], Path]:
    def write(documents: list[list[int]], folder: Path) -> Path:
        np.array(stream_of(documents), dtype=dtype).tofile(folder / name)
        return folder / name

    return write


def numpy(documents: list[list[int]], folder: Path) -> Path:
    np.save(folder / "a.npy", np.array(stream_of([[BOS, *ids] for ids in documents]), dtype=">i8"))
    return folder / "a.npy"


def llm_c(
    documents: list[list[int]], folder: Path, magic: int = 20240520, version: int = 1, dtype: str = "<u2"
) -> Path:
    """eos before each document."""
    ids = np.array(stream_of(documents, True), dtype=dtype)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    (folder / "a.bin").write_bytes(header.tobytes() + ids.tobytes())
    return folder / "a.bin"


# name -> (a writer, --dtype)
LAYOUTS = {
    "Megatron": (megatron, None),
    "Megatron in 32 bits": (lambda documents, folder: megatron(documents, folder, "<i4", 4), None),
    "Megatron without eos": (lambda documents, folder: megatron(documents, folder, eos=False), None),
    "OLMo-core": (raw("a.npy", "<u2"), "uint16"),
    "OLMo-core in 32 bits": (raw("a.npy", "<u4"), "uint32"),
    "nanoGPT": (raw("a.bin", "<u2"), "uint16"),
    "NumPy": (numpy, None),
    "llm.c": (llm_c, None),
    "llm.c for Llama 3": (lambda documents, folder: llm_c(documents, folder, 20240801, 7, "<u4"), None),
}


@pytest.mark.parametrize("name", LAYOUTS)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=9))
@example(["x", "a\0b\r\n\u2028", "\U0010ffff" * 9, "</s>", "x" * 9_000])
@settings(derandomize=True, deadline=None, max_examples=30)
def test_ids_and_their_text_come_back(tmp_path_factory, tokenizer, name, texts):
    folder = tmp_path_factory.getbasetemp() / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    write, dtype = LAYOUTS[name]
    source = open_name(write([tokenizer.encode(text) for text in texts], folder))
    reading = Reading(ids=Ids(tokenizer.name, dtype=dtype))
    check_inputs([source], reading)
    found = [document for document, _ in read_documents(source, reading)]
    kept = [text for text in texts if text]
    assert [document.text for document in found] == kept
    assert [document.ids.tolist() for document in found] == [tokenizer.encode(text) for text in kept]


def test_one_fingerprint_for_ids_and_text(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    made = [prepare([tmp_path / "a.jsonl"], tmp_path / "text", Options(tokenizer.name, validation_fraction=0.2), 1)]
    for name, (write, dtype) in LAYOUTS.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        write([tokenizer.encode(text) for text in TEXTS], folder)
        inputs = find_inputs([str(folder)], [], [], tmp_path)  # an index is no input of its own
        made.append(prepare(inputs, folder / "out", Options(tokenizer.name, validation_fraction=0.2, dtype=dtype), 1))
    assert len({one.manifest["fingerprint"] for one in made}) == 1


def test_an_index_or_a_prefix_names_its_data(tokenizer, tmp_path):
    megatron([tokenizer.encode("one")], tmp_path)
    for name in ("a.idx", "a.bin", "a", "*"):
        (found,) = find_inputs([str(tmp_path / name)], [], [], tmp_path / "out")
        assert found.name == str(tmp_path / "a.bin")
    before = found.identity()
    megatron([tokenizer.encode("on"), tokenizer.encode("e")], tmp_path)
    assert found.identity() != before


def test_documents_across_blocks(tokenizer, tmp_path, monkeypatch):
    """And what stands after the last eos is a document, as in shards that are cut at a size."""
    documents = [tokenizer.encode(text) for text in TEXTS]
    np.array(stream_of(documents)[:-1], dtype="<u2").tofile(tmp_path / "a.bin")
    reading = Reading(ids=Ids(tokenizer.name, dtype="uint16"))
    for size in (1, 2, 7, 64):
        monkeypatch.setattr("mdmtrain.data.tokenized.BLOCK", size)
        assert [d.text for d, _ in read_documents(open_name(tmp_path / "a.bin"), reading)] == TEXTS


def test_the_wrong_tokenizer_is_noticed(tokenizer, tmp_path, caplog):
    """Where its vocabulary is as large, by the ids that the text gets."""
    usual = tokenizer.encode("word word word word")
    letters = [i for letter in "word word word word" for i in tokenizer.encode(letter)]
    assert len(letters) > len(usual)
    for ids, lines in ((usual, 0), (letters, 1)):
        raw("a.bin", "<u2")([ids] * 3, tmp_path)
        check_inputs([open_name(tmp_path / "a.bin")], Reading(ids=Ids(tokenizer.name, dtype="uint16")))
        assert len(caplog.messages) == lines and all("did it make these ids" in line for line in caplog.messages)


def test_ids_of_a_foreign_tokenizer(tmp_path):
    """One whose eos is its bos too, as GPT-2's: the ids stay, and bytes are those of the text."""
    folder = CONFIGURATIONS["gpt2"]().write(tmp_path / "model")
    tokenizer = Tokenizer.load(folder)
    ids = [tokenizer.encode(text) for text in TEXTS]
    np.array([i for one in ids for i in [*one, tokenizer.eos_id]], dtype="<u2").tofile(tmp_path / "a.bin")
    options = Options(str(folder), validation_fraction=0.2, dtype="uint16")
    manifest = prepare([tmp_path / "a.bin"], tmp_path / "out", options, 1).manifest
    splits = manifest["splits"].values()
    assert sum(split["bytes"] for split in splits) == sum(len(text.encode()) for text in TEXTS)
    assert sum(split["tokens"] for split in splits) == sum(len(one) + 2 for one in ids)


def bytes_of(ids: list[int], dtype: str = "<u2") -> bytes:
    return np.array(ids, dtype=dtype).tobytes()


def indexed(tmp: Path, **changes) -> dict[str, bytes]:
    """The two files of Megatron, with changes to one of them."""
    tmp.mkdir(exist_ok=True)
    megatron(changes.pop("documents", [[10, 11], [12]]), tmp)
    files = {name: (tmp / name).read_bytes() for name in ("a.bin", "a.idx")}
    return {**files, **{name: change(files[name]) for name, change in changes.items()}}


def header(magic: int, version: int, count: int) -> bytes:
    return struct.pack("<iii", magic, version, count) + bytes(256 * 4 - 12)


# name -> (files, or changes to those of Megatron; words of the error; --dtype)
BAD: dict[str, tuple] = {
    "ids beyond the vocabulary": (
        {"a.bin": bytes_of([10, 999, 2])},
        "the id 999 is outside the vocabulary of 300",
        "uint16",
    ),
    "another dtype": ({"a.bin": bytes_of([10, 11, 2] * 9, "<u4")}, "the id 0 is", "uint16"),
    "negative ids": ({"a.bin": bytes_of([-1, 2], "<i4")}, "the id -1 is outside", "int32"),
    "half an id": ({"a.bin": bytes_of([10, 2]) + b"\1"}, "5 bytes are not a multiple of the size of uint16", "uint16"),
    "no eos": ({"a.bin": bytes_of([10, 11])}, "there is no eos (2)", "uint16"),
    "padding": ({"a.bin": bytes_of([10, PAD, 2])}, "the id 3 is the tokenizer's '<pad>'", "uint16"),
    "bos inside": ({"a.bin": bytes_of([10, BOS, 2])}, "the id 1 is the tokenizer's '<s>'", "uint16"),
    "no dtype": ({"a.bin": bytes_of([10, 2])}, "give --dtype", None),
    "no dtype, OLMo-core": ({"a.npy": bytes_of([10, 2])}, "give --dtype", None),
    "numpy of floats": ({"a.npy": "floats"}, "an array of float64 and shape (3,), not one row of ids", None),
    "numpy of rows": ({"a.npy": "rows"}, "and shape (2, 2), not one row of ids", None),
    "numpy cut": ({"a.npy": "cut"}, "cut off or altered", None),
    "numpy header cut": ({"a.npy": b"\x93NUMPY\1\0\x76\0{'desc"}, "damaged NumPy file", None),
    "llm.c cut": ({"a.bin": header(20240520, 1, 9) + bytes_of([10, 2])}, "4 bytes of ids, but 18 are expected", None),
    "llm.c header cut": ({"a.bin": header(20240520, 1, 9)[:90]}, "cut off in its header", None),
    "an index alone": (
        {"a.idx": b"MMIDIDX\0\0" + bytes(40)},
        "a Megatron index, which is not read here: its .bin",
        None,
    ),
    "an index of another bin": ({"a.bin": lambda whole: whole + whole}, "its index belongs to another file", None),
    "a bin cut off": ({"a.bin": lambda whole: whole[:-2]}, "its index belongs to another file, or it is cut off", None),
    "an index cut off": ({"a.idx": lambda whole: whole[:-8]}, "the index of ", None),
    "an index that is none": ({"a.idx": lambda whole: b"text"}, "not an index of Megatron", None),
    "an index of another version": ({"a.idx": lambda whole: whole[:9] + b"\2" + whole[10:]}, "version 2", None),
    "an index of floats": ({"a.idx": lambda whole: whole[:17] + b"\6" + whole[18:]}, "with type 6", None),
    "sequences out of order": (
        {"a.idx": lambda whole: whole[:50] + b"\7" + whole[51:]},
        "are not contiguous",
        None,
    ),
    "eos at some ends": ({"a.bin": lambda whole: whole[:-2] + bytes_of([11])}, "document 2 has no eos", None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_leaves_nothing(name, tokenizer, tmp_path):
    files, words, dtype = BAD[name]
    folder = tmp_path / "in"
    folder.mkdir()
    made = {"floats": np.ones(3), "rows": np.ones((2, 2), dtype=int), "cut": np.ones(9, dtype=int)}
    if any(callable(content) for content in files.values()):
        files = indexed(tmp_path / "in", **files)
    for file, content in files.items():
        if isinstance(content, str):
            np.save(folder / file, made[content])
            content = (folder / file).read_bytes()[: -3 if content == "cut" else None]
        (folder / file).write_bytes(content)
    for option in ("error", "skip"):
        options = Options(tokenizer.name, dtype=dtype, on_bad_record=option)
        with pytest.raises(ValueError) as error:
            prepare(find_inputs([str(folder)], [], [], tmp_path / "out"), tmp_path / "out", options, 1)
        assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_ids_need_their_tokenizer(tmp_path):
    np.save(tmp_path / "a.npy", np.array([10, 2]))
    with pytest.raises(ValueError, match=r"a.npy: token ids, not text: tools/prepare_data.py reads them with"):
        prepare([tmp_path / "a.npy"], tmp_path / "out", Options(vocab_size=300), 1)
    with pytest.raises(ValueError, match="--dtype is only for files of token ids: give the --tokenizer"):
        Options(dtype="uint16")
