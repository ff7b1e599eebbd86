"""Next-token cross-entropy over chunks of tokens, so that full logits [B, T, V] never exist.

States [B, T, D], the head's kernel [D, V] and labels [B, T] go in; the sum of the loss comes out.
At V = 64,000 and D = 4,096 a token's float32 logits take 31 times the bytes of its bfloat16 state;
so the head is applied to one chunk of tokens at a time.

The gradient is taken in the forward pass, chunk by chunk, while a chunk's logits are at hand: the
logits' gradient is softmax(logits) - one_hot(label). The backward pass only scales the two
gradients that were kept. Recomputing the logits there would need a fourth product of this size
beside the three here. Liger Kernel (Hsu et al. 2024) fuses the head and the loss in the same way.

B batch, T length, D hidden, V vocabulary (one device's part of it), C tokens of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from baichuan_jax.sharding import current_layout

IGNORE = -100  # the label of a token that is not predicted; torch's ignore_index


def cross_entropy(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    labels_BT: jax.Array,
    *,
    chunk_size: int,
    z_loss: float = 0.0,
) -> jax.Array:
    """Sum of -log p(label) over labels other than IGNORE: a float32 scalar.

    The caller divides by the global count of valid labels. Logits are hidden @ kernel in hidden's
    dtype with float32 accumulation; softmax and sums are float32. z_loss adds z_loss *
    log(normaliser)^2 a token (PaLM, Chowdhery et al. 2022). On the current mesh every device takes
    its own tokens in chunks of `chunk_size`, with the vocabulary split over `tensor`.
    """
    return _cross_entropy(hidden_BTD, kernel_DV, labels_BT, chunk_size, z_loss)


# Called without differentiation (evaluation), the plain function runs and takes no gradient. Under
# value_and_grad jax calls _forward and _backward in its place.
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


class _Axes(NamedTuple):
    """The mesh axes that split a device's arguments; empty on a single device."""

    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    # Axes along which the kernel's rows D are split.
    shards: tuple[str, ...] = ()
    # In which the kernel's gradient is summed over them.
    sum_dtype: str = "float32"


def _on_mesh(local: Callable, hidden_BTD, kernel_DV, labels_BT):
    """Run `local` on every device of the current mesh with its part of the arrays."""
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return local(hidden_BTD, kernel_DV, labels_BT, axes=_Axes())
    # A device gets its tokens whole in D, and its part of the kernel as the parameters are split.
    tokens = layout.spec(("batch", "length"))
    kernel = layout.spec(("embed", "vocab"))
    hidden = P(*tokens, None)
    gradients = local.keywords["with_gradient"]

    def real(*axes: str) -> tuple[str, ...]:
        # A collective over an axis of size 1 would still be in the program.
        return tuple(axis for axis in axes if layout.mesh.shape[axis] > 1)

    axes = _Axes(
        real(*layout.batch_axes, "context"), real("tensor"), real("fsdp"), layout.sum_dtype
    )
    return jax.shard_map(
        functools.partial(local, axes=axes),
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
    axes: _Axes,
):
    """The loss, and with_gradient (loss, gradients), of one device's tokens and vocabulary."""
    D = hidden_BTD.shape[-1]
    kernel_DV = kernel_DV.astype(hidden_BTD.dtype)
    # Gathered once before the loop over chunks. The gather is of the head's cast weights: half of
    # the bytes of the float32 parameters.
    for axis in axes.shards:
        kernel_DV = lax.all_gather(kernel_DV, axis, axis=0, tiled=True)
    V = kernel_DV.shape[1]
    first = lax.axis_index(axes.vocab) * V if axes.vocab else 0

    count = labels_BT.size
    chunk_size = min(chunk_size, count)
    # The last chunk is filled up with tokens whose label is IGNORE, which add nothing.
    padding = -count % chunk_size
    hidden = jnp.pad(hidden_BTD.reshape(count, D), ((0, padding), (0, 0)))
    hidden = hidden.reshape(-1, chunk_size, D)
    labels = jnp.pad(labels_BT.reshape(count), (0, padding), constant_values=IGNORE)
    labels = labels.reshape(-1, chunk_size)

    chunk = functools.partial(
        _chunk, kernel_DV, first, axes.vocab, z_loss=z_loss, with_gradient=with_gradient
    )
    start = (jnp.float32(0.0), jnp.zeros((D, V) if with_gradient else (), jnp.float32))
    dhidden: Any
    (loss, dkernel_DV), dhidden = lax.scan(chunk, start, (hidden, labels))
    if axes.tokens:
        loss = lax.psum(loss, axes.tokens)
    if not with_gradient:
        return loss
    # The kernel's gradient is summed over devices once, after all chunks: over its shards by a
    # reduce-scatter, which leaves each device its own rows, over other token axes by an all-reduce.
    others = tuple(axis for axis in axes.tokens if axis not in axes.shards)
    if axes.tokens:
        dkernel_DV = dkernel_DV.astype(axes.sum_dtype)
    for axis in axes.shards:
        dkernel_DV = lax.psum_scatter(dkernel_DV, axis, scatter_dimension=0, tiled=True)
    if others:
        dkernel_DV = lax.psum(dkernel_DV, others)
    dkernel_DV = dkernel_DV.astype(jnp.float32)
    return loss, (dhidden.reshape(-1, D)[:count].reshape(hidden_BTD.shape), dkernel_DV)


def _chunk(kernel_DV, first, vocab_axes, carry, xs, *, z_loss: float, with_gradient: bool):
    """One chunk of the scan: adds to (loss, dkernel_DV), returns the chunk's dhidden_CD.

    This device has V columns of the vocabulary from `first` on. Maximum, normaliser and the label's
    logit are reduced over `vocab_axes`, as in Megatron-LM's parallel cross-entropy.
    """
    loss, dkernel_DV = carry
    hidden_CD, labels_C = xs
    V = kernel_DV.shape[1]

    def over_vocab(reduce: Callable, x: jax.Array) -> jax.Array:
        return reduce(x, vocab_axes) if vocab_axes else x

    logits_CV = jnp.matmul(hidden_CD, kernel_DV, preferred_element_type=jnp.float32)
    # The largest logit is taken off first, or exp would overflow.
    top_C = over_vocab(lax.pmax, logits_CV.max(axis=-1))
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    total_C = over_vocab(lax.psum, exp_CV.sum(axis=-1))
    lse_C = top_C + jnp.log(total_C)
    # A label has its logit on one device; the others add zero.
    own_C = labels_C - first
    here_C = (own_C >= 0) & (own_C < V)
    column_C = jnp.where(here_C, own_C, 0)
    picked_C = jnp.take_along_axis(logits_CV, column_C[:, None], axis=-1)[:, 0]
    picked_C = over_vocab(lax.psum, jnp.where(here_C, picked_C, 0.0))
    # Tokens without a label run through all of it and are masked here: the shapes stay fixed.
    valid_C = labels_C != IGNORE
    loss += jnp.sum(jnp.where(valid_C, lse_C - picked_C + z_loss * lse_C**2, 0.0))
    if not with_gradient:
        return (loss, dkernel_DV), None
    # d (lse + z_loss * lse^2) / d logits = softmax * (1 + 2 * z_loss * lse).
    weight_C = jnp.where(valid_C, (1.0 + 2.0 * z_loss * lse_C) / total_C, 0.0)
    # Never stored: XLA fuses the comparison into the subtraction.
    one_hot_CV = jnp.arange(V) == own_C[:, None]
    dlogits_CV = exp_CV * weight_C[:, None] - (one_hot_CV & valid_C[:, None])
    # Cast for the two products, as autodiff would: they run at the full speed of hidden's dtype.
    dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
    dkernel_DV += jnp.matmul(hidden_CD.T, dlogits_CV, preferred_element_type=jnp.float32)
    dhidden_CD = jnp.matmul(dlogits_CV, kernel_DV.T, preferred_element_type=jnp.float32)
    return (loss, dkernel_DV), over_vocab(lax.psum, dhidden_CD).astype(hidden_CD.dtype)
