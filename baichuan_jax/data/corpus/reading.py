"""The first stage: input files become part files of clean documents, each judged alone.

Input: slices of files (documents/files.py). Output: a file of DOCUMENTS for each part, in the order
of the input, where a document that cannot be read or breaks a rule has a stage and a reason in
place of its text. What is wrong with the input is counted by file, reason and line. Then documents
whose id an earlier one has get another, so that ids name documents in everything that follows.
"""

import collections
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import daft  # pyright: ignore[reportMissingImports]
import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft import DataFrame, DataType, col, lit  # pyright: ignore[reportMissingImports]

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.corpus.effects import Effects
from baichuan_jax.data.corpus.filter import Cleaner, Corpus
from baichuan_jax.data.corpus.parts import DOCUMENTS, ROW_BITS, ParquetFile, Stage, stage_key
from baichuan_jax.data.corpus.report import ProblemCounts, Tally
from baichuan_jax.data.corpus.stages import Stages, require_outside
from baichuan_jax.data.corpus.tables import read_stage
from baichuan_jax.documents.files import (
    Slice,
    count_lines,
    find_inputs,
    make_parts,
    require_unchanged,
)
from baichuan_jax.documents.reader import (
    UNREADABLE,
    Document,
    Fields,
    Problem,
    document_id,
    read_documents,
)

STAGE = "read"
# Of text, about, that a part holds: some ten seconds of work, so that little is lost by a kill and
# few parts are left at the end, when workers run out of them.
PART_BYTES = 16 << 20
# What the cleaner judges at once; also about a row group. Its cost a text falls until here.
BATCH_CHARACTERS = 1 << 19
BATCH_DOCUMENTS = 10_000


@dataclass(frozen=True)
class Input:
    """What was read: the results of the parts, and documents that had an earlier one's id."""

    files: int
    parts: int
    results: list[dict[str, Any]]
    repeated_ids: DataFrame  # doc, id, file, line


def read_corpus(stages: Stages, config: CorpusConfig, cleaner: Cleaner) -> tuple[Corpus, Input]:
    """Read, clean and judge every document, and give each an id of its own."""
    files = find_inputs(config.input)
    require_outside(files, stages.output)
    parts = make_parts({path: state.size for path, state in files.items()}, PART_BYTES)
    # A file that changes in place is another input.
    described = [[path, *state] for path, state in files.items()]
    input_key = stage_key(described)
    # A problem is reported by its line in the file, which a slice that begins in the middle of a
    # file cannot know. To count newlines first is fast beside cleaning.
    if any(piece.by_bytes for part in parts for piece in part):
        lines = stages.stage("lines", [input_key])
        parts = _numbered(parts, stages.run_parts(lines, _count_newlines, parts))
    names = config.read
    fields = Fields(names.text_field, names.id_field, names.source_field, names.max_line_bytes)
    work = functools.partial(
        _read_part, fields=fields, cleaner=cleaner, fail=config.on_error == "fail"
    )
    documents = stages.stage(STAGE, [input_key, config.read, *cleaner.key, config.on_error])
    if missed := _unread_by_system(documents, len(parts)):
        why = f"an earlier version has left out {missed}, which the system could not read then"
        stages.forget(documents, why)
    results = stages.run_parts(documents, work, list(enumerate(parts)))
    require_unchanged(files)
    key, repeated = stages.make_table("ids", [documents.key], lambda: _repeated_ids(documents))
    corpus = Corpus(stages, documents, len(parts))
    renamed = repeated.select("doc", _new_id(col("file"), col("line")).alias("id"))
    corpus.apply(STAGE, Effects(key, renamed=renamed))
    return corpus, Input(len(files), len(parts), results, repeated)


def _unread_by_system(documents: Stage, parts: int) -> str | None:
    """A file that is missing in the finished parts through an error of the system.

    Earlier versions kept them as if the file were damaged, and it was never read again.
    """
    for number in range(parts):
        for problem in (documents.record(number) or {"problems": []})["problems"]:
            of_system = problem["detail"].startswith("reading stopped: [Errno ")
            if problem["reason"] == UNREADABLE and of_system:
                return problem["file"]
    return None


def _count_newlines(slices: list[Slice], file: ParquetFile) -> list[int]:
    """Newlines of each of a part's slices that are ranges of bytes; elsewhere 0."""
    counts = [count_lines(piece) if piece.by_bytes else 0 for piece in slices]
    # The counts are the result; the file only says that the part is done.
    file.write(pa.table({"newlines": counts}))
    return counts


def _numbered(parts: list[list[Slice]], counts: list[list[int]]) -> list[list[Slice]]:
    """Parts whose slices of plain files know how many lines come before."""
    before: collections.Counter[str] = collections.Counter()
    result: list[list[Slice]] = []
    for part, newlines in zip(parts, counts, strict=True):
        result.append([])
        for piece, count in zip(part, newlines, strict=True):
            first = before[piece.path] + 1
            result[-1].append(replace(piece, first_line=first) if piece.by_bytes else piece)
            before[piece.path] += count
    return result


def _read_part(
    part: tuple[int, list[Slice]],
    file: ParquetFile,
    *,
    fields: Fields,
    cleaner: Cleaner,
    fail: bool,
) -> dict[str, Any]:
    """Write a part's documents. `fail`: raise ConfigError at the first problem."""
    number, slices = part
    tally, problems = Tally(), ProblemCounts()
    totals = collections.Counter(documents=0, bytes=0, without_id=0, bytes_cut=0)
    # A part without a document has a file too, with its columns.
    file.write(DOCUMENTS.empty_table())
    for batch in _batches(slices, fields):
        for entry in batch:
            if isinstance(entry, Problem):
                if fail:
                    raise ConfigError(str(entry))
                problems.add(entry.path, entry.reason, [entry.line], entry.detail)
        entries = [entry for entry in batch if isinstance(entry, Document) or entry.is_document]
        if entries:
            first = (number << ROW_BITS) + totals["documents"]
            table = _judged(entries, first, cleaner)
            file.write(table)
            _count(table, entries, totals, tally)
    return {"totals": totals, "problems": problems.entries, "stages": tally.stages}


def _judged(entries: list[Document | Problem], first: int, cleaner: Cleaner) -> pa.Table:
    """A batch as rows of DOCUMENTS, numbered from `first`."""
    # A problem is judged as an empty text, whose verdict is then not used: so all columns have the
    # same length.
    texts = [entry.text if isinstance(entry, Document) else "" for entry in entries]
    judged = cleaner.clean(texts)
    stages: list[str | None] = []
    reasons: list[str | None] = []
    for entry, verdict in zip(entries, judged["reason"].to_pylist(), strict=True):
        unread = isinstance(entry, Problem)
        reasons.append(entry.reason if unread else verdict)
        # What cannot be read is no matter for the rules.
        stages.append(STAGE if unread else None if verdict is None else cleaner.name)
    cleaned = [
        text if reason is None else None
        for text, reason in zip(judged["text"].to_pylist(), reasons, strict=True)
    ]
    columns = {
        "doc": range(first, first + len(entries)),
        "id": [entry.id or document_id(entry.path, entry.line) for entry in entries],
        "file": [entry.path for entry in entries],
        "line": [entry.line for entry in entries],
        "source": [entry.source for entry in entries],
        "lang": judged["lang"].to_pylist(),
        "stage": stages,
        "reason": reasons,
        "bytes": [len(text.encode()) for text in texts],
        "clean_bytes": [None if text is None else len(text.encode()) for text in cleaned],
        "text": cleaned,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in DOCUMENTS]
    return pa.table(arrays, schema=DOCUMENTS)


def _count(
    table: pa.Table,
    entries: list[Document | Problem],
    totals: collections.Counter[str],
    tally: Tally,
) -> None:
    """Add a batch to the counts of its part."""
    counted = table.select(["id", "stage", "reason", "bytes", "clean_bytes"]).to_pylist()
    for entry, row in zip(entries, counted, strict=True):
        totals.update(documents=1, bytes=row["bytes"], without_id=entry.id is None)
        if row["reason"] is None:
            totals["bytes_cut"] += row["bytes"] - row["clean_bytes"]
        else:
            text = entry.text if isinstance(entry, Document) else ""
            tally.add(row["stage"], row["reason"], row["bytes"], row["id"], text)


def _batches(slices: list[Slice], fields: Fields) -> Iterator[list[Document | Problem]]:
    batch: list[Document | Problem] = []
    size = 0
    for piece in slices:
        for entry in read_documents(piece, fields):
            batch.append(entry)
            size += len(entry.text) if isinstance(entry, Document) else 0
            if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    yield batch


def _repeated_ids(documents: Stage) -> DataFrame:
    """(doc, id, file, line) of documents whose id an earlier one has."""
    named = read_stage(documents).select("doc", "id", "file", "line")
    # Grouped first: the join then only concerns ids that occur twice.
    several = named.groupby("id").agg(
        col("doc").count().alias("count"), col("doc").min().alias("first")
    )
    several = several.where(col("count") > lit(1)).select("id", "first")
    repeated = named.join(several, on="id").where(col("doc") > col("first"))
    return repeated.select("doc", "id", "file", "line")


@daft.func(return_dtype=DataType.string())
def _new_id(path: str, line: int) -> str:
    return document_id(path, line)
