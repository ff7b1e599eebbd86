"""The training step as pure functions of pytrees on one mesh: init, train, evaluate, check.

A state (parameters, AdamW's moments, counters) and a batch go in; the next state and the step's
metrics come out. A batch is a dict of int32 arrays [A, B, T], A micro-batches of B rows: `inputs`,
`labels`, with document masks also `segment_ids` and `positions`, as data/loader.py makes them.

One step: sum loss and gradients over all micro-batches and devices, divide by the count of valid
labels of the whole step, clip, take AdamW's direction, subtract. A step whose loss or gradient norm
is not finite changes nothing but its counters. `make_steps` shards all of it by the logical axes of
the parameters (sharding.RULES) and compiles it; GSPMD inserts the collectives.
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
from baichuan_jax.exchange import Batch, LossSum, axes_of_block, gather, sum_gradients
from baichuan_jax.loss import IGNORE, cross_entropy
from baichuan_jax.model import (
    Exchange,
    Params,
    abstract_model,
    init_params,
    matmul_precision,
    separate,
)
from baichuan_jax.optimizer import (
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
    stack_blocks,
)
from baichuan_jax.resilience.digests import digest
from baichuan_jax.sharding import AXES, Layout, activate


class Request(enum.IntEnum):
    """What a process may ask of all processes; with each step they agree on the largest."""

    NONE = 0
    # Write a checkpoint.
    SAVE = 1
    # Write a checkpoint, then end the launch.
    STOP = 2
    # End the launch; the next one starts from before a loss spike.
    ROLL_BACK = 3


class TrainState(NamedTuple):
    """Everything that a step changes; also its shapes or its shardings, in the same places."""

    params: Any
    opt_state: Any
    # Steps done, skipped updates included.
    step: Any
    # Updates skipped so far because a number was not finite.
    nonfinite: Any
    # How many of these were the last ones in a row.
    nonfinite_run: Any


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled functions of one configuration on one mesh, and their arguments' shardings."""

    layout: Layout
    state_shapes: TrainState
    state_shardings: TrainState
    # Of every array [A, B, T] of a batch.
    batch_sharding: NamedSharding
    # The arrays of a batch, without numbers.
    batch_shapes: dict[str, jax.ShapeDtypeStruct]
    # A fresh state. Every device makes its own part; none ever holds the whole.
    init: Callable[[], TrainState]
    # A fresh state around given parameters, which are donated.
    start: Callable[[Params], TrainState]
    # One step; the state is donated. The last argument is `request(...)`. Metrics: loss, grad_norm,
    # learning_rate, tokens, finite, nonfinite (so far), nonfinite_run (in a row), request (the
    # largest of all processes').
    train: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    # The parameters that a replica computes with: another copy only where `state` splits them.
    gather: Callable[[Params], Params]
    # Sum of the loss over a batch, and its count of valid labels.
    evaluate: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    # A digest [replicas] uint32 of what each replica holds and computes: its own copy of the
    # parameters, and the loss and gradients of the same rows before anything is summed over
    # replicas. Where hardware is right and deterministic, all are equal.
    check: Callable[[Params, Batch], jax.Array]

    def request(self, request: Request = Request.NONE) -> jax.Array:
        """This process's control request as an argument of `train`: [devices] int32."""
        # Made from the host's value on each local device: no process needs to know the others'.
        value = np.full(1, request, np.int32)
        return jax.make_array_from_callback(
            (self.layout.mesh.size,), self.request_sharding, lambda _: value
        )

    @property
    def abstract_state(self) -> TrainState:
        """The state's arrays as shapes with shardings: to compile for, and to restore into."""
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            self.state_shapes,
            self.state_shardings,
        )

    def lower(self) -> jax.stages.Lowered:
        """`train` lowered for the shapes and shardings of its arguments; no device is needed."""
        request = jax.ShapeDtypeStruct(
            (self.layout.mesh.size,), jnp.int32, sharding=self.request_sharding
        )
        train: Any = self.train  # a jitted function, which its type here does not say
        return train.lower(self.abstract_state, self.batch_shapes, request)

    @property
    def request_sharding(self) -> NamedSharding:
        """One number on each device, so that the step's maximum is over all processes."""
        return NamedSharding(self.layout.mesh, P(AXES))


def make_steps(config: Config, mesh: Mesh) -> Steps:
    """Build the step functions. Raises ConfigError for a mesh that does not divide them."""
    layout = Layout(mesh, sum_dtype=config.train.gradient_dtype or config.model.dtype)
    resolved = dataclasses.replace(config.mesh, **mesh.shape)
    config.check_mesh(resolved)
    graphdef, param_shapes, axes = abstract_model(config.model, config.kernels)
    optimizer = make_optimizer(config.optimizer)
    param_shardings = jax.tree.map(lambda _, names: layout.stored(*names), param_shapes, axes)
    scalar = NamedSharding(mesh, P())

    def start(params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, zero, zero)

    # Shapes alone: a checkpoint is restored into them without a first state in memory.
    state_shapes = jax.eval_shape(start, param_shapes)
    # AdamW's moments are split as their parameters are; its counter is on every device.
    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state_shapes.opt_state,
        param_shardings,
        transform_non_params=lambda _: scalar,
    )
    state_shardings = TrainState(param_shardings, opt_shardings, scalar, scalar, scalar)
    loss_sum = _make_loss_sum(config, layout, graphdef, param_shapes["layers"])
    # loss_sum is traced three times: in training, in evaluation and in the check of replicas.
    weights = lambda params: gather(params, axes, layout, config.model.dtype)
    train = _make_train(config, layout, loss_sum, optimizer, axes, param_shardings)
    init = lambda: start(init_params(config.model, config.train.seed))
    batch_sharding = layout.sharding("micro_batch", "batch", "length")
    return Steps(
        layout=layout,
        state_shapes=state_shapes,
        state_shardings=state_shardings,
        batch_sharding=batch_sharding,
        batch_shapes=_batch_shapes(config, config.accumulation_steps(resolved), batch_sharding),
        init=jax.jit(init, out_shardings=state_shardings),
        start=jax.jit(start, out_shardings=state_shardings, donate_argnums=0),
        train=jax.jit(train, out_shardings=(state_shardings, scalar), donate_argnums=0),
        gather=jax.jit(weights) if mesh.shape["state"] > 1 else lambda params: params,
        evaluate=jax.jit(_make_evaluate(layout, loss_sum, weights), out_shardings=scalar),
        check=_make_check(layout, loss_sum, weights, param_shardings),
    )


def _batch_shapes(
    config: Config, accumulation: int, sharding: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    rows = config.train.global_batch_size // accumulation
    shape = (accumulation, rows, config.train.context_length)
    names = [
        "inputs",
        "labels",
        *(["segment_ids", "positions"] if config.data.document_mask else []),
    ]
    return dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding))


def _make_loss_sum(
    config: Config, layout: Layout, graphdef: nnx.GraphDef, layer_shapes: Params
) -> LossSum:
    """Model and loss as one function of parameters and arrays [B, T]."""

    def loss_sum(
        params: Params, batch: Batch, batch_axes: tuple[str, ...], exchange: Exchange
    ) -> tuple[jax.Array, Params]:
        layers, head = params["layers"], params["lm_head"]
        outer = {name: params[name] for name in ("embedding", "final_norm")}
        added = exchange.added and {name: exchange.added[name] for name in outer}
        # The mesh and the precision are contexts of the trace, so the model itself names neither.
        with (
            activate(dataclasses.replace(layout, batch_axes=batch_axes)),
            matmul_precision(config.model),
        ):
            # The model is given its blocks with the batch; here their shapes fill their place.
            outer = exchange.arrive(outer, added)
            model = nnx.merge(graphdef, outer | {"lm_head": head, "layers": layer_shapes})
            hidden, head, layers = model.hidden_and_head(
                batch["inputs"],
                layers,
                exchange,
                segment_ids=batch.get("segment_ids"),
                positions=batch.get("positions"),
            )
            loss = cross_entropy(
                hidden,
                head,
                batch["labels"],
                chunk_size=config.train.loss_chunk_size,
                z_loss=config.train.z_loss,
            )
        return loss, outer | {"lm_head": head, "layers": layers}

    return loss_sum


def _make_train(
    config: Config,
    layout: Layout,
    loss_sum: LossSum,
    optimizer: optax.GradientTransformationExtraArgs,
    axes: Params,
    shardings: Params,
) -> Callable:
    """Steps.train, not yet compiled."""

    def train(
        state: TrainState, batch: Batch, request: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = jnp.sum(batch["labels"] != IGNORE)
        params, names, count = state.params, axes, config.model.num_layers
        if not config.model.scan_layers:
            # An array for each block: the blocks' weights and gradients move one by one.
            params = params | {"layers": separate(params["layers"], count)}
            names = names | {"layers": [axes_of_block(names["layers"])] * count}
        with activate(layout):
            total, gradients = sum_gradients(
                loss_sum, params, names, batch, layout, config.model.dtype
            )
        # Divided by the count of the whole step, not of a device or a micro-batch: accumulation and
        # any mesh weigh every token alike.
        loss = total / tokens
        gradients = jax.tree.map(lambda gradient: gradient / tokens, gradients)
        gradients, norm = clip_by_global_norm(gradients, config.optimizer.clip_norm)
        gradients = stack_blocks(gradients, shardings)
        # The norm is not finite where any gradient is not, so these two numbers speak for all.
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        rate = learning_rate(config.optimizer, config.train.num_steps, state.step)
        direction, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, finite=finite
        )
        # A selection and not lax.cond: it fuses into the update's pass over the parameters.
        params = jax.tree.map(
            lambda p, d: jnp.where(finite, p - rate * d, p), state.params, direction
        )
        nonfinite_run = jnp.where(finite, 0, state.nonfinite_run + 1)
        nonfinite = state.nonfinite + jnp.where(finite, 0, 1)
        # Counted even where the update is skipped: the next step has the next batch and rate.
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

    return train


def _make_evaluate(layout: Layout, loss_sum: LossSum, weights: Callable) -> Callable:
    """Steps.evaluate, not yet compiled."""

    def evaluate(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # One pass over all rows: without gradients there is little memory to save.
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
        total = loss_sum(weights(params), flat, layout.batch_axes, Exchange())[0]
        return total, jnp.sum(batch["labels"] != IGNORE)

    return evaluate


def _make_check(
    layout: Layout, loss_sum: LossSum, weights: Callable, shardings: Params
) -> Callable[[Params, Batch], jax.Array]:
    """Steps.check. What it compares are copies of the state, one at each index of `data`."""
    mesh, copies = layout.mesh, layout.mesh.shape["data"]

    def spread(batch: Batch) -> Batch:
        """First rows of a batch, one a shard, the same for every copy: [copies, shards, T]."""
        # One row for each shard is the smallest batch that keeps all devices of a copy at work.
        shards = mesh.shape["state"] * mesh.shape["fsdp"]
        return {
            name: jnp.broadcast_to(array[0, :shards], (copies, shards, array.shape[-1]))
            for name, array in batch.items()
        }

    def digest_all(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(digest(leaves)).sum(dtype=jnp.uint32)

    def digest_copies(*leaves: jax.Array) -> jax.Array:
        """[1]: of one copy of the parameters."""
        return jax.lax.psum(digest_all(*leaves), ("state", "fsdp", "context", "tensor"))[None]

    def digests(params: Params, same: Batch) -> jax.Array:
        whole = weights(params)
        loss = lambda weights, batch: loss_sum(weights, batch, ("state", "fsdp"), Exchange())[0]
        one = lambda batch: jax.value_and_grad(loss)(whole, batch)
        computed = jax.vmap(one, spmd_axis_name="data")(same)
        specs = tuple(sharding.spec for sharding in jax.tree.leaves(shardings))
        # check_vma off: the partitioner takes copies of one array for equal, which is exactly what
        # a hardware fault breaks.
        on_replicas = jax.shard_map(
            digest_copies, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False
        )
        # 31 is odd, so no bit of the first digest is lost modulo 2^32.
        return on_replicas(*jax.tree.leaves(params)) * 31 + jax.vmap(digest_all)(
            *jax.tree.leaves(computed)
        )

    # Two programs: if one knew that all rows are the same, XLA could compute them once.
    spec = P("data", ("state", "fsdp"), "context")
    spread_rows = jax.jit(spread, out_shardings=NamedSharding(mesh, spec))
    digest_replicas = jax.jit(digests, out_shardings=NamedSharding(mesh, P()))
    return lambda params, batch: digest_replicas(params, spread_rows(batch))
