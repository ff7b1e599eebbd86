"""Packed rows: documents as tokens, joined with EOS and cut into rows of context_length + 1 tokens.

Input: text files and a tokenizer. Output: a folder of ArrayRecord shards, whose rows can be read in
any order, with a manifest that counts them. Slices of the input (documents/files.py) become shards,
whatever the number of processes: a large file several, small files that follow each other one, in
which rows continue over their borders. The tokens left at a shard's end do not fill a row and are
dropped, and counted. A killed run continues with the shards that are missing (runner.py).

`python -m baichuan_jax.data.rows pack|show|verify`
"""

import argparse
import bisect
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from baichuan_jax.config.parsing import (
    Count,
    Positive,
    read_json,
    require_keys,
    show,
    whole_number,
)
from baichuan_jax.config.schema import ConfigError, at_least, require
from baichuan_jax.data.runner import Workers
from baichuan_jax.documents.files import Slice, count_unread, find_files, make_parts
from baichuan_jax.documents.reader import Document, Problem, read_strictly
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.resilience.ownership import CACHE_SECONDS, owned
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import draft_of, publish, write_atomically
from baichuan_jax.tokenizer import Tokenizer

MANIFEST = "manifest.json"
VERSION = 1
# Bytes of uncompressed text that become one shard: a minute of work, which a kill costs at most.
# Another number moves the shards' borders, and rows that were packed before are not found again.
SHARD_BYTES = 64 << 20
# Characters given to the tokenizer in one call: enough for its threads, little memory.
TEXT_AT_ONCE = 1 << 20
# More than this share of the tokens is more than the rests of a few shards: the user is warned.
MANY_DROPPED = 0.01
# What the manifest counts. The last two are not in the records of earlier versions.
COUNTS = (
    "documents",
    "empty_documents",
    "text_bytes",
    "tokens",
    "tokens_dropped",
    "rows",
    "documents_dropped",
    "empty_files",
)
# What readers take from a manifest, and from each of its shards.
_MANIFEST_KEYS = {
    "tokenizer": str,
    "vocab_size": Positive,
    "context_length": Positive,
    "dtype": Literal["uint16", "uint32"],
    "rows": Count,
    "shards": list[dict],
}
_SHARD_KEYS = {"file": str, "rows": Count, "bytes": Count, "sha256": str}
_RECORD_KEYS = {
    "key": dict,
    "rows": Count,
    "bytes": Count,
    "sha256": str,
    "counts": dict[str, Count],
}
_PACK_AGAIN = "delete the folder and pack again"
_HOW_TO_PACK = "pack it: python -m baichuan_jax.data.rows pack --help"


class Rows:
    """Packed rows on disk: rows[i] is int32 [context_length + 1]. Threads may share it.

    Raises ConfigError where the folder is not whole.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        self.manifest = _read_manifest(self.path)
        self.context_length: int = self.manifest["context_length"]
        self._dtype = np.dtype(self.manifest["dtype"])
        # A part with fewer tokens than a row has a shard without rows.
        self._shards = [shard for shard in self.manifest["shards"] if shard["rows"]]
        # By size, which costs a stat each; `verify` compares checksums, which reads everything.
        for shard in self._shards:
            path = self.path / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ConfigError(
                    f"{path} {found} and the manifest says {shard['bytes']} bytes; "
                    "delete the folder and pack again"
                )
        _require_rows(self.path, self.manifest)
        # With its number of rows given, no shard is opened before it is read.
        self._source = ArrayRecordDataSource(
            [f"{self.path / shard['file']}[0:{shard['rows']}]" for shard in self._shards]
        )
        self._ends = list(itertools.accumulate(shard["rows"] for shard in self._shards))

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises IndexError, and ConfigError naming the shard that is damaged or missing."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        expected = self._dtype.itemsize * (self.context_length + 1)
        try:
            content = self._source[index]
            # A file that is cut short while it is open gives fewer bytes, and no error.
            if len(content) != expected:
                raise ValueError(f"{len(content)} bytes instead of {expected}")
        except Exception as error:
            shard = self.path / self._shards[bisect.bisect_right(self._ends, index)]["file"]
            raise ConfigError(
                f"row {index} of {self.path} cannot be read from {shard}: {error}; find all that "
                "is damaged with python -m baichuan_jax.data.rows verify "
                f"{shlex.quote(str(self.path))}, then delete the folder and pack again"
            ) from error
        # int32, which the embedding takes, whatever the type on the disk.
        return np.frombuffer(content, self._dtype).astype(np.int32)

    @property
    def identity(self) -> str:
        """The same for the same rows in the same order, wherever they lie."""
        checksums = [shard["sha256"] for shard in self._shards]
        return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()[:16]

    @property
    def warning(self) -> str | None:
        """What to say of rows that leave out more of their text than the rests of a few shards."""
        m = self.manifest
        tokens, dropped, whole = m["tokens"], m["tokens_dropped"], m.get("documents_dropped")
        if dropped <= MANY_DROPPED * tokens:
            return None
        # Earlier versions did not count them, and packed every file alone.
        documents = "" if not whole else f", and {whole:,} documents with all their tokens"
        advice = "give more text, or a smaller context_length"
        if whole is None and len(m["shards"]) > 1:
            advice = (
                "an earlier version packed every file alone; a run that was trained on these rows "
                "goes on with them, and for a new run delete the folder: files are joined now"
            )
        return (
            f"{self.path} leaves out {dropped / tokens:.1%} of its text: {dropped:,} of "
            f"{tokens:,} tokens did not fill the last row of a shard{documents}; {advice}"
        )

    @property
    def counts(self) -> np.ndarray:
        """How often each token occurs in the text: [vocab_size] int64."""
        file = self.path / "counts.npy"
        try:
            counts = np.load(file)
        except Exception as error:  # numpy raises many types for a damaged file
            # It may quote the file.
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{file} cannot be read: {reason}; {_PACK_AGAIN}") from None
        if counts.shape != (self.manifest["vocab_size"],) or counts.dtype != np.int64:
            raise ConfigError(
                f"{file} is {counts.dtype} {counts.shape} and not a count of each of "
                f"{self.manifest['vocab_size']} tokens; {_PACK_AGAIN}"
            )
        return counts

    def are_of(self, shards: list["Shard"]) -> bool:
        """Whether these shards, as they would be made now, are all that the folder holds."""
        return len(shards) == len(self.manifest["shards"]) and all(s.is_done() for s in shards)

    def verify(self) -> None:
        """Compare every shard's checksum with the manifest. Raises ConfigError at a difference."""
        for shard in self._shards:
            if (found := _checksum(self.path / shard["file"])) != shard["sha256"]:
                raise ConfigError(
                    f"{self.path / shard['file']} has SHA-256 {found} and the manifest says "
                    f"{shard['sha256']}; delete the folder and pack again"
                )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no {MANIFEST}: it holds no packed rows, or packing did not end; "
            f"{_HOW_TO_PACK}"
        )
    try:
        manifest: dict[str, Any] = read_json(file)
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is no manifest: {error!r}; delete the folder and pack again"
        ) from None
    if version != VERSION:
        raise ConfigError(
            f"{folder} has rows of version {version} and this is {VERSION}; {_HOW_TO_PACK}"
        )
    try:
        require_keys(manifest, _MANIFEST_KEYS, "it")
        for shard in manifest["shards"]:
            require_keys(shard, _SHARD_KEYS, "a shard")
        require(sum(s["rows"] for s in manifest["shards"]) == manifest["rows"], "rows are missing")
    except ConfigError as error:
        raise ConfigError(f"{file} is no manifest: {error}; {_PACK_AGAIN}") from None
    return manifest


def _require_rows(folder: Path, manifest: dict[str, Any]) -> None:
    if manifest["rows"] == 0:
        raise ConfigError(
            f"{folder} holds no row: a row is {manifest['context_length'] + 1} tokens, and its "
            f"text is {manifest['tokens']:,} ({manifest['documents']:,} documents) in "
            f"{len(manifest['shards'])} shards of fewer each; give more text, or a smaller "
            "context_length"
        )


def unigram_entropy(sources: list[tuple[Rows, float]]) -> float:
    """Entropy of one token of a weighted mixture, in nats: the loss of knowing frequencies alone.

    A model whose validation loss stays above it has not learned anything from the context.
    """
    mixture = np.sum([weight * rows.counts / rows.counts.sum() for rows, weight in sources], axis=0)
    # Weights need not sum to 1.
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
    """Tokenize and pack the files that globs name into a folder, on all cores or a Ray cluster.

    What is in the folder depends on the files, the tokenizer and the context length alone. Raises
    ConfigError, also where the folder already holds rows of other text or settings.
    """
    require(context_length > 0, f"context_length={context_length} must be greater than 0")
    folder = Path(folder)

    def shards_of(parts: list[list[Slice]]) -> list[Shard]:
        made_with = (tokenizer.path, tokenizer.hash, context_length, text_field)
        return [Shard(part, folder, i, *made_with) for i, part in enumerate(parts)]

    parts = plan_parts(find_files(patterns))
    shards = shards_of(parts)
    # The lock lies beside the folder, which may be deleted and made again.
    lock = folder.with_name(folder.name + ".lock")
    other = "choose another folder"
    with owned(lock, f"{folder}", other, shared=True, seconds=CACHE_SECONDS):
        folder.mkdir(parents=True, exist_ok=True)
        # Looked at under the lock: another process may have packed the folder meanwhile.
        if not (folder / MANIFEST).exists():
            _remove_leftovers(folder, shards)
            with Workers(num_workers, progress) as workers:
                workers.finish(shards, f"packing {folder.name}", unit="shard")
            _write_manifest(folder, shards, tokenizer, context_length, patterns)
    rows = Rows(folder)
    # A finished folder is not packed again, and may be of other text or settings. Or an earlier
    # version packed it, each file alone: a run that was trained on it goes on with it.
    if not any(rows.are_of(each) for each in (shards, shards_of(apart(parts)))):
        raise ConfigError(
            f"{folder} holds rows of other text or settings; delete it, or choose another folder"
        )
    return rows


def plan_parts(files: list[str]) -> list[list[Slice]]:
    """The slices of files that become one shard each, in order; small files share one."""
    return make_parts({path: os.path.getsize(path) for path in files}, SHARD_BYTES)


def apart(parts: list[list[Slice]]) -> list[list[Slice]]:
    """The same slices, each a shard of its own: what earlier versions made of them."""
    return [[piece] for part in parts for piece in part]


def _remove_leftovers(folder: Path, shards: list["Shard"]) -> None:
    """Delete what a killed run left: unfinished files, and shards that there are no more."""
    kept = {path for shard in shards for path in (shard.file, shard.record_file)}
    for leftover in {*folder.glob("*.tmp"), *folder.glob("shard-*")} - kept:
        leftover.unlink()


@dataclasses.dataclass(frozen=True)
class Shard:
    """Slices of the input and the shard that they become: a part for the runner."""

    pieces: list[Slice]
    folder: Path
    number: int
    # By path: a shard is pickled to the process that makes it, which loads the model itself.
    tokenizer: Path
    tokenizer_hash: str
    context_length: int
    text_field: str

    @property
    def name(self) -> str:
        """For messages, and of its files."""
        return f"shard-{self.number:05d}"

    @property
    def file(self) -> Path:
        """Its rows."""
        return self.folder / f"{self.name}.array_record"

    @property
    def record_file(self) -> Path:
        """What it was made from, and what it holds; written last."""
        return self.folder / f"{self.name}.json"

    def key(self) -> dict[str, Any]:
        """What a finished shard must have been made from to be kept."""
        first, *others = map(_described, self.pieces)
        return {
            # Of one slice as earlier versions wrote it, whose shards are kept.
            **first,
            **({"and": others} if others else {}),
            "tokenizer": self.tokenizer_hash,
            "context_length": self.context_length,
            "text_field": self.text_field,
        }

    def is_done(self) -> bool:
        """Whether it is there, whole, and made from what it would be made from now."""
        # The size too: a shard that was cut short after it was finished is made again.
        if not (self.record_file.exists() and self.file.exists()):
            return False
        try:
            record = self.record()
        # Damaged: it is made again.
        except ConfigError:
            return False
        return record["key"] == self.key() and record["bytes"] == self.file.stat().st_size

    def record(self) -> dict[str, Any]:
        """The record of a finished shard. Raises ConfigError."""
        file = self.record_file
        return require_keys(read_json(file, paths=True), _RECORD_KEYS, str(file))

    def make(self) -> None:
        """Write the shard, then its record."""
        key = self.key()  # as the file is now: one that changes meanwhile is packed again
        # On a cluster a part may be made twice, on two hosts.
        temporary = draft_of(self.file)
        counted = self._write(temporary)
        record = {
            "key": key,
            **counted,
            "bytes": temporary.stat().st_size,
            "sha256": _checksum(temporary),
        }
        # In this order: a record says that the shard is whole.
        publish(temporary, self.file)
        write_atomically(self.record_file, json.dumps(record).encode())

    def _write(self, file: Path) -> dict[str, Any]:
        """Write the rows. Returns what is counted; `counts` has the tokens that occur."""
        tokenizer = Tokenizer(self.tokenizer)
        dtype = _dtype(tokenizer.vocab_size)
        length = self.context_length + 1
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        totals: dict[str, int] = dict.fromkeys(COUNTS, 0)
        # Groups of one: rows are read one at a time, in any order.
        writer = ArrayRecordWriter(str(file), "group_size:1")
        left = np.zeros(0, dtype)
        # The last token of the last row.
        before = tokenizer.eos_id
        for batch in _batches(read_strictly(self.pieces, self.text_field), totals):
            # A document is its tokens and EOS, without BOS, as the original's were.
            pieces = [
                token for ids in tokenizer.encode_batch(batch) for token in (*ids, tokenizer.eos_id)
            ]
            stream = np.asarray(pieces, dtype)
            counts += np.bincount(stream, minlength=len(counts))
            # Rows continue over the borders of documents, of batches and of files.
            stream = np.concatenate([left, stream])
            whole = len(stream) // length
            for row in stream[: whole * length].reshape(whole, length):
                writer.write(row.tobytes())
            before = int(stream[whole * length - 1]) if whole else before
            left = stream[whole * length :]
            totals["rows"] += whole
            totals["tokens"] += len(pieces)
        writer.close()
        totals["tokens_dropped"] = len(left)
        # Documents of which no token is in a row: all that end in the rest, but for one that began
        # in the last row.
        ends = int(np.count_nonzero(left == tokenizer.eos_id))
        totals["documents_dropped"] = ends - (before != tokenizer.eos_id and ends > 0)
        return {**totals, "counts": {int(t): int(counts[t]) for t in np.flatnonzero(counts)}}


def _described(piece: Slice) -> dict[str, Any]:
    """A slice of a file as it is now."""
    state = os.stat(piece.path)
    return {
        "path": os.path.abspath(piece.path),
        "start": piece.start,
        "stop": piece.stop,
        "size": state.st_size,
        # A file that changes in place keeps its path, and may keep its size.
        "modified_ns": state.st_mtime_ns,
    }


def _batches(entries: Iterator[Document | Problem], totals: dict[str, int]) -> Iterator[list[str]]:
    """Texts that are not empty, about TEXT_AT_ONCE characters together; all are counted."""
    batch: list[str] = []
    size = 0
    for entry in entries:
        if isinstance(entry, Problem):
            totals["empty_files"] += 1
            continue
        document = entry.text
        totals["documents"] += 1
        totals["text_bytes"] += len(document.encode())
        # It would be a lone EOS in a row.
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
    """The smallest type that holds every token: half the bytes for the usual vocabularies."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _write_manifest(
    folder: Path,
    shards: list[Shard],
    tokenizer: Tokenizer,
    context_length: int,
    patterns: list[str],
) -> None:
    records = [shard.record() for shard in shards]
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for shard, record in zip(shards, records, strict=True):
        for token, count in record["counts"].items():
            number = whole_number(token)
            require(
                number is not None and number < tokenizer.vocab_size,
                f"{shard.record_file}: {show(token)} is no token of this tokenizer; delete it",
            )
            counts[number] += count
    content = io.BytesIO()
    np.save(content, counts)
    write_atomically(folder / "counts.npy", content.getvalue())
    # A shard that an earlier version made lacks some counts, and so does their sum.
    names = [name for name in COUNTS if all(name in record for record in records)]
    described = [
        {
            "file": shard.file.name,
            "from": shard.pieces[0].shown,
            **({"slices": len(shard.pieces)} if len(shard.pieces) > 1 else {}),
            **{name: record[name] for name in ("rows", "bytes", "sha256")},
        }
        for shard, record in zip(shards, records, strict=True)
    ]
    manifest = {
        "version": VERSION,
        # As text: names on Linux need not be UTF-8, and JSON's readers refuse what is not.
        "inputs": [Slice(pattern).shown for pattern in patterns],
        "unread": count_unread(patterns),
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_loses": list(tokenizer.losses),
        "context_length": context_length,
        "dtype": _dtype(tokenizer.vocab_size).name,
        **{name: sum(record[name] for record in records) for name in names},
        "shards": described,
    }
    # Before it is written: with more text the same folder can be packed.
    _require_rows(folder, manifest)
    # Last: a folder with a manifest is whole.
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(rows: Rows) -> str:
    """One line on what was packed and what was left out."""
    m = rows.manifest
    left_out = [f"{m['empty_documents']} empty"]
    if m.get("documents_dropped"):
        left_out.append(f"{m['documents_dropped']:,} in no row")
    unread = m.get("unread", {})
    counted = [
        (m.get("empty_files"), "empty files"),
        (unread.get("hidden_files"), "hidden files not read"),
        (unread.get("files_in_folders"), "files in matched folders not read"),
    ]
    files = [f", {count:,} {what}" for count, what in counted if count]
    return (
        f"{m['documents']:,} documents ({', '.join(left_out)}){''.join(files)}, {m['tokens']:,} "
        f"tokens ({m['text_bytes'] / m['tokens']:.2f} bytes each), {m['rows']:,} rows of "
        f"{m['context_length']} + 1; {m['tokens_dropped']:,} tokens "
        f"({m['tokens_dropped'] / m['tokens']:.2%}) did not fill a last row"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.data.rows", description=(__doc__ or "").split("\n\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser(
        "pack", help="tokenize and pack text; started again, it continues where it was"
    )
    text = "JSONL (a document a line) or .txt (a document a file), also .gz, .zst; or .parquet"
    field = "field that holds the text; outer.inner: inside another (default: text)"
    add = packing.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help=text)
    add("--tokenizer", required=True, metavar="FILE", help="a SentencePiece model")
    add("--context_length", type=at_least(1), required=True, help="tokens a row is trained on")
    add("--output", required=True, metavar="FOLDER", help="name it in data.train")
    add("--text_field", default="text", help=field)
    add("--num_workers", type=at_least(0), default=0, help="processes (default: one a core)")
    for name, what in (
        ("show", "print a folder's manifest"),
        ("verify", "compare every shard with its checksum"),
    ):
        commands.add_parser(name, help=what).add_argument("folder")
    return parser


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(argv)
    if options.command == "pack":
        tokenizer = Tokenizer(options.tokenizer)
        for warning in tokenizer.warnings:
            say(warning)
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
        if rows.warning:
            Display().say(rows.warning, style="yellow")
        print(
            f"{seconds:.1f} s: {m['tokens'] / seconds:,.0f} tokens and "
            f"{m['text_bytes'] / seconds / 1e6:.2f} MB of text a second"
        )
        return 0
    rows = Rows(options.folder)
    if options.command == "verify":
        rows.verify()
        number = len(rows.manifest["shards"])
        print(f"{options.folder}: {number} shards are as the manifest says")
    else:
        print(json.dumps(rows.manifest, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
