"""Ahead-of-time compilation of the training step for a topology, without its devices.

In: a configuration and a topology. Out: the compiled program's text and its memory. The step is
that of step.py with its real kernels and flags. XLA compiles for a description of the devices: of a
GPU its properties (target_config), of a TPU what libtpu knows about it.
"""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import Hardware, Topology
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.xla_flags import PROFILE_FLAG


def missing(topology: Topology) -> list[str]:
    """Packages that are missing to compile for a topology.

    CUDA needs the plugin of CUDA 12 or 13, ptxas and libdevice.
    """
    if topology.hardware.platform == "tpu":
        return [name for name in ["libtpu"] if not _installed(name)]
    # CUDA 12 is suggested where neither is installed: requirements-plan.txt takes it.
    cuda = 13 if _installed("jax-cuda13-plugin") and not _installed("jax-cuda12-plugin") else 12
    plugins = [f"jax-cuda{cuda}-{part}" for part in ("plugin", "pjrt")]
    lacking = [name for name in plugins if not _installed(name)]
    libdevice = any(
        (folder / "nvvm/libdevice/libdevice.10.bc").exists() for folder in bridge.cuda_folders()
    )
    # Neither NVIDIA's wheels nor a toolkit. XLA needs both to compile its own kernels.
    if bridge.xla_ptxas() is None or not libdevice:
        lacking += ["nvidia-cuda-nvcc-cu12"] if cuda == 12 else ["nvidia-cuda-nvcc", "nvidia-nvvm"]
    return lacking + [name for name in ("triton", "jax-triton") if not _installed(name)]


def _installed(name: str) -> bool:
    # By its distribution: a plugin's module may be hidden from jax (baichuan_jax/__init__.py).
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def target_config(hardware: Hardware) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text (xla/backends/gpu/target_config)."""
    # What the table of accelerators does not hold is the same for sm_80 and sm_90, except the
    # number of float32 units. The versions of cuDNN and of the runtime are those of jax's wheels.
    major, minor = divmod(hardware.compute_capability, 10)
    return f"""
        platform_name: "CUDA" device_description_str: "NVIDIA {hardware.name.upper()}"
        dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          core_count: {hardware.multiprocessors} fpus_per_core: {64 if major == 8 else 128}
          clock_rate_ghz: {hardware.clock_ghz} l2_cache_size: {hardware.l2_bytes}
          shared_memory_per_block: 49152 shared_memory_per_core: {hardware.shared_bytes}
          shared_memory_per_block_optin: {hardware.shared_bytes - 1024}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(hardware.memory_bandwidth * 1e9)}
          device_memory_size: {int(hardware.memory_gib * 2**30)}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}"""


def described_devices(topology: Topology) -> list[Any]:
    """The topology's devices as jax describes them: for meshes and compilation, not to run on."""
    # Late: the command answers --help without jax, and its parent process never starts it.
    import jax
    from jax.experimental import topologies

    jax.devices()  # lets jax discover its plugins first
    name = topology.hardware.name
    if topology.hardware.platform == "tpu":
        shape = "x".join(map(str, topology.shape))
        return list(topologies.get_topology_desc(f"{name}:{shape}", "tpu").devices)
    nodes, per_node = topology.shape
    described = topologies.get_topology_desc(
        name,
        "cuda",
        target_config=target_config(topology.hardware),
        topology=f"1x{nodes}x{per_node}",
    )
    return list(described.devices)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step compiled for a mesh of described devices."""

    config: Config
    mesh: Any
    text: str
    """The compiled program in HLO."""
    memory: dict[str, int]
    """Bytes on one device: arguments, outputs, aliased (outputs in place of arguments),
    temporaries."""
    state_bytes: dict[str, int]
    """Of the arguments on one device: parameters, optimiser."""
    seconds: float
    """From the trace on."""


def trace_step(
    config: Config, devices: list[Any], options: Mapping[str, str] | None = None
) -> Callable[..., Compiled]:
    """Trace the training step; the result compiles it.

    options: XLA's, which win over the environment's (xla_flags.message_options).

    The result takes a `profile`: a file of instructions' times for XLA's scheduler
    (prediction.schedule_profile), or None. Tracing once serves both compilations. Raises
    ConfigError where mesh and model do not fit each other.
    """
    from baichuan_jax.sharding import make_mesh
    from baichuan_jax.step import make_steps

    # The same functions as in training: no other code path is planned than the one that runs.
    began = time.perf_counter()
    mesh = make_mesh(config.mesh, devices)
    config = dataclasses.replace(config, mesh=config.mesh.resolve(mesh.size))
    steps = make_steps(config, mesh)
    state, lowered = steps.abstract_state, steps.lower()
    state_bytes = {
        "parameters": _bytes_on_one_device(state.params),
        "optimiser": _bytes_on_one_device(state.opt_state),
    }

    def compile_step(profile: Path | None = None) -> Compiled:
        given: dict[str, Any] = dict(options or {})
        if profile:
            given[PROFILE_FLAG.removeprefix("--")] = str(profile)
        compiled = lowered.compile(given or None)
        # Of one device: every device runs the same program on its own shards.
        memory: Any = compiled.memory_analysis()
        sizes = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        seconds = time.perf_counter() - began
        return Compiled(config, mesh, str(compiled.as_text()), sizes, state_bytes, seconds)

    return compile_step


def _bytes_on_one_device(tree: Any) -> int:
    import jax
    import jax.numpy as jnp

    return sum(
        jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
    )
