"""`plan --search`: compile every way to run the same batch, and keep the fastest that fits."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.hardware.accelerators import Topology
from baichuan_jax.plan.ahead_of_time import trace_step
from baichuan_jax.plan.rates import Rates
from baichuan_jax.plan.report import capacity_gib, report

SHOWN = ("remat", "micro_batch_size", "fits", "peak_gib", "predicted_step_seconds", "predicted_mfu")
"""What is kept of the report of each candidate; None where it was not compiled."""


def candidates(config: Config, num_devices: int) -> Iterator[Config]:
    """Ways to run the same batch: what is recomputed, and rows a pass.

    The least recomputation comes first.
    """
    # The rows of one pass divide a device's share of the batch.
    mesh = config.mesh.resolve(num_devices)
    share = config.train.global_batch_size // (mesh.data * mesh.fsdp)
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= share and share % size == 0]
    for remat in ("none", "matmuls", "full"):
        model = dataclasses.replace(config.model, remat=remat)
        for size in sizes:
            train = dataclasses.replace(config.train, micro_batch_size=size)
            yield dataclasses.replace(config, train=train, model=model)


def search(
    config: Config, topology: Topology, devices: list[Any], rates: Rates
) -> tuple[Config, list[dict[str, Any]]]:
    """The candidate of least predicted time that fits, and what was found of each.

    Raises ConfigError where none fits.
    """
    # One after the other: each compilation uses all cores, and gigabytes of memory.
    tried: list[dict[str, Any]] = []
    fitting: list[tuple[float, Config]] = []
    # disable=None: no bar where stderr is no terminal.
    bar = tqdm(
        list(candidates(config, topology.num_devices)),
        desc="compiling candidates",
        unit="program",
        disable=None,
    )
    for candidate in bar:
        result = _try(candidate, topology, devices, rates)
        tried.append({name: result.get(name) for name in SHOWN})
        if result["fits"]:
            fitting.append((result["predicted_step_seconds"], candidate))
    if not fitting:
        listed = ", ".join(
            f"{item['remat']} x {item['micro_batch_size']}: {item['peak_gib']} GiB"
            for item in tried
        )
        raise ConfigError(
            f"nothing fits into {capacity_gib(topology.hardware):.1f} GiB of "
            f"{topology.hardware.name} ({listed}); raise mesh.fsdp or mesh.tensor, "
            "or use more devices"
        )
    # Of equal times the first one, which recomputes least.
    return min(fitting, key=lambda item: item[0])[1], tried


def _try(config: Config, topology: Topology, devices: list[Any], rates: Rates) -> dict[str, Any]:
    """A candidate's report; where the compiler finds that it does not fit, only that."""
    try:
        return report(trace_step(config, devices)(), topology, rates)
    # XLA raises several types here; only the text says that memory is exhausted.
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = {"remat": config.model.remat, "micro_batch_size": config.train.micro_batch_size}
        return {**sizes, "fits": False}
