"""Parts of a corpus on disk: stages, their files, and what makes a finished part still valid.

A stage is a folder with one Parquet file for each part of the input, and beside it a JSON record of
what the work counted. Everything is found again by a key: a hash of the settings and of the keys of
the stages that it was made from, so a changed setting repeats exactly the stages that depend on it.
The name of a document in all tables is a number, `doc`: its part in the upper bits, its row in the
lower ones, so documents sort in the order of the input.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingImports]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

from baichuan_jax import __version__
from baichuan_jax.config.parsing import read_json, require_keys
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.runs.files import draft_of, new_draft, publish, write_atomically

# Of the files of all stages. Another number invalidates the finished stages of all users.
VERSION = 3
ROW_BITS = 32
# Names of a part's file in final/ and removed/, whole or not, where others may keep files too.
_OUTPUT = re.compile(r"part-\d{5,}\.parquet(?P<draft>(\..+)?\.tmp)?")
# Light compression: most of a part's files are written once and read two or three times. Statistics
# and the Arrow schema are left out, since nothing reads them.
PARQUET = {
    "compression": "zstd",
    "compression_level": 1,
    "write_statistics": False,
    "store_schema": False,
}
# What the first stage writes of every document, the removed ones included.
DOCUMENTS = pa.schema(
    [
        ("doc", pa.int64()),
        ("id", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("source", pa.string()),
        ("lang", pa.string()),
        ("stage", pa.string()),  # what removed it
        ("reason", pa.string()),  # why; null: it is not removed
        ("bytes", pa.int64()),  # of the text as it came
        ("clean_bytes", pa.int64()),  # of the text here
        ("text", pa.large_string()),  # null where the document is removed
    ]
)
# What a filter that scores documents writes, a row for each document in their order.
SCORES = pa.schema([("doc", pa.int64()), ("quality", pa.float32())])


def stage_key(*made_from: Any) -> str:
    """A hash of settings (dataclasses, numbers, strings) and of other stages' keys."""
    plain = [
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for value in made_from
    ]
    # A release of this package may cut, clean or hash otherwise; so may one of daft.
    content = [__version__, VERSION, _daft_version(), plain]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _daft_version() -> str:
    # A release of daft may hash, sort or group otherwise.
    return importlib.metadata.version("daft")


@dataclass(frozen=True)
class Stage:
    """A folder of finished work, and the key of all it was made from."""

    folder: Path
    key: str
    # Folders for its Parquet files, where these are a result of the whole pipeline.
    outputs: tuple[Path, ...] = ()

    def file(self, part: int, output: int = 0) -> Path:
        folder = self.outputs[output] if self.outputs else self.folder
        return folder / f"part-{part:05d}.parquet"

    def record_file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"

    def sizes(self, part: int) -> list[int]:
        """Bytes of each of a part's files. Raises FileNotFoundError where one is missing."""
        files = [self.file(part, output) for output in range(len(self.outputs) or 1)]
        return [file.stat().st_size for file in files]

    def record(self, part: int) -> Any:
        """What the finished work on a part returned; None where it is still to be done."""
        try:
            record = require_keys(read_json(self.record_file(part)), {"key": str}, "it")
            # Somebody may have deleted final/ and kept stages/, or a copy may be cut short.
            sizes = self.sizes(part)
        except (FileNotFoundError, ConfigError):
            return None
        # Earlier versions did not record them.
        is_same = record["key"] == self.key and record.get("bytes", sizes) == sizes
        return record.get("result") if is_same else None

    def prepare(self) -> int:
        """Make the folders, and remove what a killed run or other settings left in them.

        Returns how many finished parts of other settings were removed.
        """
        note = self.folder / "key"
        is_same = note.exists() and note.read_bytes() == self.key.encode()
        # Counted, since they are hours of work that a user may not know to have lost.
        outdated = 0 if is_same else len(list(self.folder.glob("part-*.json")))
        # First: without its note, what is left of the outputs is outdated too.
        if not is_same:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        for folder in self.outputs:
            folder.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(folder):
                # By name, and not the folder: others may keep files in it.
                match = _OUTPUT.fullmatch(name)
                if match and not (is_same and match["draft"] is None):
                    (folder / name).unlink()
        write_atomically(note, self.key.encode())
        return outdated

    def read(self, part: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A part's file, a row group at a time."""
        with pq.ParquetFile(self.file(part)) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)


class ParquetFile:
    """A Parquet file that appears whole when the block ends without an error.

    The same tables give the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Two hosts may make the same part: Ray repeats the task of a host that it takes for lost.
        self._temporary = draft_of(path)
        self._writer: Any = None  # a ParquetWriter from the first table on

    def __enter__(self) -> "ParquetFile":
        return self

    def write(self, table: pa.Table) -> None:
        """One row group; an empty table gives the file its columns and no row group."""
        # The first table gives the file its columns.
        if self._writer is None:
            # The library would follow a link that stands there.
            new_draft(self._temporary).close()
            self._writer = pq.ParquetWriter(self._temporary, table.schema, **PARQUET)
        if len(table):
            self._writer.write_table(table)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError:  # the disk is full
                self._temporary.unlink(missing_ok=True)
                raise
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
        # Renamed once its content is on the disk: no reader sees half of it.
        elif self._writer is not None:
            publish(self._temporary, self._path)


@dataclass(frozen=True)
class DocumentPart:
    """What work on one part of the documents may read."""

    number: int
    documents: Stage
    scores: Stage | None = None
    # A folder of effect tables (effects.py), cut by part; None: the work does not ask for them.
    effects: Path | None = None

    def read(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Its documents, a batch at a time; those that are removed have no text."""
        return self.documents.read(self.number, columns)

    def read_scored(
        self, columns: list[str] | None = None
    ) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Its documents with their quality: float32 [documents], 0 where nothing scored them."""
        scored = self.scores.read(self.number) if self.scores is not None else None
        for table in self.read(columns):
            scores = np.zeros(len(table), np.float32)
            if scored is not None:
                # Both files have the same row groups: each score is beside its document.
                scores = next(scored)["quality"].to_numpy()
            yield table, scores

    def effect(self, name: str) -> list[dict[str, Any]]:
        """The effects of one kind on its documents, as rows of that kind's table."""
        assert self.effects is not None
        # A part without effects has no folder.
        files = sorted((self.effects / name / f"part={self.number}").glob("*.parquet"))
        return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


@dataclass(frozen=True)
class StagePart:
    """Work on one part of a stage, for the runner: work(argument, file) -> result as JSON."""

    stage: Stage
    number: int
    work: Callable[[Any, ParquetFile], Any]
    argument: Any

    @property
    def name(self) -> str:
        return f"{self.stage.folder.name}, part {self.number}"

    def is_done(self) -> bool:
        return self.stage.record(self.number) is not None

    def make(self) -> None:
        with ParquetFile(self.stage.file(self.number)) as file:
            result = self.work(self.argument, file)
        sizes = self.stage.sizes(self.number)
        record = {"key": self.stage.key, "bytes": sizes, "result": result}
        content = json.dumps(record, ensure_ascii=False)
        write_atomically(self.stage.record_file(self.number), content.encode())


def hash_of(content: bytes) -> int:
    """A hash as an int64, which tables can hold."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def table_of(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    """Rows as a table with these columns."""
    # zip of no row gives no column.
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    pairs = zip(columns, schema, strict=True)
    return pa.table([pa.array(column, field.type) for column, field in pairs], schema=schema)
