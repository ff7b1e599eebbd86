"""Attention and RoPE in plain jnp, all scores at once: the oracle of the other implementations.

B batch, T query length, S key length, N heads, H head size, C the three of Q, K and V, U = T keys
of a row's own tokens.
"""

import functools

import jax
import jax.numpy as jnp


def apply_rope(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn channel pairs (i, i + H/2), as the original's rotate_half; computed in float32.

    rope: cosines and sines [B or 1, T, H/2] in float32 (model.rope_tables). The RoPE paper (Su et
    al. 2021) pairs (2i, 2i + 1). Weights trained with one pairing are useless with the other.
    """
    cos, sin = (table[:, :, None, :] for table in rope)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def turned_parts(
    qkv_BTCNH: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys of the packed projection, turned by RoPE, and its values: [B, T, N, H]."""
    q_BTNH, k_BTNH, v_BTNH = (qkv_BTCNH[:, :, part] for part in range(3))
    return apply_rope(q_BTNH, rope), apply_rope(k_BTNH, rope), v_BTNH


def masked_attention(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention where mask_BTS is true (bool; its B may be 1). Returns [B, T, N, H].

    Scores and softmax are float32.
    """
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    # The least float32, not -inf: a row that sees no key gives a mean of values and no NaN.
    scores_BNTS *= q_BTNH.shape[-1] ** -0.5
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum(
        "bnts,bsnh->btnh", weights_BNTS, v_BSNH, preferred_element_type=jnp.float32
    ).astype(q_BTNH.dtype)


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention within equal segments; query t has position query_offset + t of the keys."""
    # All T x S scores exist at once: memory grows with the square of the length.
    query_T = query_offset + jnp.arange(q_BTNH.shape[1])
    mask_BTS = (query_T[:, None] >= jnp.arange(k_BSNH.shape[1]))[None]
    if segments_BT is not None and segments_BS is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    return masked_attention(q_BTNH, k_BSNH, v_BSNH, mask_BTS)


def prefix_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    k_SNH: jax.Array,
    v_SNH: jax.Array,
    mask_S: jax.Array,
) -> jax.Array:
    """Causal attention of rows that all follow the same S tokens. Returns [B, T, N, H].

    mask_S (bool): which of the S tokens are visible. Keys and values of the prefix exist once, so
    that its products are one matrix product of all rows' queries. Passes over the scores decide the
    time on a CPU and are kept few: the result, and not the weights, is divided by the weights' sum.
    The softmax is float32.
    """
    # N first: the prefix's products are then batches over the heads alone.
    lowest, dtype = jnp.finfo(jnp.float32).min, v_SNH.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = q_BTNH.shape[-1] ** -0.5
    before_NBTS = product("btnh,snh->nbts", q_BTNH, k_SNH) * scale + jnp.where(mask_S, 0.0, lowest)
    own_NBTU = product("btnh,bunh->nbtu", q_BTNH, k_BTNH) * scale
    own_NBTU = jnp.where(jnp.tri(q_BTNH.shape[1], dtype=bool), own_NBTU, lowest)
    # One maximum and one sum over both parts: together they are one softmax.
    top_NBT1 = jnp.maximum(before_NBTS.max(-1, keepdims=True), own_NBTU.max(-1, keepdims=True))
    before_NBTS, own_NBTU = jnp.exp(before_NBTS - top_NBT1), jnp.exp(own_NBTU - top_NBT1)
    total_NBT1 = before_NBTS.sum(-1, keepdims=True) + own_NBTU.sum(-1, keepdims=True)
    out_NBTH = product("nbts,snh->nbth", before_NBTS.astype(dtype), v_SNH)
    out_NBTH += product("nbtu,bunh->nbth", own_NBTU.astype(dtype), v_BTNH)
    return jnp.moveaxis(out_NBTH / total_NBT1, 0, 2).astype(q_BTNH.dtype)
