"""What replicas exchange in a step: weights come from where they are stored, gradients go back.

A replica is the devices that compute the same rows: one index of mesh axes `data` and `state`.
Parameters are stored split over `fsdp` inside a replica and over `state` across replicas. A step
begins with `gather`: each replica gets its shards of the weights, in the type in which the model
computes. Inside a replica GSPMD gathers them, block by block.

`sum_gradients` adds up the gradients of each replica's micro-batches in float32. While the last
micro-batch runs backward, each block's gradients go over the network as soon as the block is done:
a reduce-scatter over `state` to the replica that stores them, an all-reduce over `data` to the
other copies. Both sum in the type of Layout.sum_dtype.

A micro-batches, B rows, T length, R replicas.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_jax.model import Exchange, Params
from baichuan_jax.sharding import REPLICAS, Layout

Batch = dict[str, jax.Array]
LossSum = Callable[[Params, Batch, tuple[str, ...], Exchange], tuple[jax.Array, Params]]
"""(weights, batch [B, T], mesh axes that split its rows, exchange) -> the sum of its loss, and the
weights as they arrived."""


def gather(params: Params, axes: Params, layout: Layout, dtype: Any) -> Params:
    """The weights that a replica computes with, from the parts that replicas store.

    What is split over `state` is cast to `dtype` and gathered; all else is returned as it is. axes:
    the logical axes of each parameter, in the same places.
    """
    if layout.mesh.shape["state"] == 1:
        return params

    def gathered(param: jax.Array, names: tuple[str, ...]) -> jax.Array:
        dimension = layout.split_over_state(names)
        if dimension is None:
            return param
        local = functools.partial(lax.all_gather, axis_name="state", axis=dimension, tiled=True)
        whole = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=layout.stored_spec(names),
            out_specs=layout.spec(names),
            check_vma=False,
        )
        # In a vmap over the replicas all of them get the same.
        whole = jax.custom_batching.custom_vmap(whole)
        whole.def_vmap(lambda size, mapped, param: (whole(param), False))
        return whole(param.astype(dtype))

    return jax.tree.map(gathered, params, axes)


def sum_gradients(
    loss_sum: LossSum, params: Params, axes: Params, batch: Batch, layout: Layout, dtype: Any
) -> tuple[jax.Array, Params]:
    """Loss and gradients, both summed over all tokens of the step.

    params: as they are stored; their `layers` are stacks [L, ...] or a list of blocks, and so are
    the gradients'. dtype: in which the model computes. batch: arrays [A, B, T]. The gradients are
    float32 and lie as parameters are stored.
    """
    micro_batches = batch["labels"].shape[0]
    rows = {name: _rows_of_replicas(array, layout) for name, array in batch.items()}
    at = lambda index: {name: array[index] for name, array in rows.items()}
    part = functools.partial(_gradients, loss_sum, axes, layout, dtype)
    if not isinstance(axes["layers"], list):
        # A scan takes its stacks whole.
        params = gather(params, axes, layout, dtype)
    if micro_batches == 1:
        loss, gradients, _ = part(params, at(0), gathers=True, sums=True)
        return jnp.sum(loss), gradients

    def add(carry, micro_batch):
        loss, gradients, _ = part(weights, micro_batch, gathers=False, sums=False)
        return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], gradients)), None

    weights, middle = params, rows
    if layout.mesh.shape["state"] > 1:
        # No turn of the loop: the gathers of its weights overlap with it.
        loss, added, weights = part(params, at(0), gathers=True, sums=False)
        # XLA must not keep what this micro-batch gathered inside the replica for the last one.
        weights, added = lax.optimization_barrier((weights, added))
        middle = {name: array[1:] for name, array in middle.items()}
    else:
        shapes = jax.eval_shape(lambda: part(params, at(0), gathers=False, sums=False)[:2])
        loss, added = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        added = _put(added, axes, layout)
    alone = layout.replicas == 1
    if not alone:
        middle = {name: array[:-1] for name, array in middle.items()}
    if len(middle["labels"]) > 0:
        middle, (loss, added) = lax.optimization_barrier((middle, (loss, added)))
        (loss, added), _ = lax.scan(add, (loss, added), middle)
    if alone:
        return loss, added
    # No turn of the loop either: its sums overlap with it. The barrier lets it start afterwards,
    # or the activations of two micro-batches would be in memory.
    final, added = lax.optimization_barrier((at(-1), added))
    last, gradients, _ = part(weights, final, added, gathers=False, sums=True)
    return jnp.sum(loss + last), gradients


def _gradients(
    loss_sum: LossSum,
    axes: Params,
    layout: Layout,
    dtype: Any,
    weights: Params,
    batch: Batch,
    added: Params | None = None,
    *,
    gathers: bool,
    sums: bool,
) -> tuple[jax.Array, Params, Params]:
    """(loss [R], gradients, the weights that were computed with) of a micro-batch.

    gathers: `weights` are as stored. sums: the gradients are those of all replicas, with what each
    has `added`; else every replica's own [R, ...].
    """
    layers = axes["layers"]
    unrolled = isinstance(layers, list)
    # Of one block: a scan passes one of its stacks.
    block = layers[0] if unrolled else {name: names[1:] for name, names in layers.items()}
    gathers = gathers and unrolled and layout.mesh.shape["state"] > 1

    def of_replica(batch: Batch, added: Params | None) -> tuple[jax.Array, Params, Params]:
        ways = {"gathers": gathers, "sums": sums, "layout": layout}
        arrive = functools.partial(_arrive, axes | block, dtype, **ways)
        exchange = Exchange(arrive, functools.partial(_hold, dtype, **ways), added)
        loss = lambda weights: loss_sum(weights, batch, ("fsdp",), exchange)
        (total, used), gradients = jax.value_and_grad(loss, has_aux=True)(_float32(weights))
        return total, gradients, used

    if layout.replicas > 1:
        # GSPMD alone would sum gradients over replicas in every micro-batch: in its view a
        # gradient is one array, equal on all of them. So they get an axis of replicas. What is
        # constrained inside of the function has that axis split over the replicas.
        out_axes = (0, None if sums else 0, None)
        of_replica = jax.vmap(of_replica, out_axes=out_axes, spmd_axis_name=REPLICAS)
    loss, gradients, used = of_replica(batch, added)
    if not sums:
        gradients = _put(gradients, axes, layout)
    # As float32 they would take twice the memory. The model rounds them to `dtype` anyway.
    kept = lambda weight, names: (
        weight if layout.split_over_state(names) is None else weight.astype(dtype)
    )
    return loss, gradients, jax.tree.map(kept, used, axes) if gathers else weights


def _rows_of_replicas(array: jax.Array, layout: Layout) -> jax.Array:
    """[A, B, T] -> [A, R, B / R, T]; as it is where there is one replica."""
    if layout.replicas == 1:
        return array
    A, B, T = array.shape
    array = array.reshape(A, layout.replicas, B // layout.replicas, T)
    spec = P(None, REPLICAS, "fsdp", "context")
    return lax.with_sharding_constraint(array, NamedSharding(layout.mesh, spec))


def _put(gradients: Params, axes: Params, layout: Layout) -> Params:
    """Fix where the replicas' own gradients lie."""

    def put(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
        spec = layout.spec(names)
        spec = spec if layout.replicas == 1 else P(REPLICAS, *spec)
        return lax.with_sharding_constraint(array, NamedSharding(layout.mesh, spec))

    return jax.tree.map(put, gradients, axes)


def _float32(weights: Params) -> Params:
    """The weights as float32, so that their gradients are float32.

    The model rounds them to its own type again, which XLA knows to be no work.
    """
    return jax.tree.map(lambda weight: weight.astype(jnp.float32), weights)


def _arrive(
    axes: Params,
    dtype: Any,
    weights: Params,
    added: Params | None,
    *,
    gathers: bool,
    sums: bool,
    layout: Layout,
) -> Params:
    """Exchange.arrive: weights are gathered forward, their gradients are summed backward."""
    names = {name: axes[name] for name in weights}

    @jax.custom_vjp
    def arrive(weights, added):
        return _float32(gather(weights, names, layout, dtype)) if gathers else weights

    def backward(added, gradients):
        if not sums:
            return gradients, None
        # None where there is one micro-batch.
        plus = lambda gradient, more: gradient if more is None else gradient + more
        gradients = jax.tree.map(plus, gradients, added or dict.fromkeys(gradients))
        return jax.tree.map(lambda g, names: _sum(g, names, layout), gradients, names), None

    arrive.defvjp(lambda weights, added: (arrive(weights, added), added), backward)
    return arrive(weights, added)


def _hold(
    dtype: Any,
    x: jax.Array,
    weights: Params,
    summed: bool,
    *,
    gathers: bool,
    sums: bool,
    layout: Layout,
) -> tuple[jax.Array, Params]:
    """Exchange.hold: gathers of these weights wait for x, x's gradient waits for their sums."""
    # In the type of the sum, which nothing has to store in another. Norms' gradients are small:
    # left free, they are all summed in one message.
    sum_dtype = layout.sum_dtype if layout.replicas > 1 or not summed else "float32"

    def barrier(x: jax.Array, weights: Params, dtype: Any) -> tuple[jax.Array, Params]:
        held = {name: w.astype(dtype) for name, w in weights.items() if w.ndim > 1}
        x, held = lax.optimization_barrier((x, held))
        return x, weights | _float32(held)

    @jax.custom_vjp
    def hold(x, weights):
        return barrier(x, weights, "float32" if summed else dtype) if gathers else (x, weights)

    def backward(_, gradients):
        dx, dweights = gradients
        return barrier(dx, dweights, sum_dtype) if sums or not summed else gradients

    hold.defvjp(lambda x, weights: (hold(x, weights), None), backward)
    return hold(x, weights)


def _sum(gradient: jax.Array, names: tuple[str, ...], layout: Layout) -> jax.Array:
    """A gradient's sum over the replicas that vmap maps over, on the devices that store it."""
    stored = layout.stored_spec(names)

    @jax.custom_batching.custom_vmap
    def total(gradient):  # of the only replica
        return lax.with_sharding_constraint(gradient, NamedSharding(layout.mesh, stored))

    @total.def_vmap
    def over_replicas(size, mapped, gradient):
        dimension = layout.split_over_state(names)
        local = functools.partial(_sum_local, layout.mesh, dimension)
        # Explicit collectives: the type in which they sum is the message's. Norms cost nothing in
        # float32.
        dtype = gradient.dtype if dimension is None else layout.sum_dtype
        found = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=P(REPLICAS, *layout.spec(names)),
            out_specs=stored,
            check_vma=False,
        )(gradient.astype(dtype))
        return found.astype(gradient.dtype), False

    return total(gradient)


def _sum_local(mesh: jax.sharding.Mesh, dimension: int | None, gradient: jax.Array) -> jax.Array:
    """One device's gradient [1, ...] summed; `dimension` is split over `state`."""
    gradient = gradient[0]
    if mesh.shape["state"] > 1 and dimension is not None:
        gradient = lax.psum_scatter(gradient, "state", scatter_dimension=dimension, tiled=True)
        return lax.psum(gradient, "data") if mesh.shape["data"] > 1 else gradient
    return lax.psum(gradient, tuple(name for name in REPLICAS if mesh.shape[name] > 1))
