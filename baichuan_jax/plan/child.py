"""Compilation in a process of its own, whose environment is set before jax is imported."""

import os
import subprocess
import sys

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import Topology
from baichuan_jax.resilience.waits import announced
from baichuan_jax.xla_flags import choose_flags

CHILD = "BAICHUAN_JAX_PLAN"  # set in the process that compiles

# What the compilers print, before they read any setting, about a machine without an accelerator.
_NOISE = (
    "All log messages before absl::InitializeLog()",
    "cudart_stub.cc",
    "cuda_executor.cc",
    "Could not find cuda drivers",
    "TPU_ACCELERATOR_TYPE",
    "Logging before InitGoogle()",
    "TPU_WORKER_HOSTNAMES",
    "Source Location Trace",
    "libtpu_init_utils",
    "Very slow compile?",
    "********************************",
)


def child_environment(config: Config, topology: Topology) -> dict[str, str]:
    """The environment of the process that compiles: the topology's flags, and no device."""
    # The user's own flags come last, and win where a flag is there twice.
    settings = choose_flags(config, topology)
    libtpu = [*settings.libtpu, os.environ.get("LIBTPU_INIT_ARGS", "")]
    return {
        **os.environ,
        CHILD: "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver to ask for its version
        # A program for described devices is written to the cache but cannot be read again.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask for the TPU's type
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": " ".join([*settings.xla, os.environ.get("XLA_FLAGS", "")]).strip(),
        "LIBTPU_INIT_ARGS": " ".join(libtpu).strip(),
    }


def run_child(argv: list[str], config: Config, topology: Topology) -> int:
    """Run `python -m baichuan_jax.plan` with argv and the topology's flags. Returns its exit code.

    What the compilers print about missing drivers is dropped.
    """
    command = [sys.executable, "-m", "baichuan_jax.plan", *argv]
    with subprocess.Popen(
        command, env=child_environment(config, topology), stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        # Line by line, so that the bar of --search and errors are seen as they come.
        try:
            with announced(f"the compilation for {topology}, minutes for a large model"):
                for line in child.stderr:
                    if not any(noise in line for noise in _NOISE):
                        sys.stderr.write(line)
                return child.wait()
        except KeyboardInterrupt:  # the child got it too and ends by itself
            child.wait()
            raise
