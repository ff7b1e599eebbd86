"""The roofline bound of a kernel's call: the least cycles that its instructions need.

In: the instructions of each loop (sass.py), and how often each loop runs, which follows from the
grid and the causal mask. Out: for each unit of a multiprocessor the cycles that it is busy, when
all multiprocessors share the programs evenly. The busiest unit sets the bound. The share of the
peak compares it with the cycles that the useful work needs at the data sheet's rate (Williams et
al. 2009, the roofline model, applied to every unit).
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from baichuan_jax.hardware.flops import ATTENTION_PRODUCTS, causal_attention_flops
from baichuan_jax.kernels.inspect.sass import Assembled, Chip, busy_cycles, cached_bytes
from baichuan_jax.kernels.triton_bridge import Launch


@dataclass(frozen=True)
class Bound:
    """What bounds one call of a kernel on a GPU."""

    busy: dict[str, float]
    """Cycles that each unit of a multiprocessor is busy."""
    ideal_cycles: float
    """What the useful work needs at the peak: matrix products (attention), or one transfer of every
    array (RMSNorm)."""
    programs: int
    flops: float
    """Of the tensor cores, above the diagonal too."""
    moved: float
    """Bytes between the multiprocessors and the second-level cache."""

    @property
    def cycles(self) -> float:
        """The least cycles of the call: those of its busiest unit."""
        return max(self.busy.values())

    @property
    def unit(self) -> str:
        """The busiest unit."""
        return max(self.busy, key=lambda unit: self.busy[unit])

    @property
    def share_of_peak(self) -> float:
        """The largest share of the peak that the call can reach."""
        return self.ideal_cycles / self.cycles


def attention_bound(launch: Launch, assembled: Assembled, chip: Chip) -> Bound:
    """The bound of an attention kernel, where queries and keys are the same tokens.

    Useful are the products below the diagonal.
    """
    # Which instructions run how often is known by loop. Another count means that the compiler has
    # merged or unrolled loops, and the trips below would be assigned wrongly.
    if len(assembled.loops) != 2:
        raise RuntimeError(
            f"{launch.name} was compiled to {len(assembled.loops)} loops; the bound knows of 2"
        )
    T, H, Q, K = (launch.constants[name] for name in "THQK")
    heads = launch.grid[1]
    trips = [heads * count for count in _trips(launch.name, T, Q, K)]
    products = ATTENTION_PRODUCTS[launch.name]
    peak = chip.flops_per_cycle * chip.multiprocessors
    # Tensor cores take twice as long for TF32 as for 16 bits.
    if launch.arrays[0].dtype.name == "float32":
        peak /= 2
    useful = causal_attention_flops((heads, T, 1, H), products, exact=True)
    executed = 2 * H * Q * K * sum(trips) * products
    return _bound(launch, assembled, chip, trips, executed, useful / peak)


def _trips(kernel: str, T: int, Q: int, K: int) -> list[int]:
    """How often the two loops of a kernel run for one head, as attention/triton_kernels.py says."""
    # The same integers as the kernels compute for each program, with an offset of 0.
    query_blocks, key_blocks = math.ceil(T / Q), math.ceil(T / K)
    if kernel == "attention_dkv":  # blocks that the diagonal crosses come first
        some = [j * K // Q for j in range(key_blocks)]
        whole = [min(math.ceil(((j + 1) * K - 1) / Q), query_blocks) for j in range(key_blocks)]
        return [sum(whole) - sum(some), sum(query_blocks - first for first in whole)]
    seen = [min(math.ceil((i + 1) * Q / K), key_blocks) for i in range(query_blocks)]
    whole = [min((i * Q + 1) // K, last) for i, last in enumerate(seen)]
    return [sum(whole), sum(seen) - sum(whole)]


def rope_bound(launch: Launch, assembled: Assembled, chip: Chip) -> Bound:
    """The bound of RoPE on keys, which memory limits at best: a third of the projection moves."""
    qkv, *tables = launch.arrays
    keys = qkv.size // 3 * qkv.dtype.itemsize
    once = 2 * keys + sum(table.size * table.dtype.itemsize for table in tables)
    return _bound(launch, assembled, chip, [], 0, None, once)


def norm_bound(launch: Launch, assembled: Assembled, chip: Chip) -> Bound:
    """The bound of an RMSNorm kernel, which memory limits at best."""
    # The forward kernel has no loop, the backward one a loop over its tiles.
    trips = [launch.constants["TILES"] * launch.programs for _ in assembled.loops]
    return _bound(launch, assembled, chip, trips, 0, None)


def _bound(
    launch: Launch,
    assembled: Assembled,
    chip: Chip,
    trips: list[int],
    flops: float,
    ideal_cycles: float | None,
    bytes_once: int | None = None,
) -> Bound:
    """trips: how often each loop runs in all programs together.

    ideal_cycles None: those that memory needs. bytes_once None: those of every array.
    """
    busy: dict[str, float] = defaultdict(float)
    moved = 0.0
    parts = (assembled.outside, *assembled.loops)
    for opcodes, count in zip(parts, (launch.programs, *trips), strict=True):
        for unit, cycles in busy_cycles(opcodes, launch.num_warps, chip).items():
            busy[unit] += cycles * count / chip.multiprocessors
        moved += cached_bytes(opcodes, launch.num_warps) * count
    # Multiprocessors share the cache and the memory, so that each has its part of both.
    busy["cache"] = moved / chip.cache_bytes_per_cycle / chip.multiprocessors
    # From memory every array comes once at best; what is read again comes from the cache.
    arrays = (*launch.arrays, *launch.outputs)
    every = sum(array.size * array.dtype.itemsize for array in arrays)
    once = every if bytes_once is None else bytes_once
    busy["memory"] = once / chip.memory_bytes_per_cycle / chip.multiprocessors
    ideal = busy["memory"] if ideal_cycles is None else ideal_cycles
    return Bound(dict(busy), ideal, launch.programs, flops, moved)
