"""Operators with several implementations: one public function each, which chooses, wraps the choice in shard_map and names it.

B batch, T query length, N heads, H head size.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax

from baichuan_jax.config import ConfigError
from baichuan_jax.kernels import blockwise, reference
from baichuan_jax.kernels.reference import masked_attention, prefix_attention, rms_norm
from baichuan_jax.sharding import current_layout

__all__ = ["attention", "choose_attention", "masked_attention", "prefix_attention", "rms_norm"]


def choose_attention(
    implementation: str, *, backend: str, dtype: str, masked: bool, length: int, context: int
) -> tuple[str, str]:
    """The attention that will run and why: (name, reason). Raises ConfigError where a forced one cannot serve.

    `masked`: packed documents are kept apart by segment ids. `context`: devices along the sequence.
    """
    obstacle = None
    if backend != "gpu":
        obstacle = f"cuDNN needs a GPU and the backend is {backend}"
    elif dtype not in ("bfloat16", "float16"):
        obstacle = f"cuDNN attention computes in 16 bits and model.dtype is {dtype}"
    elif masked:
        obstacle = "cuDNN attention has no segment mask before Hopper, and it would be lost"
    elif context > 1:
        obstacle = "cuDNN attention has no query offset, which mesh.context > 1 needs"
    if implementation == "cudnn" and obstacle:
        raise ConfigError(f"kernels.attention=cudnn cannot serve: {obstacle}; use auto, blockwise or reference")
    if implementation != "auto":
        return implementation, "forced by kernels.attention"
    if obstacle is None:
        return "cudnn", "fused, and nothing here is beyond it"
    if length < 128:
        return "reference", f"{length} tokens are less than one block"
    return "blockwise", f"memory linear in the length; not cudnn: {obstacle}"


def attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal self-attention, float32 or bfloat16, any length; softmax and sums in float32. Returns [B, T, N, H].

    segment_ids [B, T] int32: a token sees its own segment only. On the current mesh batch and heads are cut, and where the
    sequence is cut too (mesh axis "context") every device gathers the keys and values and serves its own queries.
    """
    layout = current_layout()
    mesh = None if layout is None else layout.mesh
    name, _ = choose_attention(
        implementation,
        backend=jax.default_backend() if mesh is None else mesh.devices.flat[0].platform,
        dtype=q_BTNH.dtype.name,
        masked=segment_ids is not None,
        length=q_BTNH.shape[1],
        context=1 if mesh is None else mesh.shape["context"],
    )
    function = {"reference": reference.attention, "blockwise": blockwise.attention, "cudnn": _cudnn}[name]
    if layout is None or mesh is None or mesh.size == 1:
        return function(q_BTNH, k_BTNH, v_BTNH, segment_ids, segment_ids)
    local = functools.partial(_local_attention, function, mesh.shape["context"] > 1)
    heads = layout.spec(("batch", "length", "heads", None))
    arguments = (q_BTNH, k_BTNH, v_BTNH) if segment_ids is None else (q_BTNH, k_BTNH, v_BTNH, segment_ids)
    specs = (heads,) * 3 if segment_ids is None else (*(heads,) * 3, layout.spec(("batch", "length")))
    # check_vma off: the custom derivatives inside do not declare how their results vary over the mesh. Every mesh axis cuts every
    # argument (or the argument is replicated along it), so no transposed sum is missing; tests compare all gradients.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(*arguments)


def _local_attention(function: Callable, sequence_cut: bool, q, k, v, segments=None):
    """One device's share: its own queries against the keys of the whole sequence."""
    if not sequence_cut:
        return function(q, k, v, segments, segments)
    gather = functools.partial(lax.all_gather, axis_name="context", axis=1, tiled=True)
    all_segments = None if segments is None else gather(segments)
    return function(q, gather(k), gather(v), segments, all_segments, lax.axis_index("context") * q.shape[1])


def _cudnn(q, k, v, segments_BT, segments_BS):
    del segments_BT, segments_BS  # choose_attention refuses them
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
