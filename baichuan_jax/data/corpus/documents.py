"""Documents of input files, read so that nothing is lost in silence: what cannot be read is a record too, with file, line and reason.

The input is cut into parts by its files alone; every part is read in order by one worker, whatever
the number of workers.
"""

import contextlib
import fnmatch
import glob
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow  # pyright: ignore[reportMissingImports]
import pyarrow.fs  # pyright: ignore[reportMissingImports]
import pyarrow.parquet  # pyright: ignore[reportMissingImports]

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.reader import kind_of, open_file

PART_BYTES = 16 << 20  # of text, about, that a part holds: some ten seconds of work
INFLATION = 4  # how much larger text is than its .gz or .zst, about
KINDS = (".jsonl", ".json", ".txt", ".parquet")


@dataclass(frozen=True)
class Slice:
    """A file, or the lines that begin in bytes [start, stop) of it, or row groups [start, stop) of a Parquet file."""

    path: str
    start: int = 0
    stop: int | None = None
    first_line: int = (
        1  # one more than the newlines before `start`, or the rows before the first row group
    )

    @property
    def by_bytes(self) -> bool:
        """Whether it is a part of a plain file, whose first line's number has to be counted."""
        return self.stop is not None and kind_of(self.path) != ".parquet"


class Record(NamedTuple):
    """A document, or, with a `reason`, what stands in its place; `line` is a Parquet file's row."""

    path: str
    line: int
    id: str | None
    text: str
    source: str
    reason: str | None = None
    detail: str = ""


class Problem(NamedTuple):
    """What is wrong with a file at a line, beside its records: an end that is missing, a file without a record."""

    path: str
    line: int
    reason: str
    detail: str


def find_inputs(patterns: list[str]) -> list[tuple[str, int]]:
    """(path, size) of the files that globs name, locally or as s3://, gs:// or hdfs:// addresses; sorted, each once.

    Local paths are absolute. Raises ConfigError where a glob matches none or a file is of no known
    kind.
    """
    found: dict[str, int] = {}
    for pattern in patterns:
        if "://" in pattern:
            files = dict(_find_remote(pattern))
        else:
            paths = [
                os.path.abspath(path)
                for path in glob.glob(pattern, recursive=True)
                if os.path.isfile(path)
            ]
            files = {path: os.path.getsize(path) for path in paths}
        if not files:
            raise ConfigError(f"{pattern!r} matches no file (working directory: {os.getcwd()})")
        found.update(files)
    for path in found:
        if kind_of(path) not in KINDS:
            raise ConfigError(
                f"{path}: expected .jsonl, .json (a document a line), .txt (a document a file), also .gz, .zst; or .parquet"
            )
    return sorted(found.items())


def _find_remote(pattern: str) -> Iterator[tuple[str, int]]:
    scheme = pattern.split("://")[0]
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0]
    filesystem, root = pyarrow.fs.FileSystem.from_uri(fixed.rsplit("/", 1)[0])
    prefix = fixed.rsplit("/", 1)[0].removesuffix(root)
    for info in filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True)):
        address = f"{prefix}{info.path}" if prefix else f"{scheme}://{info.path}"
        if info.type == pyarrow.fs.FileType.File and fnmatch.fnmatchcase(address, pattern):
            yield address, info.size


def make_parts(files: list[tuple[str, int]]) -> list[list[Slice]]:
    """Parts to read in parallel, a function of the files alone: lines of large plain files, row groups, small files together."""
    slices: list[tuple[Slice, int]] = []
    for path, size in files:
        if kind_of(path) == ".parquet":
            slices += _row_groups(path)
        elif path.endswith((".jsonl", ".json")) and size > PART_BYTES:
            borders = [*range(0, size, PART_BYTES), size]
            slices += [
                (Slice(path, start, stop), stop - start)
                for start, stop in itertools.pairwise(borders)
            ]
        else:
            slices.append(
                (Slice(path), size * (INFLATION if path.endswith((".gz", ".zst")) else 1))
            )
    parts: list[list[Slice]] = [[]]
    weight = 0
    for piece, size in slices:
        if parts[-1] and weight + size > PART_BYTES:
            parts.append([])
            weight = 0
        parts[-1].append(piece)
        weight += size
    return parts


def _row_groups(path: str) -> list[tuple[Slice, int]]:
    """Consecutive row groups of a Parquet file, about PART_BYTES together. A file that is none is left whole, to fail when read."""
    try:
        with _open_binary(path) as file:
            metadata = pyarrow.parquet.read_metadata(file)
    except (OSError, pyarrow.ArrowException):
        return [(Slice(path), PART_BYTES)]
    slices = []
    start = row = weight = rows = 0
    for group in range(metadata.num_row_groups):
        weight += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if weight >= PART_BYTES or group + 1 == metadata.num_row_groups:
            slices.append((Slice(path, start, group + 1, row + 1), weight))
            start, row, weight, rows = group + 1, row + rows, 0, 0
    return slices or [(Slice(path), 0)]


def count_lines(piece: Slice) -> int:
    """Newlines of a plain file in bytes [start, stop)."""
    assert piece.stop is not None
    left, total = piece.stop - piece.start, 0
    with _open_binary(piece.path) as file:
        file.seek(piece.start)
        while left and (chunk := file.read(min(left, 1 << 20))):
            total += chunk.count(b"\n")
            left -= len(chunk)
    return total


def read_records(piece: Slice, fields: Any) -> Iterator[Record | Problem]:
    """Everything in a slice, in order. `fields` names the record's fields: .text_field, .id_field, .source_field, .max_line_bytes."""
    kind = kind_of(piece.path)
    read = _read_parquet if kind == ".parquet" else _read_text if kind == ".txt" else _read_lines
    line = piece.first_line - 1
    try:
        for record in read(piece, fields):
            line = record.line
            yield record
    except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        yield Problem(piece.path, line + 1, "unreadable", f"cannot be read on: {error}")
    else:
        if line < piece.first_line and piece.start == 0:
            yield Problem(piece.path, 1, "empty_file", "holds no document")


def record_id(path: str, line: int) -> str:
    """The id of a document that names none: 24 hexadecimal digits of a hash of file and line."""
    return hashlib.blake2b(f"{path}:{line}".encode(), digest_size=12).hexdigest()


def _read_lines(piece: Slice, fields: Any) -> Iterator[Record]:
    with _open_binary(piece.path) as file:
        number = piece.first_line - 1
        if piece.start:
            file.seek(piece.start - 1)
            if (
                _skip_line(file) > 1
            ):  # a line that begins before this slice belongs to the slice before
                number += 1
        while piece.stop is None or file.tell() < piece.stop:
            line = file.readline(fields.max_line_bytes + 1)
            if not line:
                return
            number += 1
            if len(line) > fields.max_line_bytes and not line.endswith(b"\n"):
                size = len(line) + _skip_line(file)
                yield _bad(
                    piece.path,
                    number,
                    fields,
                    "line_too_long",
                    f"{size} bytes, and read.max_line_bytes={fields.max_line_bytes}",
                )
            elif line.strip():
                yield _parse(
                    line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line,
                    piece.path,
                    number,
                    fields,
                )


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of a line without keeping it. Returns its bytes."""
    size = 0
    while chunk := file.readline(1 << 20):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def _read_text(piece: Slice, fields: Any) -> Iterator[Record]:
    with _open_binary(piece.path) as file:
        content = file.read(fields.max_line_bytes + 1)
        if len(content) > fields.max_line_bytes:
            yield _bad(
                piece.path,
                1,
                fields,
                "line_too_long",
                f"more than read.max_line_bytes={fields.max_line_bytes} bytes",
            )
            return
    if not content.strip():
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield _bad(
            piece.path, content[: error.start].count(b"\n") + 1, fields, "broken_utf8", str(error)
        )
    else:
        yield Record(piece.path, 1, None, text, _stem(piece.path))


def _read_parquet(piece: Slice, fields: Any) -> Iterator[Record]:
    with _open_binary(piece.path) as file:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = (fields.text_field, fields.id_field, fields.source_field)
        names = [name for name in wanted if name in table.schema_arrow.names]
        groups = list(
            range(piece.start, piece.stop if piece.stop is not None else table.num_row_groups)
        )
        number = piece.first_line - 1
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=names):
            for row in batch.to_pylist():
                number += 1
                yield _document(row, piece.path, number, fields)


def _parse(line: bytes, path: str, number: int, fields: Any) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _bad(path, number, fields, "broken_utf8", str(error))
    except (ValueError, RecursionError) as error:
        return _bad(path, number, fields, "no_json", str(error) or "nested too deeply")
    if not isinstance(record, dict):
        return _bad(
            path, number, fields, "no_json", f"{type(record).__name__} instead of an object"
        )
    return _document(record, path, number, fields)


def _document(record: dict[str, Any], path: str, number: int, fields: Any) -> Record:
    name = record.get(fields.id_field)
    identity = (
        str(name)
        if isinstance(name, str | int) and not isinstance(name, bool) and str(name)
        else None
    )
    source = record.get(fields.source_field)
    source = source if isinstance(source, str) and source else _stem(path)
    text = record.get(fields.text_field)
    if not isinstance(text, str):
        return Record(
            path,
            number,
            identity,
            "",
            source,
            "no_text",
            f"no text in field {fields.text_field!r} (it has: {sorted(record)})",
        )
    try:
        text.encode()
        (identity or "").encode()
        source.encode()
    except UnicodeEncodeError as error:  # half of an escaped surrogate pair, "\ud83d"
        return Record(path, number, None, "", _stem(path), "broken_utf8", str(error))
    return Record(path, number, identity, text, source)


def _bad(path: str, line: int, fields: Any, reason: str, detail: str) -> Record:
    return Record(path, line, None, "", _stem(path), reason, detail)


def _stem(path: str) -> str:
    return Path(path).name.split(".")[0]


@contextlib.contextmanager
def _open_binary(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed; from object storage where the path is an address."""
    with contextlib.ExitStack() as stack:
        if "://" in path:
            filesystem, name = pyarrow.fs.FileSystem.from_uri(path)
            raw: BinaryIO = io.BufferedReader(filesystem.open_input_file(name))  # type: ignore[arg-type]
        else:
            raw = open(path, "rb")  # noqa: SIM115
        stack.callback(raw.close)
        yield stack.enter_context(open_file(path, raw))
