"""What a cleaning filter is, and what it sees of a corpus.

A filter is one file in data/ and one line in the list of data/pipeline.py. Nothing in this folder
knows a filter by name. A filter brings its name and its settings, and what it finds reaches the
documents and the filters that follow as effects (effects.py).
"""

from collections.abc import Callable
from typing import Any, Protocol

import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft import DataFrame, col  # pyright: ignore[reportMissingImports]
from daft import functions as F  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.effects import AllEffects, Effects
from baichuan_jax.data.corpus.parts import DocumentPart, ParquetFile, Stage
from baichuan_jax.data.corpus.stages import Stages
from baichuan_jax.data.corpus.tables import read_stage

PartWork = Callable[[DocumentPart, ParquetFile], Any]


class Cleaner(Protocol):
    """The filter that sees each text alone while it is read: it rewrites it and judges it."""

    name: str

    @property
    def key(self) -> list[Any]:
        """Everything but the texts that the result depends on."""
        ...

    def clean(self, texts: list[str]) -> pa.Table:
        """A row for each text: text (rewritten), lang ("zh" or "en"), reason (null: it stays)."""
        ...


class Filter(Protocol):
    """A filter that sees all documents that are left. It is pickled to the worker processes.

    `run` reads as three steps: work on each part of the documents (`Corpus.make_parts`, whose key
    is all that a finished part depends on), a reduction of all parts to one table
    (`Corpus.make_table`), and what follows from that table (`Effects`). Its constructor refuses
    wrong settings, which is before hours of work.
    """

    name: str

    def run(self, corpus: "Corpus") -> Effects:
        """Find what is to happen to documents; no effects where it is switched off."""
        ...


class Corpus:
    """A corpus on its way through the filters: its documents, and what is to happen to them."""

    def __init__(self, stages: Stages, documents: Stage, parts: int) -> None:
        self.stages, self.tables = stages, stages.tables
        # The files of the first stage, which every filter reads and none writes.
        self.documents, self._numbers = documents, range(parts)
        self.effects = AllEffects()
        # Part files of SCORES, once a filter has scored the documents.
        self.scores: Stage | None = None

    @property
    def scores_key(self) -> str | None:
        """The key of the scores, for what depends on them."""
        return self.scores and self.scores.key

    def apply(self, name: str, effects: Effects) -> None:
        """Add the effects of the filter `name` to those so far."""
        self.effects.add(name, effects)
        # A later filter that scores documents replaces the scores of an earlier one.
        self.scores = effects.scores or self.scores

    def make_parts(
        self, name: str, key: list[Any], work: PartWork, *, with_effects: bool = False
    ) -> tuple[Stage, list[Any]]:
        """Do work on each part of the documents; a stage of part files, and the work's results.

        `work` writes at least one table to the file and returns a JSON value. `with_effects`: it
        asks for the effects on its documents so far.
        """
        stage = self.stages.stage(name, key)
        return stage, self.finish(stage, work, with_effects=with_effects)

    def finish(self, stage: Stage, work: PartWork, *, with_effects: bool = False) -> list[Any]:
        """The results of a stage's work on all parts of the documents."""
        folder = self.tables.scratch / f"effects-{stage.folder.name}" if with_effects else None
        # Nothing is written where all parts are finished.
        if folder is not None and any(stage.record(number) is None for number in self._numbers):
            for kind, table in self.effects.tables.items():
                self.tables.by_part(table, folder / kind)
        arguments = [
            DocumentPart(number, self.documents, self.scores, folder) for number in self._numbers
        ]
        return self.stages.run_parts(stage, work, arguments)

    def make_table(
        self, name: str, key: list[Any], make: Callable[[], DataFrame]
    ) -> tuple[str, DataFrame]:
        """A table of the whole corpus that is kept; first its key, for what is made from it."""
        return self.stages.make_table(name, key, make)

    def remaining(self, *columns: str) -> DataFrame:
        """These columns, and doc, of all documents that are left after the filters so far."""
        # The first stage keeps the documents that it removed, without their text.
        fit = read_stage(self.documents).where(col("reason").is_null()).select("doc", *columns)
        return fit.join(self.effects.removed_documents, on="doc", how="anti")

    def ids(self) -> DataFrame:
        """(doc, id) of all documents, by their new ids where they were renamed."""
        # Almost no document is renamed, so this is a join with a small table.
        renamed = self.effects.tables["renamed"].select("doc", col("id").alias("new"))
        named = read_stage(self.documents).select("doc", "id").join(renamed, on="doc", how="left")
        return named.select("doc", F.coalesce(col("new"), col("id")).alias("id"))
