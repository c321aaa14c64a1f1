"""Read corpora of token ids: Megatron's .bin and .idx, NumPy arrays, llm.c's files, and raw files of ids.

The ids are not changed. A document ends with eos (in Megatron's files: where the index says) and may begin with bos;
both are removed. The ids are copied into our shards, because our documents begin with bos, and because the validation
split is chosen document by document.

Sources of the formats: Megatron-LM megatron/core/datasets/indexed_dataset.py, OLMo-core's NumpyDatasetBase, nanoGPT
data/openwebtext/prepare.py, llm.c dev/data/data_common.py.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np

from mdmtrain.data.tokenizer import Tokenizer

TokenType = Literal["uint8", "uint16", "uint32", "int32", "int64"]
BLOCK = 1 << 20  # ids in one read
LONGEST = 1 << 26  # maximum ids of a document; more ids without an eos mean that the eos is probably wrong
NUMPY = b"\x93NUMPY"
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLM_C = {struct.pack("<ii", 20240520, 1): "<u2", struct.pack("<ii", 20240801, 7): "<u4"}  # magic number and version
LLM_C_HEADER = 256 * 4  # bytes; the third number in it is the number of ids


class TokenFile:
    """An open file of token ids."""

    def __init__(self, name: str, raw: BinaryIO, index: BinaryIO | None, dtype: TokenType | None, tokenizer: Tokenizer):
        """Read the header or the index of the file.

        name: for error messages. index: the index of a Megatron file. dtype: the type of the ids in a file without a
        header. tokenizer: the one that made the ids. Raises ValueError if the file does not match its header or index.
        """
        self.name = name
        self._raw = raw
        self._tokenizer = tokenizer
        self._bytes = raw.seek(0, 2)
        raw.seek(0)
        self._lengths: np.ndarray | None = None  # ids of each document, if there is an index
        self._dtype, self._count = self._read_index(index) if index else self._read_header(dtype)
        begin = raw.tell()
        expected = self._count * self._dtype.itemsize
        if begin + expected != self._bytes:
            said = "its index belongs to another file, or it is" if index else "it is"
            found = f"{self._bytes - begin:,} bytes of ids, but {expected:,} are expected"
            raise ValueError(f"{name}: {found}: {said} cut off or altered")
        self._allowed = np.ones(tokenizer.vocab_size, dtype=bool)
        roles = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
        without_piece = [number for number, piece in enumerate(tokenizer.raw_pieces()) if not piece]
        self._allowed[[*roles, *tokenizer.unknown, *without_piece]] = False

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of each document without bos and eos: int64 [ids].

        Raises ValueError if the tokenizer cannot have made an id from text, or if documents do not end with eos.
        """
        eos = self._tokenizer.eos_id
        with_eos = None
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
        size = len(self._allowed)
        why = ""
        outside = (ids < 0) | (ids >= size)
        if outside.any():
            at = int(outside.argmax())
            why = f"outside the vocabulary of {size:,}"
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
        """The documents separated by eos. An eos may precede the first document, and the last eos may be missing."""
        parts: list[np.ndarray] = []
        held, found = 0, False
        for block in self._blocks():
            start = 0
            for end in np.flatnonzero(block == self._tokenizer.eos_id).tolist():
                document = np.concatenate([*parts, block[start:end]])
                if found or len(document):
                    yield document
                found = True
                parts = []
                held = 0
                start = end + 1
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
        """(type, number) of the ids of a file without an index. The file's position is then at the first id."""
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
            raise ValueError(
                f"{self.name}: {self._bytes:,} bytes are not a multiple of the size of {dtype}: check --dtype"
            )
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
        """(type, number) of the ids according to Megatron's index. Sets the lengths of the documents."""
        content = index.read()
        name = f"the index of {self.name}"
        head = struct.calcsize("<9sQBQQ")
        if len(content) < head or not content.startswith(MEGATRON):
            raise ValueError(f"{name}: not an index of Megatron: replace it, or move it away and give --dtype")
        _, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", content)
        if version != 1 or code not in MEGATRON_TYPES:
            raise ValueError(f"{name}: version {version} with type {code} is not supported: write it with Megatron-LM")
        if len(content) != head + 12 * sequences + 8 * ends:
            raise ValueError(f"{name}: truncated, altered, or of multimodal data: replace it")
        dtype = np.dtype(MEGATRON_TYPES[code])
        sizes = np.frombuffer(content, "<i4", sequences, head).astype(np.int64)
        pointers = np.frombuffer(content, "<i8", sequences, head + 4 * sequences)
        documents = np.frombuffer(content, "<i8", ends, head + 12 * sequences)
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        fits = (sizes >= 0).all() and (pointers == bounds[:-1] * dtype.itemsize).all()
        if not (fits and ends and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()):
            raise ValueError(f"{name}: its sequences are not contiguous: write it again with Megatron-LM")
        self._lengths = np.diff(bounds[documents])
        return dtype, int(bounds[-1])
