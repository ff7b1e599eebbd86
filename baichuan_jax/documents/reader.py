"""The one reader of text files: every document once and in order, and what is wrong, by line.

Input: a slice of a file. Output: documents, and in place of what cannot be read a problem that
names file, line and reason, so that nothing is lost in silence. Two users, one reader: the corpus
pipeline counts problems as removed documents (`read_documents`); training raises an error at the
first (`read_texts`), since rows that lack a document would look like rows that have them all.

A file's kind decides which function reads it (`READERS`). A new kind is a function there that
yields documents and problems in order, and its suffix in files.TEXT.

A field is named by its name, and one inside another by both with a dot: data.text is the text of
{"data": {"text": ...}}. A field whose own name has the dot comes first.
"""

import collections
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from baichuan_jax.config.parsing import json_reason, load_json, show
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.files import Slice, count_lines, kind_of, removed
from baichuan_jax.documents.parquet import Batch, open_parquet
from baichuan_jax.documents.storage import DAMAGE, open_binary

# Problems of a whole file. All other problems stand for one document each.
EMPTY = "empty_file"
UNREADABLE = "unreadable"
# What a record has instead of a field that it lacks; None is a field that is null.
MISSING = object()
# What JSON calls a value. Parquet has other types, which are called by Python's names.
_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    str: "a string",
    bytes: "bytes",
}
# As much as a part of the pipeline's input: a longer line is more likely a file without line ends.
MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True)
class Fields:
    """Fields of a JSON object, or columns of a Parquet file, that make a document."""

    text: str = "text"
    # None: not read, and then a document has no id, or its file's name as its source.
    id: str | None = None
    source: str | None = None
    # A longer line, row or .txt file is a problem and is not held in memory.
    max_line_bytes: int = MAX_LINE_BYTES

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """All names of fields, and of those inside others each part."""
        given = [name for name in (self.text, self.id, self.source) if name]
        return frozenset([*given, *(part for name in given for part in name.split("."))])

    def object_of(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object of its pairs. Raises ValueError where one of these fields stands twice."""
        record = dict(pairs)
        # Python would keep the last one, and a text would be lost.
        if len(record) < len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            for name in sorted(self.names):
                if counts[name] > 1:
                    raise ValueError(f"field {name!r} stands {counts[name]} times in one object")
        return record


class Document(NamedTuple):
    """A text and where it comes from; `line` is a Parquet file's row."""

    path: str
    line: int
    id: str | None
    source: str
    text: str


class Problem(NamedTuple):
    """What is wrong at a line, and what is known of the document that it stands for."""

    path: str
    line: int
    reason: str
    detail: str
    id: str | None = None
    source: str = ""

    @property
    def is_document(self) -> bool:
        """Whether it stands for a document, not for a file."""
        return self.reason not in (EMPTY, UNREADABLE)

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}: {self.detail}"


def read_documents(piece: Slice, fields: Fields) -> Iterator[Document | Problem]:
    """Everything in a slice, in order.

    Reasons: no_json, no_text, broken_utf8, line_too_long (one document each), unreadable (the rest
    of a damaged file), empty_file. Raises ConfigError where a package is missing or the file was
    removed, and OSError where the system cannot read it now: no word about what it holds.
    """
    read = READERS[kind_of(piece.path)]
    line = piece.first_line - 1
    try:
        for entry in read(piece, fields):
            line = entry.line
            yield entry
    except FileNotFoundError:
        raise removed(piece.path) from None
    except DAMAGE as error:
        # Of a disk, a right, a network: another try may read the whole file.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # On one line: pyarrow's errors have several.
        reason = " ".join(str(error).split())
        yield Problem(piece.shown, line + 1, UNREADABLE, f"reading stopped: {reason}")
    else:
        # Only the first slice can say so: a later one has no line of its own where a single long
        # line spans it.
        if line < piece.first_line and piece.start == 0:
            yield Problem(piece.shown, 1, EMPTY, "holds no document")


def read_texts(pieces: Iterable[Slice], text_field: str) -> Iterator[str]:
    """Texts of slices, in order, empty ones included. Raises ConfigError as `read_strictly` does.

    An empty file gives no text: nothing of it is lost.
    """
    for entry in read_strictly(pieces, text_field):
        if isinstance(entry, Document):
            yield entry.text


def read_strictly(pieces: Iterable[Slice], text_field: str) -> Iterator[Document | Problem]:
    """Documents of slices, in order, and a problem for each file that is empty.

    Raises ConfigError at the first other problem, with file and line.
    """
    fields = Fields(text=text_field)
    for piece in pieces:
        for entry in read_documents(piece, fields):
            # The first, not all: a corpus in another encoding has a problem in every line.
            if isinstance(entry, Problem) and entry.reason != EMPTY:
                raise ConfigError(_strict_message(entry, piece))
            yield entry


def document_id(path: str, line: int) -> str:
    """The id of a document that names none: 24 hexadecimal digits of a hash of file and line."""
    return hashlib.blake2b(f"{path}:{line}".encode(), digest_size=12).hexdigest()


def _strict_message(problem: Problem, piece: Slice) -> str:
    if piece.by_bytes and piece.start and piece.first_line == 1:
        # Nobody counted the lines before this slice. A second look at the file costs seconds, once,
        # and gives the line that an editor shows.
        before = count_lines(Slice(piece.path, 0, piece.start))
        problem = problem._replace(line=problem.line + before)
    named = ""
    if problem.reason == "no_text":
        named = "name the field that holds the text (data.text_field, or --text_field), "
    if problem.reason == "line_too_long":
        named = "split it into several documents (a .jsonl file has one a line), "
    return (
        f"{problem}; {named}mend the file, or clean the corpus first with python -m "
        "baichuan_jax.data.pipeline, which leaves out what cannot be read"
    )


def _read_lines(piece: Slice, fields: Fields) -> Iterator[Document | Problem]:
    limit = fields.max_line_bytes
    path, stem = piece.shown, _stem(piece.shown)
    with open_binary(piece.path) as file:
        number = piece.first_line - 1
        if piece.start:
            # A line that begins before this slice belongs to the slice before. One byte back: where
            # that byte is a newline, this slice begins with a line of its own.
            file.seek(piece.start - 1)
            if _skip_line(file) > 1:
                number += 1
        while piece.stop is None or file.tell() < piece.stop:
            line = file.readline(limit + 1)
            if not line:
                return
            number += 1
            if len(line) > limit and not line.endswith(b"\n"):
                size = len(line) + _skip_line(file)
                detail = f"a line of {size:,} bytes, {_too_long(fields)}"
                yield Problem(path, number, "line_too_long", detail, source=stem)
            elif line.strip():
                # A byte-order mark is no part of a file's first line.
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                yield _parse(content, path, number, fields, stem)


def _too_long(fields: Fields) -> str:
    return f"and the longest that is read has {fields.max_line_bytes:,} bytes"


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of a line without keeping it. Returns its bytes."""
    size = 0
    while chunk := file.readline(1 << 20):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def _read_text(piece: Slice, fields: Fields) -> Iterator[Document | Problem]:
    limit = fields.max_line_bytes
    path, stem = piece.shown, _stem(piece.shown)
    with open_binary(piece.path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        detail = f"a .txt file is one document, {_too_long(fields)}"
        yield Problem(path, 1, "line_too_long", detail, source=stem)
        return
    # A file of white space is empty, which `read_documents` says.
    if not content.strip():
        return
    try:
        yield Document(path, 1, None, stem, content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield Problem(path, line, "broken_utf8", str(error), source=stem)


def _read_parquet(piece: Slice, fields: Fields) -> Iterator[Document | Problem]:
    path, stem = piece.shown, _stem(piece.shown)
    number = piece.first_line - 1
    with open_parquet(piece.path) as table:
        names = table.schema.names
        if len(set(names)) < len(names):
            raise OSError(f"two columns have the same name: {sorted(names)}")
        wanted = [name for name in (fields.text, fields.id, fields.source) if name]
        columns, stand_ins = table.columns(wanted)
        groups = range(table.metadata.num_row_groups)[piece.start : piece.stop]
        for batch in table.batches(groups, columns):
            for row in _rows(batch, fields.max_line_bytes):
                number += 1
                if isinstance(row, Exception):
                    broken = isinstance(row, UnicodeDecodeError)
                    reason = "broken_utf8" if broken else "no_text"
                    yield Problem(path, number, reason, str(row), source=stem)
                elif isinstance(row, int):
                    detail = f"a row of {row:,} bytes, {_too_long(fields)}"
                    yield Problem(path, number, "line_too_long", detail, source=stem)
                else:
                    record = {**row, **stand_ins}
                    yield _document(record, names, path, number, fields, stem)


def _rows(batch: Batch, limit: int) -> Iterator[dict[str, Any] | Exception | int]:
    """The rows of a batch of a Parquet file, about `limit` bytes at once as Python's objects.

    The size in place of a row of more than `limit` bytes, and an error in place of one that Python
    cannot hold: a column of strings may hold what is no UTF-8, and one of dates what is beyond
    Python's years.
    """
    if batch.size <= limit:
        yield from _converted(batch.rows)
        return
    sizes = batch.sizes
    # A row belongs to the stretch in which it ends; one that is too long stands alone.
    stretch = np.cumsum(sizes) // limit + np.cumsum(sizes > limit) * 2 - (sizes > limit)
    borders = [0, *(np.flatnonzero(np.diff(stretch)) + 1).tolist(), len(sizes)]
    for start, stop in itertools.pairwise(borders):
        if start < stop and sizes[start] > limit:
            yield int(sizes[start])
        else:
            yield from _converted(batch.rows.slice(start, stop - start))


def _converted(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        # Again, row by row, to find which.
        for index in range(len(batch)):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield error
    else:
        yield from rows


READERS: dict[str, Callable[[Slice, Fields], Iterator[Document | Problem]]] = {
    ".jsonl": _read_lines,
    ".json": _read_lines,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def _parse(line: bytes, path: str, number: int, fields: Fields, stem: str) -> Document | Problem:
    try:
        record = load_json(line.decode("utf-8"), fields.object_of)
    except UnicodeDecodeError as error:
        return Problem(path, number, "broken_utf8", str(error), source=stem)
    except ValueError as error:
        return Problem(path, number, "no_json", json_reason(error), source=stem)
    if not isinstance(record, dict):
        detail = f"{type(record).__name__} instead of an object"
        return Problem(path, number, "no_json", detail, source=stem)
    return _document(record, record, path, number, fields, stem)


def _field(record: dict[str, Any], name: str) -> Any:
    """What a record holds in a field, by its name or as outer.inner; MISSING where it has none."""
    if name in record:
        return record[name]
    # From the longest outer name on: a name with a dot of its own comes before a field inside
    # another.
    for place in reversed([i for i, letter in enumerate(name) if letter == "."]):
        outer = record.get(name[:place])
        if isinstance(outer, dict):
            found = _field(outer, name[place + 1 :])
            if found is not MISSING:
                return found
    return MISSING


def kind_of_value(value: Any) -> str:
    """What a value is, in JSON's words: "a number", "null"."""
    return _NAMES.get(type(value), f"of type {type(value).__name__}")


def _no_text(record: dict[str, Any], names: Iterable[str], name: str) -> str:
    """Why a record's field is no text; `names`: all fields that there are."""
    value = _field(record, name)
    if isinstance(value, dict):
        inside = few(f"{name}.{inner}" for inner in value)
        return f"field {name!r} is an object, expected a string; inside it are: {inside}"
    if value is not MISSING:
        return f"field {name!r} is {kind_of_value(value)}, expected a string"
    outer, dot, _ = name.rpartition(".")
    around = _field(record, outer) if dot else MISSING
    if around is not MISSING and not isinstance(around, dict):
        return f"field {outer!r} is {kind_of_value(around)}, so there is no field {name!r}"
    return f"there is no field {name!r} (there are: {few(names)})"


def few(names: Iterable[str]) -> str:
    """Names for a message, quoted; of many the first, of long ones the beginning."""
    found = sorted(names)
    return f"[{', '.join(map(show, found[:20]))}]{' and more' if len(found) > 20 else ''}"


def _document(
    record: dict[str, Any], names: Iterable[str], path: str, line: int, fields: Fields, stem: str
) -> Document | Problem:
    """A record with what its fields hold; `names`: all fields that there are, for the message."""
    name = _field(record, fields.id) if fields.id else None
    # True and False are ints in Python, and no ids.
    is_id = isinstance(name, str | int) and not isinstance(name, bool) and str(name)
    identity = str(name) if is_id else None
    source = _field(record, fields.source) if fields.source else None
    source = source if isinstance(source, str) and source else stem
    text = _field(record, fields.text)
    if not isinstance(text, str):
        detail = _no_text(record, names, fields.text)
        return Problem(path, line, "no_text", detail, identity, source)
    # JSON can hold what UTF-8 cannot; it would fail where the text is written, far from its line.
    try:
        text.encode()
        (identity or "").encode()
        source.encode()
    except UnicodeEncodeError as error:  # half of an escaped surrogate pair, "\ud83d"
        return Problem(path, line, "broken_utf8", str(error), source=stem)
    return Document(path, line, identity, source, text)


def _stem(path: str) -> str:
    return Path(path).name.split(".")[0]
