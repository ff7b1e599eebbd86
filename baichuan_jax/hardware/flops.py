"""How many operations training takes: one place for each formula.

A product of matrices [m, k] and [k, n] takes 2 m k n operations. A weight is multiplied once in the
forward pass and twice in the backward pass, once for each gradient, which gives the 6 operations a
weight and token of Kaplan et al. (2020). Attention adds its two products over pairs of positions
(PaLM, Chowdhery et al. 2022, appendix B). Norms, softmax and the optimizer are not counted: they
take less than 1 %, and memory bounds them.
"""

import math
from collections.abc import Sequence

from baichuan_jax.config.schema import ModelConfig

# Matrix products over pairs of positions that each attention kernel computes, by its name in a
# compiled program. Forward: scores and values. Backward, five in all: the scores again, the
# weights' gradient, and one each for the gradients of queries, keys and values. Two separate
# kernels both need the first two products: 4 + 3. Splash attention's dkv kernel gives all three
# gradients in five where it runs alone.
ATTENTION_PRODUCTS = {
    "attention_forward": 2,
    "attention_dkv": 4,
    "attention_dq": 3,
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 5,
    "splash_mha_dq": 3,
}
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5  # the least, in one kernel


def flops_per_token(model: ModelConfig, context_length: int) -> tuple[float, float]:
    """Training FLOPs a token, nothing recomputed: (with full attention, with causal attention).

    The first counts every pair of positions, as most published MFU figures do. The second counts
    half of them: those that the causal mask leaves. The embedding is a look-up and counts nothing.
    """
    head = model.hidden_size * model.vocab_size
    products = 6.0 * (model.num_layers * model.block_weights + head)
    attention = 12.0 * model.num_layers * model.hidden_size * context_length
    return products + attention, products + attention / 2


def causal_attention_flops(
    shape: Sequence[int], products: int, *, heads_first: bool = False, exact: bool = False
) -> float:
    """FLOPs of `products` matrix products of causal attention over [..., T, N, H].

    Half of the T x T square is counted, as for MFU; exact: the T (T + 1) / 2 pairs that the mask
    leaves, for the peak of a kernel. heads_first: the shape is [..., N, T, H].
    """
    length = shape[-2] if heads_first else shape[-3]
    return products * 2.0 * math.prod(shape) * (length + 1 if exact else length) / 2
