"""Continue texts with a trained model: a key-value cache in one compiled loop.

`python -m baichuan_jax.generate --checkpoint RUN --prompt TEXT`

B batch, T prompt length, S cache length, V vocabulary.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from baichuan_jax.config.schema import ConfigError, MeshConfig
from baichuan_jax.hf.weights import load_pretrained, tokenizer_file, trained_with
from baichuan_jax.model import Cache, Transformer, init_cache, matmul_precision, positions_of
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.sharding import add_mesh_options, make_mesh, mesh_config
from baichuan_jax.tokenizer import Tokenizer

LENGTH_STEP = (
    64  # prompts and caches are padded to multiples of it, so that most calls find compiled code
)
EOS = 2


class Sampling(NamedTuple):
    """How the next token is drawn. temperature 0: the most likely one."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array


class Speed(NamedTuple):
    """What one call took, without compilation: tokens of all rows (padding left out), seconds."""

    prompt_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float


class _Loop(NamedTuple):
    cache: Cache
    tokens_BS: jax.Array
    logits_BV: jax.Array
    seen_BV: jax.Array
    done_B: jax.Array
    key: jax.Array


class Generator:
    """Generation with one model; compiles once for each number of prompts and each pair of their length and max_new_tokens, both
    rounded up to multiples of 64. `speed` is that of the last call.
    """

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self._graphdef, state = nnx.split(model)
        self._params = nnx.to_pure_dict(state)
        # transformers fills with EOS where a model has no padding token
        self._pad_id = EOS if model.config.pad_token_id is None else model.config.pad_token_id
        self.speed: Speed | None = None
        self._compiled: dict[tuple[int, int, int], jax.stages.Compiled] = {}
        self._prefill = jax.jit(self._run_prefill, static_argnames="length")
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
        on_tokens: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Prompts [B, T] and their continuations: [B, T + n], n <= max_new_tokens (fewer where all rows reached EOS).

        Prompts of unequal length are padded on the left, with attention_mask [B, T] 0 there. After
        EOS a row holds the model's pad_token_id. temperature 0 takes the most likely token; top_k 0
        and top_p 1 leave all. repetition_penalty follows transformers: logits of tokens seen in
        prompt or continuation are divided by it where positive, else multiplied. on_tokens is
        called with [B, n] new tokens, several times, as they come. Raises ConfigError for arguments
        that cannot be right.
        """
        tokens_BT = np.asarray(tokens_BT, np.int32)
        mask_BT = (
            np.ones(tokens_BT.shape, bool)
            if attention_mask is None
            else np.asarray(attention_mask, bool)
        )
        _check_prompts(tokens_BT, mask_BT, self.config.vocab_size)
        _check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        B, T = tokens_BT.shape
        padded = -T % LENGTH_STEP
        prompt = np.pad(tokens_BT, ((0, 0), (padded, 0)))
        real = np.pad(mask_BT, ((0, 0), (padded, 0)))
        start = T + padded
        length = start + max_new_tokens + -max_new_tokens % LENGTH_STEP
        sampling = Sampling(
            jnp.float32(temperature),
            jnp.int32(top_k or self.config.vocab_size),
            jnp.float32(top_p),
            jnp.float32(repetition_penalty),
        )
        stop = jnp.int32(eos_id if stop_at_eos else -1)

        def decode(loop: _Loop, goal: int) -> _Loop:
            return self._decode(
                self._params, loop, jnp.int32(start + goal), stop, sampling, greedy=temperature == 0
            )

        arguments = (self._params, prompt, real, jax.random.key(seed))
        if (B, start, length) not in self._compiled:  # apart from the run, whose speed is told
            self._compiled[B, start, length] = self._prefill.lower(
                *arguments, length=length
            ).compile()
        began = time.perf_counter()
        loop: _Loop = jax.block_until_ready(self._compiled[B, start, length](*arguments))
        prefilled = time.perf_counter()
        loop = jax.block_until_ready(decode(loop, 0))  # no token: compiles
        ready = time.perf_counter()
        chunk = 8 if on_tokens is not None else max_new_tokens
        made = 0
        while made < max_new_tokens and not (made and bool(loop.done_B.all())):
            loop = decode(loop, min(made + chunk, max_new_tokens))
            reached = int(loop.cache.length) - start
            if on_tokens is not None:
                on_tokens(np.asarray(loop.tokens_BS[:, start + made : start + reached]))
            made = reached
        self.speed = Speed(
            int(mask_BT.sum()), prefilled - began, B * made, time.perf_counter() - ready
        )
        return np.concatenate(
            [tokens_BT, np.asarray(loop.tokens_BS)[:, start : start + made]], axis=1
        )

    def generate(
        self,
        tokenizer: Tokenizer,
        prompts: list[str],
        max_new_tokens: int,
        *,
        on_text: Callable[[str], None] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Continuations of texts, without the prompts. on_text (one prompt only) gets the text piece by piece as it comes."""
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        if not encoded or not all(encoded):
            raise ConfigError("a prompt is empty, or there is none: there is nothing to go on from")
        T = max(len(ids) for ids in encoded)
        tokens = np.array([[self._pad_id] * (T - len(ids)) + ids for ids in encoded])
        mask = np.array([[0] * (T - len(ids)) + [1] * len(ids) for ids in encoded])
        stream = None
        if on_text is not None:
            stream = _Stream(tokenizer, encoded[0], on_text)
        out = self.generate_tokens(
            tokens,
            max_new_tokens,
            attention_mask=mask,
            eos_id=tokenizer.eos_id,
            on_tokens=stream,
            **sampling,
        )
        return [
            _continuation(tokenizer, ids, row[T:])
            for ids, row in zip(encoded, out.tolist(), strict=True)
        ]

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
            logits_BV = model.head(hidden_BTD[:, -1])
        seen_BV = jnp.zeros((B, self.config.vocab_size), bool)
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(mask_BT)
        tokens_BS = jnp.concatenate([tokens_BT, jnp.zeros((B, S - T), jnp.int32)], axis=1)
        return _Loop(cache, tokens_BS, logits_BV, seen_BV, jnp.zeros(B, bool), key)

    def _run_decode(
        self, params, loop: _Loop, goal, eos, sampling: Sampling, *, greedy: bool
    ) -> _Loop:
        """Tokens up to position `goal`, or until every row has reached `eos`."""
        model = nnx.merge(self._graphdef, params)

        def going(loop: _Loop) -> jax.Array:
            return (loop.cache.length < goal) & ~loop.done_B.all()

        def step(loop: _Loop) -> _Loop:
            key, draw = jax.random.split(loop.key)
            logits_BV = _penalise(loop.logits_BV, loop.seen_BV, sampling.repetition_penalty)
            token_B = jnp.argmax(logits_BV, axis=-1) if greedy else _draw(draw, logits_BV, sampling)
            token_B = jnp.where(loop.done_B, self._pad_id, token_B).astype(jnp.int32)
            place = loop.cache.length
            tokens_BS = jax.lax.dynamic_update_slice_in_dim(
                loop.tokens_BS, token_B[:, None], place, 1
            )
            position_B1 = (jnp.cumsum(loop.cache.mask_BS, axis=1) - 1)[:, place][:, None]
            hidden_B1D, cache = model.extend(token_B[:, None], loop.cache, position_B1)
            seen_BV = loop.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
            return _Loop(
                cache,
                tokens_BS,
                model.head(hidden_B1D[:, -1]),
                seen_BV,
                loop.done_B | (token_B == eos),
                key,
            )

        with matmul_precision(self.config):
            return jax.lax.while_loop(going, step, loop)


def _check_prompts(tokens_BT: np.ndarray, mask_BT: np.ndarray, vocab_size: int) -> None:
    if tokens_BT.ndim != 2 or 0 in tokens_BT.shape:
        raise ConfigError(f"tokens {tokens_BT.shape} must be [prompts, length], neither of them 0")
    if tokens_BT.min() < 0 or tokens_BT.max() >= vocab_size:
        raise ConfigError(
            f"tokens {tokens_BT.min()} to {tokens_BT.max()} must lie in [0, {vocab_size}): not this model's tokenizer"
        )
    shape = tokens_BT.shape
    if (
        mask_BT.shape != shape
        or not mask_BT[:, -1].all()
        or (np.diff(mask_BT.astype(int), axis=1) < 0).any()
    ):
        raise ConfigError(
            f"attention_mask {mask_BT.shape} must be {shape}, padded on the left: the prompt's last tokens are real"
        )


def _check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> None:
    for name, value, holds, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 (the most likely token) or more"),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "greater than 0"),
    ):
        if not holds:
            raise ConfigError(f"{name}={value} must be {expected}")


def _penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    return jnp.where(
        seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV
    )


def _draw(key: jax.Array, logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw from the top_k most likely tokens, and of those from the fewest that hold top_p of the probability."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / sampling.temperature
    sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < sampling.top_k, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    sorted_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
    choice_B = jax.random.categorical(key, sorted_BV, axis=-1)
    return jnp.take_along_axis(order_BV, choice_B[:, None], axis=-1)[:, 0]


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """Text of the new tokens up to EOS. Decoded with the prompt, since a decoder strips the space before a text's first word."""
    if tokenizer.eos_id in new:
        new = new[: new.index(tokenizer.eos_id)]
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


class _Stream:
    """Turns new tokens into text as they come, holding back what may be half a character."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], on_text: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._prompt, self._on_text = tokenizer, prompt, on_text
        self._new: list[int] = []
        self._printed = 0

    def __call__(self, tokens_BN: np.ndarray) -> None:
        self._new += tokens_BN[0].tolist()
        text = _continuation(self._tokenizer, self._prompt, self._new).rstrip("\ufffd")
        self._on_text(text[self._printed :])
        self._printed = len(text)


def find_tokenizer(checkpoint: Path | str, given: Path | str | None = None) -> Tokenizer:
    """The tokenizer `given`, or the tokenizer.model beside a checkpoint or in the folders above it (a run's folder).

    Raises ConfigError where there is none, or it is not the one the checkpoint was trained with.
    """
    path = given or tokenizer_file(checkpoint)
    if path is None:
        raise ConfigError(
            f"there is no tokenizer.model in {checkpoint} or the two folders above it; give --tokenizer FILE"
        )
    tokenizer = Tokenizer(path)
    config, known = trained_with(checkpoint)
    if known not in (None, tokenizer.hash):
        raise ConfigError(
            f"{path} has the hash {tokenizer.hash[:12]} and {checkpoint} was trained with tokenizer {known[:12]}"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{path} has {tokenizer.vocab_size} pieces and the model {config.vocab_size}: not the tokenizer of {checkpoint}"
        )
    return tokenizer


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.generate",
        description="Continue a text. Example: --checkpoint runs/tiny --prompt '登鹳雀楼->王之涣\\n夜雨寄北->' --max_new_tokens 64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="FOLDER",
        help="a run's folder, one of its checkpoints, or a Hugging Face folder",
    )
    add("--prompt", required=True, help="the text to continue; \\n in it is a new line")
    add(
        "--tokenizer",
        metavar="FILE",
        help="a SentencePiece model, where none lies with the checkpoint",
    )
    add("--max_new_tokens", type=int, default=64, help="length of the continuation")
    add("--temperature", type=float, default=0.8, help="0: always the most likely token")
    add("--top_k", type=int, default=0, help="draw from this many most likely tokens; 0: from all")
    add(
        "--top_p",
        type=float,
        default=0.9,
        help="draw from the fewest tokens that hold this probability",
    )
    add(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1: seen tokens become less likely",
    )
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation")
    add_mesh_options(parser, MeshConfig(data=1))
    options = parser.parse_args(words)
    sampling = {
        name: getattr(options, name)
        for name in ("temperature", "top_k", "top_p", "repetition_penalty")
    }
    _check_sampling(options.max_new_tokens, **sampling)
    mesh_shape = mesh_config(options)
    tokenizer = find_tokenizer(options.checkpoint, options.tokenizer)
    mesh = None if mesh_shape == MeshConfig(data=1) else make_mesh(mesh_shape)
    generator = Generator(load_pretrained(options.checkpoint, dtype=options.dtype, mesh=mesh))
    prompt = options.prompt.replace("\\n", "\n")
    print(prompt, end="", flush=True)
    generator.generate(
        tokenizer,
        [prompt],
        options.max_new_tokens,
        **sampling,
        seed=options.seed,
        on_text=lambda piece: print(piece, end="", flush=True),
    )
    print()
    assert generator.speed is not None
    prompt_tokens, prefill_seconds, new_tokens, decode_seconds = generator.speed
    print(
        f"prefill: {prompt_tokens} tokens, {prompt_tokens / prefill_seconds:,.1f} tokens/s; "
        f"decode: {new_tokens} tokens, {new_tokens / decode_seconds:,.1f} tokens/s (compilation left out)",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
