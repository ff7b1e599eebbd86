"""Reads columns of a Parquet file in batches of bounded size, whatever the file says of itself.

Input: a path, row groups and names of columns. Output: Arrow's batches. Few bytes of such a file
may stand for gigabytes: a page that is compressed, one value of a dictionary that all rows repeat,
a value that is the one before and a little more. Arrow makes all of it that a batch needs, so the
sizes are looked at first, in the pages' headers (Thrift's compact protocol; the numbers of fields
are those of parquet.thrift), and a batch has only as many rows as fit into BATCH_BYTES. What is far
more than the file's size ends in an OSError, as other damage does.

Arrow reads the same headers once more, so what it could take in another way is refused: a field
that comes twice, or out of order, or in another type.
"""

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from baichuan_jax.documents.storage import Expansion, open_binary, pyarrow_for, size_of

# Rows that are converted at once: few, since a row may hold a book.
BATCH_ROWS = 256
# What a batch may take in Arrow, but for a single row that takes more.
BATCH_BYTES = 512 << 20
# Batches of few rows are joined up to this.
JOINED_BYTES = 16 << 20
# Arrow decodes so many rows of a page at once, however few are asked for.
ROWS_AHEAD = 1024
# A batch counts as so many rows at least: Arrow's work for one of a single row is no less.
BATCH_LINES = 8
# What a value counts that is no text.
VALUE_BYTES = 16
# Arrow follows a schema's depth with its stack, which ends at some ten thousand; columns of real
# tables lie ten deep at most.
_DEEPEST = 100
# Structs and lists of real headers and footers lie eight deep in each other.
_DEEPEST_STRUCT = 16
# The first two fields of a page's header are fewer bytes.
_HEADER_BYTES = 64
# Kinds of pages, and encodings, in parquet.thrift's numbers. In the last encoding a value is as
# much of the one before as it says, and some bytes more.
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_RLE, _DELTA_LENGTH_BYTE_ARRAY, _DELTA_BYTE_ARRAY = 3, 6, 7
# Of the delta encodings Arrow holds one or two lengths for each value, all of a page at once.
_LENGTH_BYTES = 8
# Where the file says which types its columns had in Arrow. It may ask for dictionaries, which come
# with every batch anew; Parquet's own types have a size a value. Another name hides it.
_ARROW_TYPES, _HIDDEN = b"ARROW:schema", b"arrow schema"

# Thrift's types, and the form of a struct: its fields' types, those of a list in brackets. A list
# that is kept is a tuple. Fields that have no form here may have any.
_FLAG, _INT32, _INT64, _BYTES, _LIST, _STRUCT = 1, 5, 6, 8, 9, 12
_PAGE_FORM = {
    **{1: _INT32, 2: _INT32, 3: _INT32},
    **{5: {1: _INT32, 2: _INT32, 3: _INT32}, 6: {}, 7: {1: _INT32, 2: _INT32}},
    8: {1: _INT32, 4: _INT32, 5: _INT32, 6: _INT32, 7: _FLAG},
}
# The field with the header of a kind of page, and in it the field with the encoding.
_PAGE_HEADERS = {_DATA_PAGE: (5, 2), _DICTIONARY_PAGE: (7, 2), _DATA_PAGE_V2: (8, 4)}
_CHUNK_FORM = {
    **{2: [_INT32], 3: [_BYTES], 8: [{}], 13: [{}]},
    **{16: {2: [_INT64], 3: [_INT64]}, 17: {2: [_INT32]}},
}
# All lists that Arrow knows: of those it reads what it expects, whatever the list says it holds.
_FOOTER_FORM = {
    **{2: ({5: _INT32},), 5: [{}], 7: [{}]},
    4: [{1: [{3: _CHUNK_FORM, 8: {2: {1: [_BYTES]}}}], 4: [{}]}],
}


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
        footer = io.BytesIO(_footer(file, self._size))
        self._pyarrow, self._file = pyarrow, _Pages(file, self._size, pyarrow)
        table = pyarrow.parquet.ParquetFile(
            self._file,
            metadata=pyarrow.parquet.read_metadata(footer),
            # Of these the sizes are not known.
            arrow_extensions_enabled=False,
        )
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
        # By the schema, as Arrow chooses: what a chunk says of its name is not looked at. Columns
        # that are not asked for are not read, which is most of the time saved.
        chosen = {
            index: max(0, leaf.length or 0)
            for index in range(self.metadata.num_columns)
            for leaf in [self._table.schema.column(index)]
            if any(_is_chosen(leaf.path, name) for name in columns)
        }
        for width in chosen.values():
            # A row that is null has as much in Arrow, and is made with those that follow.
            Expansion(self._size).add(width * ROWS_AHEAD)
        chunks = {group: self._chunks(group, chosen) for group in groups}
        _require_apart(itertools.chain(*chunks.values()))
        for group in groups:
            largest = sum(chosen.values()) + sum(map(self._file.expect, chunks[group]))
            at_once = min(BATCH_BYTES, content.most)
            rows = max(1, min(BATCH_ROWS, at_once // max(1, largest)))
            for found in self._table.iter_batches(rows, row_groups=[group], columns=columns):
                batch = Batch(found, self._row_sizes(found))
                content.add(batch.size, lines=max(BATCH_LINES, len(found)))
                yield batch

    def _chunks(self, group: int, columns: Iterable[int]) -> list["_Chunk"]:
        metadata = self.metadata.row_group(group)
        if metadata.num_columns != self.metadata.num_columns:
            raise OSError(f"row group {group} has {metadata.num_columns} columns")
        leaf = self._table.schema.column
        return [
            _Chunk(metadata.column(index), leaf(index).max_definition_level > 0)
            for index in columns
        ]

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
    if not (types.is_string(kind) or types.is_binary(kind)):
        fixed = types.is_fixed_size_binary(kind)
        return np.full(len(column), kind.byte_width if fixed else VALUE_BYTES, np.int64)
    # Where each value begins, and the last one's end.
    offsets = np.frombuffer(column.buffers()[1] or b"", np.int32)
    return np.diff(offsets[column.offset :][: len(column) + 1]).astype(np.int64)


class _Chunk:
    """A column's pages in a row group, as the file's metadata say, from `start` to `stop`."""

    def __init__(self, metadata: Any, may_be_null: bool) -> None:
        first, self.start = metadata.dictionary_page_offset, metadata.data_page_offset
        # As Arrow finds it.
        if metadata.has_dictionary_page and 0 < first < self.start:
            self.start = first
        self.stop = self.start + metadata.total_compressed_size
        self.values = metadata.num_values
        self.size = metadata.total_uncompressed_size
        self.has_delta = "DELTA_BYTE_ARRAY" in metadata.encodings
        self.codec = metadata.compression.lower()
        self.may_be_null = may_be_null


def _require_apart(chunks: Iterable[_Chunk]) -> None:
    """Raise OSError where two row groups or columns share pages: few would stand for many."""
    ordered = sorted((chunk.start, chunk.stop) for chunk in chunks)
    for (_, stop), (start, _) in itertools.pairwise(ordered):
        if start < stop:
            raise OSError("two of its columns or row groups lie at one place in the file")


class _Pages(io.RawIOBase):
    """The file as Arrow reads it: a column at once, whose pages are looked at on the way.

    Arrow allocates what a page's header says before it decompresses it.
    """

    def __init__(self, file: BinaryIO, size: int, pyarrow: Any) -> None:
        self._file, self._size, self._pyarrow = file, size, pyarrow
        self._expansion = Expansion(size)
        # The columns' pages that Arrow is about to read, by their place in the file.
        self._expected: dict[int, _Chunk] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def expect(self, chunk: _Chunk) -> int:
        """Have a column's pages of a row group looked at when they are read.

        Returns the bytes that one of its values may have without as many in its page.
        """
        self._expected[chunk.start] = chunk
        if not chunk.values:
            return 0
        if chunk.has_delta:
            return chunk.size
        self._file.seek(chunk.start)
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
        if content:
            # Arrow reads a column's pages once, and nothing else: it was given the footer.
            chunk = self._expected.pop(start, None)
            if chunk is None:
                raise OSError("its pages lie elsewhere than the file's metadata says")
            self._check(content, chunk)
        return content

    def _check(self, pages: bytes, chunk: _Chunk) -> None:
        at = values = repeated = 0
        # Arrow ends here too: some old files have a few bytes more.
        while values < chunk.values and at < len(pages):
            page = _page(pages, at)
            # A page without content is work too.
            self._expansion.add(page.size, lines=1)
            if page.kind == _DICTIONARY_PAGE and at:
                raise OSError("a dictionary is not its column's first page")
            # By what the metadata said of both the rows of a batch were chosen.
            repeated += page.size if page.encoding == _DELTA_BYTE_ARRAY else 0
            if repeated and (not chunk.has_delta or repeated > chunk.size):
                raise OSError("pages are not what the file's metadata says of them")
            values += 0 if page.kind == _DICTIONARY_PAGE else page.values
            if page.encoding in (_DELTA_LENGTH_BYTE_ARRAY, _DELTA_BYTE_ARRAY):
                self._expansion.add(_LENGTH_BYTES * page.values)
                stored = pages[page.end : page.end + page.stored]
                _require_lengths(self._content(stored, page, chunk), page)
            at = page.end + page.stored

    def _content(self, stored: bytes, page: "_Page", chunk: _Chunk) -> bytes:
        """A data page's values, decompressed, without which of them are null."""
        levels = 0
        if page.kind == _DATA_PAGE_V2:
            # Those that say it, of lists and of nulls, come first and are not compressed.
            levels = page.header.get(5, 0) + page.header.get(6, 0)
            if not 0 <= levels <= min(page.size, len(stored)):
                raise OSError("the header of a page is damaged")
        content = stored[levels:]
        if chunk.codec != "uncompressed" and page.header.get(7, True):
            codec = "lz4_raw" if chunk.codec == "lz4" else chunk.codec
            size = page.size - levels
            content = self._pyarrow.decompress(content, size, codec=codec, asbytes=True)
        if page.kind == _DATA_PAGE and chunk.may_be_null:
            if page.header.get(3) != _RLE:
                raise OSError("a page says in an old encoding which of its values are null")
            content = content[4 + int.from_bytes(content[:4], "little") :]
        return content


def _require_lengths(content: bytes, page: "_Page") -> None:
    """Raise OSError where delta-encoded values have more lengths than the page has values.

    Arrow goes by the number that stands with the lengths, and makes room for as many.
    """
    try:
        # Of a value's part that is that of the value before; then of what is its own.
        at = _end_of_lengths(content, 0, page.values) if content else 0
        if page.encoding == _DELTA_BYTE_ARRAY and content:
            _end_of_lengths(content, at, page.values)
    except _DAMAGED:
        raise OSError("the lengths in a page are damaged") from None


def _end_of_lengths(content: bytes, at: int, most: int) -> int:
    """Where delta-encoded numbers end: blocks of smaller ones, each with its width in bits."""
    block, at = _varint(content, at)
    parts, at = _varint(content, at)
    count, at = _varint(content, at)
    _, at = _varint(content, at)
    if count > most or not parts or not block or block % (32 * parts):
        raise ValueError("more of them than values, or blocks of another form")
    left = count - 1
    while left > 0:
        _, at = _varint(content, at)
        widths = content[at : at + parts]
        at += parts
        for width in widths:
            # The last block's widths are there for numbers that are not.
            if left > 0:
                at += width * (block // parts) // 8
                left -= block // parts
    return at


class _Page(NamedTuple):
    """A page's header."""

    kind: int
    size: int  # decompressed, in bytes
    stored: int
    values: int
    encoding: int
    end: int  # of the header
    header: dict[int, Any]  # that of its kind


# What the bytes of no header raise.
_DAMAGED = (IndexError, KeyError, ValueError)


def _page(content: bytes, at: int) -> _Page:
    """The header at a place. Raises OSError where there is none."""
    try:
        fields, end = _struct(content, at, _PAGE_FORM)
        kind, size, stored = fields[1], fields[2], fields[3]
        number, place = _PAGE_HEADERS[kind]
        # Arrow reads the one of the page's kind.
        if fields.keys() - {1, 2, 3} != {number}:
            raise ValueError
        header = fields[number]
        page = _Page(kind, size, stored, header[1], header[place], end, header)
        # A value of a dictionary takes a byte at least, and Arrow more, before it sees them.
        if min(page[:-1]) < 0 or (kind == _DICTIONARY_PAGE and page.values > size):
            raise ValueError
    except _DAMAGED:
        raise OSError("the header of a page is damaged") from None
    return page


def _kind_and_size(content: bytes) -> tuple[int, int]:
    """The first two fields of a page's header, which may be longer than its content here.

    A later field cannot say otherwise: `_page` refuses it before Arrow sees the page.
    """
    try:
        fields, _ = _struct(content, 0, _PAGE_FORM, until=2)
        return fields[1], fields[2]
    except _DAMAGED:
        raise OSError("the header of a column's first page is damaged") from None


def _footer(file: BinaryIO, size: int) -> bytes:
    """A Parquet file's metadata, without Arrow's types, as a file that holds nothing else.

    Raises OSError where it is damaged or columns lie deeper than real ones do: Arrow's stack would
    overflow. That the file is no Parquet at all Arrow says better.
    """
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = min(int.from_bytes(end[:4], "little"), max(0, size - 12))
    file.seek(max(0, size - 8 - length))
    content = file.read(length)
    if end[4:] == b"PAR1" and length == int.from_bytes(end[:4], "little"):
        try:
            fields, _ = _struct(content, 0, _FOOTER_FORM)
        except _DAMAGED:
            raise OSError("its metadata is damaged") from None
        _require_flat(fields.get(2, []))
    return b"PAR1" + content.replace(_ARROW_TYPES, _HIDDEN) + end


def _require_flat(nodes: list[dict[int, int]]) -> None:
    """`nodes`: of the schema, from the root down, each with its number of children as field 5."""
    left: list[int] = []
    for node in nodes:
        while left and not left[-1]:
            left.pop()
        if left:
            left[-1] -= 1
        left.append(node.get(5, 0))
        if len(left) > _DEEPEST:
            raise OSError(f"its columns lie more than {_DEEPEST} deep in each other")


def _struct(
    content: bytes, at: int, form: Mapping[int, Any], *, until: int = 0, depth: int = 0
) -> tuple[dict[int, Any], int]:
    """The fields of a struct that its form names, by number, and where it ends.

    `until`: the last field that is read. Raises ValueError or IndexError where Arrow might read it
    in another way: numbers of fields ascend, so that none comes twice.
    """
    if depth > _DEEPEST_STRUCT:
        raise ValueError("nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while head := content[at]:
        at += 1
        if head > 15:
            following = number + (head >> 4)
        else:
            following, at = _number(content, at)
        if not number < following < 1 << 15:
            raise ValueError("fields out of order")
        number = following
        inner = form.get(number)
        value, at = _value(content, at, head & 15, inner, depth)
        if inner is not None:
            fields[number] = value
        if number == until:
            break
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, form: Any, depth: int) -> tuple[Any, int]:
    """A value of a kind, and where it ends; `form`: what it must be, None where it may be any."""
    if form is not None:
        of_form = {dict: _STRUCT, list: _LIST, tuple: _LIST}.get(type(form), form)
        # A flag's type is its value: true or false.
        if kind != of_form and not (form == _FLAG and kind == 2):
            raise ValueError("another type")
    if kind == _STRUCT:
        return _struct(content, at, form if isinstance(form, dict) else {}, depth=depth + 1)
    if kind == _LIST:
        return _list(content, at, form, depth + 1)
    if kind in (4, _INT32, _INT64):
        return _number(content, at) if form == _INT32 else (None, _varint(content, at)[1])
    if kind == _BYTES:
        length, at = _varint(content, at)
        if length > len(content) - at:
            raise IndexError
        return None, at + length
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind in (3, 7):  # a byte, and a floating-point number
        return None, at + (1 if kind == 3 else 8)
    raise ValueError("another type")


def _list(content: bytes, at: int, form: Any, depth: int) -> tuple[list[Any], int]:
    """A list's values where its form is a tuple, and where it ends."""
    if depth > _DEEPEST_STRUCT:
        raise ValueError("nested too deeply")
    # Its length, if below 15, and the kind of what is in it are in the first byte.
    length, kind = content[at] >> 4, content[at] & 15
    at += 1
    if length == 15:
        length, at = _varint(content, at)
    # Each value takes a byte at least.
    if length > len(content) - at:
        raise IndexError
    found = []
    inner = form[0] if form else None
    for _ in range(length):
        # In a list a flag is a byte.
        value, at = (None, at + 1) if kind in (1, 2) else _value(content, at, kind, inner, depth)
        if isinstance(form, tuple):
            found.append(value)
    return found, at


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A whole number of 32 bits, and where it ends. Arrow would cut off what is above."""
    value, at = _varint(content, at)
    if value >> 32:
        raise ValueError("a number of more than 32 bits")
    return (value >> 1) ^ -(value & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := content[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    return value | byte << shift, at + 1
