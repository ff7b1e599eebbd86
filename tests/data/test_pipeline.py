"""The data pipeline as a real program: what it removes, bad input, any number of workers, kills."""

import collections
import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import SAMPLE, environment, run_here

pytest.importorskip("daft")
import pyarrow as pa
import pyarrow.parquet as pq

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.pipeline import main, run
from baichuan_jax.documents import storage
from baichuan_jax.resilience.causes import SaveFailed, cause_of

EMAIL, PHONE, IDENTITY = "someone@example.org", "13812345678", "11010519491231002X"


def sample(name: str, count: int) -> list[str]:
    with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(next(file))["text"] for _ in range(count)]


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
    )


def command(
    folder: Path, output: Path, *options: str, part_bytes: int = 20_000, rows_at_once: int = 2 << 20
) -> list[str]:
    """The pipeline with parts of a few documents each, enough to divide among workers."""
    program = (
        "import sys; from baichuan_jax.data import pipeline; "
        "from baichuan_jax.data.corpus import reading, tables; "
        f"reading.PART_BYTES, tables.ROWS_AT_ONCE = {part_bytes}, {rows_at_once}; "
        "pipeline.run_command(lambda: pipeline.main(sys.argv[1:]))"
    )
    return [
        sys.executable,
        "-c",
        program,
        "--input",
        f"{folder}/*",
        "--output",
        str(output),
        *options,
    ]


def pipeline(
    folder: Path, output: Path, *options: str, expect: int | None = 0, **sizes: int
) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(folder, output, *options, **sizes),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert expect is None or done.returncode == expect, (
        f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def rows(output: Path, folder: str) -> dict[str, dict]:
    found = [
        row
        for path in sorted((output / folder).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def content(output: Path) -> dict[str, bytes]:
    """The bytes of final/ and removed/."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(output.glob("[fr]*/*.parquet"))
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Documents in two files, with copies, a repeated sentence, garbage and personal data."""
    folder = tmp_path_factory.mktemp("corpus")
    zh, en = sample("train-zh", 6), sample("train-en", 6)
    sentence = "It is not every day that a sentence like this one comes twice in a corpus."
    records = [{"id": f"zh{i}", "text": text, "source": "verse"} for i, text in enumerate(zh)]
    records += [{"id": f"en{i}", "text": text[:4000]} for i, text in enumerate(en)]
    records[6]["text"] += f"\n{sentence} The end of the first."
    records[7]["text"] += f"\nThe beginning. {sentence}\nThe end of the second."
    records.append({"id": "copy", "text": zh[0].replace("，", " , ")})
    records.append(
        {
            "id": "personal",
            "text": f"{en[5][4000:6000]}\nWrite to {EMAIL}, call {PHONE}, 证件号{IDENTITY}。",
        }
    )
    records.append({"id": "table", "text": "\n".join(f"{i}\t{i * i}\t{i**3}" for i in range(200))})
    write_jsonl(folder / "a.jsonl", records[::2])
    write_jsonl(folder / "b.jsonl", records[1::2])
    return folder


@pytest.fixture(scope="module")
def result(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("result")
    pipeline(corpus, output, "--num_workers", "1")
    return output


def test_every_document_is_kept_or_removed_for_a_reason(corpus, result):
    final, removed = rows(result, "final"), rows(result, "removed")
    given = {
        json.loads(line)["id"]
        for path in corpus.iterdir()
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    assert final.keys() | removed.keys() == given
    assert not final.keys() & removed.keys()
    assert list(next(iter(final.values()))) == [
        "id",
        "text",
        "source",
        "lang",
        "quality",
        "frequency",
    ]
    assert list(next(iter(removed.values()))) == ["id", "stage", "reason", "duplicate_of"]
    kept = {"zh0", "copy"} & final.keys()
    assert len(kept) == 1
    gone = removed[({"zh0", "copy"} - kept).pop()]
    assert (gone["stage"], gone["duplicate_of"]) == ("documents", kept.pop())
    assert {final[name]["frequency"] for name in ({"zh0", "copy"} & final.keys())} == {2}
    assert removed["table"] == {
        "id": "table",
        "stage": "rules",
        "reason": "few_letters",
        "duplicate_of": None,
    }
    assert (final["zh1"]["lang"], final["zh1"]["source"]) == ("zh", "verse")
    assert final["en1"]["source"] in ("a", "b")


def test_a_sentence_stays_once_and_its_neighbours_keep_their_places(result):
    texts = [row["text"] for row in rows(result, "final").values()]
    assert sum("comes twice in a corpus" in text for text in texts) == 1
    second = next(text for text in texts if "The beginning." in text)
    assert second.endswith("\nThe beginning.\nThe end of the second.")


def test_personal_data_are_masked(result):
    text = rows(result, "final")["personal"]["text"]
    assert text.endswith("Write to <email>, call <phone>, 证件号<identity>。")


def test_the_report_adds_up(result):
    report = json.loads((result / "report.json").read_text(encoding="utf-8"))
    removed = collections.Counter(
        (row["stage"], row["reason"]) for row in rows(result, "removed").values()
    )
    counted = {
        (stage["stage"], reason): found["documents"]
        for stage in report["stages"]
        for reason, found in stage["removed"].items()
    }
    assert counted == dict(removed)
    final = rows(result, "final")
    assert report["final"] == {
        "documents": len(final),
        "bytes": sum(len(row["text"].encode()) for row in final.values()),
    }
    assert (result / "funnel.png").read_bytes().startswith(b"\x89PNG")
    assert "few_letters" in (result / "funnel.html").read_text(encoding="utf-8")


def test_any_number_of_workers_and_a_kill_give_the_same_bytes(corpus, result, tmp_path):
    """All its processes are killed at a random moment; started again, it gives the same bytes."""
    process = subprocess.Popen(
        command(corpus, tmp_path / "o", "--num_workers", "2"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(random.Random(os.getpid()).uniform(2, 6))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pipeline(corpus, tmp_path / "o")
    assert content(tmp_path / "o") == content(result)
    assert len(content(result)) >= 6  # two files a part


def test_one_part_and_many_turns_give_the_same_documents(corpus, result, tmp_path):
    """All documents in one part, and tables of keys grouped 4,000 rows at a time on the disk."""
    pipeline(corpus, tmp_path / "o", part_bytes=16 << 20, rows_at_once=4000)
    assert len(content(tmp_path / "o")) == 2 < len(content(result))
    for folder in ("final", "removed"):
        assert rows(tmp_path / "o", folder) == rows(result, folder)
    assert not (tmp_path / "o" / "stages" / "scratch").exists()


def test_a_large_file_is_read_in_parts_and_another_input_leaves_nothing_of_it(corpus, tmp_path):
    """A file of two parts, whose last line is broken, and a small one; then the small one alone."""
    folder = tmp_path / "in"
    folder.mkdir()
    documents = [
        {"id": f"n{i}", "text": f"{i}. {text}"}
        for i, text in enumerate(sample("train-en", 15) * 20)
    ]
    write_jsonl(folder / "large.jsonl", documents)
    with (folder / "large.jsonl").open("a", encoding="utf-8") as file:
        file.write("no json\n")
    (folder / "small.jsonl").write_bytes((corpus / "a.jsonl").read_bytes())
    given = {
        json.loads(line)["id"]
        for line in (corpus / "a.jsonl").read_text(encoding="utf-8").splitlines()
    }
    options = [
        word
        for stage in ("rules", "dedup", "sentences", "quality")
        for word in (f"--{stage}.enabled", "false")
    ]
    options += ["--num_workers", "1"]
    pipeline(folder, tmp_path / "o", *options, part_bytes=4 << 20)
    assert len(content(tmp_path / "o")) == 4
    found = rows(tmp_path / "o", "final").keys() | rows(tmp_path / "o", "removed").keys()
    assert found >= given | {document["id"] for document in documents}
    assert len(found) == len(given) + 300 + 1
    report = json.loads((tmp_path / "o" / "report.json").read_text(encoding="utf-8"))
    assert [(problem["reason"], problem["lines"]) for problem in report["problems"]] == [
        ("no_json", [301])
    ]
    (folder / "large.jsonl").unlink()
    pipeline(folder, tmp_path / "o", *options, part_bytes=4 << 20)
    assert rows(tmp_path / "o", "final").keys() | rows(tmp_path / "o", "removed").keys() == given


def test_bad_input_is_counted_by_file_and_line(tmp_path):
    text = sample("train-en", 1)[0][:3000]
    folder = tmp_path / "in"
    folder.mkdir()
    good = json.dumps({"id": "x", "text": text})
    lines = [
        good.encode(),
        b'{"text": "\xff\xfe"}',
        b"no json",
        b'{"body": "no text"}',
        b"",
        good.encode(),
        b'{"text": "' + b"a" * 70000 + b'"}',
        b'{"text": "\\ud83d"}',
    ]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / ".hidden.jsonl").write_bytes(good.encode())
    (folder / "more").mkdir()
    (folder / "more" / "unread.txt").write_text(text)
    whole = gzip.compress(
        b"".join(json.dumps({"text": text}).encode() + b"\n" for text in sample("train-en", 50)),
        mtime=0,
    )
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "none.parquet").write_bytes(b"PAR1 this is none")
    pq.write_table(pa.table({"text": [text.upper(), None]}), folder / "some.parquet")
    done = pipeline(
        folder,
        tmp_path / "o",
        "--read.max_line_bytes",
        "65536",
        "--dedup.enabled",
        "false",
        "--sentences.enabled",
        "false",
        "--quality.enabled",
        "false",
        "--num_workers",
        "1",
    )
    report = json.loads((tmp_path / "o" / "report.json").read_text(encoding="utf-8"))
    problems = {
        (Path(p["file"]).name, p["reason"]): (p["count"], p["lines"]) for p in report["problems"]
    }
    lines_before_the_cut = problems.pop(("cut.jsonl.gz", "unreadable"))[1][0] - 1
    assert 0 < lines_before_the_cut < 50
    assert problems == {
        ("a.jsonl", "broken_utf8"): (2, [2, 8]),
        ("a.jsonl", "no_json"): (1, [3]),
        ("a.jsonl", "no_text"): (1, [4]),
        ("a.jsonl", "line_too_long"): (1, [7]),
        ("a.jsonl", "duplicate_id"): (1, [6]),
        ("empty.jsonl", "empty_file"): (1, [1]),
        ("none.parquet", "unreadable"): (1, [1]),
        ("some.parquet", "no_text"): (1, [2]),
    }
    # What went in is what came out and what is counted.
    documents = 7 + lines_before_the_cut + 2
    assert documents == sum(len(rows(tmp_path / "o", name)) for name in ("final", "removed"))
    counted = ("files", "hidden_files", "files_in_folders", "documents", "without_id")
    assert {name: report["input"][name] for name in counted} == {
        "files": 5,
        "hidden_files": 1,
        "files_in_folders": 1,
        "documents": documents,
        "without_id": documents - 2,
    }
    removed = sum(f["documents"] for s in report["stages"] for f in s["removed"].values())
    assert documents == report["final"]["documents"] + removed
    assert (
        "input: 5 files read, 1 hidden files not read, 1 files in matched folders not read, "
        f"{documents} documents, {documents - 2} documents without an id of their own"
    ) in " ".join(done.stdout.split())
    assert "a.jsonl: 2 broken_utf8 at line 2, 8" in done.stdout.replace("\n", "")
    details = {(p["reason"], Path(p["file"]).name): p["detail"] for p in report["problems"]}
    assert details["no_text", "some.parquet"] == "field 'text' is null, expected a string"
    failed = pipeline(folder, tmp_path / "f", "--on_error", "fail", expect=78)
    assert "a.jsonl, line 2: broken_utf8" in failed.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rules.limits", "{few_leters: 0.1}"], "few_letters"),
        (["--dedup.band", "3"], "dedup.bands"),
        (["--dedup.bands", "64"], "160"),
        (["--dedup.rows", "0"], "dedup.rows=0 must be greater than 0"),
        (["--rules.blocked_phrases", "/nowhere"], "cannot be read"),
        (["--quality.model", "/nowhere"], "holds no quality model"),
    ],
)
def test_a_wrong_setting_is_refused(corpus, tmp_path, options, message):
    argv = ["--input", f"{corpus}/*", "--output", str(tmp_path), *options]
    done = run_here(lambda: main(argv))
    assert done.returncode == 78
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_ends_the_run_and_costs_nothing_that_is_finished(corpus, result, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(done.stderr)
    try:
        full = pipeline(corpus, disk / "o", expect=74)
        assert "No space left on device" in full.stderr
        assert "start the same command again: finished parts are kept" in full.stderr
        assert not list(disk.glob("o/final/*.parquet"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        pipeline(corpus, disk / "o")
        assert content(disk / "o") == content(result)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bytes(corpus, result, tmp_path):
    done = subprocess.run(
        command(corpus, tmp_path),
        env=environment(RAY_ADDRESS="local"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path) == content(result)


@pytest.mark.slow
def test_ten_kills_give_the_same_bytes(corpus, result, tmp_path):
    rng = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            command(corpus, tmp_path),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(1, 8))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    pipeline(corpus, tmp_path)
    assert content(tmp_path) == content(result)


# Outputs that others use too. In this process, and with no filter but the rules.


def clean(patterns: list[Path | str], output: Path) -> list[str]:
    """Run the pipeline; what it says."""
    config = CorpusConfig(input=list(map(str, patterns)), output=str(output), num_workers=1)
    for stage in (config.quality, config.dedup, config.sentences):
        object.__setattr__(stage, "enabled", False)
    said: list[str] = []
    run(config, progress=False, say=said.append)
    return said


@pytest.fixture
def small(tmp_path) -> Path:
    write_jsonl(tmp_path / "in.jsonl", [{"text": sample("train-en", 1)[0][:3000]}])
    return tmp_path / "in.jsonl"


@pytest.mark.parametrize(
    "place",
    [
        "final/thesis.txt",
        "removed/part-00000.parquet",
        "stages/read/notes.txt",
        "report.json",
        "funnel.html",
        "funnel.png",
    ],
)
def test_an_output_that_holds_other_files_is_refused_and_keeps_them(small, tmp_path, place):
    kept = tmp_path / "project" / place
    kept.parent.mkdir(parents=True)
    kept.write_text("a year of work")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"holds .+, which no earlier run of this command"):
            clean([small], tmp_path / "project")
    assert kept.read_text() == "a year of work"


def test_input_that_lies_in_the_output_is_refused_and_kept(small, tmp_path):
    output = tmp_path / "out"
    clean([small], output)
    write_jsonl(output / "final" / "more.jsonl", [{"text": "more"}])
    (tmp_path / "link.jsonl").symlink_to(output / "final" / "more.jsonl")
    before = content(output)
    for pattern in (output / "final/*.jsonl", output / "final/*.parquet", output / "*.json"):
        with pytest.raises(ConfigError, match="lies in what is written to the output"):
            clean([pattern], output)
    with pytest.raises(ConfigError, match=r"link\.jsonl lies in what is written to"):
        clean([tmp_path / "link.jsonl"], output)
    assert content(output) == before
    # Of another input too it loses only what it made itself.
    write_jsonl(small, [{"text": sample("train-en", 1)[0][:2000]}])
    clean([small], output)
    assert content(output).keys() == before.keys()
    assert content(output) != before
    assert (output / "final" / "more.jsonl").is_file()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_the_system_cannot_read_now_is_read_next_time(small, tmp_path, monkeypatch, number):
    write_jsonl(tmp_path / "other.jsonl", [{"text": sample("train-en", 2)[1][:3000]}])
    output, files = tmp_path / "out", [small, tmp_path / "other.jsonl"]

    def fail(path, mode):
        if path.endswith("other.jsonl"):
            raise OSError(number, os.strerror(number), path)
        return open(path, mode)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "open", fail, raising=False)
        with pytest.raises((ConfigError, SaveFailed), match=r"other\.jsonl: .*; ") as caught:
            clean(files, output)
        assert cause_of(caught.value).exit_code == (78 if number == errno.EACCES else 74)
    clean(files, output)
    report = json.loads((output / "report.json").read_text())
    assert (report["input"]["documents"], report["problems"]) == (2, [])


def test_what_an_earlier_version_could_not_read_is_read_now(small, tmp_path):
    """It kept such a part for good, as if the file were damaged."""
    output = tmp_path / "out"
    clean([small], output)
    before = content(output)
    record = output / "stages" / "read" / "part-00000.json"
    found = json.loads(record.read_text())
    for detail, message in (
        ("[Errno 13] Permission denied: 'b'", "the system"),
        ("cut", "was comp"),
    ):
        problem = {"file": "b.jsonl", "reason": "unreadable", "count": 1, "lines": [1]}
        found["result"]["problems"] = [problem | {"detail": f"reading stopped: {detail}"}]
        record.write_text(json.dumps(found))
        assert message in clean([small], output)[0]
    assert content(output) == before
    (kept,) = json.loads((output / "report.json").read_text())["problems"]
    assert kept["detail"] == "reading stopped: cut"


def test_evaluation_files_in_a_matched_folder_are_refused(small, tmp_path):
    (tmp_path / "sets" / "test").mkdir(parents=True)
    (tmp_path / "sets" / "README.txt").write_text("about")
    (tmp_path / "sets" / "test" / "x_test.csv").write_text("q,1,2,3,4,A\n")
    argv = ["--input", str(small), "--output", str(tmp_path / "out")]
    done = run_here(
        lambda: main([*argv, "--decontaminate.files", json.dumps([f"{tmp_path}/sets/*"])])
    )
    assert done.returncode == 78
    assert "x_test.csv is in a folder that a glob matches" in done.stderr


def test_a_result_that_is_damaged_is_made_again(small, tmp_path):
    output = tmp_path / "out"
    clean([small], output)
    before = content(output)
    assert "was complete" in clean([small], output)[-1]
    (output / "removed" / "part-00000.parquet").unlink()
    assert clean([small], output) == []
    assert content(output) == before
    for damaged in (*output.glob("final/part-*"), *output.glob("stages/ids/*.parquet")):
        os.truncate(damaged, damaged.stat().st_size - 10)
    assert clean([small], output) == []
    assert content(output) == before
    # Records of earlier versions have no sizes.
    for record in output.glob("stages/*/*.json"):
        fields = json.loads(record.read_text())
        assert fields.pop("bytes", None) or fields.pop("files", None)
        record.write_text(json.dumps(fields))
    assert "was complete" in clean([small], output)[-1]


def test_a_file_and_its_link_are_one_input(small, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(small)
    os.link(small, tmp_path / "hard.jsonl")
    for other in ("link.jsonl", "hard.jsonl"):
        with pytest.raises(ConfigError, match="are the same file, by a link"):
            clean([small, tmp_path / other], tmp_path / "out")
