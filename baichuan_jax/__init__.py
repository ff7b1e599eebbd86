"""Baichuan-7B pre-training in JAX and Flax.

A notebook begins with `from baichuan_jax import load_config, load_pretrained, Generator`.
"""

import glob
import importlib
import importlib.util
import os
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baichuan_jax.config.files import load_config
    from baichuan_jax.generate import Generator
    from baichuan_jax.hf.weights import load_pretrained

__version__ = "0.1.0"
__all__ = ["Generator", "load_config", "load_pretrained"]

# Imported at first use: `python -m baichuan_jax.generate` would otherwise load its module twice,
# once by this file and once as __main__.
_HOMES = {"load_config": "config.files", "load_pretrained": "hf.weights", "Generator": "generate"}


def _hide_compilers() -> None:
    """Keep jax off accelerators of which only the compilers are installed.

    requirements-plan.txt installs plugins for GPUs and TPUs as compilers for `plan` and `kernels`.
    jax loads every plugin that it finds, and these complain about missing drivers. `plan` and
    `kernels` set JAX_SKIP_CUDA_CONSTRAINTS_CHECK, which keeps the plugins.
    """
    wanted = os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") or "jax" in sys.modules
    devices = any(
        glob.glob(path)
        for path in ("/proc/driver/nvidia", "/dev/nvidia*", "/dev/accel*", "/dev/vfio/*")
    )
    compilers = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
    if wanted or devices or not any(importlib.util.find_spec(name) for name in compilers):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for cuda in ("cuda12", "cuda13"):
        plugin: Any = types.ModuleType(f"jax_plugins.xla_{cuda}")
        plugin.initialize = lambda: None
        # None makes an import fail, as where the package is not installed.
        modules: dict[str, Any] = sys.modules
        modules |= {f"jax_{cuda}_plugin": None, f"jax_plugins.xla_{cuda}": plugin}


_hide_compilers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'baichuan_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"baichuan_jax.{_HOMES[name]}"), name)
