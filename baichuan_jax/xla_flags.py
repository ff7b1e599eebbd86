"""XLA's flags for a run, each with its reason; applied to the environment before jax starts its backends."""

import os
from pathlib import Path

import jax

from baichuan_jax.config import Config


def choose_flags(config: Config) -> dict[str, str]:
    """Flags for this configuration, and why each is set. Flags of other backends are known to every jaxlib and do nothing there."""
    flags = {}
    if config.train.deterministic:
        flags["--xla_gpu_deterministic_ops=true"] = "train.deterministic: no atomics, the same bits in every run"
    return flags


def apply_flags(config: Config) -> dict[str, str]:
    """Put the chosen flags into XLA_FLAGS, before those already there (which so override them); returns what was added."""
    present = os.environ.get("XLA_FLAGS", "")
    names = {word.split("=")[0] for word in present.split()}
    added = {flag: why for flag, why in choose_flags(config).items() if flag.split("=")[0] not in names}
    if added:
        os.environ["XLA_FLAGS"] = " ".join([*added, present]).strip()
    return added


def keep_compiled(config: Config, platform: str) -> None:
    """Keep compiled programs in data.cache_dir, so that a restart compiles nothing again; process 0 writes them, all read.

    Not on a CPU, unless JAX_COMPILATION_CACHE_DIR asks for it: there jax's keys differ by process, so that process 0 alone would
    profit and wait for the others, and every program that is read prints pages about features of the machine.
    """
    if platform != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.data.cache_dir).absolute() / "compiled"))
