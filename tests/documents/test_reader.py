"""The lenient reader: any cut gives the same documents and problems, in order, each once."""

import itertools
import json
import random
import tracemalloc

import pytest

pytest.importorskip("pyarrow")
import zstandard

from baichuan_jax.documents.files import Slice, count_lines
from baichuan_jax.documents.reader import Document, Fields, Problem, read_documents

FIELDS = Fields(id="id", source="source", max_line_bytes=16 << 20)


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
