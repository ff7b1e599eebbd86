"""Attention and RMSNorm at Baichuan-7B's sizes, each beside every other implementation that runs here.

TFLOP/s count the products that the causal mask leaves: two forward, five backward. Shares are of a large matrix product, or of a copy,
that was timed in the same rounds. Each Triton kernel is also timed alone, beside the share of the data sheet's peak that its own
instructions allow ([kernels](kernels.md)), and with other block shapes around the chosen one. A shape that is faster than the chosen
one by more than 3 % is named: it belongs into `kernels/triton/attention.py`.
"""

import argparse
import concurrent.futures
import contextlib
import contextvars
import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clock import measure
from results import reason
from stage import Stage

from baichuan_jax.config import Config
from baichuan_jax.xla_flags import apply_flags

KERNELS = ("attention_forward", "attention_dkv", "attention_dq")
PRODUCTS = {"attention_forward": 2, "attention_dkv": 4, "attention_dq": 3}
LEFT_TO_TIME = 20  # seconds before the end from which no further shape is compiled
BETTER = 1.03  # below this ratio a difference is noise

trying: contextvars.ContextVar[Any] = contextvars.ContextVar("trying", default=None)  # (kernel, shape) that a thread compiles


class Shape(NamedTuple):
    """Blocks of one kernel: see kernels.triton.attention.Blocks."""

    q: int
    k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.q} x {self.k}, {self.num_warps} warps, {self.num_stages} stages"


def run(stage: Stage) -> None:
    """Operators beside others, then kernels alone and their blocks."""
    sizes = stage.sizes
    if sizes.small:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    apply_flags(Config())  # as training does
    import kernels as bench  # benchmarks/kernels.py

    dtype = "bfloat16" if not sizes.small else "float32"
    options = argparse.Namespace(
        batch=sizes.batch,
        length=sizes.length,
        heads=sizes.heads,
        head_size=sizes.head_dim,
        rows=sizes.batch * sizes.length,
        width=sizes.hidden,
        rounds=sizes.rounds,
    )
    lines = []
    attention = bench.run_attention(options, dtype, stage)
    report_wrong(stage, attention)
    stage.record(attention=attention)
    lines.append(_beside_best("attention", attention["implementations"], "both", "FLOP/s"))
    stage.headline("; ".join(lines))
    norm = bench.run_norm(options, dtype, True, stage)
    report_wrong(stage, norm)
    stage.record(rms_norm=norm)
    lines.append(_beside_best("RMSNorm", norm["implementations"], "both", "B/s"))
    stage.headline("; ".join(lines))
    with contextlib.ExitStack() as stack:
        if sizes.small:
            from baichuan_jax.kernels.triton import bridge
            from baichuan_jax.kernels.triton.interpreter import interpret

            stage.say("Kernels alone are interpreted: their times mean nothing.")
            stack.enter_context(bridge.run_with(interpret, 90))
        kernels_alone(stage, dtype)


def report_wrong(stage: Stage, result: dict[str, Any]) -> None:
    """An implementation of ours that gives other numbers at these sizes is wrong, and so is Triton where it does not run on a GPU; of
    others it is a note.
    """
    for name, row in result["implementations"].items():
        why = row.get("why_not", "")
        differs = why.startswith("WRONG") and not name.startswith(("tokamax", "torch", "jax.nn"))
        if differs or (why and name == "triton" and not stage.sizes.small):
            stage.wrong(f"{result['title']}: {name}: {why.removeprefix('WRONG: ')}")


def _beside_best(operator: str, found: dict[str, Any], passes: str, unit: str) -> str:
    """Triton's speed and its ratio to the fastest other one, in words."""
    speeds = {name: row[passes][unit] for name, row in found.items() if passes in row}
    others = {name: speed for name, speed in speeds.items() if name != "triton"}
    best = max(others, key=lambda name: others[name]) if others else None
    if "triton" not in speeds:
        return f"{operator}: triton was not timed ({found['triton']['why_not']}); the fastest here is {best}"
    ours = f"{operator} {speeds['triton'] / 1e12:.0f} T{unit} forward and backward"
    return ours if best is None else f"{ours}, {speeds['triton'] / others[best]:.2f} times the best other ({best})"


def kernels_alone(stage: Stage, dtype: str) -> None:
    """Time each kernel with the chosen blocks and with those around them."""
    from unittest import mock

    from baichuan_jax.hardware import hardware_of
    from baichuan_jax.kernels.triton import attention, bridge

    sizes = stage.sizes
    capability = bridge.compute_capability()
    chosen = {name: Shape(*attention.choose_blocks(name, dtype, sizes.head_dim, capability)) for name in KERNELS}
    tried = {name: around(shape)[: 3 if sizes.small else None] for name, shape in chosen.items()}
    # Spawned: a fork of a process that holds a GPU is not safe.
    pool = concurrent.futures.ProcessPoolExecutor(
        sizes.workers, mp_context=multiprocessing.get_context("spawn"), initializer=compile_only
    )
    assembling = {
        (name, shape): pool.submit(assemble, name, shape, dtype, sizes.head_dim, capability)
        for name in KERNELS
        for shape in tried[name]
    }
    B, T, N, H = sizes.batch, sizes.length, sizes.heads, sizes.head_dim
    q, k, v, dout = (jax.random.normal(key, (B, T, N, H)).astype(dtype) for key in jax.random.split(jax.random.key(0), 4))
    offset = jnp.zeros((B,), jnp.int32)
    inputs = (q, k, v, offset, offset, offset)
    out, lse = jax.jit(functools.partial(attention._run_forward, False))(*inputs)
    delta = jnp.swapaxes(jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1), 1, 2)
    saved = (*inputs, dout, lse, delta)
    parts = {
        "attention_forward": (lambda *a: attention._run_forward(False, *a), inputs),
        "attention_dkv": (lambda *a: attention._run_backward(False, *a)[1:], saved),
        "attention_dq": (lambda *a: attention._run_backward(False, *a)[0], saved),
    }
    failed: dict[tuple[str, Shape], str] = {}

    def compile_one(job: tuple[str, Shape]) -> Callable[[], object] | None:
        name, _ = job
        if stage.seconds_left < LEFT_TO_TIME:
            failed[job] = "no time was left"
            return None
        function, arguments = parts[name]
        token = trying.set(job)
        try:
            compiled = jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
            jax.block_until_ready(compiled(*arguments))
            return functools.partial(compiled, *arguments)
        except Exception as error:  # too much shared memory, above all
            failed[job] = reason(error, 80)
            return None
        finally:
            trying.reset(token)

    def choose(kernel: str, *others: Any) -> Any:
        job = trying.get()
        return attention.Blocks(*(job[1] if job is not None and job[0] == kernel else chosen[kernel]))

    # The chosen ones first, then the neighbours of all kernels in turn.
    most = max(map(len, tried.values()))
    jobs = [(name, tried[name][place]) for place in range(most) for name in KERNELS if place < len(tried[name])]
    with mock.patch.object(attention, "choose_blocks", choose), concurrent.futures.ThreadPoolExecutor(sizes.workers) as threads:
        # A thread sees this one's context: kernels may be interpreted.
        made_calls = [threads.submit(contextvars.copy_context().run, compile_one, job) for job in jobs]
        compiled_jobs = {job: future.result() for job, future in zip(jobs, made_calls, strict=True)}
    calls = {f"{name} {shape}": call for (name, shape), call in compiled_jobs.items() if call is not None}
    seconds = measure(calls, sizes.rounds, sizes.sample_seconds)
    hardware = hardware_of(jax.devices()[0].device_kind)
    flops = {name: PRODUCTS[name] * 2 * B * N * H * T * (T + 1) / 2 for name in KERNELS}
    rows, best, bounded = [], {}, {}
    for name in KERNELS:
        base = seconds.get(f"{name} {chosen[name]}")
        timed = {shape: seconds[f"{name} {shape}"] for shape in tried[name] if f"{name} {shape}" in seconds}
        for shape in tried[name]:
            made = _result_of(assembling[name, shape])
            cells = [str(made.get("registers", "-")), str(made.get("spilled_bytes", made.get("error", "-")))]
            mark = "chosen" if shape == chosen[name] else ""
            if shape not in timed:
                rows.append([name, str(shape), *cells, "-", "-", "-", "-", "-", failed[name, shape]])
                continue
            rate = flops[name] / timed[shape]
            share = rate / (hardware.peak_tflops * 1e12) if hardware else None
            bound = made.get("bound")
            rows.append(
                [
                    name,
                    str(shape),
                    *cells,
                    f"{timed[shape] * 1e3:.3f}",
                    f"{rate / 1e12:.0f}",
                    "-" if share is None else f"{share:.1%}",
                    "-" if bound is None else f"{bound:.1%}",
                    "-" if share is None or not bound else f"{share / bound:.0%}",
                    mark,
                ]
            )
            if shape == chosen[name] and bound:
                bounded[name] = bound
        if timed:
            fastest = min(timed, key=lambda shape: timed[shape])
            best[name] = {"shape": [*fastest], "seconds": timed[fastest], "chosen": [*chosen[name]], "chosen_seconds": base}
            if base is not None and base > BETTER * timed[fastest] and not sizes.small:
                stage.say(f"{name}: {fastest} is {base / timed[fastest]:.2f} times as fast as the chosen {chosen[name]}.")
    pool.shutdown(cancel_futures=True)
    columns = [
        "kernel",
        "blocks: queries x keys",
        "registers",
        "spilled",
        "ms",
        "TFLOP/s",
        "of peak",
        "bound",
        "of its bound",
        "",
    ]
    stage.table(f"Triton kernels alone, {B} x {T} tokens, {N} heads of {H}, {dtype}", columns, rows)
    alone = {name: seconds[f"{name} {chosen[name]}"] for name in KERNELS if f"{name} {chosen[name]}" in seconds}
    stage.record(kernels_alone=alone, kernel_flops=flops, kernel_bounds=bounded, best_blocks=best)


def _result_of(future: concurrent.futures.Future) -> dict[str, Any]:
    try:
        return future.result(timeout=20)
    except Exception as error:
        return {"error": f"{type(error).__name__}"}


def around(shape: Shape) -> list[Shape]:
    """The shape itself and its neighbours: half and twice the queries or keys, other warps, a stage more or less."""
    q, k, warps, stages = shape
    found = [shape, shape._replace(q=q // 2), shape._replace(q=q * 2), shape._replace(k=k // 2), shape._replace(k=k * 2)]
    found += [shape._replace(num_warps=12 - warps if warps in (4, 8) else 4), shape._replace(num_stages=stages + 1)]
    found += [shape._replace(num_stages=stages - 1)] if stages > 1 else []
    # 32 rows a warp: fewer bytes from shared memory, more registers; what spills may cost less than the bound says.
    found += [Shape(128, 64, 4, 2), Shape(128, 64, 4, 3), Shape(128, 128, 8, 2), Shape(64, 128, 4, 2)]
    return [s for s in dict.fromkeys(found) if 16 <= s.q <= 256 and 16 <= s.k <= 256]


def compile_only() -> None:
    """In a process that assembles: it takes no device, and does not interpret."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.pop("TRITON_INTERPRET", None)


def assemble(name: str, shape: Shape, dtype: str, head_dim: int, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and bound of a kernel with these blocks, from the assembler; in a process of its own."""
    from unittest import mock

    from baichuan_jax.kernels import sass
    from baichuan_jax.kernels.__main__ import list_launches
    from baichuan_jax.kernels.bound import attention_bound
    from baichuan_jax.kernels.triton import attention

    choose = attention.choose_blocks

    def patched(kernel: str, *others: Any) -> Any:
        return attention.Blocks(*shape) if kernel == name else choose(kernel, *others)

    with mock.patch.object(attention, "choose_blocks", patched):
        launch = next(launch for launch in list_launches(dtype, head_dim, capability) if launch.name == name)
    chip = sass.CHIPS["sm_80" if capability < 90 else "sm_90"]
    made = sass.assemble(launch, chip)
    found: dict[str, Any] = {"registers": made.registers, "spilled_bytes": made.spilled_bytes}
    with contextlib.suppress(RuntimeError):  # another number of loops than the bound knows
        found["bound"] = attention_bound(launch, made, chip).share_of_peak
    return found
