"""The device mesh, and the one table that says which mesh axis splits which dimension of an array.

Numeric code names the dimensions of its arrays by logical axes ("embed", "heads", "batch"). RULES
maps each logical axis to the mesh axes that split it: `data` (replicas with copies of the state),
`state` (replicas that share one copy), `fsdp` (shards of parameters and optimiser state inside a
replica), `context` (pieces of a sequence), `tensor` (heads, hidden units, vocabulary).
`Layout.spec` turns logical axes into a PartitionSpec; GSPMD inserts the collectives. exchange.py
has those between replicas.

`activate` makes a layout current while a function is traced. Without one, `constrain` does nothing,
so the same model code runs on a single device. The scheme is t5x's and MaxText's logical axes
(Roberts et al. 2022), reduced to one table.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_jax.config.schema import MeshConfig

AXES = ("data", "state", "fsdp", "context", "tensor")
REPLICAS = ("data", "state")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters. A matrix is split over fsdp along `embed` and over tensor along its other side.
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "qkv": None,
    "head_dim": None,
    "norm": None,
    # Activations. Rows of a batch are split over replicas and, within one, over fsdp.
    "micro_batch": None,
    "batch": ("data", "state", "fsdp"),
    # Rows of a batch where the devices along fsdp split another dimension of the same array.
    "group": ("data", "state"),
    "length": "context",
    "hidden": None,
}


@dataclass(frozen=True)
class Layout:
    """A mesh and the mesh axes that split the batch.

    They are fewer where a function is traced once for each replica: `vmap` then holds `data` and
    `state`.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...] = ("data", "state", "fsdp")
    # In which gradients are summed over devices.
    sum_dtype: str = "float32"

    @property
    def replicas(self) -> int:
        """How often the weights are there to compute with."""
        return self.mesh.shape["data"] * self.mesh.shape["state"]

    @property
    def batch_shards(self) -> int:
        """Devices along which the rows of a batch are split."""
        return math.prod(self.mesh.shape[name] for name in self.batch_axes)

    def spec(self, axes: Sequence[str | None]) -> P:
        """The PartitionSpec of an array with these logical axes; None is a dimension never split.

        Raises ValueError where two logical axes map to one mesh axis.
        """
        # Two dimensions of one array cannot be split by the same mesh axis; jax's own error for it
        # does not name the logical axes.
        entries = [None if axis is None else self._mesh_axes(axis) for axis in axes]
        groups = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
        used = [name for group in groups for name in group]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {tuple(axes)} map a mesh axis twice: {entries}")
        return P(*entries)

    def stored_spec(self, axes: Sequence[str | None]) -> P:
        """The PartitionSpec of a parameter as it is stored between steps: also over `state`."""
        # fsdp varies slowest: a gather over `state` then gives contiguous shards of fsdp.
        return P(*(("fsdp", "state") if entry == "fsdp" else entry for entry in self.spec(axes)))

    def stored(self, *axes: str | None) -> NamedSharding:
        """The sharding of a parameter as it is stored between steps."""
        return NamedSharding(self.mesh, self.stored_spec(axes))

    def split_over_state(self, axes: Sequence[str | None]) -> int | None:
        """The dimension of a parameter that `state` splits; None: none."""
        spec = self.spec(axes)
        return spec.index("fsdp") if "fsdp" in spec else None

    def _mesh_axes(self, axis: str) -> str | tuple[str, ...] | None:
        """What splits a logical axis; the batch is split by `batch_axes` alone."""
        rule = RULES[axis]
        if isinstance(rule, tuple):
            return tuple(name for name in rule if name in self.batch_axes)
        return rule

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))


# A context variable and not an argument, so that the model and the kernels need not pass a layout
# through every call. jax traces a function in the thread that calls it, which sees its own value.
_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


def current_layout() -> Layout | None:
    """The layout that `activate` made current; None: a single device."""
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
    """Fix the sharding of an activation by its logical axes; without a current layout, return x."""
    layout = _current.get()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(*axes))


def is_split(axis: str) -> bool:
    """Whether several devices of the current layout split this logical axis."""
    layout = _current.get()
    if layout is None:
        return False
    names = layout.spec((axis,))[0] or ()
    group = (names,) if isinstance(names, str) else names
    return any(layout.mesh.shape[name] > 1 for name in group)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of AXES; tensor varies fastest along a node's devices.

    After it come context, then fsdp. So these three stay inside a node (NVLink) where they fit, and
    groups of state and data join devices of equal local number, the "rails" of an InfiniBand
    cluster. On TPUs jax chooses the order by the torus. Raises ConfigError where the sizes do not
    fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = config.resolve(len(devices)).shape
    types = (AxisType.Auto,) * len(AXES)  # GSPMD: make_mesh became Explicit by default in jax 0.9
    if devices[0].platform == "tpu":
        # jax gives an axis of the torus to one axis of a mesh. Data and state may share one: so the
        # replicas lie along it first, and those that share a copy of the state are neighbours.
        merged = (shape[0] * shape[1], *shape[2:])
        found = jax.make_mesh(merged, AXES[1:], axis_types=types[1:], devices=devices)
        return Mesh(found.devices.reshape(shape), AXES, axis_types=types)
    # jax lists devices in no order that it promises; a node's process owns consecutive ids.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=types)


def crosses_nodes(mesh: Mesh) -> list[str]:
    """Axes inside a replica whose groups hold devices of several processes.

    Their collectives leave the node. For data and state that is meant; for the others it is slow.
    """
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    crossing = []
    for index, name in enumerate(AXES):
        if name not in REPLICAS and (processes.min(axis=index) != processes.max(axis=index)).any():
            crossing.append(name)
    return crossing
