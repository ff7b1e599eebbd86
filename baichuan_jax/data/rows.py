"""Packed rows: documents as tokens, joined with EOS and cut into rows of context_length + 1 tokens.

Input: text files and a tokenizer. Output: a folder of ArrayRecord shards (shards.py), whose rows
can be read in any order, with a manifest that counts them. A killed run continues with the shards
that are missing (runner.py).

`python -m baichuan_jax.data.rows pack|show|verify`
"""

import argparse
import bisect
import errno
import hashlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from baichuan_jax.config.parsing import (
    Count,
    Positive,
    quote_path,
    read_json,
    require_keys,
    show,
    whole_number,
)
from baichuan_jax.config.schema import ConfigError, at_least, require
from baichuan_jax.data.runner import Workers
from baichuan_jax.data.shards import (
    COUNTS,
    Shard,
    apart,
    checksum,
    dtype_of,
    has_records,
    is_shard,
    leftovers,
    plan_parts,
)
from baichuan_jax.documents.files import (
    UNREAD,
    Slice,
    State,
    count_unread,
    find_files,
    require_unchanged,
    states,
)
from baichuan_jax.resilience.causes import errno_of
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.resilience.ownership import CACHE_SECONDS, actual, owned, require_own
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.tokenizer import Tokenizer

MANIFEST = "manifest.json"
VERSION = 1
# More than this share of the tokens is more than the rests of a few shards: the user is warned.
MANY_DROPPED = 0.01
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
        """Raises IndexError, ConfigError naming the shard that is damaged or missing, and OSError.

        OSError names the shard that the system cannot read now.
        """
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
            _raise_of_system(error, shard)
            # Python's own, of a reader in C++, names a method; what went wrong is its cause.
            reason = error.__cause__ or "it is damaged" if type(error) is SystemError else error
            raise ConfigError(
                f"row {index} of {self.path} cannot be read from {shard}: {reason}; find all that "
                "is damaged with python -m baichuan_jax.data.rows verify "
                f"{quote_path(self.path)}, then delete the folder and pack again"
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
            _raise_of_system(error, file)
            # It may quote the file.
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{file} cannot be read: {reason}; {_PACK_AGAIN}") from None
        if counts.shape != (self.manifest["vocab_size"],) or counts.dtype != np.int64:
            raise ConfigError(
                f"{file} is {counts.dtype} {counts.shape} and not a count of each of "
                f"{self.manifest['vocab_size']} tokens; {_PACK_AGAIN}"
            )
        return counts

    def are_of(self, shards: list[Shard]) -> bool:
        """Whether these shards, as they would be made now, are all that the folder holds."""
        return len(shards) == len(self.manifest["shards"]) and all(s.is_done() for s in shards)

    def verify(self) -> None:
        """Compare every shard's checksum with the manifest. Raises ConfigError at a difference."""
        for shard in self._shards:
            if (found := checksum(self.path / shard["file"])) != shard["sha256"]:
                raise ConfigError(
                    f"{self.path / shard['file']} has SHA-256 {found} and the manifest says "
                    f"{shard['sha256']}; delete the folder and pack again"
                )


def _raise_of_system(error: Exception, file: Path) -> None:
    """Raise OSError with the file's name where the system could not read it: it may be whole."""
    number = errno_of(error)
    if number not in (None, errno.ENOENT):
        raise OSError(number, os.strerror(number), str(file)) from error


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
            # Another name may lead out of the folder.
            require(is_shard(shard["file"]), f"{show(shard['file'])} is the name of no shard")
            # A row is a chunk of its own, with a header of 40 bytes.
            most = shard["bytes"] // 40
            require(shard["rows"] <= most, f"{shard['file']} cannot hold {shard['rows']} rows")
        require(sum(s["rows"] for s in manifest["shards"]) == manifest["rows"], "rows are missing")
    except ConfigError as error:
        raise ConfigError(f"{file} is no manifest: {error}; {_PACK_AGAIN}") from None
    return manifest


def _require_rows(folder: Path, manifest: dict[str, Any]) -> None:
    if manifest["rows"]:
        return
    if not manifest["tokens"]:
        raise ConfigError(f"{folder} holds no row: its text is empty; name files with text")
    number = len(manifest["shards"])
    shards = "1 shard" if number == 1 else f"{number} shards of fewer each"
    raise ConfigError(
        f"{folder} holds no row: a row is {manifest['context_length'] + 1} tokens, and its text is "
        f"{manifest['tokens']:,} ({manifest['documents']:,} documents) in {shards}; give more "
        "text, or a smaller context_length"
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
    files: Mapping[str, State] | None = None,
) -> Rows:
    """Tokenize and pack the files that globs name into a folder, on all cores or a Ray cluster.

    What is in the folder depends on the files, the tokenizer and the context length alone. `files`:
    what the globs named where the caller has looked already. Raises ConfigError, also where the
    folder holds files that packing has not made, or rows of other text or settings, and where a
    file changes meanwhile.
    """
    require(context_length > 0, f"context_length={context_length} must be greater than 0")
    folder = Path(folder)

    def shards_of(parts: list[list[Slice]]) -> list[Shard]:
        made_with = (tokenizer.path, tokenizer.hash, context_length, text_field)
        return [Shard(part, folder, i, *made_with) for i, part in enumerate(parts)]

    files = states(find_files(patterns)) if files is None else files
    parts = plan_parts(files)
    shards = shards_of(parts)
    # The lock lies beside the folder, which may be deleted and made again.
    real = actual(folder)
    lock = real.with_name(real.name + ".lock")
    if not (folder / MANIFEST).exists():
        require_own([folder], lock, lambda: has_records(folder))
        _require_outside(files, real)
    other = "choose another folder"
    with owned(lock, f"{folder}", other, shared=True, seconds=CACHE_SECONDS):
        real.mkdir(parents=True, exist_ok=True)
        # Looked at under the lock: another process may have packed the folder meanwhile.
        if not (folder / MANIFEST).exists():
            for leftover in leftovers(folder, shards):
                leftover.unlink()
            with Workers(num_workers, progress) as workers:
                workers.finish(shards, f"packing {real.name}", unit="shard")
            # Not with the manifest: the folder would be taken for one of the text as it was.
            require_unchanged(files)
            _write_manifest(folder, shards, tokenizer, context_length, patterns)
    rows = Rows(folder)
    # A finished folder is not packed again, and may be of other text or settings. Or an earlier
    # version packed it, each file alone: a run that was trained on it goes on with it.
    if not any(rows.are_of(each) for each in (shards, shards_of(apart(parts)))):
        raise ConfigError(
            f"{folder} holds rows of other text or settings; delete it, or choose another folder"
        )
    return rows


def _require_outside(files: Iterable[str], real: Path) -> None:
    """Raise ConfigError where the text lies in the folder of its rows, which might replace it."""
    for file in files:
        if Path(os.path.realpath(file)).parent == real:
            raise ConfigError(f"{file} lies in the folder of its rows, {real}; choose another one")


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
        "dtype": dtype_of(tokenizer.vocab_size).name,
        **{name: sum(record[name] for record in records) for name in names},
        "shards": described,
    }
    # Before it is written: with more text the same folder can be packed.
    _require_rows(folder, manifest)
    # Last: a folder with a manifest is whole.
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def summary(rows: Rows) -> str:
    """One line on what was packed and what was left out."""
    m = rows.manifest
    left_out = [f"{m['empty_documents']} empty"]
    if m.get("documents_dropped"):
        left_out.append(f"{m['documents_dropped']:,} in no row")
    unread = m.get("unread", {})
    counted = [
        (m.get("empty_files"), "empty files"),
        *((unread.get(name), words) for name, words in UNREAD.items()),
        (m.get("space_marks"), "characters U+2581, each turned into a space"),
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
    run_command(
        lambda: main(sys.argv[1:]),
        result_is_shown=True,
        interrupted="what pack has finished is kept, and the same command goes on after it",
    )
