"""What the choosers of all operators ask: may this implementation serve here, and was it forced?"""

from typing import Any

import jax

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.kernels import triton_bridge
from baichuan_jax.sharding import Layout


def forced(operator: str, implementation: str, obstacles: dict[str, str | None]) -> tuple[str, str]:
    """The implementation that a setting names. Raises ConfigError where it cannot serve."""
    if reason := obstacles.get(implementation):
        raise ConfigError(
            f"kernels.{operator}={implementation} cannot serve: {reason}; use auto or reference"
        )
    return implementation, f"forced by kernels.{operator}"


def triton_obstacle(device: Any) -> str | None:
    """Why a device cannot run the Triton kernels; None: it can."""
    if device.platform != "gpu":
        return f"Triton needs a GPU and the backend is {device.platform}"
    if float(device.compute_capability) < 8:
        return f"the kernels need bfloat16 tensor cores (sm_80) and this GPU has compute capability {device.compute_capability}"
    return triton_bridge.obstacle()


def pallas_obstacle(device: Any, dtype: str) -> str | None:
    """Why a device cannot run the Pallas kernels; None: it can."""
    if device.platform != "tpu":
        return f"the Pallas kernels need a TPU and the backend is {device.platform}"
    return None if dtype in ("float32", "bfloat16") else f"a TPU does not compute in {dtype}"


def device_of(layout: Layout | None) -> Any:
    """One of the devices that an operator will run on."""
    return jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
