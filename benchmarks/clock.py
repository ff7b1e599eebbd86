"""Seconds of compiled calls on a device: medians of interleaved samples.

Clocks and temperatures of a device drift within minutes. So the calls to compare are sampled in
turn, round after round, and every call meets the same drift; a median drops the pauses.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def sample(call: Callable[[], object], count: int) -> float:
    """Seconds of one call, out of `count` calls that queue on the device.

    The queue hides the microseconds that Python takes to start a call.
    """
    began = time.perf_counter()
    results = None
    for _ in range(count):
        results = call()
    jax.block_until_ready(results)
    return (time.perf_counter() - began) / count


def measure(
    calls: dict[Any, Callable[[], object]], rounds: int, seconds: float
) -> dict[Any, float]:
    """Median seconds of each call.

    A sample is as many calls as take `seconds`, 200 at most; all calls are sampled in turn,
    `rounds` times.
    """
    counts = {}
    for name, call in calls.items():
        # The first call loads the program.
        sample(call, 1)
        counts[name] = max(1, min(200, round(seconds / max(sample(call, 1), 1e-7))))
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(sample(call, counts[name]))
    return {name: statistics.median(values) for name, values in found.items()}
