"""Every Triton kernel beside the plain operator (`kernels/reference.py`) computed in float32 on the same inputs: results and all
gradients.

Errors are the largest difference and the norm of the difference, each relative to the reference's, over results and gradients; the
worst of all cases of a row is shown. Before each call all free memory of the pool is filled with NaN, so a result that a kernel does
not write shows; a kernel that writes half of its output proves that this works. Every call is made twice and has to give the same
bits. `sm_80` rows run the A800's code: the same kernels written for compute capability 8.0 and assembled for this device. `torch` is
the error beside PyTorch's attention in float64, which shares no code with the reference.
"""

import contextlib
import functools
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

# Largest and norm error. bfloat16 keeps 8 bits (a relative error of 0.4 %), which a few roundings in a row multiply. float32 products
# are three TF32 ones, about float32's own precision; sums of thousands of terms in another order lose a few bits more.
TOLERANCE = {"bfloat16": (2e-2, 1e-2), "float32": (1e-4, 2e-5)}
# Scores of tens of thousands: a log-sum-exp of 3e4 is kept to 0.002 in float32, so weights are right to about 0.3 %.
EXTREME = {"bfloat16": (3e-2, 2e-2), "float32": (1e-2, 1e-2)}
TORCH_LENGTH = 4096  # beyond, float64 scores take too much memory for all workers at once


class Case(NamedTuple):
    """One comparison. `length`: tokens of attention, rows of RMSNorm; `size`: head size or width."""

    operator: str
    dtype: str
    length: int
    size: int
    variant: str

    def __str__(self) -> str:
        return f"{self.operator} {self.dtype} {self.length} x {self.size} {self.variant}"


def cases(lengths: tuple[int, ...], small: bool) -> list[Case]:
    """In the order of their worth: what training calls first, then odd lengths and the rest."""
    wide = (4096, 4095, 8192) if not small else (64, 300)
    long = max(length for length in lengths if length <= 4096)
    found = [Case("attention", "bfloat16", long, 128, "causal"), Case("attention", "bfloat16", long, 128, "sm_80 causal")]
    found += [
        Case("rms_norm", dtype, 4095 if not small else 19, width, variant)
        for width in wide
        for dtype in ("bfloat16", "float32")
        for variant in ("residual", "alone")
    ]
    order = sorted(lengths, key=lambda length: -(length <= 4096) * length)
    for length in order:
        for dtype in ("bfloat16", "float32"):
            for size in (128, 64):
                found += [Case("attention", dtype, length, size, variant) for variant in ("causal", "segments")]
    for dtype in ("bfloat16", "float32"):
        for size in (128, 64):
            found += [Case("attention", dtype, max(2, long), size, variant) for variant in ("sm_80 causal", "sm_80 segments")]
            found += [
                Case("attention", dtype, 127 if not small else 40, size, variant)
                for variant in ("unseen query", "offset", "extreme", "scan remat vmap shard_map", "sm_80 causal")
            ]
        found.append(Case("rms_norm", dtype, 1, wide[0], "residual"))
        found.append(Case("rms_norm", dtype, 256 if not small else 16, wide[0], "sm_80 residual"))
    found = list(dict.fromkeys(found))
    if small:  # the interpreter computes bfloat16 on raw bits and takes seconds for a case; lowering is the same for every size
        found = [case._replace(dtype="float32") for case in found if case.dtype == "bfloat16"]
        found = [case for case in dict.fromkeys(found) if case.size != 64 or case.operator == "rms_norm"]
    return found


def run(stage: Any) -> None:
    """Share the cases among worker processes; a worker that dies or raises is replaced, since a CUDA error stays with its process."""
    import jax

    from baichuan_jax.kernels.triton import bridge

    if (obstacle := bridge.obstacle()) is not None:
        raise RuntimeError(f"Triton kernels cannot run here: {obstacle}")
    if importlib.util.find_spec("torch") is None:
        stage.leave_out("torch's attention in float64", "torch is not installed")
    platform = jax.devices()[0].platform
    todo: queue.Queue[Case] = queue.Queue()
    everything = cases(stage.sizes.lengths, stage.sizes.small)
    for case in everything:
        todo.put(case)
    done: queue.Queue[tuple[Case, dict[str, Any]]] = queue.Queue()
    pool = [Worker(todo, done, stage.sizes, platform) for _ in range(stage.sizes.workers)]
    found: dict[Case, dict[str, Any]] = {}
    try:
        while len(found) < len(everything) and stage.seconds_left > 3:
            with contextlib.suppress(queue.Empty):
                case, result = done.get(timeout=0.2)
                found[case] = result
                print(case, result, flush=True)
                judge(stage, case, result)
                show(stage, found)
    finally:
        for worker in pool:
            worker.stop()
    if missing := [case for case in everything if case not in found]:
        stage.leave_out(f"{len(missing)} of {len(everything)} cases, the first {missing[0]}", "no time was left")
    stage.record(cases=[{**case._asdict(), **result} for case, result in found.items()])
    if stage.sizes.small:
        compile_all(stage)
    right = sum("wrong" not in result for result in found.values())
    worst = {
        dtype: max((r["norm_error"] for c, r in found.items() if c.dtype == dtype and "norm_error" in r), default=0.0)
        for dtype in ("bfloat16", "float32")
    }
    errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items() if error)
    stage.headline(f"{right} of {len(everything)} cases right; worst norm error {errors}")


def judge(stage: Any, case: Case, result: dict[str, Any]) -> None:
    """Compare with the tolerance; NaN never passes."""
    if "error" in result:
        result["wrong"] = result["error"]
        stage.wrong(f"{case}: {result['error']}")
        return
    largest, norm = (EXTREME if case.variant == "extreme" else TOLERANCE)[case.dtype]
    problems = []
    if not (result["largest_error"] <= largest and result["norm_error"] <= norm):
        problems.append(
            f"largest error {result['largest_error']:.1e} ({largest:.0e} allowed), norm {result['norm_error']:.1e} ({norm:.0e}), "
            f"worst in {result['worst']}"
        )
    if "torch_error" in result and not result["torch_error"] <= norm:
        problems.append(f"differs from torch by {result['torch_error']:.1e} ({norm:.0e} allowed)")
    if not result["same_bits"]:
        problems.append("two calls give different bits")
    if not result["poison_works"]:
        problems.append("memory was not prefilled with NaN: an output that nobody writes would not show")
    if problems:
        result["wrong"] = "; ".join(problems)
        stage.wrong(f"{case}: {result['wrong']}")


def show(stage: Any, found: dict[Case, dict[str, Any]]) -> None:
    """A row for each operator, type, head size and variant; its lengths together."""
    groups: dict[tuple[str, ...], list[tuple[Case, dict[str, Any]]]] = {}
    for case, result in found.items():
        groups.setdefault((case.operator, case.dtype, str(case.size), case.variant), []).append((case, result))
    rows = []
    for key, items in sorted(groups.items()):
        results = [result for _, result in items if "error" not in result]
        worst = [f"{max(r[name] for r in results):.1e}" if results else "-" for name in ("largest_error", "norm_error")]
        torch = [result["torch_error"] for result in results if "torch_error" in result]
        wrong = sum("wrong" in result for _, result in items)
        lengths = ", ".join(str(case.length) for case, _ in sorted(items))
        bits = "yes" if results and all(result["same_bits"] for result in results) else "no"
        rows.append([*key, lengths, *worst, f"{max(torch):.1e}" if torch else "-", bits, f"{wrong} wrong" if wrong else "right"])
    columns = ["operator", "dtype", "head or width", "variant", "lengths", "largest", "norm", "torch", "same bits", ""]
    stage.table("Kernels beside the plain operator in float32", columns, rows)


class Worker(threading.Thread):
    """A process that checks one case after the other."""

    def __init__(self, todo: queue.Queue, done: queue.Queue, sizes: Any, platform: str) -> None:
        super().__init__(daemon=True)
        self._todo, self._done, self._sizes, self._platform = todo, done, sizes, platform
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

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.kill()

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
        except BrokenPipeError:
            pass
        self._end()
        return {"error": f"the process died with {process.returncode}"}

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # Each takes a part of the GPU's memory, and torch some of the rest.
        environment = {**os.environ, "XLA_CLIENT_MEM_FRACTION": f"{0.7 / self._sizes.workers:.3f}"}
        if self._platform == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        else:
            # The reference's products need not be fast, so nothing is tuned for them.
            environment["XLA_FLAGS"] = (
                f"--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false {os.environ.get('XLA_FLAGS', '')}"
            )
        return subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )


def compile_all(stage: Any) -> None:
    """In a rehearsal: compile every kernel of a training step for both targets, and one program for an H100 with the A800's code."""
    import concurrent.futures
    import multiprocessing

    jobs = [(target, dtype, head) for target in ("sm_80", "sm_90") for dtype in ("bfloat16", "float32") for head in (128, 64)]
    rows = []
    # Spawned: a fork of a process with jax's threads can stand still.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        for part in pool.map(compiled_rows, jobs):
            rows += part
            stage.table("Compiled kernels", ["target", "kernel", "registers", "spilled bytes", "shared KiB"], rows)
    spilled = [row for row in rows if row[3] != "0"]
    if spilled:
        stage.say(f"{len(spilled)} of {len(rows)} kernels spill registers.")
    compile_for_h100(stage)


def compile_for_h100(stage: Any) -> None:
    """Programs of real cases, through jax-triton, for a GPU that is described by a topology: all but running them."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from baichuan_jax.config import MeshConfig
    from baichuan_jax.hardware import parse_topology
    from baichuan_jax.kernels.triton import bridge
    from baichuan_jax.plan import described_devices
    from baichuan_jax.sharding import Layout, activate, make_mesh

    (device,) = described_devices(parse_topology("h100:1x1"))
    layout = Layout(make_mesh(MeshConfig(1), [device]))
    programs = 0
    for variant in ("causal", "segments", "offset", "unseen query", "sm_80 segments"):
        case = Case("attention", "bfloat16", 4095, 128, variant)
        function, _, arguments, _ = attention_case(case)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in arguments]
        with activate(layout), bridge.compile_as(80) if "sm_80" in variant else contextlib.nullcontext():
            text = jax.jit(function).lower(*shapes).compile().as_text()
        programs += 1
        if text.count("triton_kernel_call") < 3:
            stage.wrong(f"{case}: compiled for an H100, it holds fewer than three kernels")
    stage.say(f"{programs} of these cases were compiled whole for an H100, in bfloat16 at 4,095 tokens.")


def compiled_rows(job: tuple[str, str, int]) -> list[list[str]]:
    """Of the kernels of one target, type and head size."""
    from baichuan_jax.kernels import sass
    from baichuan_jax.kernels.__main__ import list_launches

    target, dtype, head_dim = job
    chip = sass.CHIPS[target]
    rows = []
    for launch in list_launches(dtype, head_dim, chip.capability):
        if "norm" in launch.name and head_dim != 128:
            continue  # RMSNorm does not depend on heads
        made = sass.assemble(launch, chip)
        name = f"{launch.name} {dtype} head {head_dim}"
        rows.append([target, name, str(made.registers), str(made.spilled_bytes), f"{made.shared_bytes / 1024:.0f}"])
    return rows


# What follows runs in a worker.


def main() -> None:
    """Read cases from standard input, write a line for each."""
    import traceback

    for folder in (Path(__file__).parents[2], Path(__file__).parent):
        sys.path.insert(0, str(folder))
    for line in sys.stdin:
        case = Case(*json.loads(line))
        try:
            result = check(case)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print("RESULT " + json.dumps(result), flush=True)


def check(case: Case) -> dict[str, Any]:
    """Errors of one case, and whether its bits are the same twice."""
    import jax
    import numpy as np
    from poison import fill_free_memory, proves_itself

    from baichuan_jax.kernels.triton import bridge

    device = jax.devices()[0]
    function, plain, arguments, names = (attention_case if case.operator == "attention" else norm_case)(case)
    with contextlib.ExitStack() as stack:
        if device.platform == "cpu":
            from baichuan_jax.kernels.triton.interpreter import interpret

            stack.enter_context(bridge.run_with(interpret, 80))
        elif case.variant.startswith("sm_80"):
            stack.enter_context(bridge.compile_as(80))
        call = jax.jit(function).lower(*arguments).compile()
    works = device.platform == "cpu" or proves_itself()  # the interpreter's outputs begin as NaN
    calls = []
    for _ in range(2):
        fill_free_memory()
        calls.append([np.asarray(array) for array in call(*arguments)])
    with jax.default_matmul_precision("float32"):
        exact = [array.astype("float32") if array.dtype == case.dtype else array for array in arguments]
        wanted = [np.asarray(array) for array in jax.jit(plain)(*exact)]
    got = [array.astype(np.float32) for array in calls[0]]
    errors = {name: difference(a, b) for name, a, b in zip(names, got, wanted, strict=True)}
    if case.variant == "extreme" and case.dtype == "bfloat16":
        # Where one weight is 1 and the others are 0, gradients are differences of nearly equal numbers: of the rounded output nothing
        # is left of them. They have to be finite.
        finite = all(np.isfinite(array).all() for array in got)
        errors = {"out": errors["out"], **({} if finite else {"gradients": (float("nan"), float("nan"))})}
    # NaN counts as the worst.
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name][1], nan=np.inf))
    result = {
        "largest_error": max((error for error, _ in errors.values()), key=lambda error: np.nan_to_num(error, nan=np.inf)),
        "norm_error": errors[worst][1],
        "worst": worst,
        "same_bits": all(a.tobytes() == b.tobytes() for a, b in zip(*calls, strict=True)),
        "poison_works": works,
    }
    if importlib.util.find_spec("torch") and case.variant in ("causal", "segments") and case.length <= TORCH_LENGTH:
        theirs = torch_attention(arguments, case.variant == "segments")
        result["torch_error"] = max(difference(a, b)[1] for a, b in zip(got, theirs, strict=True))
    return result


def difference(got: Any, wanted: Any) -> tuple[float, float]:
    """Largest and norm of the difference, relative to the wanted array's; absolute where that is 0."""
    import numpy as np

    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    largest = np.abs(wanted).max()
    zero = largest < 1e-4  # as the gradient of a single weight
    off = got - wanted
    if zero:
        return float(np.abs(off).max()), float(np.abs(off).max())
    return float(np.abs(off).max() / largest), float(np.linalg.norm(off) / np.linalg.norm(wanted))


def attention_case(case: Case) -> tuple[Any, Any, list[Any], list[str]]:
    """The kernel with its gradients, the same by the plain operator, arguments, names of the results."""
    import jax
    import jax.numpy as jnp

    from baichuan_jax.kernels import reference
    from baichuan_jax.kernels.triton.attention import attention

    T, variant = case.length, case.variant.removeprefix("sm_80 ")
    B, N = 1, 2
    keys = jax.random.split(jax.random.key(hash_of(case)), 4)
    scale = 60.0 if variant == "extreme" else 1.0
    q, k, v, dout = (jax.random.normal(key, (B, T, N, case.size)) for key in keys)
    arrays = [(scale * q).astype(case.dtype), (scale * k).astype(case.dtype), v.astype(case.dtype), dout.astype(case.dtype)]
    # Documents of growing length, the last one cut.
    segments = jnp.broadcast_to(jnp.floor(jnp.sqrt(jnp.arange(T) / 3.0)).astype(jnp.int32), (B, T))

    def variant_of(function: Any) -> Any:
        if variant in ("causal", "extreme"):
            return lambda q, k, v: function(q, k, v)
        if variant == "segments":
            return lambda q, k, v: function(q, k, v, segments, segments)
        if variant == "unseen query":
            alone = jnp.ones((B, T), jnp.int32).at[0, T // 3].set(2)
            if function is attention:
                return lambda q, k, v: attention(q, k, v, alone, jnp.ones_like(alone))
            # The plain operator gives such a query the mean of all values; the kernels have to give 0.
            return lambda q, k, v: function(q, k, v, alone, jnp.ones_like(alone)).at[:, T // 3].set(0)
        if variant == "offset":
            first, count = T // 3, T // 2
            part = slice(first, first + count)
            return lambda q, k, v: (
                jnp.zeros_like(q).at[:, part].set(function(q[:, part], k, v, segments[:, part], segments, jnp.int32(first)))
            )
        assert variant == "scan remat vmap shard_map"
        return under_everything(function)

    names = ["out", "dq", "dk", "dv"]
    return *(with_gradients(variant_of(f)) for f in (attention, reference.attention)), arrays, names  # type: ignore[return-value]


def with_gradients(function: Any) -> Any:
    """Results and gradients of a function of q, k, v."""
    import jax

    def run(q: Any, k: Any, v: Any, dout: Any) -> tuple:
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    return run


def under_everything(function: Any) -> Any:
    """As a training step calls it: rows under vmap, in a shard_map, recomputed, in a loop of two blocks."""
    import jax
    import numpy as np
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def one(q: Any, k: Any, v: Any) -> Any:
        local = jax.shard_map(
            lambda q, k, v: function(q, k, v), mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"), check_vma=False
        )

        def block(x: Any, _: None) -> tuple:
            return x + local(x, k, v), None

        return jax.lax.scan(jax.checkpoint(block), q, None, length=2)[0]

    def run(q: Any, k: Any, v: Any) -> Any:
        split = [
            array.reshape(2, 1, array.shape[1] // 2, *array.shape[2:])
            for array in (q[:, : q.shape[1] // 2 * 2], k[:, : k.shape[1] // 2 * 2], v[:, : v.shape[1] // 2 * 2])
        ]
        return jax.vmap(one)(*split)

    def padded(q: Any, k: Any, v: Any) -> Any:
        out = run(q, k, v).reshape(1, -1, *q.shape[2:])
        return jax.numpy.zeros_like(q).at[:, : out.shape[1]].set(out)

    return padded


def norm_case(case: Case) -> tuple[Any, Any, list[Any], list[str]]:
    """RMSNorm with its gradients, with or without a residual."""
    import jax

    from baichuan_jax.kernels import _rms_norm, reference

    residual = case.variant.endswith("residual")
    keys = jax.random.split(jax.random.key(hash_of(case)), 5)
    x, added, dy, dtotal = (jax.random.normal(key, (1, case.length, case.size)).astype(case.dtype) for key in keys[:4])
    weight = 1 + 0.1 * jax.random.normal(keys[4], (case.size,))

    def run(function: Any, x: Any, added: Any, weight: Any, dy: Any, dtotal: Any) -> tuple:
        if residual:
            outputs, pull = jax.vjp(function, x, added, weight)
            return *outputs, *pull((dy, dtotal))
        outputs, pull = jax.vjp(lambda x, weight: function(x, None, weight), x, weight)
        return outputs, *pull(dy)

    def kernel(x: Any, added: Any, weight: Any) -> Any:
        outputs = _rms_norm(weight, x, added, 1e-6, "triton", None)
        return tuple(outputs) if added is not None else outputs[0]

    def plain(x: Any, added: Any, weight: Any) -> Any:
        return reference.rms_norm(x, weight, 1e-6, added)

    names = ["y", "total", "dx", "dresidual", "dweight"] if residual else ["y", "dx", "dweight"]
    return functools.partial(run, kernel), functools.partial(run, plain), [x, added, weight, dy, dtotal], names


def hash_of(case: Case) -> int:
    """A seed of its own for every case, the same in every process."""
    import zlib

    return zlib.crc32(str(case).encode())


def torch_attention(arguments: list[Any], segmented: bool) -> list[Any]:
    """PyTorch's scaled_dot_product_attention in float64, and its gradients, as arrays like those of the kernel."""
    import numpy as np
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, dout = (
        torch.tensor(np.asarray(array, np.float64), device=device).transpose(1, 2).requires_grad_() for array in arguments
    )
    T = q.shape[2]
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segmented:
        segments = torch.floor(torch.sqrt(torch.arange(T, dtype=torch.float32, device=device) / 3.0)).int()
        mask &= segments[:, None] == segments[None, :]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return [array.detach().transpose(1, 2).cpu().numpy() for array in (out, *gradients)]


if __name__ == "__main__":
    main()
