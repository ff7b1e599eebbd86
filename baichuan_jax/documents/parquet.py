"""Reads columns of a Parquet file in batches of bounded size, whatever the file says of itself.

Input: a path, row groups and names of columns. Output: Arrow's batches. Few bytes of such a file
may stand for gigabytes: a page that is compressed, one value of a dictionary that all rows repeat,
a value that is the one before and a little more. Arrow makes all of it that a batch needs, so the
sizes are looked at first, in the pages' headers (Thrift's compact protocol; the numbers of fields
are those of parquet.thrift), and a batch has only as many rows as fit into BATCH_BYTES. What is far
more than the file's size ends in an OSError, as other damage does.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from baichuan_jax.documents.storage import Expansion, open_binary, pyarrow_for, size_of

# Rows that are converted at once: few, since a row may hold a book.
BATCH_ROWS = 256
# What a batch may take in Arrow, but for a single row that takes more.
BATCH_BYTES = 512 << 20
# Batches of few rows are joined up to this.
JOINED_BYTES = 16 << 20
# What a value counts that is no text.
VALUE_BYTES = 16
# Arrow follows a schema's depth with its stack, which ends at some ten thousand; columns of real
# tables lie ten deep at most.
_DEEPEST = 100
# The first two fields of a page's header are a few bytes.
_HEADER_BYTES = 64
# A kind of page and an encoding, in parquet.thrift's numbers. In that encoding a value is as much
# of the one before as it says, and some bytes more.
_DICTIONARY_PAGE = 2
_DELTA_BYTE_ARRAY = 7


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator["Table"]:
    """A Parquet file.

    Raises ConfigError where pyarrow is not installed, OSError where the file is damaged or holds
    far more than its size, also from inside.
    """
    pyarrow = pyarrow_for(path)
    try:
        with open_binary(path) as file:
            yield Table(file, pyarrow)
    # UnicodeDecodeError: a column's name.
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(str(error)) from error


class Batch(NamedTuple):
    """Rows of a file as an Arrow table or batch, and the bytes of each: int64 [rows]."""

    rows: Any
    sizes: np.ndarray

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return int(self.sizes.sum())


class Table:
    """An open Parquet file: `metadata` and `schema` are pyarrow's."""

    def __init__(self, file: BinaryIO, pyarrow: Any) -> None:
        self._size = size_of(file)
        _require_flat(file, self._size)
        self._pyarrow, self._file = pyarrow, _Pages(file, self._size)
        table = pyarrow.parquet.ParquetFile(self._file)
        self._table, self.metadata, self.schema = table, table.metadata, table.schema_arrow
        groups = range(self.metadata.num_row_groups)
        # What it says of itself: it is cut into slices by this, each of which may hold FREE_BYTES.
        Expansion(self._size).add(sum(self.metadata.row_group(i).total_byte_size for i in groups))

    def columns(self, names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Which of these columns hold one value a row, and stand-ins for those that hold more.

        outer.inner is a field of a column that is a struct. A list or a struct is no text and no
        id, so it is not read, whatever lies in it: an empty value of its kind stands for it.
        """
        leaves = [self._table.schema.column(i) for i in range(self.metadata.num_columns)]
        single, stand_ins = [], {}
        for name in names:
            chosen = [leaf for leaf in leaves if _is_chosen(leaf.path, name)]
            has_list = any(leaf.max_repetition_level for leaf in chosen)
            if not has_list and any(leaf.path == name for leaf in chosen):
                single.append(name)
            elif (kind := _type_of(self.schema, name)) is not None:
                is_object = self._pyarrow.types.is_struct(kind)
                stand_ins[name] = {field.name: None for field in kind} if is_object else []
        return single, stand_ins

    def batches(self, groups: Sequence[int], columns: list[str]) -> Iterator[Batch]:
        """Row groups in batches, in order; `columns`: those of one value a row."""
        waiting: list[Batch] = []
        rows = size = 0
        for batch in self._decoded(groups, columns):
            # Several where Arrow was asked for few rows: to Python they go faster together.
            if rows + len(batch.rows) > BATCH_ROWS or size + batch.size > JOINED_BYTES:
                yield from self._joined(waiting)
                waiting, rows, size = [], 0, 0
            waiting.append(batch)
            rows, size = rows + len(batch.rows), size + batch.size
        yield from self._joined(waiting)

    def _joined(self, batches: list[Batch]) -> Iterator[Batch]:
        if len(batches) > 1:
            table = self._pyarrow.Table.from_batches([batch.rows for batch in batches])
            yield Batch(table, np.concatenate([batch.sizes for batch in batches]))
        else:
            yield from batches

    def _decoded(self, groups: Sequence[int], columns: list[str]) -> Iterator[Batch]:
        content = Expansion(self._size)
        for group in groups:
            metadata = self.metadata.row_group(group)
            every = (metadata.column(i) for i in range(metadata.num_columns))
            # Columns that are not asked for are not read, which is most of the time saved.
            chunks = [
                chunk
                for chunk in every
                if any(_is_chosen(chunk.path_in_schema, name) for name in columns)
            ]
            largest = sum(map(self._file.expect, chunks))
            at_once = min(BATCH_BYTES, content.most)
            rows = max(1, min(BATCH_ROWS, at_once // max(1, largest)))
            for found in self._table.iter_batches(rows, row_groups=[group], columns=columns):
                batch = Batch(found, self._row_sizes(found))
                content.add(batch.size, lines=len(found))
                yield batch

    def _row_sizes(self, batch: Any) -> np.ndarray:
        sizes = np.zeros(len(batch), np.int64)
        for column in batch.columns:
            sizes += _bytes_of(column, self._pyarrow)
        return sizes


def _is_chosen(path: str, name: str) -> bool:
    """Whether pyarrow reads a column, or a struct's field, where a name is asked for."""
    return path == name or path.startswith(f"{name}.")


def _type_of(schema: Any, name: str) -> Any:
    """The type of a column, or of a struct's field as outer.inner; None where there is none."""
    fields = {field.name: field.type for field in schema}
    if name in fields:
        return fields[name]
    for outer, kind in fields.items():
        if name.startswith(f"{outer}.") and hasattr(kind, "get_field_index"):
            found = _type_of(kind, name.removeprefix(f"{outer}."))
            if found is not None:
                return found
    return None


def _bytes_of(column: Any, pyarrow: Any) -> np.ndarray:
    """Bytes of each value of an Arrow array: int64 [rows]. Nothing of it becomes Python's."""
    kind, types = column.type, pyarrow.types
    if types.is_struct(kind):
        sizes = np.zeros(len(column), np.int64)
        for field in column.flatten():
            sizes += _bytes_of(field, pyarrow)
        return sizes
    if types.is_dictionary(kind):
        # Of the dictionary once. A row that is null has no index.
        values = np.append(_bytes_of(column.dictionary, pyarrow), 0)
        indices = column.indices.to_numpy(zero_copy_only=False)
        return values[np.nan_to_num(indices, nan=-1).astype(np.int64)]
    if types.is_string_view(kind) or types.is_binary_view(kind):
        column = column.cast(pyarrow.large_binary())
    large = types.is_large_string(column.type) or types.is_large_binary(column.type)
    fixed = types.is_fixed_size_binary(kind)
    if not (large or types.is_string(kind) or types.is_binary(kind)):
        return np.full(len(column), kind.byte_width if fixed else VALUE_BYTES, np.int64)
    # Where each value begins, and the last one's end.
    offsets = np.frombuffer(column.buffers()[1] or b"", np.int64 if large else np.int32)
    return np.diff(offsets[column.offset :][: len(column) + 1]).astype(np.int64)


class _Pages(io.RawIOBase):
    """The file as Arrow reads it: a column at once, whose pages are looked at on the way.

    Arrow allocates what a page's header says before it decompresses it.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._expansion = Expansion(size)
        # The columns' pages that Arrow is about to read, by their place in the file.
        self._expected: dict[int, list[Any]] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def expect(self, chunk: Any) -> int:
        """Have a column's pages of a row group looked at when they are read.

        Returns the bytes that one of its values may have without as many in its page.
        """
        first, start = chunk.dictionary_page_offset, chunk.data_page_offset
        # As Arrow finds it.
        if chunk.has_dictionary_page and 0 < first < start:
            start = first
        if not chunk.num_values:
            return 0
        self._expected.setdefault(start, []).append(chunk)
        if "DELTA_BYTE_ARRAY" in chunk.encodings:
            return chunk.total_uncompressed_size
        self._file.seek(start)
        kind, size = _kind_and_size(self._file.read(_HEADER_BYTES))
        # Of a dictionary this is a wide bound. To look into it for its longest value would cost
        # more than the smaller batches do.
        return size if kind == _DICTIONARY_PAGE else 0

    def read(self, size: int = -1) -> bytes:
        """As files do. Raises OSError where the pages are damaged or hold far too much."""
        start = self._file.tell()
        # A size that the file's own metadata gave may be any number.
        left = max(0, self._size - start)
        content = self._file.read(left if size < 0 else min(size, left))
        for chunk in self._expected.get(start, ()):
            self._check(content, chunk)
        return content

    def _check(self, pages: bytes, chunk: Any) -> None:
        at = values = repeated = 0
        # Arrow ends here too: some old files have a few bytes more.
        while values < chunk.num_values and at < len(pages):
            page = _page(pages, at)
            self._expansion.add(page.size)
            if page.kind == _DICTIONARY_PAGE and at:
                raise OSError("a dictionary is not its column's first page")
            # By what the metadata said of both the rows of a batch were chosen.
            repeated += page.size if page.encoding == _DELTA_BYTE_ARRAY else 0
            if repeated and (
                "DELTA_BYTE_ARRAY" not in chunk.encodings
                or repeated > chunk.total_uncompressed_size
            ):
                raise OSError("pages are not what the file's metadata says of them")
            values += page.values
            at = page.end + page.stored


class _Page(NamedTuple):
    """A page's header."""

    kind: int
    size: int  # decompressed, in bytes
    stored: int
    values: int
    encoding: int
    end: int  # of the header


_NO_PAGE = (IndexError, KeyError, ValueError, TypeError)


def _page(content: bytes, at: int) -> _Page:
    """The header at a place. Raises OSError where there is none."""
    try:
        fields, end = _struct(content, at)
        kind, size, stored = fields[1], fields[2], fields[3]
        # Data pages have their own header as field 5 or, of version 2, as field 8.
        data, place = (fields[8], 4) if 8 in fields else (fields.get(5, {}), 2)
        page = _Page(kind, size, stored, data.get(1, 0), data.get(place, 0), end)
        if min(page) < 0:
            raise ValueError
    except (*_NO_PAGE, AttributeError):
        raise OSError("the header of a page is damaged") from None
    return page


def _kind_and_size(content: bytes) -> tuple[int, int]:
    """The first two fields of a page's header, which may be longer than its content here."""
    try:
        fields, _ = _struct(content, 0, until=2)
        return int(fields[1]), int(fields[2])
    except _NO_PAGE:
        raise OSError("the header of a column's first page is damaged") from None


def _require_flat(file: BinaryIO, size: int) -> None:
    """Raise OSError where columns lie deeper than real ones do: Arrow's stack would overflow."""
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(8)[:4], "little")
    file.seek(max(0, size - 8 - length))
    footer = file.read(min(length, size))
    try:
        # Field 1 is the version, field 2 the schema: a list of its nodes from the root down, each
        # with its number of children as field 5.
        nodes, _ = _struct(footer, 0, until=2)
        left: list[int] = []
        for node in nodes.get(2, ()):
            while left and not left[-1]:
                left.pop()
            if left:
                left[-1] -= 1
            left.append(node.get(5, 0))
            if len(left) > _DEEPEST:
                raise OSError(f"its columns lie more than {_DEEPEST} deep in each other")
    # Whatever else is wrong with it Arrow says better.
    except (*_NO_PAGE, AttributeError):
        return


def _struct(content: bytes, at: int, *, until: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and where it ends; `until`: the last that is read.

    Numbers, flags, structs and lists of structs are kept; texts and others are passed over.
    Structs of real headers lie four deep; what lies deeper ends in a ValueError.
    """
    return _struct_at(content, at, until, 0)


def _struct_at(content: bytes, at: int, until: int, depth: int) -> tuple[dict[int, Any], int]:
    if depth > 8:
        raise ValueError("nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while head := content[at]:
        step, kind = head >> 4, head & 15
        at += 1
        if step:
            number += step
        else:
            number, at = _number(content, at)
        fields[number], at = _value(content, at, kind, depth)
        if number == until:
            break
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind in (4, 5, 6):  # whole numbers
        return _number(content, at)
    if kind == 12:
        return _struct_at(content, at, 0, depth + 1)
    if kind == 8:  # bytes
        length, at = _varint(content, at)
        return None, at + length
    if kind in (3, 7):  # a byte, and a floating-point number
        return None, at + (1 if kind == 3 else 8)
    if kind != 9:
        raise ValueError("another type")
    # A list: its length, if below 15, and the kind of what is in it are in the first byte.
    length, kind = content[at] >> 4, content[at] & 15
    at += 1
    if length == 15:
        length, at = _varint(content, at)
    found = []
    for _ in range(length):
        value, at = _value(content, at, kind, depth)
        found.append(value)
    return found, at


def _number(content: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(content, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := content[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    return value | byte << shift, at + 1
