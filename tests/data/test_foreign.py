"""Other models' tokenizers lose no text or are refused, from their files through training to an exported folder."""

import gc
import io
import json
import random
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from mdmtrain.checkpoint.weights import open_checkpoint
from mdmtrain.data.hub import hub_files
from mdmtrain.data.lossless import ROLES
from mdmtrain.data.prepare import Options, prepare
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer, read_model
from tests.conftest import SOAK, write_config
from tests.data.foreign import CONFIGURATIONS, DOCUMENTS, Foreign, byte_level, content_of, token
from tests.spawn import run_world

transformers = pytest.importorskip("transformers")
CHANGED = "does not preserve text"
ALPHABET = [
    *(" ", "  ", "\n", "\t", "\r\n", "\0", "0", "1", "a", "A", "self", "def ", "\u00e9", "e\u0301", "\u4e16", "\ufb01"),
    *(
        "\u3000",
        "\u2581",
        "\u2581mark",
        "\U0010f581",
        "</s>",
        "<mask>",
        "<unk>",
        "<0x41>",
        "<think>",
        "<tool>",
        "<|hole|>",
    ),
    *("[MASK]", "self_word"),
]


def exported(model: bytes, folder: Path):
    """transformers' tokenizer of the files that an exported folder has."""
    folder.mkdir()
    for name, content in hub_files(model).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_lossless_and_equal(model: bytes, folder: Path) -> Tokenizer:
    """Every text comes back, has no reserved id and the same ids in transformers; parts decode as the whole does."""
    ours, theirs = Tokenizer(model, "it"), exported(model, folder)
    draw = random.Random(0)
    texts = DOCUMENTS + ["".join(draw.choices(ALPHABET, k=draw.randint(0, 9))) for _ in range(20_000 if SOAK else 300)]
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text
        assert ours.decode(ids) == text and not ours.reserved & set(ids)
        before, after = text[: len(text) // 2], text[len(text) // 2 :]
        assert ours.decode(ours.encode(before) + ours.encode(after)) == text
    for number, piece in enumerate(ours.raw_pieces()):
        assert not piece or theirs.convert_tokens_to_ids(piece) == number
    reserved = [getattr(ours, f"{role}_id") for role in ROLES]
    assert reserved == [getattr(theirs, f"{role}_token_id") for role in ROLES] and len(set(reserved)) == 4
    assert Tokenizer.load(folder).model == model, "what was exported is read as what it was"
    return ours


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_tokenizer_loses_nothing_or_is_refused(name, tmp_path):
    foreign = CONFIGURATIONS[name]()
    folder = foreign.write(tmp_path / "foreign")
    if foreign.refused:
        with pytest.raises(ValueError, match=foreign.refused) as caught:
            Tokenizer.load(folder)
        assert "\n" not in str(caught.value)
        return
    loaded, size = read_model(folder)
    ours = assert_lossless_and_equal(loaded.model, tmp_path / "exported")
    declared = {one["content"]: one["id"] for one in foreign.tokenizer["added_tokens"]}
    declared |= {t["content"]: int(i) for i, t in foreign.settings.get("added_tokens_decoder", {}).items()}
    pieces = ours.raw_pieces()
    assert {piece: pieces.index(piece) for piece in declared} == declared, "ids are those of the file"
    own = foreign.tokenizer["model"]["vocab"]
    kept = own if isinstance(own, dict) else {piece: number for number, (piece, _) in enumerate(own)}
    assert all(pieces[number] == piece for piece, number in kept.items()) and len(pieces) >= size > max(kept.values())


def test_ordinary_text_has_the_ids_that_the_model_was_trained_with(tmp_path):
    """What is switched off changes no text that had nothing to lose: composed, in its case, after the first word."""
    for name in ("gpt2", "llama3", "qwen", "gemma", "roberta", "mistral", "llama2"):
        folder = CONFIGURATIONS[name]().write(tmp_path / name)
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        text = " the model of a step: x = 12345\n  return x\n"
        start = {"mistral": " ", "llama2": ""}.get(
            name
        )  # these put a space in front, Metaspace only where there is none
        given = text if start is None else text.removeprefix(" ")
        assert ours.encode(text) == theirs.encode(given, add_special_tokens=False), name


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (lambda c: c["model"]["vocab"].update({"Ġa": 300, "Ġb": 300}), {}, "have the same id"),
        (lambda c: c["added_tokens"][0].update(id=900), {}, "'<s>' has two ids, 0 and 900"),
        (lambda c: c.update(decoder=None), {}, CHANGED),
        (lambda c: c["added_tokens"].append(token(500, "gr\u00f6\u00dfe", special=False)), {}, CHANGED),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), {}, CHANGED),
        (lambda c: c["model"]["vocab"].pop("q"), {}, CHANGED),
        (lambda c: None, {"mask_token": "in"}, "mask_token 'in' is an ordinary piece"),
        (lambda c: c["added_tokens"].append(token(c["model"]["vocab"]["q"], "q")), {"mask_token": "q"}, "'q' would be"),
        (lambda c: None, {"added_tokens_decoder": {"77": {"content": "</s>"}}}, "'</s>' has id 1, but 77"),
    ],
)  # fmt: skip
def test_ids_and_text_that_contradict_are_one_clear_line(change, settings, words, tmp_path):
    content = content_of(byte_level())
    change(content)
    folder = Foreign(content, {"bos_token": "<s>", "eos_token": "</s>", **settings}).write(tmp_path / "foreign")
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_models_with_pieces_of_their_own(kind, tmp_path):
    """User-defined pieces, digits among them, and more control pieces keep their ids in transformers."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((Path(__file__).read_text() + "aaaa abab ((( )))").splitlines()), model_writer=model,
        vocab_size=600, model_type=kind, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=3, control_symbols=["<mask>", "<tool>"],
        user_defined_symbols=["<think>", "self", "0", "1", "12"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "given.model").write_bytes(model.getvalue())
    ours = Tokenizer.load(tmp_path / "given.model")
    given = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert_lossless_and_equal(ours.model, tmp_path / "exported")
    assert ours.raw_pieces() == [given.id_to_piece(i) for i in range(given.get_piece_size())]
    text = "def self(x12, 10) <think>x</think>"
    assert ours.encode(text) == given.encode(text) and ours.raw_pieces().index("<think>") in ours.encode(text)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_would_change_is_named_with_its_line(workers, tmp_path):
    """A tokenizer that drops snowmen, which is in none of the texts that every tokenizer is tried on."""
    content = content_of(byte_level())
    melting = {"type": "Split", "pattern": {"String": "\u2603"}, "behavior": "Removed", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [melting, content["pre_tokenizer"]]}
    folder = Foreign(content).write(tmp_path / "foreign")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("one", "\n\nwinter \u2603", "x"))
    )
    (tmp_path / "in.txt").write_text("one\ntwo\nwinter \u2603\n")
    pair = {"prompt": "what \u2603?", "response": "melted"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(pair) + "\n")
    for name, line in (("in.jsonl", 2), ("in.txt", 3), ("pairs.jsonl", 2)):
        with pytest.raises(ValueError, match=rf"{name}:{line}: .*does not preserve text: .*\u2603") as caught:
            prepare([tmp_path / name], tmp_path / "out", Options(str(folder)), workers)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="does not preserve text"):
        Tokenizer.load(folder).encode("\u2603")


# ---- through the product


def through_the_product(world, base: Path, name: str) -> dict:
    """Convert, prepare, train, evaluate, generate and export, as their commands do; runs in a process of its own."""
    from mdmtrain import evaluate, generate, train
    from tools import convert_ckpt, prepare_data

    start, data, run, out = (str(base / part) for part in ("start", "data", "run", "llama"))
    (base / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS * 3))
    convert_ckpt.main([str(base / "foreign"), "--from", "llama", "--out", start])
    prepare_data.main(
        [str(base / "in.jsonl"), "--tokenizer", str(base / "foreign"), "--validation-fraction", "0.3", "--out", data]
    )
    tokenizer, found = Tokenizer.load(start), []
    assert tokenizer.sha256 == Tokenizer.load(data).sha256
    for split in (PreparedSplit(data, part) for part in ("train", "validation")):
        edges = np.append(split.document_starts(), split.tokens)
        found += [tokenizer.decode(split.read(a, b - a)) for a, b in pairwise(edges)]
    assert sorted(found) == sorted(DOCUMENTS * 3)
    tree = {
        "run": {"dir": run, "steps": 2, "global_batch": 4, "micro_batch": 4},
        "model": json.loads(json.dumps(asdict(open_checkpoint(Path(start)).shape))),
        "data": {"sources": [{"path": data}], "sequence_length": 48, "workers": 0},
        "optim": {"lr": 1e-3},
        "checkpoint": {"init_from": start, "save_every": 2},
        "monitor": {"tensorboard": False},
        "eval": {"every": 2, "rows": 4, "samples": 2},
    }
    prompts = base / "prompts.jsonl"
    parts = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in DOCUMENTS if len(text) < 20]
    prompts.write_text("".join(json.dumps({"prefix": a, "suffix": b}) + "\n" for a, b in parts))
    for module in (train, evaluate, generate):
        module.init_world = lambda *arguments: world
    train.main([str(write_config(tree, base / "config.yaml"))])
    gc.enable()
    evaluate.main(
        [run, "--data", str(base / "in.jsonl"), "--rows", "4", "--mc-num", "2", "--json", str(base / "e.json")]
    )
    generate.main([run, "--input", str(prompts), "--gen-length", "3", "--output", str(base / "filled.jsonl")])
    filled = [json.loads(line) for line in (base / "filled.jsonl").read_text().splitlines()]
    for (before, after), record in zip(parts, filled, strict=True):
        assert record["text"] == before + record["gaps"][0] + after
    convert_ckpt.main([run, "--to", "llama", "--out", out])
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    for text in DOCUMENTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text
    assert model.config.vocab_size == len(model.lm_head.weight) >= tokenizer.vocab_size
    prepare_again = base / "again"
    prepare_data.main(
        [str(base / "in.jsonl"), "--tokenizer", run, "--validation-fraction", "0.3", "--out", str(prepare_again)]
    )
    assert Tokenizer.load(prepare_again).sha256 == tokenizer.sha256
    return json.loads((base / "e.json").read_text())["results"][0]


@pytest.mark.parametrize("name", CONFIGURATIONS if SOAK else ["qwen", "llm_jp", "bert"])
def test_from_a_foreign_model_to_an_exported_one(name, tmp_path):
    from tools import convert_ckpt, prepare_data

    foreign = CONFIGURATIONS[name]()
    folder = foreign.write_model(tmp_path / "foreign")
    if foreign.refused:
        (tmp_path / "in.txt").write_text("text")
        for command, options in (
            (convert_ckpt.main, [str(folder), "--from", "llama"]),
            (prepare_data.main, [str(tmp_path / "in.txt"), "--tokenizer", str(folder)]),
        ):
            with pytest.raises(ValueError, match=foreign.refused):
                command([*options, "--out", str(tmp_path / "out")])
        assert {path.name for path in tmp_path.iterdir()} == {"foreign", "in.txt"}
        return
    [result] = run_world(through_the_product, 1, tmp_path, name)
    size = sum(len(text.encode()) for text in DOCUMENTS * 3)
    assert result["bytes"] == size and np.isfinite(result["nelbo"]), "every byte of the documents is scored"
