"""Text that blows up a reader, on every command that reads text; and files of questions."""

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from harness import Hostile, finished_run
from launches import SHARED, write_config

zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MIB = 1 << 20
LINE = b'{"text": "' + b"a" * 500 + b'"}\n'
READERS = {
    "train": lambda files: [
        "baichuan_jax.train",
        *("--config", str(write_config(files.parent)), "--run_dir", str(files.parent / "run")),
        *("--data.train", json.dumps({f"{files}/*": 1.0})),
    ],
    "rows": lambda files: [
        "baichuan_jax.data.rows",
        *("pack", "--input", f"{files}/*", "--output", str(files.parent / "rows")),
        *("--tokenizer", str(finished_run() / "tokenizer.model"), "--context_length", "64"),
    ],
    "tokenizer": lambda files: [
        "baichuan_jax.tokenizer",
        *("train", "--input", f"{files}/*", "--vocab_size", "300"),
        *("--output", str(files.parent / "tokenizer.model")),
    ],
    "stats": lambda files: [
        "baichuan_jax.tokenizer",
        *("stats", "--input", f"{files}/*"),
        *("--tokenizer", str(finished_run() / "tokenizer.model")),
    ],
    "perplexity": lambda files: [
        "baichuan_jax.evaluate",
        *("perplexity", "--checkpoint", str(finished_run()), "--text", f"{files}/*"),
        *("--output", str(files.parent / "perplexity"), "--context", "64"),
    ],
    "score": lambda files: ["baichuan_jax.data.quality", "score", "--input", f"{files}/*"],
    "quality": lambda files: [
        "baichuan_jax.data.quality",
        *("train", "--good", f"{SHARED}/train-en.jsonl", "--bad", f"{files}/*"),
        *("--output", str(files.parent / "model")),
    ],
    "mixture": lambda files: [
        "baichuan_jax.data.mixture",
        *("temperature", "--config", str(write_config(files.parent))),
        *("--data.train", json.dumps({f"{files}/*": 1.0, f"{SHARED}/train-en.jsonl": 1.0})),
        *("--data.cache_dir", str(files.parent / "cache")),
    ],
    "decontaminate": lambda files: [
        "baichuan_jax.data.decontaminate",
        *("--input", f"{files}/*", "--evaluation", f"{SHARED}/train-en.jsonl"),
    ],
    "pipeline": lambda files: [
        "baichuan_jax.data.pipeline",
        *("--input", json.dumps([f"{files}/*"]), "--output", str(files.parent / "corpus")),
    ],
}


def write(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    """What writes one file into a folder."""

    def make(files: Path) -> None:
        (files / name).write_bytes(content())

    return make


def zstd(*pieces: tuple[bytes, int]) -> bytes:
    """A frame of each of these bytes, so many times, but for the first one, which stands once."""
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as file:
        for piece, times in pieces:
            for _ in range(times):
                file.write(piece)
    return out.getvalue()


def zstd_blocks(count: int, letter: bytes = b"a") -> bytes:
    """A frame of blocks of one byte that is repeated: 128 KiB of four bytes each."""
    # A window of 128 KiB, no size and no checksum.
    head = struct.pack("<IBB", 0xFD2FB528, 0, (17 - 10) << 3)
    block = lambda is_last: (is_last | 1 << 1 | (1 << 17) << 3).to_bytes(3, "little") + letter
    return head + block(0) * (count - 1) + block(1)


def gzip_blocks(size: int) -> bytes:
    """A .gz of a line without an end."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(bytes(MIB)) for _ in range(size >> 20)), packer.flush()])


def values(items: Callable[[int], str], count: int) -> bytes:
    """A .gz of one line, an object whose second field holds many values."""
    inner = ",".join(map(items, range(count)))
    return gzip.compress(f'{{"text": "a", "x": {inner}}}\n'.encode(), 9)


def table(text: "pa.Array", **options) -> bytes:
    """A Parquet file of one column."""
    out = io.BytesIO()
    parquet.write_table(pa.table({"text": text}), out, **options)
    return out.getvalue()


def dictionary(rows: int, size: int) -> bytes:
    """All rows hold the same value."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["a" * size])
    return table(column, dictionary_pagesize_limit=2 * size, store_schema=False)


def deep_schema(depth: int) -> bytes:
    """A Parquet file without a row, whose column lies in so many others."""
    # Repetition, name and one child; the last one's type is bytes.
    inner = b"\x35\x02\x18\x01a\x15\x02\x00"
    leaf = b"\x15\x0c\x25\x02\x18\x01a\x00"
    length = depth + 1
    size = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14])
    footer = b"\x15\x02\x19\xfc" + size + inner * depth + leaf + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def of_text(
    name: str, file: str, content: Callable[[], bytes], counted: str, **others: Mapping
) -> Hostile:
    """A file that all readers refuse by its name, and the pipeline counts as it says."""
    return Hostile(name, write(file, content), READERS, place=file, counted={"pipeline": counted})


HOSTILE = [
    of_text("zst_bomb", "a.jsonl.zst", lambda: zstd_blocks(32768), "unreadable"),
]
