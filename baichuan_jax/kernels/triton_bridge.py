"""Calls Triton kernels from JAX: the only file that imports jax_triton, and only at first use.

jax-triton 0.3.1 (Python 3.11, or triton 3.6) and 0.4.1 (Python 3.12 and newer) differ in the names
of arguments. Both need jax's CUDA plugin, of CUDA 12 or 13. Both change TRITON_CACHE_DIR on import,
which is restored here.

A kernel is compiled when its caller is lowered. jax-triton by itself compiles for the first GPU of
this process. Here a kernel is compiled for the devices of the mesh that is current while its caller
is traced (sharding.activate), so that it also compiles ahead of time for a described topology.
`compile_as` compiles for an older GPU than the one that runs the kernel.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.resilience.waits import announced
from baichuan_jax.sharding import current_layout

# For an assembler or disassembler, which take a second.
TOOL_SECONDS = 60.0

TOOLKITS = (Path("/usr/local/cuda"), Path("/opt/cuda"))  # where XLA looks last
# Context variables, and not globals: jax may trace in several threads at once.
# Inside run_with: the function that gets the kernels, and the capability they are made for.
_elsewhere: ContextVar[tuple[Callable, int] | None] = ContextVar("elsewhere", default=None)
# Inside compile_as: what to compile for.
_substitute: ContextVar["_Substitute | None"] = ContextVar("substitute", default=None)


@functools.cache
def obstacle() -> str | None:
    """Why Triton kernels cannot be compiled here; None: they can."""
    # find_spec imports nothing; the import follows where all packages are there.
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if not any(
        importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")
    ):
        missing.append("jax_cuda12_plugin or jax_cuda13_plugin")
    if missing:
        files = "requirements-cuda12.txt or requirements-cuda13.txt"
        return f"{' and '.join(missing)} not installed ({files})"
    try:
        _jax_triton()
    except ImportError as error:
        return f"jax_triton cannot be imported: {str(error).splitlines()[0]}"
    return None


def device_obstacle(device: Any) -> str | None:
    """Why a device cannot run any Triton kernel of this package; None: it can."""
    if device.platform != "gpu":
        return f"Triton needs a GPU and the backend is {device.platform}"
    if float(device.compute_capability) < 8:
        return (
            "the kernels need bfloat16 tensor cores (sm_80) and this GPU has compute capability "
            f"{device.compute_capability}"
        )
    return obstacle()


def compute_capability() -> int:
    """What kernels are compiled for, such as 80 for sm_80.

    It is the current mesh's, or the first device's where there is no mesh; inside run_with and
    compile_as it is theirs.
    """
    if (elsewhere := _elsewhere.get()) is not None:
        return elsewhere[1]
    substitute = _substitute.get()
    return _device_capability() if substitute is None else substitute.capability


def _device_capability() -> int:
    layout = current_layout()
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return int(device.compute_capability.replace(".", ""))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of a kernel. Its parameters are arrays, then outputs, then tl.constexpr constants.

    Arrays are contiguous. in_place: which of the arrays is also the last output. The kernel reads
    and writes it through the array's parameter, and leaves the output's alone.
    """

    kernel: Any
    name: str
    arrays: tuple[jax.Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    in_place: int | None = None

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return math.prod(self.grid)


def call(
    kernel: Any,
    *arrays: jax.Array,
    name: str,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    in_place: int | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Run a @triton.jit kernel; see Launch."""
    outputs = tuple(outputs)
    launch = Launch(kernel, name, arrays, outputs, grid, num_warps, num_stages, constants, in_place)
    # Every kernel is called here, so that listing and interpretation see them all.
    elsewhere = _elsewhere.get()
    return _through_jax_triton(launch) if elsewhere is None else elsewhere[0](launch)


def _through_jax_triton(launch: Launch) -> list[jax.Array]:
    jax_triton, version = _jax_triton()
    # enable_fp_fusion: a product and a sum become one fused multiply-add.
    outputs, arrays = list(launch.outputs), list(launch.arrays)
    versioned: dict[str, Any] = {}
    if launch.in_place is not None:
        versioned["input_output_aliases"] = {launch.in_place: len(outputs) - 1}
    if version.startswith("0.3."):
        versioned |= {"out_shape": outputs, "enable_fp_fusion": True}
    else:  # passed on to triton, whose default changes in 3.10
        versioned |= {"out_type": outputs, "backend_options": {"enable_fp_fusion": True}}
        if launch.in_place is not None:
            # An array written in place has no second parameter here. The kernel's is given an array
            # that it does not touch; the array itself would make XLA copy it.
            names = launch.kernel.arg_names
            versioned[names[len(arrays) + len(outputs) - 1]] = jnp.zeros(1, outputs[-1].dtype)
    substitute = _substitute.get()
    # The scope's name stays in the compiled program, where every call has the same target. 0.4
    # prefers mutable references to aliases; jax.checkpoint and vmap take no references.
    with jax.named_scope(launch.name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated")
        result = jax_triton.triton_call(
            *arrays,
            kernel=launch.kernel if substitute is None else substitute.copy(launch.kernel),
            name=launch.name,
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            compute_capability=compute_capability(),
            **versioned,
            **launch.constants,
        )
    return list(result)


@contextlib.contextmanager
def run_with(runner: Callable[[Launch], list[jax.Array]], capability: int) -> Iterator[None]:
    """Inside, kernels go to a function instead of jax-triton: to be listed, or interpreted.

    capability: the one for which their block shapes are chosen.
    """
    # What jax traced before is not traced again: call this around the first trace.
    token = _elsewhere.set((runner, capability))
    try:
        yield
    finally:
        _elsewhere.reset(token)


@dataclasses.dataclass
class _Substitute:
    """The state of compile_as."""

    capability: int
    """Compiled for."""
    device: int | None = None
    """The capability of the devices; known once a kernel is traced."""
    copies: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def copy(self, kernel: Any) -> Any:
        """Another object of the same kernel.

        jax-triton caches what it compiled by kernel and capability, but not by the assembler's
        target. With the same object it would return code for the wrong GPU.
        """
        from triton import jit  # pyright: ignore

        # The device's own capability is known only here, where the mesh is current.
        device = _device_capability()
        # "a" features (sm_90a), which Triton uses from sm_90 on, run on that very GPU alone.
        if device < self.capability or device > self.capability >= 90:
            raise ValueError(
                f"compile_as({self.capability}): code for sm_{self.capability} does not run on "
                f"sm_{device}; give the device's own capability, or an older one below 90"
            )
        if self.device not in (None, device):
            raise ValueError(
                f"compile_as: devices of sm_{self.device} and of sm_{device} in one context; "
                "take one for each"
            )
        self.device = device
        return self.copies.setdefault(kernel, jit(kernel.fn))


@functools.cache
def _jit_key() -> Any:
    """A part of the key by which jax caches traced and compiled functions.

    Made at its first use, so that no other program's key changes.
    """
    return jax.make_user_context(None)


@contextlib.contextmanager
def compile_as(capability: int) -> Iterator[None]:
    """Inside, kernels and their block shapes are those of this compute capability.

    They are assembled for the device's own, so that an A800's code (sm_80) runs on a newer GPU, as
    PTX does. Trace and lower inside; what jax traced outside is traced again. Raises ValueError
    while tracing where the devices are older, or where the code would be bound to another GPU (from
    sm_90 on). Raises RuntimeError where this version of jax_triton calls the assembler differently.
    """
    # jax-triton has no option for this: it passes the capability that it compiled for to the
    # assembler too. So its library is replaced by one that changes that argument alone.
    _, version = _jax_triton()
    library: Any = sys.modules["jax_triton.triton_lib"]
    original, substitute = library.triton_kernel_call_lib, _Substitute(capability)

    def assemble(*arguments: Any) -> Any:
        """TritonKernel(name, num_warps, num_ctas, shared bytes, PTX, TTIR, capability, ...).

        The capability goes to ptxas.
        """
        if len(arguments) < 7 or not isinstance(arguments[6], int):
            raise RuntimeError(
                "compile_as knows jax-triton 0.3.1 and 0.4.1; "
                f"TritonKernel of {version} takes other arguments"
            )
        # Another thread's kernel, or one that is compiled for the device anyway.
        foreign = _substitute.get() is not substitute or arguments[6] != capability
        if foreign or substitute.device is None:
            return original.TritonKernel(*arguments)
        return original.TritonKernel(*arguments[:6], substitute.device, *arguments[7:])

    class Library:
        TritonKernel = staticmethod(assemble)

        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

    # The key of jax's caches has to differ inside, or jax would return what it traced outside.
    token = _substitute.set(substitute)
    library.triton_kernel_call_lib = Library()
    try:
        with _jit_key()(capability):
            yield
    finally:
        library.triton_kernel_call_lib = original
        _substitute.reset(token)


def cuda_folders() -> list[Path]:
    """Where XLA looks for CUDA's bin/ptxas and nvvm/libdevice, in order.

    CUDA_ROOT or else NVIDIA's wheels (jax chooses between them), then toolkits.
    """
    # The package `nvidia` is a namespace that all of NVIDIA's wheels share, perhaps in several
    # folders.
    nvidia = importlib.util.find_spec("nvidia")
    wheels = [
        Path(folder) / name
        for folder in (nvidia.submodule_search_locations or () if nvidia else ())
        for name in ("cu13", "cuda_nvcc")  # nvidia-cuda-nvcc of CUDA 13, nvidia-cuda-nvcc-cu12
    ]
    root = os.environ.get("CUDA_ROOT")
    return [*([Path(root)] if root else wheels), *TOOLKITS]


def xla_ptxas() -> Path | None:
    """The assembler that XLA will use: jax's choice, the first on PATH, or that of a toolkit.

    The order was observed with strace on jax 0.10.1 and 0.11.2.
    """
    # PATH comes after jax's choice and before the toolkits.
    places = [folder / "bin" / "ptxas" for folder in cuda_folders()]
    if on_path := shutil.which("ptxas"):
        places.insert(len(places) - len(TOOLKITS), Path(on_path))
    return next((place for place in places if place.exists()), None)


@functools.cache
def ptxas() -> Path:
    """The assembler that XLA will use, or else the one of triton's wheel (CUDA 12).

    The environment is set so that triton writes PTX for this assembler's version. By default triton
    writes for its own, newest one, and CUDA 12's assembler refuses that PTX (version 9.4 on sm_90,
    where 12.9 knows 8.8).
    """
    found = xla_ptxas()
    if found is None:
        triton = importlib.util.find_spec("triton")
        assert triton is not None
        assert triton.origin is not None
        found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    # A path that the user has set is kept.
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        os.environ.setdefault(variable, str(found))
    return found


@functools.cache
def ptxas_version() -> str:
    """The version of ptxas(), such as "12.9.86".

    12.8.93 and 13.0.88 are known to miscompile Triton's code for sm_90a; 13.1.80 is not.
    """
    command = [ptxas(), "--version"]
    with announced(f"{ptxas()} --version ({TOOL_SECONDS:.0f} s at most)"):
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TOOL_SECONDS
        )
    text = done.stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    if found is None:
        raise RuntimeError(f"{ptxas()} --version printed no version: {text.strip()!r}")
    return found[1]


@functools.cache
def _jax_triton() -> tuple[Any, str]:
    """The module and its version. Raises ImportError."""
    # ptxas() first: it sets the assembler's path, which triton reads. jax_triton changes
    # TRITON_CACHE_DIR on import, so that the user's folder would no longer be used.
    ptxas()
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton, importlib.metadata.version("jax-triton")


def merge_vmapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make vmap call a function once, with the mapped dimension merged into the batch.

    All arrays of the function begin with a batch dimension. jax-triton has no rule for vmap, which
    step.py uses to take gradients per replica.
    """
    # Rows of a batch are independent in all of these kernels, so that replicas are more rows.
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def _(size: int, batched: list[bool], *arrays: jax.Array) -> Any:
        # An argument that all replicas share is repeated: the kernel needs it for every row.
        whole = [
            x if b else jnp.broadcast_to(x, (size, *x.shape))
            for x, b in zip(arrays, batched, strict=True)
        ]
        results = wrapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], [True] * len(results)

    return wrapped
