"""Triton kernels on a CPU, in Triton's interpreter: for numbers, not for speed. With bridge.run_with(interpreter.interpret, 80).

The interpreter asks its arguments what it would ask a torch tensor; a class of NumPy arrays answers
here, so that no torch is needed. TRITON_INTERPRET=1 has to be set before triton is imported: it
decides then whether @triton.jit compiles or interprets.
"""

import functools
import threading
from typing import Any

import jax
import numpy as np

from baichuan_jax.kernels.triton_bridge import Launch

_ONE_AT_A_TIME = (
    threading.Lock()
)  # the interpreter keeps its state in globals, and a mesh has a thread for each device


class _Tensor:
    """An array in the host's memory as triton 3.6's and 3.9's interpreters ask for one; it is its own storage, never copied."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def dtype(self) -> np.dtype:
        """Triton reads its name, as of torch's: float32."""
        return self.array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

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
        """The interpreter's way back to the device: it has written here already."""
        assert other.array is self.array


@functools.cache
def _accept_new_numpy() -> None:
    """Loops over scalars: triton 3.6 takes int() of an array of one dimension, which NumPy 2.5 refuses; 3.9 does not."""
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def interpret(launch: Launch) -> list[jax.Array]:
    """Run a kernel in the interpreter, as a jax.pure_callback. What it does not write is NaN (in outputs of floats).

    RuntimeError where triton was imported to compile. ValueError for bfloat16, which it computes on
    the raw bits (triton#11585).
    """
    from triton.runtime.interpreter import InterpretedFunction  # pyright: ignore[reportMissingImports]

    if not isinstance(launch.kernel, InterpretedFunction):
        raise RuntimeError(
            f"{launch.name}: triton was imported to compile kernels, not to interpret them; "
            "set TRITON_INTERPRET=1 in the environment before this process imports triton"
        )
    if any(array.dtype.name == "bfloat16" for array in (*launch.arrays, *launch.outputs)):
        raise ValueError(
            f"{launch.name}: Triton's interpreter computes bfloat16 wrongly (triton#11585); take float32 or float16"
        )

    _accept_new_numpy()

    def run(*arrays: Any) -> list[np.ndarray]:
        inputs = [np.array(array, order="C") for array in arrays]
        outputs = [
            np.full(out.shape, np.nan if out.dtype.kind == "f" else 0, out.dtype)
            for out in launch.outputs
        ]
        with _ONE_AT_A_TIME:
            launch.kernel[launch.grid](*map(_Tensor, (*inputs, *outputs)), **launch.constants)
        return outputs

    return jax.pure_callback(run, list(launch.outputs), *launch.arrays)
