"""Tokenizers as widely used models have them, trained here on a little text, and documents that they would change.

Each configuration is a tokenizer.json, its tokenizer_config.json and what becomes of it: None where every text must
come back, or the words with which it is refused.
"""

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protobuf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as split

from tests.conftest import ROOT

TEXTS = [(ROOT / "mdmtrain/train.py").read_text(encoding="utf-8"), "Caf\u00e9 gr\u00f6\u00dfe \u4e16\u754c 12345 "] * 2
BYTES = [f"<0x{i:02X}>" for i in range(256)]
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

DOCUMENTS = [
    " leading",
    "  two leading",
    "trailing ",
    "trailing  ",
    "\nstarts with a line end",
    "ends with two\n\n",
    "\ttab\tinside\t",
    "a  b   c    d",
    "def f(x):\n    if x:\n\treturn x  \n",
    "carriage\r\nreturns\r\n",
    "old\rMac\r",
    " ",
    "   ",
    "\n",
    "\r\n",
    "\t",
    "no-break\u00a0space",
    "\u3000ideographic space\u3000",
    "thin\u2009space\u2003em",
    "zero\u200bwidth\u200djoin\u2060er",
    "\ufeffbom",
    "soft\u00adhyphen",
    "caf\u00e9",
    "cafe\u0301",
    "CAF\u00c9",
    "CAFE\u0301",
    "\u212bngstr\u00f6m \u00c5",
    "\ufb01ne \ufb03",
    "\u00bd \u00b2 \u2460 \u2122",
    "\uff21\uff22\uff43 \uff11\uff12",
    "it\u2019s \u2014 \u201cquoted\u201d \u2026",
    "``it''s'' \"it\"",
    "Do n't stop . , ! ? 's 're 'll",
    "MiXeD CaSe İı ẞß",
    "\u1112\u1161\u11ab \ud55c",
    "\u4e16\u754c\uff0c\u4f60\u597d\u3002",
    "\u0645\u0631\u062d\u0628\u0627 \ufdfa",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\U0001d54f\U0001d7d9",
    "null\0inside",
    "\x01\x1b[0m\x7f",
    "\ufffd replacement",
    "\u2581mark\u2581 \u2581",
    "\U0010f581escape \U0010f5811 \U0010f5810",
    "\u2047 \u2585",
    "<s>",
    "</s>",
    "a</s>b",
    " </s> ",
    "<mask>",
    " <mask> x",
    "[MASK] [CLS] [SEP] [UNK] [PAD]",
    "<unk> <pad>",
    "<|endoftext|>",
    "<|mdm_mask|><|mdm_pad|>",
    "<0x41>",
    "<0xE4><0xB8>",
    "<think>\n\n  so  \n</think>  ",
    "x  <think>  y",
    "<tool>",
    "<|hole|> <extra_0>",
    "Ġword Ċ Â",
    "##ing ing</w> @@ing",
    "self.self self_word xself_word",
    "1234567890 1,000.00 3.14e-5",
    "0" * 70,
    "a" * 300,
    "\u00e9" * 40,
    " " * 33 + "x",
]


@dataclass
class Foreign:
    tokenizer: dict
    settings: dict = field(default_factory=lambda: dict(ROLES))
    refused: str | None = None
    rows: int | None = None  # of the model's embedding; None: as many as the tokenizer has ids

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(self.tokenizer), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings), encoding="utf-8")
        return folder

    def write_model(self, folder: Path) -> Path:
        """The same with a small random Llama."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        added = [token["id"] for token in self.tokenizer["added_tokens"]]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.rows or max([*added, len(self.tokenizer["model"]["vocab"]) - 1]) + 1,
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(self.write(folder))
        return folder


def token(number: int, content: str, special: bool = True, **flags) -> dict:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **usual, "special": special, **flags}


def byte_level(
    pattern: str | None = None, prefix: bool = False, ignore_merges: bool = False, normalizer=None, added=(), special=()
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_of = split.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    by_pattern = [split.Split(Regex(pattern), "isolated"), bytes_of] if pattern else None
    tokenizer.pre_tokenizer = split.Sequence(by_pattern) if by_pattern else bytes_of
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    alphabet = split.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", *special], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return tokenizer


def metaspace(scheme: str = "always", cut: bool = True, unigram: bool = False, fallback: bool = True) -> dict:
    """A tokenizer that writes spaces as U+2581: BPE, or unigram."""
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", byte_fallback=fallback))
    tokenizer.pre_tokenizer = split.Metaspace(prepend_scheme=scheme, split=cut)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", "<mask>", *(BYTES if fallback else [])]
    options = {"vocab_size": 760, "special_tokens": special, "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **options) if unigram else trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in BYTES]
    content["model"]["byte_fallback"] = fallback
    return content


def charsmap() -> dict:
    """The normalizer of T5 and XLM-R: sentencepiece's nmt_nfkc rules, compiled."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text"] * 9),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    rules = protobuf.ModelProto.FromString(model.getvalue()).normalizer_spec.precompiled_charsmap
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(rules).decode()}


def content_of(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def gpt2() -> Foreign:
    """One token for every role."""
    end = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad", "unk")}
    return Foreign(content_of(byte_level(special=["<|endoftext|>"])), end)


def llama3() -> Foreign:
    """Whole words are looked up in the vocabulary before they are merged; bos is added by a template."""
    tokenizer = byte_level(GPT4, ignore_merges=True, special=[f"<|reserved_{i}|>" for i in range(20)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    return Foreign(content_of(tokenizer))


def qwen() -> Foreign:
    """NFC, no bos, pad that is another end, tokens for thinking that are ordinary, spare rows in the embedding."""
    added = ["<think>", "</think>", AddedToken("<tool>", normalized=True)]
    tokenizer = byte_level(GPT4, normalizer=normalizers.NFC(), special=["<|endoftext|>", "<|im_end|>"], added=added)
    return Foreign(content_of(tokenizer), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, rows=512)


def llama2() -> Foreign:
    """A space is put before the text and taken away by the decoder."""
    content = metaspace("never")
    content["pre_tokenizer"] = None
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    back = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [*back, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    content["added_tokens"].append(token(len(content["model"]["vocab"]), "<think>", special=False))
    return Foreign(content, {**ROLES, "pad_token": "<unk>"})


def mistral() -> Foreign:
    """The same as transformers saves it today: Metaspace with prepend_scheme first."""
    return Foreign(metaspace("first", cut=False))


def gemma() -> Foreign:
    """No space in front; line ends and runs of spaces are added tokens; ids with a hole between them."""
    content = metaspace("never")
    vocabulary = content["model"]["vocab"]
    first = len(vocabulary) + 40
    for number, text in enumerate(["\n\n", "\n\n\n", "   ", "\t\t", "<unused0>", "<tool>"]):
        content["added_tokens"].append(token(vocabulary.get(text, first + 3 * number), text, special=number == 4))
    return Foreign(content, {**ROLES, "mask_token": "<mask>"})


def roberta() -> Foreign:
    """A space before the first word, and a mask token that eats the space before it."""
    tokenizer = byte_level(prefix=True, special=[AddedToken("<mask>", lstrip=True), "<pad>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return Foreign(content_of(tokenizer), {**ROLES, "mask_token": "<mask>", "pad_token": "<pad>"})


def bert() -> Foreign:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), split.BertPreTokenizer()
    tokenizer.decoder, special = decoders.WordPiece(), ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    roles = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    return Foreign(content_of(tokenizer), roles, "does not preserve text")


def t5() -> Foreign:
    """Runs of spaces become one; characters that were not in its text are unknown."""
    content = metaspace(unigram=True, fallback=False)
    content["normalizer"] = charsmap()
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, content["pre_tokenizer"]],
    }
    return Foreign(content, {"eos_token": "</s>"}, "does not preserve text")


def llm_jp() -> Foreign:
    """Unigram with byte fallback, whose vocabulary has </s> and the bytes: text that spells them finds them there."""
    content = metaspace(unigram=True)
    steps = [charsmap(), {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Foreign(content, {**ROLES, "mask_token": "<mask>", "pad_token": "</s>"})


def thinking() -> Foreign:
    """Truncation and padding saved with it, tokens that eat spaces and whole words, text in lower case."""
    lower = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    eating = AddedToken("<think>", lstrip=True, rstrip=True, normalized=False)
    tokenizer = byte_level(normalizer=lower, added=[eating, AddedToken("self_word", single_word=True), "\u2581mark"])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    content = content_of(tokenizer)
    content["model"]["dropout"] = 0.5
    known = {str(len(content["model"]["vocab"]) + 9): {"content": "<|hole|>", "special": True}}
    return Foreign(content, {**ROLES, "added_tokens_decoder": known})


def beyond() -> Foreign:
    """Holes in the model's vocabulary, and tokens for which the embedding has no rows."""
    content = content_of(byte_level(special=["<pad>"], added=["<tool>", "<extra_0>"]))
    vocabulary = content["model"]["vocab"]
    for piece in sorted(vocabulary, key=vocabulary.get)[-3:]:
        vocabulary[piece] += 25
    for one in content["added_tokens"][-2:]:
        one["id"] += 60
    return Foreign(content, {**ROLES, "pad_token": "<pad>"}, rows=430)


CONFIGURATIONS = {
    make.__name__: make
    for make in (gpt2, llama3, qwen, llama2, mistral, gemma, roberta, bert, t5, llm_jp, thinking, beyond)
}
