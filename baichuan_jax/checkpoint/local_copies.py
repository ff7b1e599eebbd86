"""The fast tier of checkpoints: every host keeps a copy of the whole state on a disk of its own; a start takes the newest anywhere.

For runs in which each process holds the whole state: fsdp inside a host, data between hosts. Copies
are written often and beside the steps, without a word between hosts; who has none at a start (a
spare) gets the state from one who has. The run's folder stays the place that lasts: a copy counts
only if it is at least as new as the newest checkpoint there, and was made since the last rollback.
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

from baichuan_jax.checkpoint.orbax import Checkpoints, RestoredState, as_items, as_state, names_of
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.coordination import gather
from baichuan_jax.resilience.exits import say
from baichuan_jax.runs.events import LocalCopyCorrupt
from baichuan_jax.runs.files import publish

SUFFIX = ".state"
CHUNK = 1 << 26  # elements that are sent at once: 256 MiB


class LocalCopies:
    """This host's copies: `save` starts one, `finish` lets it count, `restore` takes the newest of all hosts.

    `rollbacks`: how often the run has rolled back; what was copied before the last time does not
    count. Raises ConfigError where a process holds only a part of the state.
    """

    def __init__(self, folder: Path, rollbacks: int, host: str, checkpoints: Checkpoints) -> None:
        self._folder = self._draft = folder
        self._rollbacks, self._checkpoints, self._target = (
            rollbacks,
            checkpoints,
            as_items(checkpoints.target),
        )
        self._writer = gather("local/hosts", host).index(host) == jax.process_index()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._rounds = 0
        leaves = zip(names_of(self._target), jax.tree.leaves(self._target), strict=True)
        parts = [name for name, leaf in leaves if not _is_whole(leaf)]
        if parts:
            raise ConfigError(
                f"checkpoint.local_dir needs every process to hold the whole state, and {parts[0]} lies across processes "
                f"({len(parts)} arrays do); set mesh.fsdp and mesh.tensor to a host's devices, or checkpoint.local_dir null"
            )

    def save(self, state: Any, step: int, position: int) -> None:
        """Start a copy; returns once the state is in the host's memory. Raises what the one before failed with."""
        self.finish()
        digest = self._checkpoints.digest(state)  # on all devices together
        if not self._writer:
            return
        shards = [_distinct_shards(array) for array in jax.tree.leaves(as_items(state))]
        for parts in shards:
            for shard in parts:
                shard.data.copy_to_host_async()
        parts = [[(shard.index, _on_host(shard.data)) for shard in these] for these in shards]
        tokenizer = self._checkpoints.tokenizer
        head = {
            "rollbacks": self._rollbacks,
            "step": step,
            "position": position,
            "tokenizer": tokenizer,
            "digest": digest,
        }
        self._draft = self._folder / f"{step}{SUFFIX}.{os.getpid()}"
        self._thread = threading.Thread(target=self._write, args=(head, parts), name="local copy")
        self._thread.start()

    def is_saving(self) -> bool:
        """Whether a copy is still being written here."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the copy under way and let it count, in place of the one before. Raises what it failed with."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        path = self._draft.with_suffix("")
        publish(self._draft, path)
        for other in self._folder.glob(f"*{SUFFIX}*"):
            if other != path:
                other.unlink(missing_ok=True)

    def _write(self, head: dict[str, Any], parts: list[list[tuple[Any, np.ndarray]]]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(head).encode()
            with open(self._draft, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for leaf, pieces in zip(jax.tree.leaves(self._target), parts, strict=True):
                    _assemble(leaf, pieces).tofile(file)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:  # whatever it is, this copy does not count
            self._error = error
            self._draft.unlink(missing_ok=True)

    def restore(self, at_least: int, report: Callable[..., None]) -> RestoredState | None:
        """The newest good copy of a step from `at_least` on, or None. Calls report(event) for each bad one."""
        while True:
            self._rounds += 1
            path, head = self._newest()
            steps = [
                step if step is not None and step >= at_least else -1
                for step in self._tell("steps", head.get("step"))
            ]
            step = max(steps)
            if step < 0:
                return None
            source, mine = steps.index(step), steps[jax.process_index()] == step
            everywhere = all(each == step for each in steps)
            arrays = []
            for leaf, content in zip(
                jax.tree.leaves(self._target), self._read(path if mine else None), strict=True
            ):
                whole = content if everywhere else _send(content, source)
                arrays.append(
                    jax.make_array_from_callback(
                        leaf.shape, leaf.sharding, lambda index, whole=whole: whole[index]
                    )
                )
            state = as_state(
                self._checkpoints.target,
                jax.tree.unflatten(jax.tree.structure(self._target), arrays),
            )
            head = self._tell("head", head)[source]
            found = self._checkpoints.digest(state)
            bad = self._tell(
                "digest", sum(found[name] != head["digest"].get(name) for name in found)
            )
            if not any(bad):
                return RestoredState(state, step, head["position"])
            # Each process judges what it holds; where all were sent one copy, that one goes,
            # whoever finds it wrong.
            damaged = (
                [process for process, count in enumerate(bad) if count] if everywhere else [source]
            )
            reason = f"not the bits that were saved, on processes {damaged}"
            report(LocalCopyCorrupt(step=step, path=str(self._folder), reason=reason))
            if jax.process_index() in damaged and path is not None:
                path.unlink(missing_ok=True)

    def _tell(self, what: str, value: Any) -> list[Any]:
        return gather(f"local/{self._rounds}/{what}", value)

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest whole copy here since the last rollback, and what it says of itself."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._target))
        files = [path for path in self._folder.glob(f"*{SUFFIX}") if path.stem.isdigit()]
        for path in sorted(files, key=lambda path: -int(path.stem)):
            try:
                head, start = _read_head(path)
                if head["rollbacks"] != self._rollbacks:
                    continue
                if head["tokenizer"] != self._checkpoints.tokenizer or list(
                    head["digest"]
                ) != names_of(self._target):
                    raise ValueError("of another tokenizer or model")
                if (found := path.stat().st_size) != start + size:
                    raise ValueError(f"{found} bytes of {start + size}")
                return path, head
            except (OSError, ValueError, KeyError, struct.error) as error:
                say(f"{path} is not a copy to go on from: {type(error).__name__}: {error}")
        return None, {}

    def _read(self, path: Path | None) -> Iterator[np.ndarray]:
        """The arrays of a copy, one at a time; zeros where there is none, for those who are sent theirs."""
        leaves = jax.tree.leaves(self._target)
        if path is None:
            yield from (np.zeros(leaf.shape, leaf.dtype) for leaf in leaves)
            return
        with open(path, "rb") as file:
            file.seek(_read_head(path)[1])
            yield from (
                np.fromfile(file, leaf.dtype, leaf.size).reshape(leaf.shape) for leaf in leaves
            )


def _read_head(path: Path) -> tuple[dict[str, Any], int]:
    """What a copy says of itself, and where its arrays begin."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > path.stat().st_size:
            raise ValueError(f"a head of {length} bytes")
        return json.loads(file.read(length)), 8 + length


def _is_whole(leaf: Any) -> bool:
    """Whether this process's devices hold all of an array."""
    pieces = {
        str(index): index
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    }
    return sum(int(np.prod(_shape_of(index, leaf.shape))) for index in pieces.values()) == leaf.size


def _shape_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def _distinct_shards(array: jax.Array) -> list[Any]:
    """The shards on this process's devices, one of each part."""
    return list({str(shard.index): shard for shard in array.addressable_shards}.values())


def _on_host(array: jax.Array) -> np.ndarray:
    """A shard's numbers in the host's memory, which the next step leaves alone: on a CPU they would be the device's own."""
    host = np.asarray(array)
    return host.copy() if next(iter(array.devices())).platform == "cpu" else host


def _assemble(leaf: Any, pieces: list[tuple[Any, np.ndarray]]) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0][1]
    whole = np.empty(leaf.shape, leaf.dtype)
    for index, piece in pieces:
        whole[index] = piece
    return whole


def _send(content: np.ndarray, source: int) -> np.ndarray:
    """One process's array on all of them, bit for bit: sent as integers, since a sum with zeros would lose the sign of a zero."""
    bits = content.reshape(-1).view(np.uint32)
    received = np.empty_like(bits)
    for begin in range(0, bits.size, CHUNK):
        part = bits[begin : begin + CHUNK]
        padded = np.zeros(
            1 << max(part.size - 1, 0).bit_length(), np.uint32
        )  # few sizes, so that few programs are compiled
        padded[: part.size] = part
        received[begin : begin + CHUNK] = multihost_utils.broadcast_one_to_all(
            padded, jax.process_index() == source
        )[: part.size]
    return received.view(content.dtype).reshape(content.shape)
