"""What the devices of this process can do: their peak, measured on a CPU, and their memory."""

import math
import os
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.config.schema import Config, ConfigError, MeshConfig, require
from baichuan_jax.hardware.accelerators import hardware_of


def require_devices() -> None:
    """Let jax start on its devices. Raises ConfigError where it cannot.

    Among several processes the error stays as it is, with a note: it may be one host's, or say that
    another process is gone.
    """
    try:
        jax.local_devices()
    # jax checks with assert that a plugin which it has loaded can be used.
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or "no device of it was found"
        advice = (
            f"jax cannot start with JAX_PLATFORMS={wanted}: {reason}; unset JAX_PLATFORMS, or name "
            "a platform whose devices this machine has (cpu, cuda, tpu)"
        )
        if jax.distributed.is_initialized():
            error.add_note(advice)
            raise
        raise ConfigError(advice) from None


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


def require_memory(config: Config, mesh: MeshConfig, device: Any) -> None:
    """Raise ConfigError for a model or a batch that cannot be in memory; mesh: a resolved one.

    A lower bound: what this refuses no machine of this size can train. What it lets through may
    still need more, which only the compiled program shows.
    """
    least = least_bytes(config, mesh)
    # Devices of a CPU share its memory.
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    there = device_bytes(device) // sharing
    largest = max(least, key=lambda what: least[what])
    require(
        sum(least.values()) <= there,
        f"{largest} needs {least[largest] / 2**30:,.1f} GiB at least on each device, and one has "
        f"{there / 2**30:,.1f}; make it smaller, or take more devices "
        "(mesh.state, mesh.fsdp, mesh.tensor)",
    )


def least_bytes(config: Config, mesh: MeshConfig) -> dict[str, int]:
    """The bytes on one device of what is there all the time, by what it is."""
    model, train = config.model, config.train
    shards = mesh.batch_shards * mesh.context
    tokens = train.global_batch_size * train.context_length
    return {
        # Parameters and two moments, in float32.
        f"the state of {model.num_parameters:,} parameters (model.*)": (
            12 * model.num_parameters // (mesh.state * mesh.fsdp * mesh.tensor)
        ),
        # Inputs and labels, in int32.
        f"a batch of {tokens:,} tokens (train.global_batch_size, train.context_length)": (
            8 * tokens // shards
        ),
    }


def device_bytes(device: Any) -> int:
    """The memory of a device, as far as it says; that of the machine on a CPU."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_gib() -> float:
    """The most memory used so far, in GiB: of the first device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    # A CPU device reports no memory. ru_maxrss counts bytes on macOS and KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
