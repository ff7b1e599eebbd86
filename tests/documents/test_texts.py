"""The strict reader: every document once from every kind of file; the first problem is named."""

import errno
import glob
import gzip
import io
import json
import os
import re
import sys
import types

import pytest
import zstandard

from baichuan_jax.config.parsing import parse_json
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents import storage
from baichuan_jax.documents.files import (
    Slice,
    State,
    _expand,
    count_unread,
    find_files,
    find_inputs,
    require_unchanged,
    say_unread,
    split_files,
    states,
)
from baichuan_jax.documents.reader import (
    Document,
    Fields,
    Problem,
    document_id,
    read_documents,
    read_texts,
)
from baichuan_jax.resilience.causes import Cause, cause_of, describe

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
    return list(read_texts([Slice(str(path))], text_field))


def split(path, slice_bytes):
    return split_files({str(path): os.path.getsize(path)}, slice_bytes)


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


def test_a_field_that_is_not_asked_for_may_stand_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a", "id": 2, "meta": {"b": 1, "b": 2}}\n')
    assert read(tmp_path / "a.jsonl") == ["a"]


def test_the_text_field_is_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "content": "yes"}\n')
    assert read(path, "content") == ["yes"]


NESTED = [
    # A field inside another, at any depth.
    ({"data": {"text": "a"}}, "data.text", "a"),
    ({"data": {"inner": {"text": "a"}}}, "data.inner.text", "a"),
    # A name with a dot of its own comes first, also where its value is no text.
    ({"data.text": "own", "data": {"text": "inside"}}, "data.text", "own"),
    ({"data.text": None, "data": {"text": "inside"}}, "data.text", "'data.text' is null"),
    ({"a.b": {"c": "own"}, "a": {"b": {"c": "inside"}}}, "a.b.c", "own"),
    ({"a": {"b.c": "inside"}}, "a.b.c", "inside"),
    ({"data": None}, "data.text", "'data' is null, so there is no field 'data.text'"),
    ({"data": {"txt": "a"}}, "data.text", "there is no field 'data.text'"),
    ({"data": {"text": 1.5}}, "data.text", "'data.text' is a number, expected a string"),
    ({"data": [{"text": "a"}]}, "data.text", "'data' is a list, so"),
]


@pytest.mark.parametrize("record, field, expected", NESTED)
def test_a_field_inside_another_is_named_with_a_dot(tmp_path, record, field, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    if " " not in expected:
        assert read(tmp_path / "a.jsonl", field) == [expected]
        return
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 1: no_text: .*{expected}"):
        read(tmp_path / "a.jsonl", field)


def test_a_field_of_a_structs_column_is_named_with_a_dot(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [{"text": "a", "id": 7}, {"text": "b", "id": 8}, {"text": None, "id": 9}, None]
    parquet.write_table(pyarrow.table({"data": rows, "n": [1, 2, 3, 4]}), path)
    fields = Fields(text="data.text", id="data.id", source="data.text")
    found = list(read_documents(Slice(str(path)), fields))
    assert [entry.id for entry in found] == ["7", "8", "9", None]
    assert [entry.source for entry in found] == ["a", "b", "a", "a"]
    assert [getattr(entry, "text", None) for entry in found[:2]] == ["a", "b"]
    assert [entry.detail for entry in found[2:] if isinstance(entry, Problem)] == [
        "field 'data.text' is null, expected a string",
        "field 'data' is null, so there is no field 'data.text'",
    ]
    with pytest.raises(ConfigError, match="line 1: no_text: field 'n' is a number, expected"):
        read(path, "n")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.table(columns, names=["text", "text"]), path)
    with pytest.raises(ConfigError, match=r"line 1: unreadable: .*two columns have the same name"):
        read(path)


def test_a_row_that_python_cannot_hold_is_named_and_the_others_are_read(tmp_path):
    """A string that is no UTF-8, and a date beyond Python's years."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    strings = pyarrow.array([b"first", b"\xff\xfe", b"last"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, strings.buffers())
    dates = pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": broken, "date": dates}), path)
    found = list(read_documents(Slice(str(path)), Fields()))
    assert [getattr(entry, "text", None) for entry in found] == ["first", None, "last"]
    with pytest.raises(ConfigError, match=r"line 2: broken_utf8: 'utf-8' codec can't decode"):
        read(path)
    found = list(read_documents(Slice(str(path)), Fields(text="date")))
    assert [getattr(entry, "reason", None) for entry in found] == ["no_text"] * 3


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "cut sho', "no_json: Invalid control character"),
        (b"plain words", "no_json: Expecting value"),
        (b'{"text": "a", "id": 1, "text": "b"}', "no_json: field 'text' stands 2 times in one obj"),
        (
            b'{"txt": "a", "id": 1}',
            r"no_text: there is no field 'text' \(there are: \['id', 'txt'\]\); name the field",
        ),
        (
            b'{"text": 7}',
            "no_text: field 'text' is a number, expected a string; name the field .*"
            "data.text_field, or --text_field.*mend the file",
        ),
        (b'{"text": null}', "no_text: field 'text' is null, expected a string"),
        (b'{"text": false}', "no_text: field 'text' is true or false, expected a string"),
        (b'{"text": ["a"]}', "no_text: field 'text' is a list, expected a string"),
        (
            b'{"text": {"body": "a"}}',
            "no_text: field 'text' is an object, expected a string; "
            r"inside it are: \['text\.body'\]",
        ),
        (b'["text"]', r"no_json: list instead of an object; mend the file, or clean the corpus"),
        (b'{"text": "\xff"}', "broken_utf8: 'utf-8' codec can't decode byte 0xff"),
        (b'{"text": "half a pair \\ud83d"}', "broken_utf8: .*surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bad_line_is_named_after_those_before_it_are_read(tmp_path, line, message, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        COMPRESS[suffix](b'{"text": "fine"}\n\n' + line + b'\n{"text": "not reached"}\n')
    )
    documents = read_texts([Slice(str(path))], "text")
    assert next(documents) == "fine"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}, line 3: {message}"):
        next(documents)


NAMES = [
    b"\xff\xfe",
    b"a\nb",
    b" ",
    b"-x",
    b"[a]*?",
    "名\u202e🙂".encode(),
    b"'\"\\",
    b"%s{0}$HOME",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [b".txt", b".jsonl"])
def test_a_file_may_have_any_name(tmp_path, name, kind):
    """Its documents have a path, a source and an id that can be written as text."""
    path = os.path.join(os.fsencode(tmp_path), name + kind)
    with open(path, "wb") as file:
        file.write(b'{"text": "fine"}')
    (found,) = find_files([f"{tmp_path}/*"])
    assert os.fsencode(found) == path
    (document,) = read_documents(Slice(found), Fields())
    assert isinstance(document, Document)
    for text in (document.path, document.source, document_id(document.path, 1)):
        assert text.encode().decode() == text
    with open(path, "wb") as file:
        file.write(b"\xff")
    with pytest.raises(ConfigError, match=r", line 1: broken_utf8") as error:
        list(read_texts([Slice(found)], "text"))
    assert str(error.value).encode()


def test_bad_utf8_in_a_txt_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("中文".encode("gb18030"))
    with pytest.raises(ConfigError, match=r"a\.txt, line 1: broken_utf8"):
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
    with pytest.raises(ConfigError, match=rf"a{kind}{suffix}, line \d+: unreadable"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_text(JSONL)
    with pytest.raises(ConfigError, match=rf"a\.jsonl{suffix}, line 1: unreadable"):
        read(path)


@pytest.mark.parametrize("last_newline", [True, False])
def test_slices_of_any_size_hold_every_document_once(tmp_path, last_newline):
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
        slices = split(path, size)
        assert len(slices) == -(-path.stat().st_size // size)
        assert list(read_texts(slices, "text")) == DOCUMENTS * 2, size


@pytest.mark.parametrize("slice_bytes", [40, 42, 84])
def test_a_bad_line_of_a_later_slice_is_named_by_its_number_in_the_file(tmp_path, slice_bytes):
    path = tmp_path / "a.jsonl"
    # Lines begin at bytes 0, 14, ..., 84: a later slice has the last, with and without the end of a
    # line of the slice before.
    path.write_text('{"text": "a"}\n' * 6 + "broken\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 7: no_json"):
        list(read_texts(split(path, slice_bytes), "text"))


def test_only_uncompressed_jsonl_is_split(tmp_path):
    for name in ("a.jsonl.gz", "b.txt", "c.jsonl.zst"):
        (tmp_path / name).write_bytes(os.urandom(50))
    (tmp_path / "d.jsonl").write_bytes(b"1234567890")
    files = find_files([str(tmp_path / "*")])
    assert split_files({file: os.path.getsize(file) for file in files}, 10) == [
        Slice(file) for file in files
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
        with pytest.raises(ConfigError, match=rf"{name}: its kind is .*; expected \.jsonl"):
            find_files([f"{tmp_path}/a*", str(tmp_path / name)])


def test_a_folder_and_a_broken_link_in_place_of_a_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jsonl").touch()
    with pytest.raises(ConfigError, match=r"'more' matches no file .* such as 'more/\*\.jsonl'"):
        find_files(["more"])
    assert find_files(["more/*.jsonl"]) == ["more/b.jsonl"]
    (tmp_path / "c.jsonl").symlink_to("gone.jsonl")
    for pattern in ("*.jsonl", "c.jsonl"):
        with pytest.raises(ConfigError, match=r"c\.jsonl is a broken link"):
            find_files([pattern])


def test_a_file_of_two_names_is_not_read_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    assert find_files(["a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl")]) in (
        ["./a.jsonl"],
        [str(tmp_path / "a.jsonl")],
    )
    for link in (os.symlink, os.link):
        link("a.jsonl", "b.jsonl")
        with pytest.raises(
            ConfigError, match=r"a\.jsonl and b\.jsonl are the same file, by a link"
        ):
            find_files(["*.jsonl"])
        os.unlink("b.jsonl")


def test_files_that_a_glob_leaves_out_are_counted(tmp_path):
    names = ("a.jsonl", ".b.jsonl", ".c.png", ".hidden/d.txt", "e/.f.txt", "e/g/h.txt", "e/i.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def counted(*patterns):
        return tuple(count_unread([f"{tmp_path}/{pattern}" for pattern in patterns]).values())

    assert counted("*") == (1, 1)
    assert counted("*", "*/g/*") == (1, 0)
    assert counted("**/*.*") == (3, 0)
    assert counted("a.jsonl") == (0, 0)


def test_a_matched_folder_that_cannot_be_looked_into_is_counted(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b").mkdir()
    assert count_unread([f"{tmp_path}/*"])["files_in_folders"] == 0
    fail_at(monkeypatch, "scandir", errno.EACCES, tmp_path / "b")
    assert count_unread([f"{tmp_path}/*"])["files_in_folders"] == 1


def test_what_a_glob_leaves_out_is_said(tmp_path, capsys):
    for name in ("a.jsonl", ".b.jsonl", "c/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    say_unread([f"{tmp_path}/*", f"{tmp_path}/a*"])
    said = capsys.readouterr().err
    assert said == (
        f"{tmp_path}/* and 1 more: 1 hidden files not read, 1 files in matched folders not read; a "
        "glob that matches them has them read\n"
    )
    say_unread([f"{tmp_path}/*.jsonl", f"{tmp_path}/.*", f"{tmp_path}/c/*"])
    assert capsys.readouterr().err == ""


PATTERNS = ["*", "**", "**/*", "**/*.txt", "*/*", "*/b.txt", "a/**", "./**/b*", ".*", "**/.*"]
PATTERNS += ["a/", "*/", "a/../*", "[[]x]/*", "*/**/b.txt", "gone/*", "a/b.txt/*", "loop/*", "l*/*"]


@pytest.mark.parametrize("pattern", [*PATTERNS, "TOP/**/*", "TOP/*/b.txt", "", "**/**/b.txt"])
def test_globs_mean_what_pythons_mean(tmp_path, monkeypatch, pattern):
    for name in ("a/b.txt", "a/c/b.txt", ".h/b.txt", "a/.i/d.txt", "[x]/e", "b.txt", "n\nl/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in (("link", "a"), ("broken", "gone"), ("loop", "loop"), ("file", "b.txt")):
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    pattern = pattern.replace("TOP", glob.escape(str(tmp_path)))
    assert sorted(_expand(pattern)) == sorted(glob.glob(pattern, recursive=True))


def fail_at(monkeypatch, name, number, path):
    """Let a call of os fail at a path."""
    real = getattr(os, name)

    def fail(where, *arguments, **options):
        if os.path.normpath(where) == str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(where, *arguments, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("pattern", ["*/*.jsonl", "**/*.jsonl", "**", "*/x.jsonl", "b/*", "b/x*"])
def test_a_folder_that_cannot_be_looked_into_is_no_empty_one(
    tmp_path, monkeypatch, number, pattern
):
    for name in ("a/x.jsonl", "b/x.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    expected = [f"{tmp_path}/{name}/x.jsonl" for name in "ab"]
    assert find_files([f"{tmp_path}/{pattern}"]) == expected[pattern[0] == "b" :]
    # A folder's names, and, without the right to enter it, what they name.
    call, path = ("lstat", "b/x.jsonl") if "/x.jsonl" in pattern else ("scandir", "b")
    fail_at(monkeypatch, call, number, tmp_path / path)
    for find in (find_files, find_inputs):
        with pytest.raises(OSError) as caught:
            find([f"{tmp_path}/{pattern}"])
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / path))


def test_a_file_that_cannot_be_looked_at_is_no_broken_link(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").touch()
    fail_at(monkeypatch, "stat", errno.EACCES, tmp_path / "x.jsonl")
    with pytest.raises(PermissionError, match=r"x\.jsonl"):
        find_files([f"{tmp_path}/*"])


class Failing(io.RawIOBase):
    """A file whose disk fails at some place."""

    def __init__(self, content, place, error):
        self.file, self.place, self.error = io.BytesIO(content), place, error

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *arguments):
        return self.file.seek(*arguments)

    def tell(self):
        return self.file.tell()

    def readinto(self, buffer):
        if self.file.tell() + len(buffer) > self.place:
            raise self.error
        return self.file.readinto(buffer)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_disk_that_fails_is_no_damage_of_the_file(tmp_path, monkeypatch, kind, number):
    path = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps({"text": os.urandom(50).hex()}) + "\n" for _ in range(3000))
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"text": lines.split("\n")}), path, compression="none"
        )
    else:
        path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](lines.encode()))
    content, pieces = path.read_bytes(), split(path, 1 << 30)
    for place in (0, len(content) // 2):
        fail = lambda *_, at=place: io.BufferedReader(Failing(content, at, OSError(number, "it")))
        monkeypatch.setattr(storage, "open", fail, raising=False)
        # A Parquet file is opened where it is cut into slices too.
        look = lambda: list(read_texts(pieces, "text"))
        for act in (look, *([lambda: split(path, 1 << 30)] if kind == "parquet" else [])):
            with pytest.raises(OSError, match=re.escape(str(path))) as caught:
                act()
            assert caught.value.errno == number


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENFILE])
def test_a_file_that_cannot_be_opened_is_no_damaged_one(tmp_path, monkeypatch, number):
    (tmp_path / "a.jsonl").write_text(JSONL)

    def refuse(path, mode):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(storage, "open", refuse, raising=False)
    with pytest.raises(OSError, match=r"a\.jsonl") as caught:
        list(read_documents(Slice(str(tmp_path / "a.jsonl")), Fields()))
    assert caught.value.errno == number


def test_a_file_that_is_gone_is_named_with_what_to_do(tmp_path):
    for kind in ("jsonl", "txt", "jsonl.gz"):
        with pytest.raises(ConfigError, match=rf"gone\.{kind} was removed while it was read"):
            read(tmp_path / f"gone.{kind}")


def test_object_storage_that_fails_is_no_damage_of_the_file(monkeypatch):
    """Its errors have no number, as those of a damaged file."""
    error = OSError("When reading: AWS Error NETWORK_CONNECTION\nduring GetObject")
    opened = lambda name: Failing(JSONL.encode() * 9, 50, error)

    def listed(selector):
        raise error

    filesystem = types.SimpleNamespace(open_input_file=opened, get_file_info=listed)
    from_uri = lambda uri: (filesystem, uri.removeprefix("s3://"))
    fs = types.SimpleNamespace(
        FileSystem=types.SimpleNamespace(from_uri=from_uri), FileSelector=lambda *_, **__: None
    )
    for module in (storage, sys.modules[find_inputs.__module__]):
        monkeypatch.setattr(module, "pyarrow_for", lambda _: types.SimpleNamespace(fs=fs))
    for look in (lambda: read("s3://b/a.jsonl"), lambda: find_inputs(["s3://b/*.jsonl"])):
        with pytest.raises(OSError, match="NETWORK_CONNECTION during GetObject") as caught:
            look()
        assert cause_of(caught.value) == Cause.STORAGE
        assert "NETWORK_CONNECTION during GetObject" in describe(caught.value)


def test_parquet_reads_whole_whatever_its_row_groups(tmp_path):
    """Slices are runs of row groups; one after the other they are the file."""
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
    slices = split(path, 100_000)
    assert len(slices) > 3
    assert list(read_texts(slices, "text")) == texts
    missing = r"there is no field 'body' \(there are: \['id', 'text'\]\)"
    with pytest.raises(ConfigError, match=rf"a\.parquet, line 1: no_text: {missing}"):
        list(read_texts(slices, "body"))
    with pytest.raises(ConfigError, match=rf"a\.parquet, line {slices[2].first_line}: no_text"):
        list(read_texts(slices[2:], "body"))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cut\.parquet, line 1: unreadable"):
        list(read_texts(split(cut, 100_000), "text"))


@pytest.mark.parametrize("name", [b"text", b"meta"])
def test_a_parquet_column_whose_name_is_no_utf_8_is_damage(tmp_path, name):
    """Of the column that is read, and of another one: pyarrow decodes both as it opens the file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "meta": ["b"]}), path)
    path.write_bytes(path.read_bytes().replace(name, b"\xf4" + name[1:]))
    with pytest.raises(ConfigError, match=r"a\.parquet, line 1: unreadable"):
        list(read_texts(split(path, 100_000), "text"))


def test_files_that_are_not_as_they_were_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("one\n")
    before = states([str(file)])
    # Object storage has no times to compare.
    require_unchanged(before | {"s3://bucket/a.jsonl": State(3, None)})
    os.utime(file, (1, 1))
    with pytest.raises(ConfigError, match=r"a\.jsonl changed while it was read; start again when"):
        require_unchanged(before)
    file.unlink()
    for look in (lambda: require_unchanged(before), lambda: states([str(file)])):
        with pytest.raises(ConfigError, match=r"a\.jsonl was removed while it was read"):
            look()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_without_a_byte_is_damaged_and_not_empty(tmp_path, suffix):
    (tmp_path / f"a.jsonl.{suffix}").touch()
    with pytest.raises(ConfigError, match=r"1: unreadable: .*the compressed file has 0 bytes"):
        list(read_texts([Slice(str(tmp_path / f"a.jsonl.{suffix}"))], "text"))


def test_a_message_about_a_line_names_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n[\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: no_json: [\w ]+ at character 3;"):
        list(read_texts([Slice(str(tmp_path / "a.jsonl"))], "text"))
    with pytest.raises(ConfigError, match=r"^it, line 9 is no JSON: [\w ]+ at character 2$"):
        parse_json("[", "it, line 9")
    with pytest.raises(ConfigError, match=r"^it is no JSON: .*: line 2 column 1 "):
        parse_json("[\nx", "it")
