"""Causal attention: chooses an implementation, says why, and runs it on each device of the mesh.

B batch, T query length, N heads, H head size, C the three of Q, K and V.
"""

import functools
from typing import Any

import jax
from jax import lax

from baichuan_jax.kernels.attention.reference import turned_parts
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
    qkv_BTCNH: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    *,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal self-attention of any length, float32 or bfloat16. Returns [B, T, N, H].

    qkv_BTCNH: queries, keys and values, packed as one projection makes them. rope: cosines and
    sines [B or 1, T, H/2] in float32, by which queries and keys are turned first. Softmax and sums
    are float32. segment_ids [B, T] int32: a token sees its own segment only. The current mesh
    splits batch and heads. Where it splits the sequence too (mesh axis "context"), every device
    gathers all keys and values and serves its own queries.
    """
    layout = current_layout()
    name, _ = choose_attention(
        implementation,
        device=device_of(layout),
        dtype=qkv_BTCNH.dtype.name,
        head_dim=qkv_BTCNH.shape[-1],
        masked=segment_ids is not None,
        length=qkv_BTCNH.shape[1],
        context=1 if layout is None else layout.mesh.shape["context"],
    )
    if layout is None or layout.mesh.size == 1:
        return local_attention(name, False, qkv_BTCNH, *rope, segment_ids)
    return _on_mesh(layout, name, qkv_BTCNH, rope, segment_ids)


def _on_mesh(
    layout: Layout,
    name: str,
    qkv_BTCNH: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments_BT: jax.Array | None,
) -> jax.Array:
    """Run an implementation on every device's share of batch, heads and queries."""
    packed = layout.spec(("batch", "length", "qkv", "heads", None))
    # One table may serve all rows of the batch.
    table = layout.spec(("batch" if rope[0].shape[0] == qkv_BTCNH.shape[0] else None, "length"))
    arguments, specs = [qkv_BTCNH, *rope], [packed, table, table]
    if segments_BT is not None:
        arguments.append(segments_BT)
        specs.append(layout.spec(("batch", "length")))
    local = functools.partial(local_attention, name, layout.mesh.shape["context"] > 1)
    # check_vma off: the custom derivatives inside do not declare how their results vary over the
    # mesh. Every mesh axis splits every argument (or the argument is replicated along it), so no
    # transposed sum is missing; tests compare all gradients.
    heads = layout.spec(("batch", "length", "heads", None))
    sharded = jax.shard_map(
        local, mesh=layout.mesh, in_specs=tuple(specs), out_specs=heads, check_vma=False
    )
    return sharded(*arguments)


def local_attention(name: str, sequence_split: bool, qkv, cos, sin, segments=None):
    """One device's share by a named implementation: its own queries against the whole sequence."""
    implementation = load("attention", name)
    # Queries and keys are the same tokens here, so that both have the same segments.
    if not sequence_split and name == "triton":
        return implementation.packed_attention(qkv, (cos, sin), segments)
    q, k, v = turned_parts(qkv, (cos, sin))
    if not sequence_split:
        return implementation.attention(q, k, v, segments, segments)
    # A ring of pieces would hold fewer keys at once, but it would have to merge partial softmaxes,
    # which not every implementation returns.
    gather = functools.partial(lax.all_gather, axis_name="context", axis=1, tiled=True)
    all_segments = None if segments is None else gather(segments)
    offset = lax.axis_index("context") * q.shape[1]
    return implementation.attention(q, gather(k), gather(v), segments, all_segments, offset)
