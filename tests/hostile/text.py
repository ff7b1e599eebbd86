"""Text that blows up a reader, on every command that reads text; and files of questions."""

import dataclasses
import gzip
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import Hostile, finished_run
from launches import SHARED, write_config

pytest.importorskip("zstandard")
pytest.importorskip("pyarrow")
import pyarrow as pa
import zstandard
from pyarrow import parquet

MIB = 1 << 20
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
        *("--model", str(finished_run() / "tokenizer.model")),
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
        *("temperature", "--temperature", "2", "--config", str(write_config(files.parent))),
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


def lines(*pieces: tuple[str, int]) -> bytes:
    """A .gz of these texts, each so many times."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as file:
        for piece, times in pieces:
            file.write(piece.encode() * times)
    return out.getvalue()


def empty_frames() -> bytes:
    """Nothing, sixty thousand times, and then a line that is no JSON."""
    packer = zstandard.ZstdCompressor()
    return packer.compress(b"") * 60_000 + packer.compress(b"no JSON\n")


def wide_window() -> bytes:
    """A frame that wants two gigabytes for what came before."""
    return struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + b"\x01\x00\x00"


def long_skip() -> bytes:
    """A frame to pass over, of four gigabytes that are not there."""
    return struct.pack("<II", 0x184D2A50, (1 << 32) - 1) + bytes(1000)


def table(text: pa.Array, **options) -> bytes:
    """A Parquet file of one column."""
    out = io.BytesIO()
    parquet.write_table(pa.table({"text": text}), out, compression="zstd", **options)
    return out.getvalue()


def same_value(rows: int, size: int) -> pa.Array:
    """All rows hold the same text."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["a" * size])


def dictionary() -> bytes:
    """A value of 8 MiB, of which each row says that it is its own."""
    return table(same_value(256, 8 * MIB), dictionary_pagesize_limit=16 * MIB, store_schema=False)


def dictionary_of_lists() -> bytes:
    """The same inside lists, where one row holds it a million times."""
    column = pa.ListArray.from_arrays([0, 1 << 20], same_value(1 << 20, MIB))
    return table(column, dictionary_pagesize_limit=2 * MIB, store_schema=False)


def same_beginnings() -> bytes:
    """Values that are the one before and nothing more."""
    column = pa.array(["a" * 8 * MIB] * 60)
    return table(column, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})


def page() -> bytes:
    """A page of 400 MiB in a few thousand bytes, which the file's metadata call small."""
    content = table(pa.array(["a" * 4 * MIB] * 100), use_dictionary=False)
    found = parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
    for size in {found.column(0).total_uncompressed_size, found.total_byte_size}:
        # A number as often as it stands there, in as many bytes.
        content = content.replace(varint(2 * size), varint(2, len(varint(2 * size))))
    return content


def varint(number: int, size: int = 0) -> bytes:
    """A number as Thrift writes it, in `size` bytes at least."""
    digits = []
    while number or len(digits) < max(1, size):
        digits.append(number & 127)
        number >>= 7
    return bytes([digit | 128 for digit in digits[:-1]]) + bytes(digits[-1:])


def deep_schema(depth: int = 100_000) -> bytes:
    """A Parquet file without a row, whose column lies in so many others."""
    # Repetition, name and one child; the last one's type is bytes.
    inner = b"\x35\x02\x18\x01a\x15\x02\x00"
    leaf = b"\x15\x0c\x25\x02\x18\x01a\x00"
    schema = b"\x19\xfc" + varint(depth + 1) + inner * depth + leaf
    footer = b"\x15\x02" + schema + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def of_text(name: str, file: str, content: Callable[[], bytes], counted: str) -> Hostile:
    """A file that all readers refuse by its name, and the pipeline counts as it says."""
    return Hostile(name, write(file, content), READERS, place=file, counted={"pipeline": counted})


def of_questions(task: str, file: str, name: str, content: Callable[[], bytes]) -> Hostile:
    """A file of a test, for its evaluation."""

    def make(files: Path) -> None:
        # Of some tests the examples too.
        for each in {file, re.sub("test|val", "dev", file)}:
            (files / each).parent.mkdir(exist_ok=True)
            (files / each).write_bytes(content())

    subject = re.sub("_(test|val)$", "", Path(file).stem)
    evaluate = lambda files: [
        "baichuan_jax.evaluate",
        *(task, "--checkpoint", str(finished_run()), "--data", str(files), "--subjects", subject),
        *("--output", str(files.parent / "results")),
    ]
    return Hostile(name, make, {task: evaluate}, place=subject)


def of_json(name: str, content: Callable[[], bytes]) -> Hostile:
    """A JSON file of questions, for all that read one."""
    evaluated = of_questions("gaokao", "2010-2022_History_MCQs.json", name, content)
    corpus = f"{SHARED}/train-en.jsonl"
    return dataclasses.replace(
        evaluated,
        commands={
            **evaluated.commands,
            "decontaminate": lambda files: [
                "baichuan_jax.data.decontaminate",
                *("--input", corpus, "--evaluation", f"{files}/*.json"),
            ],
            "pipeline": lambda files: [
                "baichuan_jax.data.pipeline",
                *("--input", json.dumps([corpus]), "--output", str(files.parent / "corpus")),
                *("--decontaminate.files", json.dumps([f"{files}/*.json"])),
            ],
        },
    )


def keys(*more: int) -> bytes:
    """An object of 60,000 keys and some more."""
    pairs = ",".join(f'"{key}":0' for key in (*range(60_000), *more))
    return f"{{{pairs}}}".encode()


HOSTILE = [
    of_text("zst_bomb", "a.jsonl.zst", lambda: zstd_blocks(32768), "unreadable"),
    of_text("zst_newlines", "a.jsonl.zst", lambda: zstd_blocks(32768, b"\n"), "unreadable"),
    of_text("zst_frames", "a.jsonl.zst", empty_frames, "no_json"),
    of_text("zst_window", "a.jsonl.zst", wide_window, "unreadable"),
    of_text("zst_skip", "a.jsonl.zst", long_skip, "unreadable"),
    of_text("gz_bomb", "a.jsonl.gz", lambda: gzip_blocks(800 * MIB), "unreadable"),
    of_text("long_line", "a.jsonl.gz", lambda: lines(("a", 40 * MIB)), "line_too_long"),
    of_text("long_text", "a.txt.gz", lambda: lines(("a" * 1023 + "\n", 40 << 10)), "line_too_long"),
    of_text(
        "long_name", "a.jsonl.gz", lambda: lines(('{"', 1), ("a", 15 * MIB), ('":0}', 1)), "no_text"
    ),
    of_text("deep_line", "a.jsonl", lambda: b"[" * 900_000 + b"\n", "no_json"),
    of_text(
        "many_values",
        "a.jsonl.gz",
        lambda: lines(('{"text": "a", "x": [', 1), ("{},", 5 * MIB), ("0]}\n", 1)),
        "no_json",
    ),
    of_text(
        "many_keys",
        "a.jsonl.gz",
        lambda: lines(('{"text": "a"', 1), (',"x":0', 2 * MIB), ("}\n", 1)),
        "no_json",
    ),
    of_text("many_digits", "a.jsonl", lambda: b'{"text": ' + b"9" * 900_000 + b"}\n", "no_json"),
    of_text("no_documents", "a.jsonl.gz", lambda: lines(("{}\n", 20 * MIB)), "no_text"),
    of_text("parquet_dictionary", "a.parquet", dictionary, "unreadable"),
    of_text("parquet_lists", "a.parquet", dictionary_of_lists, "no_text"),
    of_text("parquet_delta", "a.parquet", same_beginnings, "unreadable"),
    of_text("parquet_page", "a.parquet", page, "unreadable"),
    of_text(
        "parquet_rows", "a.parquet", lambda: table(pa.nulls(20 * MIB, pa.string())), "unreadable"
    ),
    of_text(
        "parquet_long_row", "a.parquet", lambda: table(pa.array(["a" * 20 * MIB])), "line_too_long"
    ),
    of_text("parquet_schema", "a.parquet", deep_schema, "unreadable"),
    of_json("deep_json", lambda: b'{"example": ' + b"[" * 900_000),
    of_json("key_twice", lambda: keys(59_999)),
    of_questions("agieval", "sat-math.jsonl", "many_fields", keys),
    of_questions("ceval", "val/law_val.csv", "wide_header", lambda: b"a,b," * 100_000),
    of_questions(
        "mmlu", "test/virology_test.csv", "long_answer", lambda: b"q,a,b,c,d," + b"e" * 100_000
    ),
]
