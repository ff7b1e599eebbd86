"""Files of documents, read strictly: a document that cannot be read is an error that names file and line, never left out."""

import glob
import gzip
import importlib.util
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from baichuan_jax.config.schema import ConfigError

_HAN = re.compile("[\u4e00-\u9fff]+")
INSTALLED = Path(__file__).parents[2]  # the folder that the package lies in
PART_BYTES = (
    64 << 20
)  # an uncompressed JSONL file is read in parts of this size, by as many processes as there are


@dataclass(frozen=True)
class Part:
    """A file; or the lines of an uncompressed JSONL file that begin in [start, stop); or those row groups of a Parquet file."""

    path: str
    start: int = 0
    stop: int | None = None


def find_files(patterns: list[str]) -> list[str]:
    """Files that globs name, sorted, each once. Raises ConfigError where a glob matches none or a file is of no known kind.

    baichuan_jax/... means the files that come with the program, wherever it is installed and
    whatever the working directory is.
    """
    files = set()
    for pattern in patterns:
        own = (
            os.path.join(glob.escape(str(INSTALLED)), pattern)
            if pattern.startswith("baichuan_jax/")
            else pattern
        )
        found = [path for path in glob.glob(own, recursive=True) if os.path.isfile(path)]
        if not found:
            raise ConfigError(f"{pattern!r} matches no file (working directory: {os.getcwd()})")
        files.update(found)
    for path in files:
        if kind_of(path) not in (".jsonl", ".json", ".txt", ".parquet"):
            raise ConfigError(
                f"{path}: expected .jsonl, .json (a document a line) or .txt (a document a file), also with .gz or .zst; or .parquet"
            )
    return sorted(files)


def kind_of(path: str) -> str:
    """The suffix below .gz or .zst."""
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix


def split_files(files: list[str]) -> list[Part]:
    """Parts to read in parallel: a function of the files alone."""
    parts = []
    for path in files:
        size = os.path.getsize(path)
        if kind_of(path) == ".parquet":
            parts += [Part(path, start, stop) for start, stop in _row_groups(path)]
        elif path.endswith((".jsonl", ".json")) and size > PART_BYTES:
            borders = [*range(0, size, PART_BYTES), size]
            parts += [Part(path, start, stop) for start, stop in itertools.pairwise(borders)]
        else:
            parts.append(Part(path))
    return parts


def read_documents(part: Part, text_field: str) -> Iterator[str]:
    """Texts of a part, in order, empty ones included. Raises ConfigError naming file and line."""
    if kind_of(part.path) == ".txt":
        content = b"".join(_lines(part))
        yield _decode(content, part.path)
        return
    if kind_of(part.path) == ".parquet":
        yield from _read_parquet(part, text_field)
        return
    for number, line in enumerate(_lines(part), start=1):
        where = f"{part.path}, line {number}" + (f" after byte {part.start}" if part.start else "")
        if not line.strip():
            continue
        decoded = _decode(line, where)
        try:
            record = json.loads(decoded)
        except ValueError as error:
            raise ConfigError(f"{where} is no JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            names = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ConfigError(
                f"{where} has no text in field {text_field!r} (it has: {names}); set data.text_field"
            )
        try:
            record[text_field].encode()
        except UnicodeEncodeError as error:  # half of an escaped surrogate pair, "\ud83d"
            raise ConfigError(f"{where} has no text in field {text_field!r}: {error}") from None
        yield record[text_field]


def _row_groups(path: str) -> list[tuple[int, int]]:
    """[start, stop) of row groups that hold about PART_BYTES together."""
    with _parquet(path) as file:
        sizes = [
            file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)
        ]
    borders = [0]
    for group in range(len(sizes)):
        if sum(sizes[borders[-1] : group + 1]) >= PART_BYTES or group + 1 == len(sizes):
            borders.append(group + 1)
    return list(itertools.pairwise(borders))


def _read_parquet(part: Part, text_field: str) -> Iterator[str]:
    with _parquet(part.path) as file:
        if text_field not in file.schema_arrow.names:
            raise ConfigError(
                f"{part.path} has no column {text_field!r} (it has: {file.schema_arrow.names}); set data.text_field"
            )
        groups = list(
            range(part.start, part.stop if part.stop is not None else file.num_row_groups)
        )
        row = 0
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise ConfigError(
                        f"{part.path}, row {row} after row group {part.start} has no text in column {text_field!r}"
                    )
                yield text


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{path}: Parquet needs pyarrow: pip install -r requirements-data.txt"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read to its end: {error}") from None


def language(text: str) -> str:
    """ "zh" where more than half of the letters are Han, else "en"."""
    han = sum(map(len, _HAN.findall(text)))
    if 2 * han > len(text) or not han:  # no need to count letters
        return "zh" if han else "en"
    return "zh" if 2 * han > sum(map(str.isalpha, text)) else "en"


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is no UTF-8: {error}") from None


def _lines(part: Part) -> Iterator[bytes]:
    try:
        with open_file(part.path) as file:
            if part.start:
                file.seek(part.start - 1)
                file.readline()  # the line that begins before this part belongs to the part before
            while (part.stop is None or file.tell() < part.stop) and (line := file.readline()):
                yield line
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"{part.path} cannot be read to its end: {error}") from None


def open_file(path: str, raw: BinaryIO | None = None) -> BinaryIO:
    """A file's bytes, decompressed as its name says; `raw`: its bytes as they are, where they do not lie on a local disk.

    What is damaged raises EOFError, OSError or zlib.error while it is read. ConfigError: .zst
    without the package zstandard.
    """
    if path.endswith(".gz"):
        return gzip.open(raw or path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        if importlib.util.find_spec("zstandard") is None:
            raise ConfigError(
                f"{path} cannot be read: zstandard is not installed; pip install zstandard, or decompress the file"
            )
        return io.BufferedReader(_Zstd(raw or open(path, "rb")))  # type: ignore[return-value]
    return raw or open(path, "rb")


class _Zstd(io.RawIOBase):
    """A zstd file that complains where it is cut short, which zstandard's own reader does not. Damage raises OSError."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard  # here, since only .zst files need it

        self._file = file
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._decompressor = self._new()
        self._damage = zstandard.ZstdError
        self._pending = b""
        self._ended = False  # a reader may ask again after the end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        while not self._pending and not self._ended:
            if self._decompressor.eof:
                chunk = self._decompressor.unused_data or self._file.read(1 << 20)
                self._ended = not chunk
                self._decompressor = self._new()
            elif not (chunk := self._file.read(1 << 20)):
                raise EOFError("the last zstd frame is not complete")
            try:
                self._pending = self._decompressor.decompress(chunk)
            except self._damage as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._pending))
        buffer[:size], self._pending = self._pending[:size], self._pending[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
