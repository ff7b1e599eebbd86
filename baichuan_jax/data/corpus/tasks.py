"""The pipeline's work on one part of the input: what runs in a worker. Each task writes one Parquet file and returns what to count."""

import collections
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingImports]

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data import rules
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.corpus.documents import (
    Problem,
    Record,
    Slice,
    count_lines,
    read_records,
    record_id,
)
from baichuan_jax.data.corpus.engine import ROW_BITS, ParquetFile, Stage, read_part
from baichuan_jax.data.decontaminate import EvaluationSets
from baichuan_jax.data.quality import score
from baichuan_jax.data.sentences import cut

BEFORE_CUTS = (
    "quality",
    "decontaminate",
    "documents",
)  # stages that judge a document as it was before sentences were cut out
BATCH_CHARACTERS = 1 << 19  # that rules judge at once; also about a row group
EXAMPLES = 3  # of what each rule removed
EXAMPLE_CHARACTERS = 200
PROBLEM_LINES = 100  # that a report names of one file and reason in one part
DOCUMENTS = pa.schema(
    [
        ("doc", pa.int64()),
        ("id", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("source", pa.string()),
        ("lang", pa.string()),
        ("stage", pa.string()),  # "read" or "rules", where there is a reason
        ("reason", pa.string()),  # null: fit
        ("bytes", pa.int64()),  # of the text as it came
        ("clean_bytes", pa.int64()),  # of the text here
        ("text", pa.large_string()),  # null where there is a reason
    ]
)


class Tally:
    """Documents and bytes by stage and reason, with examples, of one part."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, dict[str, Any]]] = {}

    def add(self, stage: str, reason: str, size: int, example: dict[str, str]) -> None:
        """Count one document that was removed."""
        entry = self.stages.setdefault(stage, {}).setdefault(
            reason, {"documents": 0, "bytes": 0, "examples": []}
        )
        entry["documents"] += 1
        entry["bytes"] += size
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(example)


def lines(
    part: int, given: dict[str, Any], file: ParquetFile, parts: list[list[Slice]]
) -> list[int]:
    """Newlines of each of a part's slices that are byte ranges; elsewhere 0."""
    counts = [count_lines(piece) if piece.by_bytes else 0 for piece in parts[part]]
    file.write(pa.table({"newlines": counts}))
    return counts


def read(
    part: int,
    given: dict[str, Any],
    file: ParquetFile,
    parts: list[list[Slice]],
    config: CorpusConfig,
) -> dict[str, Any]:
    """Read a part, clean and judge its documents. Raises ConfigError at what cannot be read where on_error is "fail"."""
    tally = Tally()
    problems: dict[tuple[str, str], dict[str, Any]] = {}
    totals = collections.Counter()
    row = 0
    file.write(DOCUMENTS.empty_table())
    for batch in _batches(parts[part], config):
        records = [entry for entry in batch if isinstance(entry, Record)]
        for entry in batch:
            if entry.reason is not None:
                if config.on_error == "fail":
                    raise ConfigError(
                        f"{entry.path}, line {entry.line}: {entry.reason}: {entry.detail}"
                    )
                note = {
                    "file": entry.path,
                    "reason": entry.reason,
                    "count": 0,
                    "lines": [],
                    "detail": entry.detail,
                }
                problem = problems.setdefault((entry.path, entry.reason), note)
                problem["count"] += 1
                problem["lines"] = [*problem["lines"], entry.line][:PROBLEM_LINES]
        if not records:
            continue
        judged = rules.apply([record.text for record in records], config.rules)
        sizes = [len(record.text.encode()) for record in records]
        reasons = [
            record.reason or verdict
            for record, verdict in zip(records, judged["reason"].to_pylist(), strict=True)
        ]
        cleaned = judged["text"].to_pylist()
        texts = [
            text if reason is None else None for text, reason in zip(cleaned, reasons, strict=True)
        ]
        names = [record.id or record_id(record.path, record.line) for record in records]
        file.write(
            pa.table(
                {
                    "doc": pa.array(
                        range((part << ROW_BITS) + row, (part << ROW_BITS) + row + len(records)),
                        pa.int64(),
                    ),
                    "id": names,
                    "file": [record.path for record in records],
                    "line": [record.line for record in records],
                    "source": [record.source for record in records],
                    "lang": judged["lang"].cast(pa.string()),
                    "stage": [
                        None if reason is None else "read" if record.reason else "rules"
                        for record, reason in zip(records, reasons, strict=True)
                    ],
                    "reason": pa.array(reasons, pa.string()),
                    "bytes": pa.array(sizes, pa.int64()),
                    "clean_bytes": pa.array(
                        [None if text is None else len(text.encode()) for text in texts], pa.int64()
                    ),
                    "text": pa.array(texts, pa.large_string()),
                },
                schema=DOCUMENTS,
            )
        )
        row += len(records)
        for record, reason, name, size in zip(records, reasons, names, sizes, strict=True):
            totals.update(documents=1, bytes=size, without_id=record.id is None)
            if reason is None:
                totals["bytes_cut"] += size
            else:
                stage = "read" if record.reason else "rules"
                tally.add(
                    stage, reason, size, {"id": name, "text": record.text[:EXAMPLE_CHARACTERS]}
                )
        totals["bytes_cut"] -= sum(len(text.encode()) for text in texts if text is not None)
    return {"totals": totals, "problems": list(problems.values()), "stages": tally.stages}


def _batches(slices: list[Slice], config: CorpusConfig) -> Iterator[list[Record | Problem]]:
    batch: list[Record | Problem] = []
    size = 0
    for piece in slices:
        for entry in read_records(piece, config.read):
            batch.append(entry)
            size += len(entry.text) if isinstance(entry, Record) else 0
            if size >= BATCH_CHARACTERS or len(batch) >= 10_000:
                yield batch
                batch, size = [], 0
    yield batch


def score_part(
    part: int, given: dict[str, Any], file: ParquetFile, documents: Stage, model: Path
) -> int:
    """Quality of every document of a part, 0 for those that the rules removed. Returns how many were scored."""
    scored = 0
    file.write(pa.table({"doc": pa.array([], pa.int64()), "quality": pa.array([], pa.float32())}))
    for table in read_part(documents, part, ["doc", "text"]):
        texts = table["text"].to_pylist()
        fit = [index for index, text in enumerate(texts) if text is not None]
        quality = np.zeros(len(texts), np.float32)
        if fit:
            quality[fit] = score([texts[index] for index in fit], model)
        file.write(pa.table({"doc": table["doc"], "quality": pa.array(quality)}))
        scored += len(fit)
    return scored


def find_evaluation(
    part: int, given: dict[str, Any], file: ParquetFile, documents: Stage, patterns: list[str]
) -> int:
    """The 13-grams that a part's documents share with evaluation files, for documents that share any. Returns how many do."""
    sets = _evaluation_sets(tuple(patterns))
    found = []
    for table in read_part(documents, part, ["doc", "text"]):
        for doc, text in zip(table["doc"].to_pylist(), table["text"].to_pylist(), strict=True):
            if text is not None and len(grams := sets.find(text)):
                found.append((doc, grams.view(np.int64)))
    schema = pa.schema([("doc", pa.int64()), ("grams", pa.list_(pa.int64()))])
    file.write(schema.empty_table())
    file.write(_table(found, schema))
    return len(found)


@functools.lru_cache(maxsize=1)
def _evaluation_sets(patterns: tuple[str, ...]) -> EvaluationSets:
    return EvaluationSets(list(patterns))


FINAL = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("source", pa.string()),
        ("lang", pa.string()),
        ("quality", pa.float32()),
        ("frequency", pa.int64()),
    ]
)
REMOVED = pa.schema(
    [
        ("id", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)


def finish(
    part: int,
    given: dict[str, Any],
    file: ParquetFile,
    stage: Stage,
    documents: Stage,
    quality: Stage | None,
) -> dict[str, Any]:
    """Write a part's documents that are left into final/, and the others with stage and reason into removed/.

    given["events"] says what stages found, as dicts of doc, what, stage, name, other, start, stop.
    `what` is one of: removed (name: the reason, other: the document it is like), frequency (start:
    how many there were), renamed (name: the new id), cut (start and stop: characters that go).
    """
    events: dict[int, list[dict[str, Any]]] = {}
    for event in given["events"] or []:
        events.setdefault(event["doc"], []).append(event)
    tally = Tally()
    totals = collections.Counter(documents=0, bytes=0, bytes_cut=0)
    with ParquetFile(stage.file(part, 1)) as removed_file:
        file.write(FINAL.empty_table())
        removed_file.write(REMOVED.empty_table())
        scored = read_part(quality, part) if quality else itertools.repeat(None)
        for table, scores_of in zip(read_part(documents, part), scored, strict=quality is not None):
            scores = [0.0] * len(table) if scores_of is None else scores_of["quality"].to_pylist()
            final, removed = [], []
            for number, row in enumerate(table.to_pylist()):
                told = {
                    event["what"]: event
                    for event in events.get(row["doc"], ())
                    if event["what"] != "cut"
                }
                name = told["renamed"]["name"] if "renamed" in told else row["id"]
                if row["reason"] is not None:
                    removed.append((name, row["stage"], row["reason"], None))
                    continue
                text, gone = row["text"], told.get("removed")
                if gone is None or gone["stage"] not in BEFORE_CUTS:
                    spans = [
                        (event["start"], event["stop"])
                        for event in events.get(row["doc"], ())
                        if event["what"] == "cut"
                    ]
                    text = cut(text, spans)
                    totals["bytes_cut"] += len(row["text"].encode()) - len(text.encode())
                if gone is None:
                    frequency = told["frequency"]["start"] if "frequency" in told else 1
                    final.append(
                        (name, text, row["source"], row["lang"], scores[number], frequency)
                    )
                    totals.update(documents=1, bytes=len(text.encode()))
                else:
                    removed.append((name, gone["stage"], gone["name"], gone["other"]))
                    example = {"id": name, "text": row["text"][:EXAMPLE_CHARACTERS]}
                    if gone["other"] is not None:
                        example["duplicate_of"] = gone["other"]
                    tally.add(gone["stage"], gone["name"], len(text.encode()), example)
            file.write(_table(final, FINAL))
            removed_file.write(_table(removed, REMOVED))
    return {"totals": totals, "stages": tally.stages}


def _table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
        schema=schema,
    )
