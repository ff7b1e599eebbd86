"""The original's optimiser: AdamW with clipping at a global norm, linear warm-up and a cosine."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from baichuan_jax.config.schema import OptimizerConfig
from baichuan_jax.model import Params


def learning_rate(config: OptimizerConfig, num_steps: int, step: jax.Array) -> jax.Array:
    """Of step 0, 1, ...: peak * (step + 1) / warmup_steps, then a cosine from the peak to its final ratio at num_steps."""
    step = jnp.asarray(step, jnp.float32)
    warmup = (step + 1) / max(config.warmup_steps, 1)
    progress = jnp.clip(
        (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 0.0, 1.0
    )
    final = config.final_learning_rate_ratio
    cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * jnp.where(step < config.warmup_steps, warmup, cosine)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW's direction, decay included, before the learning rate: update = -learning_rate * direction (torch's AdamW).

    `update(gradients, state, params, finite=...)` leaves the state as it is where `finite` is
    false; the direction then means nothing.
    """

    def decayed(params: Params) -> Params:
        return jax.tree.map_with_path(
            lambda path, _: config.decay_norms or "norm" not in path[-1].key, params
        )

    return optax.chain(
        _scale_by_adam(config), optax.add_decayed_weights(config.weight_decay, mask=decayed)
    )


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """optax's, but the direction is computed from the moments as they are kept.

    From the new ones before that selection, XLA would compute them a second time beside the
    parameters, from the old. So it copied both moments before it overwrote them, which took two
    thirds of the optimiser's time on a CPU.
    """
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
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        mean = optax.tree.bias_correction(state.mu, config.beta1, state.count)
        square = optax.tree.bias_correction(state.nu, config.beta2, state.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mean, square), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def clip_by_global_norm(gradients: Params, clip_norm: float) -> tuple[Params, jax.Array]:
    """Gradients scaled by min(1, clip_norm / (norm + 1e-6)), as torch's clip_grad_norm_, and the norm before it."""
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda gradient: gradient * scale, gradients), norm
