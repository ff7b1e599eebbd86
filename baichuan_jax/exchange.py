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

from baichuan_jax.model import Blocks, Params
from baichuan_jax.sharding import REPLICAS, Layout

Batch = dict[str, jax.Array]
LossSum = Callable[[Params, Batch, tuple[str, ...]], jax.Array]
"""(parameters, batch [B, T], mesh axes that split its rows) -> the sum of its loss. The parameters'
`layers` may be Blocks."""


def gather(params: Params, axes: Params, layout: Layout, dtype: Any) -> Params:
    """The weights that a replica computes with, from the parts that replicas store.

    What is split over `state` is cast to `dtype` and gathered; all else is returned as it is. axes:
    the logical axes of each parameter, in the same places.
    """
    if layout.mesh.shape["state"] == 1:
        return params

    def whole(param: jax.Array, names: tuple[str, ...]) -> jax.Array:
        dimension = layout.split_over_state(names)
        if dimension is None:
            return param
        local = functools.partial(lax.all_gather, axis_name="state", axis=dimension, tiled=True)
        return jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=layout.stored_spec(names),
            out_specs=layout.spec(names),
            check_vma=False,
        )(param.astype(dtype))

    return jax.tree.map(whole, params, axes)


def sum_gradients(
    loss_sum: LossSum, weights: Params, axes: Params, batch: Batch, layout: Layout
) -> tuple[jax.Array, Params]:
    """Loss and gradients, both summed over all tokens of the step.

    weights: what `gather` returned; its `layers` are stacks [L, ...] or a list of blocks, and so
    are the gradients'. batch: arrays [A, B, T]. The gradients are float32 and lie as parameters are
    stored.
    """
    micro_batches = batch["labels"].shape[0]
    rows = {name: _rows_of_replicas(array, layout) for name, array in batch.items()}
    at = lambda index: {name: array[index] for name, array in rows.items()}
    own = _on_replicas(functools.partial(_own_gradients, loss_sum, weights), layout, mapped=True)

    def add(carry, micro_batch):
        loss, gradients = own(micro_batch)
        added = jax.tree.map(jnp.add, carry[1], gradients)
        return (carry[0] + loss, _put(added, axes, layout)), None

    first, total, added = 0, jnp.zeros(()), None
    if micro_batches > 1:
        # The weights of other replicas are gathered while the first micro-batch computes: in a
        # loop nothing would overlap with what comes before it.
        if layout.mesh.shape["state"] > 1:
            first, (total, added) = 1, own(at(0))
        else:
            total, added = jax.tree.map(
                lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(own, at(0))
            )
        middle = {name: array[first:-1] for name, array in rows.items()}
        start = (total, _put(added, axes, layout))
        (total, added), _ = lax.scan(add, start, middle)
    last = functools.partial(_last_gradients, loss_sum, weights, axes, layout)
    loss, gradients = _on_replicas(last, layout, mapped=False)(at(-1), added)
    return jnp.sum(total + loss), gradients


def _rows_of_replicas(array: jax.Array, layout: Layout) -> jax.Array:
    """[A, B, T] -> [A, R, B / R, T]; as it is where there is one replica."""
    if layout.replicas == 1:
        return array
    A, B, T = array.shape
    array = array.reshape(A, layout.replicas, B // layout.replicas, T)
    spec = P(None, REPLICAS, "fsdp", "context")
    return lax.with_sharding_constraint(array, NamedSharding(layout.mesh, spec))


def _on_replicas(function: Callable, layout: Layout, mapped: bool) -> Callable:
    """A function of one replica's arrays as one of all replicas' [R, ...].

    It returns (loss [R], gradients); the gradients are [R, ...] where `mapped`, else summed over
    replicas by the function. GSPMD alone would sum them in every micro-batch: in its view a
    gradient is one array, equal on all replicas.
    """
    if layout.replicas == 1:
        return function
    # spmd_axis_name: the constraints inside then split the mapped axis over the replicas.
    return jax.vmap(function, out_axes=(0, 0 if mapped else None), spmd_axis_name=REPLICAS)


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


def _own_gradients(loss_sum: LossSum, weights: Params, batch: Batch) -> tuple[jax.Array, Params]:
    """Loss and gradients of one replica's micro-batch."""

    def loss(weights: Params) -> jax.Array:
        return loss_sum(weights | {"layers": Blocks(weights["layers"])}, batch, ("fsdp",))

    return jax.value_and_grad(loss)(_float32(weights))


def _last_gradients(
    loss_sum: LossSum,
    weights: Params,
    axes: Params,
    layout: Layout,
    batch: Batch,
    added: Params | None,
) -> tuple[jax.Array, Params]:
    """Loss of one replica's last micro-batch, and all gradients summed over replicas.

    added: the gradients of the replica's other micro-batches.
    """
    if added is None:
        added = jax.tree.map(lambda _: None, weights)
    block = axes["layers"]
    if isinstance(block, list):
        block = block[0]
    else:
        block = {name: names[1:] for name, names in block.items()}

    def loss(weights: Params) -> jax.Array:
        outer = {
            name: _summed(weight, added[name], axes[name], layout)
            for name, weight in weights.items()
            if name != "layers"
        }
        arrive = lambda weights, added: _summed(weights, added, block, layout)
        blocks = Blocks(weights["layers"], added["layers"], arrive)
        return loss_sum(outer | {"layers": blocks}, batch, ("fsdp",))

    return jax.value_and_grad(loss)(_float32(weights))


def _summed(weights: Any, added: Any, axes: Any, layout: Layout) -> Any:
    """The identity, whose gradient is the sum over replicas, with `added` of each."""

    @jax.custom_vjp
    def identity(weights, added):
        return weights

    def backward(added, gradients):
        plus = lambda gradient, more: gradient if more is None else gradient + more
        gradients = jax.tree.map(plus, gradients, added)
        return jax.tree.map(lambda g, names: _sum(g, names, layout), gradients, axes), None

    identity.defvjp(lambda weights, added: (weights, added), backward)
    return identity(weights, added)


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
