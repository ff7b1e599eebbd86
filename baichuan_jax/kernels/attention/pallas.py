"""Causal attention on a TPU: jax's splash attention, with queries that may start anywhere.

In: q [B, T, N, H], k and v [B, S, N, H]; out: [B, T, N, H]. Splash attention is FlashAttention
(Dao et al. 2022) over a sparse mask: a table says for every block of queries and keys whether to
compute it and which block to fetch next, so that blocks above the diagonal cost nothing. jax builds
these tables from a mask that is known at compile time. They are small int32 arrays, so here they
are computed from query_offset, which may be traced: where the mesh splits the sequence, it is the
position of the device's first query.

B batch, T query length, S key length, N heads, H head size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from baichuan_jax.kernels.attention.blockwise import pad
from baichuan_jax.kernels.choice import tpu_obstacle

LANES = 128  # the last dimension of a TPU's register tile, which a block of keys must fill

# Tokens of a block, at most; scores are computed in pieces of BLOCK_COMPUTE keys. Larger blocks
# start fewer transfers and keep the matrix unit busier, and waste more above the diagonal. Thousand
# cycles of the schedules that libtpu 0.0.41 compiled for v5p, for one head of 128 and 4,096 tokens
# in bfloat16, forward and backward: 156 + 272 by blocks of 256, 76 + 111 by 512, 62 + 106 by 1,024
# (counted in docs/benchmarks.md). Blocks of 2,048 do not fit into VMEM.
BLOCK = 1024
BLOCK_COMPUTE = 512

# One backward kernel computes five products, two separate ones seven. The one kernel writes dq once
# for every block of keys, to be added up: memory that grows with the square of the length. Beyond
# this many blocks of keys the separate kernels run.
MAX_FUSED_BLOCKS = 8
MAX_HEAD_DIM = 128  # larger heads' blocks do not fit into VMEM


def obstacle(device: Any, dtype: str, head_dim: int) -> str | None:
    """Why this kernel cannot serve on a device; None: it can."""
    return tpu_obstacle(device, dtype) or _head_obstacle(head_dim)


def _head_obstacle(head_dim: int) -> str | None:
    if head_dim <= MAX_HEAD_DIM:
        return None
    return f"head size {head_dim}: blocks of {BLOCK} tokens fit into VMEM up to {MAX_HEAD_DIM}"


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention within equal segments; query t has position query_offset + t of the keys.

    Lengths that are no multiple of a block are padded. Raises ValueError for heads above
    MAX_HEAD_DIM.
    """
    T, S, H = q_BTNH.shape[1], k_BSNH.shape[1], q_BTNH.shape[-1]
    if (reason := _head_obstacle(H)) is not None:
        raise ValueError(f"Pallas attention with {reason}")
    block_q, block_k = _block(T), _block(S)
    # Splash attention does not scale the scores. Scaling q in float32 rounds once.
    scaled = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BNTH = pad(jnp.swapaxes(scaled, 1, 2), block_q, 2)
    k_BNSH, v_BNSH = (pad(jnp.swapaxes(x, 1, 2), block_k, 2) for x in (k_BSNH, v_BSNH))
    kernel = _kernel(
        q_BNTH.shape[2], k_BNSH.shape[2], block_q, block_k, jnp.asarray(query_offset, jnp.int32)
    )
    # Padded keys lie after every real query, so the causal mask hides them; padded queries are cut
    # off.
    segments = ()
    if segments_BT is not None and segments_BS is not None:
        segments = (SegmentIds(pad(segments_BT, block_q, 1), pad(segments_BS, block_k, 1)),)
    out_BNTH: jax.Array = jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH, *segments)
    return jnp.swapaxes(out_BNTH[:, :, :T], 1, 2)


def _block(length: int) -> int:
    """Tokens of a block: equal parts of at most BLOCK, rounded up to whole registers.

    Equal parts pad least: 1,100 tokens are two blocks of 640 and not one of 1,024 and a rest.
    """
    parts = -(-length // BLOCK)
    return -(-length // (parts * LANES)) * LANES


def _sees(query: jax.Array, key: jax.Array) -> jax.Array:
    return query >= key


def _kernel(T: int, S: int, block_q: int, block_k: int, offset: jax.Array) -> Callable:
    """Splash attention of padded lengths T and S, for one row of the batch."""
    # Queries and keys have their own block lengths: on a context axis there are fewer queries.
    fused = S // block_k <= MAX_FUSED_BLOCKS
    compute = BLOCK_COMPUTE if block_k % BLOCK_COMPUTE == 0 else block_k
    blocks = BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_k,
        use_fused_bwd_kernel=fused,
    )
    i, j = jnp.arange(T // block_q)[:, None], jnp.arange(S // block_k)[None]
    # The block's last query sees the block's first key.
    visible = offset + (i + 1) * block_q > j * block_k
    # The first block of queries that sees these keys.
    first_i = jnp.clip((j * block_k - offset) // block_q, 0, T // block_q - 1)
    positions: Any = offset + jnp.arange(T, dtype=jnp.int32)

    def info(following: jax.Array) -> MaskInfo:
        # The following block is fetched while skipped ones pass. In block_mask 0 skips a block and
        # 1 applies the mask, which these kernels do in every block anyway.
        return MaskInfo(
            data_next=following[None].astype(jnp.int32),
            mask_next=None,
            block_mask=visible[None].astype(jnp.int32),
            partial_mask_blocks=None,
            q_sequence=positions,
        )

    # Skipped blocks name the next one that is computed, so that no block is fetched for nothing.
    by_query, by_key = info(jnp.where(visible, j, 0)), info(jnp.where(visible, i, first_i))
    return SplashAttentionKernel(
        by_query,
        None if fused else by_query,
        by_key,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_sees,
        interpret=False,
    )
