"""Runs the pipeline's work through Daft: tasks over parts in worker processes, here or on a Ray cluster, each exactly once.

A stage is a folder. Its tasks write one Parquet file a part, whole or not at all, with a JSON
record beside it; a record made from the same settings is kept, so that a killed run goes on with
the parts that are missing. Tables of keys (never of text) are joined and grouped by Daft's own
operators and written in one piece.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

os.environ["DO_NOT_TRACK"] = "1"  # daft sends usage data otherwise

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import pyarrow as pa  # pyright: ignore[reportMissingImports]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
from daft import DataFrame, DataType, col, lit  # pyright: ignore[reportMissingImports]
from daft.exceptions import DaftCoreException  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from baichuan_jax import __version__
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.runs.files import publish, write_atomically

VERSION = 3  # of the files of all stages: a change makes finished stages anew
ROWS_AT_ONCE = 2 << 20  # that are grouped in memory on one machine
START_AGAIN = (
    "; free some and start again: what is finished is kept"  # after an error of a full disk
)
FAILED = "failed"  # a file in a stage's folder: a task of it has failed
ROW_BITS = 32  # a document's key: part << ROW_BITS | row; keys are in the order of the input
PARQUET = {
    "compression": "zstd",
    "compression_level": 1,
    "write_statistics": False,
    "store_schema": False,
}


@dataclass(frozen=True)
class Stage:
    """A folder of finished work, and the key of all it was made from; its files may lie in other folders."""

    folder: Path
    key: str
    outputs: tuple[Path, ...] = ()

    def file(self, part: int, output: int = 0) -> Path:
        folder = self.outputs[output] if self.outputs else self.folder
        return folder / f"part-{part:05d}.parquet"

    def record_file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"

    def record(self, part: int) -> dict[str, Any] | None:
        """What the finished task of a part reported; None where it is to be done."""
        try:
            record = json.loads(self.record_file(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record["result"] if record["key"] == self.key and self.file(part).exists() else None

    def prepare(self) -> None:
        """Make the folders; remove what was made from other things, and what a killed run left unfinished."""
        note = self.folder / "key"
        for folder in (*self.outputs, self.folder):
            if not note.exists() or note.read_text(encoding="utf-8") != self.key:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*folder.glob("*.tmp"), *folder.glob(FAILED)):
                leftover.unlink()
        write_atomically(note, self.key.encode())


def stage_key(*parents: Any) -> str:
    """A hash of settings (dataclasses, numbers, strings) and of other stages' keys."""
    plain = [
        asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for value in parents
    ]
    return hashlib.sha256(
        json.dumps([__version__, VERSION, daft.__version__, plain], sort_keys=True).encode()
    ).hexdigest()[:16]


class Engine:
    """Daft on this machine, or on the Ray cluster that RAY_ADDRESS names."""

    def __init__(self, num_workers: int, progress: bool, scratch: Path | None = None) -> None:
        self.scratch = scratch  # a folder for what in_buckets puts aside
        self._shuffles = 0
        self.on_ray = bool(os.environ.get("RAY_ADDRESS"))
        self._progress = progress
        if self.on_ray:
            import ray  # pyright: ignore[reportMissingImports]

            # The address "local" starts a cluster in this process.
            ray.init(
                os.environ["RAY_ADDRESS"],
                log_to_driver=False,
                logging_level=logging.ERROR,
                ignore_reinit_error=True,
            )
            daft.set_runner_ray()
            cores = int(ray.cluster_resources().get("CPU", 1))
        else:
            daft.set_runner_native()
            cores = len(os.sched_getaffinity(0))
        self.num_workers = num_workers or cores

    def run(
        self,
        stage: Stage,
        task: Callable[..., Any],
        parts: list[int],
        given: DataFrame | None,
        *arguments: Any,
    ) -> list[Any]:
        """Run task(part, given_row, file, *arguments) -> JSON-able result for every part that has none yet; all results, in order.

        `given` has a column `part`, each at most once, and columns of lists: the row of a part
        reaches its task as a dict. A task writes the file it is given (under another name first,
        which this does) and may run anywhere and more than once.
        """
        stage.prepare()
        todo = [part for part in parts if stage.record(part) is None]
        if todo:
            frame = daft.from_pydict({"part": todo})
            names = [] if given is None else [name for name in given.column_names if name != "part"]
            if given is not None:
                frame = frame.join(given, on="part", how="left")
            if self.on_ray:
                frame = frame.into_partitions(min(len(todo), 4 * self.num_workers))
            worker = daft.cls(
                _Worker, max_concurrency=min(self.num_workers, len(todo)), use_process=True
            )
            run = worker(task, stage, arguments, names).run(
                daft.col("part"), *[daft.col(name) for name in names]
            )
            bar = tqdm(
                total=len(parts),
                initial=len(parts) - len(todo),
                desc=stage.folder.name,
                unit="part",
                disable=not self._shows(),
            )
            errors = []
            with bar:  # to its end whatever happens: a process that leaves while daft works crashes
                for row in frame.select(run.alias("result")).iter_rows():
                    errors += [error for error in [json.loads(row["result"])] if error]
                    bar.update()
            for error in sorted(errors, key=lambda error: error["part"]):
                raise ConfigError(error["text"]) if error["known"] else RuntimeError(error["text"])
        results = [stage.record(part) for part in parts]
        assert None not in results
        return results

    def keep(self, frame: DataFrame) -> DataFrame:
        """A table computed once for all that is made from it. On Ray unions and joins multiply partitions; this gathers them."""
        return (frame.into_partitions(self.num_workers) if self.on_ray else frame).collect()

    def in_buckets(
        self, rows: int, make: Callable[..., DataFrame], *keyed: tuple[DataFrame, str]
    ) -> DataFrame:
        """What `make` makes of tables, each with a key: rows with equal keys meet, in as many turns as keep a turn's rows few.

        On one machine the turns' rows lie on the disk, so memory does not grow with them; a Ray
        cluster has its own way to do that.
        """
        turns = 1 if self.on_ray else max(1, -(-rows // ROWS_AT_ONCE))
        if turns == 1:
            return self.keep(make(*(frame for frame, _ in keyed)))
        assert self.scratch is not None
        self._shuffles += 1
        folder = self.scratch / str(self._shuffles)
        shutil.rmtree(folder, ignore_errors=True)
        for number, (frame, key) in enumerate(keyed):
            bucket = F.pmod(col(key), lit(turns)).alias("bucket")
            frame.with_column("bucket", bucket).write_parquet(
                str(folder / f"in-{number}"), partition_cols=["bucket"]
            )
        for turn in range(turns):
            files = [folder / f"in-{number}" / f"bucket={turn}" for number in range(len(keyed))]
            frames = [
                _read_folder(file, frame) for file, (frame, _) in zip(files, keyed, strict=True)
            ]
            made = make(*frames)
            made.write_parquet(str(folder / "out" / str(turn)))
            for file in files:
                shutil.rmtree(file, ignore_errors=True)
        return daft.read_parquet(str(folder / "out" / "*" / "*.parquet"))

    def each(self, work: Callable[[Any], None], items: list[Any]) -> Iterator[Any]:
        """Do work on items in worker processes, each at least once; yields every item that is done, in any order."""
        frame = daft.from_pydict({"number": list(range(len(items)))})
        if self.on_ray:
            frame = frame.into_partitions(min(len(items), 4 * self.num_workers))
        worker = daft.cls(
            _Each, max_concurrency=min(self.num_workers, len(items)), use_process=True
        )
        for row in frame.select(
            worker(work, items).run(daft.col("number")).alias("number")
        ).iter_rows():
            yield items[row["number"]]

    def _shows(self) -> bool:
        return self._progress and sys.stderr.isatty()

    def table(self, stage: Stage, make: Callable[[], DataFrame]) -> DataFrame:
        """A table of keys: read where it is finished, else made and written in one piece."""
        done = stage.folder / "done.json"
        try:
            finished = json.loads(done.read_text(encoding="utf-8"))["key"] == stage.key
        except (OSError, ValueError):
            finished = False
        if not finished:
            shutil.rmtree(stage.folder, ignore_errors=True)
            try:
                make().write_parquet(str(stage.folder), compression="zstd")
            except (OSError, DaftCoreException) as error:
                if hint := _hint(str(error)):
                    raise ConfigError(f"{stage.folder}: {error}{hint}") from None
                raise
            write_atomically(done, json.dumps({"key": stage.key}).encode())
        return read_table(stage)


def _read_folder(folder: Path, like: DataFrame) -> DataFrame:
    """The Parquet files of a folder; where there is none, no row of the columns of another table."""
    if folder.exists():
        return daft.read_parquet(str(folder / "*.parquet"))
    return daft.from_arrow(like.schema().to_pyarrow_schema().empty_table())


def _hint(error: str) -> str:
    """What to do about an error that a user can mend."""
    return START_AGAIN if "No space left" in error else ""


def read_table(stage: Stage) -> DataFrame:
    """What a stage wrote, all parts."""
    return daft.read_parquet(str(stage.folder / "*.parquet"))


class _Worker:
    def __init__(
        self, task: Callable[..., Any], stage: Stage, arguments: tuple, names: list[str]
    ) -> None:
        self._task, self._stage, self._arguments, self._names = task, stage, arguments, names

    @daft.method.batch(return_dtype=DataType.string(), batch_size=1)
    def run(self, part: Any, *given: Any) -> list[str]:
        number = part.to_pylist()[0]
        row = {name: column.to_pylist()[0] for name, column in zip(self._names, given, strict=True)}
        stage = self._stage
        failed = stage.folder / FAILED
        if failed.exists():  # nobody needs the rest
            return ["{}"]
        try:
            with ParquetFile(stage.file(number)) as file:
                result = self._task(number, row, file, *self._arguments)
            record = json.dumps({"key": stage.key, "result": result}, ensure_ascii=False)
            write_atomically(stage.record_file(number), record.encode())
        except Exception as error:
            with contextlib.suppress(OSError):
                failed.touch()
            known = isinstance(error, ConfigError | OSError)  # what a user can mend
            text = f"{error}{_hint(str(error))}" if known else traceback.format_exc()
            return [
                json.dumps(
                    {
                        "part": number,
                        "known": known,
                        "text": f"{stage.folder.name}, part {number}: {text}",
                    }
                )
            ]
        return ["{}"]


class _Each:
    def __init__(self, work: Callable[[Any], None], items: list[Any]) -> None:
        self._work, self._items = work, items

    @daft.method.batch(return_dtype=DataType.int64(), batch_size=1)
    def run(self, number: Any) -> list[int]:
        index = number.to_pylist()[0]
        self._work(self._items[index])
        return [index]


class ParquetFile:
    """A Parquet file that appears whole when the block ends without an error. The same tables give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
        self._writer: Any = None  # a ParquetWriter from the first table on

    def __enter__(self) -> "ParquetFile":
        return self

    def write(self, table: pa.Table) -> None:
        """One row group; an empty table gives the file its columns and no row group."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, table.schema, **PARQUET)
        if len(table):
            self._writer.write_table(table)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError:
                self._temporary.unlink(missing_ok=True)
                raise
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
        elif self._writer is not None:
            publish(self._temporary, self._path)


def read_part(stage: Stage, part: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A part's file, a row group at a time."""
    with pq.ParquetFile(stage.file(part)) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)
