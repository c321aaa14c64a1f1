"""tools/convert_ckpt.py on bad input: one clear line, nothing written or changed (see tests/test_bad_inputs.py)."""

import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from mdmtrain.checkpoint.export import export
from mdmtrain.parallel.world import describe_error
from tests.checkpoint.models import SHAPES, checkpoint, in_memory
from tests.conftest import ROOT
from tests.test_bad_inputs import cut, edit_json, flip
from tools import convert_ckpt

SHAPE = SHAPES["untied-gqa"]


@pytest.fixture(scope="module")
def good(corpus, tmp_path_factory) -> Path:
    """A checkpoint, and the same model as a native folder and as a llama folder of several files."""
    folder = tmp_path_factory.mktemp("good")
    checkpoint(folder / "checkpoint", SHAPE, corpus)
    export(in_memory(SHAPE, corpus), "native", folder / "native")
    export(in_memory(SHAPE, corpus), "llama", folder / "llama", shard_bytes=40_000)
    return folder


class Lab:
    """One case's folder, with copies of what is good to damage."""

    def __init__(self, folder: Path, good: Path, corpus: Path):
        self.folder, self.good, self.corpus, self.out = folder, good, corpus, folder / "out"

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.good / name, self.folder / name))

    def state(self) -> dict[str, bytes | None]:
        files = sorted(self.folder.rglob("*"))
        return {str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None for path in files}


CASES: dict[str, tuple[Callable[[Lab], list], tuple[str, ...]]] = {}


def case(*words: str):
    """words: all in the error line; {lab} is the case's folder. The function gives the arguments besides --out."""

    def register(make: Callable[[Lab], list]):
        CASES[make.__name__] = (make, words)
        return make

    return register


def resave(folder: Path, change: Callable[[dict], None]) -> Path:
    """Another content of a folder's only safetensors file, as some other program would have written it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "mdmtrain.json").unlink()
    return folder


@case("--to", "'gguf'", "native", "llada", "--help")
def unknown_target(lab):
    return [lab.copy("checkpoint"), "--to", "gguf"]


@case("--max-shard-size", "'5 bananas'", "5GB")
def shard_size_that_is_none(lab):
    return [lab.copy("checkpoint"), "--to", "native", "--max-shard-size", "5 bananas"]


@case("{lab}/nowhere", "no such run, checkpoint or exported folder")
def no_source(lab):
    return [lab.folder / "nowhere", "--to", "llama"]


@case("{lab}/folder", "neither a complete checkpoint")
def not_a_checkpoint(lab):
    (lab.folder / "folder").mkdir()
    return [lab.folder / "folder", "--to", "llama"]


@case("{lab}/out exists", "choose another")
def folder_that_exists(lab):
    lab.out.mkdir()
    return [lab.copy("checkpoint"), "--to", "native"]


@case("{lab}/file", "Not a directory")
def out_below_a_file(lab):
    (lab.folder / "file").write_text("")
    lab.out = lab.folder / "file/out"
    return [lab.copy("checkpoint"), "--to", "native"]


@case("has no weight average", "leave out --weights")
def average_that_is_not_there(lab):
    return [lab.copy("checkpoint"), "--to", "native", "--weights", "average"]


@case("qwen3 needs qk_norm", "--to llama")
def plain_model_in_qwen3(lab):
    return [lab.copy("native"), "--to", "qwen3"]


@case("llada cannot express a head_dim", "--to llama")
def wide_heads_in_llada(lab):
    return [checkpoint(lab.folder / "wide", replace(SHAPE, head_dim=20), lab.corpus), "--to", "llada"]


@case("llama cannot express qk_norm", "--to qwen3")
def qk_norm_in_llama(lab):
    return [checkpoint(lab.folder / "normed", replace(SHAPE, qk_norm=True), lab.corpus), "--to", "llama"]


@case("llada cannot express causal", "--to llama")
def causal_in_llada(lab):
    return [checkpoint(lab.folder / "causal", replace(SHAPE, causal=True), lab.corpus), "--to", "llada"]


@case("float16 cannot represent", "bfloat16")
def values_too_large_for_float16(lab):
    def enlarge(tensors):
        tensors["head.weight"][0, 0] = 1e6

    return [resave(lab.copy("native"), enlarge), "--to", "native", "--dtype", "float16"]


@case("{lab}/checkpoint", "cannot read checkpoint", "use another")
def checkpoint_with_a_rubbish_index(lab):
    edit_json(lab.copy("checkpoint") / "meta.json", lambda meta: meta["layout"]["tensors"].clear())
    return [lab.folder / "checkpoint", "--to", "native"]


@case("{lab}/checkpoint/tokenizer.model", "not the tokenizer")
def checkpoint_with_another_tokenizer(lab):
    return [flip(lab.copy("checkpoint") / "tokenizer.model").parent, "--to", "native"]


@case("{lab}/llama/model-00002-of-", "missing", "get all")
def shard_missing(lab):
    next(lab.copy("llama").glob("model-00002-of-*")).unlink()
    return [lab.folder / "llama", "--from", "llama"]


@case("{lab}/native/model.safetensors", "truncated", "original")
def safetensors_cut_short(lab):
    return [cut(lab.copy("native") / "model.safetensors").parent, "--from", "native"]


@case("{lab}/native/model.safetensors", "has changed since the export")
def safetensors_altered(lab):
    return [flip(lab.copy("native") / "model.safetensors").parent, "--to", "llama"]


@case("{lab}/native/model.safetensors", "norm.weight is I32", "bfloat16")
def tensor_of_a_wrong_dtype(lab):
    def change(tensors):
        tensors["norm.weight"] = tensors["norm.weight"].to(torch.int32)

    return [resave(lab.copy("native"), change), "--from", "native"]


@case("{lab}/native", "head.weight is missing")
def tensor_missing(lab):
    return [resave(lab.copy("native"), lambda tensors: tensors.pop("head.weight")), "--from", "native"]


@case("q_proj.bias does not exist in our model", "the architecture is not supported")
def tensor_that_we_have_no_place_for(lab):
    def add(tensors):
        tensors["layers.0.attention.q_proj.bias"] = torch.zeros(48)

    return [resave(lab.copy("native"), add), "--from", "native"]


@case("{lab}/llama/config.json", "model_type is 'llama'", "cannot be read as llada")
def folder_of_another_kind(lab):
    return [lab.copy("llama"), "--from", "llada"]


@case("{lab}/llama/config.json", "our model does not support {'rope_type': 'llama3'}")
def rotary_scaling(lab):
    rope = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}
    return [edit_json(lab.copy("llama") / "config.json", lambda c: c.update(rope)).parent, "--from", "llama"]


@case("{lab}/llama/config.json", "our model does not support {'layer_types': ['sliding_attention']}")
def sliding_windows(lab):
    layers = {"layer_types": ["full_attention", "sliding_attention"]}
    return [edit_json(lab.copy("llama") / "config.json", lambda c: c.update(layers)).parent, "--from", "llama"]


@case("{lab}/llama/config.json", "lacks num_hidden_layers")
def configuration_incomplete(lab):
    edit_json(lab.copy("llama") / "config.json", lambda config: config.pop("num_hidden_layers"))
    return [lab.folder / "llama", "--from", "llama"]


@case("{lab}/native/config.json", "damaged")
def configuration_damaged(lab):
    return [cut(lab.copy("native") / "config.json").parent, "--from", "native"]


@case("{lab}/native/config.json", "model_type 'bert'", "native", "llama")
def folder_of_an_unknown_kind(lab):
    edit_json(lab.copy("native") / "config.json", lambda config: config.update(model_type="bert"))
    return [lab.folder / "native", "--to", "llama"]


@case("{lab}/native", "no control piece for mask", "contains no tokenizer.json")
def tokenizer_without_a_mask_token(lab):
    folder, model = lab.copy("native"), io.BytesIO()
    options = {"vocab_size": 280, "model_type": "bpe", "byte_fallback": True, "pad_id": 3, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to learn from"] * 9), model_writer=model, minloglevel=2, **options
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    for name in ("mdmtrain.json", "tokenizer.json"):
        (folder / name).unlink()
    return [folder, "--from", "native"]


@case("{lab}/native/model.safetensors", "truncated")
def safetensors_with_a_header_that_lies(lab):
    file = lab.copy("native") / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    return [file.parent, "--from", "native"]


@case("{lab}/llama/model.safetensors.index.json", "no weight_map", "original")
def index_without_a_weight_map(lab):
    return [
        edit_json(lab.copy("llama") / "model.safetensors.index.json", lambda i: i.pop("weight_map")).parent,
        "--from",
        "llama",
    ]


@case("{lab}/native", "it has pytorch_model.bin, but no model.safetensors", "save_pretrained")
def only_pickled_weights(lab):
    folder = lab.copy("native")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return [folder, "--from", "native"]


@case("{lab}/llama", "it has model-00001-of-", "need their model.safetensors.index.json")
def shards_without_an_index(lab):
    (lab.copy("llama") / "model.safetensors.index.json").unlink()
    return [lab.folder / "llama", "--from", "llama"]


@case("norm.weight is also in model", "original files")
def a_tensor_in_two_files(lab):
    folder = lab.copy("llama")
    last = sorted(folder.glob("model-*"))[-1]
    first = sorted(folder.glob("model-*"))[0]
    save_file({**load_file(first), "model.norm.weight": torch.ones(48)}, first)
    save_file({**load_file(last), "model.norm.weight": torch.ones(48)}, last)
    return [folder, "--from", "llama"]


@case("{lab}/native has no tokenizer.json and no tokenizer.model")
def no_tokenizer_at_all(lab):
    folder = lab.copy("native")
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink()
    return [folder, "--from", "native"]


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(name, good, corpus, tmp_path):
    make, words = CASES[name]
    lab = Lab(tmp_path, good, corpus)
    arguments = [*map(str, make(lab)), "--out"]
    before = lab.state()
    with pytest.raises((ValueError, OSError)) as caught:
        convert_ckpt.main([*arguments, str(lab.out)])
    line = describe_error(caught.value)
    assert all(word.replace("{lab}", str(tmp_path)) in line for word in words), line
    assert lab.state() == before


def test_the_command_ends_with_one_line_and_a_status(good, tmp_path):
    command = [
        sys.executable,
        "tools/convert_ckpt.py",
        str(good / "llama"),
        "--from",
        "llada",
        "--out",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert json.loads((good / "llama/config.json").read_text())["model_type"] in done.stderr
