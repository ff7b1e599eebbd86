"""The device mesh and the one table that maps logical axes of arrays to it, and the start of several processes.

Arrays carry logical axis names ("embed", "heads", ...); RULES says which mesh axis cuts each.
`activate` makes a mesh current while a function is traced; without a current mesh `constrain` does
nothing, so that a model runs on one device as it stands.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_jax.config.schema import ConfigError, DistributedConfig, MeshConfig, ResilienceConfig

AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "qkv": None,
    "head_dim": None,
    "norm": None,
    # activations
    "replica": "data",
    "micro_batch": None,
    "batch": ("data", "fsdp"),
    "group": ("data",),
    "length": "context",
    "hidden": None,
}


@dataclass(frozen=True)
class Layout:
    """A mesh and the mesh axes that cut the batch (fewer while gradients are taken per replica)."""

    mesh: Mesh
    batch_axes: tuple[str, ...] = ("data", "fsdp")

    def spec(self, axes: Sequence[str | None]) -> P:
        """The PartitionSpec of an array with these logical axes. Raises ValueError where two of them need one mesh axis."""
        entries = [
            self._batch(axis) if axis in ("batch", "group") else RULES[axis] if axis else None
            for axis in axes
        ]
        used = [
            name
            for entry in entries
            if entry
            for name in ((entry,) if isinstance(entry, str) else entry)
        ]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {tuple(axes)} map a mesh axis twice: {entries}")
        return P(*entries)

    def _batch(self, axis: str) -> tuple[str, ...]:
        """Mesh axes of a batch's rows; of "group", where all devices along fsdp hold the rows of all of them."""
        return tuple(name for name in self.batch_axes if axis == "batch" or name != "fsdp")

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes))


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


def current_layout() -> Layout | None:
    """The layout that `activate` made current, or None: one device."""
    return _current.get()


@contextlib.contextmanager
def activate(layout: Layout | None) -> Iterator[None]:
    """Make a layout current for what is traced inside."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fix how an activation with these logical axes lies on the current mesh."""
    layout = _current.get()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(*axes))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, context, tensor) with tensor varying fastest along each node's devices, then context, then fsdp.

    So tensor, context and fsdp stay inside a node (NVLink) where they fit, and the data groups join
    devices of equal local number, the "rails" of an InfiniBand cluster. On TPUs jax chooses the
    order by the torus. Raises ConfigError where the sizes do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = config.resolve(len(devices)).shape
    types = (AxisType.Auto,) * len(AXES)  # GSPMD: make_mesh became Explicit by default in jax 0.9
    if devices[0].platform == "tpu":
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=types)


def add_mesh_options(parser: argparse.ArgumentParser, default: MeshConfig) -> None:
    """--mesh.data, --mesh.fsdp, --mesh.context and --mesh.tensor, as `train` has them, for a command that uses argparse."""
    group = parser.add_argument_group(
        "mesh", "devices along each axis; one of them may be -1: all that are left"
    )
    for axis, size, what in zip(
        AXES, default.shape, ("rows", "parameters", "sequence", "heads"), strict=True
    ):
        group.add_argument(
            f"--mesh.{axis}", type=int, default=size, metavar="N", help=f"pieces of the {what}"
        )


def mesh_config(options: argparse.Namespace) -> MeshConfig:
    """The mesh of parsed options."""
    return MeshConfig(**{axis: getattr(options, f"mesh.{axis}") for axis in AXES})


def crosses_nodes(mesh: Mesh) -> list[str]:
    """Axes other than data whose groups hold devices of several processes: their collectives leave the node."""
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    crossing = []
    for index, name in enumerate(AXES):
        if name != "data" and (processes.min(axis=index) != processes.max(axis=index)).any():
            crossing.append(name)
    return crossing


SHUTDOWN_SECONDS = 30  # that a process waits at its end for the others; jax's own 300 would hide a fault for five minutes


def initialize_processes(
    config: DistributedConfig, resilience: ResilienceConfig | None = None
) -> None:
    """Join the run's other processes: from the settings, JAX_COORDINATOR_ADDRESS/JAX_NUM_PROCESSES/JAX_PROCESS_ID, or Slurm.

    Does nothing for a single process. Raises ConfigError where only some of the three are given.
    """
    resilience = resilience or ResilienceConfig()
    timeouts: Any = {
        "heartbeat_timeout_seconds": resilience.jax_heartbeat_seconds,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    address = config.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _integer(config.num_processes, "JAX_NUM_PROCESSES")
    number = _integer(config.process_id, "JAX_PROCESS_ID")
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
            f"several processes need all of distributed.coordinator_address={address}, num_processes={count} and "
            f"process_id={number}, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        # One process a node under Slurm would see its first GPU only, unless told its devices.
        jax.distributed.initialize(
            cluster_detection_method="slurm", local_device_ids=local_ids, **timeouts
        )


def _integer(value: int | None, variable: str) -> int | None:
    if value is not None or variable not in os.environ:
        return value
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ConfigError(f"{variable}={os.environ[variable]!r} must be a whole number") from None
