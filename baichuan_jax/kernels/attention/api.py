"""Causal attention: chooses an implementation, names it, and wraps it in shard_map.

B batch, T query length, N heads, H head size.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from baichuan_jax.kernels.attention import blockwise, reference
from baichuan_jax.kernels.choice import device_of, forced, pallas_obstacle, triton_obstacle
from baichuan_jax.sharding import current_layout


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
        "triton": triton_obstacle(device)
        or (f"head size {head_dim} is neither 64 nor 128" if head_dim not in (64, 128) else None),
        "pallas": pallas_obstacle(device, dtype),
        "cudnn": _cudnn_obstacle(device, dtype, masked, context),
    }
    if implementation != "auto":
        return forced("attention", implementation, obstacles)
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
        device=device_of(layout),
        dtype=q_BTNH.dtype.name,
        head_dim=q_BTNH.shape[-1],
        masked=segment_ids is not None,
        length=q_BTNH.shape[1],
        context=1 if mesh is None else mesh.shape["context"],
    )
    if name in ("triton", "pallas"):
        function = importlib.import_module(f"baichuan_jax.kernels.attention.{name}").attention
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
