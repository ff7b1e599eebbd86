"""What became of a corpus, in numbers: the content of report.json.

Counts are made by part, where the documents are, and added up here: documents and bytes that each
stage was given, removed by reason, and passed on, with examples; and all problems of the input.
"""

import collections
from collections.abc import Iterable
from typing import Any

from daft import DataFrame, col  # pyright: ignore[reportMissingImports]

# Of what each reason removed: enough to see whether it is right, few enough to be read.
EXAMPLES = 3
EXAMPLE_CHARACTERS = 200
# Lines that the report names of one file and reason; all are counted.
PROBLEM_LINES = 100
# Documents with a repeated id that the report names by file and line; all are counted.
SHOWN_DUPLICATE_IDS = 1000


class Tally:
    """Removed documents and their bytes by stage and reason, with examples."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, dict[str, Any]]] = {}

    def add(
        self,
        stage: str,
        reason: str,
        size: int,
        name: str,
        text: str,
        duplicate_of: str | None = None,
    ) -> None:
        """Count one document of `size` bytes."""
        example = {"id": name, "text": text[:EXAMPLE_CHARACTERS]}
        if duplicate_of is not None:
            example["duplicate_of"] = duplicate_of
        self.merge(stage, reason, {"documents": 1, "bytes": size, "examples": [example]})

    def merge(self, stage: str, reason: str, found: dict[str, Any]) -> None:
        """Add counts of one stage and reason."""
        entry = self.stages.setdefault(stage, {}).setdefault(
            reason, {"documents": 0, "bytes": 0, "examples": []}
        )
        entry["documents"] += found["documents"]
        entry["bytes"] += found["bytes"]
        # The first ones: parts are merged in order, so any number of workers shows the same ones.
        entry["examples"] += found["examples"][: EXAMPLES - len(entry["examples"])]


class ProblemCounts:
    """What was wrong with the input: by file and reason how often, and on which lines."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def add(
        self, file: str, reason: str, lines: list[int], detail: str, count: int | None = None
    ) -> None:
        """Count problems; `count`: how many, where not all lines are named."""
        entry = self._found.setdefault(
            (file, reason),
            {"file": file, "reason": reason, "count": 0, "lines": [], "detail": detail},
        )
        entry["count"] += len(lines) if count is None else count
        # The first lines, in the order of the file.
        entry["lines"] += lines[: PROBLEM_LINES - len(entry["lines"])]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """By file, then reason."""
        return [self._found[key] for key in sorted(self._found)]


def count_problems(results: list[dict[str, Any]], repeated_ids: DataFrame) -> list[dict[str, Any]]:
    """Problems of all parts, and documents (doc, id, file, line) whose id an earlier one has."""
    problems = ProblemCounts()
    for result in results:
        for found in result["problems"]:
            problems.add(*(found[name] for name in ("file", "reason", "lines", "detail", "count")))
    shown = repeated_ids.sort("doc").limit(SHOWN_DUPLICATE_IDS).to_pylist()
    for row in shown:
        problems.add(row["file"], "duplicate_id", [row["line"]], f"id {row['id']!r}", count=0)
    # All are counted, by file, without a row for each in memory.
    counts = repeated_ids.groupby("file").agg(col("doc").count().alias("count"))
    for row in counts.sort("file").to_pylist():
        problems.add(row["file"], "duplicate_id", [], "", row["count"])
    return problems.entries


def make_funnel(
    stages: list[str],
    first: list[dict[str, Any]],
    last: list[dict[str, Any]],
    cleaner: str,
    cutter: str | None,
) -> dict[str, Any]:
    """Documents and bytes of the input, of what is left, and into and out of each stage.

    `first`, `last`: results of the first and the last stage's parts. They count what was removed,
    and how many bytes were cut out of documents that stay: by the `cleaner` while they were read,
    and for the filter `cutter` when they were written.
    """
    totals = _sum(result["totals"] for result in first)
    final = _sum(result["totals"] for result in last)
    tally = Tally()
    for result in [*first, *last]:
        for stage, reasons in result["stages"].items():
            for reason, found in reasons.items():
                tally.merge(stage, reason, found)
    cut = {cutter: final["bytes_cut"], cleaner: totals["bytes_cut"]}
    # What one stage leaves is what the next is given.
    documents, size = totals["documents"], totals["bytes"]
    entries = []
    for stage in stages:
        removed = tally.stages.get(stage, {})
        entry = {"stage": stage, "documents_in": documents, "bytes_in": size, "removed": removed}
        documents -= sum(found["documents"] for found in removed.values())
        size -= sum(found["bytes"] for found in removed.values()) + cut.get(stage, 0)
        entry |= {"bytes_cut": cut.get(stage, 0), "documents_out": documents, "bytes_out": size}
        entries.append(entry)
    # Every document is counted once: what the stages leave is what was written.
    assert (documents, size) == (final["documents"], final["bytes"]), (documents, size, final)
    counted = {name: totals[name] for name in ("documents", "bytes", "without_id")}
    left = {"documents": final["documents"], "bytes": final["bytes"]}
    return {"input": counted, "final": left, "stages": entries}


def _sum(totals: Iterable[dict[str, int]]) -> collections.Counter[str]:
    result: collections.Counter[str] = collections.Counter()
    for each in totals:
        result.update(each)
    return result
