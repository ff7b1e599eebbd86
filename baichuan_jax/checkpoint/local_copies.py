"""Copies of the whole state on every host's own disk: the fast tier of checkpoints.

In: a state that every process holds whole (`require_whole`: state and fsdp inside a host, data
between hosts). Each host
writes its copy often and beside the steps, without asking other hosts, so that a copy costs no
network. At a start all hosts compare what they have; those without the newest copy (a spare, an
emptied disk) are sent it by one that has it, and all compare digests (the idea of Gemini, Wang et
al., SOSP 2023, with disks in place of memory). Storage stays the place that lasts: a copy counts
only if it is at least as new as the newest checkpoint there and was made since the last rollback.

The file: 8 bytes with the length of a JSON head, the head, then all arrays in their order. It is
the same on all hosts. Other users of a host may have made what lies on its disk, so a copy counts
only if its SHA-256 stands in the run's own folder. Process 0 writes it there before any host gives
its copy a name: every named copy has one, whatever is killed.
"""

import contextlib
import hashlib
import itertools
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from baichuan_jax.checkpoint.progress import Progress
from baichuan_jax.checkpoint.state import RunState, StateTarget, as_items, from_items, names_of
from baichuan_jax.config.parsing import (
    Count,
    decode,
    parse_json,
    read_text,
    require_keys,
    require_type,
    whole_number,
)
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.coordination import agree, gather, refuse_together
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.events import LocalCopyCorrupt
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.runs.private import open_in, open_private, require_private
from baichuan_jax.step import TrainState

SUFFIX = ".state"
SETTING = "checkpoint.local_dir"
# In the run's folder: step -> SHA-256 of the copies of it.
RECORD = "local_copies.json"
# Older ones count no more: storage has a newer checkpoint by then.
RECORDS = 16
_HEAD = {
    "step": Count,
    "rollbacks": Count,
    "progress": dict,
    "tokenizer": str,
    "model": dict,
    "digest": dict[str, int],
}
# A head has a name and a number for each array.
LARGEST_HEAD = 1 << 24
# Elements that are sent at once: 256 MiB.
CHUNK = 1 << 26
# Bytes that one thread hashes at once. One core hashes 1.9 GB/s (EPYC, 2026-11), a disk is faster.
PART = 1 << 26


@dataclass(frozen=True)
class _Copy:
    """An open file that may be a copy; `head` and what was read of it so far, `prefix`."""

    step: int
    file: BinaryIO
    head: dict[str, Any]
    prefix: bytes


class LocalCopies:
    """This host's copies: `save` starts one, `finish` lets it count, `restore` takes the newest.

    `record`: the run's file of digests. `rollbacks`: how often the run has rolled back; copies made
    before the last time do not count. One process of each `host` writes. Raises ConfigError, on all
    processes, where another user of a host could read or replace its copies.
    """

    def __init__(
        self,
        folder: Path,
        record: Path,
        rollbacks: int,
        host: str,
        tokenizer_hash: str,
        target: StateTarget,
    ) -> None:
        self.folder, self._record, self._draft = folder, record, ""
        self._rollbacks, self._tokenizer, self._target = rollbacks, tokenizer_hash, target
        refuse_together("local/folder", lambda: require_private(folder, SETTING))
        # One process of a host is enough: each holds the whole state.
        self._writer = gather("local/hosts", host).index(host) == jax.process_index()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._rounds = 0
        # Process 0's, of this launch and of those before it; other processes only read it.
        self._recorded: dict[str, str] = {}

    @property
    def _leaves(self) -> list[Any]:
        """Shapes and shardings of the arrays, in the order of the file."""
        return jax.tree.leaves(self._target.items)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """A descriptor of the folder, which is made where it is missing."""
        descriptor = open_private(self.folder, SETTING)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def save(self, state: RunState) -> None:
        """Start a copy; returns once the state is in the host's memory.

        Raises what the copy before failed with.
        """
        self.finish()
        items, step = as_items(state.state), state.step
        # A collective: all processes, not only the writers.
        digest = self._target.digest(items)
        if not self._writer:
            return
        shards = [_distinct_shards(array) for array in jax.tree.leaves(items)]
        # All transfers start before the first is waited for.
        for parts in shards:
            for shard in parts:
                shard.data.copy_to_host_async()
        parts = [[(shard.index, _on_host(shard.data)) for shard in these] for these in shards]
        head = {
            "rollbacks": self._rollbacks,
            "step": step,
            "position": state.position,
            "progress": state.progress.to_json(),
            "tokenizer": self._tokenizer,
            "model": self._target.model,
            "digest": digest,
        }
        self._draft = f"{step}{SUFFIX}.{os.getpid()}"
        self._thread = threading.Thread(
            target=self._write, args=(step, head, parts), name="local copy"
        )
        self._thread.start()

    def is_saving(self) -> bool:
        """Whether a copy is still being written here."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the copy under way and let it replace the one before. Raises its error."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        name = self._draft.rpartition(".")[0]
        with self._open() as folder:
            os.replace(self._draft, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
            # Deleted only now: at every moment one whole copy is here. Also what a killed process
            # left half written (STEP.state.PID).
            for other in os.listdir(folder):
                if SUFFIX in other and other != name:
                    # The copy counts whatever cannot be deleted.
                    with contextlib.suppress(OSError):
                        _remove(folder, other)

    def _write(self, step: int, head: dict[str, Any], parts: list[list[tuple[Any, Any]]]) -> None:
        text = json.dumps(head).encode()
        start = struct.pack("<Q", len(text)) + text
        contents = lambda: map(_bytes_of, map(_assemble, self._leaves, parts))
        try:
            with _Digest() as digest:
                digest.add(start)
                for content in contents():
                    digest.add(content)
            self._agree_on(step, digest.hexdigest())
            with self._open() as folder:
                self._write_file(folder, itertools.chain([start], contents()))
        except Exception as error:  # of any type: `finish` raises it on the main thread
            self._error = error

    def _agree_on(self, step: int, digest: str) -> None:
        """Have process 0 record a digest. Before the copy is written: it counts by its name."""
        name = f"the digest of the copies of step {step}"
        found = agree(name, lambda: self._note(step, digest))
        if found["failed"] is not None:
            raise RuntimeError(f"{self._record} could not be written: {found['failed']}")
        if found["digest"] != digest:
            raise RuntimeError("this host holds other bits of the state than process 0")

    def _note(self, step: int, digest: str) -> dict[str, str | None]:
        recorded = {name: kept for name, kept in self._recorded.items() if name != str(step)}
        self._recorded = dict([*recorded.items(), (str(step), digest)][-RECORDS:])
        try:
            write_atomically(self._record, json.dumps(self._recorded, indent=1).encode())
        except OSError as error:
            return {"digest": digest, "failed": error.strerror}
        return {"digest": digest, "failed": None}

    def _write_file(self, folder: int, contents: Iterable[bytes | memoryview]) -> None:
        # Of a process that was killed and had this one's number.
        _remove(folder, self._draft)
        opener = lambda name, flags: open_in(folder, name, flags)
        try:
            with open(self._draft, "xb", opener=opener) as file:
                for content in contents:
                    # Not tofile, whose error has no number: a full disk would not be known as one.
                    file.write(content)
                # On this thread, beside the steps.
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # Half a copy is of no use, and the disk may be full.
            _remove(folder, self._draft)
            raise

    def restore(self, at_least: int, report: Callable[[LocalCopyCorrupt], None]) -> RunState | None:
        """The newest good copy of a step from `at_least` on, from any host; None: there is none.

        Reports and deletes each damaged copy and tries again, so the loop ends.
        """
        self._recorded = agree("digests of local copies", self._read_record)
        while True:
            self._rounds += 1
            with contextlib.ExitStack() as files:
                copy = self._newest(at_least)
                if copy is not None:
                    files.enter_context(copy.file)
                found = self._gather("steps", None if copy is None else copy.step)
                steps = [-1 if step is None else step for step in found]
                step = max(steps)
                if step < 0:
                    return None
                source, mine = steps.index(step), steps[jax.process_index()] == step
                everywhere = all(each == step for each in steps)
                items, changed = self._place(copy if mine else None, None if everywhere else source)
            head = self._gather("head", None if copy is None else copy.head)[source]
            found = self._target.digest(items)
            others = sum(found[name] != head["digest"].get(name) for name in found)
            bad = self._gather("digest", changed + others)
            if not any(bad):
                return RunState(from_items(items), step, Progress.from_json(head["progress"]))
            # Each process judges the arrays that it holds. Where all were sent one copy, that copy
            # is the damaged one, whoever finds it wrong.
            wrong = [process for process, count in enumerate(bad) if count]
            damaged = wrong if everywhere else [source]
            reason = f"not the bits that were saved, on processes {damaged}"
            report(LocalCopyCorrupt(step=step, path=str(self.folder), reason=reason))
            if jax.process_index() in damaged and mine:
                with self._open() as folder:
                    _remove(folder, f"{step}{SUFFIX}")

    def _read_record(self) -> dict[str, str]:
        """The digests that the run recorded, by step; none where there is no such file."""
        if not self._record.exists():
            return {}
        try:
            where = str(self._record)
            return require_type(parse_json(read_text(self._record), where), dict[str, str], where)
        except (OSError, ConfigError) as error:
            say(f"{error}; without it no copy on a host's disk counts")
            return {}

    def _place(self, copy: _Copy | None, source: int | None) -> tuple[dict[str, Any], int]:
        """A copy's arrays on the devices, one at a time; sent by `source` where there is one.

        Also how many files had other bytes than the run recorded: 0 or 1.
        """
        arrays, digest = [], _Digest()
        with (
            digest,
            announced(f"a copy in {self.folder} to be read, or to come from another host"),
        ):
            for leaf, content in zip(self._leaves, self._read(copy, digest), strict=True):
                whole = content if source is None else _send(content, source)
                arrays.append(
                    jax.make_array_from_callback(
                        leaf.shape, leaf.sharding, lambda index, whole=whole: whole[index]
                    )
                )
        items = jax.tree.unflatten(jax.tree.structure(self._target.items), arrays)
        wrong = copy is not None and digest.hexdigest() != self._recorded[str(copy.step)]
        return items, int(wrong)

    def _gather(self, what: str, value: Any) -> list[Any]:
        # A name serves once in the coordination service, so every round has its own.
        return gather(f"local/{self._rounds}/{what}", value)

    def _newest(self, at_least: int = 0) -> _Copy | None:
        """The newest whole copy here since the last rollback, open. Its digest is not checked."""
        try:
            with self._open() as folder:
                names = [name for name in os.listdir(folder) if name.endswith(SUFFIX)]
                found = (whole_number(name.removesuffix(SUFFIX)) for name in names)
                steps = {step for step in found if step is not None}
                for step in sorted(steps, reverse=True):
                    if step >= at_least and (copy := self._open_copy(folder, step)) is not None:
                        return copy
        except (OSError, ConfigError) as error:
            say(f"{self.folder} has no copy to go on from: {error}")
        return None

    def _open_copy(self, folder: int, step: int) -> _Copy | None:
        name = f"{step}{SUFFIX}"
        with contextlib.ExitStack() as files:
            try:
                # Before anything of it is read.
                if str(step) not in self._recorded:
                    raise ValueError(
                        f"{self._record} has no digest of it: it was made by another user, by an "
                        "earlier version, or before a rollback"
                    )
                opener = lambda name, flags: open_in(folder, name, flags)
                file = files.enter_context(open(name, "rb", opener=opener))
                head, prefix = _read_head(file)
                # Whole, but from before the last rollback: nothing to report.
                if head["rollbacks"] != self._rollbacks:
                    return None
                self._require_ours(head, step)
                expected = sum(leaf.size * leaf.dtype.itemsize for leaf in self._leaves)
                if (size := os.fstat(file.fileno()).st_size) != len(prefix) + expected:
                    raise ValueError(f"{size} bytes of {len(prefix) + expected}")
            except (OSError, ValueError, KeyError, struct.error) as error:
                place = self.folder / name
                say(f"{place} is not a copy to go on from: {type(error).__name__}: {error}")
                return None
            files.pop_all()
            return _Copy(step, file, head, prefix)

    def _require_ours(self, head: dict[str, Any], step: int) -> None:
        """Raise ValueError where a copy is of another step, tokenizer or model."""
        Progress.from_json(head["progress"])
        # In their order: the file holds arrays without names.
        names = names_of(self._target.items)
        if head["step"] != step:
            raise ValueError(f"of step {head['step']}")
        if head["tokenizer"] != self._tokenizer or list(head["digest"]) != names:
            raise ValueError("of another tokenizer or model")
        if head["model"] != self._target.model:
            raise ValueError("of another tokenizer or model")

    def _read(self, copy: _Copy | None, digest: "_Digest") -> Iterator[np.ndarray]:
        """The arrays of a copy, one at a time; zeros where there is none (they are sent)."""
        if copy is None:
            yield from (np.zeros(leaf.shape, leaf.dtype) for leaf in self._leaves)
            return
        digest.add(copy.prefix)
        for leaf in self._leaves:
            array = np.fromfile(copy.file, leaf.dtype, leaf.size)
            digest.add(_bytes_of(array))
            yield array.reshape(leaf.shape)


class _Digest:
    """SHA-256 of the SHA-256 of every PART of what is added; threads hash the parts.

    Not the digests of state.py: those find damage, and anybody can make other numbers that have
    them.
    """

    def __init__(self) -> None:
        self._whole = hashlib.sha256()

    def __enter__(self) -> Self:
        # Cores beside the one that feeds the devices; more would not be faster than memory.
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, content: bytes | memoryview) -> None:
        """Add bytes behind those before."""
        part = lambda begin: hashlib.sha256(memoryview(content)[begin : begin + PART]).digest()
        for found in self._pool.map(part, range(0, len(content), PART)):
            self._whole.update(found)

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return self._whole.hexdigest()


def _read_head(file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """A copy's head, and all bytes before its arrays."""
    first = file.read(8)
    length = struct.unpack("<Q", first)[0]
    if length > LARGEST_HEAD:
        raise ValueError(f"a head of {length} bytes")
    content = file.read(length)
    head = parse_json(decode(content, "its head"), "its head")
    return require_keys(head, _HEAD, "its head"), first + content


def _remove(folder: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def require_whole(state: TrainState) -> None:
    """Raise ConfigError where a process holds only a part of a state: there can be no copies of it.

    state: shapes with shardings (step.Steps.abstract_state).
    """
    items = as_items(state)
    leaves = zip(names_of(items), jax.tree.leaves(items), strict=True)
    parts = [(name, leaf.sharding.mesh.shape) for name, leaf in leaves if not _is_whole(leaf)]
    if parts:
        name, mesh = parts[0]
        raise ConfigError(
            f"checkpoint.local_dir needs every process to hold the whole state, and {name} lies "
            f"across processes ({len(parts)} arrays do), split by mesh.state={mesh['state']}, "
            f"mesh.fsdp={mesh['fsdp']} and mesh.tensor={mesh['tensor']}; set mesh.state 1 and "
            "mesh.data -1, with mesh.fsdp and mesh.tensor inside a host, or checkpoint.local_dir "
            "null"
        )


def _is_whole(leaf: Any) -> bool:
    """Whether this process's devices hold all of an array."""
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    # By text: before Python 3.12 a slice is no key. Distinct pieces do not overlap.
    pieces = {str(index): index for index in indices}
    sizes = [int(np.prod(_shape_of(index, leaf.shape))) for index in pieces.values()]
    return sum(sizes) == leaf.size


def _shape_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def _distinct_shards(array: jax.Array) -> list[Any]:
    """The shards on this process's devices, each part once."""
    return list({str(shard.index): shard for shard in array.addressable_shards}.values())


def _on_host(array: jax.Array) -> np.ndarray:
    """A shard's numbers in memory that the next step does not overwrite."""
    host = np.asarray(array)
    # On a CPU `asarray` shares the device's buffer, which the next step takes back (donation).
    return host.copy() if next(iter(array.devices())).platform == "cpu" else host


def _assemble(leaf: Any, pieces: list[tuple[Any, np.ndarray]]) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0][1]
    whole = np.empty(leaf.shape, leaf.dtype)
    for index, piece in pieces:
        whole[index] = piece
    return whole


def _send(content: np.ndarray, source: int) -> np.ndarray:
    """One process's array on all of them, bit for bit."""
    # As integers: the broadcast is a sum with zeros, and -0.0 + 0.0 would lose its sign.
    # Every array of a state has elements of four bytes.
    bits = content.reshape(-1).view(np.uint32)
    received = np.empty_like(bits)
    for begin in range(0, bits.size, CHUNK):
        part = bits[begin : begin + CHUNK]
        # Padded to powers of two, so that few sizes, and so few programs, are compiled.
        padded = np.zeros(1 << max(part.size - 1, 0).bit_length(), np.uint32)
        padded[: part.size] = part
        sent = multihost_utils.broadcast_one_to_all(padded, jax.process_index() == source)
        received[begin : begin + CHUNK] = sent[: part.size]
    return received.view(content.dtype).reshape(content.shape)
