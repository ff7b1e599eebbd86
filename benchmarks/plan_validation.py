"""Error of `plan`'s predictions on published runs, by leave-one-out cross-validation.

    python benchmarks/plan_validation.py [--cache cache/plan] [--json FILE]

Needs requirements-plan.txt. Every row is a published measurement. Our training step, with the row's
model, batch, mesh and recomputation, is compiled ahead of time for the row's cluster (the programs
are kept in the cache), and its time is predicted. Two rates are fitted for each kind of GPU, to the
other rows of that kind: the share of the peak that products reach, and the share of the network.
The error of the row that was left out is the error to expect of a prediction.
"""

import argparse
import dataclasses
import subprocess
import sys
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from jax.sharding import AbstractMesh
from results import Results
from tqdm import tqdm

from baichuan_jax.hardware.accelerators import Topology, parse_topology
from baichuan_jax.plan import hlo
from baichuan_jax.plan.prediction import predict
from baichuan_jax.plan.rates import RATES, Rates
from baichuan_jax.sharding import AXES


class Row(NamedTuple):
    """A published measurement: `seconds` of a step of `rows` rows of `length` tokens a device."""

    name: str
    topology: str
    seconds: float
    rows: int
    length: int
    settings: dict[str, object]
    hardware: dict[str, float]
    source: str


# MPT's block has 12 D^2 weights, as a SwiGLU block of width 8/3 D has. Heads and vocabulary are as
# published.
MPT_7B = {"model.intermediate_size": 10920, "model.vocab_size": 50368}
MPT_13B = {
    "model.hidden_size": 5120,
    "model.num_layers": 40,
    "model.num_heads": 40,
    "model.intermediate_size": 13656,
    "model.vocab_size": 50368,
}
# Llama2-7B.
UNRECOMPUTED = {"model.vocab_size": 32000, "model.remat": "none"}
TOOLBOX = "NVIDIA/JAX-Toolbox docs/frameworks/maxtext/README.md"
FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md, A100 80GB"
MAXTEXT = "AI-Hypercomputer/maxtext src/maxtext/configs/gpu/a3/llama_2_7b/README.md"
# A token, as MaxText counts: all parameters, and attention without its causal mask.
LLAMA2_FLOPS = 6 * 6.738e9 + 12 * 32 * 4096 * 4096
# a3-highgpu-8g has 4 x 200 Gb/s a node of 8.
A3 = {"inter_node_gbps": 100.0}


def _foundry(
    model: dict, name: str, rows: int, length: int, tokens_per_second: float, remat: str
) -> Row:
    """A row of llm-foundry's table, which has tokens a second and GPU."""
    seconds = rows * length / tokens_per_second
    settings = {**model, "model.remat": remat}
    name = f"{name}, {length} tokens"
    return Row(name, "a100:1x8", seconds, rows, length, settings, {}, FOUNDRY)


def _maxtext(nodes: int, tflops: float) -> Row:
    """A row of MaxText's table, which has TFLOP/s a GPU."""
    seconds = 4 * 4096 * LLAMA2_FLOPS / (tflops * 1e12)
    name, topology = f"Llama2-7B, {nodes} x A3", f"h100:{nodes}x8"
    return Row(name, topology, seconds, 4, 4096, UNRECOMPUTED, A3, MAXTEXT)


ROWS = [
    _foundry(MPT_7B, "MPT-7B", 6, 2048, 4641, "none"),
    _foundry(MPT_7B, "MPT-7B", 16, 4096, 3684, "full"),
    _foundry(MPT_7B, "MPT-7B", 8, 8192, 3206, "full"),
    _foundry(MPT_13B, "MPT-13B", 2, 2048, 2262, "none"),
    Row("Llama2-7B, DGX H100", "h100:1x8", 0.721, 2, 4096, UNRECOMPUTED, {}, TOOLBOX),
    *(starmap(_maxtext, [(1, 492), (2, 422), (4, 407), (8, 409), (16, 375)])),
]


def compiled(row: Row, cache: Path) -> hlo.Program:
    """The row's program, compiled once.

    In a process of its own: the plan chooses a backend for the cluster before jax starts.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / (row.name.lower().replace(",", "").replace(" ", "-") + ".hlo.txt")
    if not path.exists():
        topology = parse_topology(row.topology)
        settings = {
            "model.scan_layers": "false",
            "train.context_length": row.length,
            "train.micro_batch_size": row.rows,
            "train.global_batch_size": row.rows * topology.num_devices,
            **row.settings,
        }
        files = ["--hlo", str(path.resolve()), "--output", str(cache.resolve())]
        options = ["--config", "configs/baichuan_7b_a800.yaml", "--topology", row.topology, *files]
        options += [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "baichuan_jax.plan", *options]
        root = Path(__file__).parents[1]
        subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)
    return hlo.parse(path.read_text(encoding="utf-8"))


def predicted(row: Row, program: hlo.Program, rates: Rates) -> float:
    """Seconds of the row's step."""
    topology = parse_topology(row.topology)
    topology = Topology(dataclasses.replace(topology.hardware, **row.hardware), topology.shape)
    mesh = AbstractMesh((topology.num_devices // 8, 8, 1, 1), AXES)
    return predict(program, mesh, topology, rates).seconds


# The grid of shares that `fit` searches.
MATMUL = [round(float(share), 2) for share in np.arange(0.46, 0.87, 0.02)]
NETWORK = [0.2, 0.3, 0.4, 0.6, 0.8]


def fit(rows: list[Row], seconds: dict[tuple[str, float, float], float]) -> tuple[float, float]:
    """The shares of peak and network with the least squared relative error over the rows."""

    def error(shares: tuple[float, float]) -> float:
        return sum((seconds[row.name, *shares] / row.seconds - 1) ** 2 for row in rows)

    return min(((matmul, network) for matmul in MATMUL for network in NETWORK), key=error)


def predict_all(
    kind: str, rows: list[Row], programs: dict[str, hlo.Program]
) -> dict[tuple[str, float, float], float]:
    """(row, share of products, share of network) -> predicted seconds."""
    seconds: dict[tuple[str, float, float], float] = {}
    for row in tqdm(rows, desc=f"predicting on {kind}", disable=None):
        for matmul in MATMUL:
            for network in NETWORK:
                # A single node has no network: all shares give the same time.
                alone = row.topology.endswith(":1x8")
                known = seconds.get((row.name, matmul, NETWORK[0])) if alone else None
                rates = RATES[kind]
                rates = dataclasses.replace(rates, matmul=matmul, inter_node=network)
                found = known or predicted(row, programs[row.name], rates)
                seconds[row.name, matmul, network] = found
    return seconds


def main() -> None:
    """Predict every row with rates fitted to the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds, cache = ["a100", "h100"], Path("cache/plan")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="(default: both)")
    parser.add_argument("--cache", type=Path, default=cache, help=f"of programs (default: {cache})")
    parser.add_argument("--json", metavar="FILE", help="save the table")
    options = parser.parse_args()
    programs = {}
    for row in [row for row in ROWS if row.topology.split(":")[0] in options.kinds]:
        print(f"compiling {row.name} ({row.topology})", file=sys.stderr)
        programs[row.name] = compiled(row, options.cache)
    table, lines = [], []
    for kind in options.kinds:
        rows = [row for row in ROWS if row.topology.startswith(kind)]
        seconds = predict_all(kind, rows, programs)
        best = fit(rows, seconds)
        print(f"{kind}: products {best[0]}, network {best[1]} fit all rows best")
        for row in rows:
            matmul, network = fit([other for other in rows if other is not row], seconds)
            found = seconds[row.name, matmul, network]
            error = found / row.seconds - 1
            rates = {"matmul": matmul, "inter_node": network}
            numbers = {"measured": row.seconds, "predicted": found, "error": error, **rates}
            names = {"row": row.name, "topology": row.topology, "source": row.source}
            table.append({**names, **numbers})
            cells = [f"{row.seconds:.3f}", f"{found:.3f}", f"{error:+.1%}"]
            lines.append([row.name, row.topology, *cells, f"{matmul:.2f}", f"{network:.2f}"])
    columns = ["run", "cluster", "measured s", "predicted s", "error", "products", "network"]
    results = Results()
    results.table("Published runs, each predicted with rates fitted on the others", columns, lines)
    results.save(options.json, rows=table)


if __name__ == "__main__":
    main()
