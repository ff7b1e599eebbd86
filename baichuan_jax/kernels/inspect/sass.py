"""A Triton kernel as a GPU's instructions, without a GPU: registers, memory, and cycles by unit.

Triton compiles the kernel to PTX, ptxas assembles it, and nvdisasm lists its instructions (SASS).
Every instruction keeps one unit of a multiprocessor busy for a known number of cycles, and all
units work side by side, so the busiest one sets a bound (bound.py). It is what the instructions
allow at best and no measurement: latencies, barriers and the last wave of programs come on top. A
warp's instruction takes, in cycles of one of the four partitions:

    unit    instructions                                           sm_80  sm_90
    issue   all                                                       1      1
    tensor  HMMA.16816 (16 bits), HMMA.1688 (TF32)                    8      -
            HGMMA.64xNx16 (16 bits), x8 (TF32), of four warps         -      N/2, of all partitions
    fma     FFMA, FMUL, FADD, IMAD                                    2      1
    alu     comparisons, selections, conversions, integers, logic     2      2
    mufu    exp2, log2, reciprocals, roots                            8      8

The partitions share the rest, in bytes a cycle of a multiprocessor: 128 of shared memory (LDSM,
LDS, STS, LDGSTS, SHFL), and its part of the second-level cache and of memory (Chip). Sources:
NVIDIA's white papers on A100 (2020) and H100 (2022), and the table of arithmetic throughput in the
CUDA C++ Programming Guide.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_jax.hardware.accelerators import HARDWARE, Hardware
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.kernels.triton_bridge import Launch
from baichuan_jax.resilience.waits import announced

# Of a multiprocessor, the same on sm_80 and sm_90.
SHARED_BYTES_PER_CYCLE = 128
THREADS = 2048
REGISTERS = 65536
MAX_BLOCKS = 32
# Opcodes by unit, without their modifiers. Others, such as branches and barriers, count as issued
# only.
_FMA = {"FFMA", "FMUL", "FADD", "IMAD"}
_ALU = {
    *("FMNMX", "FSETP", "FSEL", "FCHK"),  # floating comparisons and selections
    *("F2F", "F2FP"),  # conversions
    *("ISETP", "IMNMX", "IADD3", "VIADD", "IABS", "LEA"),  # integers
    *("LOP3", "PLOP3", "SHF", "SEL", "PRMT", "MOV"),  # logic, shifts, moves
}


@dataclass(frozen=True)
class Chip:
    """A GPU as the bound sees it."""

    target: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    flops_per_cycle: int
    """Of a multiprocessor: dense products of bfloat16. TF32: half."""
    cache_bytes_per_cycle: float
    """Of a multiprocessor: the second-level cache's bandwidth over all of them."""
    memory_bytes_per_second: float
    shared_bytes: int
    """Of a multiprocessor; 1 KiB is taken for each resident block."""

    @property
    def memory_bytes_per_cycle(self) -> float:
        return self.memory_bytes_per_second / (self.clock_ghz * 1e9 * self.multiprocessors)


# A800 = A100-SXM-80GB: 312 TFLOP/s = 108 x 1.41 GHz x 2,048; the cache gives 5,120 bytes a cycle.
# H100 SXM: 989 TFLOP/s = 132 x 1.83 GHz x 4,096; its cache's bandwidth is not published: measured
# at about that of the A100 (Luo et al. 2024), so it is taken over.
def _chip(hardware: Hardware, clock_ghz: float, flops_per_cycle: int) -> Chip:
    return Chip(
        target=f"sm_{hardware.compute_capability}",
        capability=hardware.compute_capability,
        multiprocessors=hardware.multiprocessors,
        clock_ghz=clock_ghz,
        flops_per_cycle=flops_per_cycle,
        cache_bytes_per_cycle=5120 / hardware.multiprocessors,
        memory_bytes_per_second=hardware.memory_bandwidth * 1e9,
        shared_bytes=hardware.shared_bytes,
    )


CHIPS = {
    chip.target: chip
    for chip in (_chip(HARDWARE["a800"], 1.41, 2048), _chip(HARDWARE["h100"], 1.83, 4096))
}


@dataclass(frozen=True)
class Assembled:
    """A kernel's instructions, and what the assembler reports of it."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    outside: list[str]
    """Opcodes outside of loops; those of each loop follow."""
    loops: list[list[str]]

    @property
    def tensor_core_instructions(self) -> int:
        return sum(
            is_tensor_core(opcode) for opcodes in (self.outside, *self.loops) for opcode in opcodes
        )

    def blocks_per_multiprocessor(self, num_warps: int, chip: Chip) -> int:
        """Programs resident at once, as registers, shared memory and threads allow."""
        warp_registers = -(-self.registers // 8) * 8 * 32  # allocated to a warp by 256
        return min(
            REGISTERS // warp_registers // num_warps,
            chip.shared_bytes // (self.shared_bytes + 1024),  # 1 KiB is the system's
            THREADS // (32 * num_warps),
            MAX_BLOCKS,
        )


def is_tensor_core(opcode: str) -> bool:
    """Whether an instruction multiplies matrices."""
    return opcode.startswith(("HMMA", "HGMMA"))


def assemble(launch: Launch, chip: Chip) -> Assembled:
    """Compile a kernel as jax-triton does, and read the reports of ptxas and triton's nvdisasm."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource, compile  # pyright: ignore[reportMissingImports]

    # The assembler that XLA would use: its version decides about registers and spills.
    ptxas = bridge.ptxas()
    names = launch.kernel.arg_names
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
    pointers = [f"*{short[array.dtype.name]}" for array in (*launch.arrays, *launch.outputs)]
    # jax-triton promises that pointers are divisible by 16.
    source = ASTSource(
        fn=launch.kernel,
        signature={
            **dict(zip(names, pointers, strict=False)),
            **dict.fromkeys(launch.constants, "constexpr"),
        },
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(pointers))},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options["enable_fp_fusion"] = True
    compiled: Any = compile(source, target=GPUTarget("cuda", chip.capability, 32), options=options)
    # Assembled here and not by triton, which learns the spills when a GPU loads the kernel.
    ptx = compiled.asm["ptx"]
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(ptx)
        architecture = re.search(r"\.target (\w+)", ptx)
        assert architecture is not None
        log = _output(ptxas, "-v", f"--gpu-name={architecture[1]}", str(text), "-o", str(binary))
        listing = _output(nvdisasm, "-c", str(binary))
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    # ptxas reports stores and loads of spilled registers apart.
    outside, loops = split_loops(listing)
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", log))
    return Assembled(int(registers[1]), spilled, compiled.metadata.shared, outside, loops)


def _output(program: Path, *arguments: str) -> str:
    command = [program, *arguments]
    with announced(f"{program.name} ({bridge.TOOL_SECONDS:.0f} s at most)"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=bridge.TOOL_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{program.name}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def split_loops(listing: str) -> tuple[list[str], list[list[str]]]:
    """Opcodes of nvdisasm's listing: those outside of loops, and those of each loop, in order.

    A loop is what lies between a label and a branch back to it.
    """
    # Labels come before the branches back to them, so that one pass finds every loop.
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)(.*);", line
        ):
            opcodes.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2])
            if target and found[1].startswith("BRA"):
                first = labels.get(target[0], len(opcodes))
                if first < len(opcodes) - 1:  # not the branch to itself that ends every kernel
                    spans.append((first, len(opcodes)))
    inside = {index for first, last in spans for index in range(first, last)}
    outside = [opcode for index, opcode in enumerate(opcodes) if index not in inside]
    return outside, [opcodes[first:last] for first, last in spans]


def busy_cycles(opcodes: list[str], num_warps: int, chip: Chip) -> dict[str, float]:
    """Cycles that these instructions of one program keep each unit of a multiprocessor busy."""
    # A program's warps are spread over the four partitions of a multiprocessor.
    cycles: dict[str, float] = defaultdict(float)
    for opcode in opcodes:
        name = opcode.split(".")[0]
        if name == "NOP":
            continue
        cycles["issue"] += num_warps / 4
        if name == "HMMA":
            cycles["tensor"] += 8 * num_warps / 4
        # One instruction of four warps: 64xNx16 takes N/2 cycles of all partitions.
        elif name == "HGMMA":
            cycles["tensor"] += int(opcode.split("x")[1]) / 2 * num_warps / 4
        elif name in _FMA:
            cycles["fma"] += (2 if chip.capability == 80 else 1) * num_warps / 4
        elif name in _ALU:
            cycles["alu"] += 2 * num_warps / 4
        elif name == "MUFU":
            cycles["mufu"] += 8 * num_warps / 4
        if moved := _shared_bytes(opcode):
            cycles["shared memory"] += moved * num_warps / SHARED_BYTES_PER_CYCLE
    return cycles


def cached_bytes(opcodes: list[str], num_warps: int) -> int:
    """Bytes that these instructions of one program move to or from the second-level cache.

    No thread is taken to be masked.
    """
    return sum(
        32 * _width(opcode) * num_warps
        for opcode in opcodes
        if opcode.split(".")[0] in ("LDG", "STG", "LDGSTS")
    )


def _width(opcode: str) -> int:
    """Bytes that a thread moves."""
    return 16 if ".128" in opcode else 8 if ".64" in opcode else 2 if ".U16" in opcode else 4


def _shared_bytes(opcode: str) -> int:
    """Bytes that a warp's instruction moves through shared memory."""
    name = opcode.split(".")[0]
    if name == "LDSM":
        # It loads one, two or four matrices of 8 x 8 values of 16 bits.
        return 128 * int(opcode[-1]) if opcode[-1] in "24" else 128
    return 32 * _width(opcode) if name in ("LDS", "STS", "LDGSTS") else 128 if name == "SHFL" else 0
