"""Operators with several implementations: one public function each, which chooses, wraps the choice in shard_map and names it.

B batch, T query length, N heads, H head size, D width.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from baichuan_jax.config import ConfigError
from baichuan_jax.kernels import blockwise, reference
from baichuan_jax.kernels.reference import masked_attention, prefix_attention
from baichuan_jax.kernels.triton import bridge
from baichuan_jax.sharding import Layout, activate, current_layout

__all__ = [
    "attention",
    "choose_attention",
    "choose_rms_norm",
    "masked_attention",
    "prefix_attention",
    "rms_norm",
]


def choose_attention(
    implementation: str,
    *,
    device: Any,
    dtype: str,
    head_dim: int,
    masked: bool,
    length: int,
    context: int,
) -> tuple[str, str]:
    """The attention that will run and why: (name, reason). Raises ConfigError where a forced one cannot serve.

    `device`: one of those that it will run on. `masked`: packed documents are kept apart by segment
    ids. `context`: devices along the sequence.
    """
    obstacles = {
        "triton": _triton_obstacle(device)
        or (f"head size {head_dim} is neither 64 nor 128" if head_dim not in (64, 128) else None),
        "pallas": _pallas_obstacle(device, dtype),
        "cudnn": _cudnn_obstacle(device, dtype, masked, context),
    }
    if implementation != "auto":
        return _forced("attention", implementation, obstacles)
    platform = device.platform
    if platform == "tpu" and obstacles["pallas"] is None:
        return "pallas", "splash attention: fused, any length and mask"
    if platform == "gpu" and obstacles["triton"] is None:
        return "triton", "fused, deterministic, any length and mask"
    if platform == "gpu" and obstacles["cudnn"] is None:
        return "cudnn", f"fused, and nothing here is beyond it; not triton: {obstacles['triton']}"
    if length < 128:
        return "reference", f"{length} tokens are less than one block"
    missed = {"tpu": ("pallas",), "gpu": ("triton", "cudnn")}.get(platform, ())
    return "blockwise", "; ".join(
        ["memory linear in the length", *(f"not {name}: {obstacles[name]}" for name in missed)]
    )


def choose_rms_norm(implementation: str, *, device: Any, dtype: str, width: int) -> tuple[str, str]:
    """The RMSNorm that will run and why: (name, reason). Raises ConfigError where a forced one cannot serve."""
    wide = (
        f"rows of {width} are beyond the registers of one program (8192)" if width > 8192 else None
    )
    obstacles = {
        "triton": _triton_obstacle(device) or wide,
        "pallas": _pallas_obstacle(device, dtype)
        or (f"rows of {width} are beyond VMEM (32768)" if width > 32768 else None),
    }
    if implementation != "auto":
        return _forced("rms_norm", implementation, obstacles)
    name = {"tpu": "pallas", "gpu": "triton"}.get(device.platform)
    if name is None:
        return "reference", f"the {device.platform}'s compiler fuses it"
    if obstacles[name]:
        return "reference", f"not {name}: {obstacles[name]}"
    return name, "one pass over memory, the residual addition in it"


def _forced(
    operator: str, implementation: str, obstacles: dict[str, str | None]
) -> tuple[str, str]:
    if reason := obstacles.get(implementation):
        raise ConfigError(
            f"kernels.{operator}={implementation} cannot serve: {reason}; use auto or reference"
        )
    return implementation, f"forced by kernels.{operator}"


def _triton_obstacle(device: Any) -> str | None:
    if device.platform != "gpu":
        return f"Triton needs a GPU and the backend is {device.platform}"
    if float(device.compute_capability) < 8:
        return f"the kernels need bfloat16 tensor cores (sm_80) and this GPU has compute capability {device.compute_capability}"
    return bridge.obstacle()


def _pallas_obstacle(device: Any, dtype: str) -> str | None:
    if device.platform != "tpu":
        return f"the Pallas kernels need a TPU and the backend is {device.platform}"
    return None if dtype in ("float32", "bfloat16") else f"a TPU does not compute in {dtype}"


def _cudnn_obstacle(device: Any, dtype: str, masked: bool, context: int) -> str | None:
    if device.platform != "gpu":
        return f"cuDNN needs a GPU and the backend is {device.platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention computes in 16 bits and model.dtype is {dtype}"
    if masked:
        return "cuDNN attention has no segment mask before Hopper, and it would be lost"
    return (
        "cuDNN attention has no query offset, which mesh.context > 1 needs" if context > 1 else None
    )


def _device(layout: Layout | None) -> Any:
    return jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]


def attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal self-attention, float32 or bfloat16, any length; softmax and sums in float32. Returns [B, T, N, H].

    segment_ids [B, T] int32: a token sees its own segment only. On the current mesh batch and heads
    are cut, and where the sequence is cut too (mesh axis "context") every device gathers the keys
    and values and serves its own queries.
    """
    layout = current_layout()
    mesh = None if layout is None else layout.mesh
    name, _ = choose_attention(
        implementation,
        device=_device(layout),
        dtype=q_BTNH.dtype.name,
        head_dim=q_BTNH.shape[-1],
        masked=segment_ids is not None,
        length=q_BTNH.shape[1],
        context=1 if mesh is None else mesh.shape["context"],
    )
    if name in ("triton", "pallas"):
        function = _module(name, "attention").attention
    else:
        function = {
            "reference": reference.attention,
            "blockwise": blockwise.attention,
            "cudnn": _cudnn,
        }[name]
    if layout is None or mesh is None or mesh.size == 1:
        return function(q_BTNH, k_BTNH, v_BTNH, segment_ids, segment_ids)
    local = functools.partial(_local_attention, function, mesh.shape["context"] > 1)
    heads = layout.spec(("batch", "length", "heads", None))
    arguments = (
        (q_BTNH, k_BTNH, v_BTNH) if segment_ids is None else (q_BTNH, k_BTNH, v_BTNH, segment_ids)
    )
    specs = (
        (heads,) * 3 if segment_ids is None else (*(heads,) * 3, layout.spec(("batch", "length")))
    )
    # check_vma off: the custom derivatives inside do not declare how their results vary over the
    # mesh. Every mesh axis cuts every argument (or the argument is replicated along it), so no
    # transposed sum is missing; tests compare all gradients.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        *arguments
    )


def _local_attention(function: Callable, sequence_cut: bool, q, k, v, segments=None):
    """One device's share: its own queries against the keys of the whole sequence."""
    if not sequence_cut:
        return function(q, k, v, segments, segments)
    gather = functools.partial(lax.all_gather, axis_name="context", axis=1, tiled=True)
    all_segments = None if segments is None else gather(segments)
    return function(
        q, gather(k), gather(v), segments, all_segments, lax.axis_index("context") * q.shape[1]
    )


def _cudnn(q, k, v, segments_BT, segments_BS):
    del segments_BT, segments_BS  # choose_attention refuses them
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


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
        implementation, device=_device(layout), dtype=x_BTD.dtype.name, width=x_BTD.shape[-1]
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
    function = functools.partial(_module(name, "rms_norm").forward, eps=eps)
    arrays = [x_BTD] if residual_BTD is None else [x_BTD, residual_BTD]
    with activate(
        layout
    ):  # the caller's: jax may trace the derivative's two halves after the caller has returned
        outputs = _on_rows(layout, function, ["rows"] * len(arrays), weight_D, *arrays)
    return outputs, (weight_D, outputs[1] if len(outputs) == 2 else x_BTD)


def _rms_norm_backward(eps, name, layout, saved, gradients):
    weight_D, total_BTD = saved
    function = functools.partial(_module(name, "rms_norm").backward, eps=eps)
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


def _module(implementation: str, operator: str) -> Any:
    """Imported when it is chosen: Triton and Pallas modules need libraries that other machines lack."""
    return importlib.import_module(f"baichuan_jax.kernels.{implementation}.{operator}")
