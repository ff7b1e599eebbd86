"""Predicts how long a compiled training step takes: every instruction bounded by arithmetic, memory or a link, in the compiler's
order, with collectives beside the compute that stands between their start and their end.

Nothing here is measured on the machine that runs it: the rates are shares of what the data sheets
state, fitted on published measurements where docs/plan.md says so, or read from a file of rates
that were measured on one accelerator.
"""

import difflib
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.hardware.accelerators import HARDWARE, Hardware, Topology
from baichuan_jax.hardware.flops import ATTENTION_PRODUCTS, causal_attention_flops
from baichuan_jax.plan.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    Program,
    replica_groups,
    shape_arrays,
    shape_bytes,
)


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
    """Compute runs slower by this share while a collective is in flight: they share multiprocessors and memory."""
    launch_us: float = 3.0
    """Between two kernels of a stream."""
    intra_latency_us: float = 20.0
    """Start and end of a collective inside a node."""
    inter_latency_us: float = 5.0
    """Of one hop of a ring between nodes."""


RATE_NAMES = tuple(item.name for item in fields(Rates))

# By accelerator. `matmul` is fitted on published runs (benchmarks/plan_validation.py,
# docs/plan.md); the rest, and all of a TPU's, is assumed.
RATES = {
    "a100": Rates(
        matmul=0.68, kernel=0.8, memory=0.85, intra_node=0.78, inter_node=0.80, contention=0.06
    ),
    "h100": Rates(
        matmul=0.54, kernel=0.5, memory=0.85, intra_node=0.78, inter_node=0.80, contention=0.06
    ),
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
    """The rates of an accelerator."""
    if topology.hardware.platform == "tpu":
        return RATES["tpu"]
    return RATES["a100" if topology.hardware.compute_capability == 80 else "h100"]


@dataclass(frozen=True)
class MeasuredRates:
    """Rates that were measured on one accelerator, and where: the JSON that benchmarks/gpu.py writes."""

    path: str
    device: str
    """As its driver calls it."""
    hardware: str
    """Its name in hardware.py."""
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
    """Read a file of measured rates for a cluster of `hardware`. Raises ConfigError where it cannot be read or does not fit.

    Shares of the data sheet hold for all accelerators of one compute capability: what an H100
    measured serves an H800 and an H200.
    """
    require(
        Path(path).is_file(), f"rates_file={str(path)!r} is no file; benchmarks/gpu.py writes one"
    )
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"rates_file={str(path)!r} cannot be read ({error.strerror}); benchmarks/gpu.py writes one"
        ) from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8, or nested too deep
        raise ConfigError(
            f"rates_file={str(path)!r} is no JSON ({error}); benchmarks/gpu.py writes one"
        ) from None
    require(
        isinstance(found, dict) and isinstance(found.get("rates"), dict),
        f'rates_file={str(path)!r} must hold {{"device": ..., "hardware": ..., "date": ..., "rates": {{"matmul": 0.7, ...}}}}',
    )
    for name in ("device", "hardware", "date"):
        require(
            isinstance(found.get(name), str) and found[name] != "",
            f"rates_file={str(path)!r} must state its {name!r} as text",
        )
    measured = HARDWARE.get(found["hardware"])
    if measured is None:
        raise ConfigError(
            f"rates_file={str(path)!r} was measured on hardware {found['hardware']!r}, which is none of {', '.join(HARDWARE)}"
        )
    alike = (measured.platform, measured.compute_capability) == (
        hardware.platform,
        hardware.compute_capability,
    )
    require(
        alike and (hardware.platform == "gpu" or measured.name == hardware.name),
        f"rates_file={str(path)!r} was measured on {_named(measured)} and the topology is of {_named(hardware)}; measure on "
        f"{hardware.name}, take a topology of {measured.name}, or leave --rates_file out",
    )
    for name, value in found["rates"].items():
        check_rate(f"rates_file={str(path)!r}", name, value)
    return MeasuredRates(
        str(path),
        found["device"],
        found["hardware"],
        found["date"],
        {name: float(value) for name, value in found["rates"].items()},
    )


def _named(hardware: Hardware) -> str:
    capability = divmod(hardware.compute_capability, 10)
    return hardware.name + (
        f" (compute capability {capability[0]}.{capability[1]})"
        if hardware.platform == "gpu"
        else ""
    )


def check_rate(where: str, name: str, value: Any) -> None:
    """Refuse a rate that cannot be one. `where` begins the message: the file, or the option. Raises ConfigError."""
    if name not in RATE_NAMES:
        near = difflib.get_close_matches(name, RATE_NAMES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{where} holds an unknown rate {name!r}; did you mean {near!r}?")
    # Everything but these divides.
    least = 0 if name == "contention" or name.endswith("_us") else SMALLEST_SHARE
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: an integer of hundreds of digits is no float.
    require(
        number and least <= value <= LARGEST_US,
        f"{where}: {name}={repr(value)[:40]} must be a number of {least:g} at least and {LARGEST_US:g} at most",
    )
    require(
        name.endswith("_us") or value <= LARGEST_SHARE,
        f"{where}: {name}={value!r} is a share and may be {LARGEST_SHARE} at most; 1 is the data sheet's value "
        "(hardware.py), so was it measured in per cent, or on another card?",
    )


@dataclass
class Collective:
    """One collective instruction, over all the times it runs; seconds are of one device."""

    kind: str
    bytes: float
    """Of one run: the larger of what a device gives and gets."""
    axis: str
    """Mesh axes along which its groups lie."""
    link: str
    """intra_node or inter_node."""
    count: int = 0
    in_loop: bool = False
    asynchronous: bool = False
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Of them, how long compute waited."""
    op_name: str = ""


@dataclass
class Prediction:
    """What a step is predicted to take, and where it goes."""

    seconds: float
    matmul_seconds: float
    memory_seconds: float
    kernel_seconds: float
    contention_seconds: float
    collectives: list[Collective]
    matmul_flops: float
    kernel_flops: float
    kernels: dict[str, int]
    """Calls of our kernels in the program's text, by name."""
    unknown: dict[str, int]
    """Custom calls and loops that could not be counted, and how often."""
    costs: dict[str, float]
    """Seconds of one run of every instruction, by name; of a collective, from its start to its end if nothing is in its way."""
    bounds: dict[str, str]
    """What bounds each of them: matmul, memory or kernel; of a collective, its link."""

    @property
    def exposed_seconds(self) -> float:
        return sum(item.exposed_seconds for item in self.collectives)


# The share of the peak that bounds them at head size 128 in bfloat16, from their own instructions
# (python -m baichuan_jax.kernels, docs/kernels.md). Not known for a TPU: 1.
BOUNDS = {
    80: {"attention_forward": 0.735, "attention_dkv": 0.799, "attention_dq": 0.762},
    90: {"attention_forward": 0.970, "attention_dkv": 0.985, "attention_dq": 0.970},
}


def kernel_of(instruction: Instruction) -> str | None:
    """Which of our kernels a custom call is: a name of ATTENTION_PRODUCTS or "rms_norm"; None: none of them."""
    known = (*ATTENTION_PRODUCTS, "rms_norm")
    return next(
        (name for name in known if name in instruction.op_name or name in instruction.name), None
    )


def schedule_profile(prediction: Prediction) -> str:
    """What XLA's profile-guided scheduler reads (a ProfiledInstructionsProto as text): microseconds by instruction.

    Without it the scheduler takes every product for equally long and every collective for five of
    them.
    """
    lines = []
    for name, seconds in prediction.costs.items():
        lines.append(f'costs {{ name: "{name}" cost_us: {seconds * 1e6:.3f} }}')
        if "-start" in name:
            done = name.replace("-start", "-done")
            lines.append(
                f'latencies {{ source: "{name}" target: "{done}" latency_us: {seconds * 1e6:.3f} }}'
            )
    return "\n".join(lines) + "\n"


def predict(
    program: Program, mesh: Mesh | AbstractMesh, topology: Topology, rates: Rates
) -> Prediction:
    """Run the schedule of a compiled step on paper. mesh: the one it was compiled for."""
    return _Simulation(program, mesh, topology, rates).run()


@dataclass
class _Simulation:
    program: Program
    mesh: Mesh | AbstractMesh
    topology: Topology
    rates: Rates
    now: float = 0.0
    link_free: dict[str, float] = field(
        default_factory=lambda: {"intra_node": 0.0, "inter_node": 0.0}
    )
    """When each link has ended all that it was given; the two serve different collectives at the same time."""
    spent: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("matmul", "memory", "kernel", "contention"), 0.0)
    )
    flops: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("matmul", "kernel"), 0.0)
    )
    collectives: dict[str, Collective] = field(default_factory=dict)
    in_flight: dict[str, tuple[Collective, float]] = field(default_factory=dict)
    costs: dict[tuple[str, str], tuple[str, float, float]] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    def run(self) -> Prediction:
        self._computation(self.program.entry, 0)
        found = list(self.collectives.values())
        return Prediction(
            self.now,
            self.spent["matmul"],
            self.spent["memory"],
            self.spent["kernel"],
            self.spent["contention"],
            found,
            self.flops["matmul"],
            self.flops["kernel"],
            self.kernels,
            self.unknown,
            self._seconds_by_name(),
            self._bounds_by_name(),
        )

    def _seconds_by_name(self) -> dict[str, float]:
        computed = {name: seconds for (_, name), (_, seconds, _) in self.costs.items()}
        return computed | {
            key.split("/")[1]: item.seconds / item.count for key, item in self.collectives.items()
        }

    def _bounds_by_name(self) -> dict[str, str]:
        computed = {name: bound for (_, name), (bound, _, _) in self.costs.items()}
        return computed | {key.split("/")[1]: item.link for key, item in self.collectives.items()}

    def _computation(self, computation: Computation, depth: int) -> None:
        for instruction in computation.instructions:
            kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
            if instruction.opcode == "while":
                turns = self.program.trip_count(computation, instruction)
                if turns is None:
                    self._count_unknown(
                        f"loop of unknown length ({instruction.op_name or instruction.name})"
                    )
                for _ in range(turns or 1):
                    self._computation(self.program.computations[instruction.called[0]], depth + 1)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called:
                    self._computation(self.program.computations[name], depth)
            elif instruction.opcode == "fusion" and instruction.name.startswith(
                "async-collective-start"
            ):
                self._start_inside(instruction, depth)
            elif instruction.opcode in ("call-start", "call-update"):
                self._start_offloaded(computation, instruction, depth)
            elif instruction.opcode.endswith("-done") or instruction.name.startswith(
                "async-collective-done"
            ):
                self._await(computation, instruction)
            elif kind in COLLECTIVES:
                self._start(computation, instruction, kind, depth)
            else:
                self._compute(computation, instruction)

    def _compute(self, computation: Computation, instruction: Instruction) -> None:
        key = (computation.name, instruction.name)
        if key not in self.costs:
            self.costs[key] = self._cost(computation, instruction)
        bound, seconds, flops = self.costs[key]
        if not seconds:
            return
        self.spent[bound] += seconds
        if flops:
            self.flops[bound] += flops
        # While a collective is in flight compute runs slower.
        slow = 1 + self.rates.contention
        overlapped = min(seconds * slow, max(max(self.link_free.values()) - self.now, 0.0))
        extra = overlapped - overlapped / slow
        self.spent["contention"] += extra
        self.now += seconds + extra

    def _cost(self, computation: Computation, instruction: Instruction) -> tuple[str, float, float]:
        hardware, rates = self.topology.hardware, self.rates
        if instruction.opcode == "custom-call" and not instruction.target.startswith("__cublas"):
            return self._kernel(computation, instruction)
        flops = self.program.flops(computation, instruction)
        by_memory = self.program.traffic(computation, instruction) / (
            hardware.memory_bandwidth * 1e9 * rates.memory
        )
        by_matmul = flops / (hardware.peak_tflops * 1e12 * rates.matmul)
        if not by_memory and not by_matmul:
            return "memory", 0.0, 0.0
        bound = "matmul" if flops else "memory"
        return bound, max(by_memory, by_matmul) + rates.launch_us * 1e-6, flops

    def _kernel(
        self, computation: Computation, instruction: Instruction
    ) -> tuple[str, float, float]:
        """A Triton or Pallas kernel: its products against its own bound, or its traffic."""
        hardware, rates = self.topology.hardware, self.rates
        name = kernel_of(instruction)
        traffic = self.program.traffic(computation, instruction)
        by_memory = traffic / (hardware.memory_bandwidth * 1e9 * rates.memory)
        if name is None:
            if traffic:
                self._count_unknown(
                    f"custom call {instruction.target} (its traffic alone is counted)"
                )
            return "memory", by_memory, 0.0
        self.kernels[name] = self.kernels.get(name, 0) + 1
        if name not in ATTENTION_PRODUCTS:
            return "kernel", by_memory + rates.launch_us * 1e-6, 0.0
        share = rates.kernel * BOUNDS.get(hardware.compute_capability, {}).get(name, 1.0)
        shapes = [
            dims
            for operand in instruction.operands
            for _, dims in shape_arrays(computation.shape_of(operand))
        ]
        flops = causal_attention_flops(
            max(shapes, key=math.prod), ATTENTION_PRODUCTS[name], name.startswith("splash")
        )
        by_products = flops / (hardware.peak_tflops * 1e12 * share)
        return "kernel", max(by_memory, by_products) + rates.launch_us * 1e-6, flops

    def _count_unknown(self, what: str) -> None:
        self.unknown[what] = self.unknown.get(what, 0) + 1

    def _start(
        self,
        computation: Computation,
        instruction: Instruction,
        kind: str,
        depth: int,
        under: str | None = None,
    ) -> None:
        key = f"{computation.name}/{instruction.name}"
        if key not in self.collectives:
            self.collectives[key] = self._collective(computation, instruction, kind, depth)
        collective = self.collectives[key]
        seconds = self._seconds(collective, self._group(instruction))
        end = self.link_free[collective.link] = (
            max(self.now, self.link_free[collective.link]) + seconds
        )
        collective.count += 1
        collective.seconds += seconds
        if under is not None or collective.asynchronous:
            collective.asynchronous = True
            self.in_flight[under or instruction.name] = (collective, end)
        else:
            collective.exposed_seconds += end - self.now
            self.now = end

    def _start_offloaded(
        self, computation: Computation, instruction: Instruction, depth: int
    ) -> None:
        """A collective on a TPU's SparseCores: it starts when it gets its operand.

        libtpu 0.0.41 hands that over with the call, 0.0.48 with an update of it.
        """
        call = (
            computation.by_name[instruction.operands[0]]
            if instruction.opcode == "call-update"
            else instruction
        )
        if bool(call.operands) == (instruction is call):
            self._start_inside(call, depth)

    def _start_inside(self, instruction: Instruction, depth: int) -> None:
        """A TPU's asynchronous collective: a fusion that holds its start, or a call to the SparseCores."""
        inner = self.program.computations[instruction.called[0]]
        for item in inner.instructions:
            kind = item.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self._start(inner, item, kind, depth, under=instruction.name)

    def _await(self, computation: Computation, instruction: Instruction) -> None:
        collective, end = None, 0.0
        for name in instruction.operands:  # the start itself, or on a TPU parts of its result
            while name in computation.by_name and computation.by_name[name].opcode in (
                "get-tuple-element",
                "call-update",
            ):
                name = computation.by_name[name].operands[0]
            if name in self.in_flight:
                collective, end = self.in_flight.pop(name)
        if collective is not None and end > self.now:
            collective.exposed_seconds += end - self.now
            self.now = end

    def _group(self, instruction: Instruction) -> np.ndarray:
        return replica_groups(instruction.attributes, self.mesh.size)

    def _collective(
        self, computation: Computation, instruction: Instruction, kind: str, depth: int
    ) -> Collective:
        groups = self._group(instruction)
        size = sum(shape_bytes(computation.shape_of(name)) for name in instruction.operands)
        if kind == "all-gather":
            size *= groups.shape[1]
        per_node = self.topology.devices_per_node
        crosses = bool((groups // per_node != groups[:, :1] // per_node).any())
        asynchronous = (
            instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes
        )
        return Collective(
            kind,
            size,
            axes_of(groups, self.mesh),
            "inter_node" if crosses else "intra_node",
            in_loop=depth > 0,
            asynchronous=asynchronous,
            op_name=instruction.op_name,
        )

    def _seconds(self, collective: Collective, groups: np.ndarray) -> float:
        """A ring's time: each device passes on (n - 1)/n of the bytes, an all-reduce twice."""
        hardware, rates = self.topology.hardware, self.rates
        n = groups.shape[1]
        passed = collective.bytes * (n - 1) / n * (2 if collective.kind == "all-reduce" else 1)
        if collective.link == "intra_node":
            return (
                passed / (hardware.intra_node_bandwidth * 1e9 * rates.intra_node)
                + rates.intra_latency_us * 1e-6
            )
        # Devices of one node that are in the same group pass on within the node: only 1/m of the
        # bytes leave it through each card.
        per_node = self.topology.devices_per_node
        together = int(np.bincount(groups[0] // per_node).max())
        hops = 2 * (n // together) * rates.inter_latency_us * 1e-6
        # NCCL takes a tree instead of a ring where latency would bound it: the logarithm of the
        # hops.
        hops = (
            min(hops, 2 * np.log2(max(n // together, 2)) * rates.inter_latency_us * 4e-6)
            if passed < 2**24
            else hops
        )
        return passed / together / (hardware.inter_node_gbps / 8 * 1e9 * rates.inter_node) + hops


def axes_of(groups: np.ndarray, mesh: Mesh | AbstractMesh) -> str:
    """The mesh axes along which groups of devices (numbered in the mesh's order) lie, such as "fsdp" or "data+fsdp"; "?": none."""
    numbers = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    wanted = {tuple(sorted(group)) for group in groups.tolist()}
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    for choice in range(1, 2 ** len(names)):
        chosen = [name for bit, name in enumerate(names) if choice >> bit & 1]
        along = [mesh.axis_names.index(name) for name in chosen]
        others = [axis for axis in range(numbers.ndim) if axis not in along]
        lines = numbers.transpose(others + along).reshape(
            -1, int(np.prod([mesh.shape[name] for name in chosen]))
        )
        if {tuple(sorted(line)) for line in lines.tolist()} == wanted:
            return "+".join(chosen)
    return "?"
