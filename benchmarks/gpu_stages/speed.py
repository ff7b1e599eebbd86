"""Attention and RMSNorm at Baichuan-7B's sizes, beside every implementation that runs here.

TFLOP/s count the products that the causal mask leaves: two forward, five backward. Shares are of a
large matrix product, or of a copy, that was timed in the same rounds. Each Triton kernel is also
timed alone, beside the share of the data sheet's peak that its own instructions allow
([kernels](kernels.md)), and with block shapes near the chosen one. A shape that is faster than the
chosen one by more than 3 % is reported: it belongs into `kernels/attention/triton.py`.
"""

import argparse
import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from clock import measure
from results import reason
from stage import Stage

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import hardware_of
from baichuan_jax.hardware.flops import ATTENTION_PRODUCTS, causal_attention_flops
from baichuan_jax.xla_flags import apply_flags

KERNELS = ("attention_forward", "attention_dkv", "attention_dq")
# Seconds before the end from which no further shape is compiled.
LEFT_TO_TIME = 20
# Below this ratio a difference is noise.
BETTER = 1.03

# The (kernel, blocks) that a thread compiles. Blocks are those of kernels/attention/triton.py,
# which is imported late: it needs Triton.
trying: contextvars.ContextVar[Any] = contextvars.ContextVar("trying", default=None)


def run(stage: Stage) -> None:
    """Time operators beside other implementations, then kernels alone with several blocks."""
    sizes = stage.sizes
    if sizes.small:
        # Read when triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    # As training does.
    apply_flags(Config())
    # This is benchmarks/kernels.py.
    import kernels as bench

    dtype = "bfloat16" if not sizes.small else "float32"
    shape = {"batch": sizes.batch, "length": sizes.length, "heads": sizes.heads}
    shape |= {"head_size": sizes.head_dim, "rows": sizes.batch * sizes.length}
    options = argparse.Namespace(**shape, width=sizes.hidden, rounds=sizes.rounds)
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
            from baichuan_jax.kernels import triton_bridge as bridge
            from baichuan_jax.kernels.triton_interpreter import interpret

            stage.say("Kernels alone are interpreted: their times mean nothing.")
            stack.enter_context(bridge.run_with(interpret, 90))
        kernels_alone(stage, dtype)


def report_wrong(stage: Stage, result: dict[str, Any]) -> None:
    """Report our implementations that differ at these sizes, and Triton where it does not run.

    Other libraries' differences are notes in the table.
    """
    for name, row in result["implementations"].items():
        why = row.get("why_not", "")
        differs = why.startswith("WRONG") and not name.startswith(("tokamax", "torch", "jax.nn"))
        if differs or (why and name == "triton" and not stage.sizes.small):
            stage.wrong(f"{result['title']}: {name}: {why.removeprefix('WRONG: ')}")


def _beside_best(operator: str, found: dict[str, Any], passes: str, unit: str) -> str:
    """Triton's speed and its ratio to the fastest other implementation, as text."""
    speeds = {name: row[passes][unit] for name, row in found.items() if passes in row}
    others = {name: speed for name, speed in speeds.items() if name != "triton"}
    best = max(others, key=lambda name: others[name]) if others else None
    if "triton" not in speeds:
        why_not = f"triton was not timed ({found['triton']['why_not']})"
        return f"{operator}: {why_not}; the fastest here is {best}"
    ours = f"{operator} {speeds['triton'] / 1e12:.0f} T{unit} forward and backward"
    if best is None:
        return ours
    return f"{ours}, {speeds['triton'] / others[best]:.2f} times the best other ({best})"


def kernels_alone(stage: Stage, dtype: str) -> None:
    """Time each kernel with the chosen blocks and with those near them."""
    from baichuan_jax.kernels import triton_bridge as bridge
    from baichuan_jax.kernels.attention import triton as attention

    sizes = stage.sizes
    capability = bridge.compute_capability()
    chosen = {
        name: attention.choose_blocks(name, dtype, sizes.head_dim, capability) for name in KERNELS
    }
    tried = {name: around(blocks)[: 3 if sizes.small else None] for name, blocks in chosen.items()}
    # The chosen ones first, then the neighbours of all kernels in turn.
    jobs = [
        (name, blocks)
        for turn in itertools.zip_longest(*tried.values())
        for name, blocks in zip(KERNELS, turn, strict=True)
        if blocks
    ]
    # Spawned: a fork of a process that holds a GPU is not safe.
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(sizes.workers, spawn, initializer=compile_only)
    what = (dtype, sizes.head_dim, capability)
    assembling = {job: pool.submit(assemble, *job, *what) for job in jobs}
    calls, failed = compile_calls(stage, jobs, chosen, dtype)
    seconds = measure(calls, sizes.rounds, sizes.sample_seconds)
    made = {job: _result_of(future) for job, future in assembling.items()}
    pool.shutdown(cancel_futures=True)
    shape = (sizes.batch, sizes.length, sizes.heads, sizes.head_dim)
    flops = {name: causal_attention_flops(shape, ATTENTION_PRODUCTS[name]) for name in KERNELS}
    rows = []
    for job in sorted(jobs, key=lambda job: KERNELS.index(job[0])):
        name, blocks = job
        note = failed.get(job, "chosen" if blocks == chosen[name] else "")
        rows.append(kernel_row(job, seconds.get(job), made[job], flops[name], note))
    shape = f"{sizes.batch} x {sizes.length} tokens, {sizes.heads} heads of {sizes.head_dim}"
    assembler, speeds = ["registers", "spilled"], ["ms", "TFLOP/s", "of peak"]
    bounds = ["bound", "of its bound", ""]
    columns = ["kernel", "blocks: queries x keys", *assembler, *speeds, *bounds]
    stage.table(f"Triton kernels alone, {shape}, {dtype}", columns, rows)
    best = {}
    for name in KERNELS:
        timed = {blocks: took for (kernel, blocks), took in seconds.items() if kernel == name}
        if not timed:
            continue
        fastest, base = min(timed, key=lambda blocks: timed[blocks]), timed.get(chosen[name])
        found = {"shape": fastest, "seconds": timed[fastest]}
        best[name] = {**found, "chosen": chosen[name], "chosen_seconds": base}
        if base is not None and base > BETTER * timed[fastest] and not sizes.small:
            ratio = f"{base / timed[fastest]:.2f} times as fast as the chosen"
            stage.say(f"{name}: {label(fastest)} is {ratio} {label(chosen[name])}.")
    chosen_jobs = [(name, chosen[name]) for name in KERNELS]
    alone = {job[0]: seconds[job] for job in chosen_jobs if job in seconds}
    stage.record(kernels_alone=alone, kernel_flops=flops, best_blocks=best)


def label(blocks: Any) -> str:
    """Blocks as the table has them."""
    return f"{blocks.q} x {blocks.k}, {blocks.num_warps} warps, {blocks.num_stages} stages"


def compile_calls(
    stage: Stage, jobs: list[Any], chosen: dict[str, Any], dtype: str
) -> tuple[dict[Any, Callable], dict[Any, str]]:
    """Compile a call for each (kernel, blocks), several at once.

    Returns the calls, and the reason for each that cannot be compiled or started.
    """
    from unittest import mock

    from baichuan_jax.kernels.attention import triton as attention

    B, T, N, H = stage.sizes.batch, stage.sizes.length, stage.sizes.heads, stage.sizes.head_dim
    # Queries apart from keys and values: the packed projection is turned in place, for which XLA
    # would copy the arguments of every call.
    q, k, v, dout = (
        jax.random.normal(key, (B, T, N, H)).astype(dtype)
        for key in jax.random.split(jax.random.key(0), 4)
    )
    offset = jnp.zeros((B,), jnp.int32)
    inputs = (q, jnp.stack((k, v), axis=2), *[offset] * 5)
    forward, dq, dkv = (
        functools.partial(run, False, False)
        for run in (attention.run_forward, attention.run_dq, attention.run_dkv)
    )
    out, lse, _ = jax.jit(forward)(*inputs)
    saved = (*inputs, out, lse, dout)
    delta, _ = jax.jit(dq)(*saved)
    parts = {
        "attention_forward": (forward, inputs),
        "attention_dkv": (dkv, (*inputs, dout, lse, delta, offset)),
        "attention_dq": (dq, saved),
    }
    failed: dict[Any, str] = {}

    def choose(kernel: str, *others: Any) -> Any:
        name, blocks = trying.get()
        return blocks if name == kernel else chosen[kernel]

    def compile_one(job: Any) -> Callable[[], object] | None:
        if stage.seconds_left < LEFT_TO_TIME:
            failed[job] = "no time was left"
            return None
        # In this thread's own context.
        trying.set(job)
        function, arguments = parts[job[0]]
        try:
            compiled = jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
            jax.block_until_ready(compiled(*arguments))
            return functools.partial(compiled, *arguments)
        except Exception as error:  # most often too much shared memory
            failed[job] = reason(error, 80)
            return None

    with (
        mock.patch.object(attention, "choose_blocks", choose),
        concurrent.futures.ThreadPoolExecutor(stage.sizes.workers) as threads,
    ):
        # Each with a copy of this thread's context, which says whether kernels are interpreted.
        copy = contextvars.copy_context
        started = {job: threads.submit(copy().run, compile_one, job) for job in jobs}
        calls = {job: future.result() for job, future in started.items()}
    return {job: call for job, call in calls.items() if call is not None}, failed


def kernel_row(
    job: Any, seconds: float | None, made: dict[str, Any], flops: float, note: str
) -> list[str]:
    """The row of a (kernel, blocks): the assembler's numbers, then speed and shares."""
    name, blocks = job
    registers = str(made.get("registers", "-"))
    cells = [name, label(blocks), registers, str(made.get("spilled_bytes", made.get("error", "-")))]
    if seconds is None:
        return [*cells, "-", "-", "-", "-", "-", note]
    hardware = hardware_of(jax.devices()[0].device_kind)
    rate, bound = flops / seconds, made.get("bound")
    share = rate / (hardware.peak_tflops * 1e12) if hardware else None
    cells += [f"{seconds * 1e3:.3f}", f"{rate / 1e12:.0f}"]
    cells.append("-" if share is None else f"{share:.1%}")
    cells.append("-" if bound is None else f"{bound:.1%}")
    cells.append("-" if share is None or not bound else f"{share / bound:.0%}")
    return [*cells, note]


def _result_of(future: concurrent.futures.Future) -> dict[str, Any]:
    """What a process found, or the kind of error that it met."""
    try:
        return future.result(timeout=20)
    except Exception as error:
        return {"error": type(error).__name__}


def around(blocks: Any) -> list[Any]:
    """The blocks themselves, then their neighbours.

    Half and twice the queries or keys, another number of warps, one stage more or less.
    """
    q, k, warps, stages = blocks
    found = [blocks, blocks._replace(q=q // 2), blocks._replace(q=q * 2)]
    found += [blocks._replace(k=k // 2), blocks._replace(k=k * 2)]
    found.append(blocks._replace(num_warps=12 - warps if warps in (4, 8) else 4))
    found.append(blocks._replace(num_stages=stages + 1))
    found += [blocks._replace(num_stages=stages - 1)] if stages > 1 else []
    # 32 rows a warp: fewer bytes from shared memory, more registers. Spilling may cost less than
    # the bound says.
    wide = [(128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)]
    found += [type(blocks)(*shape) for shape in wide]
    return [b for b in dict.fromkeys(found) if 16 <= b.q <= 256 and 16 <= b.k <= 256]


def compile_only() -> None:
    """Initialise a process that assembles: it takes no device, and does not interpret."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.pop("TRITON_INTERPRET", None)


def assemble(name: str, blocks: Any, dtype: str, head_dim: int, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and bound of a kernel with these blocks, from the assembler.

    Runs in a process of its own.
    """
    from unittest import mock

    from baichuan_jax.kernels.attention import triton as attention
    from baichuan_jax.kernels.inspect import sass
    from baichuan_jax.kernels.inspect.bound import attention_bound
    from baichuan_jax.kernels.inspect.resources import list_launches

    choose = attention.choose_blocks

    def patched(kernel: str, *others: Any) -> Any:
        return blocks if kernel == name else choose(kernel, *others)

    with mock.patch.object(attention, "choose_blocks", patched):
        launches = list_launches(dtype, head_dim, capability)
        launch = next(launch for launch in launches if launch.name == name)
    chip = sass.CHIPS["sm_80" if capability < 90 else "sm_90"]
    made = sass.assemble(launch, chip)
    found: dict[str, Any] = {"registers": made.registers, "spilled_bytes": made.spilled_bytes}
    # A number of loops that the bound does not know.
    with contextlib.suppress(RuntimeError):
        found["bound"] = attention_bound(launch, made, chip).share_of_peak
    return found
