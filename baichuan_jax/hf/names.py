"""Names and layouts: which tensors of a Hugging Face folder make each array of the model.

Names and layouts are those of modeling_baichuan.py (baichuan-inc/Baichuan-7B): torch keeps a matrix
as [out, in] where the model has [in, out], and W_pack stacks Q, K and V. transformers' Llama has
the same names, but q_proj, k_proj and v_proj instead of W_pack.

D hidden, F intermediate, N heads, H head size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from baichuan_jax.config.schema import ModelConfig

Join = Callable[[list[np.ndarray]], np.ndarray]
Split = Callable[[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Entry:
    """One array of the model, of one layer where it has layers, and the tensors it comes from."""

    path: tuple[str, ...]
    layer: int | None
    tensors: dict[str, tuple[int, ...]]
    """Their names and shapes."""
    join: Join
    """The array from the tensors, in their order."""
    split: Split
    """The tensors from the array."""


def _keep(tensors: list[np.ndarray]) -> np.ndarray:
    return tensors[0]


def _transpose(tensors: list[np.ndarray]) -> np.ndarray:
    return tensors[0].T


def entries(config: ModelConfig, packed: bool) -> Iterator[Entry]:
    """Every array of a model, in the order of the original's files. packed: W_pack, or q, k, v."""
    # Embedding and norms have the same layout on both sides; every matrix product's is transposed.
    D, V = config.hidden_size, config.vocab_size
    embedding = {"model.embed_tokens.weight": (V, D)}
    yield Entry(("embedding",), None, embedding, _keep, lambda x: [x])
    for layer in range(config.num_layers):
        for name, tensors, join, split in _block(config, packed):
            full = {f"model.layers.{layer}.{key}": shape for key, shape in tensors.items()}
            yield Entry(("layers", name), layer, full, join, split)
    yield Entry(("final_norm",), None, {"model.norm.weight": (D,)}, _keep, lambda x: [x])
    yield Entry(("lm_head",), None, {"lm_head.weight": (V, D)}, _transpose, lambda x: [x.T])


def _block(
    config: ModelConfig, packed: bool
) -> Iterator[tuple[str, dict[str, tuple[int, ...]], Join, Split]]:
    """The arrays of one block: (name, tensors by name without the layer's prefix, join, split)."""
    D, F = config.hidden_size, config.intermediate_size
    N, H = config.num_heads, config.head_dim

    def join_qkv(tensors: list[np.ndarray]) -> np.ndarray:
        # Rows of W_pack are Q, then K, then V, each head after head.
        if packed:
            stacked = tensors[0].reshape(3, N, H, D)
        else:
            stacked = np.stack([tensor.reshape(N, H, D) for tensor in tensors])
        # [3, N, H, D] to [D, 3, N, H]: one product makes Q, K and V of all heads.
        return stacked.transpose(3, 0, 1, 2)

    def split_qkv(x: np.ndarray) -> list[np.ndarray]:
        stacked = x.transpose(1, 2, 3, 0).reshape(3, D, D)
        return [stacked.reshape(3 * D, D)] if packed else list(stacked)

    # The output projection takes the heads' results side by side: heads, then channels.
    def join_out(tensors: list[np.ndarray]) -> np.ndarray:
        return tensors[0].T.reshape(N, H, D)

    def split_out(x: np.ndarray) -> list[np.ndarray]:
        return [x.reshape(D, D).T]

    # The order of the arrays is that of the original's state_dict.
    if packed:
        qkv = {"self_attn.W_pack.weight": (3 * D, D)}
    else:
        qkv = {f"self_attn.{part}_proj.weight": (D, D) for part in "qkv"}
    yield "w_pack", qkv, join_qkv, split_qkv
    yield "w_out", {"self_attn.o_proj.weight": (D, D)}, join_out, split_out
    for part, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        yield f"w_{part}", {f"mlp.{part}_proj.weight": shape}, _transpose, lambda x: [x.T]
    yield "attention_norm", {"input_layernorm.weight": (D,)}, _keep, lambda x: [x]
    yield "mlp_norm", {"post_attention_layernorm.weight": (D,)}, _keep, lambda x: [x]
