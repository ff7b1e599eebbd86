"""Reads a compiled program: its instructions in order, their operations, traffic and groups.

In: HLO text, XLA's format of a compiled program (openxla.org/xla/operation_semantics). Out: a
Program of computations and instructions, in the order in which they run, and for each instruction
the floating-point operations of its matrix products, the bytes that it moves in device memory, and
the devices that exchange data. Operations are counted as XLA's HloCostAnalysis counts them, with
two differences: loops count as often as they turn, and of a stack of layers only the slices count
that a fused instruction touches.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# Bytes of an element, by XLA's name of the type. Shapes of other types (tokens, opaque values) hold
# no data and are ignored.
_BYTES = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
# A type and dimensions, such as bf16[2,3]; the layout {1,0} that follows does not matter here.
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\]")
# Instructions that move no data of their own.
_FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
    *("while", "call", "conditional"),  # what they call is counted by itself
}
# Operations that exchange data between devices; asynchronous ones end with -start and -done.
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def shape_arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a shape such as "(bf16[2,3]{1,0}, f32[])": [(type, dimensions)]."""
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, dims in _ARRAY.findall(shape)
        if kind in _BYTES
    ]


def shape_bytes(shape: str) -> float:
    """Bytes of all arrays of a shape."""
    return sum(_BYTES[kind] * math.prod(dims) for kind, dims in shape_arrays(shape))


@dataclass
class Instruction:
    """One instruction."""

    name: str
    shape: str
    """Of its result."""
    opcode: str
    operands: list[str]
    """Their names; of a parameter its number, of a constant its value."""
    attributes: str
    """The text after the operands."""
    root: bool
    """Whether its result is the computation's."""

    @property
    def called(self) -> list[str]:
        """The computations that it runs: a fusion's, a loop's body, or another thread's."""
        # to_apply of a reduction or an all-reduce is only its addition, which is no work to count.
        names = "to_apply" if self.opcode == "call-start" else "calls|body"
        return re.findall(rf"\b(?:{names})=%?([\w.\-]+)", self.attributes)

    @property
    def op_name(self) -> str:
        """The path of the jax operation that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """A custom call's target."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Computation:
    """Instructions in the order in which they run, and the same by name."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    by_name: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(item for item in self.instructions if item.root)

    def post_order(self) -> Iterator[Instruction]:
        """The instructions, each after those that it needs, as XLA's MakeInstructionPostOrder.

        It differs from the order in which they run wherever the scheduler had a choice.
        """
        needs = {item.name: self._needed_by(item) for item in self.instructions}
        needed = {name for names in needs.values() for name in names}
        opened: set[str] = set()
        done: set[str] = set()
        # A stack instead of recursion: a program is thousands of instructions deep.
        for root in (name for name in needs if name not in needed):
            stack = [root]
            while stack:
                name = stack[-1]
                if name in opened:
                    stack.pop()
                    if name not in done:
                        done.add(name)
                        yield self.by_name[name]
                else:
                    opened.add(name)
                    stack += [other for other in needs[name] if other not in done]

    def _needed_by(self, item: Instruction) -> list[str]:
        """Operands, the last one first, and then what must run before for another reason."""
        # What parameters and constants have as operands are numbers, not names.
        before = re.search(r"control-predecessors=\{([^}]*)\}", item.attributes)
        controls = re.findall(r"[\w.\-]+", before[1]) if before else []
        return [name for name in (*reversed(item.operands), *controls) if name in self.by_name]

    def shape_of(self, operand: str) -> str:
        """The shape of an operand by its name."""
        return self.by_name[operand].shape


@dataclass
class Program:
    """A compiled module: computations by name, and the one where it starts."""

    computations: dict[str, Computation]
    entry: Computation

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Turns of a loop; None: not known.

        The compiler states them, or they follow from a condition `counter < constant`.
        """
        # XLA's GPU compiler states it; in libtpu's programs it has to be found.
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if found:
            return int(found[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        if condition is None:
            return None
        test = self.computations[condition[1]]
        if test.root.opcode != "compare" or "direction=LT" not in test.root.attributes:
            return None
        # jax's loops count up from a constant to a constant, in one element of their state.
        counter, limit = (test.by_name[name] for name in test.root.operands)
        index = re.search(r"index=(\d+)", counter.attributes)
        if limit.opcode != "constant" or index is None:
            return None
        first = _first_count(computation, loop, int(index[1]))
        step = self._step(self.computations[loop.called[0]], int(index[1]))
        return -(-(int(limit.operands[0]) - first) // step) if step else None

    def _step(self, body: Computation, index: int) -> int | None:
        """What a turn of a loop adds to its counter, element `index` of its state; None: not known.

        A loop that XLA unrolled adds the number of turns that it does at once.
        """
        if body.root.opcode != "tuple":
            return None
        # The addition is an instruction of the body, or the only one of a fusion.
        inner, update = body, body.by_name.get(body.root.operands[index])
        if update is not None and update.opcode == "fusion":
            inner = self.computations[update.called[0]]
            update = inner.root
        if update is None or update.opcode != "add":
            return None
        operands = [inner.by_name[name] for name in update.operands]
        constants = [item for item in operands if item.opcode == "constant"]
        return int(constants[0].operands[0]) if len(constants) == 1 else None

    def walk(
        self, computation: Computation | None = None, times: int = 1, depth: int = 0
    ) -> Iterator[tuple[Computation, Instruction, int, int]]:
        """(computation, instruction, times it runs, loops around it) of every instruction.

        Loops and calls are entered, fusions are not.
        """
        computation = computation or self.entry
        for instruction in computation.instructions:
            yield computation, instruction, times, depth
            if instruction.opcode == "while":
                turns = times * (self.trip_count(computation, instruction) or 1)
                yield from self.walk(self.computations[instruction.called[0]], turns, depth + 1)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called:
                    yield from self.walk(self.computations[name], times, depth)

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """Floating-point operations of the matrix products in one run of an instruction.

        Calls of Triton and Pallas kernels count 0: the text does not say what they compute.
        """
        if instruction.opcode in ("fusion", "call"):
            inner = [self.computations[name] for name in instruction.called]
            return sum(self.flops(each, item) for each in inner for item in each.instructions)
        # A product is a dot on a CPU, a call of cuBLAS on a GPU, a convolution on a TPU.
        if instruction.opcode == "dot":
            return _product_flops(computation, instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
        if instruction.opcode == "custom-call" and instruction.target.startswith("__cublas"):
            return _product_flops(
                computation, instruction, r'lhs_contracting_dimensions":\[([\d",]*)\]'
            )
        if instruction.opcode == "convolution":
            return _convolution_flops(computation, instruction)
        return 0.0

    def traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that one run of an instruction reads and writes in device memory.

        Of a stack only the slices count that it touches. Collectives count 0: their links bound
        them.
        """
        opcode = instruction.opcode
        if opcode in _FREE or opcode.split("-start")[0].split("-done")[0] in COLLECTIVES:
            return 0.0
        if opcode == "fusion":
            return self._fused_traffic(computation, instruction)
        # A slice is read from a stack and written; the rest of the stack is not touched.
        if opcode in ("slice", "dynamic-slice", "gather"):
            return 2 * shape_bytes(instruction.shape)
        if opcode == "dynamic-update-slice":
            return 2 * shape_bytes(computation.shape_of(instruction.operands[1]))
        # All others read their operands and write their result once.
        result = shape_bytes(instruction.shape)
        if instruction.target.startswith("__cublas"):
            result = shape_bytes(_first_array(instruction.shape))  # the rest is a workspace
        operands = [computation.shape_of(name) for name in instruction.operands]
        return result + sum(shape_bytes(shape) for shape in operands)

    def _fused_traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Inside a fusion values stay in registers: its operands are read, its roots written."""
        inner = self.computations[instruction.called[0]]
        users: dict[str, list[Instruction]] = {}
        for item in inner.instructions:
            for name in item.operands:
                users.setdefault(name, []).append(item)
        parameters = [item for item in inner.instructions if item.opcode == "parameter"]
        parameters.sort(key=lambda item: int(item.operands[0]))
        # A scan over layers passes the whole stack of weights to a fusion, which reads one layer.
        # Counted whole, 32 layers would read 32 times what they do.
        total = 0.0
        for operand, parameter in zip(instruction.operands, parameters, strict=True):
            touched = _touched(parameter, users)
            if touched is None:
                total += shape_bytes(computation.shape_of(operand))
            else:  # an update in place is only written, which the root counts
                read = [item for item in touched if item.opcode != "dynamic-update-slice"]
                # Read in the operand's type, which a conversion before the slice may change.
                size = _BYTES[shape_arrays(parameter.shape)[0][0]]
                total += sum(size * math.prod(shape_arrays(item.shape)[0][1]) for item in read)
        # A fusion with several results has a tuple of them as its root.
        roots = [inner.root]
        if inner.root.opcode == "tuple":
            roots = [inner.by_name[name] for name in inner.root.operands]
        return total + sum(_written(inner, root) for root in roots)


def _first_array(shape: str) -> str:
    found = _ARRAY.search(shape)
    return found[0] if found else shape


def _first_count(computation: Computation, loop: Instruction, index: int) -> int:
    """Where a loop's counter, element `index` of its state, starts; 0 where that is not a constant.

    The loops of jax.lax.scan start at 0.
    """
    state = computation.by_name[loop.operands[0]]
    if state.opcode != "tuple":
        return 0
    start = computation.by_name[state.operands[index]]
    return int(start.operands[0]) if start.opcode == "constant" else 0


def _touched(value: Instruction, users: dict[str, list[Instruction]]) -> list[Instruction] | None:
    """The slices of a fused value that are read or updated in place; None: it is read whole."""
    found: list[Instruction] = []
    for user in users.get(value.name, []):
        # Of a slice or an update the first operand is the stack; others are its indices or values.
        first = user.operands[0] == value.name
        if user.opcode in ("bitcast", "reshape", "convert"):
            inner = _touched(user, users)
            # A converted stack is another array: an update of it is not in place.
            converted = user.opcode == "convert"
            if inner is None or (
                converted and any(item.opcode == "dynamic-update-slice" for item in inner)
            ):
                return None
            found += inner
        elif user.opcode == "gather" or (
            first and user.opcode in ("slice", "dynamic-slice", "dynamic-update-slice")
        ):
            found.append(user)
        else:
            return None
    return found


def _written(inner: Computation, root: Instruction) -> float:
    """Bytes that a fusion writes for one of its roots: of an update in place, the update."""
    # The update may be behind a reshape or a conversion, which move nothing in a fusion.
    while root.opcode in ("bitcast", "reshape", "convert") and root.operands[0] in inner.by_name:
        before = inner.by_name[root.operands[0]]
        if before.opcode not in ("bitcast", "reshape", "convert", "dynamic-update-slice"):
            break
        root = before
    if root.opcode == "dynamic-update-slice":
        return shape_bytes(inner.shape_of(root.operands[1]))
    return shape_bytes(root.shape)


def _product_flops(computation: Computation, instruction: Instruction, contracting: str) -> float:
    found = re.search(contracting, instruction.attributes)
    dims = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    # Every element of the result is a sum of as many products as the contracted dimensions have.
    lhs = shape_arrays(computation.shape_of(instruction.operands[0]))[0][1]
    result = shape_arrays(instruction.shape)[0][1]
    return 2.0 * math.prod(result) * math.prod(lhs[dim] for dim in dims)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Operations of a convolution, which a TPU's matrix products are.

    The kernel's input features (label i) are summed, and of its window what lies inside the input.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        return 0.0
    # dim_labels name the dimensions of data, kernel and result, such as bf_io->bf: b batch, f
    # feature, i and o the kernel's input and output features, digits the window.
    data, kernel = (shape_arrays(computation.shape_of(name))[0][1] for name in instruction.operands)
    result = shape_arrays(instruction.shape)[0][1]
    summed = math.prod(size for label, size in zip(found[2], kernel, strict=True) if label == "i")
    rows = [size for label, size in zip(found[3], result, strict=True) if not label.isdigit()]
    products = float(math.prod(rows) * summed)
    text = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", text[0])) if text else {}
    # A product of a loop over blocks has a window: its taps outside the input multiply nothing.
    pads, strides = window.get("pad", "").split("x"), window.get("stride", "").split("x")
    for label in (label for label in found[3] if label.isdigit()):
        inside, taps = data[found[1].index(label)], kernel[found[2].index(label)]
        low = int(pads[int(label)].split("_")[0]) if pads[0] else 0
        stride = int(strides[int(label)]) if strides[0] else 1
        outputs = np.arange(result[found[3].index(label)])
        positions = outputs[:, None] * stride + np.arange(taps)[None] - low
        products *= int(((positions >= 0) & (positions < inside)).sum())
    return 2.0 * products


def parse(text: str) -> Program:
    """A Program from compiled HLO text. Raises ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    # A computation is a head `%name (parameters) -> shape {`, one instruction a line, and `}`.
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> ", line)):
            current = Computation(head[2])
            computations[current.name] = current
            if head[1]:
                entry = current
        elif line == "}":
            current = None
        elif current is not None and " = " in line and (item := _instruction(line)):
            current.instructions.append(item)
            current.by_name[item.name] = item
    if entry is None:
        raise ValueError("this is no HLO text: no ENTRY computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    """The instruction of a line such as `ROOT %name = f32[2,3]{1,0} add(%x, %y), attributes`."""
    head, rest = line.split(" = ", 1)
    root = head.split()[0] == "ROOT"
    name = head.split()[-1].lstrip("%")
    # A tuple's shape has spaces and nested brackets; any other ends at the first space.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    match = re.match(r"([\w\-]+)\(", rest)
    if match is None:
        return None
    close = _closing(rest, match.end() - 1)
    # XLA numbers long lists of operands in comments, /*index=5*/.
    inside = re.sub(r"/\*.*?\*/", "", rest[match.end() : close])
    operands = re.findall(r"%([\w.\-]+)", inside)
    if match[1] in ("parameter", "constant"):
        operands = [inside]
    return Instruction(name, shape, match[1], operands, rest[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """The position where the bracket that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced brackets in {text[:200]!r}")


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Devices that exchange data with each other: [groups, devices of a group].

    XLA writes them as lists {{0,1},{2,3}}, as a transposed range [2,2]<=[2,2]T(1,0), as axes of a
    mesh, or as source and target pairs. Without any of them all devices are one group.
    """
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})?\}", attributes):
        lists = re.findall(r"\{([\d,]+)\}", found[1] or "")
        return np.array([_numbers(group) for group in lists] or [list(range(num_devices))])
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, order = _numbers(found[1]), _numbers(found[2])
        devices = np.arange(math.prod(order)).reshape(order)
        if found[3]:
            devices = devices.transpose(_numbers(found[3]))
        return devices.reshape(shape)
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _device_ids(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
        devices = ids.reshape(list(sizes.values()))
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[3])]
        others = [axis for axis in range(len(sizes)) if axis not in along]
        length = math.prod(devices.shape[axis] for axis in along)
        return devices.transpose(others + along).reshape(-1, length)
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)", found[1] + "}")])
    # Read as all devices, a notation that is not known would pass for the dearest of groups.
    if re.search(r"replica_groups=|source_target_pairs=", attributes):
        raise ValueError(f"groups of devices in a notation that is not known: {attributes[:200]}")
    return np.arange(num_devices)[None]


def _device_ids(text: str) -> np.ndarray:
    """Devices in the order of a mesh: a list 0,2,1,3 or a transposed range [2,2]T(1,0)."""
    if found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = _numbers(found[1])
        devices = np.arange(math.prod(shape)).reshape(shape)
        return devices.transpose(_numbers(found[2])) if found[2] else devices
    return np.array(_numbers(text))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
