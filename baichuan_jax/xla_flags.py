"""Flags of XLA and libtpu, and variables of NCCL and JAX, for a configuration on a cluster.

Every flag and variable has its reason beside it. `train` applies them before jax starts its
backends, `plan` compiles with them, and `python -m baichuan_jax.xla_flags --config FILE --topology
a800:128x8` prints them as shell lines.
"""

import contextlib
import importlib.metadata
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from baichuan_jax.config.files import make_parser, parse_command
from baichuan_jax.config.parsing import read_text, show
from baichuan_jax.config.schema import Config, ConfigError, require
from baichuan_jax.hardware.accelerators import (
    DRIVER_SECONDS,
    Topology,
    detect_topology,
    parse_topology,
)
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.private import why_not_run

# Of the card; the rest holds the CUDA context, cuBLAS's workspaces and NCCL's buffers.
GPU_MEMORY_FRACTION = 0.92
PROFILE_FLAG = "--xla_gpu_pgle_profile_file_or_directory_path"
# The newest libtpu tried that runs a gather's steps inside the products beside it on v5p.
FUSES_GATHERS = (0, 0, 41)
RING_HOP_US = 5.0  # between two nodes over InfiniBand


class Settings(NamedTuple):
    """What is set for a cluster, each with its reason."""

    xla: dict[str, str]
    """Flags of XLA_FLAGS."""
    libtpu: dict[str, str]
    """Flags of LIBTPU_INIT_ARGS."""
    environment: dict[str, tuple[str, str]]
    """Variables: (value, reason)."""

    @property
    def reasons(self) -> dict[str, str]:
        """Every flag and NAME=value, and why."""
        variables = {f"{name}={value}": why for name, (value, why) in self.environment.items()}
        return {**self.xla, **self.libtpu, **variables}


def choose_flags(config: Config, topology: Topology | None) -> Settings:
    """The settings for this configuration on a cluster; topology None: a CPU."""
    # A jaxlib that does not know a flag refuses to start, so that each platform gets only its own.
    platform = "cpu" if topology is None else topology.hardware.platform
    xla: dict[str, str] = {}
    if config.train.deterministic:
        # Every jaxlib knows this flag; only a GPU obeys it.
        xla["--xla_gpu_deterministic_ops=true"] = (
            "train.deterministic: no atomics, the same bits in every run"
        )
    if topology is None or platform == "cpu":
        return Settings(xla, {}, {})
    if platform == "tpu":
        return Settings(xla, _libtpu(_libtpu_version()), {})
    return Settings({**xla, **_gpu(config, topology)}, {}, _environment(topology))


def _gpu(config: Config, topology: Topology) -> dict[str, str]:
    """XLA's flags on a GPU: overlap of collectives, sizes of messages, choices of kernels."""
    # XLA overlaps little by default: these let collectives run beside the compute of other layers.
    flags = {
        "--xla_gpu_enable_latency_hiding_scheduler=true": (
            "collectives start early and are awaited late, with compute between"
        ),
        "--xla_gpu_enable_pipelined_all_gather=true": (
            "a layer's weights are gathered while the layer before it computes"
        ),
        "--xla_gpu_enable_pipelined_reduce_scatter=true": (
            "a layer's gradients are scattered while the next one's are computed"
        ),
        "--xla_gpu_enable_pipelined_all_reduce=true": "the same for sums across nodes",
        "--xla_gpu_experimental_parallel_collective_overlap_limit=2": (
            "a sum across nodes leaves NVLink free: "
            "a gather or scatter inside the node runs beside it"
        ),
        "--xla_gpu_enable_while_loop_double_buffering=true": (
            "two layers a turn of the loop, so that pipelining needs no copies"
        ),
        **_message_sizes(config, topology),
        "--xla_gpu_enable_triton_gemm=false": (
            "cuBLAS is faster at these sizes and starts without tuning"
        ),
        "--xla_gpu_enable_command_buffer=": (
            "CUDA graphs do not hold asynchronous collectives inside loops"
        ),
        "--xla_disable_hlo_passes=rematerialization,all-reduce-contiguous": (
            "model.remat says what is recomputed, and XLA must not add to it; a sum of several "
            "gradients is one group of NCCL, for which XLA need not copy them into one buffer "
            "and out again"
        ),
        "--xla_gpu_nccl_termination_timeout_seconds=120": (
            "a collective whose peer died ends after this time, instead of after 600 s"
        ),
    }
    # A profile of another program is harmless: XLA warns of instructions that it does not find.
    if profile := config.train.schedule_profile:
        _check_profile(profile)
        flags[f"{PROFILE_FLAG}={Path(profile).absolute()}"] = (
            "train.schedule_profile: collectives start by their predicted latency"
        )
        flags["--xla_gpu_pgle_accuracy_checker=PGLE_STRICTNESS_LEVEL_WARN"] = (
            "instructions that the profile lacks are named"
        )
    return flags


# What plan/prediction.py writes: a ProfiledInstructionsProto as text, a record a line.
_RECORD = re.compile(
    r'costs \{ name: "[^"]*" cost_us: \d+\.\d+ \}'
    r'|latencies \{ source: "[^"]*" target: "[^"]*" latency_us: \d+\.\d+ \}'
)


def _check_profile(profile: str) -> None:
    """Raise ConfigError for a file that XLA would pass over with a line in its log."""
    name, writes = f"train.schedule_profile={profile!r}", "python -m baichuan_jax.plan writes it"
    require(Path(profile).is_file(), f"{name} is no file: {writes}")
    # XLA_FLAGS is one text, which XLA cuts at white space.
    require(
        re.search(r"[\s'\"]", str(Path(profile).absolute())) is None,
        f"{name}: XLA takes no path with white space or quotes in it; give it another",
    )
    lines = read_text(profile).splitlines()
    require(bool(lines), f"{name} is empty: {writes}")
    for number, line in enumerate(lines, 1):
        if _RECORD.fullmatch(line) is None:
            raise ConfigError(f"{profile}, line {number} is {show(line)}, no record; {writes}")


def _message_sizes(config: Config, topology: Topology) -> dict[str, str]:
    """Thresholds up to which XLA joins collectives into one message: one message a layer.

    Smaller messages would pay the latency of a ring many times. Larger ones would wait for several
    layers: a block waits for the sums of the third block after it (model.py), so a message never
    holds more than a layer.
    """
    mesh = config.mesh.resolve(topology.num_devices)
    # Weights are gathered, and gradients reduced, in the type in which the model computes.
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    weights = config.model.block_weights // mesh.tensor * itemsize
    shard = weights // mesh.fsdp
    # Over state and data three sums follow one another: over fsdp, state and data. Each begins
    # with the first weights whose sum before it is done.
    groups = min(mesh.data, mesh.state) > 1
    scattered = shard // mesh.state if groups else shard
    # A ring between nodes passes 2 (n - 1) hops whatever it carries; a message should take five
    # times as long as that.
    nodes = max(topology.num_devices // topology.devices_per_node, 1)
    latency = 2 * (nodes - 1) * RING_HOP_US * 1e-6
    least = int(5 * latency * topology.hardware.inter_node_gbps / 8 * 1e9 / 2)
    return {
        f"--xla_gpu_all_gather_combine_threshold_bytes={weights}": (
            f"one message a layer: its weights are {_mib(weights)}"
        ),
        f"--xla_gpu_reduce_scatter_combine_threshold_bytes={scattered}": (
            f"one message a layer{' over state' if groups else ''}: its gradients' shard is "
            f"{_mib(scattered)} (what XLA counts); the head's have their own, while blocks compute"
        ),
        f"--xla_gpu_all_reduce_combine_threshold_bytes={shard // mesh.state}": (
            f"one message a layer and device: {_mib(shard // mesh.state)}; "
            f"a ring of {nodes} nodes needs {_mib(least)} to hide its latency"
        ),
        "--xla_gpu_enable_all_gather_combine_by_dim=false": (
            "all of a layer's weights in one message, whichever axis is split"
        ),
        "--xla_gpu_enable_reduce_scatter_combine_by_dim=false": (
            "all of a layer's gradients in one message"
        ),
    }


def message_options(config: Config, topology: Topology) -> dict[str, str]:
    """The message sizes as options of one compilation, without the dashes.

    For a process that compiles for other meshes than the one its XLA_FLAGS were made for. What the
    user's own XLA_FLAGS say is left out.
    """
    if topology.hardware.platform != "gpu":
        return {}
    names = [flag.split("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()]
    # The others are the same for every mesh.
    sizes = dict(
        flag.split("=") for flag in _message_sizes(config, topology) if "threshold" in flag
    )
    # The user's follow ours (plan/child.py): then a name is there twice.
    return {name[2:]: size for name, size in sizes.items() if names.count(name) < 2}


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _libtpu(version: tuple[int, ...] | None) -> dict[str, str]:
    """libtpu's flags for its version; None: not installed here.

    Then they are the newest's, which the older one accepts too.
    """
    flags = {
        "--xla_tpu_enable_latency_hiding_scheduler=true": (
            "collectives start early and are awaited late, with compute between"
        ),
        "--xla_enable_async_all_gather=true": (
            "weights are gathered while the layer before computes"
        ),
        "--xla_enable_async_collective_permute=true": "rings of single steps overlap too",
    }
    # Two ways to hide a gather: inside the products beside it, or on other cores of the chip.
    if version is not None and version <= FUSES_GATHERS:
        why = "a gather's steps run inside the products beside it"
        return {**flags, "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": why}
    # libtpu 0.0.48 refuses to fuse gathers on all but v5e ("might lead to ... incorrect results,
    # hang"). On v5e it fuses them by default.
    return {
        **flags,
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true": (
            "gathers run on the SparseCores while the TensorCores compute; "
            "without it compute waits for each of them in this libtpu"
        ),
        "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true": (
            "also where fsdp covers two axes of the torus, as 16 chips of 4x4x8 do"
        ),
    }


def _libtpu_version() -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in importlib.metadata.version("libtpu").split(".")[:3])
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment(topology: Topology) -> dict[str, tuple[str, str]]:
    """Variables of a GPU's process: of JAX and CUDA, and of NCCL where there is a network."""
    # jax and NCCL read these when they start; both leave what the user has set.
    variables = {
        "XLA_CLIENT_MEM_FRACTION": (
            f"{GPU_MEMORY_FRACTION}",
            "by default 75 %; the rest holds CUDA's context and NCCL's buffers",
        ),
        "CUDA_DEVICE_MAX_CONNECTIONS": (
            "1",
            "kernels start in the order of the schedule, so that none overtakes a collective",
        ),
    }
    # Of the network, which a single node does not use.
    if topology.num_devices > topology.devices_per_node:
        variables |= {
            "NCCL_CROSS_NIC": (
                "0",
                "a ring between nodes keeps to one rail: data groups join GPUs of equal local "
                "number",
            ),
            "NCCL_IB_TIMEOUT": (
                "22",
                "a link that is down for some seconds is retried, not reported as a dead peer",
            ),
            "NCCL_IB_RETRY_CNT": (
                "13",
                "with the timeout: about a minute before a link counts as dead",
            ),
            "NCCL_DEBUG": ("WARN", "the log holds the reason of a failure"),
        }
    return variables


def apply_flags(config: Config) -> dict[str, str]:
    """Put the settings for this machine into the environment. Returns what was added, and why.

    What is already set there is kept.
    """
    # By name and not by value: a user's own value of a flag must not be followed by ours.
    with announced(f"the NVIDIA driver to list its GPUs ({DRIVER_SECONDS:.0f} s at most)"):
        topology = detect_topology()
    settings = choose_flags(config, topology)
    added = {}
    for variable, flags in (("XLA_FLAGS", settings.xla), ("LIBTPU_INIT_ARGS", settings.libtpu)):
        present = os.environ.get(variable, "")
        names = {flag.split("=")[0] for flag in present.split()}
        new = {flag: why for flag, why in flags.items() if flag.split("=")[0] not in names}
        if new:
            os.environ[variable] = " ".join([*new, present]).strip()
        added |= new
    for name, (value, why) in settings.environment.items():
        if name not in os.environ:
            os.environ[name] = value
            added[f"{name}={value}"] = why
    return added


def keep_compiled(config: Config, platform: str) -> str | None:
    """Keep compiled programs in data.cache_dir, so that a restart compiles nothing again.

    Process 0 writes them, all read. Not on a CPU, unless JAX_COMPILATION_CACHE_DIR asks for it:
    there jax's keys differ by process, so that only process 0 would profit while the others wait,
    and every program that is read prints pages about features of the machine. Returns why none are
    kept where another user chooses what lies there; users who share data.cache_dir have a folder
    each.
    """
    if platform == "cpu" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    found = []
    for name in ("compiled", f"compiled-{os.geteuid()}"):
        folder = Path(config.data.cache_dir).absolute() / name
        # Before: it might be made where another user's link leads.
        if (why := why_not_run(folder)) is None:
            # Where it cannot be made, jax says so and goes on.
            with contextlib.suppress(OSError):
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(mode=0o700)
            why = why_not_run(folder)
        if why is None:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            return None
        found.append(why)
    return (
        f"programs are compiled anew at every start: {' and '.join(found)}; set "
        "JAX_COMPILATION_CACHE_DIR to a folder of your own"
    )


def main(argv: list[str]) -> int:
    """Print the settings as shell lines, each under its reason; see --help."""
    parser = make_parser(
        "python -m baichuan_jax.xla_flags",
        "Print the flags and variables for a configuration on a cluster, as shell lines with "
        "their reasons.",
    )
    parser.add_argument(
        "--topology",
        default=None,
        help="Cluster, such as a800:128x8 or v5p:4x4x8; default: this machine.",
    )
    config, options = parse_command(parser, argv, own=("topology",))
    name = options["topology"]
    settings = choose_flags(config, parse_topology(name) if name else detect_topology())
    for variable, flags in (("XLA_FLAGS", settings.xla), ("LIBTPU_INIT_ARGS", settings.libtpu)):
        for flag, why in flags.items():
            print(f"# {flag.split('=')[0]}: {why}")
        if flags:
            # In front of what is set already: the last one counts where a flag comes twice.
            value = f'{shlex.quote(" ".join(flags))}"${{{variable}:+ ${variable}}}"'
            print(f"export {variable}={value}")
    for variable, (value, why) in settings.environment.items():
        print(f"# {why}\nexport {variable}=${{{variable}:-{value}}}")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
