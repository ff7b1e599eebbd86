"""What bfloat16 costs: in the model, and in the sum of gradients over devices.

    python benchmarks/mixed_precision.py [--steps 60] [--plot FILE] [--json FILE]

The model: two runs of the tiny configuration in both types, from the same weights on the same rows,
so the difference of their losses is what mixed precision costs. The original reports that it costs
no accuracy.

The sum (train.gradient_dtype): real gradients, of the trained bfloat16 weights on 128 rows, are
summed over 8 and 128 shards in the orders of NCCL, and compared with the exact sum in float64. Then
the tiny configuration is trained with the gradients of 8 shards summed in either type.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from results import Results

from baichuan_jax.checkpoint.weights import choose_checkpoint, load_params
from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import Config
from baichuan_jax.data.prepare import prepare
from baichuan_jax.loss import cross_entropy
from baichuan_jax.model import Params, abstract_model, init_params
from baichuan_jax.optimizer import clip_by_global_norm, learning_rate, make_optimizer
from baichuan_jax.train import train

ROWS, NODE = 128, 8
KINDS = ("blocks", "embedding", "head", "norms", "all")
ORDERS = {
    "float32": "float32",
    "ring": "bfloat16, one after the other (a ring)",
    "nodes": f"bfloat16, in nodes of {NODE}, then between them",
    "tree": "bfloat16, in pairs (a tree)",
}


def settings(steps: int, folder: str, dtype: str) -> Config:
    """The tiny configuration, trained for so many steps in a type."""
    overrides = [
        f"run_dir={folder}/{dtype}",
        f"data.cache_dir={folder}/cache",
        f"model.dtype={dtype}",
        f"train.num_steps={steps}",
        f"optimizer.warmup_steps={steps // 6}",
        f"evaluate.every={steps}",
        f"checkpoint.every={steps}",
        "sample.prompts=[]",
    ]
    return load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml", overrides)


def losses(config: Config) -> tuple[dict[int, float], float]:
    """Step -> training loss of one run, and its final validation loss."""
    run = train(config)
    return run.curve("loss"), run.curve("eval_loss")[config.train.num_steps]


def text_rows(config: Config, count: int) -> np.ndarray:
    """Rows [count, T + 1] of the training text, in a random order that is always the same."""
    corpora = [rows for rows, _ in prepare(config, progress=False).train]
    places = [(rows, i) for rows in corpora for i in range(len(rows))]
    order = np.random.default_rng(0).permutation(len(places))
    return np.stack([places[i][0][places[i][1]] for i in np.resize(order, count)]).astype(np.int32)


def make_gradient(config: Config, dtype: str) -> Callable[[Params, np.ndarray], tuple]:
    """(parameters, rows [B, T + 1]) -> the sum of the loss and its gradient, as in a step."""
    model_config = dataclasses.replace(config.model, dtype=dtype)
    graphdef, _, _ = abstract_model(model_config)

    def loss(params: Params, rows: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(rows[:, :-1])
        return cross_entropy(
            hidden,
            model.lm_head[...],
            rows[:, 1:],
            chunk_size=config.train.loss_chunk_size,
            z_loss=config.train.z_loss,
        )

    return jax.value_and_grad(loss)


def rounded(tree: Any) -> Any:
    """Rounded to bfloat16. XLA may leave out a conversion there and back, but not this."""
    return jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 7), tree)


@jax.jit
def add(a: Any, b: Any) -> Any:
    """a + b in bfloat16, as NCCL adds what it receives to what it has."""
    return rounded(jax.tree.map(jnp.add, a, b))


def sums(gradients: Iterator[Params]) -> dict[str, Params]:
    """The sum of the shards' gradients in each order, and in float64; holds few at a time."""
    found: dict[str, Any] = {}
    levels: list[Any] = []
    node, count = None, 0
    for count, gradient in enumerate(gradients, 1):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), gradient)
        found["exact"] = jax.tree.map(np.add, found["exact"], wide) if count > 1 else wide
        half = jax.jit(rounded)(gradient)
        if count == 1:
            found |= {"float32": gradient, "ring": half}
        else:
            found["float32"] = jax.tree.map(jnp.add, found["float32"], gradient)
            found["ring"] = add(found["ring"], half)
        # Pairs of equal size are added as soon as there are two, as a counter carries.
        merged, level = half, 0
        while count % 2 ** (level + 1) == 0:
            merged, level = add(levels.pop(), merged), level + 1
        levels.append(merged)
        node = half if node is None else add(node, half)
        if count % NODE == 0:
            found["nodes"] = add(found["nodes"], node) if "nodes" in found else node
            node = None
    (found["tree"],) = levels  # count is a power of two
    if count == NODE:  # one node has nothing to add between nodes
        del found["nodes"]
    return found


def by_kind(tree: Params) -> dict[str, list[Any]]:
    """Arrays of a gradient by the kind of their parameter."""
    kinds: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for path, array in jax.tree.leaves_with_path(tree):
        name = path[-1].key
        kind = {"embedding": "embedding", "lm_head": "head"}.get(name, "blocks")
        for each in ("norms" if "norm" in name else kind, "all"):
            kinds[each].append(np.asarray(array, np.float64))
    return kinds


def relative(found: Params, exact: Params) -> dict[str, float]:
    """|found - exact| / |exact| for each kind of parameter."""
    norm = lambda arrays: float(np.sqrt(sum(np.sum(array**2) for array in arrays)))
    pairs = {kind: zip(a, by_kind(exact)[kind], strict=True) for kind, a in by_kind(found).items()}
    scale = {kind: norm(arrays) for kind, arrays in by_kind(exact).items()}
    return {kind: norm(a - b for a, b in pair) / scale[kind] for kind, pair in pairs.items()}


def one_minus_cosine(found: Params, exact: Params) -> float:
    """1 - the cosine of the angle between two gradients, all parameters together."""
    a, b = (by_kind(tree)["all"] for tree in (found, exact))
    dot = lambda x, y: sum(np.sum(p * q) for p, q in zip(x, y, strict=True))
    # From the difference of the unit vectors: 1 - dot would lose all its digits.
    length_a, length_b = np.sqrt(dot(a, a)), np.sqrt(dot(b, b))
    difference = [p / length_a - q / length_b for p, q in zip(a, b, strict=True)]
    return float(dot(difference, difference) / 2)


def compare_sums(results: Results, config: Config, params: Params) -> dict[str, Any]:
    """The table of the sums' errors beside those of the model's type and of the choice of rows."""
    rows = text_rows(config, ROWS)
    gradient = jax.jit(lambda params, rows: make_gradient(config, "bfloat16")(params, rows)[1])
    numbers: dict[str, Any] = {}
    table = []

    def line(what: str, shards: str, found: Params, exact: Params) -> None:
        errors, angle = relative(found, exact), one_minus_cosine(found, exact)
        numbers[f"{what}, {shards}"] = {**errors, "1 - cosine": angle}
        table.append([what, shards, *(f"{errors[kind]:.1e}" for kind in KINDS), f"{angle:.0e}"])

    exact: Params = {}
    for shards in (NODE, ROWS):
        found = sums(gradient(params, part) for part in np.split(rows, shards))
        exact = found.pop("exact")
        for order, total in found.items():
            line(ORDERS[order], str(shards), total, exact)
    precise = jax.jit(lambda params, rows: make_gradient(config, "float32")(params, rows)[1])
    with jax.default_matmul_precision("float32"):
        wide = sums(precise(params, part) for part in np.split(rows, NODE))["exact"]
    line("the model in bfloat16 beside float32", "", exact, wide)
    halves = [
        sums(gradient(params, part) for part in np.split(half, 4))["exact"]
        for half in np.split(rows, 2)
    ]
    double = lambda tree: jax.tree.map(lambda x: 2 * x, tree)
    line(f"{ROWS // 2} of the rows beside all", "", double(halves[0]), exact)
    title = f"Relative error of the gradient of {ROWS} rows after {config.train.num_steps} steps"
    results.table(title, ["summed in", "shards", *KINDS, "1 - cosine"], table)
    return numbers


def train_on_shards(config: Config, rows: np.ndarray, in_bfloat16: bool) -> list[float]:
    """Losses of a run whose 8 shards' gradients are summed in a type; the rest is the step's."""
    one = make_gradient(config, "bfloat16")
    optimizer = make_optimizer(config.optimizer)

    @jax.jit
    def step(params: Params, state: Any, number: jax.Array, rows: jax.Array) -> tuple:
        loss, shards = jax.vmap(one, in_axes=(None, 0))(params, rows[:, None])
        parts = [jax.tree.map(lambda x, i=i: x[i], shards) for i in range(NODE)]
        total = rounded(parts[0]) if in_bfloat16 else parts[0]
        for part in parts[1:]:
            plain = jax.tree.map(jnp.add, total, rounded(part) if in_bfloat16 else part)
            total = rounded(plain) if in_bfloat16 else plain
        tokens = rows.shape[0] * (rows.shape[1] - 1)
        mean = jax.tree.map(lambda x: x / tokens, total)
        clipped, _ = clip_by_global_norm(mean, config.optimizer.clip_norm)
        direction, state = optimizer.update(clipped, state, params)
        rate = learning_rate(config.optimizer, config.train.num_steps, number)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        return params, state, loss.sum() / tokens

    params = init_params(config.model, config.train.seed)
    state, found = optimizer.init(params), []
    for number, batch in enumerate(rows.reshape(-1, NODE, rows.shape[-1])):
        params, state, loss = step(params, state, number, batch)
        found.append(float(loss))
    return found


def compare_training(results: Results, config: Config) -> dict[str, list[float]]:
    """The table of losses with the gradients of 8 shards summed in either type."""
    rows = text_rows(config, NODE * config.train.num_steps)
    curves = {
        name: train_on_shards(config, rows, name == "bfloat16") for name in ("float32", "bfloat16")
    }
    table = []
    for what, part in {"all steps": slice(None), "the last 5 steps": slice(-5, None)}.items():
        full, half = (statistics.fmean(curves[name][part]) for name in ("float32", "bfloat16"))
        table.append(
            [
                f"training loss, mean of {what}",
                f"{full:.4f}",
                f"{half:.4f}",
                f"{half / full - 1:+.3%}",
            ]
        )
    title = f"{config.train.num_steps} steps, the gradients of {NODE} shards summed in each type"
    results.table(title, ["", "float32", "bfloat16 (a ring)", "difference"], table)
    return curves


def draw(path: str, curves: dict[str, dict[int, float]], ends: dict[str, float]) -> None:
    """Both models' losses as PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for (dtype, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        label = f"{dtype}, validation at the end {ends[dtype]:.4f}"
        axes.plot(list(curve), list(curve.values()), style, label=label)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="tiny configuration")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train in both types, sum gradients in both types, and show what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="of every run (default: 60)")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves of both models as PNG")
    parser.add_argument("--json", metavar="FILE", help="save all numbers")
    options = parser.parse_args()
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        configs = {name: settings(options.steps, folder, name) for name in ("float32", "bfloat16")}
        found = {dtype: losses(config) for dtype, config in configs.items()}
        curves = {dtype: curve for dtype, (curve, _) in found.items()}
        ends = {dtype: validation for dtype, (_, validation) in found.items()}
        difference = ends["bfloat16"] / ends["float32"] - 1
        last = {
            dtype: statistics.fmean(list(curve.values())[-5:]) for dtype, curve in curves.items()
        }
        rows = []
        for name, values in {
            "validation loss": ends,
            "training loss, mean of the last 5 steps": last,
        }.items():
            full, half = values["float32"], values["bfloat16"]
            rows.append([name, f"{full:.4f}", f"{half:.4f}", f"{half / full - 1:+.2%}"])
        title = f"{options.steps} steps of configs/tiny.yaml from the same weights on the same rows"
        results.table(title, ["", "float32", "bfloat16", "difference"], rows)
        if options.plot:
            draw(options.plot, curves, ends)
        _, params = load_params(choose_checkpoint(Path(folder) / "bfloat16"))
        errors = compare_sums(results, configs["bfloat16"], params)
        trained = compare_training(results, configs["bfloat16"])
    results.save(
        options.json, difference=difference, curves=curves, sums=errors, training_on_shards=trained
    )


if __name__ == "__main__":
    main()
