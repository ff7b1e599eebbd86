"""The original's optimiser: AdamW, clipping at a global norm, linear warm-up and a cosine decay.

Gradients, AdamW's state and the parameters go in; a direction comes out, which the step subtracts
times the learning rate. AdamW (Loshchilov and Hutter 2019) as torch computes it: the decay acts on
the parameters and not on the moments, eps is added outside the square root, and both moments are
corrected for their start at zero. So ten steps from the original's weights give the original's
losses (tests/test_parity.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding

from baichuan_jax.config.schema import OptimizerConfig


def learning_rate(
    config: OptimizerConfig, num_steps: int, step: jax.Array | int, library: Any = jnp
) -> Any:
    """The learning rate of step 0, 1, ...: linear warm-up, then a cosine.

    During the warm-up peak * (step + 1) / warmup_steps; then from the peak down to its final ratio
    at num_steps. `library`: numpy computes it without jax's devices.
    """
    np = library
    step = np.asarray(step, np.float32)
    # step + 1: the first step has a rate above zero, or its gradients would be wasted.
    warmup = (step + 1) / max(config.warmup_steps, 1)
    progress = np.clip(
        (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 0.0, 1.0
    )
    final = config.final_learning_rate_ratio
    cosine = final + (1 - final) * 0.5 * (1 + np.cos(np.pi * progress))
    return config.learning_rate * np.where(step < config.warmup_steps, warmup, cosine)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW's direction, weight decay included, before the learning rate.

    The update is -learning_rate * direction, as torch's AdamW. `update(gradients, state, params,
    finite=...)` leaves the state as it is where `finite` is false; its direction is then undefined.
    """

    # The mask goes by name: attention_norm, mlp_norm and final_norm are the only vectors.
    def decayed(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(
            lambda path, _: config.decay_norms or "norm" not in path[-1].key, params
        )

    return optax.chain(
        _scale_by_adam(config), optax.add_decayed_weights(config.weight_decay, mask=decayed)
    )


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, but with the direction computed from the moments that are kept.

    optax computes it from the new moments, before the selection by `finite`. XLA then computes the
    new moments a second time beside the parameters, from the old ones, and so copies both before it
    overwrites them: two thirds of the optimiser's time on a CPU.
    """
    # Its state's layout is kept, so that optax's tools and older checkpoints read it.
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        finite: jax.Array | bool = True,
        **unused: Any,
    ) -> tuple:
        _, new = adam.update(updates, state, params)
        # count is selected too: a skipped step must not change the bias correction.
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        mean = optax.tree.bias_correction(state.mu, config.beta1, state.count)
        square = optax.tree.bias_correction(state.nu, config.beta2, state.count)
        # torch adds eps outside the square root.
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def clip_by_global_norm(
    gradients: optax.Updates, clip_norm: float
) -> tuple[optax.Updates, jax.Array]:
    """Gradients scaled by min(1, clip_norm / (norm + 1e-6)), and the norm before clipping.

    As torch's clip_grad_norm_; optax's own clipping lacks the 1e-6.
    """
    # Over all parameters together, in float32, before any is changed.
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda gradient: gradient * scale, gradients), norm


def stack_blocks(gradients: Any, shardings: Any) -> Any:
    """Gradients in the structure of the parameters, whose `shardings` these are.

    Unrolled blocks have a gradient each: `gradients["layers"]` is then a list of L trees, which are
    stacked along a leading axis. Stacked gradients are returned as they are.

    Called after the norm and before AdamW, it costs no memory and no traffic on a GPU: XLA makes
    the stack inside AdamW's kernel, which reads each block's gradient where its reduction left it.
    """

    def stacked(sharding: NamedSharding, *of_blocks: jax.Array) -> jax.Array:
        # A reduction leaves the gradient of w_down and w_out with the embedding axis first in
        # memory. Without the constraint XLA takes that order over to AdamW's whole kernel, and
        # copies parameters and moments back. GSPMD knows no constraint of a layout and would gather
        # the stack for it, so each device sets its own part's.
        row_major = Layout(tuple(range(of_blocks[0].ndim + 1)))
        keep_order = jax.shard_map(
            lambda stack: with_layout_constraint(stack, row_major),
            mesh=sharding.mesh,
            in_specs=sharding.spec,
            out_specs=sharding.spec,
        )
        return keep_order(jnp.stack(of_blocks))

    blocks = gradients["layers"]
    if not isinstance(blocks, list):
        return gradients
    return {**gradients, "layers": jax.tree.map(stacked, shardings["layers"], *blocks)}
