"""FlashAttention-2 (Dao 2023) in the Triton language: the three kernels that triton.py calls.

In: the packed projection [B, T, 3, N, H] as the model has it, or queries [B, T, N, H] and packed
keys and values [B, S, 2, N, H]; and a query offset for each row of the batch. Out: the attention's
result and, for the backward pass, the log-sum-exp of every query.

Packed queries and keys are turned by RoPE in place: keys by rope_kernel, queries by forward_kernel
once it has loaded them. The backward kernels read both as they were turned, and turn the gradients
back before they store them, into one packed array.

A program owns one block of queries of one head (forward, dq) or one block of keys (dkv). It walks
over the blocks of the other side and keeps running sums in registers, so nothing is added
atomically and every run gives the same bits. The forward pass keeps a running maximum and a
running sum of exponentials and rescales the result when the maximum grows (online softmax). The
backward pass computes the weights again from the log-sum-exp instead of storing T x S of them.

Every kernel walks in two loops: over blocks that every query of the program sees whole, without a
mask, and over blocks that the diagonal crosses, with one. Blocks above the diagonal are skipped.

B batch, T queries, S keys, N heads, H head size, Q and K lengths of one block of queries and of
keys. tl.static_range unrolls while the kernel is compiled, so its index is a constant there.
"""

import triton
import triton.language as tl

# Each kernel is one function, longer than others in this package: it is compiled as a whole, and a
# part of it would take twenty arguments.


@triton.jit
def _heads(
    q_ptr,
    kv_ptr,
    row,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Pointers to the first query, key and value of one head of one row of the batch."""
    # The batch's row in 64 bits: a batch may have more than 2^31 elements.
    b, n = tl.cast(row // N, tl.int64), row % N
    if PACKED:
        q_ptr += b * (T * 3 * N * H) + n * H
        k_ptr = q_ptr + N * H
    else:
        q_ptr += b * (T * N * H) + n * H
        k_ptr = kv_ptr + b * (S * 2 * N * H) + n * H
    return q_ptr, k_ptr, k_ptr + N * H


@triton.jit
def _rows(
    pointer,
    first,
    count: tl.constexpr,
    limit: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load rows first .. first + count [count, WIDTH]; zeros at and past the limit.

    ROW: elements from one row to the next. EVEN: all of them lie before the limit, so that no load
    needs a mask.
    """
    # 32-bit offsets inside a row of the batch: 64-bit ones would take registers that then spill.
    # The caller of the kernels refuses rows of 2^31 elements.
    rows = tl.arange(0, count)
    pointers = pointer + ((first + rows)[:, None] * ROW + tl.arange(0, WIDTH)[None, :])
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
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store rows first .. first + count [count, WIDTH], those before the limit."""
    # A store comes once, outside the loops, where registers are free for 64-bit offsets.
    rows = tl.arange(0, count)
    start = pointer + tl.cast(first, tl.int64) * ROW
    pointers = start + rows[:, None] * ROW + tl.arange(0, WIDTH)[None, :]
    if limit % count == 0:
        tl.store(pointers, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointers, value.to(pointer.dtype.element_ty), mask=(first + rows)[:, None] < limit)


@triton.jit
def _tables(
    cos_ptr,
    sin_ptr,
    b,
    first,
    count: tl.constexpr,
    limit: tl.constexpr,
    HALF: tl.constexpr,
):
    """Cosines and sines of rows first .. first + count, each [count, HALF]."""
    EVEN: tl.constexpr = limit % count == 0
    # In 32 bits: a 64-bit b would be kept through the loops. The caller refuses larger tables.
    start = b * (limit * HALF)
    cos = _rows(cos_ptr + start, first, count, limit, HALF, HALF, EVEN)
    sin = _rows(sin_ptr + start, first, count, limit, HALF, HALF, EVEN)
    return cos, sin


@triton.jit
def _turn(first, second, cos, sin):
    """RoPE of channel pairs in float32, in the order of operations of reference.apply_rope."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_turned_back(
    pointer,
    gradient,
    cos_ptr,
    sin_ptr,
    b,
    first,
    count: tl.constexpr,
    limit: tl.constexpr,
    ROW: tl.constexpr,
    H: tl.constexpr,
):
    """Store a gradient [count, H] of turned rows as that of the rows before RoPE."""
    HALF: tl.constexpr = H // 2
    one, other = gradient.reshape(count, 2, HALF).permute(0, 2, 1).split()
    cos, sin = _tables(cos_ptr, sin_ptr, b, first, count, limit, HALF)
    one, other = _turn(one, other, cos, -sin)
    _store_rows(pointer, one, first, count, limit, ROW, HALF)
    _store_rows(pointer + HALF, other, first, count, limit, ROW, HALF)


@triton.jit
def _visible(
    queries, keys, offset, q_segment, k_segment, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr
):
    """Where a query sees a key. Queries and keys broadcast: one is a column, the other a row."""
    if CAUSAL and SEGMENTED:
        return (offset + queries >= keys) & (q_segment == k_segment)
    if CAUSAL:
        return offset + queries >= keys
    return q_segment == k_segment


@triton.jit
def rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    turned_ptr,
    T: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Turn the keys of the packed projection in place: ROWS of them, HEADS heads of each."""
    HALF: tl.constexpr = H // 2
    b = tl.cast(tl.program_id(2), tl.int64)
    first = tl.program_id(0) * ROWS
    rows, heads = first + tl.arange(0, ROWS), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cos, sin = _tables(cos_ptr, sin_ptr, b, first, ROWS, T, HALF)
    keys = qkv_ptr + b * (T * 3 * N * H) + N * H
    offsets = rows[:, None, None] * (3 * N * H) + heads[None, :, None] * H
    pointers = keys + offsets + tl.arange(0, HALF)[None, None, :]
    mask = (rows < T)[:, None, None] & (heads < N)[None, :, None]
    one, other = tl.load(pointers, mask=mask), tl.load(pointers + HALF, mask=mask)
    one, other = _turn(one, other, cos[:, None, :], sin[:, None, :])
    tl.store(pointers, one.to(qkv_ptr.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, other.to(qkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    q_ptr,
    kv_ptr,
    cos_ptr,
    sin_ptr,
    offset_ptr,
    q_segments,
    k_segments,
    out_ptr,
    lse_ptr,
    turned_ptr,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The result and the log-sum-exp (base 2) of one block of queries."""
    # The last queries see the most keys. They start first, so that short programs fill the end.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b, n = tl.cast(row // N, tl.int64), row % N
    Q_ROW: tl.constexpr = (3 if PACKED else 1) * N * H
    K_ROW: tl.constexpr = (3 if PACKED else 2) * N * H
    q_ptr, k_ptr, v_ptr = _heads(q_ptr, kv_ptr, row, T, S, N, H, PACKED)
    out_ptr += b * (T * N * H) + n * H
    k_segments += b * S
    offset = tl.load(offset_ptr + b)
    queries = i * Q + tl.arange(0, Q)
    q_segment = queries
    if SEGMENTED:
        q_segment = tl.load(q_segments + b * T + queries, mask=queries < T, other=0)
    # The block of queries stays in registers or shared memory for the whole program.
    if PACKED:
        HALF: tl.constexpr = H // 2
        first = _rows(q_ptr, i * Q, Q, T, Q_ROW, HALF, T % Q == 0)
        second = _rows(q_ptr + HALF, i * Q, Q, T, Q_ROW, HALF, T % Q == 0)
        cos, sin = _tables(cos_ptr, sin_ptr, row // N, i * Q, Q, T, HALF)
        one, other = _turn(first, second, cos, sin)
        one, other = one.to(first.dtype), other.to(first.dtype)
        # In place, for the backward pass: no other program reads these queries.
        _store_rows(q_ptr, one, i * Q, Q, T, Q_ROW, HALF)
        _store_rows(q_ptr + HALF, other, i * Q, Q, T, Q_ROW, HALF)
        q = tl.join(one, other).permute(0, 2, 1).reshape(Q, H)
    else:
        q = _rows(q_ptr, i * Q, Q, T, Q_ROW, H, T % Q == 0)
    # Of the online softmax: the result so far, the maximum in base 2, and the sum of exponentials.
    acc = tl.zeros((Q, H), tl.float32)
    top = tl.full((Q,), float("-inf"), tl.float32)
    total = tl.zeros((Q,), tl.float32)
    # Blocks of keys that every query of this block sees whole, and those that any of them sees.
    whole = (offset + i * Q + 1) // K
    seen = tl.minimum(tl.cdiv(offset + (i + 1) * Q, K), tl.cdiv(S, K))
    whole = tl.minimum(whole, seen)
    for crossing in tl.static_range(2):
        for j in tl.range(whole if crossing else 0, seen if crossing else whole):
            # Blocks that are seen whole lie within the keys, so only the others need a limit.
            k = _rows(k_ptr, j * K, K, S, K_ROW, H, S % K == 0 or not crossing)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if crossing or SEGMENTED:
                keys = j * K + tl.arange(0, K)
                k_segment = keys
                if SEGMENTED:
                    k_segment = tl.load(k_segments + keys, mask=keys < S, other=0)
                visible = _visible(
                    queries[:, None],
                    keys[None, :],
                    offset,
                    q_segment[:, None],
                    k_segment[None, :],
                    crossing,
                    SEGMENTED,
                )
                s = tl.where(visible, s, float("-inf"))
            # SCALE holds log2(e), so that exponentials are base 2: a GPU computes exp2 in hardware
            # and exp as exp2 of a product. The scale is applied after the maximum, one product a
            # query instead of one a score; both then are one fused multiply-add.
            new_top = tl.maximum(top, tl.max(s, 1) * SCALE)
            base = new_top
            # With segments a query may not have seen a key yet: -inf - -inf would be NaN. Without
            # them every query sees the first key.
            if SEGMENTED:
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.math.exp2(s * SCALE - base[:, None])
            shrink = tl.math.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            v = _rows(v_ptr, j * K, K, S, K_ROW, H, S % K == 0 or not crossing)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
    # A query that sees no key gives 0, and not 0 / 0.
    if SEGMENTED:
        total = tl.where(total == 0.0, 1.0, total)
    _store_rows(out_ptr, acc / total[:, None], i * Q, Q, T, N * H, H)
    lse_ptr += tl.cast(row, tl.int64) * T
    tl.store(lse_ptr + queries, top + tl.math.log2(total), mask=queries < T)


@triton.jit
def dkv_kernel(
    q_ptr,
    kv_ptr,
    cos_ptr,
    sin_ptr,
    offset_ptr,
    q_segments,
    k_segments,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    begun_ptr,
    dkv_ptr,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The gradients of one block of keys and values.

    delta is the sum of out * dout over the head, which the softmax's derivative subtracts from
    every product of dout and v. Scores are held transposed, [K, Q], so that the weights are at once
    the left operand of the products that make dv and dk.
    """
    # Most queries see the first keys, so that the longest programs start first here too.
    j = tl.program_id(0)
    row = tl.program_id(1)
    b, n = tl.cast(row // N, tl.int64), row % N
    Q_ROW: tl.constexpr = (3 if PACKED else 1) * N * H
    K_ROW: tl.constexpr = (3 if PACKED else 2) * N * H
    q_ptr, k_ptr, v_ptr = _heads(q_ptr, kv_ptr, row, T, S, N, H, PACKED)
    dout_ptr += b * (T * N * H) + n * H
    lse_ptr += tl.cast(row, tl.int64) * T
    delta_ptr += tl.cast(row, tl.int64) * T
    q_segments += b * T
    offset = tl.load(offset_ptr + b)
    keys = j * K + tl.arange(0, K)
    k_segment = keys
    if SEGMENTED:
        k_segment = tl.load(k_segments + b * S + keys, mask=keys < S, other=0)
    # Keys past the end are zeros: their gradients are not stored, and no query sees them.
    k = _rows(k_ptr, j * K, K, S, K_ROW, H, S % K == 0)
    v = _rows(v_ptr, j * K, K, S, K_ROW, H, S % K == 0)
    dk = tl.zeros((K, H), tl.float32)
    dv = tl.zeros((K, H), tl.float32)
    last = tl.cdiv(T, Q)
    # The first block with a query that sees one of these keys, and the first whose queries all see
    # all of them. Here the blocks that the diagonal crosses come first.
    some = tl.minimum(tl.maximum(j * K - offset, 0) // Q, last)
    whole = tl.minimum(tl.cdiv(tl.maximum((j + 1) * K - 1 - offset, 0), Q), last)
    for below in tl.static_range(2):
        for i in tl.range(whole if below else some, last if below else whole):
            queries = i * Q + tl.arange(0, Q)
            q = _rows(q_ptr, i * Q, Q, T, Q_ROW, H, T % Q == 0)
            if T % Q == 0:
                lse = tl.load(lse_ptr + queries)
                delta = tl.load(delta_ptr + queries)
            else:
                # Past the last query an infinite log-sum-exp makes every weight 0.
                lse = tl.load(lse_ptr + queries, mask=queries < T, other=float("inf"))
                delta = tl.load(delta_ptr + queries, mask=queries < T, other=0.0)
            # A weight is exp2 of a score less its query's log-sum-exp: no maximum is needed.
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            s = s * SCALE - lse[None, :]
            dout = _rows(dout_ptr, i * Q, Q, T, N * H, H, T % Q == 0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            if not below or SEGMENTED:
                q_segment = queries
                if SEGMENTED:
                    q_segment = tl.load(q_segments + queries, mask=queries < T, other=0)
                visible = _visible(
                    queries[None, :],
                    keys[:, None],
                    offset,
                    q_segment[None, :],
                    k_segment[:, None],
                    not below,
                    SEGMENTED,
                )
                s = tl.where(visible, s, float("-inf"))
            # Weights and their gradients are rounded to the inputs' type, as tensor cores take
            # them; sums stay float32.
            p = tl.math.exp2(s)
            ds = p * (dp - delta[None, :])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    # The scores' scale, once for all queries; without log2(e), which exp2 takes back.
    # Packed, they are written beside dq, in place.
    if PACKED:
        dkv_ptr = begun_ptr
    _, dk_ptr, dv_ptr = _heads(dkv_ptr, dkv_ptr, row, T, S, N, H, PACKED)
    # dv first: its registers are free when dk is turned back.
    _store_rows(dv_ptr, dv, j * K, K, S, K_ROW, H)
    dk *= H**-0.5
    if PACKED:
        _store_turned_back(dk_ptr, dk, cos_ptr, sin_ptr, row // N, j * K, K, S, K_ROW, H)
    else:
        _store_rows(dk_ptr, dk, j * K, K, S, K_ROW, H)


@triton.jit
def dq_kernel(
    q_ptr,
    kv_ptr,
    cos_ptr,
    sin_ptr,
    offset_ptr,
    q_segments,
    k_segments,
    out_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dq_ptr,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The gradient of one block of queries; delta as in dkv_kernel."""
    # The longest programs first, as in forward_kernel.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b, n = tl.cast(row // N, tl.int64), row % N
    Q_ROW: tl.constexpr = (3 if PACKED else 1) * N * H
    K_ROW: tl.constexpr = (3 if PACKED else 2) * N * H
    q_ptr, k_ptr, v_ptr = _heads(q_ptr, kv_ptr, row, T, S, N, H, PACKED)
    out_ptr += b * (T * N * H) + n * H
    dout_ptr += b * (T * N * H) + n * H
    lse_ptr += tl.cast(row, tl.int64) * T
    delta_ptr += tl.cast(row, tl.int64) * T
    k_segments += b * S
    offset = tl.load(offset_ptr + b)
    queries = i * Q + tl.arange(0, Q)
    q_segment = queries
    if SEGMENTED:
        q_segment = tl.load(q_segments + b * T + queries, mask=queries < T, other=0)
    q = _rows(q_ptr, i * Q, Q, T, Q_ROW, H, T % Q == 0)
    dout = _rows(dout_ptr, i * Q, Q, T, N * H, H, T % Q == 0)
    lse = tl.load(lse_ptr + queries, mask=queries < T, other=float("inf"))
    out = _rows(out_ptr, i * Q, Q, T, N * H, H, T % Q == 0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + queries, delta, mask=queries < T)
    dq = tl.zeros((Q, H), tl.float32)
    seen = tl.minimum(tl.cdiv(offset + (i + 1) * Q, K), tl.cdiv(S, K))
    whole = tl.minimum((offset + i * Q + 1) // K, seen)
    for crossing in tl.static_range(2):
        for j in tl.range(whole if crossing else 0, seen if crossing else whole):
            k = _rows(k_ptr, j * K, K, S, K_ROW, H, S % K == 0 or not crossing)
            v = _rows(v_ptr, j * K, K, S, K_ROW, H, S % K == 0 or not crossing)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = s * SCALE - lse[:, None]
            if crossing or SEGMENTED:
                keys = j * K + tl.arange(0, K)
                k_segment = keys
                if SEGMENTED:
                    k_segment = tl.load(k_segments + keys, mask=keys < S, other=0)
                visible = _visible(
                    queries[:, None],
                    keys[None, :],
                    offset,
                    q_segment[:, None],
                    k_segment[None, :],
                    crossing,
                    SEGMENTED,
                )
                s = tl.where(visible, s, float("-inf"))
            p = tl.math.exp2(s)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq *= H**-0.5
    dq_ptr, _, _ = _heads(dq_ptr, kv_ptr, row, T, S, N, H, PACKED)
    if PACKED:
        _store_turned_back(dq_ptr, dq, cos_ptr, sin_ptr, row // N, i * Q, Q, T, Q_ROW, H)
    else:
        _store_rows(dq_ptr, dq, i * Q, Q, T, Q_ROW, H)
