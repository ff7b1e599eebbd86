"""`python -m baichuan_jax.kernels`: what every kernel uses on a GPU or TPU, without the device."""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from baichuan_jax.config.schema import require
from baichuan_jax.kernels.inspect.resources import LENGTH, ROWS, WIDTH, gpu_rows, tpu_rows
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import writable_file, write_atomically

# What compiles for each target: Triton needs no CUDA for that, libtpu no TPU.
NEEDED = {"sm_80": "triton", "sm_90": "triton", "v5p": "libtpu"}
INSTALL = {
    "triton": "triton==3.9.0",
    "libtpu": "'libtpu==0.0.41.*' (jax 0.10.1) or 'libtpu==0.0.48.*' (jax 0.11.2)",
}
SIZES = f"{ROWS} x {LENGTH} tokens of {WIDTH} channels"
COLUMNS = {
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
FORMATS = {
    "flops_per_block": lambda flops: f"{flops / 1e6:.1f}",
    "bytes_per_block": lambda size: f"{size / 1024:.0f}",
    "shared_bytes": lambda size: f"{size / 1024:.0f}",
    "bound_share_of_peak": lambda share: f"{share:.1%}",
}


def main(argv: list[str]) -> int:
    """Print the tables and write them as JSON; see --help. Returns the exit code."""
    options = _parse(argv)
    missing = {
        target: package
        for target, package in NEEDED.items()
        if importlib.util.find_spec(package) is None
    }
    chosen = options.targets or [target for target in NEEDED if target not in missing]
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "140")  # the table's width, where no terminal sets one
    display = Display()
    # A target whose compiler is missing is left out with a message; asked for by name, it is an
    # error.
    wanted = options.targets or list(NEEDED)
    for package in dict.fromkeys(missing[target] for target in wanted if target in missing):
        targets = ", ".join(target for target in missing if missing[target] == package)
        message = (
            f"{targets}: {package} is not installed; pip install {INSTALL[package]}, "
            "or everything: requirements-plan.txt"
        )
        require(not options.targets and bool(chosen), message)
        display.say(message, style="yellow")
    # All rows first: what the compilers print is dropped meanwhile, and the tables follow together.
    with _no_accelerator():
        rows = {
            target: list((tpu_rows if target == "v5p" else gpu_rows)(target)) for target in chosen
        }
    for target in chosen:
        cells = [_cells(row) for row in rows[target]]
        display.table(f"{target}: {SIZES}", list(COLUMNS.values()), cells)
    display.say(
        "Share of peak: what the busiest unit allows at best, of dense products below the diagonal "
        "(attention; float32: of TF32's peak) or of memory bandwidth (RMSNorm). Predicted from the "
        "instructions, not measured."
    )
    if options.json:
        every = [row for target in chosen for row in rows[target]]
        write_atomically(Path(options.json), json.dumps(every, indent=1).encode())
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.kernels",
        description="Compile every kernel for GPUs and TPUs without the device, and tabulate what "
        "it uses: registers, spilled bytes, shared memory (a TPU's VMEM), programs resident on a "
        "multiprocessor, tensor-core instructions, and the share of the peak that its instructions "
        f"allow, for {ROWS} rows of {LENGTH} tokens of {WIDTH} channels. Nothing is run or "
        "measured. Takes some minutes on two cores.",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=list(NEEDED),
        metavar="TARGET",
        help=f"of {', '.join(NEEDED)}; default: all",
    )
    rows = "write the rows to this file too"
    parser.add_argument("--json", type=writable_file, metavar="FILE", help=rows)
    return parser.parse_args(argv)


@contextlib.contextmanager
def _no_accelerator() -> Iterator[None]:
    """No device is used or searched for, and what the plugins log about that is dropped.

    The log goes straight to file descriptor 2, so that is where it has to be caught. It is printed
    where an error leaves this context.
    """
    # A plugin would otherwise look for a driver, or wait for the TPU's metadata server.
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # Else libtpu's lock would refuse a second process, though no TPU is used.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask for the TPU's type
    # Python's stderr moves to the kept descriptor, so that the progress bar is still seen.
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


def _cells(row: dict[str, Any]) -> list[str]:
    return ["-" if row[name] is None else FORMATS.get(name, str)(row[name]) for name in COLUMNS]


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
