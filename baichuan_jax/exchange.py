"""What replicas exchange in a step: weights come from where they are stored, gradients go back.

A replica is the devices that compute the same rows: one index of the mesh axes `data` and `state`.
Parameters are stored split over `fsdp` inside a replica and over `state` across replicas. In the
first micro-batch each replica gathers its shards of the weights over `state`, in the type in which
the model computes. Inside a replica GSPMD gathers them.

Every replica adds up the gradients of its own micro-batches in float32. In the last micro-batch
each parameter's sum goes over the network as soon as its gradient is there: a reduce-scatter over
`state` to the replicas that store it, an all-reduce over `data` to the other copies. Both sum in
the type of Layout.sum_dtype.

A micro-batches, B rows, T length, R replicas.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
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
        for_all = jax.custom_batching.custom_vmap(whole)
        for_all.def_vmap(lambda size, mapped, param: (whole(param), False))
        return for_all(param.astype(dtype))

    return jax.tree.map(gathered, params, axes)


def sum_gradients(
    loss_sum: LossSum, params: Params, axes: Params, batch: Batch, layout: Layout, dtype: Any
) -> tuple[jax.Array, Params]:
    """Loss and gradients, both summed over all tokens of the step.

    params: as they are stored; their `layers` are stacks [L, ...] or a list of blocks, and so are
    the gradients'. axes: the logical axes of each parameter, in the same places. dtype: in which
    the model computes. batch: arrays [A, B, T]. The gradients are float32 and lie as parameters are
    stored.
    """
    micro_batches = batch["labels"].shape[0]
    rows = {name: _rows_of_replicas(array, layout) for name, array in batch.items()}
    some = lambda part: {name: array[part] for name, array in rows.items()}
    unrolled = isinstance(axes["layers"], list)
    shared = layout.mesh.shape["state"] > 1
    if shared and not unrolled:
        # A loop over layers takes its stacks whole.
        params = gather(params, axes, layout, dtype)
    way = functools.partial(_Way, axes, layout, dtype)
    gathering = way(gathers=shared and unrolled, sums=micro_batches == 1)
    if micro_batches == 1:
        loss, gradients, _ = gathering.gradients(loss_sum, params, some(0))
        return jnp.sum(loss), gradients
    # The first micro-batch is no turn of the loop where weights are gathered beside it, and the
    # last one is none where sums run beside it: nothing overlaps across the ends of a loop.
    first, last = int(gathering.gathers), micro_batches - int(layout.replicas > 1)
    loss, added, weights = _begin(gathering, loss_sum, params, some(0), run=first == 1)

    def add(carry, micro_batch):
        loss, gradients, _ = way().gradients(loss_sum, weights, micro_batch)
        return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], gradients)), None

    # The barriers make each part wait for the one before it, or the activations of several
    # micro-batches would be in memory at once.
    if last > first:
        middle, start = lax.optimization_barrier((some(slice(first, last)), (loss, added)))
        (loss, added), _ = lax.scan(add, start, middle)
    if layout.replicas == 1:
        return loss, added
    final, added = lax.optimization_barrier((some(-1), added))
    more, gradients, _ = way(sums=True).gradients(loss_sum, weights, final, added)
    return jnp.sum(loss + more), gradients


def _begin(
    way: "_Way", loss_sum: LossSum, params: Params, batch: Batch, run: bool
) -> tuple[jax.Array, Params, Params]:
    """(loss, gradients, weights) of the first micro-batch, or zeros where it is not to `run`."""
    if run:
        loss, added, weights = way.gradients(loss_sum, params, batch)
        # XLA must not keep what this micro-batch gathered inside the replica for the last one.
        weights, added = lax.optimization_barrier((weights, added))
        return loss, added, weights
    shapes = jax.eval_shape(lambda: way.gradients(loss_sum, params, batch)[:2])
    loss, added = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return loss, way.put(added), params


@dataclass(frozen=True)
class _Way:
    """How weights come and gradients go in one micro-batch."""

    axes: Params
    layout: Layout
    dtype: Any
    gathers: bool = False
    """Weights are given as they are stored."""
    sums: bool = False
    """Gradients are those of all replicas; else every replica's own [R, ...]."""

    def gradients(
        self, loss_sum: LossSum, weights: Params, batch: Batch, added: Params | None = None
    ) -> tuple[jax.Array, Params, Params]:
        """(loss [R], gradients, the weights that were computed with) of a micro-batch.

        added: each replica's gradients of other micro-batches, which are summed too.
        """

        def of_replica(batch: Batch, added: Params | None) -> tuple[jax.Array, Params, Params]:
            exchange = Exchange(self._arrive, self._hold, added)
            loss = lambda weights: loss_sum(weights, batch, ("fsdp",), exchange)
            (total, used), gradients = jax.value_and_grad(loss, has_aux=True)(_float32(weights))
            return total, gradients, used

        if self.layout.replicas > 1:
            # GSPMD alone would sum gradients over replicas in every micro-batch: in its view a
            # gradient is one array, equal on all of them. So they get an axis of replicas. What is
            # constrained inside of the function has that axis split over the replicas.
            out_axes = (0, None if self.sums else 0, None)
            of_replica = jax.vmap(of_replica, out_axes=out_axes, spmd_axis_name=REPLICAS)
        loss, gradients, used = of_replica(batch, added)
        if not self.sums:
            gradients = self.put(gradients)
        return loss, gradients, self._kept(used) if self.gathers else weights

    def put(self, gradients: Params) -> Params:
        """Fix where the replicas' own gradients lie."""

        def put(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
            spec = self.layout.spec(names)
            spec = spec if self.layout.replicas == 1 else P(REPLICAS, *spec)
            return lax.with_sharding_constraint(array, NamedSharding(self.layout.mesh, spec))

        return jax.tree.map(put, gradients, self.axes)

    def _kept(self, weights: Params) -> Params:
        """Gathered weights for other micro-batches, in the type that the model rounds them to."""

        def kept(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
            whole = self.layout.split_over_state(names) is None
            return weight if whole else weight.astype(self.dtype)

        return jax.tree.map(kept, weights, self.axes)

    def _names(self, weights: Params) -> Params:
        """The logical axes of some parameters by name, of a block's as of one block."""
        layers = self.axes["layers"]
        # A scan passes one block of its stacks.
        block = layers[0] if isinstance(layers, list) else axes_of_block(layers)
        return {name: (self.axes | block)[name] for name in weights}

    def _arrive(self, weights: Params, added: Params | None) -> Params:
        """Exchange.arrive: weights are gathered forward, their gradients summed backward."""
        names = self._names(weights)

        @jax.custom_vjp
        def arrive(weights, added):
            if not self.gathers:
                return weights
            return _float32(gather(weights, names, self.layout, self.dtype))

        def backward(added, gradients):
            if not self.sums:
                return gradients, None
            # None where there is one micro-batch.
            plus = lambda gradient, more: gradient if more is None else gradient + more
            gradients = jax.tree.map(plus, gradients, added or dict.fromkeys(gradients))
            return jax.tree.map(functools.partial(_sum, self.layout), gradients, names), None

        arrive.defvjp(lambda weights, added: (arrive(weights, added), added), backward)
        return arrive(weights, added)

    def _hold(self, x: jax.Array, weights: Params, summed: bool) -> tuple[jax.Array, Params]:
        """Exchange.hold, and forward the reverse: x waits for the weights, their gather for x.

        summed: the weights have not arrived yet, so their gradients are summed already.
        """
        # In the type that they have anyway, so that no copy in another one has to be stored: that
        # of the product, or that of the sum.
        own = "float32" if self.layout.sum_dtype == "float32" else self.dtype
        total = self.layout.sum_dtype if self.layout.replicas > 1 else "float32"

        @jax.custom_vjp
        def hold(x, weights):
            if not self.gathers:
                return x, weights
            return _together(x, weights, "float32" if summed else self.dtype)

        def backward(_, gradients):
            dx, dweights = gradients
            if summed and not self.sums:
                return gradients
            return _together(dx, dweights, total if summed else own)

        hold.defvjp(lambda x, weights: (hold(x, weights), None), backward)
        return hold(x, weights)


def axes_of_block(layers: Params) -> Params:
    """The logical axes of one block's parameters, from those of the stacks."""
    return {name: names[1:] for name, names in layers.items()}


def _together(x: jax.Array, weights: Params, dtype: Any) -> tuple[jax.Array, Params]:
    """x and the matrices, which are all computed before any of them is used.

    Norms are left out: they are small, and left free XLA sums all of them in one message.
    """
    matrices = {name: w.astype(dtype) for name, w in weights.items() if w.ndim > 1}
    x, matrices = lax.optimization_barrier((x, matrices))
    return x, weights | _float32(matrices)


def _float32(weights: Params) -> Params:
    """The weights as float32, so that their gradients are float32.

    The model rounds them to its own type again, which XLA knows to be no work.
    """
    return jax.tree.map(lambda weight: weight.astype(jnp.float32), weights)


def _rows_of_replicas(array: jax.Array, layout: Layout) -> jax.Array:
    """[A, B, T] -> [A, R, B / R, T]; as it is where there is one replica."""
    if layout.replicas == 1:
        return array
    A, B, T = array.shape
    array = array.reshape(A, layout.replicas, B // layout.replicas, T)
    spec = P(None, REPLICAS, "fsdp", "context")
    return lax.with_sharding_constraint(array, NamedSharding(layout.mesh, spec))


def _sum(layout: Layout, gradient: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A gradient's sum over the replicas that vmap maps over, on the devices that store it."""
    stored = layout.stored_spec(names)

    @jax.custom_batching.custom_vmap
    def total(gradient):  # of the only replica
        return lax.with_sharding_constraint(gradient, NamedSharding(layout.mesh, stored))

    @total.def_vmap
    def over_replicas(size, mapped, gradient):
        dimension = layout.split_over_state(names)
        # Norms cost nothing in float32.
        dtype = gradient.dtype if dimension is None else layout.sum_dtype
        # Explicit collectives: the type in which they sum is the message's.
        found = jax.shard_map(
            functools.partial(_sum_local, layout.mesh, dimension),
            mesh=layout.mesh,
            in_specs=P(REPLICAS, *layout.spec(names)),
            out_specs=stored,
            check_vma=False,
        )(gradient.astype(dtype))
        return found.astype(gradient.dtype), False

    return total(gradient)


def _sum_local(mesh: Mesh, dimension: int | None, gradient: jax.Array) -> jax.Array:
    """One device's gradient [1, ...] summed; `dimension` is split over `state`."""
    gradient = gradient[0]
    if mesh.shape["state"] > 1 and dimension is not None:
        gradient = lax.psum_scatter(gradient, "state", scatter_dimension=dimension, tiled=True)
        return lax.psum(gradient, "data") if mesh.shape["data"] > 1 else gradient
    return lax.psum(gradient, tuple(name for name in REPLICAS if mesh.shape[name] > 1))
