"""Every document is read exactly once from every kind of file, and what cannot be read is named."""

import gzip
import json
import os
import re
import sys

import pytest
import zstandard

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents import reader as text
from baichuan_jax.documents.reader import Part, find_files, read_documents, split_files

DOCUMENTS = [
    "春眠不覺曉，\n處處聞啼鳥。",
    "",
    "It is a truth\tuniversally acknowledged",
    " 12  34 \n",
    "🙂\u2028é",
]
JSONL = "".join(
    json.dumps({"id": i, "text": document}, ensure_ascii=False) + "\n"
    for i, document in enumerate(DOCUMENTS)
)
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(path, text_field="text"):
    return list(read_documents(Part(str(path)), text_field))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
@pytest.mark.parametrize("last_newline", [True, False])
def test_jsonl_reads_the_same_however_it_is_compressed(tmp_path, kind, suffix, last_newline):
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(
        COMPRESS[suffix](JSONL.encode() if last_newline else JSONL.encode().rstrip(b"\n"))
    )
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_txt_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("first\r\n\n第二行  \nno newline at the end".encode()))
    assert read(path) == ["first\r\n\n第二行  \nno newline at the end"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_files_joined_after_compression_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](JSONL.encode()) * 3)
    assert read(path) == DOCUMENTS * 3


def test_empty_lines_are_skipped_and_empty_texts_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": ""}\n  \r\n{"text": "a"}\r\n\n{"text": ""}')
    assert read(path) == ["", "a", ""]


def test_the_text_field_is_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "content": "yes"}\n')
    assert read(path, "content") == ["yes"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "cut sho', "is no JSON: Invalid control character"),
        (b"plain words", "is no JSON"),
        (b'{"txt": "a", "id": 1}', r"has no text in field 'text' \(it has: \['id', 'txt'\]\)"),
        (b'{"text": 7}', "has no text in field 'text'"),
        (b'{"text": null}', "has no text in field 'text'"),
        (b'["text"]', r"has no text in field 'text' \(it has: list\)"),
        (b'{"text": "\xff"}', "is no UTF-8"),
        (b'{"text": "half a pair \\ud83d"}', "has no text in field 'text'.*surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bad_line_is_named_after_those_before_it_are_read(tmp_path, line, message, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        COMPRESS[suffix](b'{"text": "fine"}\n\n' + line + b'\n{"text": "not reached"}\n')
    )
    documents = read_documents(Part(str(path)), "text")
    assert next(documents) == "fine"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}, line 3 {message}"):
        next(documents)


def test_bad_utf8_in_a_txt_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("中文".encode("gb18030"))
    with pytest.raises(ConfigError, match=r"a\.txt is no UTF-8"):
        read(tmp_path / "a.txt")


def test_a_zst_file_without_its_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS[".zst"](b'{"text": "a"}'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        ConfigError,
        match=r"a\.jsonl\.zst cannot be read: zstandard is not installed; pip install zstandard",
    ):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_file_cut_short_is_named(tmp_path, kind, suffix, share):
    path = tmp_path / f"a{kind}{suffix}"
    lines = "".join(json.dumps({"text": os.urandom(50).hex()}) + "\n" for _ in range(3000))
    path.write_bytes(COMPRESS[suffix](lines.encode()))
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ConfigError, match=rf"a{kind}{suffix} cannot be read to its end"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_text(JSONL)
    with pytest.raises(ConfigError, match=rf"a\.jsonl{suffix} cannot be read"):
        read(path)


@pytest.mark.parametrize("last_newline", [True, False])
def test_parts_of_any_size_hold_every_document_once(tmp_path, monkeypatch, last_newline):
    path = tmp_path / "a.jsonl"
    content = (JSONL + "\n" + JSONL).encode()
    path.write_bytes(content if last_newline else content[:-1])
    line_ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in {
        *range(1, 40),
        *line_ends,
        *(end - 1 for end in line_ends),
        *(end + 1 for end in line_ends),
    }:
        monkeypatch.setattr(text, "PART_BYTES", size)
        parts = split_files([str(path)])
        assert len(parts) == -(-path.stat().st_size // size)
        assert [
            document for part in parts for document in read_documents(part, "text")
        ] == DOCUMENTS * 2, size


def test_a_bad_line_of_a_later_part_is_named_with_the_byte_it_is_counted_from(
    tmp_path, monkeypatch
):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 6 + "broken\n")
    monkeypatch.setattr(
        text, "PART_BYTES", 40
    )  # lines begin at bytes 0, 14, ..., 84: the third part has the last
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1 after byte 80 is no JSON"):
        [list(read_documents(part, "text")) for part in split_files([str(path)])]


def test_only_uncompressed_jsonl_is_split(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PART_BYTES", 10)
    for name in ("a.jsonl.gz", "b.txt", "c.jsonl.zst"):
        (tmp_path / name).write_bytes(os.urandom(50))
    (tmp_path / "d.jsonl").write_bytes(b"1234567890")
    assert split_files(find_files([str(tmp_path / "*")])) == [
        Part(path) for path in find_files([str(tmp_path / "*")])
    ]


def test_globs_find_files_sorted_and_each_once(tmp_path):
    for name in ("b.jsonl", "a.txt.gz", "c/d.json.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([f"{tmp_path}/**/*", f"{tmp_path}/b*"])
    assert found == [f"{tmp_path}/a.txt.gz", f"{tmp_path}/b.jsonl", f"{tmp_path}/c/d.json.zst"]


def test_a_glob_that_matches_no_file_and_an_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "folder.jsonl").mkdir()
    for pattern in (f"{tmp_path}/*.json", f"{tmp_path}/folder*"):
        with pytest.raises(ConfigError, match=f"'{re.escape(pattern)}' matches no file"):
            find_files([f"{tmp_path}/a*", pattern])
    for name in ("b.pdf", "b.csv.gz", "b.gz", "b"):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=rf"{name}: expected \.jsonl"):
            find_files([f"{tmp_path}/a*", str(tmp_path / name)])


def test_parquet_reads_whole_whatever_its_row_groups(tmp_path, monkeypatch):
    """Parts are runs of row groups; one after the other they are the file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i} " + "字" * (i * 37 % 500) for i in range(1000)]
    path = str(tmp_path / "a.parquet")
    parquet.write_table(
        pyarrow.table({"id": list(range(1000)), "text": texts}),
        path,
        row_group_size=77,
        compression="none",
    )
    monkeypatch.setattr("baichuan_jax.documents.reader.PART_BYTES", 100_000)
    parts = split_files([path])
    assert len(parts) > 3
    assert [text for part in parts for text in read_documents(part, "text")] == texts
    with pytest.raises(
        ConfigError, match=r"a\.parquet has no column 'body' \(it has: \['id', 'text'\]\)"
    ):
        list(read_documents(parts[0], "body"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cut\.parquet cannot be read"):
        split_files([str(tmp_path / "cut.parquet")])
