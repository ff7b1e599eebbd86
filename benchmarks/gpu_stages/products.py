"""Measured rates for `plan`, in rates.json: matrix products, memory bandwidth, kernel starts.

The products are those of a training step, at its shapes and layouts. `forward`: activations times
weights; `input`: the gradient of the activations; `weight`: the gradient of the weights, also with
a float32 result, which summing gradients in float32 would need. Shares are of the data sheet's
peak. The rate of all products is that of a step of Baichuan-7B, which has each product a known
number of times. `plan --rates_file rates.json` predicts a cluster of this GPU with these rates; its
rates of links and contention stay assumptions.
"""

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from clock import measure
from results import version_of
from stage import Stage

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import hardware_of
from baichuan_jax.plan.roofline import BOUNDS
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.xla_flags import apply_flags

FLOAT32 = "weight, float32"
KINDS = ("forward", "input", "weight", FLOAT32)
# Seconds before the end from which no further product is compiled.
LEFT_TO_TIME = 12
# Kernels that follow each other in the program that measures a start.
LAUNCHES = 256


def run(stage: Stage) -> None:
    """Time everything, then write the rates."""
    # As training does: no command buffers, and cuBLAS for products.
    apply_flags(Config())
    device = jax.devices()[0]
    hardware = hardware_of(device.device_kind)
    dtype = jnp.float32 if stage.sizes.small else jnp.bfloat16
    # First the quick ones: they are recorded even if the time ends.
    bandwidth, start = copy_bandwidth(stage), launch_seconds(stage)
    stage.record(copy_bandwidth=bandwidth, launch_seconds=start)
    stage.headline(f"copies {bandwidth / 1e9:,.0f} GB/s; a start {start * 1e6:.1f} us")
    if hardware:
        peak = hardware.peak_tflops * 1e12
        sheet = f"{hardware.peak_tflops:g} TFLOP/s of {hardware.name}"
    else:
        size = 1024 if stage.sizes.small else 8192
        peak, sheet = product_flops(stage, size, dtype), f"a product of {size} x {size} here"
    calls, flops, counts = {}, {}, {}
    wanted = [
        (name, times, *product)
        for name, (rows, weight, times) in shapes(stage).items()
        for product in products(rows, weight, dtype)
    ]
    # The products of a step first: the rates need them.
    wanted.sort(key=lambda item: item[1] == 0 or item[2] == FLOAT32)
    for name, times, kind, function, arguments, amount in wanted:
        key = f"{name} / {kind}"
        if stage.seconds_left < LEFT_TO_TIME:
            stage.leave_out(key, "no time was left")
            continue
        calls[key] = functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)
        flops[key], counts[key] = amount, times
    seconds = measure(calls, stage.sizes.rounds, stage.sizes.sample_seconds)
    rate_of = {key: flops[key] / seconds[key] for key in calls}
    rows = []
    for name in shapes(stage):
        found = [rate_of.get(f"{name} / {kind}") for kind in KINDS]
        cells = [f"{rate / 1e12:,.1f} ({rate / peak:.0%})" if rate else "-" for rate in found]
        rows.append([name, *cells])
    stage.table(f"Products, TFLOP/s and share of {sheet}", ["product", *KINDS], rows)
    numbers = {
        key: {"seconds": seconds[key], "flops": flops[key], "a_step": counts[key]} for key in calls
    }
    stage.record(products=numbers)
    if (together := seconds.get("gate + up as one / forward")) is not None:
        share = together / (2 * seconds["gate / forward"])
        stage.say(f"Gate and up as one product take {share:.2f} of the time of two, forward.")
    rates = {"launch_us": start * 1e6}
    if hardware:
        rates["memory"] = bandwidth / (hardware.memory_bandwidth * 1e9)
    needed = [
        f"{name} / {kind}"
        for name, (_, _, times) in shapes(stage).items()
        if times
        for kind in KINDS
        if kind != FLOAT32
    ]
    share = None
    if lacking := [key for key in needed if key not in calls]:
        why = f"these products of a step were not timed: {', '.join(lacking)}"
        stage.leave_out("rate `matmul`", why, needed=True)
    else:
        amount = sum(flops[key] * counts[key] for key in needed)
        share = amount / sum(seconds[key] * counts[key] for key in needed) / peak
        rates["matmul"] = share
    rates |= kernel_rate(stage, hardware)
    rows = [[name, f"{value:.3f}", MEANING[name]] for name, value in rates.items()]
    stage.table("Measured rates", ["rate", "value", "what"], rows)
    stage.record(rates=rates)
    write_rates(stage, device.device_kind, hardware, rates)
    if share is not None:
        others = f"copies {bandwidth / 1e9:,.0f} GB/s; a start {start * 1e6:.1f} us"
        stage.headline(f"products {share:.1%} of {sheet}; {others}")


MEANING = {
    "matmul": "of the peak, by the products of a step",
    "memory": "of the data sheet's bandwidth, by a copy",
    "kernel": "of the bound in roofline.py, by the attention kernels",
    "launch_us": "microseconds of a kernel that does nothing, between two others",
}


def shapes(stage: Stage) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Name -> shape of the activations, shape of the weight, and count in a step of 32 blocks.

    A product sums over the first dimensions of the weight.
    """
    sizes = stage.sizes
    rows, D, F = sizes.batch * sizes.length, sizes.hidden, sizes.intermediate
    N, H, V = sizes.heads, sizes.head_dim, sizes.vocab
    chunk = min(sizes.loss_chunk, rows)
    return {
        "QKV": ((rows, D), (D, 3, N, H), 32),
        "out": ((rows, N, H), (N, H, D), 32),
        # Gate, and up of the same shape.
        "gate": ((rows, D), (D, F), 2 * 32),
        "gate + up as one": ((rows, D), (D, 2 * F), 0),
        "down": ((rows, F), (F, D), 32),
        "head": ((chunk, D), (D, V), rows // chunk),
    }


def products(
    rows: tuple[int, ...], weight: tuple[int, ...], dtype: Any
) -> list[tuple[str, Callable, tuple, float]]:
    """(kind, function, arguments, FLOPs) of a product and of both its gradients."""
    summed = len(rows) - 1
    out = (rows[0], *weight[summed:])
    keys = jax.random.split(jax.random.key(len(weight)), 3)
    x, w, dy = (
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(keys, (rows, weight, out), strict=True)
    )
    amount = 2.0 * rows[0] * float(w.size)
    free = tuple(range(1, dy.ndim))
    weights = tuple(range(summed, w.ndim))

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tensordot(x, w, summed)

    def into_input(dy: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tensordot(dy, w, (free, weights))

    def into_weight(x: jax.Array, dy: jax.Array, kind: Any = None) -> jax.Array:
        return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=kind)

    return [
        ("forward", forward, (x, w), amount),
        ("input", into_input, (dy, w), amount),
        ("weight", into_weight, (x, dy), amount),
        (FLOAT32, functools.partial(into_weight, kind=jnp.float32), (x, dy), amount),
    ]


def product_flops(stage: Stage, size: int, dtype: Any) -> float:
    """FLOP/s of one large product, where no data sheet is known."""
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    call = functools.partial(jax.jit(jnp.matmul).lower(x, x).compile(), x, x)
    return 2.0 * size**3 / seconds_of(call, stage)


def seconds_of(call: Callable[[], object], stage: Stage) -> float:
    """Median seconds of one call."""
    return measure({"": call}, stage.sizes.rounds, stage.sizes.sample_seconds)[""]


def copy_bandwidth(stage: Stage) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    x = jnp.ones(stage.sizes.copy_bytes // 4, jnp.float32)
    call = functools.partial(jax.jit(jnp.negative).lower(x).compile(), x)
    return 2.0 * x.nbytes / seconds_of(call, stage)


def launch_seconds(stage: Stage) -> float:
    """Seconds from one kernel to the next, with kernels that do almost nothing."""
    x = jnp.zeros(32, jnp.float32)

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(LAUNCHES):
            # Keeps the additions apart: a kernel for each.
            x = jax.lax.optimization_barrier(x + 1)
        return x

    call = functools.partial(jax.jit(chain).lower(x).compile(), x)
    return seconds_of(call, stage) / LAUNCHES


def kernel_rate(stage: Stage, hardware: Any) -> dict[str, float]:
    """The share of their bounds that the attention kernels reached in the stage `speed`.

    Empty where that stage has no result.
    """
    values = stage.values_of("speed")
    alone, flops = values.get("kernels_alone", {}), values.get("kernel_flops", {})
    # The bounds with which plan multiplies the rate: rate and bound together give the measured
    # seconds.
    bounds = BOUNDS.get(hardware.compute_capability, {}) if hardware else {}
    names = [name for name in alone if name in bounds]
    if not names or hardware is None:
        stage.leave_out("rate `kernel`", "the stage `speed` has timed no kernel beside its bound")
        return {}
    ideal = sum(flops[name] / (hardware.peak_tflops * 1e12 * bounds[name]) for name in names)
    return {"kernel": ideal / sum(alone[name] for name in names)}


def write_rates(stage: Stage, device: str, hardware: Any, rates: dict[str, float]) -> None:
    """rates.json, as `plan --rates_file` reads it."""
    if hardware is None and not stage.sizes.small:
        stage.leave_out("rates.json", f"{device} is not in hardware/accelerators.py")
        return
    content = {
        # A rehearsal writes the file too, so that its reader can be tested.
        "device": device if hardware else f"{device}, a rehearsal",
        "hardware": hardware.name if hardware else "h100",
        "date": str(datetime.date.today()),
        "versions": {name: version_of(name) for name in ("jax", "jaxlib", "triton")},
        "rates": rates,
    }
    write_atomically(stage.output / "rates.json", json.dumps(content, indent=1).encode())
    if hardware is None:
        stage.say(f"rates.json describes no accelerator: it is a rehearsal on {device}.")
        return
    command = "python -m baichuan_jax.plan --rates_file rates.json --topology h100:16x8 ..."
    stage.say(f"Rates are in rates.json: {command}")
