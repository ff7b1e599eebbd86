"""Digests: do two arrays have the same bits, and which replica computed other ones?

A digest is a number that a program computes on the devices from all bits of an array. Checkpoints
keep the digests of what they hold, so that a damaged one is found. Replicas that compute the same
step from the same state must agree on the digests of what they computed; one that does not has
silently corrupted its numbers (Hochschild et al. 2021, "Cores that don't count").
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.resilience.causes import BadHost

# An odd number near 2^32 divided by the golden ratio (Knuth, Fibonacci hashing): its multiples
# spread over all 32 bits.
GOLDEN = 0x9E3779B1


def digest(tree: Any) -> list[jax.Array]:
    """One uint32 a leaf (of 4-byte elements): the sum of bits * weight modulo 2^32.

    The weight of an element depends on its index, so the digest depends on the order. It is a sum,
    so it does not depend on how the array is cut over devices.
    """

    def leaf(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        # One plus multiples of even numbers: odd, so that no bit is lost modulo 2^32.
        weight = jnp.ones((), jnp.uint32)
        for axis in range(x.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            weight = weight + index * jnp.uint32(2 * (GOLDEN >> axis) & 0xFFFFFFFF)
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    return [leaf(x) for x in jax.tree.leaves(tree)]


def compare_digests(digests: Sequence[int], processes: Mapping[int, Sequence[int]]) -> None:
    """Raise BadHost where replicas differ, with the processes of those outside the majority.

    `digests` has one number a replica, `processes` the processes whose devices hold it. Without a
    majority all are named.
    """
    counts = Counter(digests)
    if len(counts) <= 1:
        return
    usual, most = counts.most_common(1)[0]
    odd = [replica for replica, found in enumerate(digests) if found != usual]
    which = f"{most} of {len(digests)} agree"
    if 2 * most <= len(digests):
        odd, which = list(range(len(digests))), "no majority: one of them is wrong"
    named = tuple(sorted({process for replica in odd for process in processes[replica]}))
    shown = ", ".join(f"replica {number}: {found:08x}" for number, found in enumerate(digests[:8]))
    raise BadHost(
        f"replicas computed different bits of the same loss and gradients ({shown}; {which})", named
    )
