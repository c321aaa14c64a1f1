"""Tokenized corpora: Megatron's .bin and .idx, NumPy arrays, and files that contain only token ids.

Ids are not changed. A document ends with eos (with a Megatron index: where the index says) and may begin with bos; it
is returned without both. The ids are copied into our shards instead of being referenced, because our documents have a
bos, and the validation split is drawn by document.

Sources of the formats: Megatron-LM megatron/core/datasets/indexed_dataset.py, OLMo-core's NumpyDatasetBase, nanoGPT
data/openwebtext/prepare.py, llm.c dev/data/data_common.py.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np

from mdmtrain.data.tokenizer import Tokenizer

TokenType = Literal["uint8", "uint16", "uint32", "int32", "int64"]
BLOCK = 1 << 20  # ids that are read at once
LONGEST = 1 << 26  # ids in a document; a longer one suggests that eos is wrong
NUMPY = b"\x93NUMPY"
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLM_C = {struct.pack("<ii", 20240520, 1): "<u2", struct.pack("<ii", 20240801, 7): "<u4"}  # magic number and version
LLM_C_HEADER = 256 * 4  # bytes; the third number in it is the number of ids


class TokenFile:
    """An open file of token ids."""

    def __init__(self, name: str, raw: BinaryIO, index: BinaryIO | None, dtype: TokenType | None, tokenizer: Tokenizer):
        """name: for errors. index: of Megatron's files. dtype: of a file without a header. tokenizer: made the ids.

        Raises ValueError if the file does not match its header or its index.
        """
        self.name, self._raw, self._tokenizer = name, raw, tokenizer
        self._bytes = raw.seek(0, 2)
        raw.seek(0)
        self._lengths: np.ndarray | None = None  # ids in each document, if there is an index
        self._dtype, self._count = self._read_index(index) if index else self._read_header(dtype)
        begin, expected = raw.tell(), self._count * self._dtype.itemsize
        if begin + expected != self._bytes:
            said = "its index belongs to another file, or it is" if index else "it is"
            found = f"{self._bytes - begin:,} bytes of ids, but {expected:,} are announced"
            raise ValueError(f"{name}: {found}: {said} cut off or altered")
        self._allowed = np.ones(tokenizer.vocab_size, dtype=bool)
        roles = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
        without_piece = [number for number, piece in enumerate(tokenizer.raw_pieces()) if not piece]
        self._allowed[[*roles, *tokenizer.unknown, *without_piece]] = False

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document without bos and eos: int64 [ids].

        Raises ValueError for an id that the tokenizer never encodes text to, and for documents without an eos at the
        end.
        """
        eos, with_eos = self._tokenizer.eos_id, None
        for number, ids in enumerate(self._by_index() if self._lengths is not None else self._by_eos(), 1):
            if self._lengths is not None and len(ids):
                ends = bool(ids[-1] == eos)
                with_eos = ends if with_eos is None else with_eos
                if ends != with_eos:
                    has = "has no eos" if with_eos else f"has an eos ({eos})"
                    raise ValueError(
                        f"{self.name}: document {number} {has} at its end, unlike those before it: repair the file"
                    )
                ids = ids[:-1] if ends else ids
            if len(ids) and ids[0] == self._tokenizer.bos_id:
                ids = ids[1:]
            self._check(ids, number)
            yield ids

    def _check(self, ids: np.ndarray, document: int) -> None:
        size, why = len(self._allowed), ""
        outside = (ids < 0) | (ids >= size)
        if outside.any():
            at, why = int(outside.argmax()), f"outside the vocabulary of {size:,}"
        elif not self._allowed[ids].all():
            at = int((~self._allowed[ids]).argmax())
            why = f"the tokenizer's {self._tokenizer.raw_pieces()[ids[at]] or 'number without a piece'!r}"
        if why:
            raise ValueError(
                f"{self.name}: document {document}: the id {ids[at]} is {why}: give the tokenizer and the --dtype that "
                "the ids were made with"
            )

    def _blocks(self) -> Iterator[np.ndarray]:
        left = self._count
        while left:
            taken = min(left, BLOCK)
            left -= taken
            yield self._take(taken)

    def _take(self, count: int) -> np.ndarray:
        content = self._raw.read(count * self._dtype.itemsize)
        ids = np.frombuffer(content, dtype=self._dtype)
        if len(ids) < count:
            raise ValueError(f"{self.name}: became shorter while it was read: prepare it again")
        return ids.astype(np.int64)

    def _by_index(self) -> Iterator[np.ndarray]:
        assert self._lengths is not None, "without an index"
        for length in self._lengths.tolist():
            yield self._take(length)

    def _by_eos(self) -> Iterator[np.ndarray]:
        """Documents between eos tokens. An eos may precede the first document, and the last one may have none."""
        parts: list[np.ndarray] = []
        held, found = 0, False
        for block in self._blocks():
            start = 0
            for end in np.flatnonzero(block == self._tokenizer.eos_id).tolist():
                document = np.concatenate([*parts, block[start:end]])
                if found or len(document):
                    yield document
                found, parts, held, start = True, [], 0, end + 1
            parts.append(block[start:])
            held += len(block) - start
            if held > LONGEST:
                self._no_eos()
        if not found and self._count:
            self._no_eos()
        if held:
            yield np.concatenate(parts)

    def _no_eos(self) -> None:
        raise ValueError(
            f"{self.name}: there is no eos ({self._tokenizer.eos_id}) at the ends of documents: give the tokenizer and "
            "the --dtype that the ids were made with"
        )

    def _read_header(self, dtype: TokenType | None) -> tuple[np.dtype, int]:
        """(dtype, number) of the ids in a file without an index. Then the file is at its first id."""
        head = self._raw.read(8)
        self._raw.seek(0)
        if head.startswith(NUMPY):
            return self._read_numpy()
        if head in LLM_C:
            header = self._raw.read(LLM_C_HEADER)
            if len(header) < LLM_C_HEADER:
                raise ValueError(f"{self.name}: cut off in its header: replace it")
            return np.dtype(LLM_C[head]), int(np.frombuffer(header, "<i4")[2])
        found = np.dtype(dtype).newbyteorder("<")
        if self._bytes % found.itemsize:
            raise ValueError(f"{self.name}: {self._bytes:,} bytes are not a whole number of {dtype}: check --dtype")
        return found, self._bytes // found.itemsize

    def _read_numpy(self) -> tuple[np.dtype, int]:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            shape, _, dtype = readers[np.lib.format.read_magic(self._raw)](self._raw)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.name}: damaged NumPy file ({' '.join(str(error).split())}): replace it") from None
        if len(shape) != 1 or dtype.kind not in "iu":
            raise ValueError(f"{self.name}: an array of {dtype} and shape {shape}, not one row of ids: convert it")
        return dtype, shape[0]

    def _read_index(self, index: BinaryIO) -> tuple[np.dtype, int]:
        """(dtype, number) of the ids that Megatron's index describes. Sets the lengths of the documents."""
        content = index.read()
        name, head = f"the index of {self.name}", struct.calcsize("<9sQBQQ")
        if len(content) < head or not content.startswith(MEGATRON):
            raise ValueError(f"{name}: not an index of Megatron: replace it, or move it away and give --dtype")
        _, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", content)
        if version != 1 or code not in MEGATRON_TYPES:
            raise ValueError(
                f"{name}: version {version} with type {code}, which is not read: write it with Megatron-LM"
            )
        if len(content) != head + 12 * sequences + 8 * ends:
            raise ValueError(f"{name}: cut off, altered or of data with modes (of images): replace it")
        dtype = np.dtype(MEGATRON_TYPES[code])
        sizes = np.frombuffer(content, "<i4", sequences, head).astype(np.int64)
        pointers = np.frombuffer(content, "<i8", sequences, head + 4 * sequences)
        documents = np.frombuffer(content, "<i8", ends, head + 12 * sequences)
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        fits = (sizes >= 0).all() and (pointers == bounds[:-1] * dtype.itemsize).all()
        if not (fits and ends and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()):
            raise ValueError(f"{name}: its sequences do not follow each other: write it again with Megatron-LM")
        self._lengths = np.diff(bounds[documents])
        return dtype, int(bounds[-1])
