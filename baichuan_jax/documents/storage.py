"""Opens a file of text wherever it lies and however it is compressed.

Input: a path, or an address in object storage (s3://, gs://, hdfs://). Output: a binary stream of
the decompressed content. A damaged or truncated file raises an OSError or EOFError while it is
read, never an early end that looks like a whole file. An OSError with an errno is the system's, and
says nothing about the file: it may not be read, or not now.
"""

import contextlib
import errno
import gzip
import importlib.util
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.files import naming

# What a damaged or truncated file raises while it is read; gzip lets zlib's own error through. An
# OSError of damage has no errno.
DAMAGE = (EOFError, OSError, zlib.error)


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """The content of a file, decompressed as the end of its name says.

    Raises ConfigError where the package that reads it is not installed. An OSError of the system
    has the file's name.
    """
    with naming(Path(path)), contextlib.ExitStack() as stack:
        raw = _open_remote(path) if "://" in path else open(path, "rb")  # noqa: SIM115
        # gzip and zstandard do not close the file below them.
        stack.callback(raw.close)
        yield stack.enter_context(_decompressed(path, raw))


def pyarrow_for(path: str) -> Any:
    """The module pyarrow with its parts for Parquet and storage. Raises ConfigError without it.

    Training on JSONL or text does without pyarrow, so it is imported only where a file needs it.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.fs  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{path} cannot be read: pyarrow is not installed; pip install -r requirements-data.txt"
        ) from None
    return pyarrow


def _open_remote(path: str) -> io.BufferedReader:
    # The limits of connections are pyarrow's own.
    with announced(f"{path} to be opened"), of_storage(path):
        filesystem, name = pyarrow_for(path).fs.FileSystem.from_uri(path)
        file = filesystem.open_input_file(name)
    return io.BufferedReader(_Remote(path, file))


@contextlib.contextmanager
def of_storage(path: str) -> Iterator[None]:
    """Give an error of object storage an errno: most have none, as if the file were damaged."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        # On one line.
        reason = " ".join(str(error).split())
        raise OSError(errno.EREMOTEIO, f"the storage fails ({reason})", path) from error


class _Remote(io.RawIOBase):
    """A file in object storage, whose errors are those of a system."""

    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        with of_storage(self._path):
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with of_storage(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _decompressed(path: str, raw: io.BufferedReader) -> BinaryIO:
    # Of no content there is a header: a file without a byte was never written.
    if path.endswith((".gz", ".zst")) and not raw.peek(1):
        raise EOFError("the compressed file has 0 bytes")
    if path.endswith(".gz"):
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        if importlib.util.find_spec("zstandard") is None:
            raise ConfigError(
                f"{path} cannot be read: zstandard is not installed; pip install zstandard, "
                "or decompress the file"
            )
        return io.BufferedReader(_Zstd(raw))  # type: ignore[return-value]
    return raw


class _Zstd(io.RawIOBase):
    """A zstd file. Raises EOFError where the last frame is cut short, OSError where it is damaged.

    zstandard's own reader takes a truncated file for a whole one, hence this class. Frames may
    follow each other: files that were compressed and then joined are read to the end.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard  # here, since only .zst files need it

        self._file = file
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._decompressor = self._new()
        self._damage = zstandard.ZstdError
        self._pending = b""
        # A reader may ask again after the end; a new frame must not be awaited then.
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        # A chunk may give no bytes yet, and to return none would mean the end of the file.
        while not self._pending and not self._ended:
            if self._decompressor.eof:
                # Between two frames, the only place where a whole file may end.
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


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile.

    Raises ConfigError where pyarrow is not installed, OSError where the file is damaged, also from
    inside.
    """
    pyarrow = pyarrow_for(path)
    try:
        with open_binary(path) as file:
            yield pyarrow.parquet.ParquetFile(file)
    # UnicodeDecodeError: a column's name.
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(str(error)) from error
