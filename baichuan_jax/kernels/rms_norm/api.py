"""RMSNorm with the residual addition: chooses an implementation, names it, wraps it in shard_map.

B batch, T length, D width.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from baichuan_jax.kernels.choice import device_of, forced, pallas_obstacle, triton_obstacle
from baichuan_jax.kernels.rms_norm import reference
from baichuan_jax.sharding import Layout, activate, current_layout


def choose_rms_norm(implementation: str, *, device: Any, dtype: str, width: int) -> tuple[str, str]:
    """The RMSNorm that will run and why: (name, reason). Raises ConfigError where a forced one cannot serve."""
    wide = (
        f"rows of {width} are beyond the registers of one program (8192)" if width > 8192 else None
    )
    obstacles = {
        "triton": triton_obstacle(device) or wide,
        "pallas": pallas_obstacle(device, dtype)
        or (f"rows of {width} are beyond VMEM (32768)" if width > 32768 else None),
    }
    if implementation != "auto":
        return forced("rms_norm", implementation, obstacles)
    name = {"tpu": "pallas", "gpu": "triton"}.get(device.platform)
    if name is None:
        return "reference", f"the {device.platform}'s compiler fuses it"
    if obstacles[name]:
        return "reference", f"not {name}: {obstacles[name]}"
    return name, "one pass over memory, the residual addition in it"


def rms_norm(
    x_BTD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    residual: jax.Array | None = None,
    implementation: str = "auto",
) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in x's dtype.

    With a residual of x's shape and dtype, x + residual is normalised and comes back too: (y, x +
    residual).
    """
    layout = current_layout()
    name, _ = choose_rms_norm(
        implementation, device=device_of(layout), dtype=x_BTD.dtype.name, width=x_BTD.shape[-1]
    )
    if name == "reference":
        return reference.rms_norm(x_BTD, weight_D, eps, residual)
    outputs: Any = _rms_norm(weight_D, x_BTD, residual, eps, name, layout)
    return outputs[0] if residual is None else tuple(outputs)


# The derivative stands outside shard_map, which would add up the gradient of x over the tensor
# axis, along which x is replicated.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rms_norm(weight_D, x_BTD, residual_BTD, eps, name, layout):
    return _rms_norm_forward(weight_D, x_BTD, residual_BTD, eps, name, layout)[0]


def _rms_norm_forward(weight_D, x_BTD, residual_BTD, eps, name, layout):
    function = functools.partial(_module(name).forward, eps=eps)
    arrays = [x_BTD] if residual_BTD is None else [x_BTD, residual_BTD]
    with activate(
        layout
    ):  # the caller's: jax may trace the derivative's two halves after the caller has returned
        outputs = _on_rows(layout, function, ["rows"] * len(arrays), weight_D, *arrays)
    return outputs, (weight_D, outputs[1] if len(outputs) == 2 else x_BTD)


def _rms_norm_backward(eps, name, layout, saved, gradients):
    weight_D, total_BTD = saved
    function = functools.partial(_module(name).backward, eps=eps)
    with activate(layout):
        dx_BTD, parts_PD = _on_rows(
            layout, function, ["rows", "parts"], weight_D, total_BTD, *gradients
        )
    dweight_D = jnp.sum(parts_PD, axis=0).astype(weight_D.dtype)
    return dweight_D, dx_BTD, dx_BTD if len(gradients) == 2 else None


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _on_rows(
    layout: Layout | None,
    function: Callable,
    outputs: list[str],
    weight_D: jax.Array,
    *arrays_BTD: jax.Array,
) -> list:
    """Call function(weight_D, *arrays_BTD) on every device's rows; it returns arrays of "rows" or of "parts" [P, D]."""
    if layout is None or layout.mesh.size == 1:
        return function(weight_D, *arrays_BTD)
    rows = layout.spec(("batch", "length", "hidden"))
    specs = {"rows": rows, "parts": P((*layout.batch_axes, "context"), None)}
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=(P(None), *[rows] * len(arrays_BTD)),
        out_specs=[specs[name] for name in outputs],
        check_vma=False,
    )(weight_D, *arrays_BTD)


def _module(name: str) -> Any:
    """Imported when it is chosen: Triton and Pallas modules need libraries that other machines lack."""
    return importlib.import_module(f"baichuan_jax.kernels.rms_norm.{name}")
