"""Causal attention in blocks, in plain JAX for any backend: memory linear in the length.

In: q [B, T, N, H], k and v [B, S, N, H]; out: [B, T, N, H]. The algorithm is FlashAttention's
(Dao et al. 2022, algorithm 1). For each block of queries a loop over blocks of keys keeps a running
maximum and a running sum of exponentials, and rescales the result when the maximum grows (online
softmax). Blocks above the diagonal are not computed. For the backward pass (Dao 2023, section 3)
the log-sum-exp of every query is kept, and the weights are computed again from it.

Inside, heads come before length, so that every product is one plain batch of matrices. B batch,
N heads, T queries, S keys, H head size, Q and K the lengths of one block of queries and of keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # not -inf: the difference of two masked maxima must be 0, not NaN


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention within equal segments; query t has position query_offset + t of the keys."""
    T, S = q_BTNH.shape[1], k_BSNH.shape[1]
    # Measured on a CPU at head size 64: 128 is fastest at 256 to 512 tokens, 256 from 1,024 on.
    block = min(256 if S >= 1024 else 128, max(T, S))
    q_BNTH, k_BNSH, v_BNSH = [
        pad(jnp.swapaxes(x, 1, 2), block, 2) for x in (q_BTNH, k_BSNH, v_BSNH)
    ]
    segments = None
    if segments_BT is not None and segments_BS is not None:
        segments = (pad(segments_BT, block, 1), pad(segments_BS, block, 1))
    # Padded keys lie after every real query, so the causal mask hides them; padded queries are cut
    # off.
    out_BNTH: jax.Array = _attention(
        q_BNTH, k_BNSH, v_BNSH, segments, jnp.asarray(query_offset, jnp.int32), block
    )
    return jnp.swapaxes(out_BNTH[:, :, :T], 1, 2)


def pad(x: jax.Array, block: int, axis: int) -> jax.Array:
    """Zeros behind an axis, up to a whole number of blocks."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _block(x: jax.Array, index: jax.Array, size: int, axis: int = 2) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A batch of matrix products of y's dtype, summed in float32."""
    return jnp.einsum(subscripts, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _scores(q_BNQH, k_BNKH, segments, i, j, offset, block):
    """Scaled scores of query block i and key block j [B, N, Q, K] in float32.

    MASKED where the query must not see the key.
    """
    s_BNQK = _product("bnqh,bnkh->bnqk", q_BNQH, k_BNKH) * q_BNQH.shape[-1] ** -0.5
    query_Q = offset + i * block + jnp.arange(block)
    mask = query_Q[:, None] >= j * block + jnp.arange(block)
    if segments is not None:
        segment_BQ = _block(segments[0], i, block, 1)
        segment_BK = _block(segments[1], j, block, 1)
        mask = mask & (segment_BQ[:, None, :, None] == segment_BK[:, None, None, :])
    return jnp.where(mask, s_BNQK, MASKED)


def _num_key_blocks(i, offset, block: int, total: int):
    """Key blocks that query block i can see: all that start at or before its last query."""
    return jnp.minimum((offset + (i + 1) * block - 1) // block + 1, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, segments, offset, block):
    return _forward(q, k, v, segments, offset, block)[0]


def _forward(q_BNTH, k_BNSH, v_BNSH, segments, offset, block):
    B, N, T, H = q_BNTH.shape

    def query_block(_, i):
        q_BNQH = _block(q_BNTH, i, block)

        # One turn of the online softmax: what was summed so far shrinks by exp(old - new maximum).
        def key_block(j, carry):
            out, top, total = carry
            s_BNQK = _scores(q_BNQH, _block(k_BNSH, j, block), segments, i, j, offset, block)
            new_top = jnp.maximum(top, s_BNQK.max(-1, keepdims=True))
            p_BNQK = jnp.exp(s_BNQK - new_top)
            shrink = jnp.exp(top - new_top)
            update = _product("bnqk,bnkh->bnqh", p_BNQK, _block(v_BNSH, j, block))
            return out * shrink + update, new_top, total * shrink + p_BNQK.sum(-1, keepdims=True)

        start = (
            jnp.zeros((B, N, block, H), jnp.float32),
            jnp.full((B, N, block, 1), MASKED, jnp.float32),
            jnp.zeros((B, N, block, 1), jnp.float32),
        )
        count = _num_key_blocks(i, offset, block, k_BNSH.shape[2] // block)
        out, top, total = lax.fori_loop(0, count, key_block, start)
        return None, ((out / total).astype(q_BNTH.dtype), top + jnp.log(total))

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(T // block))
    out_BNTH = jnp.moveaxis(out, 0, 2).reshape(B, N, T, H)
    lse_BNT1 = jnp.moveaxis(lse, 0, 2).reshape(B, N, T, 1)
    return out_BNTH, (q_BNTH, k_BNSH, v_BNSH, segments, offset, out_BNTH, lse_BNT1)


def _backward(block, saved, dout_BNTH):
    q_BNTH, k_BNSH, v_BNSH, segments, offset, out_BNTH, lse_BNT1 = saved
    # The softmax's derivative subtracts sum(p * dp) over the keys. That equals sum(out * dout) over
    # the head, which is known before any block is computed.
    products_BNTH = out_BNTH.astype(jnp.float32) * dout_BNTH.astype(jnp.float32)
    delta_BNT1 = jnp.sum(products_BNTH, axis=-1, keepdims=True)
    dtype = q_BNTH.dtype

    # dk and dv of all keys are carried, and XLA updates a block's slice in place. dq of a block is
    # complete after its loop over the keys.
    def query_block(carry, i):
        q_BNQH, dout_BNQH = _block(q_BNTH, i, block), _block(dout_BNTH, i, block)
        lse_BNQ1, delta_BNQ1 = _block(lse_BNT1, i, block), _block(delta_BNT1, i, block)

        def key_block(j, carry):
            dq_BNQH, dk_BNSH, dv_BNSH = carry
            k_BNKH, v_BNKH = _block(k_BNSH, j, block), _block(v_BNSH, j, block)
            s_BNQK = _scores(q_BNQH, k_BNKH, segments, i, j, offset, block)
            # A query that sees nothing (padding) has lse ~ MASKED: its weights must be 0, not
            # exp(0).
            p_BNQK = jnp.where(s_BNQK > MASKED / 2, jnp.exp(s_BNQK - lse_BNQ1), 0.0)
            ds_BNQK = p_BNQK * (_product("bnqh,bnkh->bnqk", dout_BNQH, v_BNKH) - delta_BNQ1)
            dk_BNKH = _block(dk_BNSH, j, block) + _product("bnqk,bnqh->bnkh", ds_BNQK, q_BNQH)
            dv_BNKH = _block(dv_BNSH, j, block) + _product("bnqk,bnqh->bnkh", p_BNQK, dout_BNQH)
            return (
                dq_BNQH + _product("bnqk,bnkh->bnqh", ds_BNQK, k_BNKH),
                lax.dynamic_update_slice_in_dim(dk_BNSH, dk_BNKH, j * block, 2),
                lax.dynamic_update_slice_in_dim(dv_BNSH, dv_BNKH, j * block, 2),
            )

        count = _num_key_blocks(i, offset, block, k_BNSH.shape[2] // block)
        dq_BNQH, *carry = lax.fori_loop(
            0, count, key_block, (jnp.zeros(q_BNQH.shape, jnp.float32), *carry)
        )
        return tuple(carry), dq_BNQH

    zeros_BNSH = jnp.zeros(k_BNSH.shape, jnp.float32)
    (dk_BNSH, dv_BNSH), dq = lax.scan(
        query_block, (zeros_BNSH, zeros_BNSH), jnp.arange(q_BNTH.shape[2] // block)
    )
    scale = q_BNTH.shape[-1] ** -0.5  # once for each sum, not for each block's products
    dq_BNTH = jnp.moveaxis(dq, 0, 2).reshape(q_BNTH.shape) * scale
    return dq_BNTH.astype(dtype), (dk_BNSH * scale).astype(dtype), dv_BNSH.astype(dtype), None, None


_attention.defvjp(_forward, _backward)
