"""Tables of keys (never of text) of a whole corpus: joined and grouped by Daft, written to be kept.

Filters compare documents of all parts by numbers and hashes. Daft runs these joins on this machine,
or on the Ray cluster that RAY_ADDRESS names. On one machine a table that is too large for the
memory is cut into buckets by key on the disk, so that memory does not grow with the corpus; Ray's
own shuffles do that on a cluster.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# daft sends usage data otherwise; it reads this when it is imported.
os.environ["DO_NOT_TRACK"] = "1"

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft import DataFrame, Expression, col, lit  # pyright: ignore[reportMissingImports]
from daft.exceptions import DaftCoreException  # pyright: ignore[reportMissingImports]
from daft.runners import get_or_infer_runner_type  # pyright: ignore[reportMissingImports]

from baichuan_jax.config.parsing import read_json, require_keys
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.corpus.parts import ROW_BITS, Stage
from baichuan_jax.resilience.causes import Cause, SaveFailed, cause_of, describe
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.files import write_atomically

# Rows that are grouped in memory on one machine: about 0.2 GB of keys.
ROWS_AT_ONCE = 2 << 20
DONE = "done.json"


class Tables:
    """Makes tables with Daft; `scratch` is a folder for what does not fit the memory."""

    def __init__(self, scratch: Path, num_workers: int = 1, on_ray: bool = False) -> None:
        """`on_ray`: the caller has joined the cluster already, and it has `num_workers` CPUs."""
        self.scratch = scratch
        self._num_workers, self._on_ray = num_workers, on_ray
        self._shuffles = 0
        try:
            (daft.set_runner_ray if on_ray else daft.set_runner_native)()
        except DaftCoreException:
            # A process may choose once. A second pipeline in it has to be of the same kind.
            if get_or_infer_runner_type() != ("ray" if on_ray else "native"):
                raise

    def keep(self, frame: DataFrame) -> DataFrame:
        """A table computed once: a lazy plan is computed again for everything made from it."""
        # On Ray unions and joins multiply partitions; this gathers them.
        with announced("a table of the corpus to be computed"):
            return (frame.into_partitions(self._num_workers) if self._on_ray else frame).collect()

    def in_buckets(
        self, rows: int, make: Callable[..., DataFrame], *keyed: tuple[DataFrame, str]
    ) -> DataFrame:
        """What `make` makes of tables, each with its key; rows with equal keys meet.

        `rows`: how many meet altogether. In as many turns as keep a turn's rows below ROWS_AT_ONCE,
        each with the buckets of the tables that have the same remainder of the key.
        """
        # At least one turn, also for tables without a row.
        turns = 1 if self._on_ray else max(1, -(-rows // ROWS_AT_ONCE))
        if turns == 1:
            return self.keep(make(*(frame for frame, _ in keyed)))
        self._shuffles += 1
        folder = self.scratch / str(self._shuffles)
        shutil.rmtree(folder, ignore_errors=True)
        for number, (frame, key) in enumerate(keyed):
            # pmod and not %: keys are hashes and may be negative.
            bucket = F.pmod(col(key), lit(turns)).alias("bucket")
            bucketed = frame.with_column("bucket", bucket)
            bucketed.write_parquet(str(folder / f"in-{number}"), partition_cols=["bucket"])
        for turn in range(turns):
            files = [folder / f"in-{number}" / f"bucket={turn}" for number in range(len(keyed))]
            pairs = zip(files, keyed, strict=True)
            # `make` sees a turn's buckets as if they were the whole tables.
            made = make(*(_read_folder(file, frame) for file, (frame, _) in pairs))
            made.write_parquet(str(folder / "out" / str(turn)))
            # At once, not at the end: the disk holds each table once, not twice.
            for file in files:
                shutil.rmtree(file, ignore_errors=True)
        # Lazy: the result is as large as the tables were.
        return daft.read_parquet(str(folder / "out" / "*" / "*.parquet"))

    def by_part(self, frame: DataFrame, folder: Path) -> None:
        """Write a table with the column `doc` as folder/part=N/*.parquet: each part's rows."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        frame = frame.with_column("part", part_of_document())
        if self._on_ray:
            # Otherwise every partition writes a file of its own for every part.
            frame = frame.repartition(self._num_workers, col("part"))
        with _disk_errors(folder):
            frame.write_parquet(str(folder), partition_cols=["part"], compression="zstd")

    def table(self, stage: Stage, make: Callable[[], DataFrame]) -> DataFrame:
        """A stage's one table: read where it is finished, else made and written."""
        if not is_finished(stage):
            # Daft names files at random: those of a killed run would be read as well.
            shutil.rmtree(stage.folder, ignore_errors=True)
            # Work of Daft, as long as the corpus is large.
            with _disk_errors(stage.folder), announced(f"the table {stage.folder.name} to be made"):
                make().write_parquet(str(stage.folder), compression="zstd")
            # Last: a table without this file is of a killed run.
            done = {"key": stage.key, "files": _sizes(stage.folder)}
            write_atomically(stage.folder / DONE, json.dumps(done).encode())
        return read_stage(stage)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raises SaveFailed where the disk is full or fails, which is no fault of the program."""
    try:
        yield
    except (OSError, DaftCoreException) as error:
        if cause_of(error) == Cause.STORAGE:
            raise SaveFailed(f"{folder}: {describe(error)}: finished parts are kept") from None
        raise


def is_finished(stage: Stage) -> bool:
    """Whether a stage's one table is there, made of what it would be made of now."""
    try:
        note = require_keys(read_json(stage.folder / DONE), {"key": str}, "it")
    except ConfigError:
        return False
    # Earlier versions did not record the files.
    sizes = _sizes(stage.folder)
    return note["key"] == stage.key and note.get("files", sizes) == sizes


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.glob("*.parquet")}


def read_stage(stage: Stage) -> DataFrame:
    """What a stage wrote, all parts."""
    return daft.read_parquet(str(stage.folder / "*.parquet"))


def empty_table(schema: pa.Schema) -> DataFrame:
    """A table of these columns without a row."""
    return daft.from_arrow(schema.empty_table())


def part_of_document() -> Expression:
    """The part that the document in column `doc` lies in."""
    return F.shift_right(col("doc"), lit(ROW_BITS)).alias("part")


def _read_folder(folder: Path, like: DataFrame) -> DataFrame:
    """The Parquet files of a folder; where there is none, no row of another table's columns."""
    # A bucket without a row is never written.
    if folder.exists():
        return daft.read_parquet(str(folder / "*.parquet"))
    return empty_table(like.schema().to_pyarrow_schema())
