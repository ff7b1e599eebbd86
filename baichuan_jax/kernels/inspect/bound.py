"""The roofline bound of a kernel's call, from its instructions (sass.py) and from how often each of its loops runs."""

import math
from collections import defaultdict
from dataclasses import dataclass

from baichuan_jax.kernels.inspect.sass import Assembled, Chip, busy_cycles, cached_bytes
from baichuan_jax.kernels.triton_bridge import Launch


@dataclass(frozen=True)
class Bound:
    """Cycles that a call keeps each unit of a multiprocessor busy, all multiprocessors sharing the programs evenly."""

    busy: dict[str, float]
    ideal_cycles: float
    """Of a kernel at the peak: its useful operations on the tensor cores (attention), or its arrays moved once (RMSNorm)."""
    programs: int
    flops: float
    """Of the tensor cores, above the diagonal too."""
    moved: float
    """Bytes between the multiprocessors and the second-level cache."""

    @property
    def cycles(self) -> float:
        return max(self.busy.values())

    @property
    def unit(self) -> str:
        """The busiest one."""
        return max(self.busy, key=lambda unit: self.busy[unit])

    @property
    def share_of_peak(self) -> float:
        return self.ideal_cycles / self.cycles


def attention_bound(launch: Launch, assembled: Assembled, chip: Chip) -> Bound:
    """Of one of the attention kernels, where queries and keys are the same tokens; useful are the products below the diagonal."""
    T, H, Q, K = (launch.constants[name] for name in "THQK")
    heads = launch.grid[1]
    if launch.name == "attention_dkv":  # the loop across the diagonal comes first
        blocks = range(math.ceil(T / K))
        some = [j * K // Q for j in blocks]
        full = [min(math.ceil(((j + 1) * K - 1) / Q), math.ceil(T / Q)) for j in blocks]
        trips = [sum(full) - sum(some), sum(math.ceil(T / Q) - first for first in full)]
    else:
        blocks = range(math.ceil(T / Q))
        some = [min(math.ceil((i + 1) * Q / K), math.ceil(T / K)) for i in blocks]
        full = [min((i * Q + 1) // K, last) for i, last in zip(blocks, some, strict=True)]
        trips = [sum(full), sum(some) - sum(full)]
    if len(assembled.loops) != 2:
        raise RuntimeError(
            f"{launch.name} was compiled to {len(assembled.loops)} loops; the bound knows of 2"
        )
    products = {"attention_forward": 2, "attention_dkv": 4, "attention_dq": 3}[launch.name]
    peak = (
        chip.flops_per_cycle
        * chip.multiprocessors
        / (2 if launch.arrays[0].dtype.name == "float32" else 1)
    )
    pairs = T * (T + 1) / 2
    executed = 2 * H * Q * K * sum(trips) * products * heads
    trips = [heads * count for count in trips]
    return _bound(launch, assembled, chip, trips, executed, 2 * H * pairs * products * heads / peak)


def norm_bound(launch: Launch, assembled: Assembled, chip: Chip) -> Bound:
    """Of one of the RMSNorm kernels, which memory limits at best."""
    trips = [launch.constants["TILES"] * launch.programs for _ in assembled.loops]
    return _bound(launch, assembled, chip, trips, 0, None)


def _bound(
    launch: Launch,
    assembled: Assembled,
    chip: Chip,
    trips: list[int],
    flops: float,
    ideal_cycles: float | None,
) -> Bound:
    """`trips`: how often each loop runs in all programs together. No ideal cycles: those that memory needs."""
    busy: dict[str, float] = defaultdict(float)
    moved = 0.0
    for opcodes, count in zip(
        (assembled.outside, *assembled.loops), (launch.programs, *trips), strict=True
    ):
        for unit, cycles in busy_cycles(opcodes, launch.num_warps, chip).items():
            busy[unit] += cycles * count / chip.multiprocessors
        moved += cached_bytes(opcodes, launch.num_warps) * count
    busy["cache"] = moved / chip.cache_bytes_per_cycle / chip.multiprocessors
    bytes_once = sum(
        array.size * array.dtype.itemsize for array in (*launch.arrays, *launch.outputs)
    )
    busy["memory"] = bytes_once / chip.memory_bytes_per_cycle / chip.multiprocessors
    return Bound(
        dict(busy),
        busy["memory"] if ideal_cycles is None else ideal_cycles,
        launch.programs,
        flops,
        moved,
    )
