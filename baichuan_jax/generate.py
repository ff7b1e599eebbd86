"""Continue texts with a trained model: one pass over the prompts, then a compiled loop over tokens.

`python -m baichuan_jax.generate --checkpoint RUN --prompt TEXT`

Prompts [B, T] go in; prompts and continuations [B, T + n] come out. The prompts run through the
model once and leave keys and values in a cache of S positions. A while loop on the device then
takes one token of every row, writes it into the cache and computes the logits of the next, until
all rows have reached EOS. Lengths are rounded up, so that most calls find compiled code.

B batch, T prompt length, S cache length, V vocabulary.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from baichuan_jax.config.files import add_mesh_options, mesh_config
from baichuan_jax.config.parsing import given_text
from baichuan_jax.config.schema import (
    MOST_SEED,
    ConfigError,
    MeshConfig,
    at_least,
    between,
    require,
    require_computable,
)
from baichuan_jax.hardware.devices import device_bytes, require_devices
from baichuan_jax.hf.source import find_tokenizer, read_source
from baichuan_jax.hf.weights import load_model
from baichuan_jax.model import Cache, Transformer, init_cache, matmul_precision, positions_of
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.runs.console import shown_text
from baichuan_jax.sharding import make_mesh
from baichuan_jax.tokenizer import EOS, Tokenizer

# Prompts and continuations are padded to multiples of it. Smaller, more calls would compile;
# larger, short prompts would pay for padding.
LENGTH_STEP = 64
STREAMED_TOKENS = 8  # between two calls of on_tokens; each costs a transfer from the device


class Sampling(NamedTuple):
    """How the next token is drawn. temperature 0: the most likely one."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array


class Ids(NamedTuple):
    """Which ids there are: `count` from 0 on may be drawn, `eos` ends a row, `pad` fills it."""

    count: jax.Array
    eos: jax.Array
    pad: jax.Array


class Speed(NamedTuple):
    """Seconds of one call without compilation, and tokens of all rows without padding."""

    prompt_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float


class _Loop(NamedTuple):
    """What the decoding loop carries from token to token."""

    cache: Cache
    tokens_BS: jax.Array
    # Of the next token.
    logits_BV: jax.Array
    # Tokens of the prompt and the continuation so far, for the repetition penalty.
    seen_BV: jax.Array
    # Which rows have reached EOS.
    done_B: jax.Array
    key: jax.Array


class Generator:
    """Generation with one model; `speed` is that of the last call.

    It compiles once for each number of prompts and each pair of their length and max_new_tokens,
    both rounded up to multiples of LENGTH_STEP.
    """

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self._graphdef, state = nnx.split(model)
        # Kept apart from the graph definition: arguments of the compiled functions, or XLA would
        # hold every weight as a constant.
        self._params = nnx.to_pure_dict(state)
        self.speed: Speed | None = None
        self._compiled: dict[tuple[int, int, int], jax.stages.Compiled] = {}
        self._prefill = jax.jit(self._run_prefill, static_argnames="length")
        # The loop's cache is donated: without that, two caches would have to fit.
        self._decode = jax.jit(self._run_decode, donate_argnums=1, static_argnames="greedy")

    def generate_tokens(
        self,
        tokens_BT: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        eos_id: int = EOS,
        vocab_size: int | None = None,
        on_tokens: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Prompts [B, T] and their continuations: [B, T + n], n <= max_new_tokens.

        n is smaller where all rows have reached EOS; after it a row holds the model's pad_token_id,
        or EOS where it has none. Prompts of unequal length are padded on the left, with
        attention_mask [B, T] 0 there. temperature 0 takes the most likely token; top_k 0 and top_p
        1 leave all. repetition_penalty divides positive logits of tokens seen so far and multiplies
        negative ones. vocab_size: the tokenizer's pieces, where the model has more rows; ids from
        it on are not drawn. on_tokens is called with [B, n] new tokens as they come. Raises
        ConfigError for a wrong argument.
        """
        tokens_BT, mask_BT = _checked(tokens_BT, attention_mask, self.config.vocab_size)
        _check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        sampling = Sampling(
            jnp.float32(temperature),
            # Arrays, not constants: other values find the same compiled code.
            jnp.int32(min(top_k or self.config.vocab_size, self.config.vocab_size)),
            jnp.float32(top_p),
            jnp.float32(repetition_penalty),
        )
        # transformers fills with EOS too where a model has no padding token.
        pad_id = eos_id if self.config.pad_token_id is None else self.config.pad_token_id
        ids = Ids(
            jnp.int32(vocab_size or self.config.vocab_size),
            # No token has the id -1, so nothing stops the loop.
            jnp.int32(eos_id if stop_at_eos else -1),
            jnp.int32(pad_id),
        )
        start = _round_up(tokens_BT.shape[1])

        def decode(loop: _Loop, count: int) -> _Loop:
            """Up to `count` new tokens in all."""
            goal = jnp.int32(start + count)
            return self._decode(self._params, loop, goal, ids, sampling, greedy=temperature == 0)

        loop, prefill_seconds = self._start(tokens_BT, mask_BT, max_new_tokens, seed)
        # No token: this call compiles, so that the time below is of decoding alone.
        loop = jax.block_until_ready(decode(loop, 0))
        ready = time.perf_counter()
        loop, made = _finish(loop, decode, start, max_new_tokens, on_tokens)
        seconds = time.perf_counter() - ready
        self.speed = Speed(int(mask_BT.sum()), prefill_seconds, len(tokens_BT) * made, seconds)
        new_BN = np.asarray(loop.tokens_BS)[:, start : start + made]
        return np.concatenate([tokens_BT, new_BN], axis=1)

    def generate(
        self,
        tokenizer: Tokenizer,
        prompts: list[str],
        max_new_tokens: int,
        *,
        on_text: Callable[[str], None] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Continuations of texts, without the prompts; **sampling: as in generate_tokens.

        on_text gets the first prompt's continuation piece by piece as it comes.
        """
        encoded = encode_prompts(tokenizer, prompts)
        # Padded on the left: all rows continue at the same position. Any token serves, since the
        # mask hides it.
        T = max(len(ids) for ids in encoded)
        tokens = np.array([[0] * (T - len(ids)) + ids for ids in encoded])
        mask = np.array([[0] * (T - len(ids)) + [1] * len(ids) for ids in encoded])
        stream = None if on_text is None else _Stream(tokenizer, encoded[0], on_text)
        out = self.generate_tokens(
            tokens,
            max_new_tokens,
            attention_mask=mask,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            on_tokens=stream,
            **sampling,
        )
        return [
            _continuation(tokenizer, ids, row[T:])
            for ids, row in zip(encoded, out.tolist(), strict=True)
        ]

    def _start(
        self, tokens_BT: np.ndarray, mask_BT: np.ndarray, max_new_tokens: int, seed: int
    ) -> tuple[_Loop, float]:
        """The loop after the prompts, and the seconds that they took without compilation."""
        B, T = tokens_BT.shape
        start = _round_up(T)
        length = start + _round_up(max_new_tokens)
        self._require_room(B, length)
        pad = ((0, 0), (start - T, 0))  # on the left, so that all rows continue at `start`
        prompt, real = np.pad(tokens_BT, pad), np.pad(mask_BT, pad)
        arguments = (self._params, prompt, real, jax.random.key(seed))
        if (B, start, length) not in self._compiled:
            # Compiled apart from the run, which is timed.
            lowered = self._prefill.lower(*arguments, length=length)
            self._compiled[B, start, length] = lowered.compile()
        began = time.perf_counter()
        loop = jax.block_until_ready(self._compiled[B, start, length](*arguments))
        return loop, time.perf_counter() - began

    def _require_room(self, prompts: int, length: int) -> None:
        """Refuse what the devices cannot hold: keys and values of every position and block."""
        model = self.config
        itemsize = 2 if model.dtype == "bfloat16" else 4
        cache = 2 * itemsize * prompts * length * model.num_layers * model.hidden_size
        there = device_bytes(jax.local_devices()[0]) * jax.device_count()
        require(
            cache <= there,
            f"max_new_tokens: the keys and values of {prompts} x {length} positions need "
            f"{cache / 2**30:,.1f} GiB, and the devices have {there / 2**30:,.1f} in all",
        )

    def _run_prefill(self, params, tokens_BT, mask_BT, key, *, length: int) -> _Loop:
        """Run the prompts into a cache of `length` positions."""
        B, T = tokens_BT.shape
        S = length
        mask_BS = jnp.concatenate([mask_BT, jnp.ones((B, S - T), bool)], axis=1)
        model = nnx.merge(self._graphdef, params)
        with matmul_precision(self.config):
            hidden_BTD, cache = model.extend(
                tokens_BT, init_cache(self.config, mask_BS), positions_of(mask_BT)
            )
            # Only the last position's logits are needed: the head is the largest matrix.
            logits_BV = model.head(hidden_BTD[:, -1])
        seen_BV = jnp.zeros((B, self.config.vocab_size), bool)
        # max and not set: padding has a token id too, and must not mark it as seen.
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(mask_BT)
        tokens_BS = jnp.concatenate([tokens_BT, jnp.zeros((B, S - T), jnp.int32)], axis=1)
        return _Loop(cache, tokens_BS, logits_BV, seen_BV, jnp.zeros(B, bool), key)

    def _run_decode(
        self, params, loop: _Loop, goal, ids: Ids, sampling: Sampling, *, greedy: bool
    ) -> _Loop:
        """Tokens up to position `goal`, or until every row has reached EOS."""
        model = nnx.merge(self._graphdef, params)

        def going(loop: _Loop) -> jax.Array:
            return (loop.cache.length < goal) & ~loop.done_B.all()

        def step(loop: _Loop) -> _Loop:
            key, draw = jax.random.split(loop.key)
            logits_BV = _penalise(loop.logits_BV, loop.seen_BV, sampling.repetition_penalty)
            # Rows of the head without a piece (a vocabulary padded for the mesh) have logits too.
            logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < ids.count, logits_BV, -jnp.inf)
            token_B = jnp.argmax(logits_BV, axis=-1) if greedy else _draw(draw, logits_BV, sampling)
            # Rows that are done go on, and write padding, until all are.
            token_B = jnp.where(loop.done_B, ids.pad, token_B).astype(jnp.int32)
            place = loop.cache.length
            tokens_BS = jax.lax.dynamic_update_slice_in_dim(
                loop.tokens_BS, token_B[:, None], place, 1
            )
            # Positions count real tokens, places in the cache count padding too.
            position_B1 = (jnp.cumsum(loop.cache.mask_BS, axis=1) - 1)[:, place][:, None]
            hidden_B1D, cache = model.extend(token_B[:, None], loop.cache, position_B1)
            seen_BV = loop.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
            done_B = loop.done_B | (token_B == ids.eos)
            return _Loop(cache, tokens_BS, model.head(hidden_B1D[:, -1]), seen_BV, done_B, key)

        with matmul_precision(self.config):
            return jax.lax.while_loop(going, step, loop)


def _finish(
    loop: _Loop,
    decode: Callable[[_Loop, int], _Loop],
    start: int,
    max_new_tokens: int,
    on_tokens: Callable[[np.ndarray], None] | None,
) -> tuple[_Loop, int]:
    """Decode until the last token or until all rows are done; the loop, and how many it made."""
    # Without a reader the device runs to the end by itself; with one it returns every few tokens.
    chunk = STREAMED_TOKENS if on_tokens is not None else max_new_tokens
    made = 0
    while made < max_new_tokens and not (made and bool(loop.done_B.all())):
        loop = decode(loop, min(made + chunk, max_new_tokens))
        reached = int(loop.cache.length) - start
        if on_tokens is not None:
            on_tokens(np.asarray(loop.tokens_BS[:, start + made : start + reached]))
        made = reached
    return loop, made


def encode_prompts(tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """The token ids of prompts. Raises ConfigError where there is no prompt, or one has none."""
    if not prompts:
        raise ConfigError("there is no prompt; give some text to continue")
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ConfigError(
                f"the prompt {prompt!r} is empty, or the tokenizer makes no token of it; give some "
                "text to continue"
            )
    return encoded


def add_model_options(parser: argparse.ArgumentParser, mesh: MeshConfig) -> None:
    """Add --checkpoint, --tokenizer, --dtype and --mesh.*, for a command that runs a model."""
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder, one of its checkpoints, or a Hugging Face folder",
    )
    add(
        "--tokenizer",
        metavar="FILE",
        help="a SentencePiece model, where the checkpoint has none beside it",
    )
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation")
    add_mesh_options(parser, mesh)


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(argv)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    sampling = {name: getattr(options, name) for name in names}
    # Checked before the model is loaded, which may take minutes.
    _check_sampling(options.max_new_tokens, **sampling)
    mesh_shape = mesh_config(options)
    # A shell passes \n as two characters.
    prompt = given_text(options.prompt, "--prompt").replace("\\n", "\n")
    require_devices()
    # Once: of a run that still trains, everything below is of the checkpoint that is newest now.
    source = read_source(options.checkpoint)
    if str(source.path) != options.checkpoint:
        say(f"checkpoint: {source.path}")
    tokenizer = find_tokenizer(source, options.tokenizer)
    for warning in tokenizer.warnings:
        say(warning)
    encode_prompts(tokenizer, [prompt])
    # One device needs no mesh, and compiles faster without.
    mesh = None if mesh_shape == MeshConfig(data=1) else make_mesh(mesh_shape)
    generator = Generator(load_model(source, options.dtype, mesh))
    print(shown_text(prompt), end="", flush=True)
    generator.generate(
        tokenizer,
        [prompt],
        options.max_new_tokens,
        **sampling,
        seed=options.seed,
        on_text=lambda piece: print(shown_text(piece), end="", flush=True),
    )
    print()
    assert generator.speed is not None
    prompt_tokens, prefill_seconds, new_tokens, decode_seconds = generator.speed
    # On stderr, so that stdout holds the text alone.
    print(
        f"prefill: {prompt_tokens} tokens, {prompt_tokens / prefill_seconds:,.1f} tokens/s; "
        f"decode: {new_tokens} tokens, {new_tokens / decode_seconds:,.1f} tokens/s "
        "(compilation left out)",
        file=sys.stderr,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.generate",
        description="Continue a text. Example: --checkpoint runs/tiny "
        "--prompt '登鹳雀楼->王之涣\\n夜雨寄北->' --max_new_tokens 64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", required=True, help="the text to continue; \\n in it is a new line")
    add("--max_new_tokens", type=at_least(1), default=64, help="length of the continuation")
    add("--temperature", type=between(0), default=0.8, help="0: always the most likely token")
    add(
        "--top_k",
        type=at_least(0),
        default=0,
        help="draw from this many most likely tokens; 0: from all",
    )
    top_p = "draw from the fewest tokens that hold this probability"
    add("--top_p", type=between(), default=0.9, help=top_p)
    penalty = "above 1: seen tokens become less likely"
    add("--repetition_penalty", type=between(), default=1.0, help=penalty)
    add("--seed", type=at_least(0, MOST_SEED), default=0, help="of the draws")
    add_model_options(parser, MeshConfig(data=1))
    return parser


def _round_up(length: int) -> int:
    return length + -length % LENGTH_STEP


def _checked(tokens: Any, mask: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [B, T] as arrays.

    Raises ConfigError for tokens of another vocabulary and masks that are not padded on the left.
    """
    tokens_BT = np.asarray(tokens, np.int32)
    shape = tokens_BT.shape
    mask_BT = (np.ones(shape) if mask is None else np.asarray(mask)).astype(bool)
    if tokens_BT.ndim != 2 or 0 in shape:
        raise ConfigError(f"tokens {shape} must be [prompts, length], neither of them 0")
    if tokens_BT.min() < 0 or tokens_BT.max() >= vocab_size:
        raise ConfigError(
            f"tokens {tokens_BT.min()} to {tokens_BT.max()} must lie in [0, {vocab_size}): "
            "they are not of this model's tokenizer"
        )
    left = mask_BT.shape == shape and (np.diff(mask_BT.astype(int), axis=1) >= 0).all()
    if not (left and mask_BT[:, -1].all()):
        raise ConfigError(
            f"attention_mask {mask_BT.shape} must be {shape} and padded on the left: "
            "the last token of every prompt is real"
        )
    return tokens_BT, mask_BT


def _check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> None:
    for name, value, holds, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        (
            "temperature",
            temperature,
            0 <= temperature < math.inf,
            "0 (the most likely token) or more",
        ),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        (
            "repetition_penalty",
            repetition_penalty,
            0 < repetition_penalty < math.inf,
            "greater than 0",
        ),
    ):
        require(holds, f"{name}={value} must be {expected}")
        require_computable(name, value)


def _penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Lower the logits of seen tokens (CTRL, Keskar et al. 2019), as transformers does."""
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def _draw(key: jax.Array, logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw from the top_k most likely tokens, and of those from the fewest that hold top_p.

    top_p is a share of the probability (nucleus sampling, Holtzman et al. 2020), taken after top_k.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / sampling.temperature
    sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < sampling.top_k, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # What comes before a token: so the first one is always kept, however small top_p is.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    sorted_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
    # -inf is never drawn.
    choice_B = jax.random.categorical(key, sorted_BV, axis=-1)
    return jnp.take_along_axis(order_BV, choice_B[:, None], axis=-1)[:, 0]


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text of the new tokens up to EOS."""
    if tokenizer.eos_id in new:
        new = new[: new.index(tokenizer.eos_id)]
    # Decoded with the prompt, since SentencePiece strips the space before a text's first piece.
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


class _Stream:
    """Turns new tokens into text as they come; holds back what may be half a character."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], on_text: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._prompt, self._on_text = tokenizer, prompt, on_text
        self._new: list[int] = []
        self._printed = 0

    def __call__(self, tokens_BN: np.ndarray) -> None:
        self._new += tokens_BN[0].tolist()
        # A character of several byte pieces decodes to U+FFFD until the last of them is there.
        text = _continuation(self._tokenizer, self._prompt, self._new).rstrip("\ufffd")
        self._on_text(text[self._printed :])
        self._printed = len(text)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
