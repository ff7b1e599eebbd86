"""The Baichuan-7B decoder in flax.nnx: LLaMA's design with Q, K and V packed into one matrix.

Tokens [B, T] go in; states [B, T, D] after the final norm come out, and `head` turns them into
logits. A block is pre-norm: RMSNorm (Zhang and Sennrich 2019), causal attention with rotary
positions (RoPE, Su et al. 2021), a residual sum, RMSNorm, SwiGLU (Shazeer 2020), a residual sum.
There are no biases and no dropout. It follows modeling_baichuan.py of baichuan-inc/Baichuan-7B.

The parameters of all blocks are stacked along a leading axis, so that one compiled block is scanned
over them. Parameters and activations carry the names of their logical axes ("embed", "heads", ...;
see sharding.RULES). This file names no mesh and no device; on a single one the names do nothing.

B batch, T query length, S key length, D hidden, F intermediate, N heads, H head size, V vocabulary,
L layers, C the three of Q, K and V.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from baichuan_jax.config.schema import KernelsConfig, ModelConfig
from baichuan_jax.kernels.attention.api import attention
from baichuan_jax.kernels.attention.reference import (
    masked_attention,
    prefix_attention,
    turned_parts,
)
from baichuan_jax.kernels.rms_norm.api import rms_norm
from baichuan_jax.sharding import constrain, current_layout, is_split

# A nested dict of arrays. jax transforms, the optimiser and checkpoints take it as it is; a module
# is merged from it inside a traced function.
Params = dict[str, Any]

# Kernels are chosen by device and sizes, where a caller names none.
_AUTO = KernelsConfig()


class Exchange(NamedTuple):
    """Where a training step exchanges weights and gradients with other devices (exchange.py).

    `arrive` and `hold` return what they are given; they act in the backward pass. By default
    nothing is exchanged.
    """

    arrive: Callable[[Params, Params | None], Params] = lambda weights, added: weights
    """(weights, added) -> weights, whose gradients are summed over devices, with `added`."""
    hold: Callable[[jax.Array, Params, bool], tuple[jax.Array, Params]] = (
        lambda x, weights, summed: (x, weights)
    )
    """(x, weights, summed) -> both; x's gradient waits for those of the weights. summed: given
    before `arrive`, the weights' are summed over replicas already."""
    added: Params | None = None
    """For `arrive`, in the places of the model's parameters."""


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    The first `length` of S positions are filled; `mask_BS` is False at padding among them.
    """

    k_LBSNH: jax.Array
    v_LBSNH: jax.Array
    mask_BS: jax.Array
    length: jax.Array


class Block(nnx.Module):
    """A pre-norm block; as Transformer.layers its parameters are those of all blocks [L, ...]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kernels: KernelsConfig) -> None:
        self.config, self.kernels = config, kernels
        L, D, F = config.num_layers, config.hidden_size, config.intermediate_size
        N, H = config.num_heads, config.head_dim
        matrix = functools.partial(_matrix, rngs, config)
        # Weights of norms are split by nothing: they are small, and every device needs all of them.
        self.attention_norm = _scale((L, D), ("layers", "norm"))
        # Q, K and V have an axis of their own. Packed into one axis [D, 3 * N * H], as the original
        # stores them, a split of that axis would put parts of Q where K belongs.
        self.w_pack = matrix((L, D, 3, N, H), ("layers", "embed", "qkv", "heads", "head_dim"))
        self.w_out = matrix((L, N, H, D), ("layers", "heads", "head_dim", "embed"))
        self.mlp_norm = _scale((L, D), ("layers", "norm"))
        self.w_gate = matrix((L, D, F), ("layers", "embed", "mlp"))
        self.w_up = matrix((L, D, F), ("layers", "embed", "mlp"))
        self.w_down = matrix((L, F, D), ("layers", "mlp", "embed"))

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        cache: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None = None,
        prefix: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """The residual stream after this block, and the cache's keys and values where there is one.

        cache: (k_BSNH, v_BSNH, mask_BTS, start); new keys and values are written at `start`.
        prefix: (k_SNH, v_SNH, mask_S) of tokens that come before every row.
        """
        norm = functools.partial(
            rms_norm, eps=self.config.rms_norm_eps, implementation=self.kernels.rms_norm
        )
        # x is passed on: its gradient from here on is added inside this norm's backward kernel.
        y_BTD, x_BTD = norm(x_BTD, self.attention_norm[...], pass_on=True)
        attended_BTD, written = self._attend(y_BTD, rope, segment_ids, cache, prefix)
        # One kernel adds the residual and norms the sum: it is read and written once.
        y_BTD, x_BTD = norm(attended_BTD, self.mlp_norm[...], residual=x_BTD)
        x_BTD = x_BTD + self._swiglu(y_BTD)
        return constrain(x_BTD, "batch", "length", "hidden"), written

    def _attend(self, y_BTD, rope, segment_ids, cache, prefix):
        """Attention over these tokens alone, over the cache with them in it, or after a prefix."""
        qkv_BTCNH = _project(y_BTD, self.w_pack[...])
        qkv_BTCNH = constrain(qkv_BTCNH, "batch", "length", "qkv", "heads", None)
        written = None
        if prefix is not None:
            out_BTNH = prefix_attention(*turned_parts(qkv_BTCNH, rope), *prefix)
        elif cache is None:
            out_BTNH = attention(
                qkv_BTCNH, rope, segment_ids=segment_ids, implementation=self.kernels.attention
            )
        else:
            k_BSNH, v_BSNH, mask_BTS, start = cache
            q_BTNH, k_BTNH, v_BTNH = turned_parts(qkv_BTCNH, rope)
            k_BSNH = jax.lax.dynamic_update_slice_in_dim(k_BSNH, k_BTNH, start, 1)
            v_BSNH = jax.lax.dynamic_update_slice_in_dim(v_BSNH, v_BTNH, start, 1)
            written = (k_BSNH, v_BSNH)
            out_BTNH = masked_attention(q_BTNH, k_BSNH, v_BSNH, mask_BTS)
        out_BTD = _project(out_BTNH, self.w_out[...], contracted=2)
        return constrain(out_BTD, "batch", "length", "hidden"), written

    def _swiglu(self, y_BTD: jax.Array) -> jax.Array:
        """silu(y @ gate) * (y @ up) @ down."""
        gate_BTF = _project(y_BTD, self.w_gate[...])
        gate_BTF = constrain(gate_BTF, "batch", "length", "mlp")
        up_BTF = _project(y_BTD, self.w_up[...])
        up_BTF = constrain(up_BTF, "batch", "length", "mlp")
        return _project(jax.nn.silu(gate_BTF) * up_BTF, self.w_down[...])


class Transformer(nnx.Module):
    """The whole model: embedding, blocks, final norm, untied head.

    Parameters are float32. Activations and the weights of products are config.dtype.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kernels: KernelsConfig = _AUTO) -> None:
        self.config, self.kernels = config, kernels
        V, D = config.vocab_size, config.hidden_size
        self.embedding = _matrix(rngs, config, (V, D), ("vocab", "embed"))
        self.layers = Block(config, rngs, kernels)
        self.final_norm = _scale((D,), ("norm",))
        # Not tied to the embedding, as in the original.
        self.lm_head = _matrix(rngs, config, (D, V), ("embed", "vocab"))

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """States [B, T, D] after the final norm; scoring calls it.

        segment_ids [B, T]: tokens attend within equal ids only. positions [B, T]: of the rotary
        embedding; by default 0, 1, ...
        """
        layers = nnx.state(self.layers)
        return self.hidden_and_head(tokens_BT, layers, Exchange(), segment_ids, positions)[0]

    def hidden_and_head(
        self,
        tokens_BT: jax.Array,
        layers: Any,
        exchange: Exchange,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """`hidden`, the head's kernel [D, V] for the loss, and `layers`; training calls it.

        layers: the blocks' parameters, as stacks [L, ...], or with scan_layers false also as a list
        of blocks. Those that are returned have arrived.
        """
        config = self.config
        rope = self._rope(jnp.arange(tokens_BT.shape[1])[None] if positions is None else positions)
        # scan takes arrays: the parameters are split off, and each iteration merges one layer's
        # with the graph definition, which is the same for all.
        graphdef, _ = nnx.split(self.layers)

        def body(x_BTD, layer):
            return nnx.merge(graphdef, layer)(x_BTD, rope, segment_ids)

        x_BTD, body = self._embed(tokens_BT), _remat(body, config.remat)
        added = exchange.added or dict.fromkeys(("layers", "lm_head"))
        head = {"lm_head": self.lm_head[...]}
        if config.scan_layers:
            turn = lambda x_BTD, layer: body(x_BTD, exchange.arrive(*layer))
            x_BTD, _ = jax.lax.scan(turn, x_BTD, (layers, added["layers"]))
        else:
            blocks = (
                separate(layers, config.num_layers),
                separate(added["layers"], config.num_layers),
            )
            x_BTD, head, layers = _unrolled(body, x_BTD, *blocks, head, exchange)
        head = exchange.arrive(head, {"lm_head": added["lm_head"]})
        return self._final_norm(x_BTD), head["lm_head"], layers

    def extend(
        self, tokens_BT: jax.Array, cache: Cache, positions: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """States [B, T, D] of tokens that follow the cache's, and the cache with them in it."""
        T, S = tokens_BT.shape[1], cache.mask_BS.shape[1]
        rope = self._rope(positions)
        # Causal by place in the cache, not by position: places count padding, positions do not.
        causal_TS = jnp.arange(S) <= (cache.length + jnp.arange(T))[:, None]
        mask_BTS = causal_TS & cache.mask_BS[:, None, :]
        graphdef, layers = nnx.split(self.layers)

        def body(x_BTD, xs):
            layer, k_BSNH, v_BSNH = xs
            return nnx.merge(graphdef, layer)(
                x_BTD, rope, None, (k_BSNH, v_BSNH, mask_BTS, cache.length)
            )

        x_BTD, written = jax.lax.scan(
            body, self._embed(tokens_BT), (layers, cache.k_LBSNH, cache.v_LBSNH)
        )
        k_LBSNH, v_LBSNH = cast(tuple[jax.Array, jax.Array], written)
        return self._final_norm(x_BTD), Cache(k_LBSNH, v_LBSNH, cache.mask_BS, cache.length + T)

    def hidden_after(self, tokens_BT: jax.Array, prefix: Cache) -> jax.Array:
        """States [B, T, D] of rows that each follow the same prefix, a cache of one row.

        All rows read the prefix's keys and values; none copies them, and the prefix stays as it is.
        Padding goes to the right, where no real token attends to it.
        """
        rope = self._rope(prefix.length + jnp.arange(tokens_BT.shape[1])[None])
        mask_S = prefix.mask_BS[0] & (jnp.arange(prefix.mask_BS.shape[1]) < prefix.length)
        graphdef, layers = nnx.split(self.layers)

        def body(x_BTD, xs):
            layer, k_SNH, v_SNH = xs
            return nnx.merge(graphdef, layer)(x_BTD, rope, None, prefix=(k_SNH, v_SNH, mask_S))

        x_BTD, _ = jax.lax.scan(
            body, self._embed(tokens_BT), (layers, prefix.k_LBSNH[:, 0], prefix.v_LBSNH[:, 0])
        )
        return self._final_norm(x_BTD)

    def head(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32, whatever dtype the states have."""
        kernel_DV = self.lm_head[...].astype(hidden_BTD.dtype)
        return jnp.matmul(hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)

    def __call__(self, tokens_BT: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, V] in float32. attention_mask [B, T]: 1 real, 0 padding, on either side.

        Positions count real tokens only, as in the original's generation. The logits at padding
        mean nothing.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        segment_ids = positions = None
        if attention_mask is not None:
            segment_ids = jnp.asarray(attention_mask, jnp.int32)
            positions = positions_of(segment_ids)
        with matmul_precision(self.config):
            return self.head(self.hidden(tokens_BT, segment_ids=segment_ids, positions=positions))

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        # The table is split along `embed`. Each device looks up its columns for the rows of its
        # whole group, and one all-to-all turns columns into rows. So a group exchanges the
        # activations of its rows; gathering the table would move V rows instead.
        tokens_BT = constrain(tokens_BT, "group", "length")
        # Looked up in float32, then cast: so the gradient's scatter-add is float32 too. In bfloat16
        # it is slow, and sums of a frequent token's gradients lose bits.
        x_BTD = jnp.take(self.embedding[...], tokens_BT, axis=0)
        if self.config.pad_token_id is not None:
            padding = (tokens_BT == self.config.pad_token_id)[..., None]
            # torch's padding_idx: the row is used, and learns nothing.
            x_BTD = jnp.where(padding, jax.lax.stop_gradient(x_BTD), x_BTD)
        # The two constraints are the two sides of the all-to-all.
        x_BTD = constrain(x_BTD.astype(self.config.dtype), "group", "length", "embed")
        return constrain(x_BTD, "batch", "length", "hidden")

    def _rope(self, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope_tables(positions_BT, self.config.head_dim, self.config.rope_theta)

    def _final_norm(self, x_BTD: jax.Array) -> jax.Array:
        weight_D = self.final_norm[...]
        return rms_norm(
            x_BTD, weight_D, eps=self.config.rms_norm_eps, implementation=self.kernels.rms_norm
        )


def abstract_model(
    config: ModelConfig, kernels: KernelsConfig = _AUTO
) -> tuple[nnx.GraphDef, Params, dict]:
    """The model without numbers: (graph definition, shapes, logical axes) as nested dicts."""
    # eval_shape: nothing is allocated, so a 7B model costs no memory here.
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0), kernels))
    graphdef, state = nnx.split(model)
    axes = {path: variable.get_metadata()["axes"] for path, variable in nnx.to_flat_state(state)}
    return graphdef, nnx.to_pure_dict(state), nnx.traversals.unflatten_mapping(axes)


def init_params(config: ModelConfig, seed: int | jax.Array) -> Params:
    """Fresh float32 parameters as a nested dict.

    Under jit with out_shardings every device makes its own part, and none ever holds the whole.
    """
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=seed)), nnx.Param))


def init_cache(config: ModelConfig, mask_BS: jax.Array) -> Cache:
    """An empty cache for mask_BS.shape[1] positions."""
    B, S = mask_BS.shape
    shape = (config.num_layers, B, S, config.num_heads, config.head_dim)
    return Cache(
        jnp.zeros(shape, config.dtype),
        jnp.zeros(shape, config.dtype),
        mask_BS.astype(bool),
        # An array and not an int: the program is the same for every length.
        jnp.int32(0),
    )


def positions_of(mask_BT: jax.Array) -> jax.Array:
    """Positions [B, T] int32 that count real tokens only; padding has 1, as in the original."""
    positions_BT = jnp.cumsum(mask_BT.astype(jnp.int32), axis=1) - 1
    return jnp.where(mask_BT.astype(bool), positions_BT, 1)


def matmul_precision(config: ModelConfig):
    """Context for tracing: float32 models multiply in float32.

    By default a backend may round the operands of a float32 product: to TF32 on GPUs, to bfloat16
    on TPUs.
    """
    return jax.default_matmul_precision("float32" if config.dtype == "float32" else "default")


def rope_tables(
    positions_BT: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] of the rotary embedding in float32, at any position.

    Channel pair i turns by position * theta^(-2i/H). Computed from the positions, not looked up in
    a table of fixed length, so that a text may be longer than the rows of training.
    """
    # float32 throughout, in the original's order of operations: another order differs in the last
    # bit, and positions in the thousands make that visible.
    frequencies = np.float32(1) / np.float32(theta) ** (
        np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    )
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _matrix(
    rngs: nnx.Rngs, config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...]
) -> nnx.Param:
    value = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def _scale(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)


def _project(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """x [B, T, ...] times a weight in x's type, over x's last `contracted` axes."""
    layout = current_layout()
    wide = layout is not None and layout.sum_dtype == "float32" and x.dtype != jnp.float32
    product: Any = _with_wide_gradient if wide else _product
    if is_split("length"):
        return product(x, weight, contracted)
    # B and T are merged, so that the weight's gradient is one plain matrix product. Contracting two
    # axes, XLA's CPU backend would first copy both operands into another order: a third of the
    # SwiGLU's time. A split length cannot be merged with the batch without moving data.
    rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    result = product(rows, weight, contracted)
    return result.reshape(*x.shape[:2], *weight.shape[contracted:])


def _product(x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    return jnp.tensordot(x, weight.astype(x.dtype), contracted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_wide_gradient(x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    """_product, whose weight's gradient is not rounded to x's type: it is summed in float32."""
    return _product(x, weight, contracted)


def _wide_backward(contracted, saved, dy):
    x, weight = saved
    (dx,) = jax.vjp(lambda x: _product(x, weight, contracted), x)[1](dy)
    outer = tuple(range(x.ndim - contracted))
    wide = functools.partial(jnp.tensordot, axes=(outer, outer), preferred_element_type=jnp.float32)
    # XLA's CPU backend cannot multiply into float32 where the second operand has several free axes.
    dweight = jnp.moveaxis(wide(dy, x), -1, 0) if contracted == 1 else wide(x, dy)
    return dx, dweight.astype(weight.dtype)


_with_wide_gradient.defvjp(
    lambda x, weight, contracted: (_product(x, weight, contracted), (x, weight)), _wide_backward
)


def _remat(body, policy: str):
    """The block with its rematerialisation policy: which values the backward pass recomputes."""
    if policy == "none":
        return body
    saveable = {
        # Products of activations and weights are kept. Products with batch dimensions (attention's
        # scores) and elementwise values are recomputed: they cost much memory and little time.
        "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        # Only the block's input is kept: a second forward pass, a third more FLOPs.
        "full": jax.checkpoint_policies.nothing_saveable,
    }[policy]
    # prevent_cse keeps XLA from merging the recomputation with the forward pass, by barriers that
    # block fusions too. Inside scan the two are in different loops anyway. Unrolled, XLA merges
    # those of the last block alone, where nothing is computed in between.
    return jax.checkpoint(body, policy=saveable, prevent_cse=False)


def separate(stacks: Any, count: int) -> list[Any]:
    """Stacks [L, ...] of `count` blocks as a list of blocks; a list is returned as it is."""
    if isinstance(stacks, list):
        return stacks
    return [jax.tree.map(lambda stack, i=i: stack[i], stacks) for i in range(count)]


def _unrolled(
    body, x_BTD: jax.Array, layers: list, added: list, head: Params, exchange: Exchange
) -> tuple[jax.Array, Params, list]:
    """Apply the blocks one after the other, where scan would loop over one of them.

    No stack of saved activations is written, and XLA optimises across blocks; compilation takes
    longer. Left free, XLA's scheduler computes many weights' gradients and sums them after the last
    block, where no compute hides the sums. So in the backward pass a block waits until the
    gradients of the second block after it are there, and those of the third are summed. Returns x,
    the head and the blocks' weights as they arrived.
    """
    count, layers = len(layers), list(layers)
    arrived = [exchange.arrive(layers[0], added[0])]
    for i in range(count):
        # In the backward pass the block before this one waits for what x is held with here.
        if i + 1 < count:
            following = exchange.arrive(layers[i + 1], added[i + 1])
            x_BTD, following = exchange.hold(x_BTD, following, False)
            arrived.append(following)
        if i + 2 < count:
            x_BTD, layers[i + 2] = exchange.hold(x_BTD, layers[i + 2], True)
        # The head's gradient is ready first, and larger than a block's.
        if i == max(count - 2, 0):
            x_BTD, head = exchange.hold(x_BTD, head, True)
        x_BTD, _ = body(x_BTD, arrived[i])
    return x_BTD, head, arrived
