"""`python -m baichuan_jax.plan`: what a training step costs on a cluster that is not there.

The real step of step.py, with its real kernels and flags, is compiled for a topology by name; no
accelerator is needed. From the compiled program come memory, operations and collectives; the step's
time is predicted by roofline.py.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import Hardware, Topology
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.plan.report import Compiled
from baichuan_jax.xla_flags import PROFILE_FLAG, choose_flags

CHILD = "BAICHUAN_JAX_PLAN"  # set in the process that compiles


def missing(topology: Topology) -> list[str]:
    """Packages without which this topology cannot be compiled for. For CUDA: the plugin of 12 or 13, and ptxas and libdevice."""
    if topology.hardware.platform == "tpu":
        return [name for name in ["libtpu"] if not _installed(name)]
    cuda = 13 if _installed("jax-cuda13-plugin") and not _installed("jax-cuda12-plugin") else 12
    lacking = [
        f"jax-cuda{cuda}-{part}"
        for part in ("plugin", "pjrt")
        if not _installed(f"jax-cuda{cuda}-{part}")
    ]
    libdevice = any(
        (folder / "nvvm/libdevice/libdevice.10.bc").exists() for folder in bridge.cuda_folders()
    )
    if bridge.xla_ptxas() is None or not libdevice:  # neither NVIDIA's wheels nor a toolkit
        lacking += ["nvidia-cuda-nvcc-cu12"] if cuda == 12 else ["nvidia-cuda-nvcc", "nvidia-nvvm"]
    return lacking + [name for name in ("triton", "jax-triton") if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def child_environment(config: Config, topology: Topology) -> dict[str, str]:
    """The environment of the process that compiles: no device is looked for, and the flags are those of the cluster."""
    settings = choose_flags(config, topology)
    return {
        **os.environ,
        CHILD: "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver to ask for its version
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program for described devices is written to it but cannot be read again
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TPU_SKIP_MDS_QUERY": "1",  # no cloud machine to ask what it is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": " ".join([*settings.xla, os.environ.get("XLA_FLAGS", "")]).strip(),
        "LIBTPU_INIT_ARGS": " ".join(
            [*settings.libtpu, os.environ.get("LIBTPU_INIT_ARGS", "")]
        ).strip(),
    }


def target_config(hardware: Hardware) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text (xla/backends/gpu/target_config)."""
    major, minor = divmod(hardware.compute_capability, 10)
    return f"""
        platform_name: "CUDA" device_description_str: "NVIDIA {hardware.name.upper()}"
        dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          core_count: {hardware.multiprocessors} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: {hardware.clock_ghz}
          shared_memory_per_block: 49152 shared_memory_per_core: {hardware.shared_bytes}
          shared_memory_per_block_optin: {hardware.shared_bytes - 1024} l2_cache_size: {hardware.l2_bytes}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(hardware.memory_bandwidth * 1e9)} device_memory_size: {int(hardware.memory_gib * 2**30)}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}"""


def described_devices(topology: Topology) -> list[Any]:
    """The topology's devices as jax describes them: good for meshes and compiling, not for running."""
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


def trace_step(config: Config, devices: list[Any]) -> Callable[..., Compiled]:
    """Trace the training step of step.py; what is returned compiles it. Raises ConfigError where mesh and model do not fit each other.

    It takes a `profile`: a file of instructions' times for XLA's scheduler
    (roofline.schedule_profile), or None.
    """
    import jax
    import jax.numpy as jnp

    from baichuan_jax.sharding import make_mesh
    from baichuan_jax.step import make_steps

    began = time.perf_counter()
    mesh = make_mesh(config.mesh, devices)
    config = dataclasses.replace(config, mesh=config.mesh.resolve(mesh.size))
    steps = make_steps(config, mesh)

    state, lowered = steps.abstract_state, steps.lower()

    def on_one_device(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(
            int(jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)))
            for x in leaves
        )

    def compile_it(profile: Path | None = None) -> Compiled:
        compiled = lowered.compile(
            {PROFILE_FLAG.removeprefix("--"): str(profile)} if profile else None
        )
        memory = compiled.memory_analysis()
        return Compiled(
            config,
            mesh,
            compiled.as_text(),
            {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
            },
            {
                "parameters": on_one_device(state.params),
                "optimiser": on_one_device(state.opt_state),
            },
            time.perf_counter() - began,
        )

    return compile_it


def candidates(config: Config, num_devices: int) -> Iterator[Config]:
    """Ways to run the same batch: what is recomputed, rows a pass; the least recomputation first."""
    mesh = config.mesh.resolve(num_devices)
    share = config.train.global_batch_size // (mesh.data * mesh.fsdp)
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= share and share % size == 0]
    for remat in ("none", "matmuls", "full"):
        for size in sizes:
            train = dataclasses.replace(config.train, micro_batch_size=size)
            yield dataclasses.replace(
                config, train=train, model=dataclasses.replace(config.model, remat=remat)
            )
