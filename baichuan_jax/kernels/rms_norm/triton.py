"""RMSNorm with the residual addition fused, for GPUs in the Triton language: what JAX calls.

In: rows x [..., D], a weight [D] and perhaps a residual; out: the normalised rows, and x +
residual. Memory bounds the operator, so every array is read or written once: one pass forward, one
backward. The weight's gradient is reduced in two stages, without atomics: each program adds up its
rows, and the caller adds up the programs. triton_kernels.py holds the kernels, imported at the
first call, so that the chooser can ask for the obstacles without Triton.

G groups (the dimension of a vmap, else 1), R rows, D width, P parts of the weight's gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.kernels import triton_bridge as bridge

MAX_WIDTH = 8192  # a row lies in the registers of one program; beyond, the backward pass spills
# Of one array that a program holds at once: 16 a thread of 8 warps. With more the backward pass
# spills.
ELEMENTS = 4096
# Tiles of rows that a program of the backward pass adds up: at 8,192 rows of 4,096 the parts of the
# weight's gradient are 512, 3 % of what is read and written.
TILES = 16


def obstacle(device: Any, width: int) -> str | None:
    """Why these kernels cannot serve on a device; None: they can."""
    if (reason := bridge.device_obstacle(device)) is not None:
        return reason
    if width > MAX_WIDTH:
        return f"rows of {width} are beyond the registers of one program ({MAX_WIDTH})"
    return None


def forward(
    weight_D: jax.Array, x: jax.Array, residual: jax.Array | None = None, *, eps: float
) -> list[jax.Array]:
    """RMSNorm of x [..., D]: [y]; or of x + residual: [y, x + residual].

    In x's dtype, float32 inside. Raises ValueError where D > MAX_WIDTH.
    """
    D = x.shape[-1]

    def run(weight_GD: jax.Array, x_GRD: jax.Array, *residual_GRD: jax.Array) -> list[jax.Array]:
        from baichuan_jax.kernels.rms_norm import triton_kernels as kernels

        G, R, _ = x_GRD.shape
        constants = _constants(D, R, eps, bool(residual_GRD))
        like = jax.ShapeDtypeStruct(x_GRD.shape, x_GRD.dtype)
        unused = jax.ShapeDtypeStruct((G, 1), x_GRD.dtype)  # a kernel's outputs are fixed
        outputs = bridge.call(
            kernels.forward_kernel,
            x_GRD,
            *(residual_GRD or (x_GRD,)),
            weight_GD,
            outputs=[like, like if residual_GRD else unused],
            grid=(-(-R // constants["ROWS"]), G),
            name="rms_norm_forward",
            **constants,
        )
        return outputs[: 1 + len(residual_GRD)]

    # One group; under vmap the bridge makes the mapped dimension the groups.
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
    """Gradients of forward: [dx, parts_PD].

    dx is the residual's gradient too; the weight's is the sum of parts_PD (float32) over P. total:
    the array that was normalised. dtotal: the gradient of forward's second result, where it had
    one.
    """
    D = total.shape[-1]

    def run(
        weight_GD: jax.Array, x_GRD: jax.Array, dy_GRD: jax.Array, *dtotal_GRD: jax.Array
    ) -> list[jax.Array]:
        from baichuan_jax.kernels.rms_norm import triton_kernels as kernels

        # One part of the weight's gradient for each program of each group.
        G, R, _ = x_GRD.shape
        constants = _constants(D, R, eps, bool(dtotal_GRD))
        programs = -(-R // (constants["ROWS"] * TILES))
        dx = jax.ShapeDtypeStruct(x_GRD.shape, x_GRD.dtype)
        parts = jax.ShapeDtypeStruct((G, programs, D), jnp.float32)
        return bridge.call(
            kernels.backward_kernel,
            x_GRD,
            weight_GD,
            dy_GRD,
            *(dtotal_GRD or (dy_GRD,)),
            outputs=[dx, parts],
            grid=(programs, G),
            name="rms_norm_backward",
            TILES=TILES,
            **constants,
        )

    rows = [a.reshape(1, -1, D) for a in (total, dy, dtotal) if a is not None]
    dx_GRD, parts_GPD = bridge.merge_vmapped(run)(weight_D[None], *rows)
    return [dx_GRD.reshape(total.shape), parts_GPD[0]]


def _constants(D: int, R: int, eps: float, residual: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    if D > MAX_WIDTH:
        raise ValueError(f"Triton RMSNorm of rows of {D}: it takes up to {MAX_WIDTH}")
    # Triton's ranges are powers of two; what is beyond D is masked.
    width = 1 << (D - 1).bit_length()
    # 8 warps of 32 threads hold ELEMENTS of an array, 16 each.
    return {
        "R": R,
        "D": D,
        "ROWS": max(1, ELEMENTS // width),
        "WIDTH": width,
        "EPS": eps,
        "RESIDUAL": residual,
        "num_warps": 8,
        "num_stages": 1,
    }
