"""Time every implementation of attention and RMSNorm that can run here, beside other libraries'.

    pip install tokamax torch
    python benchmarks/kernels.py [--operator attention] [--dtype bfloat16] [--json FILE]

Default sizes are those of the 7B model on a GPU or TPU, and small ones on a CPU. Every result is
first compared with the plain operator in float32; a wrong implementation is not timed, and the
program then exits with 1. All calls are sampled in turn, the table shows medians, and compilation
is not in them. TFLOP/s count the pairs of positions that the causal mask leaves: two products
forward, five backward (which computes the scores again). Attention starts from the packed
projection, as in the model, so that RoPE and slices are timed with it.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from clock import sample
from results import Results, reason
from tqdm import tqdm

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.devices import peak_flops
from baichuan_jax.hardware.flops import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    causal_attention_flops,
)
from baichuan_jax.kernels.attention import reference as reference_attention
from baichuan_jax.kernels.attention.api import attention
from baichuan_jax.kernels.attention.reference import turned_parts
from baichuan_jax.kernels.rms_norm import reference as reference_rms_norm
from baichuan_jax.kernels.rms_norm.api import rms_norm
from baichuan_jax.model import rope_tables

try:
    import tokamax  # pyright: ignore[reportMissingImports]
except ImportError:
    tokamax = None

try:
    import torch  # pyright: ignore[reportMissingImports]

    NO_TORCH = None
except Exception as error:  # a broken installation raises OSError
    torch, NO_TORCH = None, f"torch cannot be imported: {reason(error)}"

EPS = 1e-6
# Largest difference from the plain operator in float32, relative to its largest value. bfloat16
# rounds by 0.4 %, a few times in a row.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Name: (what, default on a GPU or TPU, default on a CPU).
SIZES = {
    "batch": ("rows of attention ", 2, 1),
    "length": ("tokens ", 4096, 512),
    "heads": ("", 32, 4),
    "head_size": ("", 128, 64),
    "rows": ("of RMSNorm ", 8192, 2048),
    "width": ("", 4096, 1024),
}


@dataclass
class Candidate:
    """One implementation of an operator.

    `function` maps inputs to a tuple of results. `work`: FLOPs or bytes of a call, by pass.
    `foreign`: another framework, whose function maps inputs and cotangents to (results and
    gradients, calls). `why_not`: the reason why it is not timed.
    """

    name: str
    function: Callable
    work: dict[str, float]
    why_not: str | None = None
    foreign: bool = False
    error: float | None = None
    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


def both_passes(function: Callable, inputs: tuple, cotangents: tuple) -> tuple:
    """Results and gradients, as a training step computes them."""
    outputs, pull = jax.vjp(function, *inputs)
    return outputs, pull(cotangents)


def prepare(candidates: list[Candidate], exact: Callable, inputs: tuple, cotangents: tuple) -> None:
    """Compile both passes of each candidate, and compare its results and gradients.

    The comparison is with `exact` on the same inputs in float32.
    """
    single = [tuple(x.astype(jnp.float32) for x in arrays) for arrays in (inputs, cotangents)]
    with jax.default_matmul_precision("float32"):
        wanted = jax.jit(functools.partial(both_passes, exact))(*single)
    dtype = inputs[0].dtype.name
    for candidate in candidates:
        if candidate.why_not:
            continue
        try:
            if candidate.foreign:
                got, candidate.calls = candidate.function(inputs, cotangents)
                compare(candidate, got, wanted, dtype)
                continue
            forward = jax.jit(candidate.function).lower(*inputs).compile()
            both = jax.jit(functools.partial(both_passes, candidate.function))
            both = both.lower(inputs, cotangents).compile()
            got = jax.block_until_ready(both(inputs, cotangents))
            jax.block_until_ready(forward(*inputs))
        except Exception as error:  # libraries raise anything where they cannot serve
            candidate.why_not = reason(error, 1000).split("cannot serve: ")[-1].split("; use ")[0]
            candidate.calls = {}
            continue
        candidate.calls = {
            "forward": functools.partial(forward, *inputs),
            "both": functools.partial(both, inputs, cotangents),
        }
        compare(candidate, got, wanted, dtype)


def compare(candidate: Candidate, got: tuple, wanted: tuple, dtype: str) -> None:
    """Record the largest relative error; a candidate that is wrong is not timed."""
    candidate.error = max(
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    )
    if not candidate.error <= TOLERANCE[dtype]:
        off = f"differs by {candidate.error:.1e} from the plain operator in float32"
        candidate.why_not, candidate.calls = f"WRONG: {off}", {}


def measure(candidates: list[Candidate], rounds: int) -> None:
    """Time the candidates' calls in turn. A sample is as many calls as take 50 ms."""
    timed = [(candidate, name) for candidate in candidates for name in candidate.calls]
    repeats = {}
    for candidate, name in timed:
        once = sample(candidate.calls[name], 1)
        repeats[candidate.name, name] = max(1, min(100, round(0.05 / once)))
        candidate.seconds[name] = []
    for _ in tqdm(range(rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for candidate, name in timed:
            seconds = sample(candidate.calls[name], repeats[candidate.name, name])
            candidate.seconds[name].append(seconds)


def plain_call(name: str, function: Callable, work: float, *inputs: jax.Array) -> Candidate:
    """A call that gives the device's rate in the same rounds: a matrix product, a copy."""
    compiled = jax.jit(function).lower(*inputs).compile()
    calls: dict[str, Callable] = {"forward": functools.partial(compiled, *inputs)}
    return Candidate(name, function, {"forward": work}, calls=calls)


def rope_of(qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RoPE's tables for positions 0, 1, ..."""
    return rope_tables(jnp.arange(qkv.shape[1])[None], qkv.shape[-1], 10_000.0)


def attention_candidates(
    options: argparse.Namespace, dtype: str
) -> tuple[list[Candidate], tuple, tuple]:
    """Candidates, inputs and cotangents; work in FLOPs, of attention's products alone.

    As in the model, from the packed projection: what an implementation needs apart, RoPE, slices
    and the gradient's concatenation, is its own time.
    """
    B, T, N, H = options.batch, options.length, options.heads, options.head_size
    keys = jax.random.split(jax.random.key(0), 2)
    qkv = jax.random.normal(keys[0], (B, T, 3, N, H)).astype(dtype)
    cotangent = jax.random.normal(keys[1], (B, T, N, H)).astype(dtype)
    products = {"forward": FORWARD_PRODUCTS, "both": FORWARD_PRODUCTS + BACKWARD_PRODUCTS}
    work = {
        name: causal_attention_flops((B, T, N, H), count, exact=True)
        for name, count in products.items()
    }

    def ours(name: str) -> Callable:
        return lambda qkv: (attention(qkv, rope_of(qkv), implementation=name),)

    def jaxs(name: str) -> Callable:
        function = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        return lambda qkv: (function(*turned_parts(qkv, rope_of(qkv)), implementation=name),)

    def tokamaxs(name: str) -> Callable:
        return lambda qkv: (
            tokamax.dot_product_attention(
                *turned_parts(qkv, rope_of(qkv)), is_causal=True, implementation=name
            ),
        )

    names = ("reference", "blockwise", "triton", "cudnn", "pallas")
    candidates = [Candidate(name, ours(name), work) for name in names]
    # Without jax.nn's cuDNN: that is `cudnn` above.
    candidates.append(Candidate("jax.nn xla", jaxs("xla"), work))
    missing = None if tokamax else "tokamax is not installed"
    for name in ("mosaic", "triton", "cudnn", "xla_chunked", "xla"):
        candidates.append(Candidate(f"tokamax {name}", tokamaxs(name), work, missing))
    candidates.append(Candidate("torch sdpa", torch_sdpa, work, NO_TORCH, foreign=True))
    return candidates, (qkv,), (cotangent,)


class Queued:
    """Work that a call of torch has started: jax.block_until_ready waits for it, as for arrays."""

    def block_until_ready(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def torch_sdpa(inputs: tuple, cotangents: tuple) -> tuple[tuple, dict[str, Callable]]:
    """PyTorch's scaled_dot_product_attention on the same device, with the kernel that it chooses.

    PyTorch's arrays are [batch, heads, length, head size], so each is transposed once. RoPE is
    applied before, and not timed.
    """
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this torch sees no GPU")
    dtype = getattr(torch, inputs[0].dtype.name)
    (qkv,) = inputs
    turned, turn_back = jax.vjp(lambda qkv: turned_parts(qkv, rope_of(qkv)), qkv)
    q, k, v, dout = (
        torch.tensor(np.asarray(x, np.float32), device=device)
        .to(dtype)
        .transpose(1, 2)
        .contiguous()
        .requires_grad_()
        for x in (*turned, *cotangents)
    )

    def forward() -> Queued:
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return Queued()

    def results() -> tuple:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    def both() -> Queued:
        results()
        return Queued()

    out, *gradients = (
        jnp.asarray(x.detach().float().transpose(1, 2).cpu().numpy()) for x in results()
    )
    gradients = tuple(x.astype(qkv.dtype) for x in gradients)
    return (out, *turn_back(gradients)), {"forward": forward, "both": both}


def norm_candidates(
    options: argparse.Namespace, dtype: str, residual: bool
) -> tuple[list[Candidate], tuple, tuple]:
    """Candidates, inputs and cotangents; work in bytes.

    Every array counts once. The weight does not count: it is small.
    """
    R, D = options.rows, options.width
    x, added, dy, dtotal = (
        jax.random.normal(key, (1, R, D)).astype(dtype)
        for key in jax.random.split(jax.random.key(1), 4)
    )
    weight = jnp.linspace(0.5, 1.5, D, dtype=jnp.float32)
    forward = (4 if residual else 2) * x.nbytes
    work = {"forward": forward, "both": forward + (4 if residual else 3) * x.nbytes}

    def ours(name: str) -> Callable:
        norm = functools.partial(rms_norm, eps=EPS, implementation=name)
        if residual:
            return lambda x, weight, added: norm(x, weight, residual=added)
        return lambda x, weight: (norm(x, weight),)

    def tokamaxs(name: str) -> Callable:
        def norm(x, weight):
            options = {"epsilon": EPS, "subtract_mean": False, "implementation": name}
            return tokamax.layer_norm(x, weight, None, **options)

        if residual:
            return lambda x, weight, added: (norm(x + added, weight), x + added)
        return lambda x, weight: (norm(x, weight),)

    candidates = [Candidate(name, ours(name), work) for name in ("reference", "triton", "pallas")]
    missing = None if tokamax else "tokamax is not installed"
    for name in ("triton", "xla"):
        candidates.append(Candidate(f"tokamax {name}", tokamaxs(name), work, missing))
    if residual:
        return candidates, (x, weight, added), (dy, dtotal)
    return candidates, (x, weight), (dy,)


def run_attention(options: argparse.Namespace, dtype: str, shown: Results) -> dict:
    """Prepare, time and report attention."""
    candidates, inputs, cotangents = attention_candidates(options, dtype)
    exact = lambda qkv: (reference_attention.attention(*turned_parts(qkv, rope_of(qkv))),)
    prepare(candidates, exact, inputs, cotangents)
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(2), (size, size)).astype(dtype)
    product = plain_call(f"a product of {size} x {size}", jnp.matmul, 2.0 * size**3, matrix, matrix)
    measure([product, *candidates], options.rounds)
    B, T, _, N, H = inputs[0].shape
    title = f"RoPE and attention {dtype}: batch {B}, {T} tokens, {N} heads of {H}"
    return report(title, candidates, product, "FLOP/s", shown)


def run_norm(options: argparse.Namespace, dtype: str, residual: bool, shown: Results) -> dict:
    """Prepare, time and report RMSNorm."""
    candidates, inputs, cotangents = norm_candidates(options, dtype, residual)

    def exact(x, weight, *added):
        out = reference_rms_norm.rms_norm(x, weight, EPS, *added)
        return out if residual else (out,)

    prepare(candidates, exact, inputs, cotangents)
    copy = plain_call("a copy", jnp.negative, 2.0 * inputs[0].nbytes, inputs[0])
    measure([copy, *candidates], options.rounds)
    _, rows, width = inputs[0].shape
    title = f"rms_norm {'with residual ' if residual else ''}{dtype}: {rows} rows of {width}"
    return report(title, candidates, copy, "B/s", shown)


def report(
    title: str, candidates: list[Candidate], yardstick: Candidate, unit: str, shown: Results
) -> dict:
    """Print a table and return the same as a dictionary.

    Shares are of the yardstick's rate, measured in the same rounds.
    """
    peak = yardstick.work["forward"] / statistics.median(yardstick.seconds["forward"])
    scale, prefix = (1e12, "T") if peak >= 1e12 else (1e9, "G")
    rate = f"{peak / scale:,.1f} {prefix}{unit}"
    caption = f"both: forward and backward; share: of {yardstick.name}, {rate}"
    columns = ["", "fwd ms", prefix + unit, "share", "both ms", prefix + unit, "share", "error"]
    lines = []
    results: dict[str, dict] = {}
    for candidate in candidates:
        if candidate.why_not:
            results[candidate.name] = {"why_not": candidate.why_not}
            continue
        row, cells = {"error": candidate.error}, [candidate.name]
        for name in ("forward", "both"):
            seconds = statistics.median(candidate.seconds[name])
            rate = candidate.work[name] / seconds
            row[name] = {"seconds": seconds, unit: rate, "share": rate / peak}
            cells += [f"{1e3 * seconds:,.2f}", f"{rate / scale:,.1f}", f"{rate / peak:.0%}"]
        lines.append([*cells, f"{candidate.error:.0e}"])
        results[candidate.name] = row
    shown.table(f"{title} ({caption})", columns, lines)
    for candidate in candidates:
        if candidate.why_not:
            shown.say(f"{title.split(':')[0]}, {candidate.name}: not timed: {candidate.why_not}")
    return {"title": title, "measured_peak": peak, "implementations": results}


def parse_options() -> argparse.Namespace:
    """The options of the command line, with defaults for this backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operator", choices=["attention", "rms_norm"], help="only this one")
    dtypes = "(default: bfloat16, on a CPU float32)"
    parser.add_argument("--dtype", choices=list(TOLERANCE), help=dtypes)
    for name, (what, large, small) in SIZES.items():
        sizes = f"{what}(default: {large}, on a CPU {small})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=sizes)
    rounds = "samples of each call, in turn (default: 9)"
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help=rounds)
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    # tokamax parses it too, and refuses options that are not its own.
    del sys.argv[1:]
    on_cpu = jax.default_backend() == "cpu"
    for name, (_, large, small) in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, small if on_cpu else large)
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    return options


def main() -> None:
    """Time what was asked for; exits with 1 where an implementation is wrong."""
    options = parse_options()
    device = jax.devices()[0]
    devices = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    print(f"{devices}, jax {jax.__version__}; one device is used")
    sheet, source = (None, "") if device.platform == "cpu" else peak_flops(Config(), device)
    results, shown = [], Results()
    # As the model does: float32 products stay float32 where the backend would round them.
    with jax.default_matmul_precision("float32" if options.dtype == "float32" else "default"):
        if options.operator != "rms_norm":
            results.append(run_attention(options, options.dtype, shown))
            if sheet:
                share = results[0]["measured_peak"] / sheet
                print(f"the matrix product reaches {share:.0%} of the data sheet ({source})")
        if options.operator != "attention":
            norms = [
                run_norm(options, options.dtype, residual, shown) for residual in (False, True)
            ]
            results += norms
    shown.save(
        options.json,
        device=device.device_kind,
        jax=jax.__version__,
        tokamax=tokamax and tokamax.__version__,
        options=vars(options),
        data_sheet_flops=sheet,
        results=results,
    )
    wrong = [
        f"{result['title']}: {name}"
        for result in results
        for name, row in result["implementations"].items()
        if row.get("why_not", "").startswith("WRONG")
    ]
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
