"""Numbers that tell whether arrays have the same bits: of checkpoints, and of replicas that should agree."""

from typing import Any

import jax
import jax.numpy as jnp


def digest(tree: Any) -> list[jax.Array]:
    """One uint32 per leaf (4-byte elements): sum over elements of bits * odd weight of the index, modulo 2^32.

    The weights make it depend on order; being a sum, it does not depend on how the array is cut.
    """

    def leaf(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        weight = jnp.ones((), jnp.uint32)
        for axis in range(x.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            weight = weight + index * jnp.uint32(2 * (0x9E3779B1 >> axis) & 0xFFFFFFFF)
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    return [leaf(x) for x in jax.tree.leaves(tree)]
