"""Read records from Parquet and Arrow files, a few rows at a time, so that memory does not grow with the file.

Only this module imports `pyarrow`, and this module is imported only if such a file is read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_BYTES = 4 << 20  # bytes of rows in memory, according to the sizes in the file's metadata
MOST_ROWS = 1024  # maximum number of rows in memory
PAGES = 1 << 20  # read buffer for a Parquet column, in bytes; without it, a column of a row group is read whole
_CONTINUES = b"\xff\xff\xff\xff"  # the first bytes of each message in an Arrow stream
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list)


class Table:
    """An open columnar file."""

    def __init__(self, name: str, kind: str, raw: BinaryIO):
        """name: for error messages. kind: "parquet" or "arrow" (Arrow's file format or its stream format).

        All methods raise ValueError if the file is damaged.
        """
        self.name = name
        self._kind = kind
        self._raw = raw
        with self._readable():
            if kind == "parquet":
                self._file = pq.ParquetFile(raw, buffer_size=PAGES, pre_buffer=False, page_checksum_verification=True)
                self.schema: pa.Schema = self._file.schema_arrow
            else:
                raw.seek(0)
                self._stream = raw.read(4) == _CONTINUES
                self._end = raw.seek(0, 2)
                raw.seek(max(self._end - 8, 0))
                if self._stream and raw.read(8) != _CONTINUES + bytes(4):  # pyarrow accepts a cut between batches
                    raise EOFError("cut off: it has no mark of its end")
                self.schema = self._arrow().schema

    def text_field(self, field: str) -> None:
        """Raise ValueError unless the column `field` exists and has text. Dots separate the names of nested fields."""
        found = self._type(field)
        if pa.types.is_dictionary(found):
            found = found.value_type
        if not any(is_kind(found) for is_kind in _TEXT + _BYTES):
            raise ValueError(f"{self.name}: column {field!r} is of type {found}, not text: name another with --field")

    def messages_field(self, field: str) -> None:
        """Raise ValueError unless the column `field` exists and has lists of objects with a role and a content."""
        found = self._type(field)
        inside = found.value_type if any(is_kind(found) for is_kind in _LISTS) else None
        names = {inside[i].name for i in range(inside.num_fields)} if inside and pa.types.is_struct(inside) else set()
        if not {"role", "content"} <= names:
            raise ValueError(f"{self.name}: column {field!r} is of type {found}, not a list of messages, each with a "
                             "'role' and a 'content'")  # fmt: skip

    def _type(self, field: str) -> pa.DataType:
        """The type of a field. Raises ValueError if no field, or more than one, has this name."""
        names = self.schema.names
        path = [field] if field in names or "." not in field else field.split(".")
        if names.count(path[0]) != 1:
            problem = "has no column" if path[0] not in names else "has more than one column"
            raise ValueError(f"{self.name}: {problem} {path[0]!r}: it has {', '.join(names)}: see --field")
        found = self.schema.field(path[0]).type
        for step in path[1:]:
            inside = [found[i].name for i in range(found.num_fields)] if pa.types.is_struct(found) else []
            if inside.count(step) != 1:
                raise ValueError(f"{self.name}: there is no {step!r} in column {field!r}, of type {found}: see --field")
            found = found[inside.index(step)].type
        return found

    def rows(self, columns: Sequence[str] | None) -> Iterator[tuple[dict[str, Any] | UnicodeDecodeError, float]]:
        """(fields of a row, share of the file that is read) for each row.

        If a text in a row is not UTF-8, the error stands in place of its fields. columns: the columns to read, named as
        for `text_field`; None: all.
        """
        if columns is None:
            columns = self.schema.names
            if len(set(columns)) < len(columns):
                raise ValueError(f"{self.name}: two columns have the same name: rename one of {', '.join(columns)}")
        with self._readable():
            for batch, share in self._batches(columns):
                rows = _whole(batch)
                for row in rows if rows is not None else _one_by_one(batch):
                    yield row, share

    def _batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
        """(a batch of some rows, share of the file that is read after it)."""
        if self._kind == "parquet":
            done = 0
            rows = self._file.metadata.num_rows
            for group in range(self._file.num_row_groups):
                size = _rows(self._file.metadata.row_group(group))
                for batch in self._file.iter_batches(size, [group], columns, use_threads=False):
                    done += batch.num_rows
                    yield batch, done / rows
            return
        wanted = {column if column in self.schema.names else column.split(".")[0] for column in columns}
        indices = [index for index, name in enumerate(self.schema.names) if name in wanted]
        reader = self._arrow(pa.ipc.IpcReadOptions(included_fields=indices, use_threads=False))
        batches = reader if self._stream else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            size = max(1, min(MOST_ROWS, ROWS_BYTES * batch.num_rows // max(batch.nbytes, 1)))
            for start in range(0, batch.num_rows, size):
                yield batch.slice(start, size), self._raw.tell() / self._end

    def _arrow(
        self, options: pa.ipc.IpcReadOptions | None = None
    ) -> pa.RecordBatchReader | pa.ipc.RecordBatchFileReader:
        self._raw.seek(0)
        return (pa.ipc.open_stream if self._stream else pa.ipc.open_file)(self._raw, options=options)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Convert the errors of pyarrow to a ValueError of one line."""
        try:
            yield
        except (pa.ArrowException, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # a disk error
                raise
            what = " ".join(str(error).split())
            name = self._kind.capitalize()
            raise ValueError(f"{self.name}: damaged {name} file ({what}): replace it or leave it out") from None


def _rows(group: pq.RowGroupMetaData) -> int:
    """The number of rows of a group in one read."""
    return max(1, min(MOST_ROWS, ROWS_BYTES * group.num_rows // max(group.total_byte_size, 1)))


def _whole(batch: pa.RecordBatch) -> list[dict[str, Any]] | None:
    """The rows of a batch; None if a text in it is not UTF-8, which pyarrow does not check when it reads."""
    try:
        batch.validate(full=True)  # damaged offsets would cause reads outside the batch
        return batch.to_pylist()
    except UnicodeDecodeError:
        return None
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        return None


def _one_by_one(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    for row in range(batch.num_rows):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error
