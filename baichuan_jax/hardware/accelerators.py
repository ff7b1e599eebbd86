"""The accelerators that this project knows, and the clusters made of them.

One table holds what their makers state. A topology's name, such as a800:128x8, means a cluster; the
cluster of this process is found without starting jax.
"""

import glob
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from baichuan_jax.config.parsing import environment_number
from baichuan_jax.config.schema import ConfigError, require

# A driver that has lost a GPU may never answer nvidia-smi.
DRIVER_SECONDS = 30.0


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its links, from data sheets.

    Bandwidths are per device and one direction.
    """

    name: str
    platform: str
    """gpu or tpu, as jax names it."""
    peak_tflops: float
    """Dense products of bfloat16."""
    memory_gib: float
    memory_bandwidth: float
    """GB/s (10^9 bytes)."""
    intra_node_bandwidth: float
    """GB/s to the other devices of the node (NVLink); on a TPU along one axis of the torus, both
    ways together."""
    inter_node_gbps: float
    """Gbit/s to other nodes: a GPU's share of the network cards."""
    compute_capability: int = 0
    """A GPU's, such as 80."""
    multiprocessors: int = 0
    clock_ghz: float = 0.0
    shared_bytes: int = 0
    """Shared memory of a multiprocessor; a block may have 1 KiB less."""
    l2_bytes: int = 0


# Gb/s of a GPU that a network can have: less or more is a mistake of units, such as bit/s or GB/s.
SLOWEST_NETWORK = 1.0
FASTEST_NETWORK = 10_000.0

# Sources: NVIDIA data sheets of A100 (2021), A800, H100 SXM, H800 and H200; multiprocessors, clocks
# and cache as in XLA's xla/backends/gpu/target_config/specs. Network: one NIC a GPU, 200 Gb/s (DGX
# A100) or 400 Gb/s (DGX H100). An A800 is an A100 with NVLink cut from 600 to 400 GB/s (both ways),
# an H800 an H100 with 900 cut to 400. TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); link
# rates as in "How to scale your model", chapter 2.
_A100 = Hardware(
    "a100",
    platform="gpu",
    peak_tflops=312.0,
    memory_gib=79.25,
    memory_bandwidth=2039.0,
    intra_node_bandwidth=300.0,
    inter_node_gbps=200.0,
    compute_capability=80,
    multiprocessors=108,
    clock_ghz=1.41,
    shared_bytes=167_936,
    l2_bytes=41_943_040,
)
_H100 = Hardware(
    "h100",
    platform="gpu",
    peak_tflops=989.0,
    memory_gib=79.1,
    memory_bandwidth=3352.0,
    intra_node_bandwidth=450.0,
    inter_node_gbps=400.0,
    compute_capability=90,
    multiprocessors=132,
    clock_ghz=1.98,
    shared_bytes=233_472,
    l2_bytes=52_428_800,
)


def _tpu(
    name: str, peak_tflops: float, memory_gib: float, memory_bandwidth: float, link: float
) -> Hardware:
    """A TPU; link: GB/s along one axis of the torus. Its chips need no network."""
    return Hardware(
        name,
        platform="tpu",
        peak_tflops=peak_tflops,
        memory_gib=memory_gib,
        memory_bandwidth=memory_bandwidth,
        intra_node_bandwidth=link,
        inter_node_gbps=0.0,
    )


HARDWARE: dict[str, Hardware] = {
    item.name: item
    for item in (
        _A100,
        replace(_A100, name="a800", intra_node_bandwidth=200.0),
        _H100,
        replace(_H100, name="h800", intra_node_bandwidth=200.0),
        replace(_H100, name="h200", memory_gib=140.4, memory_bandwidth=4800.0),
        _tpu("v4", 275.0, 32.0, 1228.0, 90.0),
        _tpu("v5e", 197.0, 16.0, 819.0, 90.0),
        _tpu("v5p", 459.0, 95.0, 2765.0, 180.0),
        _tpu("v6e", 918.0, 32.0, 1640.0, 180.0),
    )
}
# What jax calls a device where that does not contain the table's name.
_KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}


def hardware_of(device_kind: str) -> Hardware | None:
    """The table's row of a device; None: unknown.

    device_kind: what jax or the driver calls it, such as "NVIDIA A800-SXM4-80GB" or "TPU v5 lite".
    """
    # Whole words only, so that "a100" is not found in another card's name.
    kind = device_kind.lower()
    # The longest name first: "v5" is part of "v5 lite".
    for name in sorted((*HARDWARE, *_KINDS), key=len, reverse=True):
        if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", kind):
            return HARDWARE[_KINDS.get(name, name)]
    return None


@dataclass(frozen=True)
class Topology:
    """A cluster."""

    hardware: Hardware
    shape: tuple[int, ...]
    """(nodes, devices a node) of GPUs, or the torus of TPU chips."""

    @property
    def num_devices(self) -> int:
        """Devices of the whole cluster."""
        return math.prod(self.shape)

    @property
    def devices_per_node(self) -> int:
        """Devices that reach each other without the network: a node's GPUs, or a TPU slice."""
        return self.shape[1] if self.hardware.platform == "gpu" else self.num_devices

    @property
    def node_gbps(self) -> float:
        """Gb/s of a whole node to other nodes; 0 for TPUs."""
        return self.hardware.inter_node_gbps * self.devices_per_node

    def with_network(self, gpu_gbps: float | None, node_gbps: float | None) -> "Topology":
        """The same cluster with another network: Gb/s of a GPU or of a whole node, not both.

        Raises ConfigError, whose message names the command's options.
        """
        given = {"hardware.inter_node_gbps": gpu_gbps, "hardware.node_gbps": node_gbps}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            return self
        require(
            len(names) == 1,
            f"--{' and --'.join(names)} are one number: of a GPU and of a node; give one of them",
        )
        name = names[0]
        require(
            self.hardware.platform == "gpu",
            f"--{name} is for GPUs: the chips of {self} reach each other without a network",
        )
        share = self.devices_per_node if gpu_gbps is None else 1
        value = next(value for value in given.values() if value is not None) / share
        require(
            SLOWEST_NETWORK <= value <= FASTEST_NETWORK,
            f"--{name}={value * share:g} is {value:g} Gb/s a GPU, which must be from "
            f"{SLOWEST_NETWORK:g} to {FASTEST_NETWORK:,g}; the unit is 10^9 bits a second",
        )
        return replace(self, hardware=replace(self.hardware, inter_node_gbps=value))

    def __str__(self) -> str:
        return f"{self.hardware.name}:{'x'.join(map(str, self.shape))}"


# More than any cluster has: each of them is described.
MOST_DEVICES = 1 << 20


def parse_topology(name: str) -> Topology:
    """The cluster that a name means: "a800:128x8" (nodes x devices) or "v5p:4x4x8" (a torus).

    Raises ConfigError.
    """
    # The name of an accelerator, a colon, and numbers joined by x.
    match = re.fullmatch(r"([a-z0-9]+):([0-9]{1,7}(?:x[0-9]{1,7})*)", name)
    known = ", ".join(HARDWARE)
    if match is None:
        raise ConfigError(
            f"topology={name!r} must read like a800:128x8 (nodes x GPUs) or v5p:4x4x8 (a torus); "
            f"known: {known}"
        )
    require(match[1] in HARDWARE, f"topology={name!r} names no known accelerator; known: {known}")
    hardware, shape = HARDWARE[match[1]], tuple(int(size) for size in match[2].split("x"))
    # v5e and v6e are flat tori; v4 and v5p have three dimensions.
    dimensions = {"gpu": (2,), "tpu": (2, 3)}[hardware.platform]
    counts = " or ".join(map(str, dimensions))
    require(
        len(shape) in dimensions and 0 not in shape,
        f"topology={name!r}: {hardware.name} takes {counts} numbers greater than 0",
    )
    require(
        math.prod(shape) <= MOST_DEVICES,
        f"topology={name!r} has {math.prod(shape):,} devices; the most is {MOST_DEVICES:,}",
    )
    return Topology(hardware, shape)


def _driver_models() -> list[str]:
    """What the driver calls this host's GPUs.

    From /proc, or from nvidia-smi where a container does not show /proc/driver.
    """
    # Neither way loads CUDA, whose context would take memory of every GPU.
    models = []
    for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
        with open(path, encoding="utf-8") as file:
            models += re.findall(r"^Model:\s*(.+)$", file.read(), re.MULTILINE)
    if models or (program := shutil.which("nvidia-smi")) is None:
        return models
    try:
        command = [program, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def detect_topology() -> Topology | None:
    """The cluster of this run, without starting jax; None: no NVIDIA GPU, or an unknown one.

    It is the GPUs that this host's driver lists, times the nodes: JAX_NUM_PROCESSES or SLURM_NTASKS
    over the processes a node that CUDA_VISIBLE_DEVICES implies. Where nothing is set, one process a
    node is assumed.
    """
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] in ("cpu", "tpu"):
        return None
    models = _driver_models()
    if not models or (hardware := hardware_of(models[0])) is None:
        return None
    # A process may see fewer GPUs than its host has: those are its share, the driver's list is the
    # node.
    visible = os.environ.get("JAX_LOCAL_DEVICE_IDS") or os.environ.get("CUDA_VISIBLE_DEVICES")
    local = len(visible.split(",")) if visible else len(models)
    # jax's own variable first, as in resilience/processes.py.
    processes = environment_number("JAX_NUM_PROCESSES") or environment_number("SLURM_NTASKS") or 1
    devices = local * processes
    node = min(len(models), devices)
    return Topology(hardware, (max(devices // node, 1), node))
