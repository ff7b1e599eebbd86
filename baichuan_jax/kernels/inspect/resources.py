"""What every kernel of a training step uses on a GPU or TPU, compiled without the device.

In: a target. Out: one row for each kernel, dtype and head size, with registers, spilled bytes,
shared memory (a TPU's VMEM), resident programs, tensor-core instructions and the roofline bound
(bound.py). The kernels are those of attention and RMSNorm with their gradients, at the sizes of one
micro-batch of Baichuan-7B.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from baichuan_jax.hardware.flops import ATTENTION_PRODUCTS, BACKWARD_PRODUCTS
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.kernels.attention.api import local_attention
from baichuan_jax.kernels.choice import load
from baichuan_jax.kernels.inspect import sass
from baichuan_jax.kernels.inspect.bound import Bound, attention_bound, norm_bound, rope_bound
from baichuan_jax.kernels.triton_bridge import Launch

# Two rows of 4,096 tokens of Baichuan-7B: one micro-batch of a device.
ROWS, LENGTH, WIDTH = 2, 4096, 4096
FIELDS = (
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "blocks_per_sm",
    "tensor_core_instructions",
    "flops_per_block",
    "bytes_per_block",
    "bound_by",
    "bound_share_of_peak",
)
"""Of a row, beside its kernel and target; None where the target's compiler does not report it."""


def list_launches(dtype: str, head_dim: int, capability: int) -> list[Launch]:
    """The Triton kernels that attention and RMSNorm with their gradients call at these sizes."""
    # Nothing is compiled or run: tracing calls the bridge, which hands every kernel to `record`.
    found: list[Launch] = []

    def record(launch: Launch) -> list[jax.Array]:
        found.append(launch)
        return [jnp.zeros(output.shape, output.dtype) for output in launch.outputs]

    with bridge.run_with(record, capability):
        jax.eval_shape(_operators("triton"), *_arguments(dtype, head_dim))
    return found


def gpu_rows(target: str) -> Iterator[dict[str, Any]]:
    """The rows of a GPU, such as sm_80."""
    chip = sass.CHIPS[target]
    for dtype, head_dim in _cases(target):
        # Its two kernels get a row together, behind their own.
        backward = []
        # Triton's compiler is not asked through XLA, so that a CPU's jaxlib is enough.
        for launch in list_launches(dtype, head_dim, chip.capability):
            if (label := _label(launch.name, dtype, head_dim)) is None:
                continue
            assembled = sass.assemble(launch, chip)
            limit = bound_of(launch, assembled, chip)
            row = {"kernel": label, "target": target} | _gpu_fields(launch, assembled, limit, chip)
            yield row
            if launch.name in ("attention_dkv", "attention_dq"):
                backward.append((limit, row))
        yield _whole_backward(*zip(*backward, strict=True))


def bound_of(launch: Launch, assembled: sass.Assembled, chip: sass.Chip) -> Bound:
    """The bound of any of the kernels."""
    if launch.name == "attention_rope":
        return rope_bound(launch, assembled, chip)
    bound = norm_bound if "norm" in launch.name else attention_bound
    return bound(launch, assembled, chip)


def _gpu_fields(
    launch: Launch, assembled: sass.Assembled, limit: Bound, chip: sass.Chip
) -> dict[str, Any]:
    return {
        "registers": assembled.registers,
        "spilled_bytes": assembled.spilled_bytes,
        "shared_bytes": assembled.shared_bytes,
        "blocks_per_sm": assembled.blocks_per_multiprocessor(launch.num_warps, chip),
        "tensor_core_instructions": assembled.tensor_core_instructions,
        "flops_per_block": round(limit.flops / limit.programs),
        "bytes_per_block": round(limit.moved / limit.programs),
        "bound_by": limit.unit,
        "bound_share_of_peak": round(limit.share_of_peak, 3),
    }


def _whole_backward(bounds: tuple[Bound, ...], rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Both kernels, one after the other: they compute 4 + 3 products, where 5 are needed."""
    # The shares of both count what each computes; the share of the whole counts what is needed.
    products = ATTENTION_PRODUCTS["attention_dkv"] + ATTENTION_PRODUCTS["attention_dq"]
    ideal = sum(bound.ideal_cycles for bound in bounds)
    cycles = sum(bound.cycles for bound in bounds)
    largest = {name: max(row[name] for row in rows) for name in ("registers", "shared_bytes")}
    added = ("spilled_bytes", "tensor_core_instructions")
    return {
        **dict.fromkeys(("kernel", "target", *FIELDS)),
        "kernel": rows[0]["kernel"].replace("dq", "dq + dkv"),
        "target": rows[0]["target"],
        **largest,
        **{name: sum(row[name] for row in rows) for name in added},
        "blocks_per_sm": min(row["blocks_per_sm"] for row in rows),
        "bound_by": f"{products} for {BACKWARD_PRODUCTS}",
        "bound_share_of_peak": round(BACKWARD_PRODUCTS / products * ideal / cycles, 3),
    }


def tpu_rows(target: str) -> Iterator[dict[str, Any]]:
    """The rows of a TPU. libtpu reports the VMEM of a kernel, but no registers or instructions."""
    # A topology of one host is the smallest that libtpu describes. jax.devices() lets jax find
    # libtpu first.
    jax.devices()
    device = topologies.get_topology_desc(f"{target}:2x2x1", "tpu").devices[0]
    # The compiled program lists each kernel as a custom call, and behind it the VMEM it was given.
    call = re.compile(r'%([a-z_]+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"')
    vmem = re.compile(
        r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    )
    for dtype, head_dim in _cases(target):
        arguments = _arguments(dtype, head_dim, SingleDeviceSharding(device))
        text = str(jax.jit(_operators("pallas")).lower(*arguments).compile().as_text())
        for found in call.finditer(text):
            size = vmem.search(text, found.end())
            if size and (label := _label(found[1], dtype, head_dim)):
                empty = dict.fromkeys(("kernel", "target", *FIELDS))
                yield empty | {"kernel": label, "target": target, "shared_bytes": int(size[1])}


def _operators(implementation: str) -> Callable[..., Any]:
    """Attention and RMSNorm with their gradients."""
    # Their own functions and not the chooser's, which would ask for the device.
    norm = load("rms_norm", implementation)

    def run(qkv_BTCNH, cos, sin, x_BTD: jax.Array, weight_D: jax.Array) -> Any:
        out_BTNH, pull = jax.vjp(
            lambda qkv: local_attention(implementation, False, qkv, cos, sin), qkv_BTCNH
        )
        forward = norm.forward(weight_D, x_BTD, x_BTD, eps=1e-6)
        return pull(out_BTNH), forward, norm.backward(weight_D, x_BTD, x_BTD, x_BTD, eps=1e-6)

    return run


def _arguments(dtype: str, head_dim: int, sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
    shapes = (
        ((ROWS, LENGTH, 3, WIDTH // head_dim, head_dim), dtype),
        ((1, LENGTH, head_dim // 2), "float32"),
        ((1, LENGTH, head_dim // 2), "float32"),
        ((ROWS, LENGTH, WIDTH), dtype),
        ((WIDTH,), "float32"),
    )
    return [jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes]


def _cases(target: str) -> Iterator[tuple[str, int]]:
    # Both head sizes of the Triton kernels. float32 is for tests and small models.
    cases = list(itertools.product(("bfloat16", "float32"), (128, 64)))
    bar = tqdm(cases, desc=f"compiling for {target}", unit="case", file=sys.stderr, leave=False)
    yield from bar


def _label(name: str, dtype: str, head_dim: int) -> str | None:
    """What the table calls a kernel; None: leave it out.

    RMSNorm does not depend on the head size, so that it is listed with one of them only.
    """
    if "norm" not in name:
        return f"{name} {dtype} head {head_dim}"
    return f"{name} {dtype}" if head_dim == 128 else None
