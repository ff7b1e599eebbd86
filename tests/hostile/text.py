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


def zigzag(number: int) -> bytes:
    """A signed number as Thrift writes it."""
    return varint(number << 1 if number >= 0 else (-number << 1) - 1)


def field(number: int, value: int | bytes, kind: int = 5) -> bytes:
    """A field of a struct; by its kind a number (of 32 bits, or 6: of 64) or bytes."""
    content = zigzag(value) if isinstance(value, int) else varint(len(value)) + value
    return bytes([kind]) + zigzag(number) + content


def inner(number: int, *fields: bytes) -> bytes:
    """A field that is a struct."""
    return b"\x0c" + zigzag(number) + struct_of(*fields)


def several(number: int, *items: bytes, kind: int = 12) -> bytes:
    """A field that is a list, of structs if nothing else is said."""
    return b"\x09" + zigzag(number) + bytes([240 | kind]) + varint(len(items)) + b"".join(items)


def struct_of(*fields: bytes) -> bytes:
    return b"".join(fields) + b"\x00"


def with_footer(footer: bytes, pages: bytes = b"") -> bytes:
    """A Parquet file."""
    return b"PAR1" + pages + footer + struct.pack("<I", len(footer)) + b"PAR1"


def pages_file(
    pages: bytes, rows: int, *, dictionary: int = 0, encodings: tuple[int, ...] = (0,), groups=1
) -> bytes:
    """A Parquet file of a column of texts in zstd, whose first page may be a dictionary.

    All row groups have the same pages.
    """
    chunk = [
        *(field(1, 6), several(2, *map(zigzag, encodings), kind=5)),
        *(several(3, varint(4) + b"text", kind=8), field(4, 6), field(5, rows, 6)),
        *(field(6, 1000, 6), field(7, len(pages), 6), field(9, 4 + dictionary, 6)),
    ]
    if dictionary:
        chunk.append(field(11, 4, 6))
    column = struct_of(field(2, 4, 6), inner(3, *chunk))
    group = struct_of(several(1, column), field(2, 1000, 6), field(3, rows, 6))
    nodes = [
        struct_of(field(4, b"root", 8), field(5, 1)),
        struct_of(field(1, 6), field(3, 0), field(4, b"text", 8), field(6, 0)),
    ]
    footer = [field(1, 2), several(2, *nodes), field(3, rows * groups, 6)]
    return with_footer(struct_of(*footer, several(4, *[group] * groups)), pages)


def data_page(values: int, encoding: int = 0) -> bytes:
    """The field of a page's header that says what is in it."""
    return inner(5, field(1, values), field(2, encoding), field(3, 3), field(4, 3))


def data_page_2(values: int) -> bytes:
    """The same of version 2, with plain values."""
    return inner(
        8, field(1, values), field(2, 0), field(3, values), *(field(i, 0) for i in (4, 5, 6))
    )


def values(count: int, blocks: int) -> tuple[bytes, int]:
    """A page of values of so many blocks of 128 KiB, and its bytes when decompressed."""
    size = blocks << 17
    packed = zstandard.ZstdCompressor().compress(struct.pack("<I", size)) + zstd_blocks(blocks)
    return packed * count, (size + 4) * count


def size_twice() -> bytes:
    """A page that says its size of two gigabytes, and in another type that it is ten bytes."""
    page, size = values(120, 128)
    sizes = field(2, size) + field(2, 10, 6)
    header = struct_of(field(1, 0), sizes, field(3, len(page)), data_page(120))
    return pages_file(header + page, 120)


def two_headers() -> bytes:
    """A page that has a value or ten thousand, as one reads it, and another behind it."""
    pages = b""
    for count, blocks, other in ((1, 1, data_page_2(10_000)), (120, 128, b"")):
        page, size = values(count, blocks)
        sizes = field(2, size) + field(3, len(page))
        pages += struct_of(field(1, 0), sizes, data_page(count), other) + page
    return pages_file(pages, 121)


def dictionary_twice() -> bytes:
    """A dictionary that says its size twice, and has a value of 16 MiB that all rows are."""
    page, size = values(1, 128)
    sizes = field(2, 10) + field(2, size) + field(3, len(page))
    first = struct_of(field(1, 2), sizes, inner(7, field(1, 1), field(2, 0))) + page
    # One bit an index, and a run of the first value.
    indices = b"\x01" + varint(256 << 1) + b"\x00"
    packed = zstandard.ZstdCompressor().compress(indices)
    sizes = field(2, len(indices)) + field(3, len(packed))
    second = struct_of(field(1, 0), sizes, data_page(256, 8)) + packed
    return pages_file(first + second, 256, dictionary=len(first), encodings=(0, 8))


def hidden_beginnings() -> bytes:
    """Values that are the one before, in a page of which a second header says that they are not."""
    size, count = 20 * MIB, 129
    # Lengths as differences: a block of 128 in four parts, of which each has its own width.
    head = varint(128) + varint(4) + varint(count)
    width = size.bit_length()
    # 0 and then `size`: the first difference is `size`.
    prefixes = (
        head + zigzag(0) + zigzag(0) + bytes([width, 0, 0, 0]) + size.to_bytes(4 * width, "little")
    )
    # `size` and then 0: all differences but the first are `size` above the least.
    bits = [sum(size << (width * i) for i in range(part == 0, 32)) for part in range(4)]
    packed = b"".join(part.to_bytes(4 * width, "little") for part in bits)
    suffixes = head + zigzag(size) + zigzag(-size) + bytes([width] * 4) + packed
    content = zstandard.ZstdCompressor().compress(prefixes + suffixes) + zstd_blocks(size >> 17)
    sizes = field(2, len(prefixes + suffixes) + size) + field(3, len(content))
    header = struct_of(field(1, 0), sizes, data_page(count, 7), data_page_2(count))
    return pages_file(header + content, count)


def many_lengths(encoding: int, count: int, said: int) -> bytes:
    """A page of a few bytes that stand for `count` lengths; `said`: those of its header."""
    block = 1 << 30
    # All differences are 0, in no bits.
    one = varint(block) + varint(4) + varint(count) + zigzag(0)
    one += (zigzag(0) + bytes(4)) * -(-(count - 1) // block)
    body = one * (2 if encoding == 7 else 1)
    packed = zstandard.ZstdCompressor().compress(body)
    sizes = field(2, len(body)) + field(3, len(packed))
    return pages_file(struct_of(field(1, 0), sizes, data_page(said, encoding)) + packed, said)


def shared_pages() -> bytes:
    """Row groups that all have the same pages, most of them without a value."""
    pages = b""
    for count, body in (*[(0, b"")] * 2000, (1, struct.pack("<I", 3) + b"abc")):
        packed = zstandard.ZstdCompressor().compress(body)
        sizes = field(2, len(body)) + field(3, len(packed))
        pages += struct_of(field(1, 0), sizes, data_page(count)) + packed
    return pages_file(pages, 1, groups=300)


def two_schemas(between: bytes = b"") -> bytes:
    """A flat schema and later a deep one, which is the one that Arrow takes."""
    nodes = [
        struct_of(field(4, b"a", 8), field(5, 1)),
        struct_of(field(1, 6), field(4, b"a", 8)),
    ]
    flat, deep = several(2, *nodes), several(2, *nodes[:1] * 60_000, nodes[1])
    rest = several(4) + between + deep
    return with_footer(struct_of(field(1, 2), flat, field(3, 0, 6), rest))


def hidden_schema() -> bytes:
    """The deep one behind a list of a byte, of which Arrow reads a struct that ends in a zero."""
    return two_schemas(b"\x09" + zigzag(7) + b"\x13\x11\x00")


def categories() -> bytes:
    """A dictionary of 42 MiB, which Arrow's type has every batch of rows bring with it."""
    texts = ["x", *(letter * (14 << 20) for letter in "abc")]
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(450_000, np.int32)), texts)
    return table(column, dictionary_pagesize_limit=128 << 20)


def of_pages(name: str, content: Callable[[], bytes]) -> Hostile:
    """A Parquet file that is read in one place only, whatever the command."""
    whole = of_text(name, "a.parquet", content, "unreadable")
    few = {command: whole.commands[command] for command in ("stats", "pipeline")}
    return dataclasses.replace(whole, commands=few)


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
    of_pages("parquet_categories", categories),
    of_pages("parquet_size_twice", size_twice),
    of_pages("parquet_two_headers", two_headers),
    of_pages("parquet_dictionary_twice", dictionary_twice),
    of_pages("parquet_hidden_delta", hidden_beginnings),
    of_pages("parquet_hidden_lengths", lambda: many_lengths(6, 1 << 31, 100)),
    of_pages("parquet_many_lengths", lambda: many_lengths(7, 400_000_000, 400_000_000)),
    of_pages("parquet_shared", shared_pages),
    of_pages("parquet_two_schemas", two_schemas),
    of_pages("parquet_hidden_schema", hidden_schema),
    # A list of 2^40 flags, and lists in lists.
    of_pages("parquet_flags", lambda: with_footer(b"\x19\xf1" + varint(1 << 40) + b"\x00")),
    of_pages("parquet_nested", lambda: with_footer(b"\x19" * 5000)),
    of_json("deep_json", lambda: b'{"example": ' + b"[" * 900_000),
    of_json("key_twice", lambda: keys(59_999)),
    of_questions("agieval", "sat-math.jsonl", "many_fields", keys),
    of_questions("ceval", "val/law_val.csv", "wide_header", lambda: b"a,b," * 100_000),
    of_questions(
        "mmlu", "test/virology_test.csv", "long_answer", lambda: b"q,a,b,c,d," + b"e" * 100_000
    ),
]
