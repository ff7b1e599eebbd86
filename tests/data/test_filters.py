"""A filter is one file and one line in a list; its effects and its key do the rest."""

import ast
import gzip
import json
from pathlib import Path

import pytest
from launches import REPOSITORY, SAMPLE

pytest.importorskip("daft")
import pyarrow as pa
import pyarrow.parquet as pq
from daft import col, lit

from baichuan_jax.data import pipeline
from baichuan_jax.data.corpus import config as settings
from baichuan_jax.data.corpus import parts as parts_module
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.corpus.effects import SCHEMAS, Effects
from baichuan_jax.data.corpus.filter import Corpus
from baichuan_jax.data.corpus.parts import DocumentPart, ParquetFile, stage_key
from baichuan_jax.data.corpus.plan import clean_corpus
from baichuan_jax.data.corpus.stages import Stages
from baichuan_jax.data.corpus.tables import Tables, read_stage
from baichuan_jax.data.decontaminate import FIELDS
from baichuan_jax.data.rules import Rules
from baichuan_jax.data.runner import Workers
from baichuan_jax.documents.reader import document_id

DATA = REPOSITORY / "baichuan_jax" / "data"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """English documents with ids n0, n1, ...; the last has the id of the first."""
    with gzip.open(SAMPLE / "train-en.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"][:3000] for _ in range(6)]
    records = [{"id": f"n{number % 5}", "text": text} for number, text in enumerate(texts)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows(folder: Path) -> dict[str, dict]:
    found = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["id"]: row for row in found}


class Vowels:
    """Everything that an effect can do, by made-up rules on the number of a document's vowels."""

    name = "vowels"

    def run(self, corpus: Corpus) -> Effects:
        counts, results = corpus.make_parts("vowel-counts", [corpus.documents.key, 1], self._count)
        assert results == [6]

        def find():
            ranked = read_stage(counts).join(corpus.ids(), on="doc")
            return ranked.where(col("vowels") > lit(0)).sort("doc")

        key, table = corpus.make_table("vowels", [counts.key, *corpus.effects.keys], find)
        place = col("doc").cast("int64")
        return Effects(
            key,
            removed=table.where(place == lit(1)).select(
                "doc", lit("too_many").alias("reason"), lit("n0").alias("duplicate_of")
            ),
            renamed=table.where(place == lit(2)).select("doc", lit("renamed").alias("id")),
            copies=table.where(place == lit(0)).select("doc", lit(2).alias("count")),
            cut=table.where(place == lit(3)).select(
                "doc", lit(0).alias("start"), lit(10).alias("stop"), lit(10).alias("bytes")
            ),
            notes={"vowels": 6},
        )

    def _count(self, part: DocumentPart, file: ParquetFile) -> int:
        number = 0
        for table in part.read(["doc", "text"]):
            texts = table["text"].to_pylist()
            vowels = [sum(text.count(letter) for letter in "aeiou") for text in texts]
            file.write(pa.table({"doc": table["doc"], "vowels": vowels}))
            number += len(texts)
        return number


def clean(corpus: Path, output: Path, filters: list) -> dict:
    config = CorpusConfig(input=[str(corpus)], output=str(output), num_workers=1)
    cleaner = Rules(settings.RulesConfig(enabled=False, personal_data="keep"))
    with Workers(1, progress=False) as workers:
        stages = Stages(output, workers, Tables(output / "scratch"), say=print)
        return clean_corpus(config, cleaner, filters, stages)


def test_a_filter_of_ones_own_needs_no_change_of_the_machinery(corpus, tmp_path):
    given = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    report = clean(corpus, tmp_path / "o", [Vowels()])
    final, removed = rows(tmp_path / "o" / "final"), rows(tmp_path / "o" / "removed")
    second_n0 = document_id(str(corpus), 6)
    assert final.keys() == {"n0", "renamed", "n3", "n4", second_n0}
    reason = {"stage": "vowels", "reason": "too_many", "duplicate_of": "n0"}
    assert removed == {"n1": {"id": "n1", **reason}}
    assert {name: row["frequency"] for name, row in final.items() if row["frequency"] != 1} == {
        "n0": 2
    }
    # "CHAPTER IV" is a line, which is lost with the blank line after it.
    assert final["n3"]["text"] == given[3][10:].lstrip("\n")
    assert final["n0"]["text"] == given[0]
    (stage,) = [stage for stage in report["stages"] if stage["stage"] == "vowels"]
    assert stage["bytes_cut"] == len(given[3].encode()) - len(final["n3"]["text"].encode())
    assert stage["removed"]["too_many"]["examples"][0]["duplicate_of"] == "n0"
    assert (report["vowels"], list(report["seconds"])) == (6, ["read and rules", "vowels", "write"])


def test_every_effect_is_a_table_of_its_own(tmp_path):
    assert {name: schema.names for name, schema in SCHEMAS.items()} == {
        "removed": ["doc", "stage", "reason", "duplicate_of"],
        "renamed": ["doc", "id"],
        "copies": ["doc", "count"],
        "cut": ["doc", "start", "stop", "bytes"],
    }


def test_of_two_filters_that_remove_a_document_the_first_counts(corpus, tmp_path):
    """One that sees the document and one that does not look whether it is still there."""

    class Again(Vowels):
        name = "again"

        def run(self, corpus: Corpus) -> Effects:
            found = read_stage(corpus.documents).select("doc", lit("all").alias("reason"))
            return Effects("key", removed=found)

    for filters, counts in (
        ([Vowels(), Again()], {"vowels": 1, "again": 5}),
        ([Again(), Vowels()], {"vowels": 0, "again": 6}),
    ):
        output = tmp_path / filters[0].name
        report = clean(corpus, output, filters)
        found = {
            stage["stage"]: sum(reason["documents"] for reason in stage["removed"].values())
            for stage in report["stages"][2:]
        }
        assert found == counts
        assert len(rows(output / "removed")) == 6


def test_the_machinery_imports_no_filter():
    filters = {path.stem for path in DATA.glob("*.py")} - {"__init__", "runner"}
    for path in (DATA / "corpus").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                assert not {f"baichuan_jax.data.{name}" for name in filters} & names, path.name


def test_keys_are_those_of_corpora_made_before(monkeypatch):
    """Recorded when the pipeline was first released: another key would make all parts anew."""
    monkeypatch.setattr(parts_module, "__version__", "0.1.0")
    monkeypatch.setattr(parts_module, "_daft_version", lambda: "0.7.26")
    files = [["/a.jsonl", 12, 34], ["s3://b/c.jsonl.gz", 56, None]]
    kept = ["ids", "low", "documents", "documents", "sentences", "sentences"]
    select = settings.SelectConfig(pareto_alpha=9.0)
    assert {
        "input": stage_key(files),
        "read": stage_key(
            "read", "input", settings.ReadConfig(), settings.RulesConfig(), None, "report"
        ),
        "signatures": stage_key("signatures", "read", "quality", settings.DedupConfig()),
        "sentences": stage_key("sentence-keys", "read", *kept[:4], settings.SentencesConfig()),
        "select": stage_key("select", "read", "quality", *kept, select),
        "final": stage_key("final", "read", "quality", *kept),
    } == {
        "input": "63601609a6078742",
        "read": "9dc131ec29f3ad9d",
        "signatures": "0c4cb7022e087e9c",
        "sentences": "d1d3a8beb0ad6652",
        "select": "478e48e194d72572",
        "final": "e8eaeeb61af02b4b",
    }


def test_a_part_depends_on_its_settings_and_on_all_before_it(corpus, tmp_path):
    """Every stage's key, of the parts and the names that this test lists."""
    evaluation = tmp_path / "questions.txt"
    evaluation.write_text(" ".join(f"word{number}" for number in range(20)), encoding="utf-8")
    config = CorpusConfig(
        input=[str(corpus)],
        output=str(tmp_path / "o"),
        num_workers=1,
        decontaminate=settings.DecontaminateConfig([str(evaluation)]),
        select=settings.SelectConfig(pareto_alpha=9.0),
    )
    said: list[str] = []
    pipeline.run(config, progress=False, say=said.append)
    assert said == []
    folders = (tmp_path / "o" / "stages").iterdir()
    found = {}
    for folder in folders:
        key, done = folder / "key", folder / "done.json"
        is_parts = key.exists()
        found[folder.name] = key.read_text() if is_parts else json.loads(done.read_text())["key"]
    stats = [(path, path.stat()) for path in (corpus, evaluation)]
    inputs, questions = (
        stage_key([[str(path), stat.st_size, stat.st_mtime_ns]]) for path, stat in stats
    )
    card = (DATA / "quality_model" / "card.json").read_text(encoding="utf-8")

    def key(name: str, *made_from) -> str:
        return stage_key(name, *made_from)

    read = key("read", inputs, config.read, config.rules, None, config.on_error)
    ids = key("ids", read)
    quality = key("quality", read, card)
    low = key("low-quality", quality, config.quality.least)
    grams = key("evaluation-grams", read, questions, FIELDS)
    leaked = key("decontaminate", grams)
    signatures = key("signatures", read, quality, config.dedup)
    kept = [ids, low, leaked]
    documents = key("documents", signatures, *kept)
    kept += [documents, documents]  # a key for each table: removed and copies
    lines = key("sentence-keys", read, *kept, config.sentences)
    sentences = key("sentences", lines)
    kept += [sentences, sentences]  # removed and cut
    select = key("select", read, quality, *kept, config.select)
    assert found == {
        "read": read,
        "ids": ids,
        "quality": quality,
        "low-quality": low,
        "evaluation-grams": grams,
        "decontaminate": leaked,
        "signatures": signatures,
        "documents": documents,
        "sentence-keys": lines,
        "sentences": sentences,
        "select": select,
        "final": key("final", read, quality, *kept, select),
    }
    pipeline.run(config, progress=False, say=said.append)
    assert said == [
        f"{tmp_path / 'o'} was complete: every part was there already, none was made again"
    ]


def test_parts_of_another_version_are_made_anew_and_it_is_said(corpus, tmp_path, monkeypatch):
    off = {"enabled": False}
    config = CorpusConfig(
        input=[str(corpus)],
        output=str(tmp_path / "o"),
        num_workers=1,
        dedup=settings.DedupConfig(**off),
        sentences=settings.SentencesConfig(**off),
        quality=settings.QualityConfig(**off),
    )
    said: list[str] = []
    pipeline.run(config, progress=False, say=said.append)
    assert said == []
    monkeypatch.setattr(parts_module, "VERSION", parts_module.VERSION + 1)
    pipeline.run(config, progress=False, say=said.append)
    other = "are of other settings, another input or another version; they are made again"
    assert said == [f"{name}: 1 finished parts {other}" for name in ("read", "final")]
