"""Copies of the whole state on every host's own disk: the fast tier of checkpoints.

In: a state that every process holds whole (fsdp inside a host, data between hosts). Each host
writes its copy often and beside the steps, without asking other hosts, so that a copy costs no
network. At a start all hosts compare what they have; those without the newest copy (a spare, an
emptied disk) are sent it by one that has it, and all compare digests (the idea of Gemini, Wang et
al., SOSP 2023, with disks in place of memory). Storage stays the place that lasts: a copy counts
only if it is at least as new as the newest checkpoint there and was made since the last rollback.

The file: 8 bytes with the length of a JSON head, the head, then all arrays in their order.
"""

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from baichuan_jax.checkpoint.progress import Progress
from baichuan_jax.checkpoint.state import RunState, StateTarget, as_items, from_items, names_of
from baichuan_jax.config.parsing import Count, decode, parse_json, require_keys, whole_number
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.coordination import gather
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.events import LocalCopyCorrupt
from baichuan_jax.runs.files import publish

SUFFIX = ".state"
_HEAD = {
    "step": Count,
    "position": Count,
    "rollbacks": Count,
    "tokenizer": str,
    "digest": dict[str, int],
}
# Elements that are sent at once: 256 MiB.
CHUNK = 1 << 26


class LocalCopies:
    """This host's copies: `save` starts one, `finish` lets it count, `restore` takes the newest.

    `rollbacks`: how often the run has rolled back; copies made before the last time do not count.
    `progress_at`: the progress of a copy of an earlier version, which says its position alone. One
    process of each `host` writes. Raises ConfigError where a process holds only a part of the
    state.
    """

    def __init__(
        self,
        folder: Path,
        rollbacks: int,
        host: str,
        tokenizer_hash: str,
        target: StateTarget,
        progress_at: Callable[[int], Progress],
    ) -> None:
        self.folder, self._draft = folder, folder
        self._rollbacks, self._tokenizer, self._target = rollbacks, tokenizer_hash, target
        self._progress_at = progress_at
        # One process of a host is enough: each holds the whole state.
        self._writer = gather("local/hosts", host).index(host) == jax.process_index()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._rounds = 0
        leaves = zip(names_of(target.items), self._leaves, strict=True)
        parts = [name for name, leaf in leaves if not _is_whole(leaf)]
        if parts:
            raise ConfigError(
                f"checkpoint.local_dir needs every process to hold the whole state, and {parts[0]} "
                f"lies across processes ({len(parts)} arrays do); set mesh.fsdp and mesh.tensor to "
                "a host's devices, or checkpoint.local_dir null"
            )

    @property
    def _leaves(self) -> list[Any]:
        """Shapes and shardings of the arrays, in the order of the file."""
        return jax.tree.leaves(self._target.items)

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
        self._draft = self.folder / f"{step}{SUFFIX}.{os.getpid()}"
        self._thread = threading.Thread(target=self._write, args=(head, parts), name="local copy")
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
        path = self._draft.with_suffix("")
        publish(self._draft, path)
        # Deleted only now: at every moment one whole copy is here. The pattern also finds what a
        # killed process left half written (STEP.state.PID).
        for other in self.folder.glob(f"*{SUFFIX}*"):
            if other != path:
                other.unlink(missing_ok=True)

    def _write(self, head: dict[str, Any], parts: list[list[tuple[Any, np.ndarray]]]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(head).encode()
            with open(self._draft, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for leaf, pieces in zip(self._leaves, parts, strict=True):
                    # Not tofile, whose error has no number: a full disk would not be known as one.
                    file.write(_assemble(leaf, pieces).reshape(-1).view(np.uint8).data)
                # On this thread, beside the steps: `publish` then finds nothing left to write.
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:  # of any type: `finish` raises it on the main thread
            self._error = error
            # Half a copy is of no use, and the disk may be full.
            self._draft.unlink(missing_ok=True)

    def restore(self, at_least: int, report: Callable[[LocalCopyCorrupt], None]) -> RunState | None:
        """The newest good copy of a step from `at_least` on, from any host; None: there is none.

        Reports and deletes each damaged copy and tries again, so the loop ends.
        """
        while True:
            self._rounds += 1
            path, head = self._newest()
            steps = [
                step if step is not None and step >= at_least else -1
                for step in self._gather("steps", head.get("step"))
            ]
            step = max(steps)
            if step < 0:
                return None
            source, mine = steps.index(step), steps[jax.process_index()] == step
            everywhere = all(each == step for each in steps)
            items = self._place(path if mine else None, None if everywhere else source)
            head = self._gather("head", head)[source]
            found = self._target.digest(items)
            bad = self._gather(
                "digest", sum(found[name] != head["digest"].get(name) for name in found)
            )
            if not any(bad):
                return RunState(from_items(items), step, self._progress(head))
            # Each process judges the arrays that it holds. Where all were sent one copy, that copy
            # is the damaged one, whoever finds it wrong.
            wrong = [process for process, count in enumerate(bad) if count]
            damaged = wrong if everywhere else [source]
            reason = f"not the bits that were saved, on processes {damaged}"
            report(LocalCopyCorrupt(step=step, path=str(self.folder), reason=reason))
            if jax.process_index() in damaged and path is not None:
                path.unlink(missing_ok=True)

    def _progress(self, head: dict[str, Any]) -> Progress:
        """Raises ValueError for a head that has none."""
        if "progress" in head:
            return Progress.from_json(head["progress"])
        return self._progress_at(head["position"])

    def _place(self, path: Path | None, source: int | None) -> dict[str, Any]:
        """A copy's arrays on the devices, one at a time; sent by `source` where there is one."""
        arrays = []
        with announced(f"a copy in {self.folder} to be read, or to come from another host"):
            for leaf, content in zip(self._leaves, self._read(path), strict=True):
                whole = content if source is None else _send(content, source)
                arrays.append(
                    jax.make_array_from_callback(
                        leaf.shape, leaf.sharding, lambda index, whole=whole: whole[index]
                    )
                )
        return jax.tree.unflatten(jax.tree.structure(self._target.items), arrays)

    def _gather(self, what: str, value: Any) -> list[Any]:
        # A name serves once in the coordination service, so every round has its own.
        return gather(f"local/{self._rounds}/{what}", value)

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest whole copy here since the last rollback, and its head."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in self._leaves)
        names = names_of(self._target.items)
        found = list(self.folder.glob(f"*{SUFFIX}"))
        files = [path for path in found if whole_number(path.stem) is not None]
        for path in sorted(files, key=lambda path: -int(path.stem)):
            try:
                head, start = _read_head(path)
                # Whole, but from before the last rollback: nothing to report.
                if head["rollbacks"] != self._rollbacks:
                    continue
                # In their order: the file holds arrays without names.
                if head["tokenizer"] != self._tokenizer or list(head["digest"]) != names:
                    raise ValueError("of another tokenizer or model")
                # A copy of an earlier version does not name its model.
                if head.get("model", self._target.model) != self._target.model:
                    raise ValueError("of another tokenizer or model")
                if (found := path.stat().st_size) != start + size:
                    raise ValueError(f"{found} bytes of {start + size}")
                self._progress(head)
                return path, head
            except (OSError, ValueError, KeyError, struct.error) as error:
                say(f"{path} is not a copy to go on from: {type(error).__name__}: {error}")
        return None, {}

    def _read(self, path: Path | None) -> Iterator[np.ndarray]:
        """The arrays of a copy, one at a time; zeros where there is none (they are sent)."""
        if path is None:
            yield from (np.zeros(leaf.shape, leaf.dtype) for leaf in self._leaves)
            return
        with open(path, "rb") as file:
            file.seek(_read_head(path)[1])
            for leaf in self._leaves:
                yield np.fromfile(file, leaf.dtype, leaf.size).reshape(leaf.shape)


def _read_head(path: Path) -> tuple[dict[str, Any], int]:
    """A copy's head, and where its arrays begin."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > path.stat().st_size:
            raise ValueError(f"a head of {length} bytes")
        head = parse_json(decode(file.read(length), "its head"), "its head")
    return require_keys(head, _HEAD, "its head"), 8 + length


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
