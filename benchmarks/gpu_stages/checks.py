"""One comparison of a kernel with the plain operator. As a program: reads cases from standard input, writes a result for each, for
numerics.py, which runs some of these processes side by side.
"""

import contextlib
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

for folder in (
    Path(__file__).parents[1],
    Path(__file__).parents[2],
    Path(__file__).parent,
):  # as a program
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from results import reason

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


def main() -> None:
    """Read cases from standard input, write a line for each."""
    import traceback

    for line in sys.stdin:
        case = Case(*json.loads(line))
        try:
            result = check(case)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {reason(error, 300)}"}
        print("RESULT " + json.dumps(result), flush=True)


def check(case: Case) -> dict[str, Any]:
    """Errors of one case, and whether its bits are the same twice."""
    import jax
    import numpy as np
    from poison import fill_free_memory, proves_itself

    from baichuan_jax.kernels import triton_bridge as bridge

    device = jax.devices()[0]
    function, plain, arguments, names = parts_of(case)
    with contextlib.ExitStack() as stack:
        if device.platform == "cpu":
            from baichuan_jax.kernels.triton_interpreter import interpret

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
        exact = [
            array.astype("float32") if array.dtype == case.dtype else array for array in arguments
        ]
        wanted = [np.asarray(array) for array in jax.jit(plain)(*exact)]
    got = [array.astype(np.float32) for array in calls[0]]
    errors = {name: difference(a, b) for name, a, b in zip(names, got, wanted, strict=True)}
    if case.variant == "extreme":
        # Where one weight is 1 and the others are 0, dq and dk are differences of equal numbers,
        # all but 0: they have to be finite.
        finite = all(np.isfinite(array).all() for array in got)
        errors = {name: errors[name] for name in ("out", "dv")} | (
            {} if finite else {"dq, dk": (float("nan"),) * 3}
        )
    # NaN counts as the worst.
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name][1], nan=np.inf))
    result = {
        "errors": {
            name: dict(zip(("largest", "norm", "row"), values, strict=True))
            for name, values in errors.items()
        },
        "largest_error": max(
            (values[0] for values in errors.values()),
            key=lambda error: np.nan_to_num(error, nan=np.inf),
        ),
        "norm_error": errors[worst][1],
        "worst": worst,
        "same_bits": all(a.tobytes() == b.tobytes() for a, b in zip(*calls, strict=True)),
        "poison_works": works,
    }
    compared = (
        case.operator == "attention"
        and case.variant in ("causal", "segments")
        and case.length <= TORCH_LENGTH
    )
    if compared and importlib.util.find_spec("torch"):
        try:
            theirs = torch_attention(arguments, case.variant == "segments")
            result["torch_error"] = max(
                difference(a, b)[1] for a, b in zip(got, theirs, strict=True)
            )
        except (
            Exception
        ) as error:  # a torch that is broken, or without memory, says nothing about the kernel
            result["no_torch"] = reason(error)
    return result


def parts_of(case: Case) -> tuple[Any, Any, list[Any], list[str]]:
    """The kernel with its gradients, the same by the plain operator, their arguments, names of the results."""
    return (attention_case if case.operator == "attention" else norm_case)(case)


def difference(got: Any, wanted: Any) -> tuple[float, float, float]:
    """The difference relative to the wanted array: its largest element, its norm, and the norm of its worst row (the last axis)
    relative to that row. Absolute where the wanted array is 0.
    """
    import numpy as np

    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    largest = np.abs(wanted).max()
    zero = largest < 1e-4  # as the gradient of a single weight
    off = got - wanted
    if zero:
        return (float(np.abs(off).max()),) * 3
    rows = np.linalg.norm(wanted, axis=-1)
    # A row of nearly 0, as the gradient of a query that sees one key, is measured against a
    # ten-thousandth of the largest.
    row = np.linalg.norm(off, axis=-1) / np.maximum(rows, 1e-4 * rows.max())
    return (
        float(np.abs(off).max() / largest),
        float(np.linalg.norm(off) / np.linalg.norm(wanted)),
        float(row.max()),
    )


def attention_case(case: Case) -> tuple[Any, Any, list[Any], list[str]]:
    """See parts_of."""
    import jax
    import jax.numpy as jnp

    from baichuan_jax.kernels.attention import reference as reference_attention
    from baichuan_jax.kernels.attention.triton import attention

    T, variant = case.length, case.variant.removeprefix("sm_80 ")
    B, N = 1, 2
    keys = jax.random.split(jax.random.key(hash_of(case)), 4)
    scale = 60.0 if variant == "extreme" else 1.0
    q, k, v, dout = (jax.random.normal(key, (B, T, N, case.size)) for key in keys)
    arrays = [
        (scale * q).astype(case.dtype),
        (scale * k).astype(case.dtype),
        v.astype(case.dtype),
        dout.astype(case.dtype),
    ]
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
            # The plain operator gives such a query the mean of all values; the kernels have to give
            # 0.
            return lambda q, k, v: (
                function(q, k, v, alone, jnp.ones_like(alone)).at[:, T // 3].set(0)
            )
        if variant == "offset":
            first, count = T // 3, T // 2
            part = slice(first, first + count)
            return lambda q, k, v: (
                jnp.zeros_like(q)
                .at[:, part]
                .set(function(q[:, part], k, v, segments[:, part], segments, jnp.int32(first)))
            )
        assert variant == "scan remat vmap shard_map"
        return under_everything(function)

    names = ["out", "dq", "dk", "dv"]
    return (
        *(with_gradients(variant_of(f)) for f in (attention, reference_attention.attention)),
        arrays,
        names,
    )  # type: ignore[return-value]


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
            lambda q, k, v: function(q, k, v),
            mesh=mesh,
            in_specs=(P("data"),) * 3,
            out_specs=P("data"),
            check_vma=False,
        )

        def block(x: Any, _: None) -> tuple:
            return x + local(x, k, v), None

        return jax.lax.scan(jax.checkpoint(block), q, None, length=2)[0]

    def run(q: Any, k: Any, v: Any) -> Any:
        split = [
            array.reshape(2, 1, array.shape[1] // 2, *array.shape[2:])
            for array in (
                q[:, : q.shape[1] // 2 * 2],
                k[:, : k.shape[1] // 2 * 2],
                v[:, : v.shape[1] // 2 * 2],
            )
        ]
        return jax.vmap(one)(*split)

    def padded(q: Any, k: Any, v: Any) -> Any:
        out = run(q, k, v).reshape(1, -1, *q.shape[2:])
        return jax.numpy.zeros_like(q).at[:, : out.shape[1]].set(out)

    return padded


def norm_case(case: Case) -> tuple[Any, Any, list[Any], list[str]]:
    """See parts_of; with or without a residual."""
    import jax

    from baichuan_jax.kernels.rms_norm import reference as reference_rms_norm
    from baichuan_jax.kernels.rms_norm.api import _rms_norm
    from baichuan_jax.sharding import current_layout

    residual = case.variant.endswith("residual")
    keys = jax.random.split(jax.random.key(hash_of(case)), 5)
    x, added, dy, dtotal = (
        jax.random.normal(key, (1, case.length, case.size)).astype(case.dtype) for key in keys[:4]
    )
    weight = 1 + 0.1 * jax.random.normal(keys[4], (case.size,))

    def run(function: Any, x: Any, added: Any, weight: Any, dy: Any, dtotal: Any) -> tuple:
        if residual:
            outputs, pull = jax.vjp(function, x, added, weight)
            return *outputs, *pull((dy, dtotal))
        outputs, pull = jax.vjp(lambda x, weight: function(x, None, weight), x, weight)
        return outputs, *pull(dy)

    def kernel(x: Any, added: Any, weight: Any) -> Any:
        outputs = _rms_norm(weight, x, added, 1e-6, "triton", current_layout())
        return tuple(outputs) if added is not None else outputs[0]

    def plain(x: Any, added: Any, weight: Any) -> Any:
        return reference_rms_norm.rms_norm(x, weight, 1e-6, added)

    names = ["y", "total", "dx", "dresidual", "dweight"] if residual else ["y", "dx", "dweight"]
    return (
        functools.partial(run, kernel),
        functools.partial(run, plain),
        [x, added, weight, dy, dtotal],
        names,
    )


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
        torch.tensor(np.asarray(array, np.float64), device=device).transpose(1, 2).requires_grad_()
        for array in arguments
    )
    T = q.shape[2]
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segmented:
        segments = torch.floor(
            torch.sqrt(torch.arange(T, dtype=torch.float32, device=device) / 3.0)
        ).int()
        mask &= segments[:, None] == segments[None, :]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return [array.detach().transpose(1, 2).cpu().numpy() for array in (out, *gradients)]


if __name__ == "__main__":
    main()
