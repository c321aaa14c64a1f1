"""One reader for records: what is in them comes out, or file and line say why not."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdmtrain.data import records
from mdmtrain.data.inputs import BOM, open_name
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.records import Document, Reading, as_document, read_documents, read_records
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.generate import parts_around_gaps, read_prompts


def read(path: Path, content: bytes, **options) -> tuple[list[str], dict[str, int]]:
    """The documents of a file with this content, and what was left out."""
    path.write_bytes(content)
    lines, reading = options.pop("lines", False), Reading(**options)
    found = [document.text for document, _ in read_documents(open_name(path), reading, lines=lines)]
    return found, dict(reading.left_out)


GOOD = b'{"text": "good"}'
# What is wrong with a line -> (the line, how it is counted); none of them may be an error of any other kind.
BAD = {
    "prose": (b"prose", "not JSON"),
    "cut off": (b'{"text": "a"', "not JSON"),
    "two on a line": (b'{"text": "a"}{"text": "b"}', "not JSON"),
    "two, CR between": (b'{"text": "a"}\r{"text": "b"}', "not JSON"),
    "garbage after it": (b'{"text": "a"} x', "not JSON"),
    "single quotes": (b"{'text': 'a'}", "not JSON"),
    "NUL bytes": (b"\0" * 40, "not JSON"),
    "a raw control character": (b'{"text": "a\x01"}', "not JSON"),
    "a comma too many": (b'{"text": "a",}', "not JSON"),
    "an array": (b'["a"]', "not a JSON object"),
    "a string": (b'"a"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "Latin-1": (b'{"text": "caf\xe9"}', "not UTF-8"),
    "a raw surrogate": (b'{"text": "\xed\xa0\xbd"}', "not UTF-8"),
    "half a pair": (b'{"text": "\\ud83d"}', "half a surrogate pair"),
    "half a pair in a prompt": (b'{"prompt": "\\ude00", "response": "a"}', "half a surrogate pair"),
    "deep": (b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "deep and cut off": (b'{"text": ' + b'{"a":' * 100_000, "nested too deeply"),
    "many digits": (b'{"text": "a", "b": ' + b"7" * 5000 + b"}", "a number too large"),
    "a large exponent": (b'{"text": "a", "b": -1e999}', "a number too large"),
    "text twice": (b'{"text": "a", "text": "b"}', "a field twice"),
    "no text": (b'{"body": "a"}', "no 'text' field with a string"),
    "an empty object": (b"{}", "no 'text' field with a string"),
    "null text": (b'{"text": null}', "no 'text' field with a string"),
    "NaN text": (b'{"text": NaN}', "no 'text' field with a string"),
    "a list of texts": (b'{"text": ["a"]}', "no 'text' field with a string"),
    "null response": (b'{"prompt": "a", "response": null}', "no 'response' field with a string"),
    "all three": (b'{"text": "a", "prompt": "a", "response": "b"}', "both a 'text' and a 'prompt' with its 'response'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_or_counted(name, tmp_path):
    """And its neighbours are read, all of them."""
    line, reason = BAD[name]
    content = GOOD + b"\n\n" + line + b"\n" + GOOD
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a.jsonl", content)
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:3: {reason}"), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))
    for packed in (bytes, gzip.compress):
        found, left_out = read(tmp_path / "a.jsonl", packed(content), on_bad_record="skip")
        assert found == ["good", "good"] and left_out == {reason: 1, "empty": 1}


def test_null_is_no_field(tmp_path):
    """Tables written as JSON lines have every column in every record."""
    pair = b'{"text": null, "prompt": "a", "response": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(pair)
    assert [d[:2] for d, _ in read_documents(open_name(tmp_path / "a.jsonl"), Reading())] == [("b", "a")]
    assert read(tmp_path / "b.jsonl", b'{"text": "t", "prompt": null, "response": null, "x": NaN}\n') == (["t"], {})


def test_byte_order_marks_and_line_ends_of_records_are_no_text(tmp_path):
    """At the beginning, and inside, where files were put end to end. One in a string is the user's."""
    content = BOM + GOOD + b"\r\n\r\n" + BOM + b'{"text": "\xef\xbb\xbfin \\r\\n \xe2\x80\xa8 text"}' + b" \t\r\n"
    assert read(tmp_path / "a.jsonl", content) == (["good", "\ufeffin \r\n \u2028 text"], {"empty": 1})


def test_text_files_name_the_line(tmp_path, monkeypatch):
    for content, line, words in (
        (b"one\ntwo\ncaf\xe9 au lait\n", 3, "not UTF-8 text (invalid continuation byte 0xe9, byte 4 of the line)"),
        (b"one\n\x89PNG\0\1\xff", 2, "binary data, not text"),
        (b"a\n" * 200_000 + b"\xff\n", 200_001, "not UTF-8 text (invalid start byte 0xff, byte 1 of the line)"),
    ):
        for lines in (False, True):
            with pytest.raises(ValueError) as error:
                read(tmp_path / "a", content, lines=lines)
            assert str(error.value).startswith(f"{tmp_path}/a:{line}: {words}"), error.value
    assert read(tmp_path / "a", b"caf\xe9", on_bad_record="skip") == ([], {"not UTF-8": 1})


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12), max_size=20),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
)
@example(["a", "b\u2028c\x0bd\x85e", "f\x1cg"], "\r\n", True)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_lines_are_the_same_whatever_ends_them(tmp_path_factory, lines, end, last):
    """LF, CRLF and CR end lines and nothing else does: neither U+2028 nor U+0085, which `splitlines` would take."""
    content = ("x" + end + end.join(lines) + (end if last else "")).encode()
    found, _ = read(tmp_path_factory.getbasetemp() / "lines.txt", content, lines=True, format="text")
    assert found == ["x", *(line for line in lines if line.encode().strip())]


@given(st.lists(st.dictionaries(st.text(max_size=5), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
), max_size=4), max_size=6), st.booleans(), st.sampled_from(["\n", "\r\n"]))  # fmt: skip
@settings(derandomize=True, deadline=None, max_examples=150)
def test_records_come_back_as_they_were(tmp_path_factory, objects, ascii, end):
    """Every field, in order, with the line that it stood on."""
    file = tmp_path_factory.getbasetemp() / "objects.jsonl"
    file.write_bytes("".join(json.dumps(one, ensure_ascii=ascii) + end for one in objects).encode("utf-8"))
    found = [(fields, place.line) for fields, place, _ in read_records(open_name(file), Reading(), dict)]
    assert json.dumps(found) == json.dumps([(one, line) for line, one in enumerate(objects, 1)])  # NaN is itself here


@given(st.binary(max_size=200), st.sampled_from([GOOD, b'{"text": "\\u00e9\\ud83d"', b"", b"\xff\xfe"]), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_no_bytes_are_a_traceback(tmp_path_factory, noise, beside, packed):
    """Whatever is in a file: documents that are text, or one line. Good records beside bad ones are all read."""
    content = GOOD + b"\n" + noise.replace(b"\n", b"") + b"\n" + beside + b"\n" + GOOD
    file = tmp_path_factory.getbasetemp() / "noise.jsonl"
    for policy in ("error", "skip"):
        try:
            found, _ = read(file, gzip.compress(content) if packed else content, on_bad_record=policy)
        except ValueError as error:
            assert policy == "error" and str(error).startswith(str(file))
        else:
            assert found[0] == found[-1] == "good"
            assert all(text.encode() for text in found)


def test_generate_and_prepare_find_the_same_fault(tmp_path):
    """One reader: only the fields that they ask for differ."""
    for name, (line, reason) in BAD.items():
        if not reason.startswith(("no ", "both")) and "prompt" not in name:
            (tmp_path / "a.jsonl").write_bytes(b"\n" + line)
            for make in (as_document, parts_around_gaps):
                with pytest.raises(ValueError, match=rf"a.jsonl:2: {reason}|a.jsonl: a JSON array"):
                    list(read_records(open_name(tmp_path / "a.jsonl"), Reading("error", "jsonl"), make))


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"prefix": "a", "suffix": "b"}, ["a", "b"]),
        ({"suffix": "b", "text": None}, ["", "b"]),
        ({"prompt": "a", "response": "b"}, ["a", ""]),
        ({"text": "a<mask>b<mask>"}, ["a", "b", ""]),
    ],
)
def test_what_generate_fills(record, parts):
    assert parts_around_gaps(record) == (record, parts)


def test_generate_reads_what_the_preparation_reads(tmp_path):
    """JSON lines, also compressed, and the rows of tables; but not a row that the output could not repeat."""
    records = [{"prompt": "a"}, {"prompt": "b"}]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    pyarrow.feather.write_feather(pa.Table.from_pylist(records), tmp_path / "a.arrow")
    for file in sorted(tmp_path.iterdir()):
        found = read_prompts(str(file), Reading("error", "jsonl"))
        assert found == [(f"{file}:{i + 1}", record, [record["prompt"], ""]) for i, record in enumerate(records)]
    pq.write_table(pa.table({"prompt": ["a", "b"], "raw": [None, b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet:2: a column that JSON cannot hold \(.*bytes.*\): convert"):
        read_prompts(str(tmp_path / "b.parquet"), Reading("error", "jsonl"))


# ---- awkward documents

ESCAPES = "<s></s><pad><mask><unk><0x41>\u2581\ue000\ue0001"
AWKWARD = [
    " ", "  ", "\n", "\r", "\r\n", "\t", "\0", "\0\0\0", "\x7f", "\x1b[0m", "\ufeff", "\ufefftext", "\ufffe", "\uffff",
    "a ", " a", "a\n", "\na", "a\r", "a\r\nb\rc\nd", "a\0b", " a  b   c ", "\t\tindented\n\t\t\tmore\n", "a\u00a0b",
    "a\u2028b\u2029c\x85d", "e\u0301", "\u00e9", "\ufb01\ufb02", "\u2126\u03a9", "\u212b\u00c5", "\u1e9b\u0323",
    "\u0344", "I\u0307i\u0131", "\uac00\u1100\u1161", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea", "\U0010ffff", "\U000e0001", "\ue000", "\ufdd0", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd\u202e", "\u4e16\u754c", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u200b", "\u200d\u200c",
    ESCAPES, "<mask>", "</s>", "\u2581", "\u2581\u2581a", "\ue0000\ue0011", "[MASK] [CLS]", "##piece", "\u0120a",
    "<0xE4>", '{"text": "JSON in a text"}', "[1]", "null", '"', "\\", "\\u0041", "\\n", "%s {} $x", "a" * 5000,
    "\u00e9" * 999, "\n" * 300, " " * 700, "0123456789" * 50, "\x01\x02\x03\x1f", "PAR1\x15", "\x1f\u008b",
    "BZh91AY&SY", "%PDF-1.4", "version https://git-lfs.github.com/spec/v1\n", "\u0000\u0041" * 30, "word " * 2000,
    "\u0300\u0301\u0302", "z" + "\u0336" * 200,
]  # fmt: skip


def test_awkward_documents_come_back_byte_for_byte(tmp_path):
    """As records (plain, escaped, gzipped; alone and with prompts) and, where they look like nothing else, as files."""
    assert len(set(AWKWARD)) == len(AWKWARD) >= 60
    lines = [json.dumps({"text": text}, ensure_ascii=ascii) for ascii in (True, False) for text in AWKWARD]
    (tmp_path / "a.jsonl").write_bytes(BOM + "\r\n".join(lines).encode())
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    random.seed(1)
    words = [" ".join(random.choices(["alpha", "beta", "gamma"], k=40)) for _ in range(30)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    pairs = [json.dumps({"prompt": text, "response": AWKWARD[-1 - i]}) for i, text in enumerate(AWKWARD)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    options = Options(vocab_size=300, validation_fraction=0.3, shard_tokens=2000)
    prepare([tmp_path / name for name in ("a.jsonl", "b.ndjson.gz", "c.jsonl")], tmp_path / "out", options, 1)
    taken = Options(tokenizer=str(tmp_path / "out"), validation_fraction=0.3)
    prepare([tmp_path / "pairs.jsonl"], tmp_path / "pairs", taken, 1)
    tokenizer = Tokenizer.load(tmp_path / "out")

    def documents(folder: str) -> list[list[int]]:
        splits = [PreparedSplit(tmp_path / folder, split) for split in ("train", "validation")]
        return [split.read(*split.document(i)).tolist() for split in splits for i in range(split.documents)]

    found = [tokenizer.decode(ids[1:-1]) for ids in documents("out")]
    assert sorted(found) == sorted([*AWKWARD * 4, *words])
    found = [tokenizer.decode(ids) for ids in documents("pairs")]
    assert sorted(found) == sorted(text + AWKWARD[-1 - i] for i, text in enumerate(AWKWARD))


@pytest.mark.parametrize("limit", [64, 1 << 18])
def test_awkward_files_come_back_byte_for_byte_or_are_refused(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_TEXT", limit)
    refused = []
    for text in AWKWARD:
        (tmp_path / "a").write_bytes(text.encode())
        try:
            found = "".join(document.text for document, _ in read_documents(open_name(tmp_path / "a"), Reading()))
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/a")
            refused.append(text)
        else:
            assert found == (text.removeprefix("\ufeff") if text != '{"text": "JSON in a text"}' else "JSON in a text")
    assert len(refused) <= 8, refused


def test_documents_that_differ_in_form_alone_have_one_hash():
    """And go to the same split: white space, line ends, case and the encoding of accents do not make a new document."""
    like = ["Caf\u00e9 one\ntwo", "Cafe\u0301 one\r\ntwo\r\n", "  CAF\u00c9  one\ttwo ", "Caf\u00e9 one two\n"]
    assert len({Document(text).hash() for text in like}) == 1
    other = [Document("Caf\u00e9 one two three"), Document("one two", "Caf\u00e9"), Document("two", "Caf\u00e9 one")]
    assert len({document.hash() for document in [Document(like[0]), *other]}) == 4
    assert all(0 <= document.hash() < 1 << 63 for document in other)
