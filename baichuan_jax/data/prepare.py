"""Finds or makes what a run trains on: its tokenizer, and its text as packed rows.

Input: a configuration. Output: the tokenizer, and rows with weights. What has to be trained or
packed is kept in data.cache_dir under a name that hashes the files as they are now (path, size,
modification time) and the settings, so every later run with the same ones finds it, and a file
whose size or time changes never meets rows of its old text. One process of a run writes; the others
wait for its files.
"""

import contextlib
import dataclasses
import filecmp
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from baichuan_jax.checkpoint.weights import has_checkpoint
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.data.rows import MANIFEST, VERSION, Rows, pack, summary
from baichuan_jax.data.shards import plan_parts
from baichuan_jax.documents.files import (
    Slice,
    State,
    each_once,
    find_files,
    require_unchanged,
    states,
)
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.hf.source import Source, find_tokenizer, read_source
from baichuan_jax.resilience.coordination import agree, require_same
from baichuan_jax.resilience.ownership import CACHE_SECONDS, owned
from baichuan_jax.resilience.waits import wait_until
from baichuan_jax.runs.files import identity_of, require_writable
from baichuan_jax.tokenizer import Tokenizer, train_tokenizer

Say = Callable[[str], None]
# Corpus -> its files, as they were at the launch's only look at them.
Text = dict[str, dict[str, State]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run trains on: its tokenizer, and packed rows with their weights."""

    tokenizer: Tokenizer
    train: list[tuple[Rows, float]]
    validation: list[tuple[Rows, float]]
    # The files of each corpus that is a glob of text.
    text: Text = dataclasses.field(default_factory=dict)
    # The weights that a first launch begins at, where init_from names some.
    source: Source | None = None


def prepare(
    config: Config,
    source: Source | None = None,
    *,
    writer: bool = True,
    progress: bool = True,
    say: Say = lambda _: None,
) -> Prepared:
    """Tokenizer and rows of a configuration; what is missing is made once, for all later runs.

    `source`: init_from's weights, where the caller has looked at them.

    Of a run's processes the first is the `writer`; the others take its files, and wait for them,
    CACHE_SECONDS at most. Raises ConfigError, also where hosts see other files.
    """
    if not config.data.train:
        raise ConfigError(
            "data.train names no corpus; give globs of text files or folders of packed rows, with "
            "weights"
        )
    text = _look(config)
    tokenizer = _find_tokenizer(config, source, text, writer, say)
    require_same("tokenizer", tokenizer.hash)
    for warning in tokenizer.warnings:
        say(warning)
    # Fewer pieces than rows of the embedding are fine: the others are never looked up.
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{tokenizer.vocab_size} pieces of {tokenizer.path}"
        )

    def rows_of(name: str, corpora: dict[str, float]) -> list[tuple[Rows, float]]:
        find = lambda path: _find_rows(
            config, f"{name}[{path!r}]", path, text, tokenizer, writer, progress, say
        )
        found = [(find(path), weight) for path, weight in corpora.items()]
        # Other rows would make other batches, on hosts whose packed folders are copies.
        require_same(f"rows of {name}", [rows.identity for rows, _ in found])
        return found

    train = rows_of("data.train", config.data.train)
    _say_where_padding_is_text(config, tokenizer, train, say)
    validation = rows_of("data.validation", config.data.validation)
    return Prepared(tokenizer, train, validation, text, source)


def _look(config: Config) -> Text:
    """The files of every corpus that is a glob of text.

    Once, and before a tokenizer is trained and rows are packed, which may take hours: a file that
    appears later belongs to the next launch.
    """
    corpora = [*config.data.train, *config.data.validation]
    packed = agree("which corpora are packed", lambda: [_is_packed(path) for path in corpora])
    return {
        path: states(find_files([path]))
        for path, is_packed in zip(corpora, packed, strict=True)
        if not is_packed
    }


def _say_where_padding_is_text(
    config: Config, tokenizer: Tokenizer, sources: list[tuple[Rows, float]], say: Say
) -> None:
    """Say that a token of the text learns no embedding (the original's padding_idx)."""
    pad = config.model.pad_token_id
    if pad is None or pad >= tokenizer.vocab_size:
        return
    if count := sum(int(rows.counts[pad]) for rows, _ in sources):
        say(
            f"warning: the training text has token {pad} ({tokenizer.piece(pad)!r}) {count:,} "
            f"times, and model.pad_token_id={pad} keeps its embedding from learning; set "
            "--model.pad_token_id null in a new run"
        )


def _is_packed(path: str) -> bool:
    return (Path(path) / MANIFEST).exists()


def _find_tokenizer(
    config: Config, source: Source | None, text: Text, writer: bool, say: Say
) -> Tokenizer:
    """The tokenizer of the weights that the run goes on from, else tokenizer.path or a new one."""
    given, own = config.tokenizer.path, config.run_path / "tokenizer.model"
    if agree("whether the run has a checkpoint", lambda: has_checkpoint(config.run_path)):
        # Its own, whatever became of the text and of init_from. `restore` compares its hash with
        # the checkpoint's, and the one before where that is damaged.
        if given is None and own.is_file():
            return _own_tokenizer(config, own)
    elif config.init_from is not None:
        source = read_source(config.init_from) if source is None else source
        tokenizer = find_tokenizer(source, given, "--tokenizer.path")
        say(f"tokenizer: {tokenizer.path} ({tokenizer.vocab_size} pieces), of init_from's weights")
        return tokenizer
    return Tokenizer(given) if given is not None else _train_tokenizer(config, text, writer, say)


def _own_tokenizer(config: Config, file: Path) -> Tokenizer:
    """The tokenizer in the run's folder. Raises ConfigError where the settings want another."""
    remedy = "delete it: the next launch writes it anew, and compares it with the checkpoint's"
    if config.init_from is not None:
        remedy = "give the tokenizer of init_from's weights with --tokenizer.path"
    tokenizer = Tokenizer(file, remedy)
    # A run that began at given weights has their tokenizer, of whatever size.
    if config.init_from is None and tokenizer.vocab_size != config.tokenizer.vocab_size:
        raise ConfigError(
            f"{file}, with which this run was trained, has {tokenizer.vocab_size} pieces and "
            f"tokenizer.vocab_size={config.tokenizer.vocab_size}; set "
            f"--tokenizer.vocab_size {tokenizer.vocab_size}, or another run_dir"
        )
    return tokenizer


def _train_tokenizer(config: Config, text: Text, writer: bool, say: Say) -> Tokenizer:
    """A tokenizer of the training text, made at its first use."""
    # Not of the validation text: pieces that were learned on it would lower its loss.
    known = {f: s for path in config.data.train for f, s in text.get(path, {}).items()}
    if not known:
        raise ConfigError(
            "data.train holds packed rows only, so tokenizer.path must name the tokenizer they "
            "were made with"
        )
    files = {path: known[path] for path in each_once(known)}
    size = config.tokenizer.vocab_size
    name = _agreed_name("the tokenizer's text", files, size, config.data.text_field)
    path = Path(config.data.cache_dir) / f"tokenizer-{name}.model"
    # On a cluster every host sees the same folder, and one of them writes.
    if not writer:
        _wait_for(path)
    # Not locked, so that a cache that may only be read serves.
    remedy = "delete it, and start again: the same one is trained from the same text"
    if path.exists():
        return Tokenizer(path, remedy)
    require_writable(config.data.cache_dir, "data.cache_dir")
    lock, other = path.with_suffix(".lock"), "name another data.cache_dir"
    with owned(lock, f"{path}", other, shared=True, seconds=CACHE_SECONDS):
        # Looked at under the lock: another run on this machine may have just made it.
        if not path.exists():
            began = time.perf_counter()
            texts = _read_unchanged(files, config.data.text_field)
            used = train_tokenizer(texts, path, size)
            seconds = time.perf_counter() - began
            say(
                f"trained a tokenizer of {size} pieces on {used['bytes']:,} bytes in {seconds:.1f} "
                f"s (one line in {used['sampled_one_line_in']}; {used['coverage']:.3%} of the "
                "characters' occurrences have a piece, the others are spelt in bytes)"
            )
    return Tokenizer(path, remedy)


def _find_rows(
    config: Config,
    name: str,
    path: str,
    text: Text,
    tokenizer: Tokenizer,
    writer: bool,
    progress: bool,
    say: Say,
) -> Rows:
    if path not in text:
        return _packed_rows(path, tokenizer, config.train.context_length)
    folder = _rows_folder(config, name, text[path], tokenizer)
    if not writer:
        _wait_for(folder / MANIFEST)
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
        files=text[path],
    )
    say(f"packed {path}: {summary(rows)}")
    return rows


def _rows_folder(
    config: Config, name: str, files: Mapping[str, State], tokenizer: Tokenizer
) -> Path:
    """Where the rows of these files are kept: a name for the files and all that packing takes."""
    settings = (tokenizer.hash, config.train.context_length, config.data.text_field)
    cache = Path(config.data.cache_dir)
    folder = cache / f"rows-{_agreed_name(name, files, *settings)}"
    # Earlier versions packed every file alone. Where small files are joined now the rows are other
    # ones, with another name; a run that was trained on the earlier ones goes on with them.
    joined = any(len(part) > 1 for part in plan_parts(files))
    if joined and not agree(f"{name} of before", lambda: (folder / MANIFEST).exists()):
        return cache / f"rows-{_agreed_name(f'{name}, joined', files, *settings, 'joined')}"
    return folder


def validation_in_training(config: Config, text: Text) -> list[str]:
    """Files, and folders of packed rows, that are both in data.train and in data.validation.

    By whatever name or link, and copies of the same content.
    """
    trained: dict[int, list[tuple[str, os.stat_result]]] = {}
    for path in config.data.train:
        for file, state in _files_of(path, text):
            trained.setdefault(state.st_size, []).append((file, state))
    found = [
        file
        for path in config.data.validation
        for file, state in _files_of(path, text)
        if any(
            # A copy is read to its first difference, and few files have the size of another.
            identity_of(state) == identity_of(theirs) or filecmp.cmp(file, other, shallow=False)
            for other, theirs in trained.get(state.st_size, [])
        )
    ]
    return sorted(set(found))


def shared_in_training(config: Config, text: Text) -> list[str]:
    """Files, and folders of packed rows, that more than one corpus of data.train names."""
    first: dict[tuple[int, ...], str] = {}
    found = set()
    for path in config.data.train:
        for file, state in _files_of(path, text):
            if first.setdefault(identity_of(state), path) != path:
                found.add(file)
    return sorted(found)


def _files_of(path: str, text: Text) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a corpus as they are now; of packed rows the manifest, which names the rest."""
    for file in text.get(path, [os.path.join(path, MANIFEST)]):
        # One that was removed since the launch looked at it is nobody's any more.
        with contextlib.suppress(FileNotFoundError):
            yield file, os.stat(file)


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


def _read_unchanged(files: Mapping[str, State], text_field: str) -> Iterator[str]:
    """Documents. Raises ConfigError after the last one where a file changed meanwhile."""
    yield from read_texts(map(Slice, files), text_field)
    require_unchanged(files)


def _fingerprint(files: Mapping[str, State], *settings: Any) -> str:
    """A name for what is made from these files with these settings."""
    # Size and time in place of content: to hash a corpus takes as long as to pack it.
    described = [(os.path.abspath(path), *state) for path, state in files.items()]
    return hashlib.sha256(json.dumps([VERSION, described, settings]).encode()).hexdigest()[:16]


def _agreed_name(what: str, files: Mapping[str, State], *settings: Any) -> str:
    """Process 0's _fingerprint, on all processes.

    Copies of a file have other times on each host. Raises ConfigError where they have other sizes.
    """
    sizes = [state.size for state in files.values()]
    # A hash in place of the sizes: there may be a hundred thousand.
    seen = {
        "the number of files": len(files),
        "the sum of their bytes": sum(sizes),
        "the hash of their sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16],
    }
    require_same(f"the files of {what}", seen)
    return agree(f"name of {what}", lambda: _fingerprint(files, *settings))


def _wait_for(path: Path) -> None:
    """Until process 0 has written a file. Raises ConfigError after CACHE_SECONDS."""
    what = f"process 0 to write {path} ({CACHE_SECONDS:.0f} s at most)"
    if not wait_until(path.exists, what, CACHE_SECONDS):
        raise ConfigError(
            f"process 0 has not written {path} in {CACHE_SECONDS:.0f} s: data.cache_dir must lie "
            "on a file system that all hosts share, and text that takes longer to pack is packed "
            "before the run: python -m baichuan_jax.data.rows pack --help"
        )
