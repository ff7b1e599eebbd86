"""Finds or makes what a run trains on: its tokenizer, and its text as packed rows.

Input: a configuration. Output: the tokenizer, and rows with weights. What has to be trained or
packed is kept in data.cache_dir under a name that hashes the files as they are now (path, size,
time) and the settings, so every later run with the same ones finds it, and a changed file never
meets rows of its old text. One process of a run writes; the others wait for its files.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.data.rows import MANIFEST, VERSION, Rows, pack, summary
from baichuan_jax.data.runner import locked
from baichuan_jax.documents.files import Slice, find_files
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.runs.files import require_writable
from baichuan_jax.tokenizer import Tokenizer, train_tokenizer

# How long the other processes of a run wait for the one that prepares its tokens. Longer packing is
# better done before the run, where it does not hold a cluster.
WAIT_SECONDS = 3600.0
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run trains on: its tokenizer, and packed rows with their weights."""

    tokenizer: Tokenizer
    train: list[tuple[Rows, float]]
    validation: list[tuple[Rows, float]]


def prepare(
    config: Config, *, writer: bool = True, progress: bool = True, say: Say = lambda _: None
) -> Prepared:
    """Tokenizer and rows of a configuration; what is missing is made once, for all later runs.

    Of a run's processes one is the `writer`; the others wait until its files are there,
    WAIT_SECONDS at most. Raises ConfigError.
    """
    if not config.data.train:
        raise ConfigError(
            "data.train names no corpus; give globs of text files or folders of packed rows, with "
            "weights"
        )
    tokenizer = _find_tokenizer(config, writer, say)
    # Fewer pieces than rows of the embedding are fine: the others are never looked up.
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{tokenizer.vocab_size} pieces of {tokenizer.path}"
        )

    def rows_of(corpora: dict[str, float]) -> list[tuple[Rows, float]]:
        return [
            (_find_rows(config, path, tokenizer, writer, progress, say), weight)
            for path, weight in corpora.items()
        ]

    return Prepared(tokenizer, rows_of(config.data.train), rows_of(config.data.validation))


def _is_packed(path: str) -> bool:
    return (Path(path) / MANIFEST).exists()


def _find_tokenizer(config: Config, writer: bool, say: Say) -> Tokenizer:
    if config.tokenizer.path is not None:
        return Tokenizer(config.tokenizer.path)
    # Not of the validation text: pieces that were learned on it would lower its loss.
    corpora = [path for path in config.data.train if not _is_packed(path)]
    if not corpora:
        raise ConfigError(
            "data.train holds packed rows only, so tokenizer.path must name the tokenizer they "
            "were made with"
        )
    files = find_files(corpora)
    size = config.tokenizer.vocab_size
    name = _fingerprint(files, size, config.data.text_field)
    path = Path(config.data.cache_dir) / f"tokenizer-{name}.model"
    # On a cluster every host sees the same folder, and one of them writes.
    if not writer:
        _wait_for(path, say)
        return Tokenizer(path)
    require_writable(config.data.cache_dir, "data.cache_dir")
    with locked(path.with_suffix(".lock")):
        # Looked at under the lock: another run on this machine may have just made it.
        if not path.exists():
            began = time.perf_counter()
            texts = read_texts(map(Slice, files), config.data.text_field)
            used = train_tokenizer(texts, path, size)
            seconds = time.perf_counter() - began
            say(
                f"trained a tokenizer of {size} pieces on {used['bytes']:,} bytes in {seconds:.1f} "
                f"s (one line in {used['sampled_one_line_in']}; {used['coverage']:.3%} of the "
                "characters' occurrences have a piece, the others are spelt in bytes)"
            )
    return Tokenizer(path)


def _find_rows(
    config: Config, path: str, tokenizer: Tokenizer, writer: bool, progress: bool, say: Say
) -> Rows:
    if _is_packed(path):
        return _packed_rows(path, tokenizer, config.train.context_length)
    files = find_files([path])
    settings = (tokenizer.hash, config.train.context_length, config.data.text_field)
    folder = Path(config.data.cache_dir) / f"rows-{_fingerprint(files, *settings)}"
    if not writer:
        _wait_for(folder / MANIFEST, say)
        return Rows(folder)
    # The name is a hash of everything, so rows under it are the right ones.
    if (folder / MANIFEST).exists():
        return Rows(folder)
    require_writable(config.data.cache_dir, "data.cache_dir")
    rows = pack(
        [path],
        folder,
        tokenizer,
        config.train.context_length,
        text_field=config.data.text_field,
        num_workers=config.data.num_workers,
        progress=progress,
    )
    say(f"packed {path}: {summary(rows)}")
    return rows


def _packed_rows(path: str, tokenizer: Tokenizer, length: int) -> Rows:
    """Rows that were packed before the run. Raises ConfigError where they do not fit it."""
    rows = Rows(path)
    if rows.context_length != length:
        verb = "exceeds" if length > rows.context_length else "is below"
        raise ConfigError(
            f"train.context_length={length} {verb} the shards' {rows.context_length} in {path}; "
            f"re-pack with --context_length {length} (python -m baichuan_jax.data.rows pack "
            f"--help), or set train.context_length={rows.context_length}"
        )
    if rows.manifest["tokenizer"] != tokenizer.hash:
        raise ConfigError(
            f"{path} was packed with tokenizer {rows.manifest['tokenizer'][:12]} and "
            f"{tokenizer.path} is {tokenizer.hash[:12]}; use the same tokenizer.path, or pack again"
        )
    return rows


def _fingerprint(files: list[str], *settings: Any) -> str:
    """A name for what is made from these files as they are now with these settings."""
    # Size and time in place of content: to hash a corpus takes as long as to pack it.
    described = [
        (os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files
    ]
    return hashlib.sha256(json.dumps([VERSION, described, settings]).encode()).hexdigest()[:16]


def _wait_for(path: Path, say: Say) -> None:
    waited = 0.0
    while not path.exists():
        if waited >= WAIT_SECONDS:
            raise ConfigError(
                f"process 0 has not written {path} in {waited:.0f} s: data.cache_dir must lie on a "
                "file system that all hosts share, and text that takes longer to pack is packed "
                "before the run: python -m baichuan_jax.data.rows pack --help"
            )
        if waited and waited % 30 == 0:
            say(f"waiting for process 0 to write {path}")
        # Often enough that nobody notices, seldom enough for a shared file system.
        time.sleep(0.5)
        waited += 0.5
