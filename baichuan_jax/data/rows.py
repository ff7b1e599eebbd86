"""Packed rows of tokens: documents + EOS, joined and cut into rows of context_length + 1, in ArrayRecord shards with a manifest.

Every part of the input (data/text.py) becomes one shard, whatever the number of processes; a shard
is written whole under another name and then renamed, so that a killed run leaves nothing half done
and goes on with the shards that are missing.

`python -m baichuan_jax.data.rows pack|show|verify`
"""

import argparse
import bisect
import concurrent.futures
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.reader import Part, find_files, read_documents, split_files
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.files import publish, write_atomically
from baichuan_jax.tokenizer import Tokenizer

MANIFEST = "manifest.json"
VERSION = 1
TEXT_AT_ONCE = 1 << 20  # characters given to the tokenizer in one call


class Rows:
    """Packed rows on disk: rows[i] is int32 [context_length + 1]. Reading from several threads is safe.

    Raises ConfigError where the folder is not whole.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        file = self.path / MANIFEST
        if not file.is_file():
            raise ConfigError(
                f"{folder} has no {MANIFEST}: it holds no packed rows, or packing did not end; {_HOW_TO_PACK}"
            )
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = self.manifest["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is no manifest: {error!r}; delete the folder and pack again"
            ) from None
        if version != VERSION:
            raise ConfigError(
                f"{folder} has rows of version {version} and this is {VERSION}; {_HOW_TO_PACK}"
            )
        self.context_length: int = self.manifest["context_length"]
        self._dtype = np.dtype(self.manifest["dtype"])
        self._shards = [shard for shard in self.manifest["shards"] if shard["rows"]]
        for shard in self._shards:
            path = self.path / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise ConfigError(
                    f"{path} has {'gone' if size is None else f'{size} bytes'} and the manifest says {shard['bytes']} bytes; "
                    "delete the folder and pack again"
                )
        if not self._shards:
            raise ConfigError(
                f"{folder} holds no row: its text has fewer than {self.context_length + 1} tokens a part"
            )
        # With its number of rows given, no shard is opened before it is read.
        self._source = ArrayRecordDataSource(
            [f"{self.path / shard['file']}[0:{shard['rows']}]" for shard in self._shards]
        )
        self._ends = list(itertools.accumulate(shard["rows"] for shard in self._shards))

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises IndexError, and ConfigError naming the shard where its file is damaged or gone."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        try:
            content = self._source[index]
            if len(content) != self._dtype.itemsize * (
                self.context_length + 1
            ):  # what a file that is cut short gives
                raise ValueError(
                    f"{len(content)} bytes instead of {self._dtype.itemsize * (self.context_length + 1)}"
                )
        except Exception as error:
            shard = self.path / self._shards[bisect.bisect_right(self._ends, index)]["file"]
            raise ConfigError(
                f"row {index} of {self.path} cannot be read from {shard}: {error}; find all that is damaged with "
                f"python -m baichuan_jax.data.rows verify {self.path}, then delete the folder and pack again"
            ) from error
        return np.frombuffer(content, self._dtype).astype(np.int32)

    @property
    def counts(self) -> np.ndarray:
        """How often each token occurs in the text: [vocab_size] int64."""
        return np.load(self.path / "counts.npy")

    def verify(self) -> None:
        """Compare every shard's checksum with the manifest. Raises ConfigError naming the first that differs."""
        for shard in self._shards:
            if (found := _checksum(self.path / shard["file"])) != shard["sha256"]:
                raise ConfigError(
                    f"{self.path / shard['file']} has SHA-256 {found} and the manifest says {shard['sha256']}"
                )


_HOW_TO_PACK = "pack it: python -m baichuan_jax.data.rows pack --help"


def unigram_entropy(sources: list[tuple[Rows, float]]) -> float:
    """Entropy in nats of one token drawn from a weighted mixture: the loss of a model that knows frequencies alone."""
    mixture = np.sum([weight * rows.counts / rows.counts.sum() for rows, weight in sources], axis=0)
    probabilities = mixture[mixture > 0] / mixture.sum()
    return float(-np.sum(probabilities * np.log(probabilities)))


def pack(
    patterns: list[str],
    folder: Path | str,
    tokenizer: Tokenizer,
    context_length: int,
    *,
    text_field: str = "text",
    num_workers: int = 0,
    progress: bool = True,
) -> Rows:
    """Tokenise and pack the files that globs name into a folder, in parallel; goes on where a killed run stopped.

    What is in the folder depends on the files, the tokenizer and the context length alone. Raises
    ConfigError, also where the folder already holds rows of others.
    """
    folder = Path(folder)
    files = find_files(patterns)
    work = [
        _Work(
            part,
            folder / f"shard-{index:05d}",
            tokenizer.path,
            tokenizer.hash,
            context_length,
            text_field,
        )
        for index, part in enumerate(split_files(files))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if not (folder / MANIFEST).exists():
            for leftover in folder.glob("*.tmp"):  # of a killed run
                leftover.unlink()
            todo = [item for item in work if not item.is_done()]
            _run_all(todo, num_workers, progress, description=f"packing {folder.name}")
            _write_manifest(folder, work, tokenizer, context_length, patterns)
    rows = Rows(folder)
    if len(work) != len(rows.manifest["shards"]) or not all(item.is_done() for item in work):
        raise ConfigError(
            f"{folder} holds rows of other text or settings; delete it, or choose another folder"
        )
    return rows


@dataclasses.dataclass(frozen=True)
class _Work:
    """One part of the input and the shard it becomes."""

    part: Part
    stem: Path
    tokenizer: Path
    tokenizer_hash: str
    context_length: int
    text_field: str

    @property
    def shard(self) -> Path:
        return self.stem.with_suffix(".array_record")

    @property
    def record(self) -> Path:
        return self.stem.with_suffix(".json")

    def key(self) -> dict[str, Any]:
        """What a finished shard must have been made from to be kept."""
        return {
            "path": os.path.abspath(self.part.path),
            "start": self.part.start,
            "stop": self.part.stop,
            "size": os.path.getsize(self.part.path),
            "modified_ns": os.stat(self.part.path).st_mtime_ns,
            "tokenizer": self.tokenizer_hash,
            "context_length": self.context_length,
            "text_field": self.text_field,
        }

    def is_done(self) -> bool:
        if not (self.record.exists() and self.shard.exists()):
            return False
        record = json.loads(self.record.read_text(encoding="utf-8"))
        return record["key"] == self.key() and record["bytes"] == self.shard.stat().st_size


def _run_all(todo: list[_Work], num_workers: int, progress: bool, description: str) -> None:
    """Make shards on all cores of this machine, or on the Ray cluster that RAY_ADDRESS names, whose hosts share the folders."""
    if not todo:
        return
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=len(todo),
        unit="shard",
        desc=description,
        disable=not progress,
        mininterval=0.1 if terminal else 30,
        delay=0 if terminal else 30,  # in a log: nothing, or a line now and then
    )
    if os.environ.get("RAY_ADDRESS"):
        from baichuan_jax.data.corpus.engine import Engine

        with bar:
            for _ in Engine(num_workers, progress).each(_make_shard, todo):
                bar.update()
        return
    workers = min(len(todo), num_workers or os.cpu_count() or 1)
    # spawn: a fork of a process whose jax has threads may hang
    with (
        bar,
        concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _end_with_parent
        ) as pool,
    ):
        futures = [pool.submit(_make_shard, item) for item in todo]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """In a worker: end when the process that started it is killed, which the pool's workers would outlive for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_shard(work: _Work) -> None:
    """Write one shard and its record, each under another name first."""
    tokenizer = Tokenizer(work.tokenizer)
    dtype = _dtype(tokenizer.vocab_size)
    length = work.context_length + 1
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    totals = {
        "documents": 0,
        "empty_documents": 0,
        "text_bytes": 0,
        "tokens": 0,
        "rows": 0,
        "tokens_dropped": 0,
    }
    temporary = work.stem.with_suffix(f".{os.uname().nodename}.{os.getpid()}.tmp")
    writer = ArrayRecordWriter(
        str(temporary), "group_size:1"
    )  # rows are read one at a time, in any order
    left = np.zeros(0, dtype)
    for batch in _batches(read_documents(work.part, work.text_field), totals):
        pieces = [
            token for ids in tokenizer.encode_batch(batch) for token in (*ids, tokenizer.eos_id)
        ]
        stream = np.asarray(pieces, dtype)
        counts += np.bincount(stream, minlength=len(counts))
        stream = np.concatenate([left, stream])
        whole = len(stream) // length
        for row in stream[: whole * length].reshape(whole, length):
            writer.write(row.tobytes())
        left = stream[whole * length :]
        totals["rows"] += whole
        totals["tokens"] += len(pieces)
    writer.close()
    totals["tokens_dropped"] = len(left)
    record = {
        "key": work.key(),
        **totals,
        "bytes": temporary.stat().st_size,
        "sha256": _checksum(temporary),
        "counts": {int(token): int(counts[token]) for token in np.flatnonzero(counts)},
    }
    publish(temporary, work.shard)
    write_atomically(work.record, json.dumps(record).encode())


def _batches(documents: Iterator[str], totals: dict[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        totals["documents"] += 1
        totals["text_bytes"] += len(document.encode())
        if not document:
            totals["empty_documents"] += 1
            continue
        batch.append(document)
        size += len(document)
        if size >= TEXT_AT_ONCE:
            yield batch
            batch, size = [], 0
    yield batch


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _write_manifest(
    folder: Path, work: list[_Work], tokenizer: Tokenizer, context_length: int, patterns: list[str]
) -> None:
    records = [json.loads(item.record.read_text(encoding="utf-8")) for item in work]
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for record in records:
        for token, count in record["counts"].items():
            counts[int(token)] += count
    content = io.BytesIO()
    np.save(content, counts)
    write_atomically(folder / "counts.npy", content.getvalue())
    names = ("documents", "empty_documents", "text_bytes", "tokens", "tokens_dropped", "rows")
    manifest = {
        "version": VERSION,
        "inputs": patterns,
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "context_length": context_length,
        "dtype": _dtype(tokenizer.vocab_size).name,
        **{name: sum(record[name] for record in records) for name in names},
        "shards": [
            {
                "file": item.shard.name,
                "from": item.part.path,
                **{n: record[n] for n in ("rows", "bytes", "sha256")},
            }
            for item, record in zip(work, records, strict=True)
        ],
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of a machine at a time; a killed one's lock is gone with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(rows: Rows) -> str:
    """One line on what was packed and what was left over."""
    m = rows.manifest
    return (
        f"{m['documents']:,} documents ({m['empty_documents']} empty), {m['tokens']:,} tokens ({m['text_bytes'] / m['tokens']:.2f} "
        f"bytes each), {m['rows']:,} rows of {m['context_length']} + 1; {m['tokens_dropped']} tokens did not fill a last row"
    )


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.data.rows", description=(__doc__ or "").split("\n\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser(
        "pack", help="tokenise and pack text; started again, it goes on where it was"
    )
    packing.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="JSONL (a document a line) or .txt, also .gz, .zst; or .parquet",
    )
    packing.add_argument("--tokenizer", required=True, metavar="FILE", help="a SentencePiece model")
    packing.add_argument(
        "--context_length", type=int, required=True, help="tokens a row is trained on"
    )
    packing.add_argument("--output", required=True, metavar="FOLDER", help="name it in data.train")
    packing.add_argument(
        "--text_field", default="text", help="JSONL field that holds the text (default: text)"
    )
    packing.add_argument(
        "--num_workers", type=int, default=0, help="processes (default: one a core)"
    )
    for name, what in (
        ("show", "print a folder's manifest"),
        ("verify", "compare every shard with its checksum"),
    ):
        commands.add_parser(name, help=what).add_argument("folder")
    options = parser.parse_args(words)
    if options.command == "pack":
        tokenizer = Tokenizer(options.tokenizer)
        began = time.perf_counter()
        rows = pack(
            options.input,
            options.output,
            tokenizer,
            options.context_length,
            text_field=options.text_field,
            num_workers=options.num_workers,
        )
        seconds = time.perf_counter() - began
        m = rows.manifest
        print(f"{options.output}: {summary(rows)}")
        print(
            f"{seconds:.1f} s: {m['tokens'] / seconds:,.0f} tokens and {m['text_bytes'] / seconds / 1e6:.2f} MB of text a second"
        )
    else:
        rows = Rows(options.folder)
        if options.command == "verify":
            rows.verify()
            print(
                f"{options.folder}: {len(rows.manifest['shards'])} shards are as the manifest says"
            )
        else:
            print(json.dumps(rows.manifest, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
