"""Rates: the shares of the data sheet that programs reach, by default or measured on one device."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from baichuan_jax.config.parsing import read_json
from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.hardware.accelerators import HARDWARE, Hardware, Topology


@dataclass(frozen=True)
class Rates:
    """Shares of the data sheet that real programs reach, and fixed costs."""

    matmul: float
    """Of the peak, by large bfloat16 products."""
    kernel: float
    """Of their own bound, by the attention kernels."""
    memory: float
    """Of the memory's bandwidth, by instructions that it bounds."""
    intra_node: float
    """Of the links inside a node, by collectives."""
    inter_node: float
    """Of the network, by collectives."""
    contention: float
    """Compute is slower by this share while a collective is in flight: they share multiprocessors
    and memory."""
    launch_us: float = 3.0
    """Between two kernels of a stream."""
    intra_latency_us: float = 20.0
    """Start and end of a collective inside a node."""
    inter_latency_us: float = 5.0
    """Of one hop of a ring between nodes."""


RATE_NAMES = tuple(item.name for item in fields(Rates))

# What all accelerators are assumed to reach; only products are fitted.
_GPU = {"memory": 0.85, "intra_node": 0.78, "inter_node": 0.80, "contention": 0.06}
# By accelerator. `matmul` of the GPUs is fitted on published runs (benchmarks/plan_validation.py,
# docs/plan.md); the rest, and all of a TPU's, is assumed. A TPU's program is one kernel, and its
# collectives have their own engines, hence neither launch_us nor contention.
RATES = {
    "a100": Rates(matmul=0.68, kernel=0.8, **_GPU),
    "h100": Rates(matmul=0.54, kernel=0.5, **_GPU),
    "tpu": Rates(
        matmul=0.88,
        kernel=0.5,
        memory=0.85,
        intra_node=0.80,
        inter_node=0.80,
        contention=0.0,
        launch_us=0.0,
    ),
}


def rates_for(topology: Topology) -> Rates:
    """The default rates of an accelerator."""
    if topology.hardware.platform == "tpu":
        return RATES["tpu"]
    # Also for an A800, an H800 and an H200: the shares hold for the chip, not for its links.
    return RATES["a100" if topology.hardware.compute_capability == 80 else "h100"]


@dataclass(frozen=True)
class MeasuredRates:
    """Rates that were measured on one accelerator: the JSON that benchmarks/gpu.py writes."""

    path: str
    device: str
    """As its driver calls it."""
    hardware: str
    """Its name in hardware/accelerators.py."""
    date: str
    rates: dict[str, float]
    """Some of the fields of Rates, by name."""


# A share above 1 is possible: data sheets state a lower clock than cards reach, and a kernel's
# bound is itself computed. A share above this is a mistake of units (per cent, or another card's
# data sheet).
LARGEST_SHARE = 1.5
SMALLEST_SHARE = 1e-6
LARGEST_US = 1e6  # a second between two kernels is no latency


def read_rates(path: str | Path, hardware: Hardware) -> MeasuredRates:
    """Read a file of measured rates for a cluster of `hardware`.

    Shares of the data sheet hold for all accelerators of one compute capability: an H100's rates
    serve an H800 and an H200. Raises ConfigError where the file cannot be read or does not fit.
    """
    where = f"rates_file={str(path)!r}"
    found = _read_json(Path(path), where)
    measured = HARDWARE.get(found["hardware"])
    if measured is None:
        raise ConfigError(
            f"{where} was measured on hardware {found['hardware']!r}, "
            f"which is none of {', '.join(HARDWARE)}"
        )
    # TPUs have no compute capability, so that only the same one fits.
    alike = (measured.platform, measured.compute_capability) == (
        hardware.platform,
        hardware.compute_capability,
    )
    require(
        alike and (hardware.platform == "gpu" or measured.name == hardware.name),
        f"{where} was measured on {_named(measured)} and the topology is of {_named(hardware)}; "
        f"measure on {hardware.name}, take a topology of {measured.name}, "
        "or leave --rates_file out",
    )
    for name, value in found["rates"].items():
        check_rate(where, name, value)
    rates = {name: float(value) for name, value in found["rates"].items()}
    return MeasuredRates(str(path), found["device"], found["hardware"], found["date"], rates)


def _read_json(path: Path, where: str) -> dict[str, Any]:
    """The file's content, with its text fields and its `rates` checked to be there."""
    writes = "benchmarks/gpu.py writes one"
    require(path.is_file(), f"{where} is no file; {writes}")
    try:
        found = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"rates_file: {error}; {writes}") from None
    require(
        isinstance(found, dict) and isinstance(found.get("rates"), dict),
        f'{where} must hold {{"device": ..., "hardware": ..., "date": ..., '
        '"rates": {"matmul": 0.7, ...}}',
    )
    for name in ("device", "hardware", "date"):
        require(
            isinstance(found.get(name), str) and found[name] != "",
            f"{where} must state its {name!r} as text",
        )
    return found


def _named(hardware: Hardware) -> str:
    if hardware.platform != "gpu":
        return hardware.name
    major, minor = divmod(hardware.compute_capability, 10)
    return f"{hardware.name} (compute capability {major}.{minor})"


def check_rate(where: str, name: str, value: Any) -> None:
    """Refuse a value that cannot be a rate. Raises ConfigError.

    where: the file or the option, which begins the message.
    """
    # cutoff 0: even a poor match is a better hint than none, with only nine names.
    if name not in RATE_NAMES:
        near = difflib.get_close_matches(name, RATE_NAMES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{where} holds an unknown rate {name!r}; did you mean {near!r}?")
    # The others are divided by.
    least = 0 if name == "contention" or name.endswith("_us") else SMALLEST_SHARE
    # To Python, and so in JSON, true is an int.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: an integer of hundreds of digits is no float.
    require(
        number and least <= value <= LARGEST_US,
        f"{where}: {name}={repr(value)[:40]} must be a number of {least:g} at least "
        f"and {LARGEST_US:g} at most",
    )
    require(
        name.endswith("_us") or value <= LARGEST_SHARE,
        f"{where}: {name}={value!r} is a share and may be {LARGEST_SHARE} at most; 1 is the value "
        "of the data sheet (hardware/accelerators.py). Was it measured in per cent, or on another "
        "card?",
    )
