"""Device time by HLO instruction from a jax profiler trace, beside the roofline's prediction.

Input: the folder of jax.profiler.start_trace; for the comparison also the compiled program's text
and its prediction. Output: seconds and executions by instruction, the device's busy time and span,
groups, and the largest differences between measurement and prediction. Every kernel carries the
name of the HLO instruction that launched it; measurement and prediction are joined by that name.
The program must be the executable that ran (`compiled.as_text()`): a second compilation may number
its instructions differently.

The layout of a GPU's trace, as read in the sources of openxla/xla (2026-11:
xla/backends/profiler/gpu/cupti_collector.cc, xla/backends/gpu/runtime/annotation.cc,
xla/tsl/profiler/utils/xplane_schema.cc). No trace of a real GPU was available.

- Plane "/device:GPU:0" has one line for each CUDA stream, such as "Stream #14(Compute)" or
  "Stream #14(MemcpyD2D,Compute)". An event is one activity that CUPTI recorded; its name is the
  demangled CUDA function, or "MemcpyD2D", "Memset". Kernels have the stat `kernel_details`, copies
  `memcpy_details`.
- The innermost annotation gives the stats `hlo_op` (the instruction's name) and, from the module
  around it, `hlo_module` and `program_id`. That holds for cuBLAS's kernels and Triton's custom
  calls too. Several nested names are joined by "::".
- Lines "XLA Ops", "XLA Modules", "Steps", "Framework Ops", "Source code", ... are derived from the
  streams when a trace is displayed, and older versions write them into the file. They repeat the
  same time, so only "Stream #" lines are read.
- Inside a command buffer (a CUDA graph) kernels carry the buffer's name or none (openxla/xprof
  issues 2544 and 3070). The project's flags disable command buffers (xla_flags.py); otherwise
  their time appears as "measured only".

A CPU backend has no device plane: plane "/host:CPU" has one line for each thread, and an event with
`hlo_op` is one execution of one instruction. A rehearsal reads that. There an event may contain
those of other instructions; its own time is the rest.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from baichuan_jax.plan.hlo import COLLECTIVES, Computation, Instruction, Program
from baichuan_jax.plan.prediction import Prediction
from baichuan_jax.plan.roofline import kernel_of

STREAM = re.compile(r"Stream #\d+")
# Copies between host and device run on engines of their own, and leave the multiprocessors free.
HOST_COPIES = ("MemcpyH2D", "MemcpyD2H")
# Instructions that run others. Their own time is the copy of a loop's predicate to the host; on a
# CPU, the time outside of their parts.
CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")

PRODUCTS = "matrix products"
KERNELS = {
    "attention_rope": "RoPE on keys",
    "attention_forward": "attention forward",
    "splash_mha_fwd": "attention forward",
    "attention_dkv": "attention dkv",
    "splash_mha_dkv": "attention dkv",
    "attention_dq": "attention dq",
    "splash_mha_dq": "attention dq",
    "rms_norm": "RMSNorm",
}
MEMORY = "other fusions (memory-bound)"
COPIES = "copies"
CALLS = "other custom calls"
COLLECTIVE = "collectives"
CONTROL = "loops and calls"
UNMEASURED = "predicted only"
UNPREDICTED = "measured only"
GROUPS = [PRODUCTS, *dict.fromkeys(KERNELS.values()), MEMORY, COPIES, CALLS, COLLECTIVE]
GROUPS += [CONTROL, UNPREDICTED, UNMEASURED]


class Measured(NamedTuple):
    """Seconds on the device over a whole trace, and executions."""

    seconds: float
    count: int


@dataclass(frozen=True)
class Trace:
    """Device time of one program in one trace. Seconds are sums over the trace, not of a step."""

    # "gpu", or "cpu" where the trace has no GPU's stream. A caller compares it with
    # jax.default_backend(): a GPU's trace without device activity (CUPTI not loaded) would
    # otherwise be read as its host's.
    platform: str
    # The program, such as "jit_step": the one asked for, or the one with the most device time.
    module: str
    # By HLO instruction. An instruction may launch several kernels a run (split-K and its sum, a
    # memset before): `count` is that of its most frequent kernel.
    instructions: dict[str, Measured]
    # By HLO instruction: launches by CUDA function (on a CPU, by the event's name).
    kernels: dict[str, dict[str, int]]
    # By CUDA function: activity without hlo_op, such as copies of inputs. On a CPU: empty.
    unnamed: dict[str, Measured]
    # By program: activity of others in the same trace (small jitted functions beside the step).
    other_modules: dict[str, Measured]
    # Time in which at least one activity ran: the union over all streams, without copies between
    # host and device; and the time from the first to the last of these activities.
    busy_seconds: float
    span_seconds: float
    # By "plane / line": where everything above was found.
    lines: dict[str, Measured]


class _Event(NamedTuple):
    """An activity. Times are in ns; `own` is without the events inside it.

    `module`: name and number of the program; a function that was compiled twice has two numbers.
    """

    line: str
    name: str
    start: float
    end: float
    own: float
    op: str
    module: tuple[str, str]


def read_trace(folder: Path, module: str | None = None, device: int = 0) -> Trace:
    """Summarise the one trace in `folder` (of jax.profiler.start_trace) for one device.

    module: the program to read, such as "jit_step"; None: the one with the most device time. Raises
    FileNotFoundError where there is no trace or there are several, ValueError where it holds no
    activity of a device or none of that module.
    """
    found = sorted(Path(folder).rglob("*.xplane.pb"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} must hold one trace (*.xplane.pb) and holds {len(found)}: give start_trace "
            "a new folder"
        )
    return summarise(ProfileData.from_file(str(found[0])), str(found[0]), module, device)


def summarise(data: ProfileData, where: str, module: str | None = None, device: int = 0) -> Trace:
    """As read_trace, for a profile in memory; `where` names it in errors."""
    planes = {plane.name: plane for plane in data.planes}
    streams = planes.get(f"/device:GPU:{device}")
    events = list(_gpu_events(streams)) if streams is not None else []
    platform = "gpu" if events else "cpu"
    if not events and "/host:CPU" in planes:
        events = list(_cpu_events(planes["/host:CPU"], device))
    if not events:
        raise ValueError(
            f"{where} holds no activity of device {device}; planes: {', '.join(planes)}. On a GPU "
            "check that CUPTI's library is installed and that this user may profile"
        )
    named = [event for event in events if event.op]
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for event in named:
        if module is None or event.module[0] == module:
            seconds[event.module] += event.own
    if not seconds:
        known = ", ".join(sorted({event.module[0] for event in named})) or "none"
        wanted = module or "any program"
        raise ValueError(f"{where} holds no activity of {wanted}; its programs: {known}")
    chosen = max(seconds, key=lambda key: seconds[key])
    ours = [event for event in named if event.module == chosen]
    kernels: dict[str, dict[str, int]] = {}
    for event in ours:
        launches = kernels.setdefault(event.op, {})
        launches[event.name] = launches.get(event.name, 0) + 1
    instructions = {
        name: Measured(each.seconds, max(kernels[name].values()))
        for name, each in _sums(ours, "op").items()
    }
    others = _sums([event for event in named if event.module != chosen], "module")
    working = [event for event in events if not event.name.startswith(HOST_COPIES)]
    return Trace(
        platform=platform,
        module=chosen[0],
        instructions=instructions,
        kernels=kernels,
        unnamed=_sums([event for event in events if not event.op], "name"),
        other_modules={
            f"{name}({number})" if number else name: each for (name, number), each in others.items()
        },
        busy_seconds=_union(working),
        span_seconds=_span(working),
        lines=_sums(events, "line"),
    )


def _gpu_events(plane: Any) -> Iterator[_Event]:
    """Activities of a GPU's streams (ProfilePlane).

    Those of one stream follow each other, so all of an event's time is its own.
    """
    for line in plane.lines:
        if not STREAM.match(line.name):
            continue
        for event in line.events:
            # Allocations and markers.
            if event.duration_ns <= 0:
                continue
            stats = dict(event.stats)
            op = str(stats.get("hlo_op", "")).split("::")[-1]
            module = (str(stats.get("hlo_module", "")), str(stats.get("program_id", "")))
            where, span = f"{plane.name} / {line.name}", (event.start_ns, event.end_ns)
            yield _Event(where, event.name, *span, event.duration_ns, op, module)


def _cpu_events(plane: Any, device: int) -> Iterator[_Event]:
    """Executions of instructions on a CPU's threads.

    An event's own time is its duration without the events nested in it.
    """
    for line in plane.lines:
        found = [(event, dict(event.stats)) for event in line.events]
        found = [(event, stats) for event, stats in found if "hlo_op" in stats]
        on = lambda stats: int(stats.get("device_ordinal", device))
        found = [(event, stats) for event, stats in found if on(stats) == device]
        found.sort(key=lambda item: (item[0].start_ns, -item[0].end_ns))
        inside = [0.0] * len(found)
        open_events: list[int] = []
        for index, (event, _) in enumerate(found):
            while open_events and found[open_events[-1]][0].end_ns <= event.start_ns:
                open_events.pop()
            if open_events:
                inside[open_events[-1]] += event.duration_ns
            open_events.append(index)
        for (event, stats), nested in zip(found, inside, strict=True):
            module = (str(stats.get("hlo_module", "")), str(stats.get("program_id", "")))
            own, op = max(event.duration_ns - nested, 0.0), str(stats["hlo_op"])
            where, span = f"{plane.name} / {line.name}", (event.start_ns, event.end_ns)
            yield _Event(where, event.name, *span, own, op, module)


def _sums(events: list[_Event], by: str) -> dict:
    """Seconds and number of events by one of their fields, the longest first."""
    seconds: dict = defaultdict(float)
    counts: dict = defaultdict(int)
    for event in events:
        key = getattr(event, by)
        seconds[key] += event.own * 1e-9
        counts[key] += 1
    longest_first = sorted(seconds, key=lambda key: -seconds[key])
    return {key: Measured(seconds[key], counts[key]) for key in longest_first}


def _span(events: list[_Event]) -> float:
    """Seconds from the first start to the last end."""
    if not events:
        return 0.0
    return (max(e.end for e in events) - min(e.start for e in events)) * 1e-9


def _union(events: list[_Event]) -> float:
    """Seconds in which at least one event ran."""
    total = 0.0
    end = float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(event.end - max(event.start, end), 0.0)
        end = max(end, event.end)
    return total * 1e-9


@dataclass(frozen=True)
class Row:
    """One instruction, or a group of them, per step.

    `op_name`: the end of the jax operation's path, from the HLO's metadata. Counts are executions
    a step; of a group, instructions.
    """

    name: str
    group: str
    op_name: str
    measured_seconds: float
    predicted_seconds: float
    measured_count: float
    predicted_count: float

    @property
    def difference(self) -> float:
        """Measured minus predicted seconds a step."""
        return self.measured_seconds - self.predicted_seconds


def compare(
    measured: Mapping[str, tuple[float, int]], steps: int, program: Program, prediction: Prediction
) -> list[Row]:
    """Every instruction of either side, per step; the longest measured first.

    measured: (seconds, executions) of `steps` runs of the program, by instruction
    (Trace.instructions). An instruction inside a loop is predicted once for each turn. Names that
    differ only in "-start" or "-done" are one instruction. An instruction that only one side has
    gets a row of its own (UNMEASURED, UNPREDICTED): a loop's condition runs, and has no prediction.
    """
    known = {
        item.name: (computation, item)
        for computation in program.computations.values()
        for item in computation.instructions
    }
    times: dict[str, int] = defaultdict(int)
    for _, instruction, runs, _ in program.walk():
        times[instruction.name] += runs
    spent: dict[str, list[float]] = {}
    for name, (seconds, count) in measured.items():
        total = spent.setdefault(_name_in(name, known), [0.0, 0.0])
        total[0] += seconds / steps
        total[1] = max(total[1], count / steps)
    predicted = {name: seconds for name, seconds in prediction.costs.items() if seconds > 0}
    rows = []
    for name in {**spent, **predicted}:
        seconds, count = spent.get(name, (0.0, 0.0))
        # `or 1`: walk() does not go into a TPU's fused collective.
        runs = times[name] or 1 if name in predicted else 0
        found, bound = known.get(name, (None, None)), prediction.bounds.get(name, "")
        row = Row(
            name=name,
            group=_group(*found, name in spent, name in predicted, bound),
            op_name=found[1].op_name[-80:] if found[1] else "",
            measured_seconds=seconds,
            predicted_seconds=predicted.get(name, 0.0) * runs,
            measured_count=count,
            predicted_count=float(runs),
        )
        rows.append(row)
    return sorted(rows, key=lambda row: (-row.measured_seconds, -row.predicted_seconds))


def _name_in(name: str, known: Mapping[str, object]) -> str:
    """The program's name of a measured instruction.

    A trace may have an asynchronous one under its start or under its end.
    """
    swaps = (("-done", "-start"), ("-start", "-done"), ("-start", ""))
    others = [name, *(name.replace(*swap) for swap in swaps)]
    return next((other for other in others if other in known), name)


def _group(
    computation: Computation | None,
    instruction: Instruction | None,
    measured: bool,
    predicted: bool,
    bound: str,
) -> str:
    """The group of an instruction."""
    if not measured:
        return UNMEASURED
    if instruction is None or computation is None:
        return UNPREDICTED
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    if kind in COLLECTIVES:
        return COLLECTIVE
    if instruction.opcode in CONTAINERS:
        return CONTROL
    if not predicted:
        return UNPREDICTED
    if instruction.opcode == "custom-call" and bound != "matmul":
        return KERNELS.get(kernel_of(instruction) or "", CALLS)
    if bound == "matmul":
        return PRODUCTS
    return COPIES if kind == "copy" else MEMORY


def by_group(rows: list[Row]) -> list[Row]:
    """Sums of the rows in the order of GROUPS, then of all ("in all"). Counts are instructions."""

    def total(name: str, items: list[Row]) -> Row:
        measured = sum(item.measured_seconds for item in items)
        predicted = sum(item.predicted_seconds for item in items)
        run = sum(item.measured_count > 0 for item in items)
        known = sum(item.predicted_count > 0 for item in items)
        return Row(name, name, "", measured, predicted, run, known)

    groups = [(name, [row for row in rows if row.group == name]) for name in GROUPS]
    return [total(name, items) for name, items in groups if items] + [total("in all", rows)]


def largest_differences(rows: list[Row], number: int = 15) -> list[Row]:
    """The rows whose measurement and prediction differ most, in seconds a step."""
    return sorted(rows, key=lambda row: -abs(row.difference))[:number]
