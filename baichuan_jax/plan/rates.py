"""What a prediction assumes: rates and the network, each with its range and its source.

Rates are the shares of the data sheet that programs reach. One table has the default of each, how
low and how high it may be, and where that is known from. A rate that is given or measured replaces
the table's (assumptions_for).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from baichuan_jax.config.parsing import read_json
from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.hardware.accelerators import HARDWARE, Hardware, Topology


@dataclass(frozen=True)
class Rates:
    """Shares of the data sheet that real programs reach, and fixed costs.

    Each is a number, or an array of one for each sample (prediction.predict).
    """

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
    straggler: float
    """The standard deviation of a device's step time, as a share of it: a step waits for the
    slowest device."""
    launch_us: float
    """Between two kernels of a stream."""
    intra_latency_us: float
    """Start and end of a collective inside a node."""
    inter_latency_us: float
    """Of one hop of a ring between nodes."""


RATE_NAMES = tuple(item.name for item in fields(Rates))
# The assumption that is no rate: Gb/s of a GPU to other nodes.
NETWORK = "inter_node_gbps"


class Assumption(NamedTuple):
    """A number that a prediction rests on, and the range in which it may lie."""

    value: float
    low: float
    high: float
    source: str


_FITTED = "fitted on published runs; range: what single runs give"
_NCCL = "assumed: NCCL's bus bandwidth over the links' rate"
_OVERLAP = "assumed; high: mean of arXiv 2507.03114 on 4 GPUs"
_NODES = (
    "chosen within what fits published runs of several nodes nearly as well, which the range is"
)
_FLASH = "FlashAttention-2's share of the peak (arXiv 2307.08691)"
# Of all accelerators alike.
_ALL = {
    "memory": Assumption(0.85, 0.8, 0.9, "assumed: as long copies reach"),
    "straggler": Assumption(0.0, 0.0, 0.01, "assumed: beyond the 8 devices of a fitted run"),
    "intra_latency_us": Assumption(20.0, 10.0, 30.0, "assumed: start and end of a collective"),
}
_GPU = _ALL | {
    "intra_node": Assumption(0.78, 0.7, 0.85, _NCCL),
    "contention": Assumption(0.06, 0.03, 0.19, _OVERLAP),
    "launch_us": Assumption(3.0, 2.0, 5.0, "assumed: between two kernels of a stream"),
    "inter_latency_us": Assumption(
        5.0, 2.7, 14.0, "assumed; range: NCCL's own table (src/graph/tuning.cc)"
    ),
}
# By accelerator. `matmul`, `inter_node` and `straggler` of the GPUs are fitted
# (benchmarks/plan_validation.py, docs/plan.md); the rest, and all of a TPU's, is assumed. A TPU's
# program is one kernel, and its collectives have their own engines, hence neither launch_us nor
# contention.
ASSUMPTIONS: dict[str, dict[str, Assumption]] = {
    "a100": _GPU
    | {
        "matmul": Assumption(0.66, 0.60, 0.80, _FITTED),
        "inter_node": Assumption(0.7, 0.5, 0.9, _NODES),
        "straggler": Assumption(0.02, 0.0, 0.04, _NODES),
        "kernel": Assumption(0.65, 0.5, 0.75, f"{_FLASH}, over our bounds (docs/plan.md)"),
    },
    "h100": _GPU
    | {
        "matmul": Assumption(0.51, 0.44, 0.60, _FITTED),
        "inter_node": Assumption(0.8, 0.5, 0.9, _NODES),
        "straggler": Assumption(0.05, 0.02, 0.08, _NODES),
        "kernel": Assumption(0.5, 0.35, 0.7, "assumed: between FlashAttention-2's and -3's shares"),
    },
    "tpu": _ALL
    | {
        "matmul": Assumption(0.88, 0.75, 0.95, "assumed"),
        "kernel": Assumption(0.5, 0.35, 0.7, "assumed"),
        "intra_node": Assumption(0.8, 0.7, 0.9, "assumed"),
        "contention": Assumption(0.0, 0.0, 0.05, "assumed: collectives have their own engines"),
        "launch_us": Assumption(0.0, 0.0, 0.0, "a program is one kernel"),
        "inter_node": Assumption(0.8, 0.8, 0.8, "not used: chips need no network"),
        "inter_latency_us": Assumption(5.0, 5.0, 5.0, "not used: chips need no network"),
    },
}
# The share of the data sheet's network that a cluster may have: servers are sold with a card for
# two GPUs, too.
LEAST_NETWORK = 0.5
# How far a rate that one card measured may be from the cluster's, to each side: cards of one kind
# differ by 8 % on average from end to end (arXiv 2208.11035).
MEASURED_RANGE = 0.04


def rates_of(assumptions: Mapping[str, Assumption]) -> Rates:
    """The rates at their central values."""
    return Rates(**{name: assumptions[name].value for name in RATE_NAMES})


# The central values by accelerator.
RATES = {kind: rates_of(found) for kind, found in ASSUMPTIONS.items()}


def _kind_of(topology: Topology) -> str:
    if topology.hardware.platform == "tpu":
        return "tpu"
    # Also for an A800, an H800 and an H200: the shares hold for the chip, not for its links.
    return "a100" if topology.hardware.compute_capability == 80 else "h100"


def rates_for(topology: Topology) -> Rates:
    """The default rates of an accelerator."""
    return RATES[_kind_of(topology)]


def assumptions_for(
    topology: Topology,
    measured: Mapping[str, float] | None = None,
    given: Mapping[str, float] | None = None,
) -> dict[str, Assumption]:
    """Every rate by name and, of GPUs, the network (NETWORK).

    measured, given: rates (of given the network, too) instead of the defaults; given ones win. With
    an `inter_node` of theirs, stragglers are 0 unless they are theirs as well.
    """
    found = dict(ASSUMPTIONS[_kind_of(topology)])
    # A slice of TPUs needs no network.
    if topology.hardware.platform == "gpu":
        network = topology.hardware.inter_node_gbps
        source = "data sheet: a card a GPU; low: a card for two"
        found[NETWORK] = Assumption(network, LEAST_NETWORK * network, network, source)
    for name, value in (measured or {}).items():
        low, high = value * (1 - MEASURED_RANGE), value * (1 + MEASURED_RANGE)
        source = "measured on one card; cards differ (arXiv 2208.11035)"
        found[name] = Assumption(value, low, high, source)
    # What its user states is known.
    for name, value in (given or {}).items():
        found[name] = Assumption(value, value, value, "given")
    # One fit found both: with another network's share the fitted stragglers would count twice what
    # this share has in it.
    known = {*(measured or {}), *(given or {})}
    if found["straggler"].value > 0 and "inter_node" in known and "straggler" not in known:
        high, source = found["straggler"].high, "its default was fitted with inter_node's"
        found["straggler"] = Assumption(0.0, 0.0, high, f"0: {source}, which is replaced")
    return found


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
    # cutoff 0: even a poor match is a better hint than none, with so few names.
    if name not in RATE_NAMES:
        near = difflib.get_close_matches(name, RATE_NAMES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{where} holds an unknown rate {name!r}; did you mean {near!r}?")
    # The others are divided by.
    least = 0 if name in ("contention", "straggler") or name.endswith("_us") else SMALLEST_SHARE
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
