"""RMSNorm (Zhang and Sennrich 2019) with the residual addition fused, for TPUs in Pallas.

In: rows x [..., D], a weight [D] and perhaps a residual; out: the normalised rows, and x +
residual. Memory bounds the operator. A block of whole rows lies in VMEM, so that every array is
read or written once: one pass forward, one backward. The backward pass computes the statistics
again, from rows that it reads anyway. The weight's gradient is reduced in two stages, since blocks
run in parallel on the two cores of a chip: a block adds up its rows, except for the 8 sublanes of a
register, and the caller adds up the rest.

R rows (all leading dimensions), D width, P parts of the weight's gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from baichuan_jax.kernels.choice import tpu_obstacle

# At this width a tile of rows in each of four arrays, double-buffered, is 8 of the 16 MiB of VMEM
# that a kernel may use; with the float32 values between, 13 in all.
MAX_WIDTH = 32768
# Beyond this width a kernel computes 8 rows of bfloat16 at a time: 16 rows of 32,768, in float32,
# would need 17 MiB.
WIDE = 16384
LANES = 128  # the last dimension of a register
# Of one array in a block: 0.5 MiB in bfloat16, long enough to hide the start of a transfer.
BLOCK_ELEMENTS = 2**18


def obstacle(device: Any, dtype: str, width: int) -> str | None:
    """Why these kernels cannot serve on a device; None: they can."""
    if (reason := tpu_obstacle(device, dtype)) is not None:
        return reason
    return f"rows of {width} are beyond VMEM ({MAX_WIDTH})" if width > MAX_WIDTH else None


def forward(
    weight_D: jax.Array, x: jax.Array, residual: jax.Array | None = None, *, eps: float
) -> list[jax.Array]:
    """RMSNorm of x [..., D]: [y]; or of x + residual: [y, x + residual].

    In x's dtype, float32 or bfloat16, float32 inside. Any number of rows. A D that is no multiple
    of 128 is padded, which costs a copy. Raises ValueError where D > MAX_WIDTH.
    """
    arrays = [x] if residual is None else [x, residual]
    kernel = functools.partial(_forward_kernel, width=x.shape[-1], eps=eps)
    outputs = _call(kernel, "rms_norm_forward", weight_D, arrays, outputs=len(arrays))
    return [_unpad(out, x) for out in outputs]


def backward(
    weight_D: jax.Array,
    total: jax.Array,
    dy: jax.Array,
    dtotal: jax.Array | None = None,
    *,
    eps: float,
) -> list[jax.Array]:
    """Gradients of forward: [dx, parts_PD].

    dx is the residual's gradient too; the weight's is the sum of parts_PD (float32) over P. total:
    the array that was normalised. dtotal: the gradient of forward's second result, where it had
    one.
    """
    D = total.shape[-1]
    arrays = [total, dy] if dtotal is None else [total, dy, dtotal]
    kernel = functools.partial(_backward_kernel, width=D, eps=eps, num_rows=total.size // D)
    dx, parts = _call(kernel, "rms_norm_backward", weight_D, arrays, outputs=1, parts=True)
    return [_unpad(dx, total), parts.reshape(-1, parts.shape[-1])[:, :D]]


def _unpad(x_RD: jax.Array, like: jax.Array) -> jax.Array:
    return x_RD[:, : like.shape[-1]].reshape(like.shape)


def _tile(dtype: jnp.dtype) -> int:
    """Rows of a register: 8 of 32 bits, or 16 pairs of 16."""
    return 32 // dtype.itemsize


def _call(
    kernel: Callable,
    name: str,
    weight_D: jax.Array,
    arrays: list[jax.Array],
    *,
    outputs: int,
    parts: bool = False,
) -> list[jax.Array]:
    """Run a kernel over blocks of rows of the arrays.

    It gives `outputs` results like the arrays and, with parts, partial sums [8, D] a block.
    """
    D, dtype = weight_D.shape[0], arrays[0].dtype
    if D > MAX_WIDTH or dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"Pallas RMSNorm of {dtype} rows of {D}: "
            f"it takes float32 and bfloat16, up to {MAX_WIDTH}"
        )
    # Zeros add nothing to the sum of squares; the kernels divide by the true width.
    padding = -D % LANES
    weight_1D = jnp.pad(weight_D, (0, padding))[None]
    arrays_RD = [jnp.pad(a.reshape(-1, D), ((0, 0), (0, padding))) for a in arrays]
    (R, D), tile = arrays_RD[0].shape, _tile(dtype)
    # Whole tiles of rows, as many as BLOCK_ELEMENTS allow, and no more than there are.
    block = min(R + -R % tile, max(tile, BLOCK_ELEMENTS // D // tile * tile))
    spec = pl.BlockSpec((block, D), lambda i: (i, 0))
    # The parts of the weight's gradient keep the 8 sublanes of a register: a sum across sublanes
    # takes shuffles.
    out_shape, out_specs = [jax.ShapeDtypeStruct((R, D), dtype)] * outputs, [spec] * outputs
    if parts:
        out_shape.append(jax.ShapeDtypeStruct((pl.cdiv(R, block), 8, D), jnp.float32))
        out_specs.append(pl.BlockSpec((None, 8, D), lambda i: (i, 0, 0)))
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(pl.cdiv(R, block),),
        in_specs=[pl.BlockSpec((1, D), lambda i: (0, 0)), *[spec] * len(arrays)],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(weight_1D, *arrays_RD)


def _for_tiles(ref, body: Callable) -> None:
    """Run body(first row, index of the rows) tile by tile.

    A whole block at once spills more and takes a quarter more instructions.
    """
    tile = _tile(ref.dtype) if ref.shape[1] <= WIDE else 8

    @pl.loop(0, ref.shape[0] // tile)
    def _(i):
        body(i * tile, pl.ds(pl.multiple_of(i * tile, tile), tile))


def _scale(x32, width: int, eps: float):
    return lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) / width + eps)


def _forward_kernel(weight_ref, *refs, width: int, eps: float):
    x_ref, *residual_ref = refs[: len(refs) // 2]  # as many results as inputs
    y_ref, *total_ref = refs[len(refs) // 2 :]

    def tile(_, rows):
        x32 = x_ref[rows].astype(jnp.float32)
        if residual_ref:
            total = (x32 + residual_ref[0][rows].astype(jnp.float32)).astype(x_ref.dtype)
            total_ref[0][rows] = total
            x32 = total.astype(jnp.float32)  # rounded, as it would be between two operators
        y_ref[rows] = (x32 * _scale(x32, width, eps) * weight_ref[...].astype(jnp.float32)).astype(
            y_ref.dtype
        )

    _for_tiles(x_ref, tile)


def _backward_kernel(weight_ref, x_ref, dy_ref, *refs, width: int, eps: float, num_rows: int):
    # Inputs come before outputs; dtotal is there where the forward pass had a residual.
    *dtotal_ref, dx_ref, dweight_ref = refs
    block, D = x_ref.shape
    dweight_ref[...] = jnp.zeros_like(dweight_ref)
    first_of_block = pl.program_id(0) * block

    def tile(first, rows):
        x32, dy32 = x_ref[rows].astype(jnp.float32), dy_ref[rows].astype(jnp.float32)
        scale = _scale(x32, width, eps)
        normal, scaled = x32 * scale, dy32 * weight_ref[...].astype(jnp.float32)
        dx = scale * (scaled - normal * (jnp.sum(scaled * normal, axis=-1, keepdims=True) / width))
        if dtotal_ref:
            dx += dtotal_ref[0][rows].astype(jnp.float32)
        dx_ref[rows] = dx.astype(dx_ref.dtype)
        # The last block reaches past the last row. What is read there is undefined, perhaps NaN,
        # and must not reach the sum.
        row = first_of_block + first + lax.broadcasted_iota(jnp.int32, (x32.shape[0], 1), 0)
        products = jnp.where(row < num_rows, dy32 * normal, 0.0)
        dweight_ref[...] += jnp.sum(products.reshape(-1, 8, D), axis=0)

    _for_tiles(x_ref, tile)
