"""RMSNorm (Zhang and Sennrich 2019) in plain jnp: the oracle of the other implementations.

D width.
"""

from typing import Any

import jax
import jax.numpy as jnp


def rms_norm(
    x: jax.Array, weight_D: jax.Array, eps: float, residual: jax.Array | None = None
) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in x's dtype.

    With a residual, x + residual is normalised and returned too: (y, x + residual).
    """
    # The sum is rounded to x's dtype: the next block reads the same values.
    total = x if residual is None else residual + x
    x32 = total.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = (weight_D * x32).astype(x.dtype)
    return y if residual is None else (y, total)
