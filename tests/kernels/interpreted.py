"""The Triton kernels in Triton's interpreter, against the plain operators and finite differences.

Everything around them (derivatives, vmap, shard_map) is as on a GPU. test_triton.py runs this file
in a process of its own: triton decides at its import whether it compiles or interprets. The
interpreter computes bfloat16 on its raw bits, so float32 and float16 are tested here.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import (
    assert_close,
    documents,
    inputs,
    tables,
    turned_attention,
    value_and_gradients,
)

from baichuan_jax.config.schema import MeshConfig
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.kernels import triton_interpreter as interpreter
from baichuan_jax.kernels.attention import api as attention_api
from baichuan_jax.kernels.attention import reference as reference_attention
from baichuan_jax.kernels.attention.triton import attention, packed_attention
from baichuan_jax.kernels.rms_norm import reference as reference_rms_norm
from baichuan_jax.kernels.rms_norm.api import fused_rms_norm
from baichuan_jax.sharding import Layout, activate, make_mesh


@pytest.fixture(autouse=True)
def interpreted():
    with bridge.run_with(interpreter.interpret, 80):
        yield


# Products in another order differ by float32's last bits. In float16 both round weights to 11 bits,
# at different scales.
TOLERANCE = {"float32": 3e-6, "float16": 4e-3}


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "segments"])
@pytest.mark.parametrize(
    ("B", "T", "N", "H", "dtype"),
    [
        (2, 1, 1, 64, "float32"),
        (1, 77, 2, 64, "float32"),
        (2, 128, 1, 128, "float32"),
        (1, 200, 2, 128, "float16"),
        (1, 256, 1, 64, "float16"),
    ],
    ids=str,
)
def test_attention_equals_reference(B, T, N, H, dtype, masked):
    q, k, v, weight = inputs(B, T, N, H, dtype)
    segments = documents(B, T) if masked else None
    got = value_and_gradients(
        lambda q, k, v, s: attention(q, k, v, s, s), q, k, v, weight, segments
    )
    wanted = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v, s, s), q, k, v, weight, segments
    )
    assert got[0].dtype == dtype
    assert_close(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "segments"])
@pytest.mark.parametrize(
    ("B", "T", "N", "H", "dtype"),
    [
        (2, 1, 1, 64, "float32"),
        (2, 77, 3, 64, "float32"),
        (1, 128, 1, 128, "float32"),
        (1, 300, 1, 128, "float16"),
        (1, 40, 9, 64, "float32"),
    ],
    ids=str,
)
def test_packed_attention_equals_rope_and_reference(B, T, N, H, dtype, masked):
    """Of the packed projection; with segments each row has positions of its own."""
    q, k, v, weight = inputs(B, T, N, H, dtype)
    segments, rope = (documents(B, T), tables(B, T, H)) if masked else (None, tables(1, T, H))
    got = value_and_gradients(
        lambda q, k, v, s: packed_attention(jnp.stack((q, k, v), 2), rope, s),
        *(q, k, v, weight, segments),
    )
    wanted = value_and_gradients(
        lambda q, k, v, s: turned_attention(q, k, v, rope, s), q, k, v, weight, segments
    )
    assert got[0].dtype == dtype
    assert_close(got, wanted, TOLERANCE[dtype])


def test_the_projection_is_not_changed_for_its_other_readers():
    """The kernels turn it in place: a copy, where somebody else reads it."""
    q, k, v, _ = inputs(1, 40, 1, 64)
    qkv, rope = jnp.stack((q, k, v), 2), tables(1, 40, 64)
    out, kept = jax.jit(lambda qkv: (packed_attention(qkv, rope), qkv + 0))(qkv)
    np.testing.assert_array_equal(kept, qkv)
    assert np.abs(out - turned_attention(q, k, v, rope, None)).max() < 3e-6


@pytest.mark.parametrize(("offset", "length"), [(0, 40), (33, 64), (70, 30)])
def test_attention_of_a_part_of_the_queries(offset, length):
    """Gradients too, with segments of queries and keys; keys after the last query get none."""
    q, k, v, weight = inputs(1, 100, 2, 64)
    segments = documents(1, 100)
    part = slice(offset, offset + length)

    def shifted(q, k, v, s):
        return attention(q, k, v, s[:, part], s, jnp.int32(offset))

    def plain(q, k, v, s):
        return reference_attention.attention(q, k, v, s[:, part], s, offset)

    arguments = (q[:, part], k, v, weight[:, part], segments)
    assert_close(
        value_and_gradients(shifted, *arguments), value_and_gradients(plain, *arguments), 3e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_extreme_scores_stay_finite(dtype):
    """Scores of tens of thousands: one weight is 1, the others are 0."""
    q, k, v, weight = inputs(1, 100, 1, 64, dtype, scale=60.0)
    got = value_and_gradients(lambda q, k, v, s: attention(q, k, v), q, k, v, weight, None)
    wanted = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v), q, k, v, weight, None
    )
    # A log-sum-exp of 3e4 is kept to 0.002 in float32, and the weights of the backward pass to 0.3
    # %.
    assert_close(got, wanted, {"float32": 5e-3, "float16": 1e-2}[dtype])


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    q, k, v, weight = inputs(1, 40, 1, 64)
    alone = jnp.ones((1, 40), jnp.int32).at[0, 7].set(2)
    got = value_and_gradients(
        lambda q, k, v, s: attention(q, k, v, alone, jnp.ones_like(alone)), q, k, v, weight, None
    )
    assert all(np.isfinite(array).all() for array in got)
    assert (got[0][0, 7] == 0).all()
    assert (got[1][0, 7] == 0).all()
    assert np.abs(got[1][0, 8]).max() > 0


@pytest.mark.parametrize("context", [1, 2])
def test_attention_under_scan_remat_vmap_and_shard_map(monkeypatch, context):
    """As step.py calls it: gradients per replica by vmap, around a shard_map.

    The mesh splits batch and heads, and the sequence too: then keys and values are gathered.
    """
    q, k, v, weight = (x.reshape(2, 2, 32, 2, 64) for x in inputs(4, 32, 2, 64))
    segments = documents(4, 32).reshape(2, 2, 32)
    cos, sin = (table.reshape(2, 2, 32, 32) for table in tables(4, 32, 64))
    mesh = make_mesh(MeshConfig(2, 2 // context, context, 2), jax.devices())
    layout = Layout(mesh, batch_axes=("fsdp",))

    def loss(function, q, k, v, weight, segments, *rope):
        def block(x, _):
            return x + function(x, k, v, rope, segments), None

        x, _ = jax.lax.scan(jax.checkpoint(block), q, None, length=2)
        return jnp.sum(x * weight)

    monkeypatch.setattr(
        attention_api,
        "choose_attention",
        lambda *_, **__: ("triton", "the interpreter stands for a GPU"),
    )

    def on_mesh(q, k, v, rope, s):
        with activate(layout):
            return attention_api.attention(jnp.stack((q, k, v), 2), rope, segment_ids=s)

    def gradients(function):
        one = jax.grad(functools.partial(loss, function), argnums=(0, 1, 2))
        replicas = jax.vmap(one, spmd_axis_name="data")
        return jax.jit(replicas)(q, k, v, weight, segments, cos, sin)

    assert_close((q, *gradients(on_mesh)), (q, *gradients(turned_attention)), 3e-6)


def norm_arguments(shape, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x, residual, dy, dtotal = (
        jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys[:4]
    )
    return x, residual, 1 + 0.1 * jax.random.normal(keys[4], shape[-1:]), dy, dtotal


def norm_results(function, x, residual, weight, dy, dtotal):
    """y, total and the gradients of x, residual and weight; without a residual fewer."""
    if residual is None:
        y, pull = jax.vjp(lambda x, weight: function(weight, x, None), x, weight)
        return y[0], *pull([dy])
    outputs, pull = jax.vjp(
        lambda x, residual, weight: function(weight, x, residual), x, residual, weight
    )
    return *outputs, *pull([dy, dtotal])


def triton_norm(weight, x, residual):
    return fused_rms_norm(weight, x, residual, 1e-6, "triton", None)


def plain_norm(weight, x, residual):
    outputs = reference_rms_norm.rms_norm(x, weight, 1e-6, residual)
    return [outputs] if residual is None else list(outputs)


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 5, 64), "float32"),
        ((1, 1, 1), "float32"),
        ((3, 7, 300), "float16"),
        ((1, 19, 4096), "float32"),
        ((2, 40, 130), "float32"),
    ],
    ids=str,
)
def test_rms_norm_equals_reference(shape, dtype, fused):
    x, residual, weight, dy, dtotal = norm_arguments(shape, dtype)
    arguments = (x, residual if fused else None, weight, dy, dtotal)
    got, wanted = norm_results(triton_norm, *arguments), norm_results(plain_norm, *arguments)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        scale = max(
            1.0, np.abs(np.asarray(b, np.float64)).max()
        )  # of width 1 the gradient of x is all but 0
        np.testing.assert_allclose(
            a, b, atol=scale * {"float32": 1e-6, "float16": 2e-3}[dtype], rtol=0
        )


def test_rms_norm_of_extreme_rows():
    """Zeros are normalised by eps alone; a row of 1e18 has squares within float32."""
    x = jnp.zeros((1, 3, 64)).at[0, 1].set(1e18).at[0, 2].set(1e-18)
    arguments = (x, None, jnp.ones(64), jnp.ones_like(x), None)
    for a, b in zip(
        norm_results(triton_norm, *arguments), norm_results(plain_norm, *arguments), strict=True
    ):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rms_norm_agrees_with_finite_differences():
    x, residual, weight, dy, dtotal = norm_arguments((1, 2, 5), "float32")

    def loss(x, residual, weight):
        total = x + residual
        y = weight * total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + 1e-6)
        return np.sum(y * np.asarray(dy, np.float64)) + np.sum(
            total * np.asarray(dtotal, np.float64)
        )

    _, _, *gradients = norm_results(triton_norm, x, residual, weight, dy, dtotal)
    step = 1e-5
    for index, gradient in enumerate(gradients):
        for position in np.ndindex(*gradient.shape):
            up, down = ([np.array(a, np.float64) for a in (x, residual, weight)] for _ in range(2))
            up[index][position] += step
            down[index][position] -= step
            assert float(gradient[position]) == pytest.approx(
                float(loss(*up) - loss(*down)) / (2 * step), abs=1e-5
            )


def test_attention_agrees_with_finite_differences():
    q, k, v, weight = inputs(1, 3, 1, 64)
    _, *gradients = value_and_gradients(
        lambda q, k, v, s: attention(q, k, v), q, k, v, weight, None
    )

    def loss(arrays):
        q, k, v = arrays
        scores = np.where(np.tril(np.ones((3, 3))), np.einsum("btnh,bsnh->bnts", q, k) / 8, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
        return np.sum(out * np.asarray(weight, np.float64))

    step = 1e-5
    for index, position in itertools.product(
        range(3), itertools.product([0], range(3), [0], range(0, 64, 7))
    ):
        sides = []
        for sign in (1, -1):
            arrays = [np.array(a, np.float64) for a in (q, k, v)]
            arrays[index][position] += sign * step
            sides.append(loss(arrays))
        assert float(gradients[index][position]) == pytest.approx(
            float(sides[0] - sides[1]) / (2 * step), abs=1e-5
        )


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("replicas", [False, True], ids=["mesh", "replicas"])
def test_rms_norm_on_a_mesh(fused, replicas):
    """Batch and sequence are split; the weight's gradient is whole on every device.

    Under vmap each replica has its own.
    """
    x, residual, weight, dy, dtotal = norm_arguments((2, 4, 6, 64), "float32")
    layout = Layout(
        make_mesh(MeshConfig(2, 1, 2, 2), jax.devices()),
        ("fsdp",) if replicas else ("data", "fsdp"),
    )

    def sharded_norm(weight, x, residual):
        return fused_rms_norm(weight, x, residual, 1e-6, "triton", layout)

    def all_results(function, x, residual, dy, dtotal):
        one = lambda x, residual, dy, dtotal: norm_results(
            function, x, residual if fused else None, weight, dy, dtotal
        )
        if replicas:
            return jax.vmap(one, spmd_axis_name="data")(x, residual, dy, dtotal)
        return one(x[0], residual[0], dy[0], dtotal[0])

    got = jax.jit(functools.partial(all_results, sharded_norm))(x, residual, dy, dtotal)
    for a, b in zip(got, all_results(plain_norm, x, residual, dy, dtotal), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("split", [False, True], ids=["one device", "mesh"])
def test_an_input_that_is_passed_on_has_both_gradients(split):
    """x goes on beside its norm: the kernel adds the gradient of the one to that of the other."""
    x, _, weight, dy, dx = norm_arguments((4, 6, 64), "float32")
    layout = Layout(make_mesh(MeshConfig(2, 2, 2, 1), jax.devices())) if split else None

    def results(function):
        outputs, pull = jax.vjp(function, x, weight)
        return *outputs, *pull([dy, dx])

    passed_on = lambda x, weight: fused_rms_norm(weight, x, None, 1e-6, "triton", layout, True)
    got = jax.jit(lambda: results(passed_on))()
    wanted = results(lambda x, weight: [reference_rms_norm.rms_norm(x, weight, 1e-6), x])
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
