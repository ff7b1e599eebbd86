"""The lenient reader: any cut gives the same documents and problems, in order, each once."""

import gzip
import itertools
import json
import random
import struct
import time
import tracemalloc
import zlib
from typing import Any

import pytest

pytest.importorskip("pyarrow")
import pyarrow as pa
import zstandard
from pyarrow import parquet

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.files import Slice, count_lines
from baichuan_jax.documents.reader import (
    MAX_LINE_BYTES,
    Document,
    Fields,
    Problem,
    read_documents,
    read_texts,
)
from baichuan_jax.documents.storage import open_binary

FIELDS = Fields(id="id", source="source")


def lines_of(rng: random.Random) -> bytes:
    """Documents, blank lines and no JSON, with and without carriage return or an end of file."""
    kinds = [
        lambda: (
            json.dumps({"text": "字" * rng.randint(0, 40)}, ensure_ascii=False).encode()
            + rng.choice([b"\n", b"\r\n"])
        ),
        lambda: b"\n",
        lambda: b"no json\n",
        lambda: b"\xff\xfe\n",
    ]
    return b"".join(rng.choice(kinds)() for _ in range(60)) + rng.choice(
        [b"", b'{"text": "the end"}']
    )


@pytest.mark.parametrize("seed", range(4))
def test_any_cut_of_a_file_gives_the_same_records(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "some.jsonl"
    path.write_bytes(lines_of(rng))
    whole = list(read_documents(Slice(str(path)), FIELDS))
    assert {getattr(entry, "reason", None) for entry in whole} == {None, "no_json", "broken_utf8"}
    size = path.stat().st_size
    borders = sorted({0, size, *rng.sample(range(1, size), 25)})
    parts, line = [], 1
    for start, stop in itertools.pairwise(borders):
        piece = Slice(str(path), start, stop, line)
        parts += read_documents(piece, FIELDS)
        line += count_lines(piece)
    assert parts == whole


def test_a_line_of_200_megabytes_is_not_held(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.truncate(200_000_000)  # a hole, read as zeros
        file.seek(0, 2)
        file.write(b'\n{"text": "after it"}\n')
    tracemalloc.start()
    try:
        found = list(read_documents(Slice(str(path)), FIELDS))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    problem, document = found
    assert isinstance(problem, Problem)
    assert (problem.line, problem.reason) == (1, "line_too_long")
    assert "200,000,001 bytes" in problem.detail
    assert document == Document(str(path), 2, None, "long", "after it")
    assert peak < 4 * FIELDS.max_line_bytes


def test_what_lies_before_a_cut_of_a_compressed_file_is_read(tmp_path):
    text = b"".join(
        json.dumps({"id": number, "text": "x" * 500}).encode() + b"\n" for number in range(2000)
    )
    whole = zstandard.ZstdCompressor().compress(text)
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(text[:250_000]) + whole[: len(whole) // 2])
    found = list(read_documents(Slice(str(path)), FIELDS))
    problem = found[-1]
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.line) == ("unreadable", len(found))
    # The frame that is cut short may end inside a line, which is then no JSON.
    assert all(isinstance(e, Document) or e.reason == "no_json" for e in found[:-1])
    assert [entry.id for entry in found[:-1] if isinstance(entry, Document)][:400] == [
        str(number) for number in range(400)
    ]


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "dictionary"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_pages_of_every_encoding_version_and_codec_are_read(tmp_path, encoding, version, codec):
    texts = [f"文 {n} {'x' * (n % 300)}" for n in range(3000)]
    values = [None if n % 7 == 0 else text for n, text in enumerate(texts)]
    options = {"use_dictionary": True}
    if encoding != "dictionary":
        options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": pa.array([*values, *[None] * 2000])}),
        path,
        data_page_version=version,
        compression=codec,
        data_page_size=1 << 14,
        write_page_checksum=True,
        **options,
    )
    found = entries(path)
    assert [entry.text for entry in found if isinstance(entry, Document)] == [
        text for text in values if text
    ]
    assert {entry.reason for entry in found if isinstance(entry, Problem)} == {"no_text"}


def test_documents_before_the_damage_of_a_gzip_file_are_read(tmp_path):
    letters = random.Random(1).choices("abcdefghijklmnopqrstuvwxyz ", k=600_000)
    texts = ["".join(letters[at : at + 200]) for at in range(0, len(letters), 200)]
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    cut = whole[: len(whole) // 2]
    in_it = zlib.decompressobj(wbits=31).decompress(cut).count(b"\n")
    for content, expected in ((whole + b"junk", len(texts)), (cut, in_it)):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        *found, problem = entries(tmp_path / "a.jsonl.gz")
        assert [entry.text for entry in found] == texts[:expected]
        assert (problem.reason, problem.line) == ("unreadable", expected + 1)


def entries(path, **fields) -> list[Any]:
    return list(read_documents(Slice(str(path)), Fields(**fields)))


def blocks_of_zstd(count: int) -> bytes:
    """A frame of blocks of 128 KiB, each of which is one letter that is repeated."""
    head = struct.pack("<IBB", 0xFD2FB528, 0, (17 - 10) << 3)
    block = lambda is_last: (is_last | 1 << 1 | (1 << 17) << 3).to_bytes(3, "little") + b"a"
    return head + block(0) * (count - 1) + block(1)


def test_a_read_of_zstd_takes_no_more_than_a_block(tmp_path):
    path = tmp_path / "a.zst"
    path.write_bytes(blocks_of_zstd(400))
    tracemalloc.start()
    try:
        with open_binary(str(path)) as file:
            size = sum(len(chunk) for chunk in iter(lambda: file.read(1 << 20), b""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 400 << 17
    assert peak < 4 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_holds_far_more_than_its_size_is_damaged(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(
        blocks_of_zstd(513) if suffix == ".zst" else gzip.compress(bytes(65 << 20), compresslevel=9)
    )
    (problem,) = entries(path, max_line_bytes=1 << 30)
    assert (problem.reason, problem.line) == ("unreadable", 1)
    assert "holds far more" in problem.detail


def test_repeated_text_is_read_up_to_64_megabytes(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    line = json.dumps({"text": "the same " * 1000}).encode() + b"\n"
    path.write_bytes(zstandard.ZstdCompressor().compress(line * 6000))
    found = entries(path)
    assert len(found) == 6000
    assert path.stat().st_size * 200 < 6000 * len(line)


def test_frames_of_zstd_of_every_form_are_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    rng = random.Random(0)
    text = b"".join(b'{"text": "%d"}\n' % rng.randrange(1 << 60) for _ in range(30_000))
    skipped = struct.pack("<II", 0x184D2A5F, 5) + b"12345"
    forms = [
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=True),
        zstandard.ZstdCompressor(write_content_size=False, level=19),
    ]
    out = b"".join(skipped + form.compress(text) + form.compress(b"") for form in forms)
    path.write_bytes(out)
    with open_binary(str(path)) as file:
        assert file.read() == text * 2
        assert file.read(1) == b""
    # Wherever it is cut, it is no whole file, but between two frames.
    for end in (3, 7, 12, 14, 18, 30, len(skipped) + 5000, len(out) - 1, len(out) - 13):
        path.write_bytes(out[:end])
        with pytest.raises(EOFError), open_binary(str(path)) as file:
            file.read()


def test_a_window_of_gigabytes_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + b"\x01\x00\x00")
    (problem,) = entries(path)
    assert "window has 2,147,483,648 bytes" in problem.detail


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "x": [' + "[]," * 800_000 + "0]}",
        '{"text": "a"' + ',"x":0' * 1_100_000 + "}",
        "[" * 100_000,
    ],
    ids=["lists", "keys", "depth"],
)
def test_a_line_that_takes_a_multiple_of_its_size_is_no_json(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{line}\n{{"text": "after it"}}\n')
    problem, document = entries(tmp_path / "a.jsonl")
    assert problem.reason == "no_json"
    assert ("values" in problem.detail) != ("deeply" in problem.detail)
    assert document.text == "after it"


def test_text_that_looks_like_json_is_text(tmp_path):
    text = '[{"a": [1, 2]}, "\\"],\n' * 200_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert entries(tmp_path / "a.jsonl")[0].text == text


def test_every_reader_has_the_limit_of_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n' % ("a" * MAX_LINE_BYTES))
    (tmp_path / "b.txt").write_text("a" * (MAX_LINE_BYTES + 1))
    for name in ("a.jsonl", "b.txt"):
        with pytest.raises(ConfigError, match=rf"{name}, line 1: line_too_long: .*; split it"):
            list(read_texts([Slice(str(tmp_path / name))], "text"))


def write_table(path, column, **options):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": column}), path, compression="zstd", **options)


@pytest.mark.parametrize(
    ("column", "options"),
    [
        ("dictionary", {"dictionary_pagesize_limit": 8 << 20, "store_schema": False}),
        ("dictionary", {"dictionary_pagesize_limit": 8 << 20}),
        ("text", {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}),
        ("text", {"use_dictionary": False}),
    ],
    ids=["repeated", "dictionary", "delta", "page"],
)
def test_a_parquet_file_that_holds_far_more_than_its_size_is_damaged(tmp_path, column, options):
    path = tmp_path / "a.parquet"
    values = ["a" * (4 << 20)]
    if column == "dictionary":
        write_table(path, pa.DictionaryArray.from_arrays(pa.array([0] * 256), values), **options)
    else:
        write_table(path, pa.array(values * 20), **options)
    before = pa.total_allocated_bytes()
    *_, problem = read_counting_memory(path, most=before + (150 << 20))
    assert problem.reason == "unreadable"
    assert "holds far more" in problem.detail


def read_counting_memory(path, most):
    found = []
    for entry in read_documents(Slice(str(path)), Fields()):
        assert pa.total_allocated_bytes() < most
        found.append(entry if isinstance(entry, Problem) else None)
    return found


def test_values_that_are_null_and_wide_are_not_made(tmp_path):
    # Arrow would make room for a thousand at once.
    write_table(tmp_path / "a.parquet", pa.array([None], pa.binary(1 << 20)), store_schema=False)
    (problem,) = entries(tmp_path / "a.parquet")
    assert problem.reason == "unreadable"
    assert "holds far more" in problem.detail


def test_rows_of_a_parquet_file_are_read_whatever_their_sizes(tmp_path):
    limit = 1024
    sizes = [0, 1, 1000, 1024, 1025, 5, 600, 600, 600, 3000, 2000, 1, 0, 1024, 1024]
    texts = [chr(97 + number) * size for number, size in enumerate(sizes)]
    kinds = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ]
    for kind in kinds:
        column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else texts
        write_table(tmp_path / "a.parquet", pa.array(column, kind), row_group_size=4)
        found = entries(tmp_path / "a.parquet", max_line_bytes=limit)
        assert [entry.line for entry in found] == list(range(1, len(sizes) + 1))
        for entry, text in zip(found, texts, strict=True):
            if len(text) > limit:
                assert entry.reason == "line_too_long"
                assert f"{len(text):,} bytes" in entry.detail
            else:
                assert entry.text == text


def test_a_column_of_categories_is_read_as_fast_as_one_of_texts(tmp_path):
    texts = [f"{number:05} " + "a" * 500 for number in range(20_000)]
    seconds = []
    for column in (pa.array(texts), pa.array(texts).dictionary_encode()):
        write_table(tmp_path / "a.parquet", column)
        start = time.perf_counter()
        assert [entry.text for entry in entries(tmp_path / "a.parquet")] == texts
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 3 * seconds[0] + 0.5


def test_types_of_arrow_give_the_values_of_parquet(tmp_path):
    times = pa.array([1, 2], pa.timestamp("us", "Europe/Berlin"))
    columns = {
        "text": pa.StructArray.from_arrays(
            [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c", None], pa.large_string())],
            ["inner", "other"],
        ),
        "id": pa.array([7, 8]).dictionary_encode(),
        "source": pa.array(["s", "t"], pa.string_view()),
        "time": times,
    }
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    found = entries(path, text="text.inner", id="id", source="source")
    assert found == [Document(path, 1, "7", "s", "a"), Document(path, 2, "8", "t", "b")]
    first, second = entries(path, text="text.other", id="id", source="source")
    assert first.text == "c"
    assert "'text.other' is null" in second.detail
    assert {entry.reason for entry in entries(path, text="time")} == {"no_text"}


def test_a_column_of_lists_is_named_and_not_read(tmp_path):
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), ["a" * (1 << 20)])
    column = pa.ListArray.from_arrays([0, 1000], values)
    write_table(tmp_path / "a.parquet", column, dictionary_pagesize_limit=2 << 20)
    (problem,) = read_counting_memory(tmp_path / "a.parquet", most=100 << 20)
    assert problem.detail == "field 'text' is a list, expected a string"
