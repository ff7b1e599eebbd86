"""Causal attention for GPUs in the Triton language: what JAX calls, with its derivative.

In: the packed projection [B, T, 3, N, H] and RoPE's tables, or q [B, T, N, H] and k and v
[B, S, N, H]; out: [B, T, N, H]. The algorithm is FlashAttention-2 (Dao 2023); triton_kernels.py
holds the kernels and explains it. This file can be imported without Triton, so that the chooser can
ask for its obstacles; the kernels are imported at the first call.

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
# schedulers, then the highest bound. Every warp reads the whole block of the other side from shared
# memory: for 16 rows that takes about as long as their products, for 32 rows half of it. At head
# size 128 the sums of 32 rows take 128 of a thread's 255 registers, so that blocks of the other
# side are short; dk and dv are two sums and have room for 16 rows. A second stage loads the next
# block while this one is multiplied; a third one where memory is left. float32: three TF32 products
# for each, with both parts of every operand in registers.
_BLOCKS = {
    ("attention_forward", 2, 128): Blocks(256, 32, 8, 3),
    ("attention_forward", 2, 64): Blocks(128, 64, 4, 3),
    ("attention_forward", 4, 128): Blocks(32, 32, 4, 1),
    ("attention_forward", 4, 64): Blocks(64, 32, 4, 2),
    ("attention_dkv", 2, 128): Blocks(64, 64, 4, 2),
    ("attention_dkv", 2, 64): Blocks(32, 128, 4, 3),
    ("attention_dkv", 4, 128): Blocks(32, 16, 4, 1),
    ("attention_dkv", 4, 64): Blocks(16, 64, 4, 1),
    ("attention_dq", 2, 128): Blocks(128, 32, 4, 2),
    ("attention_dq", 2, 64): Blocks(128, 32, 4, 3),
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
    """The shapes that differ on sm_90, where the tensor cores read shared memory themselves.

    Long blocks of the other side keep them busier there. For dk and dv 64 queries would spill
    inside the loops, and triton 3.6 needs more registers for each query than 3.9: with 3.9's shapes
    the cache limits head size 128 to 72 % of the peak, and head size 64 spills inside the loops.
    Elsewhere one shape serves both versions: what 3.6 spills, 8 bytes of dq on sm_80, it stores and
    loads once a program, outside the loops.
    """
    import triton  # pyright: ignore[reportMissingImports]

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    new = version >= (3, 7)
    return {
        ("attention_forward", 2, 128): Blocks(128, 64, 8, 3),
        ("attention_dkv", 2, 128): Blocks(32, 64, 4, 3) if new else Blocks(32, 128, 8, 2),
        ("attention_dkv", 2, 64): Blocks(32 if new else 16, 128, 4, 2),
        ("attention_dq", 2, 128): Blocks(128, 64, 8, 2),
        ("attention_dq", 2, 64): Blocks(128, 64, 4, 2),
    }


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
    kv_BSCNH = jnp.stack((k_BSNH, v_BSNH), axis=2)
    return _attend(q_BTNH, kv_BSCNH, None, segments_BT, segments_BS, query_offset)


def packed_attention(
    qkv_BTCNH: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """attention of the packed projection, whose queries and keys RoPE turns first.

    rope: cosines and sines [B or 1, T, H/2] in float32. No part of qkv_BTCNH is copied: queries and
    keys are turned in place, and the kernels write the gradients into one array like it.
    """
    return _attend(qkv_BTCNH, None, rope, segments_BT, segments_BT, 0)


def _attend(q, kv, rope, segments_BT, segments_BS, query_offset) -> jax.Array:
    """Either the packed projection as q and RoPE's tables, or q and packed keys and values."""
    if (size := max(math.prod(x.shape[1:]) for x in (q, kv) if x is not None)) >= MAX_ROW_ELEMENTS:
        raise ValueError(
            f"attention: {size} elements of a row are beyond the kernels' 32-bit offsets; "
            "split the sequence (mesh.context)"
        )
    # One offset for each row of the batch: vmap may give every replica its own. So with the tables.
    offset_B = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), q.shape[:1])
    if rope is not None:
        rope = [jnp.broadcast_to(table, (*q.shape[:2], table.shape[-1])) for table in rope]
    segments = None if segments_BT is None or segments_BS is None else (segments_BT, segments_BS)
    # What a kernel does not read still needs an array.
    cos, sin = rope or (offset_B, offset_B)
    others = (cos, sin, offset_B, *(segments or (offset_B, offset_B)))
    modes = (kv is None, segments is not None)
    return _attention(q, offset_B if kv is None else kv, others, modes, current_layout())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, kv, others, modes, layout):
    return _forward(q, kv, others, modes, layout)[0]


def _forward(q, kv, others, modes, layout):
    # The caller's layout: jax may trace the derivative's two halves after the caller has returned.
    with activate(layout):
        run = bridge.merge_vmapped(functools.partial(run_forward, *modes))
        out_BTNH, lse_BNT, turned = run(q, kv, *others)
    packed, _ = modes
    return out_BTNH, (turned if packed else q, kv, others, out_BTNH, lse_BNT)


def _backward(modes, layout, saved, dout_BTNH):
    q, kv, others, *results = saved
    with activate(layout):
        run = bridge.merge_vmapped(functools.partial(run_backward, *modes))
        gradients = run(q, kv, *others, *results, dout_BTNH)
    packed, _ = modes
    return *((*gradients, None) if packed else gradients), None


_attention.defvjp(_forward, _backward)


def run_forward(packed: bool, segmented: bool, *arrays: jax.Array) -> list[jax.Array]:
    """[out, lse, turned] of the forward kernel: packed, turned is what the backward kernels take.

    arrays: q, kv, cosines, sines, offset, segments of queries, of keys. packed: q is the whole
    projection, and kv is not read; else turned is not written.
    """
    from baichuan_jax.kernels.attention import triton_kernels as kernels

    q, *others = arrays
    # Here, where vmap has merged all rows that one call of the kernels serves.
    if packed and others[1].size >= MAX_ROW_ELEMENTS:
        raise ValueError(f"attention: {others[1].shape} cosines are beyond 32-bit offsets")
    if packed:
        q = _turn_keys(kernels.rope_kernel, q, *others[1:3])
    B, T, *_, N, H = q.shape
    out = jax.ShapeDtypeStruct((B, T, N, H), q.dtype)
    lse = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    turned = _like(q if packed else arrays[4])
    return _call(
        kernels.forward_kernel,
        *(packed, segmented, (q, *others), [out, lse, turned]),
        in_place=0 if packed else None,
    )


def run_backward(packed: bool, segmented: bool, *arrays: jax.Array) -> list[jax.Array]:
    """[dq, dkv], or [dqkv] where they are packed. arrays: as run_dq's."""
    # Two kernels and seven products, where one kernel would need five: it would have to add dq up
    # atomically, in an order that differs from run to run.
    delta, dq = run_dq(packed, segmented, *arrays)
    begun = dq if packed else arrays[4]
    *others, _, lse, dout = arrays
    (dkv,) = run_dkv(packed, segmented, *others, dout, lse, delta, begun)
    return [dkv] if packed else [dq, dkv]


def run_dq(packed: bool, segmented: bool, *arrays: jax.Array) -> list[jax.Array]:
    """[delta, dq]; packed, dq lies in an array like q, whose other parts are not written.

    arrays: run_forward's with the turned q, then out, lse, dout. delta is of the softmax's
    derivative (Dao 2023, section 2.2).
    """
    from baichuan_jax.kernels.attention import triton_kernels as kernels

    outputs = [_like(arrays[8]), _like(arrays[0])]
    return _call(kernels.dq_kernel, packed, segmented, arrays, outputs)


def run_dkv(packed: bool, segmented: bool, *arrays: jax.Array) -> list[jax.Array]:
    """[dkv]; packed, the array that run_dq began, with dk and dv in it.

    arrays: run_forward's with the turned q, then dout, lse, delta, and the begun array.
    """
    from baichuan_jax.kernels.attention import triton_kernels as kernels

    output = _like(arrays[-1] if packed else arrays[1])
    in_place = len(arrays) - 1 if packed else None
    return _call(kernels.dkv_kernel, packed, segmented, arrays, [output], in_place)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _turn_keys(kernel: Any, qkv_BTCNH: jax.Array, *tables: jax.Array) -> jax.Array:
    """The packed projection with RoPE on its keys."""
    B, T, _, N, H = qkv_BTCNH.shape
    # 16 KiB of keys a program, with one load of the tables for all of its heads.
    rows, heads = 8, min(8, 1 << (N - 1).bit_length())
    (turned,) = bridge.call(
        kernel,
        qkv_BTCNH,
        *tables,
        name="attention_rope",
        outputs=[_like(qkv_BTCNH)],
        grid=(-(-T // rows), -(-N // heads), B),
        num_warps=4,
        num_stages=1,
        in_place=0,
        T=T,
        N=N,
        H=H,
        ROWS=rows,
        HEADS=heads,
    )
    return turned


def _call(
    kernel: Any,
    packed: bool,
    segmented: bool,
    arrays: tuple[jax.Array, ...],
    outputs: list[jax.ShapeDtypeStruct],
    in_place: int | None = None,
) -> list[jax.Array]:
    """Run a kernel: a program for each head and block of queries (dkv: of keys)."""
    q, kv = arrays[:2]
    B, T, *_, N, H = q.shape
    S = T if packed else kv.shape[1]
    name = f"attention_{kernel.__name__.removesuffix('_kernel')}"
    blocks = choose_blocks(name, q.dtype, H, bridge.compute_capability())
    count = -(-S // blocks.k) if name == "attention_dkv" else -(-T // blocks.q)
    return bridge.call(
        kernel,
        *arrays,
        name=name,
        outputs=outputs,
        grid=(count, B * N),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        in_place=in_place,
        T=T,
        S=S,
        N=N,
        H=H,
        Q=blocks.q,
        K=blocks.k,
        SCALE=H**-0.5 * math.log2(math.e),  # the kernels' exponentials are base 2
        PRECISION="tf32x3" if q.dtype == jnp.float32 else "ieee",
        SEGMENTED=segmented,
        PACKED=packed,
    )
