"""RMSNorm (Zhang and Sennrich 2019) in the Triton language: the two kernels that triton.py calls.

A program holds ROWS whole rows in registers, so that the mean of squares needs no second read.
Forward: add the residual, normalise, multiply by the weight. Backward: compute the statistics again
from the rows, which it reads anyway, and give

    dx = scale * (dy * weight - normal * mean(dy * weight * normal)),  normal = x * scale

and the sum of dy * normal over the program's rows, a part of the weight's gradient.

R rows of a group, D width, WIDTH the power of two above it.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """y of ROWS rows, and total = x + residual where there is a residual."""
    # Rows past the last and columns past the width are masked: loads give 0, stores do nothing.
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (rows < R)[:, None] & (columns < D)[None, :]
    place = (tl.cast(group, tl.int64) * R + rows)[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        # Rounded, as it would be between two operators: the backward pass reads the rounded sum.
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + group * D + columns, mask=columns < D, other=0.0)
    weight = weight.to(tl.float32)
    # Divided by the true width: the masked zeros add nothing to the sum.
    scale = tl.math.rsqrt(tl.sum(x * x, 1) / D + EPS)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x_ptr,
    weight_ptr,
    dy_ptr,
    dtotal_ptr,
    dx_ptr,
    dweight_ptr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILES: tl.constexpr,
):
    """dx of TILES x ROWS rows, and their part of the weight's gradient."""
    group = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + group * D + columns, mask=columns < D, other=0.0)
    weight = weight.to(tl.float32)
    # Summed over the rows only after the loop: until then every row of a tile has its own sum.
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (rows < R)[:, None] & (columns < D)[None, :]
        place = (tl.cast(group, tl.int64) * R + rows)[:, None] * D + columns[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.math.rsqrt(tl.sum(x * x, 1) / D + EPS)
        normal = x * scale[:, None]
        scaled = dy * weight[None, :]
        dx = (scaled - normal * (tl.sum(scaled * normal, 1) / D)[:, None]) * scale[:, None]
        # x + residual was a second result of the forward pass; its gradient is added here.
        if RESIDUAL:
            dx += tl.load(dtotal_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * normal
    # Each program stores its own part: an atomic sum would depend on the order of the programs.
    program = tl.cast(group, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dweight_ptr + program * D + columns, tl.sum(dweight, 0), mask=columns < D)
