"""The least time of one instruction: bounded by arithmetic, by memory, or by a link.

In: an instruction of a compiled program, an accelerator of the table and its rates. Out: seconds
and what bounds them. It is the roofline model (Williams et al. 2009): the operations at the peak or
the bytes at the memory's bandwidth, whichever takes longer, each times the share that programs
reach. A collective takes the time of a ring (Patarasuk and Yuan 2009) over the slowest link.
"""

import math
from dataclasses import dataclass

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from baichuan_jax.hardware.accelerators import Hardware, Topology
from baichuan_jax.hardware.flops import ATTENTION_PRODUCTS, causal_attention_flops
from baichuan_jax.plan.hlo import (
    Computation,
    Instruction,
    Program,
    replica_groups,
    shape_arrays,
    shape_bytes,
)
from baichuan_jax.plan.rates import Rates

# The share of the peak that bounds the attention kernels at head size 128 in bfloat16, from their
# own instructions (python -m baichuan_jax.kernels, docs/kernels.md), by compute capability. Not
# known for a TPU: 1.
BOUNDS = {
    80: {"attention_forward": 0.735, "attention_dkv": 0.799, "attention_dq": 0.762},
    90: {"attention_forward": 0.970, "attention_dkv": 0.985, "attention_dq": 0.970},
}


# NCCL's estimates (src/graph/tuning.cc): of a tree's bandwidth, .92 of a ring's times .7 to .8 for
# messages of 16 to 64 MB; of the time of a hop, that of a whole chunk, which a ring does not wait
# for. Only all-reduces have trees.
TREE_SHARE = 0.7
TREE_HOPS = 4


@dataclass(frozen=True)
class Cost:
    """One run of an instruction that is no collective."""

    bound: str
    """matmul, memory or kernel."""
    seconds: float
    flops: float = 0.0
    kernel: str | None = None
    """Which of our kernels it calls; see kernel_of."""
    unknown: str | None = None
    """What could not be counted."""


def kernel_of(instruction: Instruction) -> str | None:
    """Which of our kernels a custom call is; None: none of them.

    A name of ATTENTION_PRODUCTS or "rms_norm".
    """
    # triton_bridge puts the kernel's name into the path of the jax operation, Pallas into its name.
    known = (*ATTENTION_PRODUCTS, "rms_norm")
    return next(
        (name for name in known if name in instruction.op_name or name in instruction.name), None
    )


def instruction_cost(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    hardware: Hardware,
    rates: Rates,
) -> Cost:
    """The cost of one run of an instruction of a computation."""
    traffic = program.traffic(computation, instruction)
    by_memory = traffic / (hardware.memory_bandwidth * 1e9 * rates.memory)
    # XLA turns products into custom calls of cuBLAS; the other custom calls are kernels.
    if instruction.opcode == "custom-call" and not instruction.target.startswith("__cublas"):
        return _kernel_cost(computation, instruction, by_memory, hardware, rates)
    flops = program.flops(computation, instruction)
    by_matmul = flops / (hardware.peak_tflops * 1e12 * rates.matmul)
    # Tuples, bitcasts and other bookkeeping: no kernel is launched for them.
    if not traffic and not flops:
        return Cost("memory", 0.0)
    seconds = np.maximum(by_memory, by_matmul) + rates.launch_us * 1e-6
    return Cost("matmul" if flops else "memory", seconds, flops)


def _kernel_cost(
    computation: Computation,
    instruction: Instruction,
    by_memory: float,
    hardware: Hardware,
    rates: Rates,
) -> Cost:
    """A Triton or Pallas kernel: its products at the share that bounds it, or its traffic."""
    name = kernel_of(instruction)
    launch = rates.launch_us * 1e-6
    if name is None:
        what = f"custom call {instruction.target} (its traffic alone is counted)"
        return Cost("memory", by_memory, unknown=what if np.any(by_memory) else None)
    if name not in ATTENTION_PRODUCTS:
        return Cost("kernel", by_memory + launch, kernel=name)
    shapes = [
        dims
        for operand in instruction.operands
        for _, dims in shape_arrays(computation.shape_of(operand))
    ]
    # The largest operand is q, k or v: the others are gradients of the same size, log-sum-exps,
    # segments and offsets.
    flops = causal_attention_flops(
        max(shapes, key=math.prod), ATTENTION_PRODUCTS[name], heads_first=name.startswith("splash")
    )
    share = rates.kernel * BOUNDS.get(hardware.compute_capability, {}).get(name, 1.0)
    by_products = flops / (hardware.peak_tflops * 1e12 * share)
    return Cost("kernel", np.maximum(by_memory, by_products) + launch, flops, kernel=name)


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


def describe_collective(
    computation: Computation,
    instruction: Instruction,
    kind: str,
    mesh: Mesh | AbstractMesh,
    topology: Topology,
    in_loop: bool,
) -> Collective:
    """A collective that has not run yet. kind: all-gather, all-reduce, ..."""
    groups = replica_groups(instruction.attributes, mesh.size)
    # Operands of an all-gather are the shards; of the others the whole that a device gives.
    size = sum(shape_bytes(computation.shape_of(name)) for name in instruction.operands)
    if kind == "all-gather":
        size *= groups.shape[1]
    # jax numbers the devices of a described topology node by node.
    per_node = topology.devices_per_node
    crosses = bool((groups // per_node != groups[:, :1] // per_node).any())
    # A GPU's scheduler marks a pair of start and end that it does not overlap as synchronous.
    started = instruction.opcode.endswith("-start")
    return Collective(
        kind,
        size,
        axes_of(groups, mesh, pairs=kind == "collective-permute"),
        "inter_node" if crosses else "intra_node",
        in_loop=in_loop,
        asynchronous=started and '"is_sync":true' not in instruction.attributes,
        op_name=instruction.op_name,
    )


def collective_seconds(
    collective: Collective, groups: np.ndarray, topology: Topology, rates: Rates
) -> float:
    """The time of a collective alone on its links: the bytes over the slowest, and the hops.

    A ring passes on (n - 1)/n of the bytes, an all-reduce twice. groups: devices that exchange data
    with each other [groups, n]; of a permute, pairs of source and target.
    """
    hardware = topology.hardware
    kind, n = collective.kind, groups.shape[1]
    passed = collective.bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    # A device sends all that its target gets: a pair is no ring of two.
    if kind == "collective-permute":
        passed = collective.bytes
    inside = passed / (hardware.intra_node_bandwidth * 1e9 * rates.intra_node)
    if collective.link == "intra_node":
        return inside + rates.intra_latency_us * 1e-6
    network = hardware.inter_node_gbps / 8 * 1e9 * rates.inter_node
    hop = rates.inter_latency_us * 1e-6
    together = int(np.bincount(groups[0] // topology.devices_per_node).max())
    nodes = n // together
    if kind == "collective-permute":
        return passed / network + hop
    if kind == "all-to-all":
        # What goes to other nodes is different for each device: all of it leaves by its own card.
        return collective.bytes * (n - together) / n / network + (nodes - 1) * hop
    # NCCL makes a ring for each card of a node. Of m devices of a node in the group, each sends the
    # bytes of one ring over its card, and those of the m - 1 others inside the node.
    leaving, inside = passed / together / network, inside * (together - 1) / together
    hops = nodes - 1
    if kind != "all-reduce":
        return np.maximum(leaving, inside) + hops * hop
    # NCCL takes a tree where it expects it to be faster.
    tree = leaving / TREE_SHARE + 2 * np.log2(max(nodes, 2)) * TREE_HOPS * hop
    return np.maximum(np.minimum(leaving + 2 * hops * hop, tree), inside)


def axes_of(groups: np.ndarray, mesh: Mesh | AbstractMesh, pairs: bool = False) -> str:
    """The mesh axes along which groups of devices lie, such as "fsdp" or "data+fsdp"; "?": none.

    Devices are numbered in the mesh's order. pairs: the groups are sources and targets, parts of
    the lines along the axes.
    """
    numbers = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    wanted = {tuple(sorted(group)) for group in groups.tolist()}
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    # Every subset of the few axes, each before those that it is part of.
    for choice in range(1, 2 ** len(names)):
        chosen = [name for bit, name in enumerate(names) if choice >> bit & 1]
        along = [mesh.axis_names.index(name) for name in chosen]
        others = [axis for axis in range(numbers.ndim) if axis not in along]
        length = math.prod(mesh.shape[name] for name in chosen)
        lines = numbers.transpose(others + along).reshape(-1, length)
        if pairs:
            line_of = np.empty(mesh.size, int)
            line_of[lines] = np.arange(len(lines))[:, None]
            found = bool((line_of[groups] == line_of[groups[:, :1]]).all())
        else:
            found = {tuple(sorted(line)) for line in lines.tolist()} == wanted
        if found:
            return "+".join(chosen)
    return "?"
