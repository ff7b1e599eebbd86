"""Joins the processes of one run: which address, how many, which one this is.

`train`, `preflight` and `evaluate` call `initialize_processes` before anything asks jax for its
devices. A description comes from the settings, from the environment, or from Slurm; a single
process needs none.
"""

import os
from typing import Any

import jax

from baichuan_jax.config.schema import ConfigError, DistributedConfig, ResilienceConfig

# How long a process waits at its end for the others. jax's own 300 s would hide a fault for that
# long: a supervisor sees the exit code of a process only after it has ended.
SHUTDOWN_SECONDS = 30


def initialize_processes(
    config: DistributedConfig, resilience: ResilienceConfig | None = None
) -> None:
    """Join the run's other processes; do nothing where this is the only one.

    Read in this order: the settings, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, then Slurm. Raises ConfigError where only some of the three values are given.
    """
    resilience = resilience or ResilienceConfig()
    timeouts: Any = {
        "heartbeat_timeout_seconds": resilience.jax_heartbeat_seconds,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    address = config.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _integer(config.num_processes, "JAX_NUM_PROCESSES")
    number = _integer(config.process_id, "JAX_PROCESS_ID")
    # The devices of this node that are this process's; None: all of them.
    ids = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    local_ids = [int(i) for i in ids.split(",")] if ids else None
    if address is not None and count is not None and number is not None:
        if not 0 <= number < count:
            raise ConfigError(f"process_id={number} must lie in [0, num_processes={count})")
        if count > 1:
            jax.distributed.initialize(
                address, count, number, local_device_ids=local_ids, **timeouts
            )
    elif not (address is None and count is None and number is None):
        raise ConfigError(
            f"several processes need all of distributed.coordinator_address={address}, "
            f"num_processes={count} and process_id={number}, or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        # Under Slurm jax gives a process the one GPU of its local rank. Where a node runs a single
        # process, that would be the first GPU alone: JAX_LOCAL_DEVICE_IDS lists all of them.
        jax.distributed.initialize(
            cluster_detection_method="slurm", local_device_ids=local_ids, **timeouts
        )


def _integer(value: int | None, variable: str) -> int | None:
    """A setting, or the environment variable that stands for it."""
    if value is not None or variable not in os.environ:
        return value
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ConfigError(f"{variable}={os.environ[variable]!r} must be a whole number") from None
