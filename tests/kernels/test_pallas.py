"""The TPU kernels in Pallas's interpreter: values and gradients against the plain operators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_attention import assert_close, documents, inputs, value_and_gradients

from baichuan_jax.kernels.attention import pallas as attention
from baichuan_jax.kernels.attention import reference as reference_attention
from baichuan_jax.kernels.rms_norm import pallas as rms_norm

EPS = 1e-6


@pytest.fixture(autouse=True)
def interpreter():
    """Kernels traced in a test run in Pallas's interpreter, which reads NaN beyond an array's end.

    It is the plain one. The one that simulates a TPU's memories takes ten times as long, and cannot
    run what vmap makes of a kernel.
    """
    with pltpu.force_tpu_interpret_mode(True):
        yield


def norm_inputs(shape, dtype, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 5)
    x, residual, dy, dtotal = (jax.random.normal(key, shape).astype(dtype) for key in keys[:4])
    return x * scale, residual * scale, dy, dtotal, 1 + 0.1 * jax.random.normal(keys[4], shape[-1:])


@functools.partial(jax.jit, static_argnums=5)
def norm_results(x, residual, dy, dtotal, weight, with_residual):
    """(y, total, dx, dweight) of the kernel."""
    if with_residual:
        y, total = rms_norm.forward(weight, x, residual, eps=EPS)
        dx, parts = rms_norm.backward(weight, total, dy, dtotal, eps=EPS)
    else:
        (y,), total = rms_norm.forward(weight, x, eps=EPS), x
        dx, parts = rms_norm.backward(weight, x, dy, eps=EPS)
    return y, total, dx, parts.sum(0)


def norm_exactly(x, residual, dy, dtotal, weight, with_residual):
    """The same in float64, from the sum as x's dtype holds it."""
    total = np.asarray(
        x.astype(jnp.float32) + residual.astype(jnp.float32) if with_residual else x
    ).astype(x.dtype)
    x64, dy64, weight64 = (np.asarray(a, np.float64) for a in (total, dy, weight))
    scale = 1 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + EPS)
    normal, scaled = x64 * scale, dy64 * weight64
    dx = scale * (scaled - normal * np.mean(scaled * normal, axis=-1, keepdims=True))
    dx = dx + np.asarray(dtotal, np.float64) if with_residual else dx
    return normal * weight64, total, dx, (dy64 * normal).reshape(-1, x.shape[-1]).sum(0)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [
        ((1, 1, 128), "float32", 1.0),
        ((3, 7, 200), "float32", 1.0),
        ((2, 1030, 384), "float32", 1.0),  # several blocks, the last in part
        ((130, 4096), "bfloat16", 1.0),
        ((5, 96), "bfloat16", 1.0),
        ((35, 32700), "bfloat16", 1.0),  # 8 rows at a time of blocks of 16
        ((17, 128), "float32", 1e15),
        ((17, 128), "float32", 1e-12),  # eps decides
    ],
    ids=str,
)
def test_rms_norm_and_its_gradients_are_exact_to_rounding(shape, dtype, scale, with_residual):
    given = (*norm_inputs(shape, dtype, scale), with_residual)
    got, wanted = norm_results(*given), norm_exactly(*given)
    # Results are rounded once to their dtype; sums of float32 products differ by some roundings
    # more.
    rounding = {"float32": 2e-6, "bfloat16": 2**-8}[dtype]
    for name, a, b in zip(("y", "total", "dx", "dweight"), got, wanted, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= (2e-6 if name == "dweight" else rounding) * np.abs(b).max(), (
            name
        )
    assert [a.dtype.name for a in got] == [dtype, dtype, dtype, "float32"]


def test_rms_norm_agrees_with_finite_differences():
    x, residual, dy, dtotal, weight = norm_inputs((3, 130), "float32")
    _, _, dx, dweight = norm_results(x, residual, dy, dtotal, weight, True)

    def loss(x, weight):
        y, total, *_ = norm_exactly(x, residual, dy, dtotal, weight, True)
        return np.sum(y * np.asarray(dy, np.float64)) + np.sum(
            total * np.asarray(dtotal, np.float64)
        )

    direction, step = jax.random.normal(jax.random.key(9), x.shape), 2.0**-6
    up, down = loss(x + step * direction, weight), loss(x - step * direction, weight)
    assert (up - down) / (2 * step) == pytest.approx(float(jnp.sum(dx * direction)), rel=2e-3)
    up, down = loss(x, weight + step * direction[0]), loss(x, weight - step * direction[0])
    assert (up - down) / (2 * step) == pytest.approx(
        float(jnp.sum(dweight * direction[0])), rel=1e-4
    )


def test_what_cannot_be_served_is_refused():
    wide = jnp.zeros((1, rms_norm.MAX_WIDTH + 1))
    with pytest.raises(ValueError, match="32768"):
        rms_norm.forward(wide[0], wide, eps=EPS)
    with pytest.raises(ValueError, match="float16"):
        rms_norm.forward(jnp.zeros(8), jnp.zeros((1, 8), jnp.float16), eps=EPS)
    with pytest.raises(ValueError, match="head size 256"):
        attention.attention(*[jnp.zeros((1, 8, 1, 256))] * 3)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of one register, so that short rows have several.

    Beyond two blocks the separate backward kernels run.
    """
    monkeypatch.setattr(attention, "BLOCK", 256)
    monkeypatch.setattr(attention, "BLOCK_COMPUTE", 128)
    monkeypatch.setattr(attention, "MAX_FUSED_BLOCKS", 2)


def from_start(q, k, v, segments, start=0, offset=0):
    q_segments = None if segments is None else segments[:, start:]
    return attention.attention(q[:, start:], k, v, q_segments, segments, offset)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("B", "T", "N", "H", "masked"),
    [(1, 1, 1, 64, False), (2, 300, 2, 64, True), (1, 700, 1, 128, False)],
)
def test_attention_equals_reference_in_float32(B, T, N, H, masked):
    q, k, v, weight = inputs(B, T, N, H)
    segments = documents(B, T) if masked else None
    got = value_and_gradients(from_start, q, k, v, weight, segments)
    wanted = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v, s, s), q, k, v, weight, segments
    )
    assert_close(got, wanted, 3e-6)


@pytest.mark.usefixtures("small_blocks")
def test_attention_in_bfloat16_is_as_near_to_float32_as_reference_is():
    q, k, v, weight = inputs(1, 300, 2, 128, jnp.bfloat16)
    exact = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v),
        *(x.astype(jnp.float32) for x in (q, k, v)),
        weight,
        None,
    )
    got = value_and_gradients(from_start, q, k, v, weight, None)
    assert got[0].dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: 0.4 % a rounding, several of them in a row.
    assert_close(got, exact, 2e-2)


@pytest.mark.usefixtures("small_blocks")
def test_extreme_scores_stay_finite():
    q, k, v, weight = inputs(1, 160, 2, 64, scale=60.0)
    got = value_and_gradients(from_start, q, k, v, weight, None)
    wanted = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v), q, k, v, weight, None
    )
    assert_close(got, wanted, 1e-4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fused", [True, False])
def test_queries_may_start_anywhere_and_the_start_may_be_traced(fused, monkeypatch):
    monkeypatch.setattr(attention, "MAX_FUSED_BLOCKS", 8 if fused else 0)
    q, k, v, weight = inputs(1, 900, 1, 64)
    segments = documents(1, 900)

    # 333 queries that see nothing of the last block of keys, in two blocks.
    def got_loss(q, k, v, offset):
        out = from_start(q, k, v, segments, 333, offset)
        return jnp.sum(out * weight[:, 333:]), out

    def wanted_loss(q, k, v):
        out = reference_attention.attention(q, k, v, segments, segments)[:, 333:]
        return jnp.sum(out * weight[:, 333:]), out

    (_, out), gradients = jax.jit(jax.value_and_grad(got_loss, (0, 1, 2), has_aux=True))(
        q, k, v, jnp.int32(333)
    )
    (_, wanted_out), wanted = jax.value_and_grad(wanted_loss, (0, 1, 2), has_aux=True)(q, k, v)
    assert_close((out, *gradients), (wanted_out, *wanted), 3e-6)
