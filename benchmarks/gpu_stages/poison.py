"""Fill a GPU's free memory with NaN, so that an element that a kernel does not write is NaN.

A kernel's output is fresh memory of jax's pool. Without the filling it holds values of an earlier
call, and an element that a kernel forgets looks right. `proves_itself` checks the method on this
device, with a kernel that writes half of its output.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from baichuan_jax.kernels import triton_bridge as bridge

# Arrays that share most of the free memory.
LARGE = 16
# Arrays for the gaps between others.
SMALL_COUNT, SMALL_BYTES = 64, (1 << 20, 1 << 16, 1 << 12)


@functools.cache
def _fill(size: int):
    return jax.jit(lambda: jnp.full(size, jnp.nan, jnp.float32))


def fill_free_memory() -> None:
    """Fill jax's pool with arrays of NaN, large ones and then small ones, and free them.

    A tenth stays free: where memory runs out, jax's allocator waits ten seconds for more. Does
    nothing on a CPU, where jax has no pool.
    """
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    # In multiples of 64 MiB (2^24 float32 numbers), so that few programs are compiled.
    large = int(0.9 * free / LARGE) >> 26 << 24
    held = [_fill(large)() for _ in range(LARGE)]
    held += [_fill(size // 4)() for size in SMALL_BYTES for _ in range(SMALL_COUNT)]
    jax.block_until_ready(held)
    for array in held:
        array.delete()


@triton.jit
def _half_kernel(x_pointer, out_pointer, SIZE: tl.constexpr):
    """Write the first half of an output, and leave the second."""
    places = tl.arange(0, SIZE)
    tl.store(out_pointer + places, tl.load(x_pointer + places))


def half_written(x: jax.Array) -> jax.Array:
    """x, whose length is a power of 2, and as many elements again that no kernel has written."""
    size = x.size
    outputs = [jax.ShapeDtypeStruct((2 * size,), jnp.float32)]
    launch = {"grid": (1,), "num_warps": 4, "num_stages": 1}
    return bridge.call(_half_kernel, x, name="half", outputs=outputs, SIZE=size, **launch)[0]


@functools.cache
def proves_itself(size: int = 4096) -> bool:
    """Whether an element that a kernel does not write is NaN after fill_free_memory."""
    x = jnp.ones(size, jnp.float32)
    call = jax.jit(half_written).lower(x).compile()
    fill_free_memory()
    out = np.asarray(call(x))
    return bool((out[:size] == 1).all() and np.isnan(out[size:]).all())
