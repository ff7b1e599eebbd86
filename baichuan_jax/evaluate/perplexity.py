"""Perplexity by context length: how far past the training length a model still gains from context.

Text becomes one stream of tokens, documents joined with EOS as in training (no BOS). For each
context length the stream is cut into windows that do not overlap, and every window predicts all of
its tokens but the first. The last tokens of a window have almost the whole context before them;
their perplexity is given apart. The original's README shows such a curve.

B windows of a batch, T tokens of a window, D hidden.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from matplotlib.figure import Figure

from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.evaluate.scoring import default_batch_tokens
from baichuan_jax.loss import IGNORE, cross_entropy
from baichuan_jax.model import Params, Transformer, matmul_precision
from baichuan_jax.runs.files import save_figure
from baichuan_jax.sharding import Layout, activate
from baichuan_jax.tokenizer import Tokenizer

TAIL = 256  # tokens at a window's end whose perplexity is also given apart
CHUNK = 1024  # tokens whose logits exist at once


def read_stream(
    documents: Iterable[str], tokenizer: Tokenizer, max_tokens: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The first max_tokens tokens of the documents, joined with EOS: int32; and what was read.

    Counts: documents, empty_documents (left out, as packing does), and text_cut: whether text is
    left that was not read.
    """
    parts: list[int] = []
    counts = {"documents": 0, "empty_documents": 0, "text_cut": False}
    for document in documents:
        if len(parts) >= max_tokens:
            counts["text_cut"] = True
            break
        counts["documents"] += 1
        # It would be a lone EOS.
        if not document:
            counts["empty_documents"] += 1
            continue
        # As packing does: the model has seen this token between all documents.
        parts += [*tokenizer.encode(document), tokenizer.eos_id]
    counts["text_cut"] |= len(parts) > max_tokens
    return np.array(parts[:max_tokens], np.int32), counts


def check_contexts(contexts: list[int], tokens: np.ndarray) -> None:
    """Raise ConfigError where a window does not fit the text."""
    for context in contexts:
        require(context >= 2, f"context={context} must be at least 2: a window predicts a token")
        if context > len(tokens):
            raise ConfigError(
                f"a window of {context} tokens does not fit a text of {len(tokens)}: "
                "give more text, or shorter contexts"
            )


def perplexity_curve(
    model: Transformer,
    tokens: np.ndarray,
    contexts: list[int],
    *,
    mesh: Mesh | None = None,
    batch_tokens: int | None = None,
    on_done: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """A row for each context length.

    Keys: context, windows, tokens (predicted), tokens_left_out (of the text's end, which fill no
    window), loss (nats), perplexity, tail_perplexity. on_done is called with the number of newly
    predicted tokens. Raises ConfigError where the text is shorter than a window, or the perplexity
    is not finite.
    """
    layout = None if mesh is None else Layout(mesh)
    shards = 1 if layout is None else layout.batch_shards
    loss_sums, params = _make_loss_sums(model, layout)
    rows = []
    check_contexts(contexts, tokens)
    for context in contexts:
        # What is left at the end is shorter than a window: it is not used, and counted.
        windows = tokens[: len(tokens) // context * context].reshape(-1, context)
        # At least one window a device, however long it is.
        B = max(1, (batch_tokens or default_batch_tokens()) // context) * shards
        # Losses are sums and not means, so windows of a last, smaller batch count as much.
        total = tail = 0.0
        for inputs, labels in _batches(windows, B):
            sums = jax.device_get(loss_sums(params, _put(inputs, layout), _put(labels, layout)))
            # Summed over batches in Python's float64.
            total, tail = total + float(sums[0]), tail + float(sums[1])
            if on_done is not None:
                on_done(int((labels != IGNORE).sum()))
        count, tail_count = len(windows) * (context - 1), len(windows) * min(TAIL, context - 1)
        loss, tail_loss = total / count, tail / tail_count
        _require_finite(context, {"of all": loss, f"of the last {TAIL}": tail_loss})
        rows.append(
            {
                "context": context,
                "windows": len(windows),
                "tokens": count,
                "tokens_left_out": len(tokens) - windows.size,
                "loss": loss,
                "perplexity": math.exp(loss),
                "tail_perplexity": math.exp(tail_loss),
            }
        )
    return rows


def _require_finite(context: int, losses: dict[str, float]) -> None:
    """Raise ConfigError where a loss has no perplexity."""
    for what, loss in losses.items():
        # exp(709.8) is the largest float.
        if not loss < 709:
            raise ConfigError(
                f"context={context}: the loss {what} is {loss:.6g} nats a token, which has no "
                "finite perplexity: the weights are damaged, or overflow in this dtype; choose "
                "other weights, or --dtype float32"
            )


def _make_loss_sums(model: Transformer, layout: Layout | None) -> tuple[Callable, Params]:
    """(the jitted sums of a batch's losses, all and the tail's; the parameters that it takes)."""
    graphdef, state = nnx.split(model)

    def losses(
        params: Params, inputs_BT: jax.Array, labels_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        with activate(layout), matmul_precision(model.config):
            merged = nnx.merge(graphdef, params)
            hidden_BTD = merged.hidden(inputs_BT)
            # The last position of a window predicts nothing, so the tail begins one before.
            T = labels_BT.shape[1]
            tail_BT = jnp.where(jnp.arange(T) < T - 1 - TAIL, IGNORE, labels_BT)
            head = merged.lm_head[...]
            # The head runs twice over a window: little beside the blocks of a large model.
            whole = cross_entropy(hidden_BTD, head, labels_BT, chunk_size=CHUNK)
            return whole, cross_entropy(hidden_BTD, head, tail_BT, chunk_size=CHUNK)

    shardings = None if layout is None else layout.sharding()
    return jax.jit(losses, out_shardings=shardings), nnx.to_pure_dict(state)


def _put(array: np.ndarray, layout: Layout | None) -> Any:
    """A batch on the mesh; every process holds the whole of it."""
    if layout is None:
        return array
    sharding = layout.sharding("batch", "length")
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _batches(windows: np.ndarray, B: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels [B, T] of B windows at a time; a last batch is filled with IGNORE."""
    # All batches have one shape, so each context length compiles once.
    for start in range(0, len(windows), B):
        inputs = np.zeros((B, windows.shape[1]), np.int32)
        labels = np.full(inputs.shape, IGNORE, np.int32)
        part = windows[start : start + B]
        inputs[: len(part)] = part
        labels[: len(part), :-1] = part[:, 1:]
        yield inputs, labels


def parse_contexts(text: str) -> list[int]:
    """Context lengths of "4096,4352,...,5376": the dots stand for the steps between.

    Raises ConfigError.
    """
    # The steps are those between the two lengths before the dots.
    parts = [part.strip() for part in text.split(",")]
    lengths: list[int] = []
    try:
        for place, part in enumerate(parts):
            if part != "...":
                lengths.append(int(part))
                continue
            step, last = lengths[-1] - lengths[-2], int(parts[place + 1])
            if step <= 0 or (last - lengths[-1]) % step:
                raise ValueError(text)
            lengths += range(lengths[-1] + step, last, step)
    except (ValueError, IndexError):
        raise ConfigError(
            f"context={text!r} must be lengths such as 4096,4352,4608 or 4096,4352,...,5376"
        ) from None
    return lengths


def table(rows: list[dict[str, Any]]) -> str:
    """The curve in Markdown."""
    lines = [
        "| context | windows | tokens left out | perplexity | of the last 256 tokens |",
        "| -: | -: | -: | -: | -: |",
    ]
    lines += [
        f"| {r['context']} | {r['windows']} | {r['tokens_left_out']} | {r['perplexity']:.3f} | "
        f"{r['tail_perplexity']:.3f} |"
        for r in rows
    ]
    return "\n".join([*lines, ""])


def chart(rows: list[dict[str, Any]], path: Path | str) -> None:
    """The curve as PNG, as the original drew it."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    contexts = [row["context"] for row in rows]
    tails = [row["tail_perplexity"] for row in rows]
    axes.plot(contexts, [row["perplexity"] for row in rows], "^-", label="whole windows")
    axes.plot(contexts, tails, "o--", label=f"last {TAIL} tokens of each")
    axes.set(xlabel="context length (tokens)", ylabel="perplexity", xticks=contexts)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, Path(path), dpi=120)
