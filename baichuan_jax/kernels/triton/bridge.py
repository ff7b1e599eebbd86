"""The one file that imports jax_triton, lazily: what its two versions call differently, and for which GPU a kernel is compiled.

jax-triton 0.3.1 (Python 3.11) and 0.4.1 (3.12 and newer) differ in the name of the outputs' argument. Both need jax's CUDA plugin, and
change TRITON_CACHE_DIR on import, which is put back here.

A kernel is compiled when its caller is lowered, and jax-triton alone would ask the first GPU of this process what it can. Here the
devices of the current mesh are asked while the caller is traced (sharding.activate), which may be those of a topology that is not
there.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.sharding import current_layout

_elsewhere: ContextVar[tuple[Callable, int] | None] = ContextVar("elsewhere", default=None)


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
    if (elsewhere := _elsewhere.get()) is not None:
        return elsewhere[1]
    layout = current_layout()
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return int(device.compute_capability.replace(".", ""))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of a kernel, whose parameters are contiguous arrays, then the outputs, then constants (tl.constexpr)."""

    kernel: Any
    name: str
    arrays: tuple[jax.Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


def call(
    kernel: Any,
    *arrays: jax.Array,
    name: str,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """Run a @triton.jit kernel; see Launch."""
    launch = Launch(kernel, name, arrays, tuple(outputs), grid, num_warps, num_stages, constants)
    elsewhere = _elsewhere.get()
    return _through_jax_triton(launch) if elsewhere is None else elsewhere[0](launch)


def _through_jax_triton(launch: Launch) -> list[jax.Array]:
    jax_triton, outputs_name = _jax_triton()
    with jax.named_scope(launch.name):  # so that a compiled program tells which kernel a call is
        result = jax_triton.triton_call(
            *launch.arrays,
            kernel=launch.kernel,
            name=launch.name,
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            compute_capability=compute_capability(),
            **{outputs_name: list(launch.outputs)},
            **launch.constants,
        )
    return list(result)


@contextlib.contextmanager
def run_with(runner: Callable[[Launch], list[jax.Array]], capability: int) -> Iterator[None]:
    """Inside, kernels for this compute capability go to a function instead of jax-triton: to be listed, or interpreted."""
    token = _elsewhere.set((runner, capability))
    try:
        yield
    finally:
        _elsewhere.reset(token)


@functools.cache
def ptxas() -> Path:
    """The assembler that XLA will use, from NVIDIA's wheel, or else triton's of CUDA 12; triton is told to write for its version.

    Left alone, triton writes for the newest of its own, whose PTX that of CUDA 12 refuses (9.4 on sm_90, where 12.9 knows 8.8).
    """
    nvcc, triton = (importlib.util.find_spec(name) for name in ("nvidia.cuda_nvcc", "triton"))
    assert triton is not None
    assert triton.origin is not None
    places = [Path(folder) / "bin" for folder in nvcc.submodule_search_locations or ()] if nvcc else []
    places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = next(place / "ptxas" for place in places if (place / "ptxas").exists())
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        os.environ.setdefault(variable, str(found))
    return found


@functools.cache
def _jax_triton() -> tuple[Any, str]:
    """The module, and what it calls the outputs' shapes. Raises ImportError."""
    ptxas()
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
