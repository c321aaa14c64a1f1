"""Text <-> token ids: a sentencepiece BPE model that loses nothing.

Any text comes back byte for byte (byte fallback, no normalisation), and no text ever becomes a reserved id: bos, eos,
pad and mask are control pieces, which sentencepiece does not match in its input.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from mdmtrain.data.hub import ESCAPE, ROLES, SPACE_MARK, HubPieces

MODEL_FILE = "tokenizer.model"
SAMPLE_CHARACTERS = 50_000_000  # enough to learn merges; more only costs time and memory

# sentencepiece writes spaces as U+2581, so a U+2581 in the text would come back as a space. It is escaped with a
# private-use character that next to no text contains; the escape itself is escaped too: one escaped form per string.
_PROBE = f"a  b \n\n\t\r\n\0 {SPACE_MARK}{ESCAPE}0 </s><pad><mask><unk><0x41> e\u0301 \u00e9\ufb01\u4e16\U0001f600 "


def _escape(text: str) -> str:
    return text.replace(ESCAPE, ESCAPE + "0").replace(SPACE_MARK, ESCAPE + "1")


def _unescape(text: str) -> str:
    return text.replace(ESCAPE + "1", SPACE_MARK).replace(ESCAPE + "0", ESCAPE)


class Tokenizer:
    """A loaded model. `Tokenizer.load` and `Tokenizer.train` make one; `sha256` is its identity in every manifest."""

    def __init__(self, model: bytes, name: str):
        """`model` is the content of a sentencepiece model file, or what `hub.bundle` made of a foreign tokenizer.

        `name` stands for it in errors (ValueError).
        """
        foreign = model[:1] == b"{"
        try:
            if foreign:
                pieces = HubPieces(model)
                numbers = [pieces.piece_to_id(pieces.names.get(role, "")) for role in ROLES]
            else:
                pieces = sentencepiece.SentencePieceProcessor()
                pieces.LoadFromSerializedProto(model)
                numbers = [pieces.bos_id(), pieces.eos_id(), pieces.pad_id(), pieces.piece_to_id("<mask>")]
                numbers = [i if i >= 0 and pieces.is_control(i) else -1 for i in numbers]
        except ValueError as error:
            raise ValueError(f"tokenizer {name}: {error}") from None
        except (RuntimeError, OSError):
            raise ValueError(f"{name} is not a sentencepiece model") from None
        self._pieces = pieces
        self._escaped = not foreign or pieces.piece_to_id(SPACE_MARK) >= 0  # byte-level pieces have no mark for spaces
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = pieces.get_piece_size()
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = numbers
        reserved = dict(zip(ROLES, numbers, strict=True))
        missing = [role for role, i in reserved.items() if i < 0]
        if missing:
            raise ValueError(
                f"tokenizer {name} has no control piece for {', '.join(missing)}: train one with "
                "--vocab-size, or add <mask> to control_symbols and set pad_id when you train yours"
            )
        ids = self.encode(_PROBE)
        if self.decode(ids) != _PROBE or set(ids) & {*reserved.values(), self._pieces.unk_id()}:
            raise ValueError(
                f"tokenizer {name} does not give text back byte for byte: it needs byte_fallback, identity "
                "normalisation, add_dummy_prefix and remove_extra_whitespaces false; or train one with --vocab-size"
            )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer in a model file, or in a prepared folder. Raises ValueError where there is none that fits."""
        file = model_file(path)
        return cls(file.read_bytes(), str(file))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | Path) -> "Tokenizer":
        """Learn `vocab_size` pieces from a bounded, deterministic sample of `texts` and write the model to `path`.

        Raises ValueError where `vocab_size` is too small for the bytes and reserved pieces or too large for the texts.
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
                character_coverage=1.0,  # the rare ones are out already; sentencepiece takes no bound on their number
                max_sentence_length=1 << 20,  # above every chunk of _sentences: nothing is skipped
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
        """Ids of `text`, no bos or eos added, never a reserved id."""
        return self._pieces.encode(_escape(text) if self._escaped else text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; reserved ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        skip = {self.bos_id, self.eos_id, self.pad_id, self.mask_id}
        text = self._pieces.decode([int(i) for i in ids if i not in skip])
        return _unescape(text) if self._escaped else text

    def pieces(self) -> list[str]:
        """Every id's piece for a person to read: '<mask>', 'def', '<0xE4>'."""
        return [self._pieces.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(self.vocab_size)]


def model_file(path: str | Path) -> Path:
    """The model file that `path` (itself, or a folder with one in it) names. Raises ValueError where there is none."""
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"no tokenizer at {file}: give a sentencepiece model file or a prepared folder")
    return file


def bounded_sample(texts: Iterable[str], characters: int) -> list[str]:
    """Texts chosen by their hash, about `characters` long together at most, spread evenly; the same set in any order.

    Memory stays bounded: whenever the sample is over the bound, the threshold halves and the texts above it go.
    """
    kept: list[tuple[int, str]] = []
    threshold, size = 1 << 64, 0
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
    """Translation of the characters that get no piece of their own, and are spelled in bytes, to a space.

    Kept are the most frequent ones, up to 99.95% of the text and `most` characters.
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    rare, seen, enough = {}, 0, 0.9995 * counts.total()
    for rank, (character, count) in enumerate(counts.most_common()):
        if seen >= enough or rank >= most:
            rare[ord(character)] = " "
        seen += count
    return rare


def _sentences(texts: list[str], rare: dict[int, str]) -> Iterator[str]:
    """Chunks for the trainer: line ends inside, so that they are learned as pieces.

    sentencepiece skips a chunk with NUL or U+2585 (its own mark for unknowns), so these are out.
    """
    out = {**rare, 0: " ", 0x2585: " "}
    for text in texts:
        text = _escape(text).translate(out)
        for start in range(0, len(text), 4096):
            yield text[start : start + 4096]
