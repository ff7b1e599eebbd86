"""Opens a file of text wherever it lies and however it is compressed.

Input: a path, or an address in object storage (s3://, gs://, hdfs://). Output: a binary stream of
the decompressed content. A damaged or truncated file raises an OSError or EOFError while it is
read, never an early end that looks like a whole file. So does one that holds far more than its size
(`Expansion`): a reader would never come to its end. An OSError with an errno is the system's, and
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
# How much text a file may hold: FREE_BYTES whatever its size, else MOST_EXPANSION times its size.
# Text takes a third to a tenth of its bytes, logs and tables a thirtieth; what was packed to blow
# up takes a thousandth (gzip) or less (zstd). A file of repetitions that is meant can be read as it
# is where it is small, and decompressed.
FREE_BYTES = 64 << 20
MOST_EXPANSION = 200
# What a line, or a row of a table, counts beside its bytes: to judge and to record an empty one is
# work too, and a file of a few bytes may hold a billion.
LINE_BYTES = 128
# What zstd's own command takes without --long=28 and more; a reader holds a window of it.
_LARGEST_WINDOW = 128 << 20
# A block of zstd is at most as much.
_CHUNK = 128 << 10


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


class Expansion:
    """Counts what was read of a file. Raises OSError where it is far more than its size."""

    def __init__(self, stored: int) -> None:
        self._stored, self._read = stored, 0
        self.most = max(FREE_BYTES, MOST_EXPANSION * stored)

    def add(self, size: int, lines: int = 0) -> None:
        """See `size` more bytes in so many lines."""
        self._read += size + LINE_BYTES * lines
        if self._read > self.most:
            raise OSError(
                f"the file has {self._stored:,} bytes and holds far more: a file may hold "
                f"{FREE_BYTES >> 20} MiB or {MOST_EXPANSION} times its size, where a line or row "
                f"counts {LINE_BYTES} bytes more; store it uncompressed if that is meant"
            )


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file, which stands at its beginning again."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def _decompressed(path: str, raw: io.BufferedReader) -> BinaryIO:
    if not path.endswith((".gz", ".zst")):
        return raw
    # Of no content there is a header: a file without a byte was never written.
    size = size_of(raw)
    if not size:
        raise EOFError("the compressed file has 0 bytes")
    if path.endswith(".gz"):
        content: io.BufferedIOBase | io.RawIOBase = gzip.GzipFile(fileobj=raw)
    elif importlib.util.find_spec("zstandard") is None:
        raise ConfigError(
            f"{path} cannot be read: zstandard is not installed; pip install zstandard, "
            "or decompress the file"
        )
    else:
        content = _Zstd(raw)
    counted = _Counted(content, Expansion(size))
    return io.BufferedReader(counted, _CHUNK)  # type: ignore[return-value]


class _Counted(io.RawIOBase):
    """A decompressed file that ends in an OSError where it holds far more than its size."""

    def __init__(self, content: Any, expansion: Expansion) -> None:
        self._content, self._expansion = content, expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        # One read: of several the last may fail, and what the others gave would be lost.
        content = self._content.read1(len(buffer))
        self._expansion.add(len(content), content.count(b"\n"))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._content.close()
        super().close()


class _Zstd(io.RawIOBase):
    """A zstd file. Raises EOFError where the last frame is cut short, OSError where it is damaged.

    A file is frames, which follow each other where files were compressed and then joined; a frame
    is a header and blocks (RFC 8878). It is read block by block, since a block gives 128 KiB at
    most. zstandard's own readers either give all that a piece of the file holds at once, which may
    be gigabytes of a few bytes, or take a truncated file for a whole one.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard  # here, since only .zst files need it

        self._file = file
        self._zstandard = zstandard
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        # Of the frame that is read; None between two of them, where alone a whole file may end.
        self._frame: Any = None
        self._checksum = 0
        # What was decompressed and not yet asked for. To cut a view copies nothing.
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        try:
            # A block may be empty, and to return no bytes would mean the end of the file.
            while not self._pending:
                if self._frame is not None:
                    self._pending = memoryview(self._block())
                elif not self._begin():
                    return 0
        except self._zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        size = min(len(buffer), len(self._pending))
        buffer[:size], self._pending = self._pending[:size], self._pending[size:]
        return size

    def read1(self, size: int) -> bytes:
        """Up to so many bytes of one block."""
        return self.read(size)

    def _begin(self) -> bool:
        """Read the next frame's header, or pass over one without text. False at the end."""
        head = self._file.read(4)
        if not head:
            return False
        head += self._exactly(4 - len(head))
        # A frame that holds no text: its size, and as many bytes.
        if head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
            left = int.from_bytes(self._exactly(4), "little")
            while left:
                left -= len(self._exactly(min(left, _CHUNK)))
            return True
        head += self._exactly(1)
        head += self._exactly(self._zstandard.frame_header_size(head) - len(head))
        parameters = self._zstandard.get_frame_parameters(head)
        if parameters.window_size > _LARGEST_WINDOW:
            raise OSError(
                f"a zstd frame's window has {parameters.window_size:,} bytes, and the largest that "
                f"is read {_LARGEST_WINDOW:,}; compress it again with a smaller --long"
            )
        self._frame = self._decompressor.decompressobj()
        self._frame.decompress(head)
        self._checksum = 4 if parameters.has_checksum else 0
        return True

    def _block(self) -> bytes:
        """The content of the frame's next block."""
        head = self._exactly(3)
        word = int.from_bytes(head, "little")
        # Bit 0: the frame's last block. Bits 1 and 2: its kind, and 1 is one byte that is
        # repeated. The others: its size.
        is_last, kind, size = word & 1, word >> 1 & 3, word >> 3
        stored = (1 if kind == 1 else size) + (self._checksum if is_last else 0)
        content = self._frame.decompress(head + self._exactly(stored))
        if is_last:
            self._frame = None
        return content

    def _exactly(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            raise EOFError("the last zstd frame is not complete")
        return content

    def close(self) -> None:
        self._file.close()
        super().close()
