"""Causal attention on a TPU: jax's splash attention with masks made here, so that queries may start anywhere in the sequence.

Splash attention is given, for every block of queries and keys, whether to compute it and which
block to fetch next, and the position of every query. jax builds these tables from a mask known at
compile time. They are small int32 arrays, so here they are computed from query_offset, which may be
traced: on a context axis it is the device's place.

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

LANES = 128  # the last dimension of a TPU's register tile, which a block of keys must fill

# Tokens of a block, at most; scores are computed in pieces of BLOCK_COMPUTE keys. Larger blocks
# start fewer transfers and keep the matrix unit busier, and waste more above the diagonal. Thousand
# cycles of the schedules that libtpu 0.0.41 compiled for v5p, for one head of 128 and 4,096 tokens
# in bfloat16, forward and backward: 156 + 272 by blocks of 256, 76 + 111 by 512, 62 + 106 by 1,024
# (counted in docs/benchmarks.md). Blocks of 2,048 do not fit into VMEM.
BLOCK = 1024
BLOCK_COMPUTE = 512

# One backward kernel computes five products, two separate ones seven. The one writes dq once for
# every block of keys, to be added up: memory that grows with the square of the length, so beyond so
# many blocks the separate ones run.
MAX_FUSED_BLOCKS = 8


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention; query t stands at position query_offset + t of the keys. Attends within equal segments only.

    Lengths that are no multiple of a block are padded. Raises ValueError for heads above 128, whose
    blocks do not fit into VMEM.
    """
    T, S, H = q_BTNH.shape[1], k_BSNH.shape[1], q_BTNH.shape[-1]
    if H > 128:
        raise ValueError(
            f"Pallas attention with head size {H}: blocks of {BLOCK} tokens fit into VMEM up to 128"
        )
    block_q, block_k = _block(T), _block(S)
    scaled = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BNTH = _pad(jnp.swapaxes(scaled, 1, 2), block_q, 2)
    k_BNSH, v_BNSH = (_pad(jnp.swapaxes(x, 1, 2), block_k, 2) for x in (k_BSNH, v_BSNH))
    kernel = _kernel(
        q_BNTH.shape[2], k_BNSH.shape[2], block_q, block_k, jnp.asarray(query_offset, jnp.int32)
    )
    # Padded keys lie after every real query, so the causal mask hides them; padded queries are cut
    # off.
    segments = ()
    if segments_BT is not None and segments_BS is not None:
        segments = (SegmentIds(_pad(segments_BT, block_q, 1), _pad(segments_BS, block_k, 1)),)
    out_BNTH: jax.Array = jax.vmap(kernel)(q_BNTH, k_BNSH, v_BNSH, *segments)
    return jnp.swapaxes(out_BNTH[:, :, :T], 1, 2)


def _block(length: int) -> int:
    """Tokens of a block: the length in equal parts of at most BLOCK, rounded up to whole registers."""
    parts = -(-length // BLOCK)
    return -(-length // (parts * LANES)) * LANES


def _pad(x: jax.Array, block: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _sees(query: jax.Array, key: jax.Array) -> jax.Array:
    return query >= key


def _kernel(T: int, S: int, block_q: int, block_k: int, offset: jax.Array) -> Callable:
    """Splash attention of padded lengths T and S, for one row of the batch."""
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
    visible = (
        offset + (i + 1) * block_q > j * block_k
    )  # the block's last query sees the block's first key
    first_i = jnp.clip(
        (j * block_k - offset) // block_q, 0, T // block_q - 1
    )  # the first block of queries that sees these keys
    positions: Any = offset + jnp.arange(T, dtype=jnp.int32)

    def info(following: jax.Array) -> MaskInfo:
        # The following block is fetched while skipped ones pass. 1: apply the mask, which the
        # kernels do in every block anyway.
        tables = (following[None].astype(jnp.int32), visible[None].astype(jnp.int32))
        return MaskInfo(
            data_next=tables[0],
            mask_next=None,
            block_mask=tables[1],
            partial_mask_blocks=None,
            q_sequence=positions,
        )

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
