"""What filters do to documents, as four typed tables: removed, renamed, copies, cut.

A filter never touches a document's text or another filter's tables. It says what is to happen, a
row for each effect, and the last stage (writing.py) does it. So filters can be added, left out and
repeated one by one, and every document's fate is one row that names its reason.
"""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft import DataFrame, DataType, col, lit  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.parts import Stage
from baichuan_jax.data.corpus.tables import empty_table

# A document that does not go into final/. `duplicate_of`: the id of the document that stays in its
# place, null where it is no duplicate.
REMOVED = pa.schema(
    [
        ("doc", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)
# A document with a new id, since an earlier document has its own.
RENAMED = pa.schema([("doc", pa.int64()), ("id", pa.string())])
# A document that stays for itself and its removed duplicates: how many there were, itself included.
COPIES = pa.schema([("doc", pa.int64()), ("count", pa.int64())])
# Characters [start, stop) that are cut out of a document that stays, and how many bytes they are.
CUT = pa.schema(
    [("doc", pa.int64()), ("start", pa.int64()), ("stop", pa.int64()), ("bytes", pa.int64())]
)
# Blanks between two sentences: where one is cut out, they go with it.
SPACE = " \t\u3000"
SCHEMAS = {"removed": REMOVED, "renamed": RENAMED, "copies": COPIES, "cut": CUT}


@dataclass(frozen=True)
class Effects:
    """What one filter does. Its tables have the columns above; `stage` is added to `removed`."""

    # The key of the table that the effects were read from; "" where there is no effect.
    key: str = ""
    removed: DataFrame | None = None
    renamed: DataFrame | None = None
    copies: DataFrame | None = None
    cut: DataFrame | None = None
    # Part files of SCORES, for the filters that follow and for final/.
    scores: Stage | None = None
    # Entries of the filter's own in report.json.
    notes: dict[str, Any] = field(default_factory=dict)


class AllEffects:
    """The effects of all filters so far, one table of each kind."""

    def __init__(self) -> None:
        self.tables = {name: empty_table(schema) for name, schema in SCHEMAS.items()}
        # What a later stage that depends on these effects is made from: a key for each table.
        self.keys: list[str] = []
        # The filter that cuts. Of several, the last: the report counts their bytes together.
        self.cutter: str | None = None

    def add(self, stage: str, effects: Effects) -> None:
        """Add what the filter named `stage` does."""
        for name, schema in SCHEMAS.items():
            frame: DataFrame | None = getattr(effects, name)
            if frame is None:
                continue
            if name == "removed":
                frame = frame.with_column("stage", lit(stage))
                if "duplicate_of" not in frame.column_names:
                    frame = frame.with_column("duplicate_of", lit(None))
            columns = [
                col(column.name).cast(DataType.from_arrow_type(column.type)) for column in schema
            ]
            self.tables[name] = self.tables[name].concat(frame.select(*columns))
            self.keys.append(effects.key)
        if effects.cut is not None:
            self.cutter = stage

    @property
    def removed_documents(self) -> DataFrame:
        """(doc) of all documents that filters have removed; the read stage's own aside."""
        return self.tables["removed"].select("doc")
