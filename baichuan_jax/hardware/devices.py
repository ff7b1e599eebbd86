"""What the devices of this process can do: their peak, measured on a CPU, and the memory used."""

import math
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import hardware_of


def peak_flops(config: Config, device: Any) -> tuple[float | None, str]:
    """The FLOP/s of one device that MFU is a share of, and their source; None: unknown.

    The setting metrics.peak_tflops comes first, then the data sheet. A CPU's peak is measured.
    """
    # For an accelerator that the table lacks, or a share of one.
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12, "metrics.peak_tflops"
    if device.platform == "cpu":
        # Forced host devices share one CPU, so each has its share of the peak.
        peak = measure_matmul_flops() / jax.local_device_count()
        return peak, "the measured matrix-product peak of this CPU"
    if hardware := hardware_of(device.device_kind):
        source = f"{hardware.name}: {hardware.peak_tflops:g} dense bfloat16 TFLOP/s"
        return hardware.peak_tflops * 1e12, source
    return None, (
        f"unknown for {device.device_kind!r}; "
        "set metrics.peak_tflops to its dense bfloat16 TFLOP/s to see MFU"
    )


def measure_matmul_flops(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of float32 products of two size x size matrices on the first device.

    The best of those that fit into the time: other processes can only slow a product down.
    """
    # Large enough that the product is bound by arithmetic, small enough to run many times.
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()  # compiles
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory_gib() -> float:
    """The most memory used so far, in GiB: of the first device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    # A CPU device reports no memory. ru_maxrss counts bytes on macOS and KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
