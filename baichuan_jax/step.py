"""The training step as pure functions of pytrees: sharded initial state, train_step, eval_step.

A batch is a dict of int32 arrays [A, B, T]: A micro-batches of B rows (`inputs`, `labels`, with
document masks also `segment_ids` and `positions`), as data/loader.py makes them.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_jax.config.schema import Config
from baichuan_jax.loss import IGNORE, cross_entropy
from baichuan_jax.model import Params, abstract_model, init_params, matmul_precision
from baichuan_jax.optimizer import clip_by_global_norm, learning_rate, make_optimizer
from baichuan_jax.resilience.digests import digest
from baichuan_jax.sharding import AXES, Layout, activate

Batch = dict[str, jax.Array]


class Request(enum.IntEnum):
    """What a process may ask of all processes; with each step they agree on the largest."""

    NONE = 0
    SAVE = 1
    STOP = 2
    """Save, then end the launch."""
    ROLL_BACK = 3
    """End the launch; the next one starts from before a loss spike."""


class TrainState(NamedTuple):
    """Everything that a step changes; also its shapes or shardings, in the same places.

    `step` counts steps; `nonfinite` those whose update was skipped, `nonfinite_run` how many of
    these came last in a row.
    """

    params: Any
    opt_state: Any
    step: Any
    nonfinite: Any
    nonfinite_run: Any


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled functions of one configuration on one mesh, and how their arguments lie on it."""

    layout: Layout
    state_shapes: TrainState
    state_shardings: TrainState
    batch_sharding: NamedSharding
    """Of every array [A, B, T] of a batch."""
    init: Callable[[], TrainState]
    """Fresh state, created where it belongs; no device ever holds the whole."""
    start: Callable[[Params], TrainState]
    """Fresh state around given parameters, which are donated."""
    train: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    """One step; the state is donated. The last argument is `request(...)`.

    Metrics: loss, grad_norm, learning_rate, tokens, finite, nonfinite (so far), nonfinite_run (in a
    row), request (the largest of all processes')."""
    evaluate: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    """Sum of the loss over a batch, and its count of valid labels."""
    check: Callable[[Params, Batch], jax.Array]
    """A digest [replicas] uint32 of each replica's own copy of the parameters, and of the loss and gradients that it computes with
    them of the same rows, before anything is summed over replicas. Where hardware is right and deterministic, all are equal."""

    def request(self, request: Request = Request.NONE) -> jax.Array:
        """This process's control request as an argument of `train`: [devices] int32."""
        value = np.full(1, request, np.int32)
        return jax.make_array_from_callback(
            (self.layout.mesh.size,), self.request_sharding, lambda _: value
        )

    @property
    def request_sharding(self) -> NamedSharding:
        return NamedSharding(self.layout.mesh, P(AXES))


def make_steps(config: Config, mesh: Mesh) -> Steps:
    """Build the step functions. Raises ConfigError where the mesh does not divide model or batch."""
    layout = Layout(mesh)
    config.check_mesh(dataclasses.replace(config.mesh, **mesh.shape))
    graphdef, param_shapes, axes = abstract_model(config.model, config.kernels)
    optimizer = make_optimizer(config.optimizer)
    param_shardings = jax.tree.map(lambda _, names: layout.sharding(*names), param_shapes, axes)
    scalar = NamedSharding(mesh, P())

    def start(params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, zero, zero)

    state_shapes = jax.eval_shape(start, param_shapes)
    state_shardings = TrainState(
        param_shardings,
        optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            state_shapes.opt_state,
            param_shardings,
            transform_non_params=lambda _: scalar,
        ),
        scalar,
        scalar,
        scalar,
    )

    def nll(params: Params, batch: Batch, batch_axes: tuple[str, ...]) -> jax.Array:
        """Sum of the loss over arrays [B, T]."""
        with activate(Layout(mesh, batch_axes)), matmul_precision(config.model):
            model = nnx.merge(graphdef, params)
            hidden = model.hidden(
                batch["inputs"],
                segment_ids=batch.get("segment_ids"),
                positions=batch.get("positions"),
            )
            return cross_entropy(
                hidden,
                model.lm_head[...],
                batch["labels"],
                chunk_size=config.train.loss_chunk_size,
                z_loss=config.train.z_loss,
            )

    def train(
        state: TrainState, batch: Batch, request: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = jnp.sum(batch["labels"] != IGNORE)
        with activate(layout):
            total, gradients = _sum_gradients(nll, state.params, batch, layout, param_shardings)
        # Divided by the count over the whole step, so that accumulation and any mesh weigh every
        # token alike.
        loss, gradients = (
            total / tokens,
            jax.tree.map(lambda gradient: gradient / tokens, gradients),
        )
        gradients, norm = clip_by_global_norm(gradients, config.optimizer.clip_norm)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        rate = learning_rate(config.optimizer, config.train.num_steps, state.step)
        direction, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, finite=finite
        )
        params = jax.tree.map(
            lambda p, d: jnp.where(finite, p - rate * d, p), state.params, direction
        )
        nonfinite_run = jnp.where(finite, 0, state.nonfinite_run + 1)
        nonfinite = state.nonfinite + jnp.where(finite, 0, 1)
        state = TrainState(params, opt_state, state.step + 1, nonfinite, nonfinite_run)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "finite": finite,
            "nonfinite": nonfinite,
            "nonfinite_run": nonfinite_run,
            "request": request.max(),
        }
        return state, metrics

    def evaluate(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
        return nll(params, flat, layout.batch_axes), jnp.sum(batch["labels"] != IGNORE)

    return Steps(
        layout=layout,
        state_shapes=state_shapes,
        state_shardings=state_shardings,
        batch_sharding=layout.sharding("micro_batch", "batch", "length"),
        init=jax.jit(
            lambda: start(init_params(config.model, config.train.seed)),
            out_shardings=state_shardings,
        ),
        start=jax.jit(start, out_shardings=state_shardings, donate_argnums=0),
        train=jax.jit(train, out_shardings=(state_shardings, scalar), donate_argnums=0),
        evaluate=jax.jit(evaluate, out_shardings=scalar),
        check=_make_check(nll, layout, param_shardings),
    )


def _make_check(
    nll: Callable, layout: Layout, shardings: Params
) -> Callable[[Params, Batch], jax.Array]:
    """Steps.check."""
    mesh, replicas = layout.mesh, layout.mesh.shape["data"]

    def spread(batch: Batch) -> Batch:
        """The first rows of a batch, as many as a replica has shards, once for every replica: [replicas, rows, T]."""
        shards = mesh.shape["fsdp"]
        return {
            name: jnp.broadcast_to(array[0, :shards], (replicas, shards, array.shape[-1]))
            for name, array in batch.items()
        }

    def digest_all(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(digest(leaves)).sum(dtype=jnp.uint32)

    def digest_copies(*leaves: jax.Array) -> jax.Array:
        """[1]: of this replica's own copy of the parameters."""
        return jax.lax.psum(digest_all(*leaves), ("fsdp", "context", "tensor"))[None]

    def digests(params: Params, same: Batch) -> jax.Array:
        one = lambda batch: jax.value_and_grad(nll)(params, batch, ("fsdp",))
        computed = jax.vmap(one, spmd_axis_name="data")(same)
        specs = tuple(sharding.spec for sharding in jax.tree.leaves(shardings))
        # Copies are replicas of one array only as long as hardware is right: so not checked by the
        # partitioner.
        on_replicas = jax.shard_map(
            digest_copies, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False
        )
        return on_replicas(*jax.tree.leaves(params)) * 31 + jax.vmap(digest_all)(
            *jax.tree.leaves(computed)
        )

    # Two programs: if one knew that all rows are the same, it could compute them once.
    spread_rows = jax.jit(spread, out_shardings=NamedSharding(mesh, P("data", "fsdp", "context")))
    digest_replicas = jax.jit(digests, out_shardings=NamedSharding(mesh, P()))
    return lambda params, batch: digest_replicas(params, spread_rows(batch))


def _sum_gradients(
    nll: Callable, params: Params, batch: Batch, layout: Layout, shardings: Params
) -> tuple[jax.Array, Params]:
    """Loss and gradients, both summed over all tokens of the step.

    With several micro-batches every replica (mesh axis data) adds up its own gradients, and they
    are summed across replicas once, at the end. Gradients per replica are a vmap over a leading
    axis of replicas that lies along data: GSPMD alone would reduce them in every micro-batch.
    """
    micro_batches = batch["labels"].shape[0]
    replicas = layout.mesh.shape["data"]
    if micro_batches == 1:
        return jax.value_and_grad(nll)(
            params, {name: array[0] for name, array in batch.items()}, layout.batch_axes
        )

    def per_replica(array: jax.Array) -> jax.Array:
        A, B, T = array.shape
        return lie(array.reshape(A, replicas, B // replicas, T), None, "data", "fsdp", "context")

    def lie(array: jax.Array, *axes: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(layout.mesh, P(*axes)))

    def on_replicas(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        return lie(array, "data", *sharding.spec)

    one = lambda batch: jax.value_and_grad(nll)(params, batch, ("fsdp",))
    all_replicas = jax.vmap(one, spmd_axis_name="data")

    def add(carry, micro_batch):
        total, gradients = carry
        loss, new = all_replicas(micro_batch)
        gradients = jax.tree.map(lambda g, n, s: on_replicas(g + n, s), gradients, new, shardings)
        return (total + loss, gradients), None

    zeros = jax.tree.map(
        lambda p, s: on_replicas(jnp.zeros((replicas, *p.shape), p.dtype), s), params, shardings
    )
    start = (lie(jnp.zeros(replicas), "data"), zeros)
    (total, gradients), _ = jax.lax.scan(
        add, start, {name: per_replica(array) for name, array in batch.items()}
    )
    return total.sum(), jax.tree.map(lambda gradient: gradient.sum(axis=0), gradients)
