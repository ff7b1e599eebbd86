"""Packed rows hold every token in order, whatever packs them and however often it is killed."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from launches import environment

from baichuan_jax.config.schema import ConfigError, DataConfig, TokenizerConfig
from baichuan_jax.data import prepare as preparing
from baichuan_jax.data import rows as module
from baichuan_jax.data.prepare import prepare
from baichuan_jax.data.rows import Rows, main, pack, summary, unigram_entropy
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


@pytest.fixture
def copy(packed, tmp_path):
    """Packed rows to damage."""
    return shutil.copytree(packed.path, tmp_path / "copy")


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


def test_rows_are_the_documents_joined_and_cut(packed, documents, tokenizer):
    expected, dropped = [], 0
    for stream in streams(documents, tokenizer):
        expected += [stream[i : i + 33] for i in range(0, len(stream) - 32, 33)]
        dropped += len(stream) % 33
    assert len(packed) == len(expected) > 100
    np.testing.assert_array_equal([packed[i] for i in range(len(packed))], expected)
    assert packed[0].dtype == np.int32
    assert packed.manifest["tokens_dropped"] == dropped


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
        f"{len(everything):,} documents ({everything.count('')} empty), {len(tokens):,} tokens"
        in summary(packed)
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


def test_any_number_of_processes_writes_the_same_folder(packed, corpus, tokenizer, tmp_path):
    pack([corpus], tmp_path / "rows", tokenizer, 32, num_workers=2)
    assert content(tmp_path / "rows") == content(packed.path)


def test_a_large_file_becomes_several_shards_that_hold_every_document(
    packed, corpus, documents, tokenizer, tmp_path, monkeypatch
):
    size = os.path.getsize(corpus.replace("*", "a"))
    monkeypatch.setattr(module, "SHARD_BYTES", size // 3)
    rows = pack([corpus.replace("*", "a")], tmp_path / "rows", tokenizer, 8, num_workers=2)
    assert len(rows.manifest["shards"]) in (3, 4)
    assert rows.manifest["documents"] == len(documents["a.jsonl"])
    assert (
        rows.counts.tolist()
        == np.bincount(streams(documents, tokenizer)[0], minlength=512).tolist()
    )


def test_token_ids_of_a_large_vocabulary_are_not_cut(packed):
    assert packed.manifest["dtype"] == "uint16"
    assert [module._dtype(size).name for size in (1 << 16, (1 << 16) + 1)] == ["uint16", "uint32"]


def start_pack(corpus, output, tokenizer):
    words = ["pack", "--input", corpus, "--output", str(output), "--tokenizer", str(tokenizer.path)]
    command = [
        sys.executable,
        "-m",
        "baichuan_jax.data.rows",
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
    documents, tokenizer, tmp_path
):
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
    assert f"{killed}: {12 * 5 * len(documents['a.jsonl']):,} documents (0 empty)" in output
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
        wanted = [
            s[i : i + length + 1]
            for s in streams(documents, other)
            for i in range(0, len(s) - length, length + 1)
        ]
        np.testing.assert_array_equal([again[i] for i in range(len(again))], wanted)


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


def test_rows_are_known_by_their_content_wherever_they_lie(
    packed, copy, corpus, tokenizer, tmp_path
):
    shutil.copytree(Path(corpus).parent, tmp_path / "text")
    again = pack([f"{tmp_path}/text/*"], tmp_path / "again", tokenizer, 32, num_workers=1)
    assert packed.identity == Rows(copy).identity == again.identity
    other = pack([f"{tmp_path}/text/a*"], tmp_path / "other", tokenizer, 32, num_workers=1)
    longer = pack([f"{tmp_path}/text/*"], tmp_path / "longer", tokenizer, 64, num_workers=1)
    assert len({packed.identity, other.identity, longer.identity}) == 3


def test_only_the_shard_of_changed_text_is_made_anew(
    corpus, documents, tokenizer, packed, tmp_path
):
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
    assert kept == {
        f"shard-0000{i}.{suffix}" for i in (0, 2) for suffix in ("array_record", "json")
    }


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
    with pytest.raises(ConfigError, match="holds no row: its text has fewer than 101 tokens"):
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


def test_the_commands_show_and_verify(packed, capsys):
    assert main(["show", str(packed.path)]) == 0
    assert json.loads(capsys.readouterr().out) == packed.manifest
    assert main(["verify", str(packed.path)]) == 0
    assert capsys.readouterr().out == f"{packed.path}: 3 shards are as the manifest says\n"
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
    monkeypatch.setattr(preparing, "WAIT_SECONDS", 1.0)
    with pytest.raises(
        ConfigError,
        match=r"process 0 has not written .*manifest\.json in 1 s: data\.cache_dir must lie on",
    ):
        prepare(config, writer=False)


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
