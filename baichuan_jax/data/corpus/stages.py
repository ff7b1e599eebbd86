"""The pipeline's plan: its stages in order, what each is made from, and what they tell each other."""

import collections
import glob
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import numpy as np
from daft import DataFrame, DataType, Expression, col, lit  # pyright: ignore[reportMissingImports]

from baichuan_jax.data import near_duplicates as dedup
from baichuan_jax.data import rules, sentences
from baichuan_jax.data import selection as select
from baichuan_jax.data.corpus import tasks
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.corpus.documents import Slice, find_inputs, make_parts, record_id
from baichuan_jax.data.corpus.engine import ROW_BITS, Engine, Stage, read_table, stage_key
from baichuan_jax.data.decontaminate import EvaluationSets
from baichuan_jax.data.quality import MODEL, score

STAGES = ("read", "rules", "quality", "decontaminate", "documents", "sentences", "select")
SHOWN_DUPLICATE_IDS = 1000  # by file and line in the report; all are counted


class Plan:
    """One run of the pipeline over its input."""

    def __init__(self, config: CorpusConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.output = Path(config.output)
        rules.limits_of(config.rules)  # refuses what is wrong before hours of work
        self.phrases = config.rules.blocked_phrases and rules.blocked_pattern(
            config.rules.blocked_phrases
        )
        self.model = Path(config.quality.model or MODEL)
        if config.quality.enabled:
            score([], self.model)
        self.files = find_inputs(config.input)
        self.parts = make_parts(self.files)
        self.numbers = list(range(len(self.parts)))
        # A file that changes in place is another input; object storage tells no time that could be
        # compared.
        self.input_key = stage_key(
            [
                [path, size, None if "://" in path else os.stat(path).st_mtime_ns]
                for path, size in self.files
            ]
        )
        self.seconds: dict[str, float] = {}
        self.events: list[
            DataFrame
        ] = []  # what stages say of documents (tasks.EVENT), for the last one to act on
        self.keys: list[str] = []  # of the stages that said it

    def run(self) -> dict[str, Any]:
        """All stages; the report."""
        with self.timed("read and rules"):
            documents, read = self.read()
            repeated_ids = self.rename(documents)
        with self.timed("quality"):
            quality = self.quality(documents)
            leaked = self.decontaminate(documents)
        with self.timed("documents"):
            self.documents(documents, quality)
        with self.timed("sentences"):
            cuts = self.sentences(documents)
        with self.timed("select"):
            self.select(documents, quality, cuts)
        with self.timed("write"):
            finished = self.finish(documents, quality)
        return self.report(read, repeated_ids, finished) | {"evaluation_sets": leaked}

    def stage(self, name: str, *made_from: Any) -> Stage:
        return Stage(self.output / "stages" / name, stage_key(name, *made_from))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)

    def tell(self, by: Stage, frame: DataFrame, what: str, **columns: Expression) -> None:
        """Add events of one kind; columns that are not given are null."""
        fields = [
            columns.get(name, lit(None)).cast(kind).alias(name) for name, kind in EVENT.items()
        ]
        self.events.append(frame.select(col("doc"), lit(what).alias("what"), *fields))
        self.keys.append(by.key)

    def read(self) -> tuple[Stage, list[dict[str, Any]]]:
        """Read, clean and judge every document."""
        parts = self.parts
        if any(piece.by_bytes for part in parts for piece in part):
            counts = self.engine.run(
                self.stage("lines", self.input_key), tasks.lines, self.numbers, None, parts
            )
            parts = _numbered(parts, counts)
        stage = self.stage(
            "read",
            self.input_key,
            self.config.read,
            self.config.rules,
            self.phrases,
            self.config.on_error,
        )
        return stage, self.engine.run(stage, tasks.read, self.numbers, None, parts, self.config)

    def rename(self, documents: Stage) -> DataFrame:
        """Documents whose id an earlier one has (`doc, id, file, line`); each gets another id, so that ids name documents."""

        def find() -> DataFrame:
            named = read_table(documents).select("doc", "id", "file", "line")
            several = named.groupby("id").agg(
                col("doc").count().alias("count"), col("doc").min().alias("first")
            )
            several = several.where(col("count") > lit(1)).select("id", "first")
            return (
                named.join(several, on="id")
                .where(col("doc") > col("first"))
                .select("doc", "id", "file", "line")
            )

        stage = self.stage("ids", documents.key)
        table = self.engine.table(stage, find)
        self.tell(stage, table, "renamed", name=_new_id(col("file"), col("line")))
        return table

    def quality(self, documents: Stage) -> Stage | None:
        """Score every document."""
        if not self.config.quality.enabled:
            return None
        stage = self.stage(
            "quality", documents.key, (self.model / "card.json").read_text(encoding="utf-8")
        )
        self.engine.run(stage, tasks.score_part, self.numbers, None, documents, self.model)
        least = self.config.quality.least
        fit = (
            read_table(documents)
            .where(col("reason").is_null())
            .select("doc", "source", "lang")
            .join(read_table(stage), on="doc")
        )
        low = self.stage("low-quality", stage.key, least)
        table = self.engine.table(low, lambda: select.low_quality(fit, least))
        self.tell(low, table, "removed", stage=lit("quality"), name=lit("low_quality"))
        return stage

    def decontaminate(self, documents: Stage) -> dict[str, Any]:
        """Find documents that hold text of evaluation sets. Returns how many items there are of each, and how many are too short."""
        patterns = self.config.decontaminate.files
        if not patterns:
            return {}
        sets = EvaluationSets(patterns)
        stage = self.stage("evaluation-grams", documents.key, _files_key(patterns))
        self.engine.run(stage, tasks.find_evaluation, self.numbers, None, documents, patterns)

        def judge() -> DataFrame:
            found = {
                row["doc"]: np.array(row["grams"], np.int64).view(np.uint64)
                for row in read_table(stage).to_pylist()
            }
            leaked = sets.judge(found)
            table = daft.from_pydict(
                {"doc": list(leaked), "task": [" ".join(held) for held in leaked.values()]}
            )
            return table.select(
                col("doc").cast(DataType.int64()), col("task").cast(DataType.string())
            )

        leaked = self.stage("decontaminate", stage.key)
        self.tell(
            leaked,
            self.engine.table(leaked, judge),
            "removed",
            stage=lit("decontaminate"),
            name=col("task"),
        )
        return {
            task: {"items": count, "too_short": sets.short[task]}
            for task, count in sorted(sets.items.items())
        }

    def documents(self, documents: Stage, quality: Stage | None) -> None:
        """Find near-duplicate documents."""
        config = self.config.dedup
        if not config.enabled:
            return
        stage = self.stage("signatures", documents.key, quality and quality.key, config)
        self.engine.run(stage, dedup.signatures, self.numbers, None, documents, quality, config)
        signatures = read_table(stage).join(self.removed(), on="doc", how="anti")
        stage = self.stage("documents", stage.key, *self.keys)
        found = self.engine.table(
            stage,
            lambda: self.named(dedup.find_duplicates(self.engine, signatures, config), documents),
        )
        self.tell(
            stage,
            found,
            "removed",
            stage=lit("documents"),
            name=lit("near_duplicate"),
            other=col("kept_id"),
        )
        copies = found.groupby("kept").agg(col("doc").count().alias("count"))
        self.tell(
            stage,
            copies.select(col("kept").alias("doc"), "count"),
            "frequency",
            start=col("count") + lit(1),
        )

    def sentences(self, documents: Stage) -> DataFrame | None:
        """Find sentences that occur again, and documents of which they leave too little. Returns (doc, start, stop, bytes)."""
        config = self.config.sentences
        if not config.enabled:
            return None
        stage = self.stage("sentence-keys", documents.key, *self.keys, config)
        gone = (
            self.removed()
            .select(_part(), col("doc").alias("gone"))
            .groupby("part")
            .agg(col("gone").list_agg())
        )
        counts = self.engine.run(
            stage, sentences.find_sentences, self.numbers, gone, documents, config
        )
        compared, anchors = (
            sum(count[name] for count in counts) for name in ("compared", "anchors")
        )
        table = read_table(stage)

        def find() -> DataFrame:
            cuts, emptied = sentences.find_repeated(self.engine, table, compared, anchors, config)
            none = lit(None).cast(DataType.int64())
            return cuts.concat(
                emptied.select("doc", *(none.alias(name) for name in ("start", "stop", "bytes")))
            )

        stage = self.stage("sentences", stage.key)
        found = self.engine.table(stage, find)
        self.tell(
            stage,
            found.where(col("start").is_null()),
            "removed",
            stage=lit("sentences"),
            name=lit("too_little_left"),
        )
        cuts = found.where(~col("start").is_null())
        self.tell(stage, cuts, "cut", start=col("start"), stop=col("stop"))
        return cuts

    def select(self, documents: Stage, quality: Stage | None, cuts: DataFrame | None) -> None:
        """Sample by quality, and keep to each category's budget."""
        config = self.config.select
        if config.pareto_alpha is None and not config.max_bytes:
            return
        zero = lit(0).cast(DataType.int64())
        left = (
            read_table(documents)
            .where(col("reason").is_null())
            .select("doc", "id", "source", col("clean_bytes").alias("bytes"))
        )
        left = left.join(self.removed(), on="doc", how="anti")
        if cuts is not None:
            cut = cuts.groupby("doc").agg(col("bytes").sum().alias("cut"))
            left = (
                left.join(cut, on="doc", how="left")
                .with_column("bytes", col("bytes") - F.coalesce(col("cut"), zero))
                .exclude("cut")
            )
        copies = (
            self.told()
            .where(col("what") == lit("frequency"))
            .select("doc", col("start").alias("frequency"))
        )
        left = left.join(copies, on="doc", how="left").with_column(
            "frequency", F.coalesce(col("frequency"), zero + lit(1))
        )
        if quality is None:
            left = left.with_column("quality", lit(0.0))
        else:
            left = left.join(read_table(quality), on="doc")
        stage = self.stage("select", documents.key, quality and quality.key, *self.keys, config)
        table = self.engine.table(stage, lambda: select.select(self.engine, left, config))
        self.tell(stage, table, "removed", stage=lit("select"), name=col("reason"))

    def removed(self) -> DataFrame:
        """Documents that stages have removed so far, those that the rules removed aside."""
        return self.told().where(col("what") == lit("removed")).select("doc")

    def told(self) -> DataFrame:
        """All events so far."""
        events = self.events[0]
        for more in self.events[1:]:
            events = events.concat(more)
        return events

    def named(self, pairs: DataFrame, documents: Stage) -> DataFrame:
        """Pairs (doc, kept) with the kept document's id."""
        renamed = self.events[0].select("doc", col("name").alias("new"))
        names = read_table(documents).select("doc", "id").join(renamed, on="doc", how="left")
        names = names.select(
            col("doc").alias("kept"), F.coalesce(col("new"), col("id")).alias("kept_id")
        )
        return pairs.join(names, on="kept").select("doc", "kept", "kept_id")

    def finish(self, documents: Stage, quality: Stage | None) -> list[dict[str, Any]]:
        """Write final/ and removed/."""
        struct = F.to_struct(col("doc"), col("what"), *(col(name) for name in EVENT))
        by_part = (
            self.told()
            .select(_part(), struct.alias("events"))
            .groupby("part")
            .agg(col("events").list_agg())
        )
        stage = self.stage("final", documents.key, quality and quality.key, *self.keys)
        stage = replace(stage, outputs=(self.output / "final", self.output / "removed"))
        return self.engine.run(
            stage, tasks.finish, self.numbers, by_part, stage, documents, quality
        )

    def report(
        self, read: list[dict[str, Any]], repeated_ids: DataFrame, finished: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Counts of every stage, in order: documents and bytes in and out, and by reason, with examples; and all problems."""
        totals = _sum(result["totals"] for result in read)
        final = _sum(result["totals"] for result in finished)
        left = {"documents": totals["documents"], "bytes": totals["bytes"]}
        stages = []
        for name in STAGES:
            results = [
                result["stages"].get(name, {})
                for result in (read if name in ("read", "rules") else finished)
            ]
            entry: dict[str, Any] = {
                "stage": name,
                "documents_in": left["documents"],
                "bytes_in": left["bytes"],
                "removed": {},
            }
            for result in results:
                for reason, found in result.items():
                    known = entry["removed"].setdefault(
                        reason, {"documents": 0, "bytes": 0, "examples": []}
                    )
                    known["documents"] += found["documents"]
                    known["bytes"] += found["bytes"]
                    known["examples"] = (known["examples"] + found["examples"])[: tasks.EXAMPLES]
            entry["bytes_cut"] = {
                "rules": totals["bytes_cut"],
                "sentences": final["bytes_cut"],
            }.get(name, 0)
            left["documents"] -= sum(found["documents"] for found in entry["removed"].values())
            left["bytes"] -= (
                sum(found["bytes"] for found in entry["removed"].values()) + entry["bytes_cut"]
            )
            stages.append({**entry, "documents_out": left["documents"], "bytes_out": left["bytes"]})
        assert left == {"documents": final["documents"], "bytes": final["bytes"]}, (left, final)
        return {
            "input": {
                "files": len(self.files),
                "parts": len(self.parts),
                **{name: totals[name] for name in ("documents", "bytes", "without_id")},
            },
            "final": {"documents": final["documents"], "bytes": final["bytes"]},
            "stages": stages,
            "problems": _problems(read, repeated_ids),
            "seconds": self.seconds,
            "workers": self.engine.num_workers,
            "daft": daft.__version__,
        }


def _sum(totals: Iterable[dict[str, int]]) -> collections.Counter:
    result: collections.Counter = collections.Counter()
    for each in totals:
        result.update(each)
    return result


def _problems(read: list[dict[str, Any]], repeated_ids: DataFrame) -> list[dict[str, Any]]:
    """What was wrong with the input: by file and reason how often, and on which lines."""
    problems: dict[tuple[str, str], dict[str, Any]] = {}
    found = [problem for result in read for problem in result["problems"]]
    for row in repeated_ids.sort("doc").limit(SHOWN_DUPLICATE_IDS).to_pylist():
        found.append(
            {
                "file": row["file"],
                "reason": "duplicate_id",
                "count": 0,
                "lines": [row["line"]],
                "detail": f"id {row['id']!r}",
            }
        )
    for row in (
        repeated_ids.groupby("file").agg(col("doc").count().alias("count")).sort("file").to_pylist()
    ):
        found.append(
            {
                "file": row["file"],
                "reason": "duplicate_id",
                "count": row["count"],
                "lines": [],
                "detail": "",
            }
        )
    for problem in found:
        known = problems.setdefault(
            (problem["file"], problem["reason"]), {**problem, "count": 0, "lines": []}
        )
        known["count"] += problem["count"]
        known["lines"] = (known["lines"] + problem["lines"])[: tasks.PROBLEM_LINES]
    return [problems[key] for key in sorted(problems)]


EVENT = {  # beside `doc` and `what`; tasks.finish says what they mean
    "stage": DataType.string(),
    "name": DataType.string(),
    "other": DataType.string(),
    "start": DataType.int64(),
    "stop": DataType.int64(),
}


def _files_key(patterns: list[str]) -> str:
    paths = sorted({path for pattern in patterns for path in glob.glob(pattern, recursive=True)})
    return stage_key([[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths])


def _part() -> Expression:
    """The part of a document."""
    return F.shift_right(col("doc"), lit(ROW_BITS)).alias("part")


@daft.func(return_dtype=DataType.string())
def _new_id(path: str, line: int) -> str:
    return record_id(path, line)


def _numbered(parts: list[list[Slice]], counts: list[list[int]]) -> list[list[Slice]]:
    """Parts whose slices of plain files know how many lines come before."""
    before: collections.Counter = collections.Counter()
    result: list[list[Slice]] = []
    for part, newlines in zip(parts, counts, strict=True):
        result.append([])
        for piece, count in zip(part, newlines, strict=True):
            result[-1].append(
                replace(piece, first_line=before[piece.path] + 1) if piece.by_bytes else piece
            )
            before[piece.path] += count
    return result
