"""The one file that imports jax_triton, lazily: what its two versions call differently, and for which GPU a kernel is compiled.

jax-triton 0.3.1 (Python 3.11) and 0.4.1 (3.12 and newer) differ in the name of the outputs' argument. Both need jax's CUDA plugin, and
change TRITON_CACHE_DIR on import, which is put back here.

A kernel is compiled when its caller is lowered, and jax-triton alone would ask the first GPU of this process what it can. Here the
devices of the current mesh are asked while the caller is traced (sharding.activate), which may be those of a topology that is not
there.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.sharding import current_layout


@functools.cache
def obstacle() -> str | None:
    """Why Triton kernels cannot be compiled here, or None."""
    missing = [name for name in ("triton", "jax_triton", "jax_cuda12_plugin") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (requirements-cuda.txt)"
    try:
        _jax_triton()
    except ImportError as error:
        return f"jax_triton cannot be imported: {str(error).splitlines()[0]}"
    return None


def compute_capability() -> int:
    """Of the current mesh's devices, or of the first device where there is no mesh; 80 for sm_80."""
    layout = current_layout()
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return int(device.compute_capability.replace(".", ""))


def call(
    kernel: Any,
    *arrays: jax.Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    name: str,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """Run a @triton.jit kernel whose parameters are contiguous arrays, then the outputs, then constants (tl.constexpr)."""
    jax_triton, outputs_name = _jax_triton()
    with jax.named_scope(name):  # so that a compiled program tells which kernel a call is
        result = jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            grid=grid,
            name=name,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=compute_capability(),
            **{outputs_name: list(outputs)},
            **constants,
        )
    return list(result)


@functools.cache
def _jax_triton() -> tuple[Any, str]:
    """The module, and what it calls the outputs' shapes. Raises ImportError."""
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before
    version = importlib.metadata.version("jax-triton")
    return jax_triton, "out_shape" if version.startswith("0.3.") else "out_type"


def merge_vmapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that all begin with a batch dimension, as one that vmap calls once, its dimension merged into the batch.

    jax-triton has no rule for vmap, which step.py uses to take gradients per replica.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def _(size: int, batched: list[bool], *arrays: jax.Array) -> Any:
        whole = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, batched, strict=True)]
        results = wrapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], [True] * len(results)

    return wrapped
