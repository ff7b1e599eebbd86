"""Causal attention by cuDNN, through jax.nn: for GPUs on which the Triton kernels cannot serve."""

from typing import Any

import jax


def obstacle(device: Any, dtype: str, masked: bool, context: int) -> str | None:
    """Why cuDNN cannot serve on a device; None: it can.

    masked: segment ids keep documents apart. context: devices that split the sequence.
    """
    if device.platform != "gpu":
        return f"cuDNN needs a GPU and the backend is {device.platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention computes in 16 bits and model.dtype is {dtype}"
    if masked:
        return "cuDNN attention has no segment mask before Hopper, and it would be lost"
    if context > 1:
        return "cuDNN attention has no query offset, which mesh.context > 1 needs"
    return None


def attention(q_BTNH, k_BSNH, v_BSNH, segments_BT=None, segments_BS=None, query_offset=0):
    """Causal attention. Segments and an offset are not supported: obstacle refuses them before."""
    # The same arguments as every implementation, which the caller passes by position.
    del segments_BT, segments_BS, query_offset
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, is_causal=True, implementation="cudnn"
    )
