"""Causal attention: chooses an implementation, says why, and runs it on each device of the mesh.

B batch, T query length, N heads, H head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from baichuan_jax.kernels.choice import choose, device_of, load
from baichuan_jax.sharding import Layout, current_layout

# By platform, the best first, and why it is the best.
PREFERRED = {
    "gpu": {
        "triton": "fused, deterministic, any length and mask",
        "cudnn": "fused, and cuDNN has all that this call needs",
    },
    "tpu": {"pallas": "splash attention: fused, any length and mask"},
}
SHORT = 128  # tokens of the smallest block; fewer gain nothing from blocks


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
    """The attention that will run and why: (name, reason).

    implementation: "auto" or a name. device: one of those that it will run on. masked: segment ids
    keep packed documents apart. context: devices that split the sequence. Raises ConfigError where
    the named implementation cannot serve.
    """
    # Functions, so that only those are asked that may be taken.
    obstacles = {
        "triton": lambda: load("attention", "triton").obstacle(device, head_dim),
        "cudnn": lambda: load("attention", "cudnn").obstacle(device, dtype, masked, context),
        "pallas": lambda: load("attention", "pallas").obstacle(device, dtype, head_dim),
    }
    # Plain JAX serves everywhere, in blocks where the scores would not fit.
    fallback = ("blockwise", "memory linear in the length")
    if length < SHORT:
        fallback = ("reference", f"{length} tokens are less than one block")
    preferred = PREFERRED.get(device.platform, {})
    return choose("attention", implementation, preferred, obstacles, fallback)


def attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal self-attention of any length, float32 or bfloat16. Returns [B, T, N, H].

    Softmax and sums are float32. segment_ids [B, T] int32: a token sees its own segment only. The
    current mesh splits batch and heads. Where it splits the sequence too (mesh axis "context"),
    every device gathers all keys and values and serves its own queries.
    """
    layout = current_layout()
    name, _ = choose_attention(
        implementation,
        device=device_of(layout),
        dtype=q_BTNH.dtype.name,
        head_dim=q_BTNH.shape[-1],
        masked=segment_ids is not None,
        length=q_BTNH.shape[1],
        context=1 if layout is None else layout.mesh.shape["context"],
    )
    # Queries and keys are the same tokens here, so that both have the same segments.
    function = load("attention", name).attention
    if layout is None or layout.mesh.size == 1:
        return function(q_BTNH, k_BTNH, v_BTNH, segment_ids, segment_ids)
    return _on_mesh(layout, function, q_BTNH, k_BTNH, v_BTNH, segment_ids)


def _on_mesh(
    layout: Layout,
    function: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    segments_BT: jax.Array | None,
) -> jax.Array:
    """Run an implementation on every device's share of batch, heads and queries."""
    heads = layout.spec(("batch", "length", "heads", None))
    arguments, specs = [q_BTNH, k_BTNH, v_BTNH], [heads] * 3
    if segments_BT is not None:
        arguments.append(segments_BT)
        specs.append(layout.spec(("batch", "length")))
    local = functools.partial(_local_attention, function, layout.mesh.shape["context"] > 1)
    # check_vma off: the custom derivatives inside do not declare how their results vary over the
    # mesh. Every mesh axis splits every argument (or the argument is replicated along it), so no
    # transposed sum is missing; tests compare all gradients.
    sharded = jax.shard_map(
        local, mesh=layout.mesh, in_specs=tuple(specs), out_specs=heads, check_vma=False
    )
    return sharded(*arguments)


def _local_attention(function: Callable, sequence_split: bool, q, k, v, segments=None):
    """One device's share: its own queries against the keys of the whole sequence."""
    if not sequence_split:
        return function(q, k, v, segments, segments)
    # A ring of pieces would hold fewer keys at once, but it would have to merge partial softmaxes,
    # which not every implementation returns.
    gather = functools.partial(lax.all_gather, axis_name="context", axis=1, tiled=True)
    all_segments = None if segments is None else gather(segments)
    offset = lax.axis_index("context") * q.shape[1]
    return function(q, gather(k), gather(v), segments, all_segments, offset)
