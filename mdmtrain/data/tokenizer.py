"""Lossless conversion between text and token ids: every text decodes to exactly itself, or is refused with an error.

No text is encoded as a reserved id. Our own tokenizers are sentencepiece BPE models with byte fallback, whose bos, eos,
pad and mask are control pieces; `hub.py` reads the tokenizers of other models.
"""

import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from mdmtrain.data.chat import PLAIN, Spans, Template, template_in
from mdmtrain.data.hub import HubPieces, bundle, bundle_content, bundle_unigram
from mdmtrain.data.lossless import ESCAPE, ROLES, SPACE_MARK
from mdmtrain.data.sentencepieces import SentencePieces, adapted, escape
from mdmtrain.data.tiktoken_files import as_tokenizer_json, is_rank_file

log = logging.getLogger("mdmtrain")

MODEL_FILE = "tokenizer.model"
HUB_FILE = "tokenizer.json"
SAMPLE_CHARACTERS = 50_000_000  # enough to learn merges; more would only cost time and memory

# Characters that some tokenizers drop, join, compose or replace. They are tested next to each other and separately.
_RANGES = [(0, 0x250), (0x300, 0x370), (0x1100, 0x1120), (0x2000, 0x2070), (0xFB00, 0xFB07), (0xFEFF, 0xFF20)]
_CHARACTERS = "".join(chr(i) for first, end in _RANGES for i in range(first, end))
_TEXTS = [
    " ", "  ", "\n", "\r\n", "\ta\n\n  b \n", "a  b   c    d", f" {SPACE_MARK}a{SPACE_MARK} {ESCAPE}0{ESCAPE}1", "x y ",
    "Do n't . , ! ? 's 're 'll 've isn 't", "\u00c9 e\u0301 E\u0301 \u1e9b\u0323 \u212b", "<0x41><0xE4>", "``a'' \"b\"",
    "\ufdfa \u3000 \uac00 \u4e16\u754c \U0001f600\U0001f468\u200d\U0001f469 \U0001d54f \ufffd", "ABC abc \u0130\u1e9e",
]  # fmt: skip


class TextChanged(ValueError):
    """Raised for text that would not be the same after encoding and decoding."""

    def __init__(self, message: str, line: int):
        """line: the line of the text with the first difference, from 1."""
        super().__init__(message)
        self.line = line


class Tokenizer:
    """A loaded tokenizer, made by `Tokenizer.load` or `Tokenizer.train`.

    `model` is the content of its file; `sha256` is its identity in every manifest. `reserved` contains the ids that no
    text is encoded as: special tokens (bos, eos, pad, mask and others), the unknown piece, and ids without a piece.
    """

    def __init__(self, model: bytes, name: str):
        """model: the content of a sentencepiece model file, or the result of `hub.bundle` for a foreign tokenizer.

        name: for error messages. Raises ValueError if the tokenizer loses text or has no reserved ids for its roles.
        """
        try:
            self._pieces = HubPieces(model) if model[:1] == b"{" else SentencePieces(model)
            names = self._pieces.names
            if names["mask"] in (names["bos"], names["eos"], names["pad"]):
                raise ValueError(
                    f"its mask token {names['mask']!r} also has another role: give mask a token of its own"
                )
        except ValueError as error:
            raise ValueError(f"tokenizer {name}: {error}") from None
        self.name, self.model, self.sha256 = name, model, hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._pieces.get_piece_size()
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (self._pieces.piece_to_id(names[role]) for role in ROLES)
        self.reserved = frozenset(self._pieces.reserved())
        self.unknown = frozenset({self._pieces.unk_id()} - {-1})  # the unknown piece's id, if there is one
        for text in self.probes():
            self.encode(text)

    @classmethod
    def load(cls, path: str | Path, tiktoken_pattern: str | None = None) -> "Tokenizer":
        """The tokenizer at `path`, see `read_model`. Raises ValueError if there is none, or it cannot be used."""
        return read_model(path, tiktoken_pattern)[0]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | Path) -> "Tokenizer":
        """Train a tokenizer of `vocab_size` pieces on a bounded, deterministic sample of `texts`; write it to `path`.

        Raises ValueError if `vocab_size` is too small for the bytes and reserved pieces or too large for the texts.
        """
        smallest = 5 + 256 + 3
        if vocab_size < smallest:
            raise ValueError(f"vocabulary of {vocab_size} is too small: bytes and reserved pieces need {smallest}")
        sample = bounded_sample(texts, SAMPLE_CHARACTERS)
        if not sample:
            raise ValueError("no text to train a tokenizer on: give files with text in them")
        rare = _rare_characters(sample, (vocab_size - smallest) // 2)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(sample, rare),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,  # runs of spaces: indentation
                split_digits=True,
                character_coverage=1.0,  # rare ones are already removed; sentencepiece cannot bound their number
                max_sentence_length=1 << 20,  # longer than every chunk of _sentences, so nothing is skipped
                pad_id=3,
                control_symbols=["<mask>"],  # id 4, after unk, bos, eos and pad
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            limit = re.search(r"value <= (\d+)", str(error))
            most = f": at most {limit[1]}" if limit else ""
            raise ValueError(
                f"vocabulary of {vocab_size} is too large for this text{most}: lower --vocab-size or give more text"
            ) from None
        Path(path).write_bytes(model.getvalue())
        return cls(model.getvalue(), str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos and eos. Raises TextChanged if they would not decode to exactly `text`."""
        ids = self.encode_unchecked(text)
        back = self._pieces.decode(ids)
        if back == text and self.reserved.isdisjoint(ids):
            return ids
        bad = next((i for i in ids if i in self.reserved), None)
        if bad is None:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            start = max(at - 8, 0)
            what = f"{text[start : at + 8]!r} would become {back[start : at + 8]!r}"
        elif bad == self._pieces.unk_id():
            at = next((i for i, c in enumerate(text) if bad in self._pieces.encode(c)), 0)
            what = f"it has no piece for {text[at : at + 1]!r}"
        else:
            piece = self._pieces.id_to_piece(bad)
            at = max(text.find(piece), 0)
            what = f"it would encode text as its reserved token {piece!r}"
        raise TextChanged(f"tokenizer {self.name} does not preserve text: {what}", text.count("\n", 0, at) + 1)

    def encode_unchecked(self, text: str) -> list[int]:
        """The ids of `text` without the check of `encode`, to measure what the check costs."""
        return self._pieces.encode(text)

    def encode_prompt(self, text: str, specials: Spans = ()) -> list[int]:
        """Like `encode`, for text in which a chat template wrote special tokens. specials: their [start, end)."""
        ids, done = [], 0
        for start, end in specials:
            ids += [*self.encode(text[done:start]), self._pieces.piece_to_id(text[start:end])]
            done = end
        return ids + self.encode(text[done:])

    def specials(self) -> list[str]:
        """The pieces of special tokens."""
        return [piece for piece in self._pieces.added() if self._pieces.piece_to_id(piece) in self.reserved]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. bos, eos, pad and mask are skipped; bytes that are not UTF-8 become U+FFFD.

        Decoding in parts gives the same text as decoding at once, except for characters that are divided between parts.
        """
        skip = {self.bos_id, self.eos_id, self.pad_id, self.mask_id}
        return self._pieces.decode([int(i) for i in ids if i not in skip])

    def pieces(self) -> list[str]:
        """The piece of every id in readable form: '<mask>', 'def', '<0xE4>'."""
        return [piece.replace(SPACE_MARK, " ") for piece in self.raw_pieces()]

    def raw_pieces(self) -> list[str]:
        """The piece of every id as in the tokenizer's file, "" if there is none."""
        return [self._pieces.id_to_piece(i) for i in range(self.vocab_size)]

    def probes(self) -> list[str]:
        """Test texts that show whether a tokenizer loses text. They include all of its special and added pieces."""
        added = self._pieces.added()
        within = "".join(f" {piece} a{piece}b\n{piece}\n " for piece in added)
        return [*_TEXTS, _CHARACTERS, " ".join(_CHARACTERS), *([within, "".join(added)] if added else [])]


def chat_template(path: str | Path) -> Template:
    """The chat template of the model folder that contains the tokenizer `path`; `PLAIN` if the folder has none.

    Raises ValueError.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    jinja = template_in(folder)
    if jinja is None:
        return PLAIN
    tokenizer = Tokenizer.load(path)
    return Template(jinja, tuple(tokenizer.specials()), tokenizer.raw_pieces()[tokenizer.eos_id])


def read_model(path: str | Path, tiktoken_pattern: str | None = None) -> tuple[Tokenizer, int]:
    """The tokenizer at `path`, and its vocabulary size before tokens were added.

    path: a sentencepiece model, a tokenizer.json, a folder with one of these (prepared data, a checkpoint, a model), or
    a rank file of tiktoken. tiktoken_pattern: see `tiktoken_files`. A foreign tokenizer is made lossless, and tokens
    are added for roles that it lacks; both are logged. Raises ValueError.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, _json_object(path / "config.json") if (path / "config.json").is_file() else {})
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: give a run, a prepared or model folder, or a tokenizer's file")
    content = path.read_bytes()
    if content.lstrip()[:1] == b"{" and "roles" not in _json_object(path):
        config = path.parent / "config.json"
        return _bundled(path, _json_object(config) if config.is_file() else {}, add_missing=True)
    if is_rank_file(content):
        model, size = bundle_content(path, *as_tokenizer_json(path, tiktoken_pattern), {}, add_missing=True)
        return Tokenizer(model, str(path)), size
    size = None
    if content[:1] != b"{":
        content, size = _adapted(content, path)
    tokenizer = Tokenizer(content, str(path))
    if isinstance(tokenizer._pieces, SentencePieces) and tokenizer._pieces.model_type == "Unigram":
        tokenizer = Tokenizer(bundle_unigram(tokenizer._pieces), str(path))
    return tokenizer, size or tokenizer.vocab_size


def _adapted(content: bytes, path: Path) -> tuple[bytes, int]:
    """The model made lossless and with a token for each role, and its original size. Changes are logged."""
    try:
        content, size, notes = adapted(content)
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from None
    if notes:
        log.warning("%s: changed so that no text is lost: %s (docs/tokenizers.md)", path, "; ".join(notes))
    return content, size


def read_folder(folder: Path, config: dict, add_missing: bool = True) -> tuple[Tokenizer, int]:
    """Like `read_model`, for a folder. config: the model's config.json. add_missing: add tokens for missing roles."""
    ours = folder / MODEL_FILE
    theirs = folder / HUB_FILE
    if ours.is_file():
        try:
            tokenizer = Tokenizer(ours.read_bytes(), str(ours))
            return tokenizer, tokenizer.vocab_size
        except ValueError as error:
            if not theirs.is_file() and add_missing:
                return read_model(ours)
            if not theirs.is_file():
                raise ValueError(f"{error}; and {folder} contains no {HUB_FILE}") from None
    if not theirs.is_file():
        raise ValueError(f"{folder} has no {HUB_FILE} and no {MODEL_FILE}: copy the model's tokenizer files there")
    return _bundled(theirs, config, add_missing)


def _bundled(file: Path, config: dict, add_missing: bool) -> tuple[Tokenizer, int]:
    model, size = bundle(file, config, add_missing)
    return Tokenizer(model, str(file)), size


def _json_object(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: damaged (not a JSON object): get the original file") from None


def bounded_sample(texts: Iterable[str], characters: int) -> list[str]:
    """A sample of texts with about `characters` characters at most. The same set for any order of `texts`.

    Texts are chosen by their hash. Memory is bounded: whenever the sample exceeds `characters`, the threshold is halved
    and the texts with hashes above it are removed.
    """
    kept: list[tuple[int, str]] = []
    threshold = 1 << 64
    size = 0
    for text in texts:
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[-8:], "big")
        if key < threshold:
            kept.append((key, text))
            size += len(text)
        while size > characters and len(kept) > 1:
            threshold //= 2
            kept = [(key, text) for key, text in kept if key < threshold] or [min(kept)]
            size = sum(len(text) for _, text in kept)
    return [text for _, text in sorted(kept)]


def _rare_characters(texts: list[str], most: int) -> dict[int, str]:
    """A table for str.translate that replaces rare characters by a space, so that they get no pieces of their own.

    Rare characters are then encoded as bytes. The most frequent characters are kept: at most `most`, and no more than
    are needed for 99.95% of the text.
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    rare = {}
    seen = 0
    enough = 0.9995 * counts.total()
    for rank, (character, count) in enumerate(counts.most_common()):
        if seen >= enough or rank >= most:
            rare[ord(character)] = " "
        seen += count
    return rare


def _sentences(texts: list[str], rare: dict[int, str]) -> Iterator[str]:
    """Chunks of text for the trainer. They contain line ends, so that these are learned as pieces.

    sentencepiece skips a chunk with NUL or U+2585 (its own mark for unknown characters), so these are replaced.
    """
    out = {**rare, 0: " ", 0x2585: " "}
    for text in texts:
        text = escape(text).translate(out)
        for start in range(0, len(text), 4096):
            yield text[start : start + 4096]
