"""What a file is: the name that was given, the bytes that are in it, and never a guess that loses text."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdmtrain.data.inputs import FORMATS, Input, find_inputs, open_input, open_name
from mdmtrain.data.records import Reading, read_documents
from mdmtrain.data.shards import PreparedSplit
from tests.conftest import ROOT

TEXTS = ["one\n", "two \u00e9\r\n", "three"]
RECORDS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def documents(path: Path | str | Input, **reading) -> list[str]:
    source = path if isinstance(path, Input) else open_name(path)
    return [document.text for document, _ in read_documents(source, Reading(**reading))]


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "x.jsonl",
        "x.JSONL",
        "X.Json",
        "x.ndjson",
        "x.jsonlines",
        "x.txt",
        "x",
        "9f2c",
        "part-00000",
        "x.jsonl.bak",
        "x.1",
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".GZ", ".gzip", "unnamed"])
def test_records_are_records_whatever_the_name(name, packed, tmp_path):
    file = tmp_path / (name + packed.replace("unnamed", ""))
    file.write_bytes(gzip.compress(RECORDS) if packed else RECORDS)
    assert documents(file) == TEXTS


@pytest.mark.parametrize("packed", [False, True])
def test_a_link_is_what_its_own_name_says(packed, tmp_path):
    """The layout of a Hugging Face cache. The first record is no object with a text, so that only the name can tell."""
    content = b"\n" + RECORDS
    (tmp_path / "blob").write_bytes(gzip.compress(content) if packed else content)
    link = tmp_path / ("train.jsonl.gz" if packed else "train.jsonl")
    link.symlink_to("blob")
    again = tmp_path / "again.jsonl"
    again.symlink_to(link.name)
    found = find_inputs([str(link), str(again), str(tmp_path)], [], [], tmp_path / "out")
    assert [one.name for one in found] == [str(link)]  # one file, under the first of its names
    assert documents(found[0]) == TEXTS
    (tmp_path / "bad").write_bytes(b"prose\n")
    (tmp_path / "named.jsonl").symlink_to("bad")
    with pytest.raises(ValueError, match=r"named.jsonl:1: not JSON"):
        documents(tmp_path / "named.jsonl")


@pytest.mark.parametrize(
    "text",
    ["prose\n", "{not json}\n", '{"quoted" but not an object}\n', "[1] A note.\n", '"a string"\n', "{\n  x = 1\n}\n",
     "PAR1S is a word", "ORC: an orc", "BZh no", "a\0b and more", "\n\n", " {", "1f8b", "[[X]]\n", "\n" + "\0" * 40],
)  # fmt: skip
def test_prose_and_code_are_text(text, tmp_path):
    (tmp_path / "a").write_bytes(text.encode())
    assert documents(tmp_path / "a") == [text]


PACKED = {
    "a.lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7", "an lz4 file"),
    "a.zip": (zipped(RECORDS), "a zip archive"),
    "a.tar": (tarred(RECORDS), "a tar archive"),
    "a.tar.gz": (gzip.compress(tarred(RECORDS)), "a tar archive inside a gzip file"),
    "a.bin": (b"PARE\x15\xff", "an encrypted Parquet file"),
    "a.feather": (b"FEA1\0\0\0\0", "a Feather file of version 1"),
    "a.parquet.gz": (gzip.compress(b"PAR1\x15\xff"), "a Parquet file inside a gzip file: unpack it once"),
    "a.avro": (b"Obj\1\x04\x14", "an Avro file"),
    "a.orc": (b"ORC\x08\x03\xf8", "an ORC file"),
    "a.npy": (b"\x93NUMPY\1\0", "token ids, not text"),
    "a.idx": (b"MMIDIDX\0\0\1", "a Megatron index"),
    "a.sqlite": (b"SQLite format 3\0", "an SQLite database"),
    "a.pdf": (b"%PDF-1.7\n", "a PDF document"),
    "a.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    "a.gz": (gzip.compress(gzip.compress(RECORDS)), "a gzip file inside a gzip file: unpack it once"),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_what_is_not_read_is_called_by_its_name(name, rename, policy, tmp_path):
    """With its ending or without, whatever is done with bad records; and nobody is told to skip it for its bytes."""
    content, words = PACKED[name]
    file = tmp_path / ("blob" if rename else name)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        documents(file, on_bad_record=policy)
    assert str(file) in str(error.value) and "skip" not in str(error.value)


@pytest.mark.parametrize("ending", sorted({ending for format in FORMATS for ending in format.endings}))
@pytest.mark.parametrize("content", [b"", b"plain text\n"])
def test_a_file_is_not_what_its_name_says(ending, content, tmp_path):
    file = tmp_path / f"a{ending.upper()}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"named like|which is not read"):
        documents(file, on_bad_record="skip")


def test_gzip_files_that_are_damaged(tmp_path):
    """An empty one is said to be empty; of the others not a byte is lost without a word."""
    whole = gzip.compress(RECORDS)
    file = tmp_path / "a.jsonl.gz"
    for content, words in (
        (b"", "it is empty"),
        (whole[:-4], "damaged gzip file"),
        (whole[:15], "damaged gzip file"),
        (whole[:-8] + bytes(8), "damaged gzip file"),  # its checksum
        (whole + b"garbage", "damaged gzip file"),
        (whole + whole[:-4], "damaged gzip file"),  # of several members, the last
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            documents(file, on_bad_record="skip")
    file.write_bytes(whole + gzip.compress(b"") + whole + bytes(512))  # members end to end, and a tape's padding
    assert documents(file) == TEXTS * 2
    reading = Reading()
    file.write_bytes(gzip.compress(b""))
    assert not list(read_documents(open_name(file), reading)) and reading.left_out == {"empty": 1}


SAMPLE = {
    "Latin": "Record 1: a plain sentence.\n",
    "Cyrillic": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440 \u0438 \u0432\u0441\u0435. 1\n",
    "Arabic": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639 \u064a\u0627 \u0646\u0627\u0633\n",
    "Devanagari": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941 \u0915\u0947 \u0932\u094b\u0917\n",
    "JSON": RECORDS.decode(),
}


@pytest.mark.parametrize("script", SAMPLE)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("times", [1, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_utf16_and_utf32_are_recognised(script, encoding, times, packed, tmp_path):
    """With a byte order mark or without. (Much of it would pass as UTF-8, with a NUL after each letter.)"""
    content = (SAMPLE[script] * times).encode(encoding)
    (tmp_path / "a").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=encoding[:6].upper() + r".* text, not UTF-8: convert it: iconv"):
        documents(tmp_path / "a", on_bad_record="skip")


@given(st.text(max_size=300))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_text_is_itself_or_refused(tmp_path_factory, text):
    """A text file comes back byte for byte, but for a byte order mark; only what looks like other data is refused."""
    file = tmp_path_factory.getbasetemp() / "any.txt"
    file.write_bytes(text.encode())
    try:
        found = documents(file)
    except ValueError:
        assert "\0" in text or text.lstrip().startswith(("{", "[")), text
    else:
        assert found == ([text.removeprefix("\ufeff")] if text.removeprefix("\ufeff") else [])


def test_a_file_of_zero_bytes_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(9000))
    with pytest.raises(ValueError, match="begins with 4,096 zero bytes"):
        documents(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "blob"])
@pytest.mark.parametrize("value", [[{"text": "a"}, {"text": "b"}], {"text": "a", "more": {"b": [1]}}])
def test_one_json_value_over_all_lines_is_refused(name, value, tmp_path):
    """Not taken for text, and not read line by line with most lines left out."""
    (tmp_path / name).write_text(json.dumps(value, indent=2))
    with pytest.raises(ValueError, match=r"not one object a line: convert it: jq") as error:
        documents(tmp_path / name, on_bad_record="skip")
    assert ("--format text" in str(error.value)) == (name in ("a.txt", "blob"))
    if name in ("a.txt", "blob"):
        assert documents(tmp_path / name, format="text") == [json.dumps(value, indent=2)]


def test_the_format_can_be_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(RECORDS)
    assert documents(tmp_path / "a.jsonl", format="text") == [RECORDS.decode()]
    (tmp_path / "a.txt").write_bytes(b"prose")
    with pytest.raises(ValueError, match=r"a.txt:1: not JSON"):
        documents(tmp_path / "a.txt", format="jsonl")


# ---- folders


def names(folder: Path, *arguments: str, include=(), exclude=()) -> list[str]:
    found = find_inputs([str(folder / a) for a in arguments or ["."]], include, exclude, folder / "out")
    return [os.path.relpath(one.name, folder) for one in found]


@pytest.fixture
def linked(tmp_path) -> Path:
    """Folders that are linked: from outside, twice, and in a circle."""
    for name in ("a", "shared/deep", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"{name[0]}.txt").write_text(name)
    (tmp_path / "a" / "sub").symlink_to("../shared")
    (tmp_path / "a" / "twice").symlink_to("../shared")
    (tmp_path / "shared" / "up").symlink_to("../a")
    (tmp_path / "shared" / "deep" / "around").symlink_to("..")
    return tmp_path


def test_links_to_folders_are_followed_each_folder_once(linked):
    assert names(linked, "a") == ["a/a.txt", "a/sub/deep/s.txt"]
    assert names(linked, "a", exclude=["sub"]) == ["a/a.txt", "a/twice/deep/s.txt"]
    assert names(linked, "a/**/*.txt") == ["a/a.txt", "a/sub/deep/s.txt"]
    assert sorted(names(linked)) == ["a/a.txt", "a/sub/deep/s.txt", "outside/o.txt"]


def test_what_a_folder_hides_is_said(linked):
    (linked / "a" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"gone.jsonl: a broken link: repair it, or leave it out"):
        names(linked, "a")
    with pytest.raises(ValueError, match=r"gone.jsonl: a broken link"):
        names(linked, "a/gone.jsonl")
    assert names(linked, "a", exclude=["gone*"]) == names(linked, "a", include=["*.txt"])
    os.mkfifo(linked / "a" / "pipe")
    with pytest.raises(ValueError, match=r"pipe: neither a file nor a folder"):
        names(linked, "a", exclude=["gone*"])


# ---- standard input


def test_standard_input_and_pipes(tmp_path, monkeypatch):
    """Read once, and given as often as needed: a pipe has no second time."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(RECORDS))))
    (standard,) = find_inputs(["-", "-"], [], [], tmp_path)
    assert documents(standard) == documents(standard) == TEXTS and standard.size == len(gzip.compress(RECORDS))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[RECORDS])
    writer.start()
    pipe = open_name(tmp_path / "pipe")
    writer.join()
    assert documents(pipe) == documents(pipe) == TEXTS
    assert pipe.identity() != standard.identity() and pipe.identity() == pipe.identity()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"bad\xff\n")))
    with pytest.raises(ValueError, match="standard input:1: not UTF-8"):
        documents(open_name("-"))


def test_a_failed_read_closes_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"prose")
    source = open_name(tmp_path / "a.jsonl")
    with open_input(source) as opened:
        raw = opened.raw
    assert raw.closed


def test_the_command_reads_standard_input(tmp_path):
    records = b"".join(json.dumps({"text": f"a text of some length, {i}"}).encode() + b"\n" for i in range(300))
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), "-", "--vocab-size", "300", "--workers", "1"]
    command += ["--validation-fraction", "0.2", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, input=gzip.compress(records), capture_output=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr
    splits = [PreparedSplit(tmp_path / "out", split) for split in ("train", "validation")]
    assert sum(split.documents for split in splits) == 300
