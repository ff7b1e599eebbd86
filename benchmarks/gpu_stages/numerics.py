"""Every Triton kernel beside the plain operator (`reference.py`) in float32: results and gradients.

Errors are the largest difference and the norm of the difference, each relative to the reference's,
over results and gradients; a row shows the worst of its cases. Every single vector (of a token and
head) is also compared, relative to its own size. In `extreme` (scores of tens of thousands) out and
dv are compared; dq and dk are nearly 0 there and have to be finite.

Before each call all free memory of the pool is filled with NaN, so an element that a kernel does
not write becomes visible; a kernel that writes half of its output checks that this works. Every
call is made twice and has to give the same bits. `sm_80` rows run the A800's code: the same kernels
written for compute capability 8.0 and assembled for this device. `torch` is the error beside
PyTorch's attention in float64, which shares no code with the reference.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checks import Case, parts_of

# Largest and norm error. bfloat16 keeps 8 bits: right kernels differ by 2.8e-3 in norm (computed
# with every rounding of the kernels, for 40 to 4,095 tokens). float32 products are three TF32 ones,
# about float32's own precision; sums of thousands of terms in another order lose a few bits more.
TOLERANCE = {"bfloat16": (2e-2, 6e-3), "float32": (1e-4, 2e-5)}
# Of the worst row. dq and dk are differences: terms of a row may cancel, and bfloat16 then keeps as
# little as half of the row. A row that is not written or belongs to another place is off by 1 or
# more.
ROW = {"bfloat16": 1.5e-2, "float32": 5e-4}
ROW_CANCELLING = {"bfloat16": 0.5, "float32": 5e-2}
# Scores of tens of thousands: a log-sum-exp of 3e4 is kept to 0.002 in float32, and sums of
# products of 1e5 to about 0.01, so weights are right to 1 %.
EXTREME = {"bfloat16": (3e-2, 2e-2), "float32": (3e-2, 2e-2)}
# As a training step calls the kernel.
UNDER_EVERYTHING = "scan remat vmap shard_map"
# Two blocks in a row: the result of the first is rounded before the second takes it.
TWICE = {dtype: (2 * largest, 2 * norm) for dtype, (largest, norm) in TOLERANCE.items()}

# Seconds before the end of the stage, kept to end the workers.
LEFT_TO_END = 8


def cases(lengths: tuple[int, ...], small: bool) -> list[Case]:
    """All cases by priority: those of training, then odd lengths, then the rest."""
    wide = (4096, 4095, 8192) if not small else (64, 300)
    long = max(length for length in lengths if length <= 4096)
    short, odd, few = (127, 4095, 256) if not small else (40, 19, 16)
    dtypes = ("bfloat16", "float32")
    found = [Case("attention", "bfloat16", long, 128, name) for name in ("causal", "sm_80 causal")]
    for width, dtype, variant in itertools.product(wide, dtypes, ("residual", "alone")):
        found.append(Case("rms_norm", dtype, odd, width, variant))
    # The longest that torch can follow first, the very long ones last.
    order = sorted(lengths, key=lambda length: -(length <= 4096) * length)
    plain = itertools.product(order, dtypes, (128, 64), ("causal", "segments"))
    for length, dtype, size, variant in plain:
        found.append(Case("attention", dtype, length, size, variant))
    special = ("unseen query", "offset", "extreme", UNDER_EVERYTHING, "sm_80 causal", "packed")
    as_in_training = ("sm_80 causal", "sm_80 segments", "packed segments")
    for dtype in dtypes:
        for size in (128, 64):
            of_size = functools.partial(Case, "attention", dtype)
            found += [of_size(long, size, name) for name in as_in_training]
            found += [of_size(short, size, name) for name in special]
        found.append(Case("rms_norm", dtype, 1, wide[0], "residual"))
        found.append(Case("rms_norm", dtype, few, wide[0], "sm_80 residual"))
    found = list(dict.fromkeys(found))
    if small:
        # The interpreter computes bfloat16 on raw bits, which takes seconds for a case; and
        # lowering does not depend on the size.
        found = [case._replace(dtype="float32") for case in found if case.dtype == "bfloat16"]
        kept = lambda case: case.size != 64 or case.operator == "rms_norm"
        found = [case for case in dict.fromkeys(found) if kept(case)]
    return found


def run(stage: Any) -> None:
    """Check all cases in worker processes.

    A worker that dies or raises is replaced: a CUDA error makes its process useless.
    """
    from baichuan_jax.kernels import triton_bridge as bridge

    if (obstacle := bridge.obstacle()) is not None:
        raise RuntimeError(f"Triton kernels cannot run here: {obstacle}")
    if importlib.util.find_spec("torch") is None:
        stage.leave_out("torch's attention in float64", "torch is not installed")
    # This process starts no backend: it would take the memory that the workers share.
    todo: queue.Queue[Case] = queue.Queue()
    everything = cases(stage.sizes.lengths, stage.sizes.small)
    for case in everything:
        todo.put(case)
    done: queue.Queue[tuple[Case, dict[str, Any]]] = queue.Queue()
    pool = [Worker(todo, done, stage.sizes) for _ in range(stage.sizes.workers)]
    found: dict[Case, dict[str, Any]] = {}
    try:
        while len(found) < len(everything) and stage.seconds_left > LEFT_TO_END:
            with contextlib.suppress(queue.Empty):
                case, result = done.get(timeout=0.2)
                found[case] = result
                print(case, result, flush=True)
                judge(stage, case, result)
                show(stage, found)
        conclude(stage, everything, found)
    finally:
        for worker in pool:
            worker.kill()
        for worker in pool:
            worker.stop()
    if stage.sizes.small:
        compile_all(stage)


def conclude(stage: Any, everything: list[Case], found: dict[Case, dict[str, Any]]) -> None:
    """Record all cases, report those that were not checked, and summarise."""
    stage.record(cases=[{**case._asdict(), **result} for case, result in found.items()])
    if missing := [case for case in everything if case not in found]:
        why = f"no time was left: {', '.join(map(str, missing))}"
        stage.leave_out(f"{len(missing)} of {len(everything)} cases", why, needed=True)
    if without := sorted({result["no_torch"] for result in found.values() if "no_torch" in result}):
        stage.leave_out("some of torch's comparisons", "; ".join(without))
    if not all(result.get("poison_works", True) for result in found.values()):
        stage.wrong(
            "memory could not be prefilled with NaN: an element that a kernel does not write would "
            "look right"
        )
    right = sum("wrong" not in result for result in found.values())
    norms: dict[str, list[float]] = {dtype: [] for dtype in TOLERANCE}
    for case, result in found.items():
        if "norm_error" in result:
            norms[case.dtype].append(result["norm_error"])
    worst = {dtype: worst_of(errors) for dtype, errors in norms.items()}
    errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items() if error)
    stage.headline(f"{right} of {len(everything)} cases right; worst norm error {errors}")


def judge(stage: Any, case: Case, result: dict[str, Any]) -> None:
    """Compare with the tolerance; NaN never passes."""
    if "error" in result:
        result["wrong"] = result["error"]
        stage.wrong(f"{case}: {result['error']}")
        return
    special = {"extreme": EXTREME, UNDER_EVERYTHING: TWICE}
    largest, norm = special.get(case.variant, TOLERANCE)[case.dtype]
    problems = []
    if not (result["largest_error"] <= largest and result["norm_error"] <= norm):
        problems.append(
            f"largest error {result['largest_error']:.1e} ({largest:.0e} allowed), norm "
            f"{result['norm_error']:.1e} ({norm:.0e}), worst in {result['worst']}"
        )
    if case.variant not in special:
        for name, errors in result["errors"].items():
            limit = (ROW_CANCELLING if name in ("dq", "dk") else ROW)[case.dtype]
            if not errors["row"] <= limit:
                off = f"{errors['row']:.1e} of itself ({limit:.0e} allowed)"
                problems.append(f"a row of {name} is off by {off}")
    if "torch_error" in result and not result["torch_error"] <= norm:
        problems.append(f"differs from torch by {result['torch_error']:.1e} ({norm:.0e} allowed)")
    if not result["same_bits"]:
        problems.append("two calls give different bits")
    if problems:
        result["wrong"] = "; ".join(problems)
        stage.wrong(f"{case}: {result['wrong']}")


def show(stage: Any, found: dict[Case, dict[str, Any]]) -> None:
    """One row for each operator, type, head size and variant, over all lengths."""
    groups: dict[tuple[str, ...], list[tuple[Case, dict[str, Any]]]] = {}
    for case, result in found.items():
        key = (case.operator, case.dtype, str(case.size), case.variant)
        groups.setdefault(key, []).append((case, result))
    rows = []
    for key, items in sorted(groups.items()):
        results = [result for _, result in items if "error" not in result]
        worst = [
            f"{worst_of(r[name] for r in results):.1e}" if results else "-"
            for name in ("largest_error", "norm_error")
        ]
        torch = [result["torch_error"] for result in results if "torch_error" in result]
        wrong = sum("wrong" in result for _, result in items)
        lengths = ", ".join(str(case.length) for case, _ in sorted(items))
        bits = "yes" if results and all(result["same_bits"] for result in results) else "no"
        cells = [f"{worst_of(torch):.1e}" if torch else "-", bits]
        rows.append([*key, lengths, *worst, *cells, f"{wrong} wrong" if wrong else "right"])
    groups_of = ["operator", "dtype", "head or width", "variant", "lengths"]
    columns = [*groups_of, "largest", "norm", "torch", "same bits", ""]
    stage.table("Kernels beside the plain operator in float32", columns, rows)


def worst_of(errors: Iterable[float]) -> float:
    """The largest; NaN is worse than any number."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=0.0)


class Worker(threading.Thread):
    """A process (checks.py) that checks one case after the other, and the thread that feeds it."""

    def __init__(self, todo: queue.Queue, done: queue.Queue, sizes: Any) -> None:
        super().__init__(daemon=True)
        self._todo, self._done, self._sizes = todo, done, sizes
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self.start()

    def run(self) -> None:
        while not self._stopped:
            try:
                case = self._todo.get_nowait()
            except queue.Empty:
                return
            self._done.put((case, self._ask(case)))

    def kill(self) -> None:
        """End the process without waiting for it."""
        self._stopped = True
        if (process := self._process) is not None:
            process.kill()

    def stop(self) -> None:
        """End the process, also in the middle of a case."""
        self._stopped = True
        if self._process is not None:
            self._end()

    def _ask(self, case: Case) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([*case]) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("RESULT "):
                    result = json.loads(line.removeprefix("RESULT "))
                    if "error" in result:
                        self._end()
                    return result
        except (BrokenPipeError, ValueError):  # it ended, or stop() has closed its pipes
            pass
        self._end()
        return {"error": f"the process died with {process.returncode}"}

    def _end(self) -> None:
        process, self._process = self._process, None
        # stop() has ended it.
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        # Each takes a part of the GPU's memory, and torch some of the rest.
        environment = {**os.environ, "XLA_CLIENT_MEM_FRACTION": f"{0.55 / self._sizes.workers:.3f}"}
        if self._sizes.small:
            environment["TRITON_INTERPRET"] = "1"
        else:
            # The reference's products need not be fast: tuning them costs more time than it saves.
            untuned = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
            environment["XLA_FLAGS"] = f"{untuned} {os.environ.get('XLA_FLAGS', '')}"
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("checks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )


def compile_all(stage: Any) -> None:
    """In a rehearsal: compile every kernel of a training step for both targets.

    And compile whole programs for an H100.
    """
    files = {target: stage.work / f"kernels-{target}.json" for target in ("sm_80", "sm_90")}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "baichuan_jax.kernels", "--targets", target, "--json", str(file)]
        )
        for target, file in files.items()
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError("python -m baichuan_jax.kernels failed; its output is in log.txt")
    found = [row for file in files.values() for row in json.loads(file.read_text(encoding="utf-8"))]
    rows = []
    for row in found:
        cells = [str(row["registers"]), str(row["spilled_bytes"])]
        rows.append([row["target"], row["kernel"], *cells, f"{row['bound_share_of_peak']:.1%}"])
    columns = ["target", "kernel", "registers", "spilled bytes", "bound, share of peak"]
    stage.table("Compiled kernels", columns, rows)
    compile_for_h100(stage)


def compile_for_h100(stage: Any) -> None:
    """Compile programs of real cases ahead of time for a topology of one H100."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding
    from poison import half_written

    from baichuan_jax.config.schema import MeshConfig
    from baichuan_jax.hardware.accelerators import parse_topology
    from baichuan_jax.kernels import triton_bridge as bridge
    from baichuan_jax.plan.ahead_of_time import described_devices
    from baichuan_jax.sharding import Layout, activate, make_mesh

    (device,) = described_devices(parse_topology("h100:1x1"))
    layout = Layout(make_mesh(MeshConfig(1), [device]))
    variants = ("causal", "segments", "offset", "unseen query", "sm_80 segments", "packed segments")
    everywhere = [Case("attention", "bfloat16", 4095, 128, variant) for variant in variants]
    everywhere.append(Case("rms_norm", "bfloat16", 4095, 4096, "residual"))
    programs = {
        str(case): (*parts_of(case)[::2], 3 if case.operator == "attention" else 2)
        for case in everywhere
    }
    programs["the kernel that writes half"] = (half_written, [jnp.ones(4096, jnp.float32)], 1)
    for name, (function, arguments, kernels) in programs.items():
        shapes = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
            for x in arguments
        ]
        older = "sm_80" in name
        with activate(layout), bridge.compile_as(80) if older else contextlib.nullcontext():
            text = jax.jit(function).lower(*shapes).compile().as_text()
        if (found := text.count("triton_kernel_call")) < kernels:
            wanted = f"{found} kernels and should hold {kernels}"
            stage.wrong(f"{name}: compiled for an H100, it holds {wanted}")
    stage.say(f"Compiled whole for an H100, not run: {'; '.join(programs)}.")
