"""Plain jnp operators: the oracle of every other implementation.

B batch, T query length, S key length, N heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp


def masked_attention(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention where mask_BTS (bool, may broadcast over B) is true; float32 softmax. Returns [B, T, N, H]."""
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    scores_BNTS *= q_BTNH.shape[-1] ** -0.5
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH, preferred_element_type=jnp.float32).astype(q_BTNH.dtype)


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention; query t stands at position query_offset + t of the keys. Attends within equal segments only."""
    query_T = query_offset + jnp.arange(q_BTNH.shape[1])
    mask_BTS = (query_T[:, None] >= jnp.arange(k_BSNH.shape[1]))[None]
    if segments_BT is not None and segments_BS is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    return masked_attention(q_BTNH, k_BSNH, v_BSNH, mask_BTS)


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float, residual: jax.Array | None = None) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in x's dtype.

    With a residual, x + residual is normalised and comes back too: (y, x + residual).
    """
    total = x if residual is None else residual + x
    x32 = total.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = (weight_D * x32).astype(x.dtype)
    return y if residual is None else (y, total)
