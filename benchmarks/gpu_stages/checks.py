"""One comparison of a kernel with the plain operator (`reference.py`) in float32.

Input: a case (operator, type, sizes, variant). Output: errors of results and gradients, whether two
calls give the same bits, and the error beside PyTorch in float64. As a program it reads cases from
standard input and writes a result for each; numerics.py runs several of these processes at once.
"""

import contextlib
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

# For its use as a program.
for folder in (Path(__file__).parents[1], Path(__file__).parents[2], Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from results import reason

# Longer scores in float64 take too much memory for all workers at once.
TORCH_LENGTH = 4096


class Case(NamedTuple):
    """`length`: tokens of attention, rows of RMSNorm. `size`: head size or width."""

    operator: str
    dtype: str
    length: int
    size: int
    variant: str

    def __str__(self) -> str:
        return f"{self.operator} {self.dtype} {self.length} x {self.size} {self.variant}"


def main() -> None:
    """Read cases from standard input, and write a line for each."""
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
    """Errors of one case, and whether two calls give the same bits."""
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
    # On a CPU the interpreter's outputs begin as NaN.
    works = device.platform == "cpu" or proves_itself()
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
        # nearly 0: they only have to be finite.
        errors = {name: errors[name] for name in ("out", "dv")}
        if not all(np.isfinite(array).all() for array in got):
            errors["dq, dk"] = (float("nan"),) * 3
    # NaN counts as the worst.
    badness = lambda error: np.nan_to_num(error, nan=np.inf)
    worst = max(errors, key=lambda name: badness(errors[name][1]))
    names = ("largest", "norm", "row")
    result = {
        "errors": {name: dict(zip(names, errors[name], strict=True)) for name in errors},
        "largest_error": max((values[0] for values in errors.values()), key=badness),
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
            pairs = zip(got, theirs, strict=True)
            result["torch_error"] = max(difference(a, b)[1] for a, b in pairs)
        except Exception as error:
            # A broken torch, or one without memory, says nothing about the kernel.
            result["no_torch"] = reason(error)
    return result


def parts_of(case: Case) -> tuple[Any, Any, list[Any], list[str]]:
    """The kernel with its gradients, the plain operator with them, arguments, names of results."""
    return (attention_case if case.operator == "attention" else norm_case)(case)


def difference(got: Any, wanted: Any) -> tuple[float, float, float]:
    """Three errors relative to the wanted array; absolute where that is 0.

    The largest difference, the norm of the difference, and the norm of the difference of the worst
    row (along the last axis) relative to that row.
    """
    import numpy as np

    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    largest = np.abs(wanted).max()
    # For example the gradient of a softmax over one key.
    zero = largest < 1e-4
    off = got - wanted
    if zero:
        return (float(np.abs(off).max()),) * 3
    rows = np.linalg.norm(wanted, axis=-1)
    # The gradient of a query that sees one key is nearly 0: such a row is compared with a
    # ten-thousandth of the largest row.
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
    from baichuan_jax.kernels.attention.triton import attention, packed_attention
    from baichuan_jax.model import rope_tables

    T, variant = case.length, case.variant.removeprefix("sm_80 ")
    B, N = 1, 2
    keys = jax.random.split(jax.random.key(hash_of(case)), 4)
    scale = 60.0 if variant == "extreme" else 1.0
    q, k, v, dout = (jax.random.normal(key, (B, T, N, case.size)) for key in keys)
    arrays = [array.astype(case.dtype) for array in (scale * q, scale * k, v, dout)]
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
            # The plain operator gives such a query the mean of all values, a kernel has to give 0.
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

    def plain_packed(qkv: Any, rope: Any, segments: Any) -> Any:
        turned = reference_attention.turned_parts(qkv, rope)
        return reference_attention.attention(*turned, segments, segments)

    def packed(function: Any) -> Any:
        # As in training: RoPE inside, at positions of its own, and gradients in one array.
        rope = rope_tables(3000 + jnp.arange(T)[None], case.size, 10_000.0)
        ids = segments if "segments" in variant else None
        return lambda q, k, v: function(jnp.stack((q, k, v), axis=2), rope, ids)

    if variant.startswith("packed"):
        kernel, plain = packed(packed_attention), packed(plain_packed)
    else:
        kernel, plain = variant_of(attention), variant_of(reference_attention.attention)
    names = ["out", "dq", "dk", "dv"]
    return with_gradients(kernel), with_gradients(plain), arrays, names


def with_gradients(function: Any) -> Any:
    """Results and gradients of a function of q, k, v."""
    import jax

    def run(q: Any, k: Any, v: Any, dout: Any) -> tuple:
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    return run


def under_everything(function: Any) -> Any:
    """The function as a training step calls it.

    Rows under vmap, inside a shard_map, recomputed in the backward pass, in a scan of two blocks.
    """
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
        # Two rows of half the length; an odd last token is left out.
        half = q.shape[1] // 2
        split = [array[:, : 2 * half].reshape(2, 1, half, *array.shape[2:]) for array in (q, k, v)]
        return jax.vmap(one)(*split)

    def padded(q: Any, k: Any, v: Any) -> Any:
        out = run(q, k, v).reshape(1, -1, *q.shape[2:])
        return jax.numpy.zeros_like(q).at[:, : out.shape[1]].set(out)

    return padded


def norm_case(case: Case) -> tuple[Any, Any, list[Any], list[str]]:
    """See parts_of; with or without a residual."""
    import jax

    from baichuan_jax.kernels.rms_norm import reference as reference_rms_norm
    from baichuan_jax.kernels.rms_norm.api import fused_rms_norm
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
        outputs = fused_rms_norm(weight, x, added, 1e-6, "triton", current_layout())
        return tuple(outputs) if added is not None else outputs[0]

    def plain(x: Any, added: Any, weight: Any) -> Any:
        return reference_rms_norm.rms_norm(x, weight, 1e-6, added)

    names = ["y", "total", "dx", "dresidual", "dweight"] if residual else ["y", "dx", "dweight"]
    functions = functools.partial(run, kernel), functools.partial(run, plain)
    return *functions, [x, added, weight, dy, dtotal], names


def hash_of(case: Case) -> int:
    """A seed for each case, the same in every process."""
    import zlib

    return zlib.crc32(str(case).encode())


def torch_attention(arguments: list[Any], segmented: bool) -> list[Any]:
    """PyTorch's attention in float64 and its gradients, in the kernel's layout."""
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
        place = torch.arange(T, dtype=torch.float32, device=device)
        segments = torch.floor(torch.sqrt(place / 3.0)).int()
        mask &= segments[:, None] == segments[None, :]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return [array.detach().transpose(1, 2).cpu().numpy() for array in (out, *gradients)]


if __name__ == "__main__":
    main()
