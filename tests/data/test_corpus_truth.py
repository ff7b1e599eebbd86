"""The planted corpus is what its truth says, and its judge counts right and wrong."""

import collections
import difflib
import gzip
import hashlib
import json
import re
import subprocess
import sys

import pytest
from launches import REPOSITORY, SAMPLE

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("rapidfuzz")

MAKE, SCORE = (REPOSITORY / "benchmarks" / name for name in ("corpus_truth.py", "corpus_score.py"))


def run(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(folder, seed=0):
    run(MAKE, "--output", folder, "--megabytes", 3, "--seed", seed)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    make(folder)
    texts, documents, planted = {}, {}, []
    for path in folder.glob("corpus-*.jsonl"):
        with path.open(encoding="utf-8") as file:
            texts.update((record["id"], record["text"]) for record in map(json.loads, file))
    for line in (folder / "truth.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "id" in record:
            documents[record["id"]] = record
        else:
            planted.append(record)
    return folder, texts, documents, planted


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = make(tmp_path / "a", 7), make(tmp_path / "b", 7), make(tmp_path / "c", 8)
    assert first == again
    assert not set(first.values()) & set(other.values())


def units(text, lang):
    return re.findall(r"[\u3400-\u9fff]" if lang == "zh" else r"[A-Za-z']+", text)


def test_copies_are_what_they_are_called(corpus):
    _, texts, documents, _ = corpus
    assert texts.keys() == documents.keys()
    shares = collections.defaultdict(list)
    for name, record in documents.items():
        if record["of"] is None:
            continue
        kind, lang, copy, original = (
            record["kind"],
            record["lang"],
            texts[name],
            texts[record["of"]],
        )
        if kind == "exact":
            assert copy == original
        elif kind == "punctuation":
            assert [u.lower() for u in units(copy, lang)] == [
                u.lower() for u in units(original, lang)
            ]
        elif kind.startswith("truncate"):
            assert original.startswith(copy)
            assert len(copy) == pytest.approx((1 - int(kind[-2:]) / 100) * len(original), abs=1)
        elif kind == "boilerplate":
            assert original in copy
            assert 0 < len(copy) - len(original) < 2000
        elif kind == "pasted":
            assert len(copy) == pytest.approx(1.2 * len(original), abs=2)
        else:
            a, b = units(original, lang), units(copy, lang)
            changes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
            edits = sum(
                max(i2 - i1, j2 - j1)
                for kind_of_change, i1, i2, j1, j2 in changes
                if kind_of_change != "equal"
            )
            shares[kind].append(edits / len(a))
    assert {record["kind"] for record in documents.values() if record["of"]} >= {
        "exact",
        "pasted",
        "boilerplate",
        *shares,
    }
    assert len(shares) == 6
    for (
        kind,
        found,
    ) in (
        shares.items()
    ):  # a word may be replaced by itself, and difflib does not find the fewest edits
        assert sum(found) / len(found) == pytest.approx(int(kind[-2:]) / 100, rel=0.15)


def test_planted_sentences_stand_where_the_truth_says(corpus):
    _, texts, _, planted = corpus
    assert {record["kind"] for record in planted} >= {"sentence_exact", "sentence_near"}
    for record in planted:
        assert (
            len(record["sentences"])
            == len(record["documents"])
            == len(set(record["documents"]))
            > 1
        )
        for sentence, name in zip(record["sentences"], record["documents"], strict=True):
            assert texts[name].count(sentence) == 1
        first = record["sentences"][0]
        for copy in record["sentences"][1:]:
            assert len(copy) == len(first)
            changed = sum(a != b for a, b in zip(copy, first, strict=True))
            letters = sum(c.isalpha() for c in first)
            assert changed == (
                0 if record["kind"] != "sentence_near" else max(1, round((letters - 1) / 10))
            )


def test_clean_documents_have_nothing_in_common(corpus):
    _, texts, documents, _ = corpus
    clean = [name for name, record in documents.items() if record["kind"] == "clean"]
    lines = collections.Counter(
        line for name in clean for line in texts[name].split("\n") if len(line) >= 40
    )
    assert lines.most_common(1)[0][1] == 1


def test_more_text_than_there_is_comes_re_worded(tmp_path):
    source = tmp_path / "few.jsonl"
    lines = []
    for language in ("en", "zh"):
        with gzip.open(SAMPLE / f"train-{language}.jsonl.gz", "rt", encoding="utf-8") as file:
            lines += [next(file) for _ in range(12)]
    source.write_text("".join(lines), encoding="utf-8")
    run(MAKE, "--input", source, "--output", tmp_path / "out", "--megabytes", 2)  # of 0.25 MB
    kinds = [
        json.loads(line)
        for line in (tmp_path / "out" / "truth.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    clean = {record["id"]: record["lang"] for record in kinds if record.get("kind") == "clean"}
    found = []
    for path in (tmp_path / "out").glob("corpus-*.jsonl"):
        records = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
        found += [(r["lang"], r["text"]) for r in records if r["id"] in clean]
    grams = collections.Counter()
    for lang, text in found:
        words = units(text, lang)
        grams.update({tuple(words[i : i + 8]) for i in range(len(words) - 7)})
    assert sum(map(len, (text for _, text in found))) > 2 * sum(
        len(json.loads(line)["text"]) for line in lines
    )
    assert sum(count > 1 for count in grams.values()) < 0.01 * len(grams)


def write_result(folder, final, removed):
    for name, columns in (
        ("final", {"id": list(final), "text": list(final.values())}),
        ("removed", removed),
    ):
        (folder / name).mkdir(parents=True)
        if name == "removed":
            columns = {
                key: [row[i] for row in removed]
                for i, key in enumerate(("id", "stage", "reason", "duplicate_of"))
            }
        pq.write_table(
            pa.table(columns, schema=pa.schema([(key, pa.string()) for key in columns])),
            folder / name / "0.parquet",
        )


def perfect(corpus):
    _, texts, documents, planted = corpus
    final, removed = dict(texts), []
    for name, record in documents.items():
        if record["kind"] in ("exact", "punctuation", "edit_01", "edit_02"):
            removed.append((name, "documents", "near-duplicate", record["of"]))
        elif record["kind"].startswith("garbage"):
            removed.append((name, "rules", "any", None))
    for row in removed:
        del final[row[0]]
    for record in planted:
        for sentence, name in list(zip(record["sentences"], record["documents"], strict=True))[1:]:
            final[name] = final[name].replace(sentence, "")
    return final, removed


def score(corpus, folder, final, removed):
    write_result(folder, final, removed)
    run(SCORE, "--corpus", corpus[0], "--result", folder, "--json", folder / "score.json")
    return json.loads((folder / "score.json").read_text(encoding="utf-8"))


def test_a_perfect_pipeline_scores_perfectly(corpus, tmp_path):
    found = score(corpus, tmp_path, *perfect(corpus))
    assert found["accounts"] == {
        "documents": len(corpus[1]),
        "lost": 0,
        "unknown": 0,
        "more_than_once": 0,
    }
    for kind in ("exact", "punctuation", "edit_01", "edit_02"):
        assert {figures["recall"] for figures in found["documents"][kind].values()} == {1.0}
    assert {figures["recall"] for figures in found["documents"]["edit_20"].values()} == {0.0}
    assert found["duplicate_removals"]["precision"] == 1.0
    assert {
        (f["recall"], f["lost"]) for kind in found["sentences"].values() for f in kind.values()
    } == {(1.0, 0.0)}
    assert len(found["garbage"]) == 12
    assert {f["recall"] for kind in found["garbage"].values() for f in kind.values()} == {1.0}
    for lang in ("zh", "en"):
        assert found["clean"][lang]["removed"] == 0
        assert found["sentence_removals"][lang]["removed"] > 0
        assert found["sentence_removals"][lang]["wrong"] == 0


def test_every_kind_of_mistake_is_counted(corpus, tmp_path):
    _, texts, documents, planted = corpus
    final, removed = perfect(corpus)
    named = lambda kind, lang: next(
        name for name, r in documents.items() if (r["kind"], r["lang"]) == (kind, lang)
    )
    count = lambda kind, lang: sum(
        (r["kind"], r["lang"]) == (kind, lang) for r in documents.values()
    )
    back = named("exact", "en")  # a copy that was not found
    final[back] = texts[back]
    removed = [row for row in removed if row[0] != back]
    bad = named("garbage_markup", "zh")  # garbage that stays
    final[bad] = texts[bad]
    removed = [row for row in removed if row[0] != bad]
    copied = {record["of"] for record in documents.values()}
    free = [
        n
        for n, r in documents.items()
        if r["kind"] in ("clean", "giver", "host") and r["lang"] == "zh" and n not in copied
    ]
    good, false = [name for name in free if documents[name]["kind"] == "clean"][:2]
    del final[good], final[false]
    removed += [
        (good, "rules", "too short", None),
        (false, "documents", "near-duplicate", back),
    ]  # both wrong
    gone = next(
        name for name in free if name in final and documents[name]["kind"] == "clean"
    )  # a document without a trace
    del final[gone]
    left = next(
        r for r in planted if r["kind"] == "sentence_exact" and r["lang"] == "zh"
    )  # a sentence found nowhere
    for name in left["documents"]:
        final[name] = final[name].replace(left["sentences"][0], "")
    found = score(corpus, tmp_path, final, removed)
    assert found["accounts"]["lost"] == 1
    assert found["documents"]["exact"]["en"]["recall"] == pytest.approx(
        1 - 1 / count("exact", "en")
    )
    assert found["garbage"]["markup"]["zh"]["recall"] == pytest.approx(
        1 - 1 / count("garbage_markup", "zh")
    )
    assert found["clean"]["zh"]["removed"] == pytest.approx(1 / len(free))
    assert found["clean"]["zh"]["reasons"] == {"rules: too short": 1}
    assert found["duplicate_removals"]["precision"] == pytest.approx(
        1 - 1 / found["duplicate_removals"]["removed"]
    )
    assert found["duplicate_removals"]["wrong_kinds"] == {"clean": 1}
    exact = sum(r["kind"] == "sentence_exact" and r["lang"] == "zh" for r in planted)
    assert found["sentences"]["exact"]["zh"]["lost"] == pytest.approx(1 / exact)
    wrong = found["sentence_removals"]["zh"]
    assert wrong["wrong"] * wrong["removed"] == pytest.approx(len(left["documents"]))
