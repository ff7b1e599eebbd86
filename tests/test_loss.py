"""Cross-entropy and its gradient against the plain formula in float64, differentiated by jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.config.schema import MeshConfig
from baichuan_jax.loss import cross_entropy
from baichuan_jax.sharding import Layout, activate, make_mesh

B, T, D, V = 4, 24, 16, 40


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel = rng.normal(size=(D, V)).astype(np.float32)
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[0, :3] = -100
    labels[2] = -100
    return hidden, kernel, labels


def plain(hidden, kernel, labels, z_loss=0.0):
    logits = hidden @ kernel
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(labels != -100, lse - picked + z_loss * lse**2, 0.0))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_size", [1, 7, 32, 96, 1000])
def test_any_chunking_gives_the_plain_loss_and_gradients(case, chunk_size, z_loss):
    with jax.enable_x64(True):
        wanted, gradients = jax.value_and_grad(plain, (0, 1))(
            *(np.float64(x) for x in case[:2]), case[2], z_loss
        )
    wanted, gradients = float(wanted), jax.device_get(gradients)
    hidden, kernel, labels = case

    def loss(hidden, kernel):
        return cross_entropy(hidden, kernel, labels, chunk_size=chunk_size, z_loss=z_loss) * 0.5

    got, got_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel)
    assert abs(got * 2 / wanted - 1) < 1e-6
    for a, b in zip(got_gradients, gradients, strict=True):
        np.testing.assert_allclose(a * 2, b, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    "shape",
    [
        (4, 1, 1, 1),
        (1, 4, 1, 1),
        (1, 1, 2, 1),
        (1, 1, 1, 8),
        (2, 2, 1, 2),
        (1, 2, 2, 2),
        (1, 2, 1, 2, 2),
    ],
    ids=str,
)
def test_any_mesh_gives_the_single_device_loss_and_gradients(case, shape):
    hidden, kernel, labels = case
    wanted = jax.value_and_grad(plain, (0, 1))(hidden, kernel, labels)
    layout = Layout(make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))]))

    def loss(hidden, kernel):
        with activate(layout):
            return cross_entropy(hidden, kernel, labels, chunk_size=5)

    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_ignored_labels_alone_cost_nothing(case):
    hidden, kernel, labels = case
    value, gradients = jax.value_and_grad(
        lambda h: cross_entropy(h, kernel, jnp.full_like(labels, -100), chunk_size=8)
    )(hidden)
    assert value == 0
    assert not np.any(gradients)


def test_bfloat16_loss_is_near_and_its_gradient_is_bfloat16(case):
    hidden, kernel, labels = case
    value, gradient = jax.value_and_grad(lambda h: cross_entropy(h, kernel, labels, chunk_size=32))(
        jnp.bfloat16(hidden)
    )
    assert gradient.dtype == jnp.bfloat16
    assert abs(value / plain(hidden, kernel, labels) - 1) < 5e-3  # inputs rounded to 8 bits


def test_full_logits_never_exist():
    """The compiled forward and backward pass of 4,096 tokens holds less than their logits."""
    tokens, vocab = 4096, 4096
    hidden = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
    kernel = jax.ShapeDtypeStruct((D, vocab), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    function = jax.value_and_grad(lambda h, k, y: cross_entropy(h, k, y, chunk_size=64), (0, 1))
    memory = jax.jit(function).lower(hidden, kernel, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * vocab * 4 / 8
