"""RMSNorm with the residual addition fused, for GPUs in the Triton language: one pass over memory forward, one backward.

A program holds whole rows in registers, so every array is read or written once, which is all there
is to win: the operator is bound by memory. The statistics are computed again in the backward pass,
from rows that it needs anyway. The weight's gradient is reduced in two stages: every program adds
up its rows, and the caller adds up the programs.

G groups (the dimension of a vmap, else 1), R rows, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from baichuan_jax.kernels import triton_bridge as bridge

MAX_WIDTH = 8192  # a row lies in the registers of one program; beyond, the backward pass spills
ELEMENTS = 4096  # of one array that a program holds at once: 16 a thread of 8 warps, so that the backward pass spills nothing


@triton.jit
def _forward_kernel(
    x_pointer,
    residual_pointer,
    weight_pointer,
    y_pointer,
    total_pointer,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (rows < R)[:, None] & (columns < D)[None, :]
    place = (tl.cast(group, tl.int64) * R + rows)[:, None] * D + columns[None, :]
    x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_pointer + place, mask=mask, other=0.0).to(tl.float32)
        total = x.to(
            total_pointer.dtype.element_ty
        )  # rounded, as it would be between two operators
        tl.store(total_pointer + place, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_pointer + group * D + columns, mask=columns < D, other=0.0).to(
        tl.float32
    )
    scale = tl.math.rsqrt(tl.sum(x * x, 1) / D + EPS)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_pointer + place, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_pointer,
    weight_pointer,
    dy_pointer,
    dtotal_pointer,
    dx_pointer,
    dweight_pointer,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILES: tl.constexpr,
):
    group = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    weight = tl.load(weight_pointer + group * D + columns, mask=columns < D, other=0.0).to(
        tl.float32
    )
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (rows < R)[:, None] & (columns < D)[None, :]
        place = (tl.cast(group, tl.int64) * R + rows)[:, None] * D + columns[None, :]
        x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_pointer + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.math.rsqrt(tl.sum(x * x, 1) / D + EPS)
        normal = x * scale[:, None]
        scaled = dy * weight[None, :]
        dx = (scaled - normal * (tl.sum(scaled * normal, 1) / D)[:, None]) * scale[:, None]
        if RESIDUAL:
            dx += tl.load(dtotal_pointer + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_pointer + place, dx.to(dx_pointer.dtype.element_ty), mask=mask)
        dweight += dy * normal
    program = tl.cast(group, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dweight_pointer + program * D + columns, tl.sum(dweight, 0), mask=columns < D)


def _constants(D: int, R: int, eps: float, residual: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    if D > MAX_WIDTH:
        raise ValueError(f"Triton RMSNorm of rows of {D}: it takes up to {MAX_WIDTH}")
    width = triton.next_power_of_2(D)
    rows = max(1, ELEMENTS // width)
    return {
        "R": R,
        "D": D,
        "ROWS": rows,
        "WIDTH": width,
        "EPS": eps,
        "RESIDUAL": residual,
        "num_warps": 8,
        "num_stages": 1,
    }


def forward(
    weight_D: jax.Array, x: jax.Array, residual: jax.Array | None = None, *, eps: float
) -> list[jax.Array]:
    """RMSNorm of x [..., D]: [y]; or of x + residual: [y, x + residual]. In x's dtype, float32 inside. ValueError: D > MAX_WIDTH."""
    D = x.shape[-1]

    def run(weight_GD: jax.Array, x_GRD: jax.Array, *residual_GRD: jax.Array) -> list[jax.Array]:
        G, R, _ = x_GRD.shape
        constants = _constants(D, R, eps, bool(residual_GRD))
        like = jax.ShapeDtypeStruct(x_GRD.shape, x_GRD.dtype)
        unused = jax.ShapeDtypeStruct((G, 1), x_GRD.dtype)
        outputs = bridge.call(
            _forward_kernel,
            x_GRD,
            *(residual_GRD or (x_GRD,)),
            weight_GD,
            outputs=[like, like if residual_GRD else unused],
            grid=(triton.cdiv(R, constants["ROWS"]), G),
            name="rms_norm_forward",
            **constants,
        )
        return outputs[: 1 + len(residual_GRD)]

    rows = [a.reshape(1, -1, D) for a in (x, residual) if a is not None]
    return [a.reshape(x.shape) for a in bridge.merge_vmapped(run)(weight_D[None], *rows)]


def backward(
    weight_D: jax.Array,
    total: jax.Array,
    dy: jax.Array,
    dtotal: jax.Array | None = None,
    *,
    eps: float,
) -> list[jax.Array]:
    """Gradients of forward: [dx, parts_PD]. dx is the residual's too; the weight's is the sum of parts_PD (float32) over P.

    total: the array that was normalised. dtotal: the gradient of forward's second result, where it
    had one.
    """
    D = total.shape[-1]

    def run(
        weight_GD: jax.Array, x_GRD: jax.Array, dy_GRD: jax.Array, *dtotal_GRD: jax.Array
    ) -> list[jax.Array]:
        G, R, _ = x_GRD.shape
        constants = _constants(D, R, eps, bool(dtotal_GRD))
        # 16 tiles a program: at 8,192 rows of 4,096 the parts of dweight are 512, 3 % of what is
        # read and written.
        programs = triton.cdiv(triton.cdiv(R, constants["ROWS"]), 16)
        return bridge.call(
            _backward_kernel,
            x_GRD,
            weight_GD,
            dy_GRD,
            *(dtotal_GRD or (dy_GRD,)),
            outputs=[
                jax.ShapeDtypeStruct(x_GRD.shape, x_GRD.dtype),
                jax.ShapeDtypeStruct((G, programs, D), jnp.float32),
            ],
            grid=(programs, G),
            name="rms_norm_backward",
            TILES=16,
            **constants,
        )

    rows = [a.reshape(1, -1, D) for a in (total, dy, dtotal) if a is not None]
    dx_GRD, parts_GPD = bridge.merge_vmapped(run)(weight_D[None], *rows)
    return [dx_GRD.reshape(total.shape), parts_GPD[0]]
