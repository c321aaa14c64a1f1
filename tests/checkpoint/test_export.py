"""Exported weights are the trained ones, bit for bit, and other programs compute with them what we compute."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mdmtrain.checkpoint import formats, store
from mdmtrain.checkpoint.export import SideExports, export, import_checkpoint
from mdmtrain.checkpoint.weights import open_checkpoint, open_folder
from mdmtrain.config import CheckpointConfig, validate
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.model.presets import PRESETS, ModelShape
from tests.checkpoint.models import SHAPES, checkpoint, in_memory, our_logits, our_model, parameters, save_on_ranks
from tests.conftest import ROOT, write_config
from tests.data import foreign as foreign_tokenizers
from tests.spawn import run_world
from tools import convert_ckpt, prepare_data

IDS = (torch.arange(96).view(2, 48) * 7919) % 512


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---- round trips


def targets(shape: ModelShape) -> list[str]:
    """The foreign formats that can express a model."""
    if shape.qk_norm:
        return ["qwen3"]
    return ["llama", "llada"] if shape.head_dim * shape.n_heads == shape.d_model else ["llama"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trips_are_bitwise_from_any_number_of_ranks(ranks, corpus, tmp_path):
    """checkpoint -> native, native -> llama | llada | qwen3 -> native: tied and untied, GQA and MHA, heads of their own
    width, qk_norm, one file and several.

    And once through a checkpoint made by --from. A transposed matrix, a swapped pair of names (gate and up, q and k),
    a permuted rotary layout that is undone wrongly, or a shard of a rank left out would differ.
    """
    run_world(save_on_ranks, ranks, tmp_path, corpus)
    for name, shape in SHAPES.items():
        wanted, here = parameters(shape), tmp_path / name
        native, shard = here / "native", 1 << 40
        export(open_checkpoint(here), "native", native)
        assert_same(tensors_in(native), wanted)
        for target in targets(shape):
            shard = 30_000 if shard > 30_000 else 1 << 40  # one of them in several files
            export(open_folder(native, "native"), target, here / target, shard_bytes=shard)
            assert (len(list((here / target).glob("*.safetensors"))) > 1) == (shard == 30_000)
            export(open_folder(here / target, target), "native", here / f"{target}-native")
            assert_same(tensors_in(here / f"{target}-native"), wanted)
            kept = [json.loads((folder / "config.json").read_text()) for folder in (native, here / f"{target}-native")]
            assert kept[0] == kept[1]
        import_checkpoint(open_folder(here / target, target), here / "start")
        export(open_checkpoint(here / "start"), "native", here / "start-native")
        assert_same(tensors_in(here / "start-native"), wanted)


def test_bfloat16_is_rounded_once_and_the_way_back_is_float32(corpus, tmp_path):
    shape = SHAPES["untied-gqa"]
    export(in_memory(shape, corpus), "llada", tmp_path / "llada", dtype="bfloat16")
    import_checkpoint(open_folder(tmp_path / "llada", "llada"), tmp_path / "start")
    export(open_checkpoint(tmp_path / "start"), "native", tmp_path / "native")
    assert_same(tensors_in(tmp_path / "native"), {n: t.bfloat16().float() for n, t in parameters(shape).items()})


def test_one_tensor_at_a_time(corpus, tmp_path):
    """In both directions at most two tensors live at once; a writer of whole files, such as DCP's, keeps all."""
    source, live, most = in_memory(SHAPES["untied-gqa"], corpus), [], []

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name).clone()
        live.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in live))
        return tensor

    export(replace(source, read=read), "llama", tmp_path / "llama")
    import_checkpoint(replace(source, read=read), tmp_path / "start")
    assert len(most) == 2 * len(parameters(source.shape)) and max(most) <= 2


# ---- other programs


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits(name, corpus, tmp_path):
    """float32, to 1e-4 of the largest logit. Meta's interleaved rotary layout, or a causal mask, is far outside."""
    transformers = pytest.importorskip("transformers")
    shape = SHAPES[name]
    target = targets(shape)[0]
    export(in_memory(shape, corpus), target, tmp_path / target)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / target).eval()
    assert type(model).__name__ == formats.TRANSFORMERS[target]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shape.tied_embeddings
    ours = our_logits(our_model(parameters(shape), shape), IDS)
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
        difference, bound = float((theirs - ours).abs().max()), 1e-4 * float(ours.abs().max())
        assert difference <= bound
        print(f"{name}: largest difference {difference:.2e} of {float(ours.abs().max()):.2f}")
        model.config.is_causal = True
        assert float((model(input_ids=IDS).logits - ours).abs().max()) > 100 * bound
        model.config.is_causal = False
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                pairs = part.weight.view(-1, 2, shape.head_dim // 2, shape.d_model)
                part.weight.copy_(pairs.transpose(1, 2).reshape(part.weight.shape))
        assert float((model(input_ids=IDS).logits - ours).abs().max()) > 100 * bound


def llada_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """LLaDA's network from the published names and configuration keys alone."""
    config, weights = json.loads((folder / "config.json").read_text()), tensors_in(folder)
    heads, kv_heads, theta = config["n_heads"], config["n_kv_heads"], config["rope_theta"]
    size, length = config["d_model"] // heads, ids.shape[1]
    assert config["model_type"] == "llada" and config["architectures"] == ["LLaDAModelLM"]
    assert (
        config["block_type"] == "llama" and config["layer_norm_type"] == "rms" and config["activation_type"] == "silu"
    )
    angles = torch.outer(torch.arange(length).float(), theta ** -(torch.arange(0, size, 2).float() / size))
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def rope(x):
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = weights["model.transformer.wte.weight"][ids]
    for i in range(config["n_layers"]):
        block = f"model.transformer.blocks.{i}"
        h = norm(x, f"{block}.attn_norm")
        q, k, v = (
            (h @ weights[f"{block}.{p}_proj.weight"].T).view(len(ids), length, n, size).transpose(1, 2)
            for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (rope(k), v))
        scores = (rope(q) @ k.transpose(-1, -2) / math.sqrt(size)).softmax(-1)
        x = x + (scores @ v).transpose(1, 2).reshape(x.shape) @ weights[f"{block}.attn_out.weight"].T
        h = norm(x, f"{block}.ff_norm")
        gate = F.silu(h @ weights[f"{block}.ff_proj.weight"].T) * (h @ weights[f"{block}.up_proj.weight"].T)
        x = x + gate @ weights[f"{block}.ff_out.weight"].T
    head = "model.transformer." + ("wte" if config["weight_tying"] else "ff_out") + ".weight"
    return norm(x, "model.transformer.ln_f") @ weights[head].T


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "llada" in targets(shape)])
def test_an_independent_reader_of_llada_names_computes_our_logits(name, corpus, tmp_path):
    shape = SHAPES[name]
    export(in_memory(shape, corpus), "llada", tmp_path / "llada", shard_bytes=50_000)
    ours, theirs = our_logits(our_model(parameters(shape), shape), IDS), llada_logits(tmp_path / "llada", IDS)
    assert float((theirs - ours).abs().max()) <= 1e-4 * float(ours.abs().max())
    config = json.loads((tmp_path / "llada/config.json").read_text())
    tokenizer = Tokenizer.load(corpus)
    assert config["mask_token_id"] == tokenizer.mask_id and config["eos_token_id"] == tokenizer.eos_id
    assert config["embedding_size"] == config["vocab_size"] == shape.vocab_size


def test_the_tables_have_a_row_for_everything_of_a_model():
    assert formats.SIZES.keys() == ModelShape.__dataclass_fields__.keys()
    for name in formats.tensor_shapes(SHAPES["untied-mha"]):
        assert formats.name_in("native", name) == name
        assert len({name, formats.name_in("llama", name), formats.name_in("llada", name)}) == 3
    for name in formats.tensor_shapes(SHAPES["qk-norm"]):
        assert formats.name_in("qwen3", name) != name


def test_the_published_configuration_of_llada_8b_is_our_8b():
    published = {
        "model_type": "llada", "d_model": 4096, "n_heads": 32, "n_kv_heads": None, "n_layers": 32, "mlp_ratio": 4,
        "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": None, "max_sequence_length": 4096,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "block_type": "llama", "activation_type": "silu", "include_bias": False, "bias_for_layer_norm": None,
        "weight_tying": False, "alibi": False, "rope": True, "rope_full_precision": True, "init_std": 0.02,
    }  # fmt: skip
    shape, length = formats.shape_from("llada", published)
    assert shape == ModelShape(vocab_size=126464, **PRESETS["8b"]) and length == 4096
    with pytest.raises(ValueError, match=r"our model does not support \{'include_bias': True\}"):
        formats.shape_from("llada", {**published, "include_bias": True})


# ---- the tokenizer


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "llama"
    export(in_memory(SHAPES["tied-mha"], corpus), "llama", out)
    return out


@pytest.fixture(scope="module")
def tokenizers(corpus, folder):
    transformers = pytest.importorskip("transformers")
    return Tokenizer.load(corpus), transformers.AutoTokenizer.from_pretrained(folder)


def test_the_exported_tokenizer_gives_the_same_ids_on_source_text(tokenizers):
    ours, theirs = tokenizers
    for file in sorted((ROOT / "mdmtrain").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert theirs.encode(text) == ours.encode(text)
    names = ("bos", "eos", "pad", "mask")
    assert [getattr(theirs, f"{name}_token_id") for name in names] == [getattr(ours, f"{name}_id") for name in names]


NASTY = [
    "\u2581",
    "\U0010f581",
    "\U0010f5810",
    "\0",
    "\r\n",
    "\t",
    " ",
    "    ",
    "\ufeff",
    "<mask>",
    "<s>",
    "</s>",
    "<0x41>",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]))), max_size=8))
def test_the_exported_tokenizer_gives_the_same_ids_on_any_text(tokenizers, parts):
    """Our escape of U+2581 is part of it, and text that spells a reserved token stays text."""
    ours, theirs = tokenizers
    ids = theirs.encode("".join(parts))
    assert ids == ours.encode("".join(parts)) and theirs.decode(ids) == "".join(parts)


# ---- the self-check


def convert(*arguments) -> None:
    convert_ckpt.main([str(argument) for argument in arguments])


def test_the_command_checks_itself_and_says_so(corpus, tmp_path, capsys):
    source = checkpoint(tmp_path / "start", SHAPES["untied-gqa"], corpus)
    convert(source, "--to", "llama", "--out", tmp_path / "llama", "--dtype", "bfloat16", "--max-shard-size", "20KB")
    output = capsys.readouterr().out
    assert "21 tensors read back" in output and "logits equal: largest difference" in output
    assert "tokenizer gives the same" in output and "the last token changes the first logits by" in output
    facts = json.loads((tmp_path / "llama/mdmtrain.json").read_text())
    assert facts["minimum_transformers"] == formats.MINIMUM_TRANSFORMERS == "5.2.0"


def test_the_command_refuses_a_transformers_that_would_load_it_causal(corpus, tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "start", SHAPES["tied-mha"], corpus)
    monkeypatch.setattr(convert_ckpt.importlib.metadata, "version", lambda name: "5.1.0")
    with pytest.raises(ValueError, match=r"transformers 5\.1\.0 is installed, .* causal .* 5\.2\.0 or newer"):
        convert(source, "--to", "llama", "--out", tmp_path / "llama")
    assert {path.name for path in tmp_path.iterdir()} == {"start"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"is_causal": True}, "logits differ"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}, "rope_theta": 99.0}, "another model"),
        ({"mask_token_id": 9}, None),
    ],
)
def test_the_self_check_sees_a_folder_that_is_not_the_model(damage, words, corpus, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **damage}))
    source = in_memory(SHAPES["tied-mha"], corpus)
    if words is None:
        assert len(convert_ckpt.self_check(copy, source, "llama", "float32")) == 4
    else:
        with pytest.raises(ValueError, match=f"self-check: .*{words}"):
            convert_ckpt.self_check(copy, source, "llama", "float32")


@pytest.mark.parametrize(("name", "target"), [("tied-mha", "llama"), ("qk-norm", "qwen3")])
def test_a_causal_reference_model_stays_causal(name, target, corpus, tmp_path):
    shape = replace(SHAPES[name], causal=True)
    export(in_memory(shape, corpus), target, tmp_path / target)
    found = convert_ckpt.self_check(tmp_path / target, in_memory(shape, corpus), target, "float32")
    assert found[-1].endswith("changes the first logits by 0")


def test_a_qwen3_folder_is_checked_before_it_appears(corpus, tmp_path):
    """The self-check passes, and finds norms of queries and keys that were exchanged."""
    source = in_memory(SHAPES["qk-norm"], corpus)
    export(source, "qwen3", tmp_path / "qwen3")
    assert len(convert_ckpt.self_check(tmp_path / "qwen3", source, "qwen3", "float32")) == 4

    def exchanged(name: str) -> torch.Tensor:
        swap = {"q_norm": "k_norm", "k_norm": "q_norm"}
        return source.read(re.sub("q_norm|k_norm", lambda found: swap[found[0]], name))

    with pytest.raises(ValueError, match=r"self-check: .*_norm.* has other values in the folder"):
        convert_ckpt.self_check(tmp_path / "qwen3", replace(source, read=exchanged), "qwen3", "float32")


# ---- foreign models


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def foreign(tmp_path_factory, request) -> Path:
    """A causal Llama or Qwen3 as transformers saves it, in bfloat16; the folder has the name of its kind.

    Its byte-level tokenizer has neither mask nor pad.
    """
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    out, library = tmp_path_factory.mktemp("foreign") / request.param, Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    reserved = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*reserved.values()], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator([Path(__file__).read_text()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, **reserved).save_pretrained(out)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 12}),
    }
    config_class, model_class, more = kinds[request.param]
    config = config_class(
        **more, vocab_size=304, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model_class(config).bfloat16().save_pretrained(out)
    return out


def test_a_causal_model_becomes_a_bidirectional_start(foreign, tmp_path, capsys):
    """Its values stay; it gets pad and mask tokens, whose rows are means; attention goes both ways."""
    transformers = pytest.importorskip("transformers")
    convert(foreign, "--from", foreign.name, "--out", tmp_path / "start")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed for masked diffusion")]
    assert said.endswith(
        "attention is bidirectional now; it was causal; new tokens: <|mdm_pad|> (300), <|mdm_mask|> (301); "
        "embedding: 304 -> 320 rows; rows from 300 on are the mean of the earlier rows"
    )
    start = open_checkpoint(tmp_path / "start")
    tokenizer, theirs = Tokenizer.load(tmp_path / "start"), transformers.AutoTokenizer.from_pretrained(foreign)
    text = Path(__file__).read_text() + "<|end|> <|mdm_mask|> \u2581 "
    assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (0, 1, 300, 301)
    assert start.shape.vocab_size == 320 and not start.shape.causal
    model = transformers.AutoModelForCausalLM.from_pretrained(foreign, dtype=torch.float32).eval()
    model.config.is_causal = False
    for name, old in (("embed.weight", model.model.embed_tokens.weight), ("head.weight", model.lm_head.weight)):
        new = start.read(name)
        assert new.dtype == torch.float32 and torch.equal(new[:300], old[:300])
        mean = old[:300].mean(dim=0).bfloat16().float()
        assert torch.allclose(new[300:], mean.expand(20, -1), atol=1e-6)
    ours = our_model({name: start.read(name) for name in formats.tensor_shapes(start.shape)}, start.shape)
    ids = IDS % 300
    with torch.no_grad():
        difference = (our_logits(ours, ids)[..., :300] - model(input_ids=ids).logits[..., :300]).abs().max()
    assert float(difference) < 1e-4
    export(start, foreign.name, tmp_path / "again")
    back = open_folder(tmp_path / "again", foreign.name)
    assert back.tokenizer == start.tokenizer and back.shape == start.shape


def test_training_starts_from_a_foreign_model(foreign, tmp_path):
    """prepare_data with its tokenizer, then checkpoint.init_from: weights that learn nothing are the ones imported."""
    convert(foreign, "--from", foreign.name, "--out", tmp_path / "start")
    prepare = [str(ROOT / "mdmtrain"), "--include", "*.py", "--validation-fraction", "0.2", "--workers", "1"]
    prepare_data.main([*prepare, "--tokenizer", str(tmp_path / "start"), "--out", str(tmp_path / "data")])
    start = open_checkpoint(tmp_path / "start")
    tree = {
        "run": {"dir": str(tmp_path / "run"), "steps": 2, "global_batch": 8, "micro_batch": 8},
        "model": asdict(start.shape),
        "data": {"sources": [{"path": str(tmp_path / "data")}], "sequence_length": 64, "workers": 0},
        "optim": {"lr": 1e-12, "weight_decay": 0.0},
        "checkpoint": {"init_from": str(tmp_path / "start"), "save_every": 1, "keep_last": 1, "export_every": 2},
        "monitor": {"tensorboard": False},
        "eval": {"every": 2, "rows": 4, "samples": 1},
    }
    train = [sys.executable, "-m", "mdmtrain.train", str(write_config(tree, tmp_path / "config.yaml"))]
    done = subprocess.run(train, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    wanted = {formats.name_in(foreign.name, name): start.read(name) for name in formats.tensor_shapes(start.shape)}
    found = tensors_in(tmp_path / "run/exports/step-00000002")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-9) for name in wanted)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding_is_dropped_only_where_it_is_the_same(same, corpus, tmp_path, caplog):
    """As transformers does it: a head with values of its own is kept, whatever config.json says, with a warning."""
    export(in_memory(SHAPES["tied-gqa"], corpus), "llama", tmp_path / "llama")
    tensors = load_file(tmp_path / "llama/model.safetensors")
    head = tensors["model.embed_tokens.weight"] + (0.0 if same else 1.0)
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "llama/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "llama/mdmtrain.json").unlink()
    found = open_folder(tmp_path / "llama", "llama")
    assert found.shape.tied_embeddings == same
    assert ("read as untied" in caplog.text) == (not same)
    if not same:
        assert torch.equal(found.read("head.weight"), head)
        convert(tmp_path / "llama", "--to", "llama", "--out", tmp_path / "again")
        transformers = pytest.importorskip("transformers")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again.lm_head.weight, head) and not again.config.tie_word_embeddings


def test_tokens_beyond_the_embedding_get_the_rows_that_are_promised(tmp_path, caplog):
    """430 rows, ids up to 483 and the new mask token: as many rows as the shape says, the old ones as they were."""
    folder = foreign_tokenizers.beyond().write_model(tmp_path / "foreign")
    found, old = open_folder(folder, "llama"), load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    pieces = Tokenizer(found.tokenizer, "it").vocab_size
    new = found.read("embed.weight")
    assert found.shape.vocab_size == len(new) == -(-pieces // 64) * 64 and len(old) == 430 < pieces
    assert torch.equal(new[:430], old) and torch.allclose(new[430:], old.mean(dim=0), atol=1e-6)
    assert "but the embedding has 430 rows" in caplog.text


def test_a_masked_model_whose_pad_is_its_eos_gets_a_pad_of_its_own_and_keeps_its_rows(tmp_path):
    """LLaDA's tokenizer names one token for both. A spare row is taken, and every logit stays what it was."""
    foreign = foreign_tokenizers.qwen()
    foreign.settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "<|im_end|>"}
    folder = foreign.write_model(tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    found, old = open_folder(folder, "llama"), load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tokenizer = Tokenizer(found.tokenizer, "it")
    roles = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    assert len(set(roles)) == 4 and tokenizer.pad_id == tokenizer.vocab_size - 1 < len(old) == 512
    assert found.shape.vocab_size == 512 and torch.equal(found.read("embed.weight"), old)


# ---- beside a run


@pytest.fixture
def exports_of(corpus, tmp_path):
    """A function that gives the exports of a run of 7 steps."""

    def make(every: int, resumed: Path | None = None) -> SideExports:
        tree = in_memory(SHAPES["tied-mha"], corpus).facts["config"]
        tree |= {
            "run": {**tree["run"], "dir": str(tmp_path), "steps": 7},
            "checkpoint": {"save_every": 2, "export_every": every},
        }
        return SideExports(validate(tree, "test"), resumed, is_main=True)

    return make


def finished_step(run: Path, step: int, corpus: Path) -> Path:
    folder = checkpoint(run / f"checkpoints/step-{step:08d}", SHAPES["tied-mha"], corpus)
    (folder / "meta.json").write_text(json.dumps({**store.read_meta(folder), "step": step}))
    return folder


def test_exports_beside_a_run(exports_of, corpus, tmp_path, caplog):
    """Only what is due is exported, and the last step. A failure is a warning, and made up for when the run resumes.

    Retention passes over a checkpoint for as long as it is being read, and no longer.
    """
    for step in (2, 7):
        finished_step(tmp_path, step, corpus)
    (tmp_path / "exports").write_text("a file where a folder should be")
    exports, last = exports_of(4), tmp_path / "checkpoints/step-00000007"
    for checkpoint_folder in store.complete_checkpoints(tmp_path):
        exports.start(checkpoint_folder)
    exports.finish()
    assert [record.levelname for record in caplog.records if record.name == "mdmtrain"] == ["WARNING"]
    assert f"export of {last} failed, training continues: " in caplog.text
    (tmp_path / "exports").unlink()
    exports = exports_of(4, resumed=last)
    new = finished_step(tmp_path, 8, corpus)
    store.retain(new, CheckpointConfig(keep_last=1))
    assert sorted(folder.name[-1] for folder in (tmp_path / "checkpoints").iterdir()) == ["7", "8"]
    exports.finish()
    wanted = {formats.name_in("llama", name): tensor for name, tensor in parameters(SHAPES["tied-mha"]).items()}
    assert_same(tensors_in(tmp_path / "exports/step-00000007"), wanted)
    assert [folder.name for folder in (tmp_path / "exports").iterdir()] == ["step-00000007"]
    store.retain(new, CheckpointConfig(keep_last=1))
    assert [folder.name[-1] for folder in (tmp_path / "checkpoints").iterdir()] == ["8"]


# ---- a new user


def test_the_lines_in_the_readme_run_as_they_stand(corpus, tmp_path):
    """On a model at the place that README.md names: each mask becomes a token, what was given stays."""
    pytest.importorskip("transformers")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) == 6
    export(in_memory(SHAPES["qk-norm"], corpus), "qwen3", tmp_path / "runs/quickstart-qwen3")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def add(a, b):\n    return") and "<mask>" not in done.stdout
