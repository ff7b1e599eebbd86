"""Causal attention for GPUs in the Triton language: what JAX calls, with its derivative.

In: q [B, T, N, H], k and v [B, S, N, H]; out: [B, T, N, H]. The algorithm is FlashAttention-2
(Dao 2023); triton_kernels.py holds the kernels and explains it. This file can be imported without
Triton, so that the chooser can ask for its obstacles; the kernels are imported at the first call.

B batch, T queries, S keys, N heads, H head size, Q and K lengths of one block of queries and of
keys.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.sharding import activate, current_layout


class Blocks(NamedTuple):
    """Block lengths of queries and keys, warps of a program, stages of its loads' pipeline."""

    q: int
    k: int
    num_warps: int
    num_stages: int


# By kernel, bytes of an element and head size. Chosen on sm_80 by `python -m baichuan_jax.kernels`
# (docs/kernels.md): no spilled register, two warps at least for each of a multiprocessor's four
# schedulers, then the highest bound. Every warp of 16 rows reads the whole block of the other side
# from shared memory, which then takes about as long as the tensor cores; 32 rows halve that, but at
# head size 128 their sums alone take 128 of a thread's 255 registers. A second stage loads the next
# block while this one is multiplied; a third one where memory is left. float32: three TF32 products
# for each, with both parts of every operand in registers.
_BLOCKS = {
    ("attention_forward", 2, 128): Blocks(128, 64, 8, 3),
    ("attention_forward", 2, 64): Blocks(128, 64, 4, 3),
    ("attention_forward", 4, 128): Blocks(32, 32, 4, 1),
    ("attention_forward", 4, 64): Blocks(64, 32, 4, 2),
    ("attention_dkv", 2, 128): Blocks(64, 64, 4, 2),
    ("attention_dkv", 2, 64): Blocks(32, 128, 4, 2),
    ("attention_dkv", 4, 128): Blocks(32, 16, 4, 1),
    ("attention_dkv", 4, 64): Blocks(16, 64, 4, 1),
    ("attention_dq", 2, 128): Blocks(128, 64, 8, 2),
    ("attention_dq", 2, 64): Blocks(128, 64, 4, 2),
    ("attention_dq", 4, 128): Blocks(16, 32, 4, 1),
    ("attention_dq", 4, 64): Blocks(64, 16, 4, 1),
}
HEAD_DIMS = tuple(sorted({head_dim for _, _, head_dim in _BLOCKS}))
MAX_ROW_ELEMENTS = 2**31  # of the batch: offsets inside a row are 32-bit


def obstacle(device: Any, head_dim: int) -> str | None:
    """Why these kernels cannot serve on a device; None: they can."""
    if (reason := bridge.device_obstacle(device)) is not None:
        return reason
    if head_dim not in HEAD_DIMS:
        return f"head size {head_dim} is neither {' nor '.join(map(str, HEAD_DIMS))}"
    return None


@functools.cache
def _blocks_of_sm_90() -> dict[tuple[str, int, int], Blocks]:
    """The shapes that differ on sm_90: dk and dv, where 64 queries would spill inside the loops.

    triton 3.6 needs more registers for each query than 3.9. With 3.9's shape the cache limits that
    kernel to 72 % of the peak; with 128 keys and 8 warps the tensor cores limit it to 97 %.
    Elsewhere one shape serves both versions: what 3.6 spills, 12 to 32 bytes in three kernels, it
    stores and loads once a program, outside the loops.
    """
    import triton  # pyright: ignore[reportMissingImports]

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    shape = Blocks(32, 64, 4, 3) if version >= (3, 7) else Blocks(32, 128, 8, 2)
    return {("attention_dkv", 2, 128): shape}


def choose_blocks(kernel: str, dtype: Any, head_dim: int, capability: int) -> Blocks:
    """The shape of one kernel's programs: attention_forward, attention_dkv or attention_dq.

    dtype: of q, k, v. head_dim: one of HEAD_DIMS. capability: what the kernel is compiled for, such
    as 80. Called by this name while the kernel's caller is traced, so that a benchmark can put
    another function in its place.
    """
    case = (kernel, jnp.dtype(dtype).itemsize, head_dim)
    return _blocks_of_sm_90().get(case, _BLOCKS[case]) if capability >= 90 else _BLOCKS[case]


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention within equal segments; query t has position query_offset + t of the keys.

    float32 (products as three TF32 ones, about float32's precision), float16 or bfloat16. A query
    that sees no key gives 0. The same bits every time. Raises ValueError where a row of the batch
    has 2^31 elements or more.
    """
    B, _, N, H = q_BTNH.shape
    if (size := max(q_BTNH.shape[1], k_BSNH.shape[1]) * N * H) >= MAX_ROW_ELEMENTS:
        raise ValueError(
            f"attention: {size} elements of a row are beyond the kernels' 32-bit offsets; "
            "split the sequence (mesh.context)"
        )
    # One offset for each row of the batch: vmap may give every replica its own.
    offset_B = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (B,))
    segments = None if segments_BT is None or segments_BS is None else (segments_BT, segments_BS)
    return _attention(q_BTNH, k_BSNH, v_BSNH, offset_B, segments, current_layout())


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, offset, segments, layout):
    return _forward(q, k, v, offset, segments, layout)[0]


def _forward(q_BTNH, k_BSNH, v_BSNH, offset_B, segments, layout):
    # Without segments the kernels read none, but every parameter needs an array.
    arrays = (q_BTNH, k_BSNH, v_BSNH, offset_B, *(segments or (offset_B, offset_B)))
    run = functools.partial(run_forward, segments is not None)
    # The caller's layout: jax may trace the derivative's two halves after the caller has returned.
    with activate(layout):
        out_BTNH, lse_BNT = bridge.merge_vmapped(run)(*arrays)
    return out_BTNH, (q_BTNH, k_BSNH, v_BSNH, offset_B, segments, out_BTNH, lse_BNT)


def _backward(layout, saved, dout_BTNH):
    q_BTNH, k_BSNH, v_BSNH, offset_B, segments, out_BTNH, lse_BNT = saved
    # delta of the softmax's derivative (Dao 2023, section 2.2), which XLA fuses into one pass.
    products_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1)
    delta_BNT = jnp.swapaxes(products_BTN, 1, 2)
    arrays = (q_BTNH, k_BSNH, v_BSNH, offset_B, *(segments or (offset_B, offset_B)))
    run = functools.partial(run_backward, segments is not None)
    with activate(layout):
        gradients = bridge.merge_vmapped(run)(*arrays, dout_BTNH, lse_BNT, delta_BNT)
    return *gradients, None, None


_attention.defvjp(_forward, _backward)


def run_forward(segmented: bool, *arrays: jax.Array) -> list[jax.Array]:
    """[out, lse] of the forward kernel. arrays: q, k, v, offset, segments of queries, of keys."""
    from baichuan_jax.kernels.attention import triton_kernels as kernels

    q_BTNH = arrays[0]
    B, T, N, _ = q_BTNH.shape
    out = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)
    lse = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    return _call(kernels.forward_kernel, "attention_forward", segmented, arrays, [out, lse])


def run_backward(segmented: bool, *arrays: jax.Array) -> list[jax.Array]:
    """[dq, dk, dv] of the backward kernels. arrays: as run_forward's, then dout, lse, delta."""
    from baichuan_jax.kernels.attention import triton_kernels as kernels

    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:2])
    # Two kernels and seven products, where one kernel would need five: it would have to add dq up
    # atomically, in an order that differs from run to run.
    dk_dv = _call(kernels.dkv_kernel, "attention_dkv", segmented, arrays, [like_k, like_k])
    dq = _call(kernels.dq_kernel, "attention_dq", segmented, arrays, [like_q])
    return [*dq, *dk_dv]


def _call(
    kernel: Any,
    name: str,
    segmented: bool,
    arrays: tuple[jax.Array, ...],
    outputs: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Run a kernel: a program for each head and block of queries (dkv: of keys)."""
    q_BTNH, k_BSNH = arrays[:2]
    B, T, N, H = q_BTNH.shape
    S = k_BSNH.shape[1]
    blocks = choose_blocks(name, q_BTNH.dtype, H, bridge.compute_capability())
    count = -(-S // blocks.k) if name == "attention_dkv" else -(-T // blocks.q)
    return bridge.call(
        kernel,
        *arrays,
        name=name,
        outputs=outputs,
        grid=(count, B * N),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        T=T,
        S=S,
        N=N,
        H=H,
        Q=blocks.q,
        K=blocks.k,
        SCALE=H**-0.5 * math.log2(math.e),  # the kernels' exponentials are base 2
        PRECISION="tf32x3" if q_BTNH.dtype == jnp.float32 else "ieee",
        SEGMENTED=segmented,
    )
