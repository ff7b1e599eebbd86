"""Global batches of packed rows: a pure function of a run's progress, for any number of processes.

Input: corpora of rows, and how far the run is in them. Output: an endless sequence of batches, as
arrays that lie on the devices of all processes. Row n of the run is a function of the progress and
n (checkpoint/progress.py): the corpora are mixed by weight, and each is shuffled again every epoch.
A batch is the next G rows that are not left out. A process reads only the rows that its own devices
hold, so any number of processes gives the same batches, and a run that restarts gets what it would
have had.

G rows of a step over all devices, A micro-batches, B = G / A rows of one, T tokens.
"""

import itertools
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from baichuan_jax.checkpoint.progress import Progress
from baichuan_jax.data.rows import Rows
from baichuan_jax.loss import IGNORE
from baichuan_jax.resilience.guard import Window

# Batches held ready, so that a slow read does not hold up a step.
PREFETCHED = 8
# Threads that read rows.
THREADS = 4
# How long a close may take before it is given up.
CLOSE_SECONDS = 5.0


class Loader:
    """Endless iterator over training batches, beginning where `progress` is.

    `sources`: the corpora of the progress's mixture, by their names. Windows [begin, end) of the
    run's rows in `skip` are left out. Yields dicts of int32 [A, B, T], sharded as `sharding` says:
    `inputs`, `labels` (the next tokens) and, with document_mask, `segment_ids` and `positions`.
    Raises ConfigError naming a row that cannot be read.
    """

    def __init__(
        self,
        sources: Mapping[str, Rows],
        *,
        progress: Progress,
        accumulation_steps: int,
        eos_id: int,
        document_mask: bool,
        sharding: NamedSharding,
        skip: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._skip = _merged(skip)
        # The next row's number among those that are not left out.
        self._index = _index_of(progress.row, self._skip)
        self._progress = progress.at(_row_of(self._index, self._skip))
        self._sharding = sharding
        self._eos_id = eos_id if document_mask else None
        batch_size = progress.batch_size
        length = next(iter(sources.values())).context_length
        self._shape = (accumulation_steps, batch_size // accumulation_steps, length)
        self._rows = _needed_rows(sharding, self._shape)
        sequence = _Sequence(sources, progress)
        batches: Any = _Batches(sequence, self._rows, self._index, batch_size, self._skip)
        # A dataset of batches with random access: to begin anywhere skips nothing.
        dataset: Any = grain.MapDataset.source(batches)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        try:
            rows = next(self._iterator)
        except Exception:
            # The next call would give the batch after the one that failed, and leave that one out.
            self.close()
            raise
        self._index += self._progress.batch_size
        self._progress = self._progress.at(_row_of(self._index, self._skip))
        return _to_devices(_arrays(rows, self._eos_id), self._rows, self._shape, self._sharding)

    @property
    def progress(self) -> Progress:
        """Where the next batch begins."""
        return self._progress

    @property
    def position(self) -> int:
        """Of the next batch."""
        return self._progress.position

    @property
    def window(self) -> Window:
        """Position and rows of the next batch."""
        last = _row_of(self._index + self._progress.batch_size - 1, self._skip)
        position = self.position
        return Window(position, position + 1, (self._progress.row, last + 1))

    def close(self) -> None:
        """Stop reading, within CLOSE_SECONDS."""
        # grain's own close waits for ever on a thread that is blocked:
        # https://github.com/google/grain/issues/1372
        # A daemon: it does not hold the exit of the process.
        closer = threading.Thread(target=self._iterator.close, daemon=True)
        closer.start()
        closer.join(CLOSE_SECONDS)


class _Sequence:
    """The run's rows by their numbers, from where the mixture under way began."""

    def __init__(self, sources: Mapping[str, Rows], progress: Progress) -> None:
        self._progress = progress
        # A corpus is used once an epoch, in an order that no other epoch or corpus has. A seed of
        # its own for each, else two of the same length would be in the same order.
        self._corpora: dict[int, Any] = {
            number: grain.MapDataset.source(sources[corpus.name])
            .seed(progress.seed + 1000003 * number)
            .shuffle()
            .repeat(None, reseed_each_epoch=True)
            for number, corpus in enumerate(progress.corpora)
            if corpus.weight
        }

    def __getitem__(self, row: int) -> np.ndarray:
        number, index = self._progress.find(row)
        return self._corpora[number][index]


def _merged(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Windows [begin, end) in order; those that touch become one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(windows):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _row_of(index: int, skip: list[tuple[int, int]]) -> int:
    """The number of the index-th row that is not left out."""
    row = index
    for begin, end in skip:
        # In order: each window that begins before moves the row on.
        row += end - begin if row >= begin else 0
    return row


def _index_of(row: int, skip: list[tuple[int, int]]) -> int:
    """How many of the first rows are not left out."""
    return row - sum(max(0, min(end, row) - begin) for begin, end in skip if begin < row)


class _Batches:
    """Random access to this process's part of every global batch: [rows needed, T + 1].

    `first`: the index of the first row among those that are not left out.
    """

    def __init__(
        self,
        sequence: _Sequence,
        rows: np.ndarray,
        first: int,
        batch_size: int,
        skip: list[tuple[int, int]],
    ) -> None:
        self._sequence, self._rows, self._skip = sequence, rows, skip
        self._first, self._batch_size = first, batch_size

    def __len__(self) -> int:
        # Endless; whole numbers of this size are what grain's datasets can count to.
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        first = self._first + index * self._batch_size
        numbers = [_row_of(first + int(row), self._skip) for row in self._rows]
        return np.stack([self._sequence[number] for number in numbers])


def _needed_rows(sharding: NamedSharding, shape: tuple[int, int, int]) -> np.ndarray:
    """Numbers, within a global batch, of the rows that this process's devices hold."""
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    # Devices that share rows (the axes context and tensor) read them once.
    needed = [
        numbers[index[:2]].ravel()
        for index in sharding.addressable_devices_indices_map(shape).values()
        if index
    ]
    return np.unique(np.concatenate(needed))


def _arrays(rows: np.ndarray, eos_id: int | None) -> dict[str, np.ndarray]:
    """A batch's arrays [n, T] of rows [n, T + 1]; eos_id where documents are kept apart."""
    arrays = {"inputs": rows[:, :-1], "labels": rows[:, 1:]}
    return arrays if eos_id is None else arrays | document_arrays(arrays["inputs"], eos_id)


def _to_devices(
    arrays: dict[str, np.ndarray],
    numbers: np.ndarray,
    shape: tuple[int, int, int],
    sharding: NamedSharding,
) -> dict[str, jax.Array]:
    """Arrays [n, T] of rows, with their numbers in the batch, as global arrays [A, B, T]."""
    place = np.full(shape[0] * shape[1], -1)
    place[numbers] = np.arange(len(numbers))
    place = place.reshape(shape[:2])

    def make(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return array[place[index[:2]]][..., index[2]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: make(array) for name, array in arrays.items()}


def document_arrays(inputs: np.ndarray, eos_id: int) -> dict[str, np.ndarray]:
    """`segment_ids` and `positions` of rows [n, T], for a mask that keeps documents apart.

    Segments count from 1, with a new one after every EOS; positions from 0 in every segment.
    """
    # The token after an EOS begins a document. A row may begin in the middle of one, which is then
    # segment 1 from position 0.
    starts = np.zeros(inputs.shape, bool)
    starts[:, 1:] = inputs[:, :-1] == eos_id
    columns = np.arange(inputs.shape[1])
    begin = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return {
        "segment_ids": (1 + np.cumsum(starts, axis=1)).astype(np.int32),
        "positions": (columns - begin).astype(np.int32),
    }


def validation_batches(
    sources: list[tuple[Rows, float]],
    *,
    accumulation_steps: int,
    batch_size: int,
    eos_id: int,
    document_mask: bool,
    sharding: NamedSharding,
    num_batches: int,
) -> Iterator[dict[str, jax.Array]]:
    """The first rows of all corpora in turn, always the same ones, in batches like the Loader's.

    A last batch that is not full has rows whose labels are all ignored: every batch has the same
    shape, so that the step is compiled once.
    """
    T = sources[0][0].context_length
    shape = (accumulation_steps, batch_size // accumulation_steps, T)
    numbers = _needed_rows(sharding, shape)
    order = _in_turn([len(rows) for rows, _ in sources], num_batches * batch_size)
    for start in range(0, len(order), batch_size):
        # Token 0 where there is no row; its label is ignored.
        rows = np.zeros((len(numbers), T + 1), np.int32)
        real = np.zeros(len(numbers), bool)
        for slot, number in enumerate(numbers):
            if start + number < len(order):
                source, index = order[start + number]
                rows[slot], real[slot] = sources[source][0][index], True
        arrays = _arrays(rows, eos_id if document_mask else None)
        arrays["labels"] = np.where(real[:, None], arrays["labels"], IGNORE)
        yield _to_devices(arrays, numbers, shape, sharding)


def _in_turn(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """(source, row) pairs, one of each source in turn, until all are used or there are `limit`."""
    # In turn, so that a few batches say something about every corpus.
    order = (
        (source, row)
        for row in range(max(lengths))
        for source, length in enumerate(lengths)
        if row < length
    )
    return list(itertools.islice(order, limit))
