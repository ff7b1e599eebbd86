"""Next-token cross-entropy, split over tokens so that full logits [B, T, V] never exist, forward or backward.

The gradient is taken in the forward pass, chunk by chunk, while a chunk's logits are at hand; the
backward pass only scales it. That saves the second product of hidden states and head that a
recomputing backward pass would need.

B batch, T length, D hidden, V vocabulary (one device's part of it), C tokens of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from baichuan_jax.sharding import current_layout

IGNORE = -100  # labels with this value are left out


def cross_entropy(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    labels_BT: jax.Array,
    *,
    chunk_size: int,
    z_loss: float = 0.0,
) -> jax.Array:
    """Sum over labels (other than -100) of -log p(label), a float32 scalar; divide it by the global count of valid labels.

    Logits are hidden @ kernel in hidden's dtype with float32 accumulation; softmax and sums in
    float32. z_loss adds z_loss * log(normaliser)^2 a token (PaLM, Chowdhery et al. 2022). On the
    current mesh every device takes its own tokens in chunks of `chunk_size`, vocabulary split over
    `tensor`; the head's gradient is summed over devices once, not once a chunk.
    """
    return _cross_entropy(hidden_BTD, kernel_DV, labels_BT, chunk_size, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(hidden_BTD, kernel_DV, labels_BT, chunk_size, z_loss):
    return _on_mesh(
        functools.partial(_local, chunk_size=chunk_size, z_loss=z_loss, with_gradient=False),
        hidden_BTD,
        kernel_DV,
        labels_BT,
    )


def _forward(hidden_BTD, kernel_DV, labels_BT, chunk_size, z_loss):
    local = functools.partial(_local, chunk_size=chunk_size, z_loss=z_loss, with_gradient=True)
    return _on_mesh(local, hidden_BTD, kernel_DV, labels_BT)


def _backward(chunk_size, z_loss, saved, scale):
    del chunk_size, z_loss
    dhidden_BTD, dkernel_DV = saved
    return (dhidden_BTD * scale).astype(dhidden_BTD.dtype), dkernel_DV * scale, None


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(local: Callable, hidden_BTD, kernel_DV, labels_BT):
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return local(hidden_BTD, kernel_DV, labels_BT, token_axes=(), vocab_axes=(), shard_axes=())
    tokens = layout.spec(("batch", "length"))
    kernel = layout.spec(("embed", "vocab"))
    hidden = P(*tokens, None)
    gradients = local.keywords["with_gradient"]

    def real(*axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in axes if layout.mesh.shape[axis] > 1)

    function = functools.partial(
        local,
        token_axes=real(*layout.batch_axes, "context"),
        vocab_axes=real("tensor"),
        shard_axes=real("fsdp"),
    )
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=(hidden, kernel, tokens),
        out_specs=(P(), (hidden, kernel)) if gradients else P(),
        check_vma=False,  # the derivative is written by hand, so nothing here is transposed
    )(hidden_BTD, kernel_DV, labels_BT)


def _local(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    labels_BT: jax.Array,
    *,
    chunk_size: int,
    z_loss: float,
    with_gradient: bool,
    token_axes: tuple[str, ...],
    vocab_axes: tuple[str, ...],
    shard_axes: tuple[str, ...],
):
    """One device's tokens and part of the vocabulary; sums over the mesh axes that split them (none on one device)."""
    D = hidden_BTD.shape[-1]
    dtype = hidden_BTD.dtype
    kernel_DV = kernel_DV.astype(dtype)
    for axis in shard_axes:
        kernel_DV = lax.all_gather(kernel_DV, axis, axis=0, tiled=True)
    V = kernel_DV.shape[1]
    first = lax.axis_index(vocab_axes) * V if vocab_axes else 0

    count = labels_BT.size
    chunk_size = min(chunk_size, count)
    padding = -count % chunk_size
    hidden = jnp.pad(hidden_BTD.reshape(count, D), ((0, padding), (0, 0))).reshape(
        -1, chunk_size, D
    )
    labels = jnp.pad(labels_BT.reshape(count), (0, padding), constant_values=IGNORE).reshape(
        -1, chunk_size
    )

    def over_vocab(reduce: Callable, x: jax.Array) -> jax.Array:
        return reduce(x, vocab_axes) if vocab_axes else x

    def chunk(carry, xs):
        loss, dkernel_DV = carry
        hidden_CD, labels_C = xs
        logits_CV = jnp.matmul(hidden_CD, kernel_DV, preferred_element_type=jnp.float32)
        top_C = over_vocab(lax.pmax, logits_CV.max(axis=-1))
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        total_C = over_vocab(lax.psum, exp_CV.sum(axis=-1))
        lse_C = top_C + jnp.log(total_C)
        own_C = labels_C - first
        here_C = (own_C >= 0) & (own_C < V)
        picked_C = jnp.take_along_axis(logits_CV, jnp.where(here_C, own_C, 0)[:, None], axis=-1)[
            :, 0
        ]
        picked_C = over_vocab(lax.psum, jnp.where(here_C, picked_C, 0.0))
        valid_C = labels_C != IGNORE
        loss += jnp.sum(jnp.where(valid_C, lse_C - picked_C + z_loss * lse_C**2, 0.0))
        if not with_gradient:
            return (loss, dkernel_DV), None
        weight_C = jnp.where(valid_C, (1.0 + 2.0 * z_loss * lse_C) / total_C, 0.0)
        one_hot_CV = jnp.arange(V) == own_C[:, None]
        dlogits_CV = exp_CV * weight_C[:, None] - (one_hot_CV & valid_C[:, None])
        dlogits_CV = dlogits_CV.astype(dtype)
        dkernel_DV += jnp.matmul(hidden_CD.T, dlogits_CV, preferred_element_type=jnp.float32)
        dhidden_CD = jnp.matmul(dlogits_CV, kernel_DV.T, preferred_element_type=jnp.float32)
        return (loss, dkernel_DV), over_vocab(lax.psum, dhidden_CD).astype(dtype)

    start = (jnp.float32(0.0), jnp.zeros((D, V) if with_gradient else (), jnp.float32))
    dhidden: Any
    (loss, dkernel_DV), dhidden = lax.scan(chunk, start, (hidden, labels))
    if token_axes:
        loss = lax.psum(loss, token_axes)
    if not with_gradient:
        return loss
    others = tuple(axis for axis in token_axes if axis not in shard_axes)
    for axis in shard_axes:
        dkernel_DV = lax.psum_scatter(dkernel_DV, axis, scatter_dimension=0, tiled=True)
    if others:
        dkernel_DV = lax.psum(dkernel_DV, others)
    return loss, (dhidden.reshape(-1, D)[:count].reshape(hidden_BTD.shape), dkernel_DV)
