"""RMSNorm with the residual addition: chooses an implementation and runs it on each device's rows.

B batch, T length, D width, P parts of the weight's gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from baichuan_jax.kernels.choice import choose, device_of, load
from baichuan_jax.kernels.rms_norm import reference
from baichuan_jax.sharding import Layout, activate, current_layout

FUSED = "one pass over memory, the residual addition in it"
PREFERRED = {"gpu": {"triton": FUSED}, "tpu": {"pallas": FUSED}}


def choose_rms_norm(implementation: str, *, device: Any, dtype: str, width: int) -> tuple[str, str]:
    """The RMSNorm that will run and why: (name, reason).

    implementation: "auto" or a name. Raises ConfigError where the named one cannot serve.
    """
    obstacles = {
        "triton": lambda: load("rms_norm", "triton").obstacle(device, width),
        "pallas": lambda: load("rms_norm", "pallas").obstacle(device, dtype, width),
    }
    # Where no kernel serves, XLA's fusion of the plain operator is the best there is.
    fallback = ("reference", f"the {device.platform}'s compiler fuses it")
    preferred = PREFERRED.get(device.platform, {})
    return choose("rms_norm", implementation, preferred, obstacles, fallback)


def rms_norm(
    x_BTD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    residual: jax.Array | None = None,
    pass_on: bool = False,
    implementation: str = "auto",
) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in x's dtype.

    With a residual of x's shape and dtype, x + residual is normalised and returned too: (y, x +
    residual). pass_on: x itself is returned too: (y, x). A caller that goes on with this x has its
    gradient added inside the backward kernel, instead of by a pass over memory after it.
    """
    layout, pass_on = current_layout(), pass_on and residual is None
    name, _ = choose_rms_norm(
        implementation, device=device_of(layout), dtype=x_BTD.dtype.name, width=x_BTD.shape[-1]
    )
    # jax differentiates the reference; the kernels have a derivative of their own.
    if name == "reference":
        output = reference.rms_norm(x_BTD, weight_D, eps, residual)
        return (output, x_BTD) if pass_on else output
    outputs: Any = fused_rms_norm(weight_D, x_BTD, residual, eps, name, layout, pass_on)
    return tuple(outputs) if len(outputs) == 2 else outputs[0]


# The derivative is defined outside shard_map, which would add up the gradient of x over the tensor
# axis, along which x is replicated.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def fused_rms_norm(
    weight_D: jax.Array,
    x_BTD: jax.Array,
    residual_BTD: jax.Array | None,
    eps: float,
    name: str,
    layout: Layout | None,
    pass_on: bool = False,
) -> list[jax.Array]:
    """[y], with pass_on [y, x], or with a residual [y, x + residual].

    name: the implementation, triton or pallas.
    """
    return _forward(weight_D, x_BTD, residual_BTD, eps, name, layout, pass_on)[0]


def _forward(weight_D, x_BTD, residual_BTD, eps, name, layout, pass_on):
    function = functools.partial(load("rms_norm", name).forward, eps=eps)
    arrays = [x_BTD] if residual_BTD is None else [x_BTD, residual_BTD]
    # The caller's layout: jax may trace the derivative's two halves after the caller has returned.
    with activate(layout):
        outputs = _on_rows(layout, function, ["rows"] * len(arrays), weight_D, *arrays)
    if pass_on:
        outputs = [*outputs, x_BTD]
    # Kept for the backward pass: the array that was normalised. The statistics are cheaper to
    # compute again than to store, since the rows are read anyway.
    return outputs, (weight_D, outputs[1] if len(outputs) == 2 else x_BTD)


def _backward(eps, name, layout, pass_on, saved, gradients):
    weight_D, total_BTD = saved
    function = functools.partial(load("rms_norm", name).backward, eps=eps)
    with activate(layout):
        dx_BTD, parts_PD = _on_rows(
            layout, function, ["rows", "parts"], weight_D, total_BTD, *gradients
        )
    dweight_D = jnp.sum(parts_PD, axis=0).astype(weight_D.dtype)
    # x and the residual enter as their sum, so that they have the same gradient.
    return dweight_D, dx_BTD, dx_BTD if len(gradients) == 2 and not pass_on else None


fused_rms_norm.defvjp(_forward, _backward)


def _on_rows(
    layout: Layout | None,
    function: Callable,
    outputs: list[str],
    weight_D: jax.Array,
    *arrays_BTD: jax.Array,
) -> list:
    """Call function(weight_D, *arrays_BTD) on every device's rows.

    outputs: what each of its results is, "rows" like the arrays or "parts" [P, D] to be summed.
    """
    if layout is None or layout.mesh.size == 1:
        return function(weight_D, *arrays_BTD)
    rows = layout.spec(("batch", "length", "hidden"))
    # Devices along tensor hold the same rows, so that their parts are equal and count once.
    specs = {"rows": rows, "parts": P((*layout.batch_axes, "context"), None)}
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=(P(None), *[rows] * len(arrays_BTD)),
        out_specs=[specs[name] for name in outputs],
        check_vma=False,
    )(weight_D, *arrays_BTD)
