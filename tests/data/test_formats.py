"""Every format gives the documents that were written to it, and a bad file of it is one clear line."""

import bz2
import gzip
import io
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from string import ascii_letters

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdmtrain.data.chat import TEXT_MARK, Template, template_in
from mdmtrain.data.inputs import _frames, _unpack_zstd, find_inputs, open_name, zstd
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.records import Document, Fields, Reading, check_inputs, read_documents
from mdmtrain.data.tokenizer import Tokenizer, chat_template
from tests.data.foreign import CONFIGURATIONS

COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": partial(zstd.compress, options={zstd.CompressionParameter.checksum_flag: 1}),  # as the command zstd does
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
}


def json_lines(ending: str, field: str = "text") -> Callable[[list[str], Path], Path]:
    def write(texts: list[str], folder: Path) -> Path:
        content = "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()
        file = folder / f"a.jsonl{ending}"
        half, pack = content.find(b"\n", len(content) // 2) + 1, COMPRESSIONS[ending]
        file.write_bytes(pack(content[:half]) + pack(content[half:]))  # two frames end to end
        return file

    return write


def table(texts: list[str]) -> pa.Table:
    return pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})


def parquet(texts: list[str], folder: Path, **options) -> Path:
    pq.write_table(table(texts), folder / "a.parquet", row_group_size=3, **options)
    return folder / "a.parquet"


def parquet_of_bytes(texts: list[str], folder: Path) -> Path:
    pq.write_table(
        pa.table({"text": pa.array([text.encode() for text in texts], pa.binary())}),
        folder / "a.parquet",
        compression="zstd",
    )
    return folder / "a.parquet"


def feather(texts: list[str], folder: Path) -> Path:
    pyarrow.feather.write_feather(table(texts), folder / "a.feather", chunksize=3)
    return folder / "a.feather"


def stream(content: pa.Table, file: Path) -> None:
    with pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, 2)


def saved_dataset(texts: list[str], folder: Path) -> Path:
    """What `datasets.save_to_disk` writes, with a second shard that comes first, and a cache that is none of it."""
    folder = folder / "saved" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, part in zip(names, (texts[:2], texts[2:]), strict=True):
        stream(table(part), folder / name)
    stream(table(["a cache"]), folder / "cache-1.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder.parent


FORMATS = {
    **{f"jsonl{ending}": json_lines(ending) for ending in COMPRESSIONS},
    "parquet": parquet,
    "parquet without dictionaries": lambda texts, folder: parquet(
        texts, folder, use_dictionary=False, compression="none"
    ),
    "parquet of bytes": parquet_of_bytes,
    "feather": feather,
    "datasets": saved_dataset,
}


def read(path: Path, **options) -> list[Document]:
    reading = Reading(**options)
    inputs = find_inputs([str(path)], [], [], Path("/nowhere"))
    check_inputs(inputs, reading)
    return [document for one in inputs for document, _ in read_documents(one, reading)]


@pytest.mark.parametrize("name", FORMATS)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=9))
@example(["", "a\0b\r\n\u2028\ufeff", "\U0010ffff" * 9, "", "x" * 300_000, "\u00e9" * 100_000])
@settings(derandomize=True, deadline=None, max_examples=40)
def test_documents_come_back(tmp_path_factory, name, texts):
    """The same text, in its order; empty ones are counted."""
    folder = tmp_path_factory.getbasetemp() / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    path = FORMATS[name](texts, folder)
    assert [document.text for document in read(path)] == [text for text in texts if text]
    reading = Reading()
    for one in find_inputs([str(path)], [], [], folder / "out"):
        positions = [position for _, position in read_documents(one, reading)]
        assert positions == sorted(positions) and all(0 <= position <= one.size for position in positions)
    files_without_records = (not texts[:2]) + (not texts[2:]) if name == "datasets" else not texts
    assert reading.left_out["empty"] == texts.count("") + files_without_records


TEXTS = [f"{i} caf\u00e9 {'word ' * (i % 7)}\r\n\U0001f600" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(TEXTS, 300, file)
    return str(file)


def test_one_fingerprint_for_all_formats(tokenizer, tmp_path):
    options = Options(tokenizer, validation_fraction=0.2)
    found = set()
    for name, write in FORMATS.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        inputs = find_inputs([str(write(TEXTS, folder))], [], [], tmp_path)
        found.add(prepare(inputs, folder / "out", options, 1).manifest["fingerprint"])
    assert len(found) == 1


def test_text_files_are_unpacked_too(tmp_path):
    for ending, pack in COMPRESSIONS.items():
        (tmp_path / f"a.txt{ending}").write_bytes(pack(b"prose\r\n"))
        assert [document.text for document in read(tmp_path / f"a.txt{ending}")] == ["prose\r\n"]


def test_frames_end_to_end(tmp_path):
    """Skippable ones, empty ones and zero bytes between them; a window of 128 MB, as `zstd --long=27` gives it."""
    skippable = b"\x50\x2a\x4d\x18\x02\0\0\0ab"
    one, two = zstd.compress(b"one"), zstd.compress(b"")
    far = zstd.compress(b"far", options={zstd.CompressionParameter.window_log: 27})
    packed = io.BytesIO(skippable + one + two + bytes(5) + skippable + far + one + bytes(1 << 18))
    assert _frames(_unpack_zstd)(packed).read() == b"onefarone"


def test_memory_is_bounded_by_a_batch(tmp_path):
    """Not by the file, which is a single row group of 40 MB."""
    texts = [
        letters * 100 for letters in ("".join(random.Random(i).choices(ascii_letters, k=200)) for i in range(2000))
    ]
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 16}  # pages of 1 MB
    pq.write_table(table(texts), tmp_path / "a.parquet", **options)
    tracemalloc.start()
    assert sum(len(d.text) for d, _ in read_documents(open_name(tmp_path / "a.parquet"), Reading())) == 40_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6


# ---- fields


@pytest.mark.parametrize("write", ["jsonl", "parquet", "stream"])
def test_fields_are_found_by_their_names(write, tmp_path):
    """With dots into objects; a field with the whole name comes first."""
    rows = [{"a": {"b": {"c": "deep"}, "x": 1}, "a.q": "dotted", "p": "prompt", "r": "response", "text": 3}]
    if write == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(rows[0]))
    else:
        path = tmp_path / f"a.{write}"
        content = pa.Table.from_pylist(rows)
        pq.write_table(content, path) if write == "parquet" else stream(content, path)
    for fields, expected in (
        (Fields("a.b.c"), ("deep", None)),
        (Fields("a.q"), ("dotted", None)),
        (Fields(prompt="p", response="r"), ("response", "prompt")),
        (Fields(prompt="a.b.c", response="a.q"), ("dotted", "deep")),
    ):
        assert [tuple(document[:2]) for document in read(path, fields=fields)] == [expected]


def test_bad_rows_are_named_or_counted(tmp_path):
    """As bad lines are: with their numbers, and their neighbours are read."""
    binary = pa.array([b"good", None, b"caf\xe9", b"", b"good"])
    for kind, column in (
        ("binary", binary),
        ("string", pa.StringArray.from_buffers(5, *binary.buffers()[1:], binary.buffers()[0])),
    ):
        file = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"text": column}), file)
        with pytest.raises(ValueError, match=rf"{kind}.parquet:2: no 'text' field with a string: it is null"):
            read(file)
        reading = Reading("skip")
        assert [d.text for d, _ in read_documents(open_name(file), reading)] == ["good"] * 2
        assert reading.left_out == {"no 'text' field with a string": 1, "not UTF-8": 1, "empty": 1}


# ---- conversations

CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}<s>assistant:"
TURNS = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "a </s> b"}]


def test_messages_become_a_prompt_and_a_response(tmp_path):
    """Special tokens of the template become their ids; text that spells one stays text."""
    folder = CONFIGURATIONS["qwen"]().write(tmp_path / "model")
    (tmp_path / "plain").mkdir()
    row = {"messages": [*TURNS, {"role": "assistant", "content": " yes"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        (document,) = read(path, fields=Fields(messages="messages"))
        assert document[:2] == (" yes", "<|system|>\n be brief \n<|user|>\na </s> b\n<|assistant|>\n")
        assert not document.specials
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))
    template, tokenizer = chat_template(folder), Tokenizer.load(folder)
    eos = tokenizer.raw_pieces()[tokenizer.eos_id]
    turns = [TURNS[0], {"role": "user", "content": f"a {eos} b"}]
    prompt, specials = template.prompt(turns)
    ids = tokenizer.encode_prompt(prompt, specials)
    assert ids.count(tokenizer.eos_id) == 2
    assert f"a {eos} b" in tokenizer.decode(ids) and TEXT_MARK not in prompt
    assert tokenizer.encode_prompt("plain", ()) == tokenizer.encode("plain")


def test_where_a_chat_template_is_kept(tmp_path):
    assert template_in(tmp_path) is None
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert template_in(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert template_in(tmp_path) == "j"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_in(tmp_path) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match=r"chat_template.json: damaged"):
        template_in(tmp_path)


# ---- bad inputs


def messages(*turns: tuple[str, str | None]) -> bytes:
    return json.dumps({"m": [{"role": role, "content": content} for role, content in turns]}).encode()


def parquet_bytes(content: dict | pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(content) if isinstance(content, dict) else content, file, **options)
    return file.getvalue()


def arrow_bytes(content: dict, new=pa.ipc.new_stream) -> bytes:
    file = io.BytesIO()
    with new(file, pa.table(content).schema) as writer:
        writer.write_table(pa.table(content), 7)
    return file.getvalue()


GOOD = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
LETTERS = "".join(random.Random(0).choices(ascii_letters, k=9000))  # what no compression makes much smaller
PACKED = {ending: pack(GOOD + json.dumps({"text": LETTERS}).encode() + b"\n") for ending, pack in COMPRESSIONS.items()}
COLUMNS = parquet_bytes({"text": TEXTS}, compression="none", use_dictionary=False, write_page_checksum=True)
ARROW, FILE = arrow_bytes({"text": TEXTS}), arrow_bytes({"text": TEXTS}, pa.ipc.new_file)


def overwritten(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(byte ^ 0x55 for byte in content[at : at + 8]) + content[at + 8 :]


STATE = json.dumps({"_data_files": [{"filename": "a.arrow"}]}).encode()
MESSAGES = Fields(messages="m")
# name -> (files, words of the error, further options); all are prepared from the folder, in the order of their names.
BAD: dict[str, tuple] = {
    **{
        f"cut {ending}": ({f"a.jsonl{ending}": content[:-9]}, "damaged") for ending, content in PACKED.items() if ending
    },
    **{
        f"cut head {ending}": ({f"a.jsonl{ending}": content[:20]}, "damaged")
        for ending, content in PACKED.items()
        if ending
    },
    **{
        f"damaged frame {ending}": (
            {f"a.jsonl{ending}": overwritten(PACKED[ending], len(PACKED[ending]) // 2)},
            "damaged",
        )
        for ending in (".zst", ".bz2", ".xz")
    },
    **{
        f"garbage after {ending}": ({f"a.jsonl{ending}": PACKED[ending] + b"garbage"}, "damaged")
        for ending in (".zst", ".bz2", ".xz")
    },
    **{
        f"second frame cut {ending}": ({f"a.jsonl{ending}": PACKED[ending] + PACKED[ending][:-9]}, "damaged")
        for ending in (".zst", ".bz2", ".xz")
    },
    "twice packed": ({"a.jsonl.gz.zst": zstd.compress(gzip.compress(GOOD))}, "a gzip file inside a zstandard file"),
    "empty zst": ({"a.jsonl.zst": b""}, "named like a zstandard file, but it is empty"),
    "parquet cut at the end": ({"a.parquet": COLUMNS[:-9]}, "damaged Parquet file"),
    "parquet cut at the beginning": ({"a.parquet": COLUMNS[:30]}, "damaged Parquet file"),
    "parquet page damaged": ({"a.parquet": overwritten(COLUMNS, len(COLUMNS) // 3)}, "damaged Parquet file"),
    "parquet that is text": ({"a.parquet": b"text"}, "named like a Parquet file, but it begins with b'text'"),
    "parquet in gzip": ({"a.parquet.gz": gzip.compress(COLUMNS)}, "a Parquet file inside a gzip file"),
    "CSV": ({"a.csv": b"id,text\n1,one\n"}, "a.csv: a CSV file, which is not read here: convert it to Parquet"),
    "CSV in gzip": ({"A.CSV.GZ": gzip.compress(b"id,text\n1,one\n")}, "A.CSV.GZ: a CSV file, which is not read here"),
    "TSV": ({"a.tsv": b"id\ttext\n1\tone\n"}, "a.tsv: a TSV file, which is not read here: convert it to Parquet"),
    "no text in a record": (
        {"a.jsonl": b'{"txt": "a"}\n'},
        "no 'text' field with a string: every record (a JSON object or a row) must have a 'text' field",
    ),
    "wrong field": ({"a.parquet": COLUMNS}, "has no column 'content': it has text", {"fields": Fields("content")}),
    "wrong nested field": ({"a.parquet": COLUMNS}, "has no column 'a'", {"fields": Fields("a.b")}),
    "field inside text": ({"a.parquet": COLUMNS}, "no 'b' in column 'text.b'", {"fields": Fields("text.b")}),
    "a column of numbers": ({"a.parquet": parquet_bytes({"text": [1, 2]})}, "'text' is of type int64, not text"),
    "a null column": ({"a.parquet": parquet_bytes({"text": [None, None]})}, "'text' is of type null, not text"),
    "null text": (
        {"a.parquet": parquet_bytes({"text": ["a", None]})},
        "a.parquet:2: no 'text' field with a string: it is null",
    ),
    "two columns of one name": (
        {"a.parquet": parquet_bytes(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))},
        "more than one column 'text'",
    ),
    "a second file without the column": (
        {"a.parquet": COLUMNS, "b.parquet": parquet_bytes({"txt": ["a"]})},
        "b.parquet: has no column 'text'",
    ),
    "kinds of files": (
        {"a.parquet": COLUMNS, "b.parquet": parquet_bytes({"prompt": ["a"], "response": ["b"]})},
        "b.parquet has prompt and response, but ",
    ),
    "a prompt without a response": ({"a.parquet": COLUMNS}, "no column 'prompt'", {"fields": Fields(response="text")}),
    "arrow stream cut": ({"a.arrow": ARROW[:-20]}, "damaged Arrow file"),
    "arrow stream cut between batches": ({"a.arrow": ARROW[:-8]}, "damaged Arrow file (cut off"),
    "arrow file cut": ({"a.arrow": FILE[:-20]}, "damaged Arrow file"),
    "arrow header damaged": ({"a.arrow": overwritten(FILE, len(FILE) - 60)}, "damaged Arrow file"),
    "dataset without its file": ({"state.json": STATE, "dataset_info.json": b"{}"}, "a.arrow: "),
    "dataset of another kind": ({"state.json": b"[]", "dataset_info.json": b"{}"}, "state.json: damaged"),
    "dataset with an index": (
        {
            "state.json": STATE[:-1] + b', "_indices_data_files": ["i.arrow"]}',
            "dataset_info.json": b"{}",
            "a.arrow": ARROW,
        },
        "flatten_indices",
    ),
    "no messages": ({"a.jsonl": GOOD}, "a.jsonl:1: no 'm' field with a list of messages", {"fields": MESSAGES}),
    "no column of messages": ({"a.parquet": COLUMNS}, "has no column 'm'", {"fields": MESSAGES}),
    "messages that are text": (
        {"a.parquet": parquet_bytes({"m": ["a"]})},
        "of type string, not a list of messages",
        {"fields": MESSAGES},
    ),
    "the user has the last word": (
        {"a.jsonl": messages(("assistant", "a"), ("user", "b"))},
        "the last message is not the assistant's",
        {"fields": MESSAGES},
    ),
    "a response alone": (
        {"a.jsonl": messages(("assistant", "a"))},
        "the last message is not the assistant's",
        {"fields": MESSAGES},
    ),
    "a message without content": (
        {"a.jsonl": messages(("user", None), ("assistant", "a"))},
        "no 'content' field with a string: it is null",
        {"fields": MESSAGES},
    ),
    "a template that refuses": (
        {"a.jsonl": messages(("user", "b"), ("assistant", "a"))},
        "messages that the chat template refuses (no users)",
        {"fields": Fields(messages="m", template=Template("{{ raise_exception('no users') }}"))},
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("given_tokenizer", [True, False])
def test_a_bad_input_is_one_line_and_leaves_nothing(name, given_tokenizer, tokenizer, tmp_path):
    files, words, *further = BAD[name]
    folder = tmp_path / "in"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    options = Options(tokenizer if given_tokenizer else None, 290, **(further[0] if further else {}))
    with pytest.raises(ValueError) as error:
        prepare(find_inputs([str(folder)], [], [], tmp_path / "out"), tmp_path / "out", options, 1)
    assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_table_that_is_text_is_prose_only_on_request(tmp_path):
    """--format text takes a CSV file as text. JSON objects in a file of this name are still JSON lines."""
    (tmp_path / "a.csv").write_text("id,text\n1,one\n")
    (tmp_path / "b.csv").write_text('{"text": "two"}\n')
    assert [document.text for document in read(tmp_path / "a.csv", format="text")] == ["id,text\n1,one\n"]
    assert [document.text for document in read(tmp_path / "b.csv")] == ["two"]


def test_fields_that_exclude_each_other():
    with pytest.raises(ValueError, match="--field and --messages-field cannot be combined"):
        Fields("a", messages="b")
