"""The last stage: the effects of all filters are carried out on the documents' text.

Input: the read documents and the effects on them. Output, for each part of the input, a file in
final/ and one in removed/: every document is in exactly one of them, with its text or with the
stage and reason that removed it.
"""

import collections
import functools
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.effects import SPACE
from baichuan_jax.data.corpus.filter import Corpus
from baichuan_jax.data.corpus.parts import DocumentPart, ParquetFile, Stage, table_of
from baichuan_jax.data.corpus.report import Tally

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


def write_corpus(corpus: Corpus, filters: list[str]) -> list[dict[str, Any]]:
    """Write final/ and removed/; counts of every part. `filters`: their names, in order."""
    output = corpus.stages.output
    outputs = (output / "final", output / "removed")
    key = [corpus.documents.key, corpus.scores_key, *corpus.effects.keys]
    # The effects' keys stand for all filters and their settings.
    stage = corpus.stages.stage("final", key, outputs)
    work = functools.partial(_write_part, stage=stage, filters=filters)
    return corpus.finish(stage, work, with_effects=True)


@dataclass(frozen=True)
class _Fates:
    """The effects on the documents of one part, by document."""

    removed: dict[int, dict[str, Any]]
    renamed: dict[int, str]
    copies: dict[int, int]
    cut: dict[int, list[tuple[int, int]]]


def _read_fates(part: DocumentPart, filters: list[str]) -> _Fates:
    # Two filters that look at the same documents may both remove one. The first in their order is
    # the one that the report counts, whatever the order of the rows in the table.
    removals = sorted(part.effect("removed"), key=lambda row: -filters.index(row["stage"]))
    # A document may have many cuts, and one of everything else.
    cuts: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for row in part.effect("cut"):
        cuts[row["doc"]].append((row["start"], row["stop"]))
    return _Fates(
        removed={row["doc"]: row for row in removals},
        renamed={row["doc"]: row["id"] for row in part.effect("renamed")},
        copies={row["doc"]: row["count"] for row in part.effect("copies")},
        cut=cuts,
    )


def _write_part(
    part: DocumentPart, file: ParquetFile, *, stage: Stage, filters: list[str]
) -> dict[str, Any]:
    fates = _read_fates(part, filters)
    tally = Tally()
    totals = collections.Counter(documents=0, bytes=0, bytes_cut=0)
    # removed/ first: the runner publishes final/ and then the record, which makes the part done.
    with ParquetFile(stage.file(part.number, 1)) as removed_file:
        file.write(FINAL.empty_table())
        removed_file.write(REMOVED.empty_table())
        for table, scores in part.read_scored():
            final, removed = [], []
            for row, quality in zip(table.to_pylist(), scores.tolist(), strict=True):
                doc = row["doc"]
                # By its new id everywhere, in removed/ too: ids name documents.
                name = fates.renamed.get(doc) or row["id"]
                if row["reason"] is not None:  # the first stage has counted it
                    removed.append((name, row["stage"], row["reason"], None))
                    continue
                # Removed documents are cut too: the filter that removed one may have seen it so,
                # and the report counts what each stage was given.
                text = cut(row["text"], fates.cut.get(doc, []))
                size = len(text.encode())
                totals["bytes_cut"] += row["clean_bytes"] - size
                fate = fates.removed.get(doc)
                if fate is None:
                    frequency = fates.copies.get(doc, 1)
                    final.append((name, text, row["source"], row["lang"], quality, frequency))
                    totals.update(documents=1, bytes=size)
                else:
                    why = (fate["stage"], fate["reason"])
                    removed.append((name, *why, fate["duplicate_of"]))
                    tally.add(*why, size, name, row["text"], fate["duplicate_of"])
            # A row group for each that was read: memory holds one.
            file.write(table_of(final, FINAL))
            removed_file.write(table_of(removed, REMOVED))
    return {"totals": totals, "stages": tally.stages}


def cut(text: str, spans: list[tuple[int, int]]) -> str:
    """A text without these (start, stop); what stays keeps its spaces, lines and indentation.

    A line that loses all its text is lost with its end, and a blank line where two would meet.
    """
    merged: list[list[int]] = []
    for start, stop in sorted(spans):
        # The space after a sentence leaves with it, else two spaces would meet.
        while stop < len(text) and text[stop] in SPACE:
            stop += 1
        # Two sentences in a row become one cut, so that a line of them is seen to be empty.
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    kept = []
    place = 0
    for start, stop in merged:
        # The cut ends a line: no space is left at its end, and no empty line in its place.
        if stop == len(text) or text[stop] == "\n":
            while start > place and text[start - 1] in SPACE:
                start -= 1
            if start == 0 or text[start - 1] == "\n":
                stop = min(stop + 1, len(text))
                before = text[max(start - 2, 0) : start]
                if before in ("", "\n", "\n\n") and text[stop : stop + 1] == "\n":
                    stop += 1
        kept.append(text[place:start])
        place = stop
    return "".join([*kept, text[place:]])
