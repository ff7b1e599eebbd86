"""`python -m baichuan_jax.kernels`: what every kernel takes of a GPU or TPU, from the assembler, with no accelerator.

The kernels are those that a training step calls, at its sizes. How the bound is computed stands in
kernels/sass.py.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from baichuan_jax.config.schema import require
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.kernels.inspect import sass
from baichuan_jax.kernels.inspect.bound import Bound, attention_bound, norm_bound
from baichuan_jax.kernels.triton_bridge import Launch
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import write_atomically

# Two rows of 4,096 tokens of Baichuan-7B: one micro-batch of a device.
ROWS, LENGTH, WIDTH = 2, 4096, 4096
NEEDED = {"sm_80": "triton", "sm_90": "triton", "v5p": "libtpu"}
INSTALL = {
    "triton": "triton==3.9.0",
    "libtpu": "'libtpu==0.0.41.*' (jax 0.10.1) or 'libtpu==0.0.48.*' (jax 0.11.2)",
}


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write it as JSON; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.kernels",
        description="Compile every kernel for GPUs and TPUs that need not be there, and tabulate what it takes: registers, spilled "
        "bytes, shared memory (a TPU's VMEM), programs resident on a multiprocessor, tensor-core instructions, and the share of the "
        f"peak that its instructions allow, for {ROWS} rows of {LENGTH} tokens of {WIDTH} channels. Nothing is run or measured. "
        "Takes some minutes on two cores.",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=list(NEEDED),
        metavar="TARGET",
        help=f"of {', '.join(NEEDED)}; default: all",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    options = parser.parse_args(arguments)
    missing = {
        target: package
        for target, package in NEEDED.items()
        if importlib.util.find_spec(package) is None
    }
    chosen = options.targets or [target for target in NEEDED if target not in missing]
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "140")  # the table's width, where no terminal has one
    display = Display()
    for package in dict.fromkeys(
        missing[target] for target in (options.targets or NEEDED) if target in missing
    ):
        targets = ", ".join(target for target in missing if missing[target] == package)
        message = f"{targets}: {package} is not installed; pip install {INSTALL[package]}, or everything: requirements-plan.txt"
        require(not options.targets and bool(chosen), message)
        display.say(message, style="yellow")
    with _no_accelerator():
        rows = [
            row
            for target in chosen
            for row in (_tpu_rows(target) if target == "v5p" else _gpu_rows(target))
        ]
    for target in chosen:
        cells = [_cells(row) for row in rows if row["target"] == target]
        display.table(
            f"{target}: {ROWS} x {LENGTH} tokens of {WIDTH} channels",
            list(_COLUMNS.values()),
            cells,
        )
    display.say(
        "Share of peak: what the busiest unit allows at best, of dense products below the diagonal (attention; float32: of "
        "TF32's peak) or of memory bandwidth (RMSNorm). Predicted from the instructions, not measured."
    )
    if options.json:
        write_atomically(options.json, json.dumps(rows, indent=1).encode())
    return 0


@contextlib.contextmanager
def _no_accelerator() -> Iterator[None]:
    """No device is taken or looked for, and what the plugins log about that is dropped, unless an error leaves here."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud machine to ask what it is
    kept = os.dup(2)
    sys.stderr = os.fdopen(kept, "w", buffering=1)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)


def list_launches(dtype: str, head_dim: int, capability: int) -> list[Launch]:
    """The Triton kernels that attention and RMSNorm with their gradients call at the table's sizes."""
    found: list[Launch] = []

    def record(launch: Launch) -> list[jax.Array]:
        found.append(launch)
        return [jnp.zeros(output.shape, output.dtype) for output in launch.outputs]

    with bridge.run_with(record, capability):
        jax.eval_shape(_operators("triton"), *_arguments(dtype, head_dim))
    return found


def _operators(implementation: str) -> Callable[..., Any]:
    """Attention and RMSNorm with their gradients."""
    attention = importlib.import_module(
        f"baichuan_jax.kernels.attention.{implementation}"
    ).attention
    norm = importlib.import_module(f"baichuan_jax.kernels.rms_norm.{implementation}")

    def run(q_BTNH: jax.Array, x_BTD: jax.Array, weight_D: jax.Array) -> Any:
        out_BTNH, pull = jax.vjp(attention, q_BTNH, q_BTNH, q_BTNH)
        forward = norm.forward(weight_D, x_BTD, x_BTD, eps=1e-6)
        return pull(out_BTNH), forward, norm.backward(weight_D, x_BTD, x_BTD, x_BTD, eps=1e-6)

    return run


def _arguments(dtype: str, head_dim: int, sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
    shapes = (
        ((ROWS, LENGTH, WIDTH // head_dim, head_dim), dtype),
        ((ROWS, LENGTH, WIDTH), dtype),
        ((WIDTH,), "float32"),
    )
    return [jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes]


def _cases(target: str) -> Iterator[tuple[str, int]]:
    cases = list(itertools.product(("bfloat16", "float32"), (128, 64)))
    yield from tqdm(
        cases, desc=f"compiling for {target}", unit="case", file=sys.stderr, leave=False
    )


def _label(name: str, dtype: str, head_dim: int) -> str | None:
    """What the table calls a kernel; None: RMSNorm, which does not depend on the heads, once more."""
    if "norm" not in name:
        return f"{name} {dtype} head {head_dim}"
    return f"{name} {dtype}" if head_dim == 128 else None


def _gpu_rows(target: str) -> Iterator[dict[str, Any]]:
    chip = sass.CHIPS[target]
    for dtype, head_dim in _cases(target):
        backward = []
        for launch in list_launches(dtype, head_dim, chip.capability):
            if (label := _label(launch.name, dtype, head_dim)) is None:
                continue
            assembled = sass.assemble(launch, chip)
            bound = (norm_bound if "norm" in launch.name else attention_bound)(
                launch, assembled, chip
            )
            row = {
                "kernel": label,
                "target": target,
                "registers": assembled.registers,
                "spilled_bytes": assembled.spilled_bytes,
                "shared_bytes": assembled.shared_bytes,
                "blocks_per_sm": assembled.blocks_per_multiprocessor(launch.num_warps, chip),
                "tensor_core_instructions": assembled.tensor_core_instructions,
                "flops_per_block": round(bound.flops / bound.programs),
                "bytes_per_block": round(bound.moved / bound.programs),
                "bound_by": bound.unit,
                "bound_share_of_peak": round(bound.share_of_peak, 3),
            }
            yield row
            if launch.name in ("attention_dkv", "attention_dq"):
                backward.append((bound, row))
        yield _whole_backward(*zip(*backward, strict=True))


def _whole_backward(bounds: tuple[Bound, ...], rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Both kernels, one after the other: they take 4 + 3 products for the 5 that the gradient needs."""
    ideal, cycles = (
        sum(getattr(bound, name) for bound in bounds) for name in ("ideal_cycles", "cycles")
    )
    return {
        "kernel": rows[0]["kernel"].replace("dkv", "dkv + dq"),
        "target": rows[0]["target"],
        **{name: max(row[name] for row in rows) for name in ("registers", "shared_bytes")},
        **{
            name: sum(row[name] for row in rows)
            for name in ("spilled_bytes", "tensor_core_instructions")
        },
        "blocks_per_sm": min(row["blocks_per_sm"] for row in rows),
        "flops_per_block": None,
        "bytes_per_block": None,
        "bound_by": "7 for 5",
        "bound_share_of_peak": round(5 / 7 * ideal / cycles, 3),
    }


def _tpu_rows(target: str) -> Iterator[dict[str, Any]]:
    """Of the kernels in a compiled program. libtpu reports the VMEM of each, and neither registers nor instructions."""
    jax.devices()  # lets jax find libtpu first
    device = topologies.get_topology_desc(f"{target}:2x2x1", "tpu").devices[0]
    for dtype, head_dim in _cases(target):
        arguments = _arguments(dtype, head_dim, SingleDeviceSharding(device))
        text = str(jax.jit(_operators("pallas")).lower(*arguments).compile().as_text())
        for call in re.finditer(
            r'%([a-z_]+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', text
        ):
            memory = re.search(
                r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"',
                text[call.end() :],
            )
            if memory and (label := _label(call[1], dtype, head_dim)):
                yield {
                    **dict.fromkeys(("kernel", "target", *_COLUMNS)),
                    "kernel": label,
                    "target": target,
                    "shared_bytes": int(memory[1]),
                }


_COLUMNS = {
    "kernel": "kernel",
    "registers": "regis-\nters",
    "spilled_bytes": "spilled\nbytes",
    "shared_bytes": "shared\nKiB",
    "blocks_per_sm": "blocks\n/ SM",
    "tensor_core_instructions": "tensor\ncore",
    "flops_per_block": "MFLOP\n/ block",
    "bytes_per_block": "KiB\n/ block",
    "bound_by": "busiest",
    "bound_share_of_peak": "share\nof peak",
}


def _cells(row: dict[str, Any]) -> list[str]:
    show = {
        "flops_per_block": lambda flops: f"{flops / 1e6:.1f}",
        "bytes_per_block": lambda size: f"{size / 1024:.0f}",
        "shared_bytes": lambda size: f"{size / 1024:.0f}",
        "bound_share_of_peak": lambda share: f"{share:.1%}",
    }
    return ["-" if row[name] is None else show.get(name, str)(row[name]) for name in _COLUMNS]


if __name__ == "__main__":
    run_command(main)
