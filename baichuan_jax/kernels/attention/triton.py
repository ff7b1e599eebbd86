"""Causal attention for GPUs in the Triton language: FlashAttention-2 (Dao 2023), forward and backward, arrays as the model has them.

A program owns a block of queries (forward, and backward for dq) or of keys (backward for dk and
dv), and walks over the other side's blocks, so that nothing is added atomically and every run gives
the same bits. Blocks above the diagonal are skipped; those that the diagonal crosses are masked, in
a loop of their own. Kept for the backward pass: the log-sum-exp, in base 2 like the exponentials,
since exp2 is what the machine has.

B batch, T queries, S keys, N heads, H head size, Q and K lengths of one block of queries and of
keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.sharding import activate, current_layout


class Blocks(NamedTuple):
    """Lengths of the blocks of queries and keys, warps of a program, stages of its loads' pipeline."""

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
# What is otherwise on sm_90. dk and dv there: 64 queries would spill inside the loops. triton 3.6
# spends more on each query than 3.9: with 3.9's shape the cache limits that kernel to 72 % of the
# peak, with 128 keys and 8 warps the tensor cores to 97 %. Elsewhere one shape serves both
# versions: what 3.6 spills, 12 to 32 bytes in three kernels, it stores and loads once a program,
# outside the loops.
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_BLOCKS_90 = {
    ("attention_dkv", 2, 128): Blocks(32, 64, 4, 3) if _TRITON >= (3, 7) else Blocks(32, 128, 8, 2)
}


def choose_blocks(kernel: str, dtype: Any, head_dim: int, capability: int) -> Blocks:
    """The shape of one kernel's programs: attention_forward, attention_dkv or attention_dq.

    dtype: of q, k, v. head_dim: 64 or 128. capability: that the kernel is compiled for, such as 80.
    Called while the kernel's caller is traced, by this name, so that a benchmark can put another
    function in its place.
    """
    case = (kernel, jnp.dtype(dtype).itemsize, head_dim)
    return _BLOCKS_90.get(case, _BLOCKS[case]) if capability >= 90 else _BLOCKS[case]


@triton.jit
def _rows(
    pointer,
    first,
    count: tl.constexpr,
    limit: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows first .. first + count of one head [count, H]; zeros past the limit."""
    rows = tl.arange(0, count)
    pointers = pointer + ((first + rows)[:, None] * (N * H) + tl.arange(0, H)[None, :])
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(first + rows)[:, None] < limit, other=0.0)


@triton.jit
def _store_rows(
    pointer,
    value,
    first,
    count: tl.constexpr,
    limit: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
):
    rows = tl.arange(0, count)
    pointers = (
        pointer
        + tl.cast(first, tl.int64) * (N * H)
        + rows[:, None] * (N * H)
        + tl.arange(0, H)[None, :]
    )
    if limit % count == 0:
        tl.store(pointers, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointers, value.to(pointer.dtype.element_ty), mask=(first + rows)[:, None] < limit)


@triton.jit
def _visible(
    queries, keys, offset, q_segment, k_segment, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr
):
    """Where a query sees a key; queries and keys are rows and columns in either order, broadcast against each other."""
    if CAUSAL and SEGMENTED:
        return (offset + queries >= keys) & (q_segment == k_segment)
    if CAUSAL:
        return offset + queries >= keys
    return q_segment == k_segment


@triton.jit
def _forward_loop(
    acc,
    top,
    total,
    q,
    queries,
    q_segment,
    offset,
    k_pointer,
    v_pointer,
    k_segments,
    lo,
    hi,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Key blocks lo .. hi of one block of queries."""
    EVEN: tl.constexpr = (
        S % K == 0 or not CAUSAL
    )  # the blocks left of the diagonal lie within the keys
    for j in tl.range(lo, hi):
        k = _rows(k_pointer, j * K, K, S, N, H, EVEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAUSAL or SEGMENTED:
            keys = j * K + tl.arange(0, K)
            k_segment = keys
            if SEGMENTED:
                k_segment = tl.load(k_segments + keys, mask=keys < S, other=0)
            seen = _visible(
                queries[:, None],
                keys[None, :],
                offset,
                q_segment[:, None],
                k_segment[None, :],
                CAUSAL,
                SEGMENTED,
            )
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * SCALE)
        base = new_top
        if SEGMENTED:  # a query may have seen nothing yet; without segments it sees the first key
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2(s * SCALE - base[:, None])
        shrink = tl.math.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        v = _rows(v_pointer, j * K, K, S, N, H, EVEN)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _forward_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    offset_pointer,
    q_segments,
    k_segments,
    out_pointer,
    lse_pointer,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    i = (
        tl.num_programs(0) - 1 - tl.program_id(0)
    )  # the longest rows first, so that the short ones fill the last wave
    row = tl.program_id(1)
    b, n = tl.cast(row // N, tl.int64), row % N
    q_pointer += b * (T * N * H) + n * H
    out_pointer += b * (T * N * H) + n * H
    k_pointer += b * (S * N * H) + n * H
    v_pointer += b * (S * N * H) + n * H
    k_segments += b * S
    offset = tl.load(offset_pointer + b)
    queries = i * Q + tl.arange(0, Q)
    q_segment = queries
    if SEGMENTED:
        q_segment = tl.load(q_segments + b * T + queries, mask=queries < T, other=0)
    q = _rows(q_pointer, i * Q, Q, T, N, H, T % Q == 0)
    acc = tl.zeros((Q, H), tl.float32)
    top = tl.full((Q,), float("-inf"), tl.float32)
    total = tl.zeros((Q,), tl.float32)
    full = (offset + i * Q + 1) // K  # key blocks that every query of this block sees whole
    some = tl.minimum(tl.cdiv(offset + (i + 1) * Q, K), tl.cdiv(S, K))
    full = tl.minimum(full, some)
    acc, top, total = _forward_loop(
        acc,
        top,
        total,
        q,
        queries,
        q_segment,
        offset,
        k_pointer,
        v_pointer,
        k_segments,
        0,
        full,
        S,
        N,
        H,
        K,
        SCALE,
        PRECISION,
        False,
        SEGMENTED,
    )
    acc, top, total = _forward_loop(
        acc,
        top,
        total,
        q,
        queries,
        q_segment,
        offset,
        k_pointer,
        v_pointer,
        k_segments,
        full,
        some,
        S,
        N,
        H,
        K,
        SCALE,
        PRECISION,
        True,
        SEGMENTED,
    )
    if SEGMENTED:
        total = tl.where(total == 0.0, 1.0, total)  # a query that sees nothing gives 0
    _store_rows(out_pointer, acc / total[:, None], i * Q, Q, T, N, H)
    tl.store(
        lse_pointer + tl.cast(row, tl.int64) * T + queries,
        top + tl.math.log2(total),
        mask=queries < T,
    )


@triton.jit
def _dkv_loop(
    dk,
    dv,
    k,
    v,
    keys,
    k_segment,
    offset,
    q_pointer,
    dout_pointer,
    lse_pointer,
    delta_pointer,
    q_segments,
    lo,
    hi,
    T: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Query blocks lo .. hi of one block of keys. Products are transposed, [K, Q], so that they are what the next ones multiply."""
    EVEN: tl.constexpr = T % Q == 0
    for i in tl.range(lo, hi):
        queries = i * Q + tl.arange(0, Q)
        q = _rows(q_pointer, i * Q, Q, T, N, H, EVEN)
        if EVEN:
            lse = tl.load(lse_pointer + queries)
            delta = tl.load(delta_pointer + queries)
        else:
            lse = tl.load(
                lse_pointer + queries, mask=queries < T, other=float("inf")
            )  # weights of 0
            delta = tl.load(delta_pointer + queries, mask=queries < T, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s = s * SCALE - lse[None, :]
        dout = _rows(dout_pointer, i * Q, Q, T, N, H, EVEN)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if CAUSAL or SEGMENTED:
            q_segment = queries
            if SEGMENTED:
                q_segment = tl.load(q_segments + queries, mask=queries < T, other=0)
            seen = _visible(
                queries[None, :],
                keys[:, None],
                offset,
                q_segment[None, :],
                k_segment[:, None],
                CAUSAL,
                SEGMENTED,
            )
            s = tl.where(seen, s, float("-inf"))
        p = tl.math.exp2(s)
        ds = p * (dp - delta[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    offset_pointer,
    q_segments,
    k_segments,
    dout_pointer,
    lse_pointer,
    delta_pointer,
    dk_pointer,
    dv_pointer,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    j = tl.program_id(0)  # the first keys are seen by most queries
    row = tl.program_id(1)
    b, n = tl.cast(row // N, tl.int64), row % N
    q_pointer += b * (T * N * H) + n * H
    dout_pointer += b * (T * N * H) + n * H
    k_pointer += b * (S * N * H) + n * H
    v_pointer += b * (S * N * H) + n * H
    dk_pointer += b * (S * N * H) + n * H
    dv_pointer += b * (S * N * H) + n * H
    lse_pointer += tl.cast(row, tl.int64) * T
    delta_pointer += tl.cast(row, tl.int64) * T
    q_segments += b * T
    offset = tl.load(offset_pointer + b)
    keys = j * K + tl.arange(0, K)
    k_segment = keys
    if SEGMENTED:
        k_segment = tl.load(k_segments + b * S + keys, mask=keys < S, other=0)
    k = _rows(k_pointer, j * K, K, S, N, H, S % K == 0)
    v = _rows(v_pointer, j * K, K, S, N, H, S % K == 0)
    dk = tl.zeros((K, H), tl.float32)
    dv = tl.zeros((K, H), tl.float32)
    last = tl.cdiv(T, Q)
    some = tl.minimum(
        tl.maximum(j * K - offset, 0) // Q, last
    )  # the first block with a query that sees one of these keys
    full = tl.minimum(
        tl.cdiv(tl.maximum((j + 1) * K - 1 - offset, 0), Q), last
    )  # from here on queries see all of them
    dk, dv = _dkv_loop(
        dk,
        dv,
        k,
        v,
        keys,
        k_segment,
        offset,
        q_pointer,
        dout_pointer,
        lse_pointer,
        delta_pointer,
        q_segments,
        some,
        full,
        T,
        N,
        H,
        Q,
        SCALE,
        PRECISION,
        True,
        SEGMENTED,
    )
    dk, dv = _dkv_loop(
        dk,
        dv,
        k,
        v,
        keys,
        k_segment,
        offset,
        q_pointer,
        dout_pointer,
        lse_pointer,
        delta_pointer,
        q_segments,
        full,
        last,
        T,
        N,
        H,
        Q,
        SCALE,
        PRECISION,
        False,
        SEGMENTED,
    )
    _store_rows(dk_pointer, dk * (H**-0.5), j * K, K, S, N, H)
    _store_rows(dv_pointer, dv, j * K, K, S, N, H)


@triton.jit
def _dq_loop(
    dq,
    q,
    dout,
    lse,
    delta,
    queries,
    q_segment,
    offset,
    k_pointer,
    v_pointer,
    k_segments,
    lo,
    hi,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Key blocks lo .. hi of one block of queries."""
    EVEN: tl.constexpr = S % K == 0 or not CAUSAL
    for j in tl.range(lo, hi):
        k = _rows(k_pointer, j * K, K, S, N, H, EVEN)
        v = _rows(v_pointer, j * K, K, S, N, H, EVEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = s * SCALE - lse[:, None]
        if CAUSAL or SEGMENTED:
            keys = j * K + tl.arange(0, K)
            k_segment = keys
            if SEGMENTED:
                k_segment = tl.load(k_segments + keys, mask=keys < S, other=0)
            seen = _visible(
                queries[:, None],
                keys[None, :],
                offset,
                q_segment[:, None],
                k_segment[None, :],
                CAUSAL,
                SEGMENTED,
            )
            s = tl.where(seen, s, float("-inf"))
        p = tl.math.exp2(s)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    offset_pointer,
    q_segments,
    k_segments,
    dout_pointer,
    lse_pointer,
    delta_pointer,
    dq_pointer,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b, n = tl.cast(row // N, tl.int64), row % N
    q_pointer += b * (T * N * H) + n * H
    dout_pointer += b * (T * N * H) + n * H
    dq_pointer += b * (T * N * H) + n * H
    k_pointer += b * (S * N * H) + n * H
    v_pointer += b * (S * N * H) + n * H
    k_segments += b * S
    offset = tl.load(offset_pointer + b)
    queries = i * Q + tl.arange(0, Q)
    q_segment = queries
    if SEGMENTED:
        q_segment = tl.load(q_segments + b * T + queries, mask=queries < T, other=0)
    q = _rows(q_pointer, i * Q, Q, T, N, H, T % Q == 0)
    dout = _rows(dout_pointer, i * Q, Q, T, N, H, T % Q == 0)
    lse = tl.load(
        lse_pointer + tl.cast(row, tl.int64) * T + queries, mask=queries < T, other=float("inf")
    )
    delta = tl.load(
        delta_pointer + tl.cast(row, tl.int64) * T + queries, mask=queries < T, other=0.0
    )
    dq = tl.zeros((Q, H), tl.float32)
    some = tl.minimum(tl.cdiv(offset + (i + 1) * Q, K), tl.cdiv(S, K))
    full = tl.minimum((offset + i * Q + 1) // K, some)
    dq = _dq_loop(
        dq,
        q,
        dout,
        lse,
        delta,
        queries,
        q_segment,
        offset,
        k_pointer,
        v_pointer,
        k_segments,
        0,
        full,
        S,
        N,
        H,
        K,
        SCALE,
        PRECISION,
        False,
        SEGMENTED,
    )
    dq = _dq_loop(
        dq,
        q,
        dout,
        lse,
        delta,
        queries,
        q_segment,
        offset,
        k_pointer,
        v_pointer,
        k_segments,
        full,
        some,
        S,
        N,
        H,
        K,
        SCALE,
        PRECISION,
        True,
        SEGMENTED,
    )
    _store_rows(dq_pointer, dq * (H**-0.5), i * Q, Q, T, N, H)


def attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention; query t stands at position query_offset + t of the keys. Attends within equal segments only.

    Head sizes 64 and 128; float32 (products as three TF32 ones, about float32's precision),
    float16, bfloat16; any length below 2^31 elements a row of the batch. A query that sees no key
    gives 0. The same bits every time.
    """
    B, _, N, H = q_BTNH.shape
    if (size := max(q_BTNH.shape[1], k_BSNH.shape[1]) * N * H) >= 2**31:
        raise ValueError(
            f"attention: {size} elements of a row are beyond the kernels' 32-bit offsets; cut the sequence (mesh.context)"
        )
    offset_B = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (B,))
    segments = None if segments_BT is None or segments_BS is None else (segments_BT, segments_BS)
    return _attention(q_BTNH, k_BSNH, v_BSNH, offset_B, segments, current_layout())


def _call(
    kernel: Any, name: str, *arrays: jax.Array, outputs: list[jax.ShapeDtypeStruct], segmented: bool
) -> list[jax.Array]:
    """One of the kernels, with a program for each block of queries, or of keys (dkv), of each head; arrays begin with q, k."""
    q_BTNH, k_BSNH = arrays[:2]
    B, T, N, H = q_BTNH.shape
    S = k_BSNH.shape[1]
    blocks = choose_blocks(name, q_BTNH.dtype, H, bridge.compute_capability())
    rows = triton.cdiv(S, blocks.k) if name == "attention_dkv" else triton.cdiv(T, blocks.q)
    return bridge.call(
        kernel,
        *arrays,
        name=name,
        outputs=outputs,
        grid=(rows, B * N),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        T=T,
        S=S,
        N=N,
        H=H,
        Q=blocks.q,
        K=blocks.k,
        SCALE=H**-0.5 * 1.4426950408889634,
        PRECISION="tf32x3" if q_BTNH.dtype == jnp.float32 else "ieee",
        SEGMENTED=segmented,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, offset, segments, layout):
    return _forward(q, k, v, offset, segments, layout)[0]


def _forward(q_BTNH, k_BSNH, v_BSNH, offset_B, segments, layout):
    arrays = (q_BTNH, k_BSNH, v_BSNH, offset_B, *(segments or (offset_B, offset_B)))
    with activate(
        layout
    ):  # the caller's: jax may trace the derivative's two halves after the caller has returned
        out_BTNH, lse_BNT = bridge.merge_vmapped(
            functools.partial(_run_forward, segments is not None)
        )(*arrays)
    return out_BTNH, (q_BTNH, k_BSNH, v_BSNH, offset_B, segments, out_BTNH, lse_BNT)


def _run_forward(segmented, *arrays):
    q_BTNH = arrays[0]
    B, T, N, _ = q_BTNH.shape
    outputs = [
        jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ]
    return _call(
        _forward_kernel, "attention_forward", *arrays, outputs=outputs, segmented=segmented
    )


def _backward(layout, saved, dout_BTNH):
    q_BTNH, k_BSNH, v_BSNH, offset_B, segments, out_BTNH, lse_BNT = saved
    delta_BNT = jnp.swapaxes(
        jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1), 1, 2
    )
    arrays = (
        q_BTNH,
        k_BSNH,
        v_BSNH,
        offset_B,
        *(segments or (offset_B, offset_B)),
        dout_BTNH,
        lse_BNT,
        delta_BNT,
    )
    with activate(layout):
        dq_BTNH, dk_BSNH, dv_BSNH = bridge.merge_vmapped(
            functools.partial(_run_backward, segments is not None)
        )(*arrays)
    return dq_BTNH, dk_BSNH, dv_BSNH, None, None


def _run_backward(segmented, *arrays):
    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:2])
    dk_dv = _call(
        _dkv_kernel, "attention_dkv", *arrays, outputs=[like_k, like_k], segmented=segmented
    )
    dq = _call(_dq_kernel, "attention_dq", *arrays, outputs=[like_q], segmented=segmented)
    return [*dq, *dk_dv]


_attention.defvjp(_forward, _backward)
