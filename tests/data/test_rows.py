"""Packed rows hold every token in order, whatever packs them and however often it is killed."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from launches import environment

from baichuan_jax.config.schema import Config, ConfigError, DataConfig, TokenizerConfig
from baichuan_jax.data import prepare as preparing
from baichuan_jax.data import rows as module
from baichuan_jax.data import shards as sharding
from baichuan_jax.data.prepare import prepare
from baichuan_jax.data.rows import Rows, main, pack, summary, unigram_entropy
from baichuan_jax.data.shards import Shard, dtype_of
from baichuan_jax.documents.files import Slice, find_files, states
from baichuan_jax.resilience import coordination
from baichuan_jax.tokenizer import Tokenizer, train_tokenizer

SAMPLE = Path(module.__file__).parent / "sample"


def sample(language, number):
    """The first lines of the sample as documents, every seventh one empty."""
    with gzip.open(SAMPLE / f"train-{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        text = "".join(json.loads(next(file))["text"] for _ in range(3))
    return ["" if i % 7 == 3 else line for i, line in enumerate(text.split("\n")[:number])]


def write(path, documents):
    path.write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8"
    )


@pytest.fixture(scope="module")
def documents():
    """By file name, in the order that globs find them."""
    return {"a.jsonl": sample("en", 150), "b.jsonl": sample("zh", 12), "c.jsonl": ["", "short"]}


@pytest.fixture(scope="module")
def tokenizer(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "sample.model"
    train_tokenizer([document for part in documents.values() for document in part], path, 512)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def corpus(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in documents.items():
        write(folder / name, part)
    return str(folder / "*.jsonl")


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory):
    return pack([corpus], tmp_path_factory.mktemp("packed") / "rows", tokenizer, 32, num_workers=1)


@pytest.fixture(scope="module")
def packed_apart(corpus, tokenizer, tmp_path_factory):
    """Rows as earlier versions packed them: every file alone, and fewer counts."""
    folder = tmp_path_factory.mktemp("apart") / "rows"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan_parts", plan_apart)
        rows = pack([corpus], folder, tokenizer, 32, num_workers=1)
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        for name in ("documents_dropped", "empty_files", "unread"):
            content.pop(name, None)
        path.write_text(json.dumps(content))
    return Rows(rows.path)


def plan_apart(files):
    return [[Slice(file, size=os.path.getsize(file))] for file in files]


@pytest.fixture
def copy(packed_apart, tmp_path):
    """Packed rows of several shards to damage."""
    return shutil.copytree(packed_apart.path, tmp_path / "copy")


@pytest.fixture
def config(tiny_config, corpus, tokenizer, tmp_path):
    data = DataConfig(train={corpus: 1.0}, cache_dir=str(tmp_path / "cache"), num_workers=1)
    return dataclasses.replace(
        tiny_config, data=data, tokenizer=TokenizerConfig(path=str(tokenizer.path))
    )


def packed_only(config, *folders, **data):
    """The configuration with folders of packed rows for its training text."""
    train = dict.fromkeys(map(str, folders), 1.0)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=train, **data))


def streams(documents, tokenizer):
    """Plain Python: the tokens of every file; documents end with </s>, empty ones are left out."""
    return [
        [t for document in part if document for t in [*tokenizer.encode(document), 2]]
        for part in documents.values()
    ]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder):
    return {name: data for name, data in content(folder).items() if name.endswith(".array_record")}


def refuse_to_work(*_, **__):
    raise AssertionError("was to be taken from the cache")


def cut(stream, length):
    """The rows of a stream of tokens."""
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def test_rows_are_the_documents_joined_and_cut(packed, packed_apart, documents, tokenizer):
    """Over the borders of files, and in rows of earlier versions file by file."""
    found = streams(documents, tokenizer)
    for rows, parts in ((packed, [list(itertools.chain(*found))]), (packed_apart, found)):
        expected = [row for part in parts for row in cut(part, 33)]
        assert len(rows) == len(expected) > 100
        np.testing.assert_array_equal([rows[i] for i in range(len(rows))], expected)
        assert rows[0].dtype == np.int32
        assert rows.manifest["tokens_dropped"] == sum(len(part) % 33 for part in parts)
    assert len(packed) > len(packed_apart)


@pytest.mark.parametrize("seed", range(8))
def test_everything_is_in_a_row_or_counted(tokenizer, tmp_path, monkeypatch, seed):
    """Files, documents and tokens: what went in is what came out and what is counted."""
    draw = np.random.default_rng(seed)
    texts = sample("en", 40) + sample("zh", 10)
    documents, empty_files = [], 0
    for number in range(12):
        part = [texts[i] for i in draw.integers(0, len(texts), draw.integers(0, 5))]
        suffix = draw.choice(["txt", "jsonl"])
        part = part[:1] if suffix == "txt" else part
        file = tmp_path / f"{number:02}.{suffix}"
        if suffix == "txt":
            file.write_text("".join(part), encoding="utf-8")
            part = [document for document in part if document]
        else:
            write(file, part)
        empty_files += not part
        documents += part
    (tmp_path / ".hidden.txt").write_text("not read")
    # Some shards of several files, some of a part of one, and some without a row.
    monkeypatch.setattr(sharding, "SHARD_BYTES", int(draw.integers(300, 3000)))
    rows = pack([f"{tmp_path}/*.*"], tmp_path / "rows", tokenizer, 150, num_workers=1)
    m = rows.manifest
    tokens = [token for document in documents if document for token in tokenizer.encode(document)]
    ends = len([document for document in documents if document])
    assert (m["documents"], m["empty_documents"]) == (len(documents), documents.count(""))
    assert (m["empty_files"], m["unread"]["hidden_files"]) == (empty_files, 1)
    assert f"{empty_files} empty files" in summary(rows) or not empty_files
    assert "1 hidden files not read" in summary(rows)
    assert m["tokens"] == len(tokens) + ends == m["rows"] * 151 + m["tokens_dropped"]
    assert m["tokens_dropped"] < 151 * len(m["shards"])
    # Shard by shard: those that end in its rows, and one that goes on into its rest.
    in_rows = start = 0
    for shard in m["shards"]:
        stream = [t for i in range(start, start + shard["rows"]) for t in rows[i].tolist()]
        start += shard["rows"]
        in_rows += stream.count(2) + (bool(stream) and stream[-1] != 2)
    assert m["documents"] == in_rows + m["documents_dropped"] + m["empty_documents"]


def test_names_that_are_no_text_are_in_the_manifest(tokenizer, tmp_path):
    name = os.fsdecode(b"\xff.txt")
    (tmp_path / name).write_text("many words " * 99)
    rows = pack([f"{tmp_path}/{name}"], tmp_path / "rows", tokenizer, 16, num_workers=1)
    assert rows.manifest["inputs"] == [f"{tmp_path}/\\xff.txt"]
    assert rows.manifest["shards"][0]["from"] == f"{tmp_path}/\\xff.txt"
    assert pack([f"{tmp_path}/{name}"], rows.path, tokenizer, 16, num_workers=1).path == rows.path


def test_short_documents_in_files_of_their_own_are_packed(tokenizer, tmp_path, capsys):
    """Most of a corpus's files may be shorter than a row."""
    texts = [f"document {i}: {'word ' * (i % 7)}" for i in range(300)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03}.txt").write_text(text)
    write(tmp_path / "all.jsonl", texts)
    arguments = ["--tokenizer", str(tokenizer.path), "--context_length", "128"]
    for name, glob in (("files", "*.txt"), ("lines", "all.jsonl")):
        output = str(tmp_path / name)
        assert main(["pack", "--input", f"{tmp_path}/{glob}", "--output", output, *arguments]) == 0
    files, lines = (Rows(tmp_path / name) for name in ("files", "lines"))
    assert files.manifest["tokens_dropped"] == lines.manifest["tokens_dropped"] < 129
    assert shards(files.path) == shards(lines.path)
    assert len(shards(files.path)) == 1
    assert "leaves out" not in capsys.readouterr().out


def test_rows_that_leave_out_much_say_so(tokenizer, tmp_path, capsys, monkeypatch):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("a few words " * (60 if i == 3 else 1))
    glob = f"{tmp_path}/*.txt"
    monkeypatch.setattr(module, "plan_parts", plan_apart)
    output = str(tmp_path / "rows")
    arguments = ["--tokenizer", str(tokenizer.path), "--context_length", "64"]
    assert main(["pack", "--input", glob, "--output", output, *arguments]) == 0
    rows = Rows(output)
    m, shown = rows.manifest, " ".join(capsys.readouterr().out.split())
    share = m["tokens_dropped"] / m["tokens"]
    assert m["documents_dropped"] == 19
    assert f"rows leaves out {share:.1%} of its text: {m['tokens_dropped']:,} of" in shown
    assert "19 documents with all their tokens; give more text" in shown
    assert "(0 empty, 19 in no row)" in shown


def test_a_damaged_count_of_tokens_is_named_in_one_short_line(copy):
    """Also where numpy quotes a megabyte of it."""
    file = copy / "counts.npy"
    for damaged in (
        file.read_bytes()[:100],
        b"\x93NUMPY\x01\x00\x00\x40{" + b"\0" * (1 << 20),
        b"",
    ):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"counts\.npy cannot be read: .*pack again") as error:
            _ = Rows(copy).counts
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400 + 2 * len(str(file))


def test_documents_tokens_and_rows_are_counted(packed, documents, tokenizer):
    everything = [document for part in documents.values() for document in part]
    tokens = [token for stream in streams(documents, tokenizer) for token in stream]
    found = {
        name: packed.manifest[name]
        for name in ("documents", "empty_documents", "text_bytes", "tokens", "eos_id")
    }
    assert found == {
        "documents": len(everything),
        "empty_documents": everything.count(""),
        "text_bytes": len("".join(everything).encode()),
        "tokens": len(tokens),
        "eos_id": 2,
    }
    assert packed.counts.tolist() == [tokens.count(i) for i in range(512)]
    assert (
        f"{len(everything):,} documents ({everything.count('')} empty, 1 in no row), "
        f"{len(tokens):,} tokens" in summary(packed)
    )


def test_unigram_entropy_is_that_of_the_weighted_mixture(packed, corpus, tokenizer, tmp_path):
    other = pack([corpus.replace("*", "b")], tmp_path / "other", tokenizer, 32, num_workers=1)
    a, b = (rows.counts / rows.counts.sum() for rows in (packed, other))
    for first, second in ((1.0, 1.0), (3.0, 1.0)):
        share = first / (first + second)
        mixed = [share * p + (1 - share) * q for p, q in zip(a, b, strict=True)]
        found = unigram_entropy([(packed, first), (other, second)])
        assert found == pytest.approx(-sum(p * np.log(p) for p in mixed if p), rel=1e-9)
    assert unigram_entropy([(packed, 0.1)]) == pytest.approx(
        -sum(p * np.log(p) for p in a if p), rel=1e-9
    )


def test_any_number_of_processes_writes_the_same_folder(
    corpus, documents, tokenizer, tmp_path, monkeypatch
):
    """A large file becomes several shards; its last slice and the files that follow share one."""
    monkeypatch.setattr(sharding, "SHARD_BYTES", os.path.getsize(corpus.replace("*", "a")) // 2)
    one = pack([corpus], tmp_path / "one", tokenizer, 32, num_workers=1)
    two = pack([corpus], tmp_path / "two", tokenizer, 32, num_workers=2)
    assert content(one.path) == content(two.path)
    assert [shard.get("slices", 1) for shard in one.manifest["shards"]][:2] == [1, 1]
    assert one.manifest["shards"][-1]["slices"] >= 2
    assert one.manifest["tokens"] == sum(map(len, streams(documents, tokenizer)))


def test_a_large_file_becomes_several_shards_that_hold_every_document(
    packed, corpus, documents, tokenizer, tmp_path, monkeypatch
):
    size = os.path.getsize(corpus.replace("*", "a"))
    monkeypatch.setattr(sharding, "SHARD_BYTES", size // 3)
    rows = pack([corpus.replace("*", "a")], tmp_path / "rows", tokenizer, 8, num_workers=2)
    assert len(rows.manifest["shards"]) in (3, 4)
    assert rows.manifest["documents"] == len(documents["a.jsonl"])
    assert (
        rows.counts.tolist()
        == np.bincount(streams(documents, tokenizer)[0], minlength=512).tolist()
    )


def test_token_ids_of_a_large_vocabulary_are_not_cut(packed):
    assert packed.manifest["dtype"] == "uint16"
    assert [dtype_of(size).name for size in (1 << 16, (1 << 16) + 1)] == ["uint16", "uint32"]


def start_pack(corpus, output, tokenizer):
    words = ["pack", "--input", corpus, "--output", str(output), "--tokenizer", str(tokenizer.path)]
    # A shard for each of the test's files, which are small.
    program = (
        "import sys; from baichuan_jax.data import rows, shards; shards.SHARD_BYTES = 40_000; "
    )
    command = [
        sys.executable,
        "-c",
        program + "rows.main(sys.argv[1:])",
        *words,
        "--context_length",
        "32",
        "--num_workers",
        "2",
    ]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_until(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_pack_goes_on_where_it_was_and_gives_the_same_bytes(
    documents, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(sharding, "SHARD_BYTES", 40_000)
    (tmp_path / "text").mkdir()
    for i in range(12):
        write(
            tmp_path / "text" / f"{i:02}.jsonl",
            [document + str(i) for document in documents["a.jsonl"]] * 5,
        )
    corpus, killed = str(tmp_path / "text" / "*"), tmp_path / "killed"
    process = start_pack(corpus, killed, tokenizer)
    wait_until(lambda: list(killed.glob("shard-*.json")) and list(killed.glob("*.tmp")))
    workers = children(process.pid)
    process.kill()
    process.wait()
    try:
        wait_until(
            lambda: not any(map(is_running, workers)), seconds=20
        )  # else they would write beside the next pack
    finally:
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)
    for stream in (process.stdout, process.stderr):
        stream.close()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.json")}
    assert 0 < len(finished) < 12
    assert not (killed / "manifest.json").exists()
    with pytest.raises(ConfigError, match=r"has no manifest\.json"):
        Rows(killed)
    (killed / "shard-00011.1.tmp").write_bytes(b"half a shard")

    process = start_pack(corpus, killed, tokenizer)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"{killed}: {12 * 5 * len(documents['a.jsonl']):,} documents (0 empty" in output
    undisturbed = pack([corpus], tmp_path / "undisturbed", tokenizer, 32, num_workers=2)
    assert content(killed) == content(undisturbed.path)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    Rows(killed).verify()


def test_a_finished_shard_of_other_settings_is_made_anew(
    copy, corpus, documents, tokenizer, tmp_path
):
    train_tokenizer(documents["a.jsonl"], tmp_path / "other.model", 400)
    for other, length in ((tokenizer, 16), (Tokenizer(tmp_path / "other.model"), 32)):
        (copy / "manifest.json").unlink()  # as if it had been killed just before the end
        again = pack([corpus], copy, other, length, num_workers=1)
        assert (again.context_length, again.manifest["tokenizer"]) == (length, other.hash)
        wanted = cut(list(itertools.chain(*streams(documents, other))), length + 1)
        np.testing.assert_array_equal([again[i] for i in range(len(again))], wanted)
        # Of the shards of before, which were more, none is left.
        assert len(list(copy.glob("shard-*.*"))) == 2


def test_text_that_changes_and_keeps_its_size_is_packed_anew(
    corpus, documents, tokenizer, tmp_path
):
    path = tmp_path / "a.jsonl"
    write(path, documents["a.jsonl"])
    pack([str(path)], tmp_path / "rows", tokenizer, 32, num_workers=1)
    size, changed = path.stat().st_size, [document.swapcase() for document in documents["a.jsonl"]]
    write(path, changed)
    assert path.stat().st_size == size
    with pytest.raises(ConfigError, match="rows holds rows of other text or settings"):
        pack([str(path)], tmp_path / "rows", tokenizer, 32, num_workers=1)
    (tmp_path / "rows" / "manifest.json").unlink()
    rows = pack([str(path)], tmp_path / "rows", tokenizer, 32, num_workers=1)
    assert rows[0].tolist() == streams({"a": changed}, tokenizer)[0][:33]


def test_rows_are_known_by_their_content_wherever_they_lie(packed, corpus, tokenizer, tmp_path):
    copy = shutil.copytree(packed.path, tmp_path / "copy")
    shutil.copytree(Path(corpus).parent, tmp_path / "text")
    again = pack([f"{tmp_path}/text/*"], tmp_path / "again", tokenizer, 32, num_workers=1)
    assert packed.identity == Rows(copy).identity == again.identity
    other = pack([f"{tmp_path}/text/a*"], tmp_path / "other", tokenizer, 32, num_workers=1)
    longer = pack([f"{tmp_path}/text/*"], tmp_path / "longer", tokenizer, 64, num_workers=1)
    assert len({packed.identity, other.identity, longer.identity}) == 3


def test_only_the_shard_of_changed_text_is_made_anew(
    corpus, documents, tokenizer, packed, tmp_path, monkeypatch
):
    # a.jsonl in a shard, and the two smaller files in another.
    monkeypatch.setattr(sharding, "SHARD_BYTES", os.path.getsize(corpus.replace("*", "a")))
    shutil.copytree(Path(corpus).parent, tmp_path / "text")
    pack([f"{tmp_path}/text/*"], tmp_path / "rows", tokenizer, 32, num_workers=1)
    (tmp_path / "rows" / "manifest.json").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    changed = documents | {"b.jsonl": [*documents["b.jsonl"], "one more " * 20]}
    write(tmp_path / "text" / "b.jsonl", changed["b.jsonl"])
    rows = pack([f"{tmp_path}/text/*"], tmp_path / "rows", tokenizer, 32, num_workers=1)
    assert (
        rows.manifest["tokens"]
        == sum(map(len, streams(changed, tokenizer)))
        > packed.manifest["tokens"]
    )
    kept = {name for name, made in times.items() if (rows.path / name).stat().st_mtime_ns == made}
    assert kept == {"shard-00000.array_record", "shard-00000.json"}


@pytest.mark.parametrize("length", [0, -1])
def test_rows_without_tokens_are_refused(corpus, tokenizer, tmp_path, length):
    with pytest.raises(ConfigError, match=f"context_length={length} must be greater than 0"):
        pack([corpus], tmp_path / "rows", tokenizer, length, num_workers=1)
    assert not (tmp_path / "rows").exists()


def test_packing_other_text_or_settings_into_a_finished_folder_is_refused(
    copy, corpus, tokenizer, tmp_path
):
    before = content(copy)
    assert len(pack([corpus], copy, tokenizer, 32, num_workers=1)) == len(Rows(copy))
    for patterns, length in (
        ([corpus], 16),
        ([corpus.replace("*", "a")], 32),
        ([corpus.replace("*", "b")] * 3, 32),
    ):
        with pytest.raises(ConfigError, match="copy holds rows of other text or settings"):
            pack(patterns, copy, tokenizer, length, num_workers=1)
    assert content(copy) == before


def test_an_error_of_a_worker_is_raised_and_the_next_pack_goes_on(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", ["enough words to fill a row of eight tokens"])
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ConfigError, match=r"b\.jsonl, line 2: no_json"):
        pack([f"{tmp_path}/*.jsonl"], tmp_path / "rows", tokenizer, 8, num_workers=2)
    write(tmp_path / "b.jsonl", ["mended"])
    assert (
        pack([f"{tmp_path}/*.jsonl"], tmp_path / "rows", tokenizer, 8, num_workers=2).manifest[
            "documents"
        ]
        == 2
    )
    assert not list((tmp_path / "rows").glob("*.tmp"))


def test_text_without_a_whole_row_is_refused(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", ["few", "", "words"])
    wanted = r"holds no row: a row is 101 tokens, and its text is \d+ \(3 documents\) in 1 shard;"
    with pytest.raises(ConfigError, match=wanted):
        pack([f"{tmp_path}/a.jsonl"], tmp_path / "rows", tokenizer, 100, num_workers=1)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match="its text is empty; name files with text"):
        pack([f"{tmp_path}/empty.jsonl"], tmp_path / "rows", tokenizer, 100, num_workers=1)
    # What the message advises, in the same folder.
    assert len(pack([f"{tmp_path}/a.jsonl"], tmp_path / "rows", tokenizer, 2, num_workers=1)) > 0
    write(tmp_path / "a.jsonl", ["many words " * 99])
    with pytest.raises(ConfigError, match="rows holds rows of other text or settings"):
        pack([f"{tmp_path}/a.jsonl"], tmp_path / "rows", tokenizer, 100, num_workers=1)


def test_a_truncated_or_missing_shard_is_named_at_open(copy):
    shard = copy / "shard-00001.array_record"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(
        ConfigError,
        match=rf"shard-00001\.array_record has {size - 1} bytes and the manifest says {size}",
    ):
        Rows(copy)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"shard-00001\.array_record is missing"):
        Rows(copy)


def test_a_flipped_byte_is_found_by_verify(copy, capsys):
    Rows(copy).verify()
    shard = copy / "shard-00001.array_record"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"shard-00001\.array_record has SHA-256"):
        Rows(copy).verify()
    with pytest.raises(ConfigError, match=r"shard-00001\.array_record has SHA-256"):
        main(["verify", str(copy)])


def test_a_method_of_a_reader_is_no_reason(copy, monkeypatch):
    class Source:
        def __getitem__(self, index):
            try:
                raise ValueError("chunk header hash mismatch")
            except ValueError as error:
                message = "<bound method pybind11_detail_function_record> returned a result with"
                raise SystemError(message) from error

    rows = Rows(copy)
    monkeypatch.setattr(rows, "_source", Source())
    with pytest.raises(ConfigError, match=r"array_record: chunk header hash mismatch; find all"):
        rows[0]


def test_a_shard_that_is_cut_short_while_open_is_named(copy):
    rows = Rows(copy)
    last = len(rows) - 1
    expected = rows[last].tolist()
    os.truncate(copy / rows.manifest["shards"][0]["file"], 1000)
    with pytest.raises(
        ConfigError,
        match=r"row 20 of .*copy cannot be read from .*shard-00000\.array_record: .*verify .*copy",
    ):
        [rows[i] for i in (20, last)]
    assert rows[last].tolist() == expected  # of another shard
    for index in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {index} of {len(rows)}"):
            rows[index]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_disk_that_fails_is_no_damaged_shard(copy, monkeypatch, number):
    """As ArrayRecord says it: a restart may read the same rows."""
    rows = Rows(copy)

    class Source:
        def __getitem__(self, index):
            raise RuntimeError(f"INTERNAL: Failed to read {copy}/x; {os.strerror(number)}")

    monkeypatch.setattr(rows, "_source", Source())
    with pytest.raises(OSError) as caught:
        rows[20]
    assert caught.value.errno == number
    assert caught.value.filename == f"{copy}/shard-00000.array_record"

    def fail(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(OSError, match=r"counts\.npy"):
        _ = rows.counts


@pytest.mark.parametrize("content", ["", '{"version": 1', "[]", "{}"])
def test_a_damaged_manifest_is_named(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"manifest\.json is no manifest: .*; delete the folder and pack again"
    ):
        Rows(copy)


def test_rows_of_another_version_are_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(ConfigError, match="rows of version 0 and this is 1"):
        Rows(copy)


def test_rows_of_earlier_versions_are_found_and_said_to_leave_out_text(
    config, packed_apart, corpus, tokenizer, tmp_path, monkeypatch
):
    """In a folder of one's own, and in the cache under the name that they had."""
    before = content(packed_apart.path)
    assert len(pack([corpus], packed_apart.path, tokenizer, 32, num_workers=1)) == len(packed_apart)
    assert content(packed_apart.path) == before
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "plan_parts", plan_apart)
        name = preparing._rows_folder(config, "rows", states(find_files([corpus])), tokenizer)
    assert preparing._rows_folder(config, "rows", states(find_files([corpus])), tokenizer) != name
    shutil.copytree(packed_apart.path, name)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "pack", refuse_to_work)
        assert prepare(config).train[0][0].path == name
    assert packed_apart.warning is None  # less than 1 %
    manifest = json.loads((name / "manifest.json").read_text())
    manifest["tokens_dropped"] = manifest["tokens"] // 2
    (name / "manifest.json").write_text(json.dumps(manifest))
    assert "leaves out 50.0% of its text" in (Rows(name).warning or "")
    assert "for a new run delete the folder: files are joined now" in (Rows(name).warning or "")


def test_the_name_of_rows_of_large_files_did_not_change(config, corpus, tokenizer):
    """What earlier versions packed is found again where a shard is a slice of one file."""
    file = corpus.replace("*", "a")
    state = os.stat(file)
    settings = [tokenizer.hash, 32, "text"]
    described = json.dumps([1, [[file, state.st_size, state.st_mtime_ns]], settings])
    name = f"rows-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    assert preparing._rows_folder(config, "rows", states([file]), tokenizer).name == name
    shard = Shard([Slice(file)], Path("folder"), 0, tokenizer.path, tokenizer.hash, 32, "text")
    assert shard.key() == {
        "path": file,
        "start": 0,
        "stop": None,
        "size": state.st_size,
        "modified_ns": state.st_mtime_ns,
        "tokenizer": tokenizer.hash,
        "context_length": 32,
        "text_field": "text",
    }


def test_validation_text_that_is_trained_on_is_found(config, packed, corpus, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(corpus.replace("*", "b"))

    def both_of(data):
        changed = dataclasses.replace(config, data=data)
        return preparing.validation_in_training(changed, preparing._look(changed))

    for validation, number in (
        ({}, 0),
        ({str(link): 1.0}, 1),
        ({corpus: 1.0}, 3),
        ({str(packed.path): 1.0}, 0),
    ):
        data = dataclasses.replace(config.data, validation=validation)
        assert len(both_of(data)) == number
    for copied in (os.link, shutil.copyfile):
        name = f"by {copied.__name__}.jsonl"
        copied(corpus.replace("*", "b"), tmp_path / name)
        (tmp_path / "other.jsonl").write_bytes(b"x" * os.path.getsize(corpus.replace("*", "b")))
        validation = {f"{tmp_path}/{name}": 1.0, f"{tmp_path}/other.jsonl": 1.0}
        (both,) = both_of(dataclasses.replace(config.data, validation=validation))
        assert both.endswith(name)
    shutil.copytree(packed.path, tmp_path / "copy")
    for validation in (f"{packed.path}/", str(tmp_path / "copy")):
        data = DataConfig(train={str(packed.path): 1.0}, validation={validation: 1.0})
        assert both_of(data)


def test_text_of_two_training_corpora_is_found(config, packed, corpus, tmp_path):
    os.link(corpus.replace("*", "b"), tmp_path / "link.jsonl")

    def shared_of(*train):
        changed = dataclasses.replace(config, data=DataConfig(train=dict.fromkeys(train, 1.0)))
        return preparing.shared_in_training(changed, preparing._look(changed))

    assert shared_of(corpus) == []
    assert shared_of(corpus.replace("*", "a"), corpus.replace("*", "[ab]")) == [
        corpus.replace("*", "a")
    ]
    assert shared_of(corpus, str(tmp_path / "link.jsonl")) == [str(tmp_path / "link.jsonl")]
    assert len(shared_of(str(packed.path), f"{packed.path}/")) == 1


def test_the_commands_show_and_verify(packed, capsys):
    assert main(["show", str(packed.path)]) == 0
    assert json.loads(capsys.readouterr().out) == packed.manifest
    assert main(["verify", str(packed.path)]) == 0
    assert capsys.readouterr().out == f"{packed.path}: 1 shards are as the manifest says\n"
    with pytest.raises(ConfigError, match=r"nowhere has no manifest\.json"):
        main(["show", "nowhere"])


def test_rows_are_read_alike_from_several_threads(packed):
    expected = [packed[i].tolist() for i in range(len(packed))]
    results = {}

    def read(seed):
        order = np.random.default_rng(seed).permutation(len(packed))
        results[seed] = all(packed[int(i)].tolist() == expected[i] for i in order)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(8), True)


def test_prepare_packs_text_once_and_takes_it_from_the_cache_after(
    config, packed, corpus, monkeypatch
):
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, validation={corpus.replace("*", "b"): 1.0})
    )
    said = []
    prepared = prepare(config, say=said.append)
    (rows, weight), (validation, _) = prepared.train[0], prepared.validation[0]
    assert (weight, len(prepared.train), len(prepared.validation)) == (1.0, 1, 1)
    assert shards(rows.path) == shards(packed.path)
    assert validation.manifest["tokens"] < rows.manifest["tokens"]
    assert [line.split(":")[0] for line in said] == [
        f"packed {corpus}",
        f"packed {corpus.replace('*', 'b')}",
    ]
    monkeypatch.setattr(preparing, "pack", refuse_to_work)
    monkeypatch.setattr(preparing, "train_tokenizer", refuse_to_work)
    assert prepare(config, say=refuse_to_work).train[0][0].path == rows.path


def test_prepare_trains_a_tokenizer_once_and_again_for_other_text(
    config, corpus, documents, tmp_path, monkeypatch
):
    shutil.copytree(Path(corpus).parent, tmp_path / "text")
    text = str(tmp_path / "text" / "*.jsonl")
    config = packed_only(
        dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=512)), text
    )
    said = []
    first = prepare(config, say=said.append)
    assert first.tokenizer.vocab_size == 512
    assert said[0].startswith("trained a tokenizer of 512 pieces on ")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "train_tokenizer", refuse_to_work)
        assert prepare(config).tokenizer.hash == first.tokenizer.hash
    write(tmp_path / "text" / "c.jsonl", ["", "other"])  # of the same size
    second = prepare(config)
    assert second.tokenizer.path != first.tokenizer.path
    assert second.train[0][0].path != first.train[0][0].path


@pytest.mark.parametrize("length, verb", [(64, "exceeds"), (16, "is below")])
def test_packed_rows_of_another_length_are_refused(config, packed, length, verb):
    config = packed_only(config, packed.path)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, context_length=length)
    )
    with pytest.raises(
        ConfigError, match=f"context_length={length} {verb} the shards' 32 in .*rows; re-pack with"
    ):
        prepare(config)


def test_packed_rows_of_another_tokenizer_are_refused(
    config, packed, documents, tokenizer, tmp_path
):
    other = tmp_path / "other.model"
    train_tokenizer(documents["a.jsonl"], other, 512)
    config = dataclasses.replace(
        packed_only(config, packed.path), tokenizer=TokenizerConfig(path=str(other))
    )
    wanted = (
        f"packed with tokenizer {tokenizer.hash[:12]} and {other} is {Tokenizer(other).hash[:12]}"
    )
    with pytest.raises(ConfigError, match=wanted):
        prepare(config)


def test_packed_rows_alone_need_the_path_of_their_tokenizer(config, packed, tokenizer):
    config = packed_only(config, packed.path)
    assert prepare(config, say=refuse_to_work).train[0][0].path == packed.path
    with pytest.raises(ConfigError, match=r"packed rows only, so tokenizer\.path must name"):
        prepare(dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=512)))


def test_a_model_with_fewer_rows_than_the_tokenizer_has_pieces_is_refused(config, tokenizer):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=504))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=504 is smaller than the 512 pieces"):
        prepare(config)


def test_a_glob_of_validation_text_is_refused_before_anything_is_made(config, tmp_path):
    data = dataclasses.replace(config.data, validation={f"{tmp_path}/none/*.jsonl": 1.0})
    config = dataclasses.replace(config, data=data, tokenizer=TokenizerConfig(vocab_size=512))
    with pytest.raises(ConfigError, match=r"none/\*\.jsonl' matches no file"):
        prepare(config, say=refuse_to_work)
    assert not (tmp_path / "cache").exists()


def test_a_run_without_training_text_is_refused(config):
    with pytest.raises(ConfigError, match=r"data\.train names no corpus"):
        prepare(packed_only(config))


PREPARE = """
import sys
import time
from pathlib import Path
from baichuan_jax.config.schema import Config, DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from baichuan_jax.data.prepare import prepare

if __name__ == "__main__":
    corpus, cache, ready, go = sys.argv[1:]
    config = Config(
        model=ModelConfig(vocab_size=512, hidden_size=64, num_heads=4, pad_token_id=0),
        train=TrainConfig(context_length=32),
        data=DataConfig(train={corpus: 1.0}, cache_dir=cache, num_workers=1),
        tokenizer=TokenizerConfig(vocab_size=512),
    )
    Path(ready).touch()
    while not Path(go).exists():
        time.sleep(0.001)
    print(prepare(config, say=print).train[0][0].path)
"""


def test_two_processes_may_prepare_the_same_cache_at_once(corpus, packed, tmp_path):
    (tmp_path / "program.py").write_text(PREPARE)
    ready, go = [tmp_path / "ready0", tmp_path / "ready1"], tmp_path / "go"
    command = [sys.executable, str(tmp_path / "program.py"), corpus, str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(
            [*command, str(own), str(go)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in ready
    ]
    wait_until(lambda: all(own.exists() for own in ready))
    go.touch()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (output.splitlines()[-1] for output, _ in outputs)
    assert first == second
    assert shards(Path(first)) == shards(packed.path)
    assert sum(output.count("trained a tokenizer") for output, _ in outputs) == 1


def test_the_other_processes_wait_for_the_writer(config, tmp_path):
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=512))
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(prepare(config, writer=False)), daemon=True
    )
    waiting.start()
    waiting.join(0.7)
    assert waiting.is_alive()
    assert not (tmp_path / "cache").exists()  # it writes nothing
    written = prepare(config)
    waiting.join(20)
    assert found[0].tokenizer.hash == written.tokenizer.hash
    assert [rows.path for rows, _ in found[0].train] == [rows.path for rows, _ in written.train]


def test_the_other_processes_do_not_wait_for_ever(config, monkeypatch):
    monkeypatch.setattr(preparing, "CACHE_SECONDS", 1.0)
    with pytest.raises(
        ConfigError,
        match=r"process 0 has not written .*manifest\.json in 1 s: data\.cache_dir must lie on",
    ):
        prepare(config, writer=False)


@pytest.fixture
def become(monkeypatch):
    """become(number): this is process `number` of a run; process 0 goes first."""
    values: dict[str, str] = {}
    client = types.SimpleNamespace(
        key_value_set=values.__setitem__, blocking_key_value_get=lambda key, _: values[key]
    )
    monkeypatch.setattr(coordination, "_client", lambda: client)
    return lambda number: monkeypatch.setattr(coordination, "_process_id", lambda: number)


def own_text(config, corpus, folder) -> tuple[Config, Path]:
    """The configuration with a tokenizer and rows of text that is a host's own copy."""
    shutil.copytree(Path(corpus).parent, folder)
    config = packed_only(config, str(folder / "*.jsonl"))
    return dataclasses.replace(
        config, tokenizer=TokenizerConfig(vocab_size=512)
    ), folder / "b.jsonl"


def test_a_host_whose_copies_are_of_another_time_takes_process_0s_rows(
    config, corpus, become, tmp_path
):
    config, file = own_text(config, corpus, tmp_path / "text")
    become(0)
    first = prepare(config)
    become(1)
    os.utime(file, (1, 1))
    found = prepare(config, writer=False)
    assert found.tokenizer.path == first.tokenizer.path
    assert found.train[0][0].path == first.train[0][0].path


def test_a_host_whose_files_are_others_is_refused_at_once(config, corpus, become, tmp_path):
    config, file = own_text(config, corpus, tmp_path / "text")
    become(0)
    prepare(config)
    become(1)
    file.write_bytes(file.read_bytes() * 2)
    with pytest.raises(ConfigError, match=r"differ in the files of .*: the sum of their bytes is "):
        prepare(config, writer=False)


def test_a_host_whose_packed_rows_are_others_is_refused(
    config, packed, corpus, tokenizer, become, tmp_path
):
    """Else processes would train on batches of which each has another idea."""
    shutil.copytree(packed.path, tmp_path / "own")
    config = packed_only(config, str(tmp_path / "own"))
    become(0)
    prepare(config)
    become(1)
    prepare(config, writer=False)
    shutil.rmtree(tmp_path / "own")
    pack([corpus.replace("*", "b")], tmp_path / "own", tokenizer, 32, progress=False)
    with pytest.raises(ConfigError, match=r"differ in rows of data\.train: number 1 is"):
        prepare(config, writer=False)


def test_a_cache_that_may_only_be_read_serves(config, corpus, tmp_path, monkeypatch):
    config, _ = own_text(config, corpus, tmp_path / "text")
    first = prepare(config)
    monkeypatch.setattr(preparing, "require_writable", refuse_to_work)
    assert prepare(config).train[0][0].path == first.train[0][0].path


def test_the_samples_validation_text_is_not_in_its_training_text():
    """At most one in twenty of a held-out poem's or chapter's sequences is known from training."""
    for language, length in (("zh", 5), ("en", 40)):

        def pieces(part, language=language):
            with gzip.open(SAMPLE / f"{part}-{language}.jsonl.gz", "rt", encoding="utf-8") as file:
                for line in file:
                    for piece in json.loads(line)["text"].split(
                        "\n\n" if language == "zh" else "\0"
                    ):
                        lines = piece.split("\n")[
                            2 if language == "zh" else 0 :
                        ]  # a poem's first two are title and poet
                        yield "".join(
                            character for line in lines for character in line if character.isalpha()
                        )

        def sequences(piece, length=length):
            return {piece[i : i + length] for i in range(len(piece) - length + 1)}

        held_out = [sequences(piece) for piece in pieces("validation")]
        wanted = set().union(*held_out)
        known = {
            s
            for piece in pieces("train")
            for s in (piece[i : i + length] for i in range(len(piece)))
            if s in wanted
        }
        assert sum(map(len, held_out)) > 30_000
        assert max(len(found & known) / max(1, len(found)) for found in held_out) <= 0.05


@pytest.mark.slow
def test_a_ray_cluster_packs_the_same_bytes(corpus, packed, tokenizer, tmp_path):
    pytest.importorskip("daft")
    words = [
        "--input",
        corpus,
        "--tokenizer",
        str(tokenizer.path),
        "--context_length",
        "32",
        "--output",
        str(tmp_path / "rows"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "baichuan_jax.data.rows", "pack", *words],
        env=environment(RAY_ADDRESS="local"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens and" in done.stdout
    assert shards(tmp_path / "rows") == shards(packed.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"key": 3}'], ids=repr)
def test_a_shard_whose_record_is_damaged_is_made_again(
    packed, corpus, tokenizer, tmp_path, content
):
    folder = shutil.copytree(packed.path, tmp_path / "rows")
    (folder / "manifest.json").unlink()
    # Beside it lies the lock of who packed it.
    (tmp_path / "rows.lock").touch()
    record = folder / "shard-00000.json"
    whole = json.loads(record.read_text())
    record.write_bytes(content)
    again = pack([corpus], folder, tokenizer, 32, num_workers=1)
    assert again.identity == packed.identity
    assert json.loads(record.read_text()) == whole
    # What belongs to another tokenizer is named.
    (folder / "manifest.json").unlink()
    for token in ("x", "99999"):
        record.write_text(json.dumps({**whole, "counts": {token: 1}}))
        with pytest.raises(ConfigError, match=r"shard-00000\.json: .* is no token"):
            pack([corpus], folder, tokenizer, 32, num_workers=1)


def test_a_file_that_appears_during_a_launch_belongs_to_the_next(
    config, documents, tmp_path, monkeypatch
):
    """The rows' name, their content and the tokenizer are of one look at the text."""
    for name, text in documents.items():
        write(tmp_path / name, text)
    data = dataclasses.replace(
        config.data, train={f"{tmp_path}/*.jsonl": 1.0}, cache_dir=str(tmp_path / "cache")
    )
    config = dataclasses.replace(config, data=data, tokenizer=TokenizerConfig(vocab_size=512))
    train = preparing.train_tokenizer

    def train_and_add(*arguments):
        used = train(*arguments)
        write(tmp_path / "late.jsonl", sample("en", 20))
        return used

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "train_tokenizer", train_and_add)
        first = prepare(config)
    read = [Path(name).name for name in first.text[next(iter(config.data.train))]]
    assert read == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert first.train[0][0].manifest["documents"] == sum(map(len, documents.values()))
    second = prepare(config)
    assert second.train[0][0].path != first.train[0][0].path
    assert second.tokenizer.path != first.tokenizer.path
    (tmp_path / "late.jsonl").unlink()
    again = prepare(config)
    assert again.train[0][0].path == first.train[0][0].path


@pytest.mark.parametrize("what", ["train_tokenizer", "pack"])
def test_text_that_changes_while_it_is_read_is_refused(
    config, documents, tmp_path, monkeypatch, what
):
    """What is made of it would be kept under the name of another text."""
    write(tmp_path / "a.jsonl", documents["a.jsonl"])
    data = dataclasses.replace(
        config.data, train={f"{tmp_path}/*.jsonl": 1.0}, cache_dir=str(tmp_path / "cache")
    )
    config = dataclasses.replace(config, data=data, tokenizer=TokenizerConfig(vocab_size=512))
    function = getattr(preparing, what)

    def change_then(*arguments, **options):
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write('{"text": "more"}\n')
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, what, change_then)
        with pytest.raises(
            ConfigError,
            match=r"a\.jsonl changed from [\d,]+ to [\d,]+ bytes while it was read; start again",
        ):
            prepare(config)
    # Nothing is left under the name of the text as it was.
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert prepare(config).train[0][0].manifest["documents"] == len(documents["a.jsonl"]) + 1


@pytest.mark.parametrize(
    "name", ["shard-one.jsonl", "shard-00000.json", "shard-00000.array_record"]
)
def test_a_folder_that_holds_other_files_is_refused_and_keeps_them(tokenizer, tmp_path, name):
    """Also where they have names that packing gives, and where the text itself lies there."""
    for folder in ("apart", "within"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, ["many words " * 20])
        (tmp_path / folder / "notes.tmp").write_text("notes")
    write(tmp_path / "a.jsonl", ["many words " * 20])
    within = tmp_path / "within"
    inputs = {tmp_path / "apart": tmp_path / "a.jsonl"}
    if not name.endswith("record"):
        inputs[within] = within / name
    for folder, text in inputs.items():
        before = content(folder)
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"holds 'notes\.tmp', which no earlier run of"):
                pack([str(text)], folder, tokenizer, 8, num_workers=1)
        assert content(folder) == before


def test_a_killed_packs_folder_loses_only_what_packing_made(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", ["many words " * 20])
    folder = pack([f"{tmp_path}/a.jsonl"], tmp_path / "rows", tokenizer, 8, num_workers=1).path
    (folder / "manifest.json").unlink()
    own = ["shard-00007.json", "shard-00007.array_record", "counts.npy.0123abcd.77.tmp"]
    foreign = ["shard-one.jsonl", "notes.tmp", "shard-00000.parquet"]
    for name in (*own, *foreign):
        (folder / name).write_text("old")
    with pytest.raises(ConfigError, match=r"shard-one\.jsonl lies in the folder of its rows"):
        pack([f"{folder}/shard-one.jsonl"], folder, tokenizer, 8, num_workers=1)
    pack([f"{tmp_path}/a.jsonl"], folder, tokenizer, 8, num_workers=1)
    assert not {path.name for path in folder.iterdir()} & set(own)
    assert {path.name for path in folder.iterdir()} > set(foreign)


def test_a_link_to_a_folder_and_the_folder_have_one_lock(tokenizer, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", ["many words " * 20])
    (tmp_path / "link").symlink_to("rows")
    link = pack([f"{tmp_path}/a.jsonl"], tmp_path / "link", tokenizer, 8, num_workers=1)
    assert (tmp_path / "rows" / "manifest.json").is_file()
    assert {path.name for path in tmp_path.glob("*.lock")} == {"rows.lock"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    here = pack([f"{tmp_path}/a.jsonl"], ".", tokenizer, 8, num_workers=1)
    assert here.identity == link.identity
    assert (tmp_path / "here.lock").exists()
    with pytest.raises(ConfigError, match=r"^/ is the root of a file system"):
        pack([f"{tmp_path}/a.jsonl"], "/", tokenizer, 8, num_workers=1)


def test_the_character_that_tokenizers_turn_into_a_space_is_counted(tokenizer, tmp_path, packed):
    write(tmp_path / "a.jsonl", ["many words " * 20, "a\u2581b\u2581"])
    rows = pack([f"{tmp_path}/a.jsonl"], tmp_path / "rows", tokenizer, 8, num_workers=1)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"
    assert rows.manifest["space_marks"] == 2
    assert "2 characters U+2581, each turned into a space" in summary(rows)
    assert "U+2581" not in summary(packed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "../shard-00000.array_record"}, "is the name of no shard"),
        ({"file": "/etc/passwd"}, "is the name of no shard"),
        ({"file": "shard-00000.array_record[0:1]"}, "is the name of no shard"),
        ({"rows": 1 << 60}, "cannot hold 1152921504606846976 rows"),
    ],
)
def test_a_manifest_that_lies_about_its_shards_is_refused(packed, tmp_path, change, reason):
    shutil.copytree(packed.path, tmp_path / "rows")
    file = tmp_path / "rows" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0] |= change
    file.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=rf"manifest\.json is no manifest: .*{reason}"):
        Rows(tmp_path / "rows")
