"""What the choosers of all operators share.

A chooser has a list of implementations for each platform, the best first. It asks each for its
obstacle, takes the first that has none, and gives the reasons of those that it passed over. An
implementation knows its own limits: a function `obstacle` in its file returns them as text.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.sharding import Layout

Obstacle = Callable[[], str | None]
"""Why an implementation cannot serve a call; None: it can."""


def load(operator: str, name: str) -> Any:
    """The module of an implementation, imported late: Pallas alone takes a second to import."""
    # By name: an operator's implementations are the files of its folder.
    return importlib.import_module(f"baichuan_jax.kernels.{operator}.{name}")


def choose(
    operator: str,
    setting: str,
    preferred: Mapping[str, str],
    obstacles: Mapping[str, Obstacle],
    fallback: tuple[str, str],
) -> tuple[str, str]:
    """The implementation that will run and why: (name, reason).

    setting: "auto", or the name of the implementation to take. preferred: this platform's, the best
    first, each with the reason to take it. obstacles: of every implementation that has limits.
    fallback: the name and reason of one that has none. Raises ConfigError where a forced one cannot
    serve.
    """
    # A forced implementation is never replaced in silence: a benchmark would time the wrong one.
    if setting != "auto":
        if setting in obstacles and (reason := obstacles[setting]()) is not None:
            raise ConfigError(
                f"kernels.{operator}={setting} cannot serve: {reason}; use auto or reference"
            )
        return setting, f"forced by kernels.{operator}"
    # Only this platform's implementations are asked: the others need not even be importable.
    refusals = []
    for name, why in preferred.items():
        if (reason := obstacles[name]()) is None:
            return name, "; ".join([why, *refusals])
        refusals.append(f"not {name}: {reason}")
    name, why = fallback
    return name, "; ".join([why, *refusals])


def tpu_obstacle(device: Any, dtype: str) -> str | None:
    """Why a device cannot run any Pallas kernel of this dtype; None: it can."""
    if device.platform != "tpu":
        return f"the Pallas kernels need a TPU and the backend is {device.platform}"
    return None if dtype in ("float32", "bfloat16") else f"a TPU does not compute in {dtype}"


def device_of(layout: Layout | None) -> Any:
    """One of the devices that an operator will run on."""
    # All devices of a mesh are alike.
    return jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
