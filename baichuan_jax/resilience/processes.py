"""Joins the processes of one run: which address, how many, which one this is, where it listens.

`train`, `preflight` and `evaluate` call `initialize_processes` before anything asks jax for its
devices, and it starts them. A description comes from the settings, from the environment, or from
Slurm; a single process needs none.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.clusters.slurm_cluster import SlurmCluster

from baichuan_jax.config.parsing import environment_number, show, whole_number
from baichuan_jax.config.schema import (
    ConfigError,
    DistributedConfig,
    ResilienceConfig,
    is_address,
    require,
)
from baichuan_jax.hardware.devices import require_devices
from baichuan_jax.resilience.addresses import (
    BIND_VARIABLE,
    SOCKET,
    address_towards,
    is_number,
    join_port,
    own_address,
    refuse_loopback,
)
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.coordination import place_gloo, refuse_together
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.waits import announced, wait_until
from baichuan_jax.runs.private import refuse_programs_of_others

# How long a process waits at its start for the others: they import from a cold file system.
JOIN_SECONDS = 300
# How long a process waits at its end for the others. jax's own 300 s would hide a fault for that
# long: a supervisor sees the exit code of a process only after it has ended.
SHUTDOWN_SECONDS = 30
# What jax reads of Slurm, where a job has several processes.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def initialize_processes(
    config: DistributedConfig,
    resilience: ResilienceConfig | None = None,
    refused: ConfigError | None = None,
) -> None:
    """Join the run's other processes, if there are any, and start jax on the devices.

    Read in this order: the settings, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, then Slurm. Raises ConfigError where a part of that is missing or wrong, and
    where jax has no device to start on. `refused`: why this process cannot go on, which all are
    told and raise; so they do where the environment of one names compiled programs of others.
    """
    _join(config, resilience, refused)

    def refuse() -> None:
        if refused is not None:
            raise refused
        refuse_programs_of_others()

    try:
        refuse_together("start", refuse)
    except ConfigError:
        # Whoever is still connected when process 0 ends is aborted, and may not have said why.
        what = f"the other processes to hear of a refusal ({SHUTDOWN_SECONDS} s at most)"
        with contextlib.suppress(Exception), announced(what):
            jax.distributed.shutdown()
        raise
    require_devices()


def _join(
    config: DistributedConfig, resilience: ResilienceConfig | None, refused: ConfigError | None
) -> None:
    resilience = resilience or ResilienceConfig()
    timeouts: Any = {
        # Later than this program's own limit, after which jax aborts with a page of its stack.
        "initialization_timeout": JOIN_SECONDS + 60,
        "heartbeat_timeout_seconds": resilience.jax_heartbeat_seconds,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    address = config.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    # For its error: jax would wait for an address that cannot be.
    dataclasses.replace(config, coordinator_address=address)
    count, number = config.num_processes, config.process_id
    count = environment_number("JAX_NUM_PROCESSES") if count is None else count
    number = environment_number("JAX_PROCESS_ID") if number is None else number
    # The devices of this node that are this process's; None: all of them.
    local_ids = _local_devices()
    if address is not None and count is not None and number is not None:
        if not 0 <= number < count:
            raise ConfigError(f"process_id={number} must lie in [0, num_processes={count})")
        if count > 1:
            described: dict[str, Any] = {"num_processes": count, "process_id": number}
            described |= {"local_device_ids": local_ids}
            _connect(address, number, refused, **described, **timeouts)
    elif not (address is None and count is None and number is None):
        raise ConfigError(
            f"several processes need all of distributed.coordinator_address={address}, "
            f"num_processes={count} and process_id={number}, or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    elif (environment_number("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in os.environ:
        address, number = _check_slurm()
        # Under Slurm jax gives a process the one GPU of its local rank. Where a node runs a single
        # process, that would be the first GPU alone: JAX_LOCAL_DEVICE_IDS lists all of them.
        detected = {"cluster_detection_method": "slurm", "local_device_ids": local_ids}
        _connect(address, number, refused, **detected, **timeouts)


def _connect(address: str, number: int, refused: ConfigError | None, **description: Any) -> None:
    """Join the processes that jax's service brings together at host:port; process 0 starts it."""
    bound = _bind_address(address) if number == 0 else None
    place = address if bound is None else f"{address} (process 0 listens on {bound} alone)"
    told = "" if refused is None else f", to tell them why this one cannot go on ({refused})"
    with _in_time(f"all processes of this run to come to {place}{told}"):
        jax.distributed.initialize(
            coordinator_address=address, coordinator_bind_address=bound, **description
        )
    host = "localhost" if address.startswith(SOCKET) else address.rpartition(":")[0]
    place_gloo(lambda: address_towards(host))


def _bind_address(address: str) -> str:
    """host:port on which process 0 listens, where jax would take all addresses of the host.

    The user's JAX_COORDINATOR_BIND_ADDRESS, else the address of this host that the coordinator's
    means. Raises ConfigError where it means none within JOIN_SECONDS.
    """
    if given := os.environ.get(BIND_VARIABLE):
        require(is_address(given), f"{BIND_VARIABLE}={show(given)} must be host:port")
        return given
    if address.startswith(SOCKET):
        return address
    host, _, port = address.rpartition(":")
    reason = ""

    def known() -> bool:
        nonlocal reason
        try:
            own_address(host)
        except ConfigError as error:
            reason = str(error)
            return False
        return True

    # Kubernetes learns a new pod's address some seconds after its start, and knows the old one's
    # until then.
    if not is_number(host):
        what = lambda: f"process 0's name to be this host's ({JOIN_SECONDS} s at most): {reason}"
        wait_until(known, what, JOIN_SECONDS)
    return join_port(own_address(host), port)


def _check_slurm() -> tuple[str, int]:
    """The coordinator's host:port that jax reads from Slurm's variables, and this process's number.

    Raises ConfigError where they do not say what jax reads of them.
    """
    tasks = os.environ["SLURM_NTASKS"]
    # A batch script has the job's number of processes, and is none of them itself.
    missing = [name for name in _SLURM if not os.environ.get(name)]
    require(
        not missing,
        f"Slurm says SLURM_NTASKS={tasks} processes, and does not set {', '.join(missing)}: start "
        "the command with srun, which does for each process; for one process alone, unset "
        "SLURM_NTASKS",
    )
    numbers = {name: environment_number(name) for name in _SLURM if name != "SLURM_STEP_NODELIST"}
    number, count = numbers["SLURM_PROCID"] or 0, numbers["SLURM_NTASKS"] or 0
    require(number < count, f"SLURM_PROCID={number} must lie in [0, SLURM_NTASKS={count})")
    port = environment_number("JAX_COORDINATOR_PORT")
    address = SlurmCluster.get_coordinator_address(None, None if port is None else str(port))
    if number == 0 and (environment_number("SLURM_STEP_NUM_NODES") or 1) > 1:
        refuse_loopback(
            address.rpartition(":")[0],
            "set JAX_COORDINATOR_ADDRESS to ADDRESS:PORT by which others reach it, "
            "JAX_NUM_PROCESSES=$SLURM_NTASKS and JAX_PROCESS_ID=$SLURM_PROCID",
        )
    return address, number


@contextlib.contextmanager
def _in_time(what: str) -> Iterator[None]:
    """Say what is waited for; end this process with 76 where that takes JOIN_SECONDS."""

    def leave() -> None:
        say(
            f"error: waited {JOIN_SECONDS} s in vain for {what}; start all of them within this "
            "time, and give all the same address and number of processes"
        )
        # jax's call cannot be interrupted.
        os._exit(Cause.PEER.exit_code)

    timer = threading.Timer(JOIN_SECONDS, leave)
    timer.daemon = True
    timer.start()
    try:
        with announced(f"{what} ({JOIN_SECONDS} s at most)"):
            yield
    finally:
        timer.cancel()


def _local_devices() -> list[int] | None:
    """The numbers that JAX_LOCAL_DEVICE_IDS lists; None where it is unset."""
    text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if not text:
        return None
    numbers = [whole_number(each.strip()) for each in text.split(",")]
    found = [number for number in numbers if number is not None]
    require(
        len(found) == len(numbers),
        f"JAX_LOCAL_DEVICE_IDS={show(text)} must be whole numbers with commas between them",
    )
    return found
