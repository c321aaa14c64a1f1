"""Read records from Parquet and Arrow files. Only some rows are in memory at once, so memory is bounded.

`pyarrow` reads the files. Only this module imports it, and this module is imported only to read such files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_BYTES = 4 << 20  # of rows in memory at once, if the file's metadata has their size
MOST_ROWS = 1024  # in memory at once
PAGES = 1 << 20  # bytes of a Parquet column that are read at once; the default is a whole column of a row group
_CONTINUES = b"\xff\xff\xff\xff"  # the first bytes of each message of an Arrow stream
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list)


class Table:
    """An open columnar file."""

    def __init__(self, name: str, kind: str, raw: BinaryIO):
        """name: for errors. kind: "parquet" or "arrow" (its file format or its stream format).

        Raises ValueError for a damaged file, as all methods do.
        """
        self.name, self._kind, self._raw = name, kind, raw
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
                    raise EOFError("cut off: it has no end marker")
                self.schema = self._arrow().schema

    def text_field(self, field: str) -> None:
        """Raise ValueError unless the column `field` exists and has text. A dot leads to a field inside a column."""
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
        """The type of a field. Raises ValueError if there is no such field, or several."""
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
        """Yields (fields of a row, share of the file read so far). A row with text that is not UTF-8 is an error
        object.

        columns: the columns to read, named as in `text_field`; None: all.
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
        """Yields some rows at a time, and the share of the file that is read after them."""
        if self._kind == "parquet":
            done, rows = 0, self._file.metadata.num_rows
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
        """Convert pyarrow's errors to a ValueError of one line."""
        try:
            yield
        except (pa.ArrowException, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            what = " ".join(str(error).split())
            name = self._kind.capitalize()
            raise ValueError(f"{self.name}: damaged {name} file ({what}): replace it or leave it out") from None


def _rows(group: pq.RowGroupMetaData) -> int:
    """The number of rows of a group that are read at once."""
    return max(1, min(MOST_ROWS, ROWS_BYTES * group.num_rows // max(group.total_byte_size, 1)))


def _whole(batch: pa.RecordBatch) -> list[dict[str, Any]] | None:
    """The rows of a batch. None if a text is not UTF-8, which pyarrow does not check when it reads."""
    try:
        batch.validate(full=True)  # otherwise damaged offsets would lead to reads outside the batch
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
