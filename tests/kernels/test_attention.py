"""Attention: every implementation against the plain one, and that against finite differences.

Values and gradients; and which implementation is chosen, with its reason.
"""

import importlib
import itertools
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.config.schema import ConfigError, MeshConfig
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.kernels.attention import blockwise
from baichuan_jax.kernels.attention import reference as reference_attention
from baichuan_jax.kernels.attention.api import attention, choose_attention
from baichuan_jax.kernels.choice import load
from baichuan_jax.kernels.rms_norm.api import choose_rms_norm
from baichuan_jax.model import rope_tables
from baichuan_jax.sharding import Layout, activate, make_mesh


def inputs(B, T, N, H, dtype=jnp.float32, scale=1.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v, weight = (jax.random.normal(key, (B, T, N, H), jnp.float32) for key in keys)
    return (q * scale).astype(dtype), (k * scale).astype(dtype), v.astype(dtype), weight


def documents(B, T, seed=0):
    """Segment ids 1, 1, 2, ... with borders at random places."""
    borders = np.random.default_rng(seed).random((B, T)) < 4 / T
    return jnp.asarray(1 + np.cumsum(borders, axis=1), jnp.int32)


def tables(B, T, H, seed=0):
    """RoPE's tables for positions of each row's own, or the same in all rows where B is 1."""
    starts = np.random.default_rng(seed).integers(0, 3000, (B, 1)) if B > 1 else np.zeros((1, 1))
    return rope_tables(jnp.asarray(starts + np.arange(T), jnp.int32), H, 10_000.0)


def turned_attention(q, k, v, rope, segments):
    """The oracle: queries and keys turned, then the plain attention."""
    q, k = (reference_attention.apply_rope(x, rope) for x in (q, k))
    return reference_attention.attention(q, k, v, segments, segments)


def value_and_gradients(function, q, k, v, weight, segments):
    def loss(q, k, v):
        out = function(q, k, v, segments)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        q, k, v
    )
    return out, *gradients


def assert_close(got, wanted, tolerance):
    """The largest difference, relative to the largest value of all.

    Sums in another order differ by a few roundings of their largest terms.
    """
    scale = max(float(np.abs(np.asarray(b, np.float64)).max()) for b in wanted)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= tolerance * scale, (name, np.abs(a - b).max(), scale)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "segments"])
@pytest.mark.parametrize(
    ("B", "T", "N", "H"),
    [(2, 1, 1, 8), (1, 7, 2, 64), (2, 128, 2, 16), (1, 300, 3, 64), (1, 1100, 1, 128)],
)
def test_blockwise_equals_reference_in_float32(B, T, N, H, masked):
    q, k, v, weight = inputs(B, T, N, H)
    segments = documents(B, T) if masked else None
    got = value_and_gradients(
        lambda q, k, v, s: blockwise.attention(q, k, v, s, s), q, k, v, weight, segments
    )
    wanted = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v, s, s), q, k, v, weight, segments
    )
    assert_close(got, wanted, 3e-6)


def test_blockwise_in_bfloat16_is_as_near_to_float32_as_reference_is():
    q, k, v, weight = inputs(2, 200, 2, 64, jnp.bfloat16)
    exact = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v),
        *(x.astype(jnp.float32) for x in (q, k, v)),
        weight,
        None,
    )
    got = value_and_gradients(
        lambda q, k, v, s: blockwise.attention(q, k, v), q, k, v, weight, None
    )
    assert got[0].dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: 0.4 % a rounding, several of them in a row.
    assert_close(got, exact, 2e-2)


def test_extreme_scores_stay_finite():
    q, k, v, weight = inputs(1, 160, 2, 64, scale=60.0)
    got = value_and_gradients(
        lambda q, k, v, s: blockwise.attention(q, k, v), q, k, v, weight, None
    )
    wanted = value_and_gradients(
        lambda q, k, v, s: reference_attention.attention(q, k, v), q, k, v, weight, None
    )
    assert_close(got, wanted, 1e-4)


def test_query_offset_serves_the_later_part_of_a_sequence():
    q, k, v, _ = inputs(1, 300, 2, 16)
    whole = reference_attention.attention(q, k, v)
    part = jax.jit(blockwise.attention)(q[:, 140:], k, v, None, None, jnp.int32(140))
    np.testing.assert_allclose(part, whole[:, 140:], atol=2e-6)


def test_reference_agrees_with_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        q, k, v, weight = (jnp.asarray(rng.normal(size=(1, 5, 1, 4))) for _ in range(4))

        def loss(q, k, v):
            scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 2.0
            scores = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), scores, -jnp.inf)
            return jnp.sum(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v) * weight)

        step = 1e-6
        differences = np.zeros((3, *q.shape))
        for index, position in itertools.product(range(3), np.ndindex(*q.shape)):
            shift = jnp.zeros(q.shape).at[position].set(step)
            up, down = (
                [x + s * shift if i == index else x for i, x in enumerate((q, k, v))]
                for s in (1, -1)
            )
            differences[index][position] = (loss(*up) - loss(*down)) / (2 * step)
    single = [x.astype(jnp.float32) for x in (q, k, v, weight)]
    for function in (reference_attention.attention, blockwise.attention):
        _, *gradients = value_and_gradients(
            lambda q, k, v, s, f=function: f(q, k, v), *single, None
        )
        np.testing.assert_allclose(np.stack(gradients), differences, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "segments"])
@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 2, 4, 1), (1, 1, 2, 4), (1, 1, 8, 1)], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_on_a_mesh_it_is_the_same(shape, implementation, masked):
    q, k, v, weight = inputs(4, 64, 4, 16)
    segments = documents(4, 64) if masked else None
    rope = tables(4 if masked else 1, 64, 16)
    wanted = value_and_gradients(
        lambda q, k, v, s: turned_attention(q, k, v, rope, s), q, k, v, weight, segments
    )
    layout = Layout(make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))]))

    def on_mesh(q, k, v, s):
        with activate(layout):
            qkv = jnp.stack((q, k, v), axis=2)
            return attention(qkv, rope, segment_ids=s, implementation=implementation)

    assert_close(value_and_gradients(on_mesh, q, k, v, weight, segments), wanted, 3e-6)


def device(platform, capability=None):
    return SimpleNamespace(platform=platform, compute_capability=capability)


A800, CPU, TPU = device("gpu", "8.0"), device("cpu"), device("tpu")
USUAL = {
    "device": A800,
    "dtype": "bfloat16",
    "head_dim": 128,
    "masked": False,
    "length": 4096,
    "context": 1,
}


@pytest.mark.parametrize(
    ("change", "wanted", "word"),
    [
        ({}, "triton", "fused"),
        ({"masked": True, "context": 2, "dtype": "float32"}, "triton", "any length and mask"),
        ({"head_dim": 96}, "cudnn", "not triton: head size 96"),
        ({"head_dim": 96, "masked": True}, "blockwise", "not cudnn: .*segment mask"),
        ({"device": device("gpu", "7.0")}, "cudnn", "compute capability 7.0"),
        ({"device": CPU}, "blockwise", "linear"),
        ({"device": CPU, "length": 64}, "reference", "64 tokens"),
        ({"device": TPU}, "pallas", "splash"),
        ({"device": TPU, "head_dim": 256}, "blockwise", "not pallas: head size 256"),
    ],
    ids=str,
)
def test_auto_chooses_and_says_why(monkeypatch, change, wanted, word):
    monkeypatch.setattr(bridge, "obstacle", lambda: None)
    name, why = choose_attention("auto", **{**USUAL, **change})
    assert name == wanted
    assert re.search(word, why), why


def test_auto_goes_on_without_jax_triton_and_says_so(monkeypatch):
    monkeypatch.setattr(bridge, "obstacle", lambda: "triton not installed")
    name, why = choose_attention("auto", **USUAL)
    assert name == "cudnn"
    assert "triton not installed" in why
    assert choose_rms_norm("auto", device=A800, dtype="bfloat16", width=64) == (
        "reference",
        "the gpu's compiler fuses it; not triton: triton not installed",
    )


@pytest.mark.parametrize(
    ("implementation", "change", "word"),
    [
        ("cudnn", {"masked": True}, "mask"),
        ("cudnn", {"device": CPU}, "backend is cpu"),
        ("cudnn", {"dtype": "float32"}, "float32"),
        ("cudnn", {"context": 2}, "offset"),
        ("triton", {"device": CPU}, "backend is cpu"),
        ("triton", {"device": device("gpu", "7.5")}, "capability 7.5"),
        ("triton", {"head_dim": 32}, "head size 32"),
        ("pallas", {}, "TPU and the backend is gpu"),
        ("pallas", {"device": TPU, "dtype": "float16"}, "float16"),
        ("pallas", {"device": TPU, "head_dim": 256}, "fit into VMEM up to 128"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_serve_raises(monkeypatch, implementation, change, word):
    monkeypatch.setattr(bridge, "obstacle", lambda: None)
    with pytest.raises(ConfigError, match=word):
        choose_attention(implementation, **{**USUAL, **change})


def test_limits_can_be_asked_where_triton_is_not_installed(monkeypatch):
    """Each implementation states its own limits in a file that imports no Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for operator in ("attention", "rms_norm"):
        importlib.reload(load(operator, "triton"))
    monkeypatch.setattr(bridge, "obstacle", lambda: None)
    with pytest.raises(ConfigError, match="head size 96 is neither 64 nor 128"):
        choose_attention("triton", **{**USUAL, "head_dim": 96})
    monkeypatch.setattr(bridge, "obstacle", lambda: "triton not installed")
    for choose, call in (
        (choose_attention, USUAL),
        (choose_rms_norm, {"device": A800, "dtype": "bfloat16", "width": 4096}),
    ):
        with pytest.raises(ConfigError, match="triton cannot serve: triton not installed"):
            choose("triton", **call)


@pytest.mark.parametrize(
    ("implementation", "change", "word"),
    [
        ("triton", {"width": 9000}, "9000"),
        ("triton", {"device": CPU}, "backend is cpu"),
        ("pallas", {"device": TPU, "width": 40000}, "40000"),
    ],
    ids=str,
)
def test_a_norm_that_cannot_serve_is_refused_or_passed_over(
    monkeypatch, implementation, change, word
):
    monkeypatch.setattr(bridge, "obstacle", lambda: None)
    usual = {"device": A800, "dtype": "bfloat16", "width": 4096}
    assert choose_rms_norm("auto", **usual)[0] == "triton"
    assert choose_rms_norm("auto", **{**usual, **change})[0] == "reference"
    with pytest.raises(ConfigError, match=word):
        choose_rms_norm(implementation, **{**usual, **change})
