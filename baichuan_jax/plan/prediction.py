"""Predicts how long a compiled step takes, by simulating its schedule on one device.

In: a compiled program (hlo.py), the mesh, the topology and its rates. Out: seconds of a step, and
where they go. The compiler's order of instructions is kept. An instruction takes the time that
roofline.py gives it. A collective starts at its start instruction and runs on a link beside the
compute that follows; its end instruction waits for it. A link carries one collective after the
other, and so does a stream of the GPU. Nothing is measured on the machine that predicts.

Rates may be arrays of samples: the order of instructions is the compiler's whatever they take, so
one pass over the program predicts all samples, and the prediction's seconds are arrays as well.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from baichuan_jax.hardware.accelerators import Topology
from baichuan_jax.plan.hlo import COLLECTIVES, Computation, Instruction, Program, replica_groups
from baichuan_jax.plan.rates import Rates
from baichuan_jax.plan.roofline import (
    Collective,
    Cost,
    collective_seconds,
    describe_collective,
    instruction_cost,
)

# XLA runs a GPU's collectives on one stream, in the order of their starts: a gather over NVLink
# waits for a sum over the network before it. With this flag they take turns on two
# (execution_stream_assignment.cc). A TPU has one link, and so one order, anyway.
STREAMS_FLAG = "--xla_gpu_experimental_enable_collective_multi_streaming=true"


@dataclass
class Prediction:
    """What a step is predicted to take on one device, in seconds, and where they go.

    Of rates that are arrays all seconds are arrays, one value a sample.
    """

    seconds: float
    matmul_seconds: float
    memory_seconds: float
    kernel_seconds: float
    contention_seconds: float
    straggler_seconds: float
    """How long this device waits for the slowest one."""
    collectives: list[Collective]
    matmul_flops: float
    kernel_flops: float
    kernels: dict[str, int]
    """Calls of our kernels in the program's text, by name."""
    unknown: dict[str, int]
    """Custom calls and loops that could not be counted, and how often."""
    costs: dict[str, float]
    """Seconds of one run of every instruction, by name; of a collective, alone on its link."""
    bounds: dict[str, str]
    """What bounds each of them: matmul, memory or kernel; of a collective, its link."""

    @property
    def exposed_seconds(self) -> float:
        """How long compute waits for collectives."""
        return sum(item.exposed_seconds for item in self.collectives)


def predict(
    program: Program, mesh: Mesh | AbstractMesh, topology: Topology, rates: Rates
) -> Prediction:
    """Simulate the schedule of a compiled step. mesh: the one it was compiled for.

    rates: numbers, or some of them arrays of as many samples [samples]. Then a sample's seconds are
    those that its numbers alone would give.
    """
    # All devices run the same program at the same time, so that simulating one is enough.
    return _Simulation(program, mesh, topology, rates).run()


# Rates are fitted on nodes of so many devices: what their slowest one costs is in the fit.
FITTED_DEVICES = 8


def slowest_of(count: int) -> float:
    """The expected maximum of `count` independent standard normal variables."""
    # E[max] = integral of 1 - F(x)^n over x > 0 minus that of F(x)^n over x < 0. The integrand is
    # smooth, and beyond 9 standard deviations nothing is left even of a million devices.
    x = np.linspace(-9.0, 9.0, 3601)
    below = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x]) ** count
    return float(np.trapezoid((x > 0) + (x == 0) / 2 - below, x))


def schedule_profile(prediction: Prediction) -> str:
    """What XLA's profile-guided scheduler reads: microseconds by instruction.

    The format is a ProfiledInstructionsProto as text. Without it the scheduler assumes that every
    product takes as long as every other, and a collective as long as five of them.
    """
    # XLA reads the latency of an asynchronous collective as that between its two instructions.
    lines = []
    for name, seconds in prediction.costs.items():
        microseconds = f"{seconds * 1e6:.3f}"
        lines.append(f'costs {{ name: "{name}" cost_us: {microseconds} }}')
        if "-start" in name:
            ends = f'source: "{name}" target: "{name.replace("-start", "-done")}"'
            lines.append(f"latencies {{ {ends} latency_us: {microseconds} }}")
    return "\n".join(lines) + "\n"


def _streams(program: Program, count: int) -> dict[tuple[str, str], int]:
    """The stream of each collective, by computation and name; left out: stream 0."""
    if count == 1:
        return {}
    # As ExecutionStreamAssignment does it: in turn, computation by computation from the entry on.
    found: dict[tuple[str, str], int] = {}
    computations = [program.entry]
    for computation in computations:  # grows meanwhile
        for item in computation.post_order():
            if item.opcode.endswith("-start") and item.opcode[:-6] in COLLECTIVES:
                found[computation.name, item.name] = len(found) % count
            elif item.opcode in ("while", "call"):
                computations += [program.computations[name] for name in item.called]
    return found


class _Simulation:
    """One device's clock, its links, and what they did so far."""

    def __init__(
        self, program: Program, mesh: Mesh | AbstractMesh, topology: Topology, rates: Rates
    ) -> None:
        self.program, self.mesh, self.topology, self.rates = program, mesh, topology, rates
        self.now = 0.0
        # When each link and each stream has ended all that it was given.
        self.link_free = {"intra_node": 0.0, "inter_node": 0.0}
        streams = 2 if STREAMS_FLAG in os.environ.get("XLA_FLAGS", "") else 1
        self.stream_free = [0.0] * streams
        self.streams = _streams(program, streams)
        # Collectives that compute has not waited for yet, by the name of their start.
        self.in_flight: dict[str, tuple[Collective, float]] = {}
        # Seconds of compute by what bounds it, and how much collectives beside it add; operations.
        self.spent: dict[str, float] = dict.fromkeys(("matmul", "memory", "kernel"), 0.0)
        self.spent["contention"] = 0.0
        self.flops: dict[str, float] = {"matmul": 0.0, "kernel": 0.0}
        # By computation and name: a loop runs the same instruction many times.
        self.costs: dict[tuple[str, str], Cost] = {}
        self.collectives: dict[tuple[str, str], Collective] = {}
        self.unknown: Counter[str] = Counter()

    def run(self) -> Prediction:
        """Simulate the whole program."""
        self._computation(self.program.entry, 0)
        runs = {name: item for (_, name), item in self.collectives.items()}
        costs = {name: cost.seconds for (_, name), cost in self.costs.items()}
        # Synchronous steps end with the slowest device.
        devices = max(self.topology.num_devices, FITTED_DEVICES)
        behind = slowest_of(devices) - slowest_of(FITTED_DEVICES)
        waited = self.now * self.rates.straggler * behind
        bounds = {name: cost.bound for (_, name), cost in self.costs.items()}
        return Prediction(
            seconds=self.now + waited,
            matmul_seconds=self.spent["matmul"],
            memory_seconds=self.spent["memory"],
            kernel_seconds=self.spent["kernel"],
            contention_seconds=self.spent["contention"],
            straggler_seconds=waited,
            collectives=list(self.collectives.values()),
            matmul_flops=self.flops["matmul"],
            kernel_flops=self.flops["kernel"],
            kernels=dict(Counter(cost.kernel for cost in self.costs.values() if cost.kernel)),
            unknown=dict(self.unknown),
            costs=costs | {name: item.seconds / item.count for name, item in runs.items()},
            bounds=bounds | {name: item.link for name, item in runs.items()},
        )

    def _computation(self, computation: Computation, depth: int) -> None:
        """Run the instructions of a computation. depth: loops around it."""
        for instruction in computation.instructions:
            opcode, name = instruction.opcode, instruction.name
            kind = opcode.removesuffix("-start").removesuffix("-done")
            # The order matters: a TPU writes the start and the end of a collective as fusions or
            # as calls, and only their names tell them from compute. Ends come before starts:
            # without its suffix an end has a collective's name too.
            if opcode == "while":
                self._loop(computation, instruction, depth)
            elif opcode in ("call", "async-start"):
                for called in instruction.called:
                    self._computation(self.program.computations[called], depth)
            elif opcode == "fusion" and name.startswith("async-collective-start"):
                self._start_inside(instruction, depth)
            elif opcode in ("call-start", "call-update"):
                self._start_offloaded(computation, instruction, depth)
            elif opcode.endswith("-done") or name.startswith("async-collective-done"):
                self._await(computation, instruction)
            elif kind in COLLECTIVES:
                self._start(computation, instruction, kind, depth)
            else:
                self._compute(computation, instruction)

    def _loop(self, computation: Computation, loop: Instruction, depth: int) -> None:
        turns = self.program.trip_count(computation, loop)
        if turns is None:
            self.unknown[f"loop of unknown length ({loop.op_name or loop.name})"] += 1
        # Every turn is simulated: a collective that one turn starts may overlap with the next.
        # Where their number is not known, one counts, and the report says so.
        for _ in range(turns or 1):
            self._computation(self.program.computations[loop.called[0]], depth + 1)

    def _compute(self, computation: Computation, instruction: Instruction) -> None:
        # The cost is computed once; the time that a collective hides differs each time.
        key = (computation.name, instruction.name)
        if key not in self.costs:
            hardware = self.topology.hardware
            cost = instruction_cost(self.program, computation, instruction, hardware, self.rates)
            self.costs[key] = cost
            if cost.unknown:
                self.unknown[cost.unknown] += 1
        cost = self.costs[key]
        if not np.any(cost.seconds):
            return
        self.spent[cost.bound] = self.spent[cost.bound] + cost.seconds
        if cost.flops:
            self.flops[cost.bound] += cost.flops
        # While a collective is in flight compute is slower, until the last one ends.
        slow = 1 + self.rates.contention
        busy = np.maximum(self.link_free["intra_node"], self.link_free["inter_node"])
        overlapped = np.minimum(cost.seconds * slow, np.maximum(busy - self.now, 0.0))
        extra = overlapped - overlapped / slow
        # Not in place: an array may be another's value, too.
        self.spent["contention"] = self.spent["contention"] + extra
        self.now = self.now + (cost.seconds + extra)

    def _start(
        self,
        computation: Computation,
        instruction: Instruction,
        kind: str,
        depth: int,
        under: str | None = None,
    ) -> None:
        """Give a collective to its link, and wait for it where it is synchronous.

        under: the name of the instruction that its end refers to, where that is not the collective.
        """
        key = (computation.name, instruction.name)
        if key not in self.collectives:
            self.collectives[key] = describe_collective(
                computation, instruction, kind, self.mesh, self.topology, in_loop=depth > 0
            )
        collective = self.collectives[key]
        groups: np.ndarray = replica_groups(instruction.attributes, self.mesh.size)
        seconds = collective_seconds(collective, groups, self.topology, self.rates)
        # Both the link and the stream serve one collective after the other, as they start.
        stream = self.streams.get(key, 0)
        free = np.maximum(self.link_free[collective.link], self.stream_free[stream])
        end = np.maximum(self.now, free) + seconds
        self.link_free[collective.link] = self.stream_free[stream] = end
        collective.count += 1
        collective.seconds = collective.seconds + seconds
        if under is not None or collective.asynchronous:
            # Inside a TPU's fusion or call, the collective itself may be a synchronous one.
            collective.asynchronous = True
            self.in_flight[under or instruction.name] = (collective, end)
        else:
            self._wait(collective, end)

    def _start_offloaded(
        self, computation: Computation, instruction: Instruction, depth: int
    ) -> None:
        """A collective on a TPU's SparseCores: it starts when it gets its operand.

        libtpu 0.0.41 passes the operand with the call, 0.0.48 with an update of it.
        """
        call = instruction
        if instruction.opcode == "call-update":
            call = computation.by_name[instruction.operands[0]]
        # A call with operands starts the collective; one without leaves that to its update.
        if bool(call.operands) == (instruction is call):
            self._start_inside(call, depth)

    def _start_inside(self, instruction: Instruction, depth: int) -> None:
        """A TPU's asynchronous collective: a fusion or a call that holds its start."""
        inner = self.program.computations[instruction.called[0]]
        for item in inner.instructions:
            kind = item.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self._start(inner, item, kind, depth, under=instruction.name)

    def _await(self, computation: Computation, instruction: Instruction) -> None:
        """The end of an asynchronous collective."""
        found = None
        # The operand is the start itself, or on a TPU parts of its result.
        inside = ("get-tuple-element", "call-update")
        for name in instruction.operands:
            while name in computation.by_name and computation.by_name[name].opcode in inside:
                name = computation.by_name[name].operands[0]
            found = self.in_flight.pop(name, found)
        if found is not None:
            self._wait(*found)

    def _wait(self, collective: Collective, end: float) -> None:
        # Nothing is waited for that ended while compute ran.
        late = np.maximum(end - self.now, 0.0)
        collective.exposed_seconds = collective.exposed_seconds + late
        self.now = np.maximum(self.now, end)
