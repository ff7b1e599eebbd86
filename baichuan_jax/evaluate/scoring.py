"""Scores of next tokens after many prompts: requests go in, logits of the wanted tokens come out.

Three savings over running each prompt by itself. Requests of a group often share a long beginning
(the few-shot examples of a subject): it runs once, and its keys and values serve all rows. The
remaining tokens are batched by length, with little padding. The head sees the last position of each
row alone.

B rows, T tokens of a row, S tokens of a shared prefix, W wanted next tokens, D hidden,
V vocabulary.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from baichuan_jax.model import (
    Cache,
    Params,
    Transformer,
    init_cache,
    matmul_precision,
    positions_of,
)
from baichuan_jax.sharding import Layout, activate

# A shorter common beginning, or fewer rows that share it, is not worth a pass of its own.
MIN_SHARED_TOKENS = 32
MIN_SHARING_ROWS = 3


def default_batch_tokens() -> int:
    """Tokens of a batch on one device, where the caller names none."""
    # A CPU is fastest with little padding and attention's scores in its caches; an accelerator
    # needs long products.
    return 1024 if jax.default_backend() == "cpu" else 8192


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Tokens, and the next tokens whose scores are wanted."""

    tokens: list[int]
    wanted: tuple[int, ...]
    # Requests of equal group are looked at for a common beginning.
    group: Any = None


@dataclasses.dataclass
class Work:
    """What a scorer has done so far."""

    # Of running, compilation left out.
    seconds: float = 0.0
    compile_seconds: float = 0.0
    # Of all requests.
    prompt_tokens: int = 0
    # Tokens that went through the model: less for shared beginnings, more for padding.
    run_tokens: int = 0


class Scorer:
    """Runs requests through one model on one device or on a mesh; compiles once for each shape."""

    def __init__(
        self, model: Transformer, mesh: Mesh | None = None, batch_tokens: int | None = None
    ) -> None:
        """batch_tokens: tokens of a batch on one device; None: default_batch_tokens."""
        self.config = model.config
        self.work = Work()
        # Apart, since `use` replaces the parameters: they are arguments of the compiled passes.
        self._graphdef, state = nnx.split(model)
        self._params: Params = nnx.to_pure_dict(state)
        self._layout = None if mesh is None else Layout(mesh)
        self._shards = 1 if self._layout is None else self._layout.batch_shards
        self._length_step = 1 if mesh is None else mesh.shape["context"]
        self._batch_tokens = batch_tokens or default_batch_tokens()
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def use(self, params: Params) -> None:
        """Score with these parameters from here on; they have the shapes of the model's own."""
        self._params = params

    def score(
        self, requests: Sequence[ScoreRequest], on_done: Callable[[int], object] | None = None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Logits [W] of every request's wanted tokens, and log-normalisers [requests], in float32.

        Results do not depend on other calls. on_done is called with the number of newly finished
        requests.
        """
        began, compiled = time.perf_counter(), self.work.compile_seconds
        logits: list[Any] = [None] * len(requests)
        norms = np.zeros(len(requests), np.float32)

        def collect(rows: list[int], results: Any) -> None:
            picked_BW, norm_B = jax.device_get(results)
            # Not strict: rows of padding come last.
            for row, picked_W, norm in zip(rows, picked_BW, norm_B, strict=False):
                logits[row], norms[row] = picked_W[: len(requests[row].wanted)], norm
            if on_done is not None:
                on_done(len(rows))

        # One batch behind: the devices work on a batch while the host fetches the one before.
        pending: tuple[list[int], Any] | None = None
        for batch in self._batches(requests):
            if pending is not None:
                collect(*pending)
            pending = batch
        if pending is not None:
            collect(*pending)
        self.work.seconds += time.perf_counter() - began - (self.work.compile_seconds - compiled)
        self.work.prompt_tokens += sum(len(request.tokens) for request in requests)
        return logits, norms

    def _batches(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[list[int], Any]]:
        """(row numbers, results on the devices) of every batch, shared beginnings first."""
        groups: dict[Any, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(request.group, []).append(row)
        alone: list[int] = []
        for rows in groups.values():
            shared = _common_length([requests[row].tokens for row in rows])
            if len(rows) < MIN_SHARING_ROWS or shared < MIN_SHARED_TOKENS:
                alone += rows
            else:
                prefix = self._prefix(requests[rows[0]].tokens[:shared])
                yield from self._in_batches(requests, rows, prefix, shared)
        yield from self._in_batches(requests, alone, None, 0)

    def _in_batches(
        self, requests: Sequence[ScoreRequest], rows: list[int], prefix: Cache | None, skip: int
    ) -> Iterator[tuple[list[int], Any]]:
        """Batches of these rows without their first `skip` tokens, which the prefix holds."""
        # One width for all batches, so that fewer shapes are compiled.
        width = max((len(request.wanted) for request in requests), default=0)
        # Longest first: rows of a batch are about equally long, and a shape that does not fit into
        # memory fails at once.
        rows = sorted(rows, key=lambda row: -len(requests[row].tokens))
        while rows:
            T = self._length(len(requests[rows[0]].tokens) - skip)
            B = self._batch_size(len(rows), T)
            batch, rows = rows[:B], rows[B:]
            # Padding goes to the right, where no wanted position attends to it.
            tokens_BT, last_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
            wanted_BW = np.zeros((B, width), np.int32)
            for place, row in enumerate(batch):
                tokens = requests[row].tokens[skip:]
                tokens_BT[place, : len(tokens)] = tokens
                last_B[place] = len(tokens) - 1
                wanted_BW[place, : len(requests[row].wanted)] = requests[row].wanted
            arrays = [self._put(array, "batch") for array in (tokens_BT, last_B, wanted_BW)]
            self.work.run_tokens += B * T
            yield batch, self._run(self._score, self._params, prefix, *arrays)

    def _length(self, count: int) -> int:
        """The padded length of `count` tokens: the next of 16, 20, 24, 28, 32, 40, ...

        Four lengths to each doubling: few shapes are compiled, and at most a fifth is padding. On a
        mesh that splits sequences, a multiple of its pieces.
        """
        step = (1 << max(count - 1, 16).bit_length() - 1) // 4
        length = -(-max(count, 16) // step) * step
        return -(-length // self._length_step) * self._length_step

    def _batch_size(self, count: int, T: int) -> int:
        """Rows of the next batch of `count` rows that are left, each of T tokens.

        What batch_tokens hold on every device; for the last rows half of that, a fourth, ..., so
        that few shapes are compiled.
        """
        most = max(1, self._batch_tokens // T)
        sizes = [most * self._shards]
        while most > 1:
            most = -(-most // 2)
            sizes.append(most * self._shards)
        if count >= sizes[0]:
            return sizes[0]
        up = min(size for size in sizes if size >= count)
        down = max((size for size in sizes if size <= count), default=up)
        # One batch with up to a third of padding rows, or else two batches.
        return up if 2 * up <= 3 * count else down

    def _prefix(self, tokens: list[int]) -> Cache:
        """Keys and values of a shared beginning, as a cache of one row."""
        S = self._length(len(tokens))
        tokens_1S = np.zeros((1, S), np.int32)
        tokens_1S[0, : len(tokens)] = tokens
        self.work.run_tokens += S
        return self._run(
            self._fill, self._params, self._put(tokens_1S), self._put(np.int32(len(tokens)))
        )

    def _fill(self, params: Params, tokens_1S: jax.Array, length: jax.Array) -> Cache:
        """The compiled pass over a shared beginning."""
        # A single row: there is no batch that the mesh could split.
        with self._traced(params, batch_axes=()) as model:
            mask_1S = jnp.ones(tokens_1S.shape, bool)
            _, cache = model.extend(
                tokens_1S, init_cache(self.config, mask_1S), positions_of(mask_1S)
            )
            # The tokens' count without padding, so that rows continue right after the last one.
            return cache._replace(length=length)

    def _score(
        self, params: Params, prefix: Cache | None, tokens_BT, last_B, wanted_BW
    ) -> tuple[jax.Array, jax.Array]:
        """The compiled pass over a batch: wanted logits [B, W] and log-normalisers [B]."""
        with self._traced(params) as model:
            if prefix is None:
                hidden_BTD = model.hidden(tokens_BT)
            else:
                hidden_BTD = model.hidden_after(tokens_BT, prefix)
            hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
            logits_BV = model.head(hidden_BD)
            picked_BW = jnp.take_along_axis(logits_BV, wanted_BW, axis=1)
            return picked_BW, jax.nn.logsumexp(logits_BV, axis=-1)

    @contextlib.contextmanager
    def _traced(self, params: Params, **layout: Any) -> Iterator[Transformer]:
        """The model with these parameters, on the mesh, while a pass is traced."""
        current = self._layout and dataclasses.replace(self._layout, **layout)
        with activate(current), matmul_precision(self.config):
            yield nnx.merge(self._graphdef, params)

    def _put(self, array: Any, *axes: str | None) -> Any:
        """An array on the mesh, or as it is without one; every process holds the whole of it."""
        array = np.asarray(array)
        if self._layout is None:
            return array
        sharding = self._layout.sharding(*axes, *(None,) * (array.ndim - len(axes)))
        # Not device_put, which would compare the array across all processes.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def _run(self, function: Callable, *arguments: Any) -> Any:
        """Call a function compiled for these shapes; compilation is timed apart."""
        # Without the parameters: their shapes never change.
        key = (function.__name__, *(np.shape(leaf) for leaf in jax.tree.leaves(arguments[1:])))
        if key not in self._compiled:
            began = time.perf_counter()
            # Scores come back whole to every process; a cache stays split along heads.
            # != and not `is not`: each access to a method makes another object.
            whole = None
            if self._layout is not None and function != self._fill:
                whole = self._layout.sharding()
            self._compiled[key] = jax.jit(function, out_shardings=whole).lower(*arguments).compile()
            self.work.compile_seconds += time.perf_counter() - began
        return self._compiled[key](*arguments)


def _common_length(rows: list[list[int]]) -> int:
    """Tokens that all rows begin with, leaving at least one of each."""
    # The first and the last in dictionary order: what these two share, all rows share.
    first, last = min(rows), max(rows)
    limit = min(len(row) for row in rows) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))
