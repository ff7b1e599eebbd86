"""Baichuan-7B pre-training in JAX and Flax: `from baichuan_jax import load_config, load_pretrained, Generator`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baichuan_jax.config_file import load_config
    from baichuan_jax.generate import Generator
    from baichuan_jax.hf import load_pretrained

__version__ = "0.1.0"
__all__ = ["Generator", "load_config", "load_pretrained"]

# Resolved at first use: `python -m baichuan_jax.generate` would load a module twice that the package had imported already.
_HOMES = {"load_config": "config_file", "load_pretrained": "hf", "Generator": "generate"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'baichuan_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"baichuan_jax.{_HOMES[name]}"), name)
