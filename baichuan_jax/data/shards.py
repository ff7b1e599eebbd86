"""One shard of packed rows: slices of text files as tokens, cut into rows of context_length + 1.

Input: slices of the text (documents/files.py) and a tokenizer. Slices become shards, whatever the
number of processes: a large file several, small files that follow each other one, in which rows
continue over their borders. The tokens left at a shard's end do not fill a row and are dropped, and
counted. Output: an ArrayRecord file, then a record of what it was made from and what it holds: a
shard with a record is whole, and one that is of the same text and settings is not made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from baichuan_jax.config.parsing import Count, read_json, require_keys
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.files import Slice, State, make_parts
from baichuan_jax.documents.reader import Document, Problem, read_strictly
from baichuan_jax.runs.files import draft_of, naming, new_draft, publish, write_atomically
from baichuan_jax.tokenizer import SPACE_MARK, Tokenizer

# Bytes of uncompressed text that become one shard: a minute of work, which a kill costs at most.
# Another number moves the shards' borders, and rows that were packed before are not found again.
SHARD_BYTES = 64 << 20
# Characters given to the tokenizer in one call: enough for its threads, little memory.
TEXT_AT_ONCE = 1 << 20
# What the manifest counts. The last three are not in the records of earlier versions.
COUNTS = (
    "documents",
    "empty_documents",
    "text_bytes",
    "tokens",
    "tokens_dropped",
    "rows",
    "documents_dropped",
    "empty_files",
    "space_marks",
)
# Names of a shard and its record, and of all that is unfinished (draft_of).
_OWN = re.compile(
    r"shard-\d{5,}\.(array_record|json)|(shard-\d{5,}\.\w+|counts\.npy|manifest\.json)(\..+)?\.tmp"
)
_RECORD_KEYS = {
    "key": dict,
    "rows": Count,
    "bytes": Count,
    "sha256": str,
    "counts": dict[str, Count],
}


def plan_parts(files: Mapping[str, State]) -> list[list[Slice]]:
    """The slices of files that become one shard each, in order; small files share one."""
    return make_parts({path: state.size for path, state in files.items()}, SHARD_BYTES)


def apart(parts: list[list[Slice]]) -> list[list[Slice]]:
    """The same slices, each a shard of its own: what earlier versions made of them."""
    return [[piece] for part in parts for piece in part]


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
        return _read_record(self.record_file)

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
            "sha256": checksum(temporary),
        }
        # In this order: a record says that the shard is whole.
        publish(temporary, self.file)
        write_atomically(self.record_file, json.dumps(record).encode())

    def _write(self, file: Path) -> dict[str, Any]:
        """Write the rows. Returns what is counted; `counts` has the tokens that occur."""
        tokenizer = Tokenizer(self.tokenizer)
        dtype = dtype_of(tokenizer.vocab_size)
        length = self.context_length + 1
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        totals: dict[str, int] = dict.fromkeys(COUNTS, 0)
        # Groups of one: rows are read one at a time, in any order.
        # The library would follow a link that stands there.
        new_draft(file).close()
        writer = ArrayRecordWriter(str(file), "group_size:1")
        left = np.zeros(0, dtype)
        end = np.asarray([tokenizer.eos_id], dtype)
        # The last token of the last row.
        before = tokenizer.eos_id
        for batch in _batches(read_strictly(self.pieces, self.text_field), totals):
            # A document is its tokens and EOS, without BOS, as the original's were.
            # Each becomes an array at once: as Python's numbers the tokens of a document of 16 MiB
            # take half a gigabyte.
            pieces = [
                np.append(np.asarray(ids, dtype), end) for ids in tokenizer.encode_batch(batch)
            ]
            stream = np.concatenate([left[:0], *pieces])
            counts += np.bincount(stream, minlength=len(counts))
            totals["tokens"] += len(stream)
            # Rows continue over the borders of documents, of batches and of files.
            stream = np.concatenate([left, stream])
            whole = len(stream) // length
            for row in stream[: whole * length].reshape(whole, length):
                writer.write(row.tobytes())
            before = int(stream[whole * length - 1]) if whole else before
            left = stream[whole * length :]
            totals["rows"] += whole
        writer.close()
        totals["tokens_dropped"] = len(left)
        # Documents of which no token is in a row: all that end in the rest, but for one that began
        # in the last row.
        ends = int(np.count_nonzero(left == tokenizer.eos_id))
        totals["documents_dropped"] = ends - (before != tokenizer.eos_id and ends > 0)
        return {**totals, "counts": {int(t): int(counts[t]) for t in np.flatnonzero(counts)}}


def has_records(folder: Path) -> bool:
    """Whether a folder holds a finished shard, of whatever text and settings."""
    for file in folder.glob("shard-*.json"):
        with contextlib.suppress(ConfigError):
            _read_record(file)
            return True
    return False


def is_shard(name: str) -> bool:
    """Whether a file's name is that of a shard's rows."""
    return re.fullmatch(r"shard-\d{5,}\.array_record", name) is not None


def leftovers(folder: Path, shards: list[Shard]) -> list[Path]:
    """What a killed run left in its folder: drafts, and shards that there are no more."""
    kept = {path for shard in shards for path in (shard.file, shard.record_file)}
    # By their exact names: others may keep files of like names there.
    return [path for path in folder.iterdir() if _OWN.fullmatch(path.name) and path not in kept]


def _read_record(file: Path) -> dict[str, Any]:
    return require_keys(read_json(file, paths=True), _RECORD_KEYS, str(file))


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
        totals["space_marks"] += document.count(SPACE_MARK)
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


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest type that holds every token: half the bytes for the usual vocabularies."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
