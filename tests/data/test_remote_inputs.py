"""Inputs behind URLs, from a real S3 server and real HTTP servers on this machine."""

import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mdmtrain.data import remote, remote_inputs
from mdmtrain.data.inputs import find_inputs, named_in, open_name, zstd
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.records import Reading, read_documents
from mdmtrain.data.tokenizer import Tokenizer
from tests.data.test_formats import saved_dataset
from tests.s3 import s3  # noqa: F401

TEXTS = [f"{i} caf\u00e9 {'word ' * (i % 7)}\r\n" for i in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01,))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The same corpus in files of every kind, and some that are not asked for."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "sub").mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "b.jsonl.zst").write_bytes(zstd.compress(LINES))
    pq.write_table(pa.table({"text": TEXTS, "id": range(60)}), folder / "sub" / "c.parquet", row_group_size=9)
    (folder / ".hidden").write_bytes(b"\0\xff")
    return folder


@pytest.fixture(scope="module")
def bucket(s3, files) -> str:  # noqa: F811
    for file in files.rglob("*"):
        if file.is_file():
            s3.write(f"{s3.url}/corpus/{file.relative_to(files)}", file.read_bytes())
    return f"{s3.url}/corpus"


def found(*arguments: str, include=(), exclude=()) -> list[str]:
    return [one.name for one in find_inputs(arguments, include, exclude, Path("/nowhere"))]


def documents(*arguments: str) -> list[str]:
    inputs = find_inputs(arguments, [], [], Path("/nowhere"))
    return [document.text for one in inputs for document, _ in read_documents(one, Reading())]


def test_files_folders_and_globs_in_a_bucket(bucket, files):
    a, b, c = (f"{bucket}/{name}" for name in ("a.jsonl.gz", "b.jsonl.zst", "sub/c.parquet"))
    assert found(bucket) == [a, b, c] == found(f"{bucket}/") == found(a, bucket)
    assert found(f"{bucket}/*.jsonl.*") == [a, b] and found(f"{bucket}/**/*.parquet") == [c]
    assert found(bucket, include=["*.parquet"]) == [c] and found(bucket, exclude=["sub"]) == [a, b]
    assert documents(bucket) == TEXTS * 3 == documents(str(files))


def test_a_folder_in_a_bucket_is_prepared_like_one_on_disk(bucket, files, tmp_path):
    Tokenizer.train(TEXTS, 290, tmp_path / "tokenizer.model")
    options = Options(str(tmp_path / "tokenizer.model"), validation_fraction=0.2)
    made = [
        prepare(find_inputs([where], [], [], tmp_path), tmp_path / str(number), options, 1).manifest
        for number, where in enumerate([bucket, str(files)])
    ]
    assert made[0]["fingerprint"] == made[1]["fingerprint"] and made[0]["made_from"] != made[1]["made_from"]
    again = prepare(find_inputs([bucket], [], [], tmp_path), tmp_path / "0", options, 1)
    assert again.already


def test_a_saved_dataset_in_a_bucket_is_read_as_one_on_disk(s3, tmp_path):  # noqa: F811
    """The files that state.json names, in its order; the cache beside them is not data."""
    saved = saved_dataset(TEXTS, tmp_path)
    url = f"{s3.url}/saved"
    for file in saved.rglob("*"):
        if file.is_file():
            s3.write(f"{url}/{file.relative_to(saved)}", file.read_bytes())
    assert documents(url) == documents(str(saved)) == TEXTS == documents(f"{url}/train")
    assert found(url, include=["data-00000*"]) == [f"{url}/train/data-00000-of-00002.arrow"]
    state = json.loads((saved / "train/state.json").read_text())
    for change, said in [
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "selected by an index"),
        ({"_data_files": [{"filename": "x.arrow"}]}, r"train/x\.arrow: no such file, but state\.json names it"),
        ({"_data_files": 1}, r"train/state\.json: damaged"),
    ]:
        s3.write(f"{url}/train/state.json", json.dumps(state | change).encode())
        with pytest.raises(ValueError, match=said):
            documents(url)
        with pytest.raises(ValueError, match="no file behind"):  # excluded, as the error advises: it is not read
            found(url, exclude=["train"])


@pytest.mark.parametrize(("status", "said"), [(403, "access denied"), (401, "access denied"), (404, "no such file")])
def test_refusals_of_a_hub_are_not_repeated(monkeypatch, status, said):
    """huggingface_hub's errors have a response, and some are the cause of a FileNotFoundError."""

    attempts: list[int] = []

    class HubError(Exception):
        response = SimpleNamespace(status_code=status)

    def refused(*_, **__):
        attempts.append(1)
        try:
            raise HubError("you must be logged in")
        except HubError as error:
            raise FileNotFoundError("data (repository not found)") from error

    monkeypatch.setattr(MemoryFileSystem, "info", refused)
    with pytest.raises(ValueError, match=said):
        remote.size_of("memory://hub/a")
    assert len(attempts) == 1


def test_another_version_of_a_file_is_another_input(s3):  # noqa: F811
    url = f"{s3.url}/version.jsonl"
    identities = []
    for content in (b'{"text": "a"}', b'{"text": "b"}'):
        s3.write(url, content)
        identities.append(open_name(url).identity())
    assert identities[0] != identities[1] and open_name(url).identity() == identities[1]


def test_pieces_of_every_size_are_the_file(bucket, files, monkeypatch):
    """Read in a row and with jumps, in requests smaller than the file."""
    monkeypatch.setattr(remote_inputs, "LEAST", 100)
    monkeypatch.setattr(remote_inputs, "MOST", 300)
    whole = (files / "b.jsonl.zst").read_bytes()
    source = open_name(f"{bucket}/b.jsonl.zst")
    with source.open() as stream:
        assert stream.read() == whole
        for start in (0, 250, 90, len(whole) - 5, len(whole)):
            assert stream.seek(start) == start and stream.read(120) == whole[start : start + 120]
    assert documents(bucket) == TEXTS * 3


class Ranged(http.server.SimpleHTTPRequestHandler):
    """A server of files that sends parts of them, as object stores do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(Path(self.translate_path(self.path)).stat().st_size))
        self.end_headers()

    def log_message(self, *_):
        pass


class Whole(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(params=[Ranged, Whole])
def web(request, files) -> Iterator[str]:
    handler = functools.partial(request.param, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_on_the_web(web):
    """With a query in the URL too; a server that sends no parts of files gives a copy."""
    assert documents(f"{web}/a.jsonl.gz", f"{web}/sub/c.parquet?download=true", f"{web}/b.jsonl.zst") == TEXTS * 3


def refused(*arguments: str) -> str:
    with pytest.raises(ValueError) as error:
        documents(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_reached_is_one_line(s3, bucket, monkeypatch):  # noqa: F811
    assert f"{bucket}/nothing.jsonl: no such file or folder" in refused(f"{bucket}/nothing.jsonl")
    assert "no file behind" in refused(f"{bucket}/*.txt")
    assert "install its package" in refused("nosuch://bucket/a.jsonl")
    assert "times in a row: check the store" in refused("http://127.0.0.1:1/a.jsonl")
    s3.deny(True)
    try:
        assert "access denied" in refused(f"{bucket}/a.jsonl.gz")
    finally:
        s3.deny(False)
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    s3.hang(True)
    try:
        assert "no answer within 0.3 s" in refused(f"{bucket}/a.jsonl.gz")
    finally:
        s3.hang(False)


def test_a_server_that_says_no(files):
    class Refuses(Whole):
        def do_HEAD(self):
            self.send_error(int(self.path.strip("/")))

        do_GET = do_HEAD

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        assert "no such file or folder" in refused(f"{web}/404")
        assert "access denied" in refused(f"{web}/403") and "times in a row" in refused(f"{web}/500")
        server.shutdown()


def test_a_file_that_changes_while_it_is_read(s3):  # noqa: F811
    url = f"{s3.url}/shrinks.jsonl"
    s3.write(url, LINES * 30)
    source = open_name(url)
    s3.write(url, LINES)
    with pytest.raises(ValueError, match=r"shrinks.jsonl: (asked for bytes|.* times in a row)"):
        list(read_documents(source, Reading()))


def test_a_list_of_inputs(files, bucket, tmp_path):
    names = tmp_path / "names"
    names.write_text(f"{files}/a.jsonl.gz\n\n  {bucket}/sub/c.parquet\r\n")
    assert documents(*named_in(names)) == TEXTS * 2
    names.write_bytes(b"\xff")
    for file, why in ((names, "not UTF-8 text"), (tmp_path / "none", "No such file")):
        with pytest.raises(ValueError, match=rf"--inputs-from {file}: {why}"):
            named_in(file)
