"""Schedule against its formula, one AdamW step against NumPy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_jax.config.schema import MeshConfig, OptimizerConfig
from baichuan_jax.optimizer import (
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
    stack_blocks,
)
from baichuan_jax.sharding import Layout, make_mesh


def test_schedule_warms_up_then_follows_a_cosine_to_its_final_ratio():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_learning_rate_ratio=0.1)
    rates = [float(learning_rate(config, 12, step)) for step in range(14)]
    assert np.allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    wanted = [
        2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 8))) for step in range(4, 12)
    ]
    assert np.allclose(rates[4:12], wanted)
    assert np.allclose(rates[12:], 0.2)


def test_without_warmup_the_first_step_has_the_peak():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
    assert float(learning_rate(config, 10, 0)) == 2.0


def test_two_adamw_steps_match_numpy():
    config = OptimizerConfig(weight_decay=0.1)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "final_norm": rng.normal(size=4)}
    optimizer = make_optimizer(config)
    ours = {name: jnp.float32(value) for name, value in params.items()}
    state = optimizer.init(ours)
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for t in (1, 2):
        gradients = {name: rng.normal(size=value.shape) for name, value in params.items()}
        direction, state = optimizer.update(
            {n: jnp.float32(g) for n, g in gradients.items()}, state, ours
        )
        ours = {name: ours[name] - 0.01 * direction[name] for name in ours}
        for name, g in gradients.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            adam = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            params[name] = params[name] - 0.01 * (adam + 0.1 * params[name])
            np.testing.assert_allclose(ours[name], params[name], rtol=2e-6, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_moments_are_overwritten_in_place():
    optimizer = make_optimizer(OptimizerConfig())
    params = {"w": jnp.ones((64, 128))}

    def step(params, state, gradients, finite):
        direction, state = optimizer.update(gradients, state, params, finite=finite)
        return jax.tree.map(
            lambda p, d: jnp.where(finite, p - 0.1 * d, p), params, direction
        ), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, optimizer.init(params), params, jnp.bool_(True))
        .compile()
    )
    assert not re.findall(r"f32\[64,128\]\S* copy\(", compiled.as_text())
    moved, state = compiled(
        params, optimizer.init(params), {"w": jnp.full((64, 128), 2.0)}, jnp.bool_(True)
    )
    assert not np.allclose(moved["w"], 1.0)
    before = jax.tree.map(np.array, (moved, state))
    after = compiled(moved, state, {"w": jnp.full((64, 128), jnp.nan)}, jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_norms_decay_only_where_asked():
    params = {
        "layers": {"attention_norm": jnp.ones(3), "w_up": jnp.ones((3, 3))},
        "final_norm": jnp.ones(3),
    }
    zero = {
        "layers": {"attention_norm": jnp.zeros(3), "w_up": jnp.zeros((3, 3))},
        "final_norm": jnp.zeros(3),
    }
    for decay_norms in (True, False):
        optimizer = make_optimizer(OptimizerConfig(decay_norms=decay_norms))
        direction, _ = optimizer.update(zero, optimizer.init(params), params)
        assert np.allclose(direction["layers"]["w_up"], 0.1)
        assert np.allclose(direction["layers"]["attention_norm"], 0.1 if decay_norms else 0.0)
        assert np.allclose(direction["final_norm"], 0.1 if decay_norms else 0.0)


def test_clipping_is_torchs():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    clipped, norm = clip_by_global_norm(gradients, 1.0)
    assert float(norm) == 5.0
    assert np.allclose(clipped["a"], np.array([3.0, 0.0]) / (5.0 + 1e-6))
    untouched, _ = clip_by_global_norm(gradients, 10.0)
    assert np.array_equal(untouched["b"], gradients["b"])


def test_gradients_of_blocks_are_stacked_where_they_are():
    """Each device stacks its own parts: no collective, and the parameters' shardings come out."""
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    axes = {"w_down": ("layers", "mlp", "embed"), "mlp_norm": ("layers", "norm")}
    shardings = {name: layout.sharding(*names) for name, names in axes.items()}
    rng = np.random.default_rng(0)
    stacks = {"w_down": rng.normal(size=(3, 16, 8)), "mlp_norm": rng.normal(size=(3, 8))}
    blocks = [
        {
            name: jax.device_put(jnp.float32(stack[i]), layout.sharding(*axes[name][1:]))
            for name, stack in stacks.items()
        }
        for i in range(3)
    ]
    gradients = {"layers": blocks, "final_norm": jnp.ones(8)}
    stack = jax.jit(lambda gradients: stack_blocks(gradients, {"layers": shardings}))
    text = stack.lower(gradients).compile().as_text()
    assert not re.findall(r"(?:all|collective|reduce)-\w+\(", text)
    stacked = stack(gradients)
    np.testing.assert_array_equal(stacked["final_norm"], gradients["final_norm"])
    for name, wanted in stacks.items():
        np.testing.assert_array_equal(stacked["layers"][name], jnp.float32(wanted))
        assert stacked["layers"][name].sharding.is_equivalent_to(shardings[name], wanted.ndim)
    # Those of a scan over the blocks are stacked already.
    assert stack_blocks(stacked, {"layers": shardings}) is stacked


def test_the_norm_and_adamw_of_a_list_of_blocks_are_those_of_their_stack():
    layout = Layout(make_mesh(MeshConfig(fsdp=8)))
    shardings = {"layers": {"w_up": layout.sharding("layers", "embed", "mlp")}}
    rng = np.random.default_rng(1)
    w_up = jnp.float32(rng.normal(size=(3, 8, 16)))
    params = {"layers": {"w_up": jnp.ones((3, 8, 16))}}
    optimizer = make_optimizer(OptimizerConfig())

    def step(gradients):
        gradients, norm = clip_by_global_norm(gradients, 1.0)
        gradients = stack_blocks(gradients, shardings)
        return optimizer.update(gradients, optimizer.init(params), params), norm

    (wanted, state), norm = jax.jit(step)({"layers": {"w_up": w_up}})
    (direction, of_list), norm_of_list = jax.jit(step)({"layers": [{"w_up": w} for w in w_up]})
    # The squares are added block by block, in another order.
    np.testing.assert_allclose(norm_of_list, norm, rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves((direction, of_list)), jax.tree.leaves((wanted, state)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-6)
