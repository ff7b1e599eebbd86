"""Triton kernels on a CPU, in Triton's interpreter: for numbers, not for speed.

    with triton_bridge.run_with(interpret, 80): ...

The interpreter expects torch tensors as arguments. Here a class with a NumPy array has the methods
that it calls, so that no torch is needed. TRITON_INTERPRET=1 has to be set before triton is
imported: @triton.jit decides then whether it compiles or interprets.
"""

import functools
import threading
from typing import Any

import jax
import numpy as np

from baichuan_jax.kernels.triton_bridge import Launch

# The interpreter keeps its state in globals, and a mesh has a thread for each device.
_ONE_AT_A_TIME = threading.Lock()


class _Tensor:
    """An array in host memory with the methods that triton's interpreter (3.6, 3.9) calls.

    It is its own storage and is never copied.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def dtype(self) -> np.dtype:
        """Triton reads its name, such as float32, which NumPy and torch share."""
        return self.array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    # The interpreter makes a host copy of every argument by new_empty and set_, runs the kernel on
    # the copies, and copies them back. Here the copy shares the array, so that nothing is copied.
    def new_empty(self, size: int, device: str) -> "_Tensor":
        """An empty tensor that set_ gives its storage."""
        return _Tensor(np.empty(size, self.array.dtype))

    def set_(
        self, storage: "_Tensor", offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, other: "_Tensor") -> None:
        """The interpreter's way back to the device: the kernel has written here already."""
        assert other.array is self.array


@functools.cache
def _accept_new_numpy() -> None:
    """Let triton 3.6 loop over scalars with NumPy 2.5; triton 3.9 does so by itself.

    triton 3.6 takes int() of an array of one dimension, which NumPy 2.5 refuses.
    """
    # Wrapped and not replaced: the interpreter patches triton.language anew for every kernel.
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def interpret(launch: Launch) -> list[jax.Array]:
    """Run a kernel in the interpreter, as a jax.pure_callback.

    Elements of floating outputs that the kernel does not write are NaN. Raises RuntimeError where
    triton was imported to compile, and ValueError for bfloat16, which the interpreter computes on
    the raw bits (https://github.com/triton-lang/triton/issues/11585).
    """
    from triton.runtime.interpreter import InterpretedFunction  # pyright: ignore[reportMissingImports]

    if not isinstance(launch.kernel, InterpretedFunction):
        raise RuntimeError(
            f"{launch.name}: triton was imported to compile kernels, not to interpret them; "
            "set TRITON_INTERPRET=1 in the environment before this process imports triton"
        )
    if any(array.dtype.name == "bfloat16" for array in (*launch.arrays, *launch.outputs)):
        raise ValueError(
            f"{launch.name}: Triton's interpreter computes bfloat16 wrongly (triton#11585); "
            "take float32 or float16"
        )
    _accept_new_numpy()

    def run(*arrays: Any) -> list[np.ndarray]:
        # Copies: a callback's arrays may be read-only views of jax's buffers.
        inputs = [np.array(array, order="C") for array in arrays]
        # NaN, so that a test finds what a kernel leaves out.
        outputs = [
            np.full(out.shape, np.nan if out.dtype.kind == "f" else 0, out.dtype)
            for out in launch.outputs
        ]
        if launch.in_place is not None:
            outputs[-1] = inputs[launch.in_place]
        with _ONE_AT_A_TIME:
            launch.kernel[launch.grid](*map(_Tensor, (*inputs, *outputs)), **launch.constants)
        return outputs

    # A callback, so that kernels also run under jit, scan, vmap and shard_map.
    return jax.pure_callback(run, list(launch.outputs), *launch.arrays)
