"""How well `plan` foretells what others measured: compile their runs with our program, fit the rates, predict each from the others.

    python benchmarks/plan_validation.py [--cache cache/plan] [--json FILE]

Needs requirements-plan.txt. Every row is a published measurement; its model, batch, mesh and
recomputation are given to our training step, which is compiled for its cluster (kept in the cache)
and predicted. Two rates are fitted for each kind of GPU to the other rows of that kind, the share
of the peak that products reach and the share of the network: the left-out row's error is what the
plan can be trusted to.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from jax.sharding import AbstractMesh
from results import Results
from tqdm import tqdm

from baichuan_jax.hardware.accelerators import Topology, parse_topology
from baichuan_jax.plan import hlo, roofline
from baichuan_jax.sharding import AXES


class Row(NamedTuple):
    """A published measurement."""

    name: str
    topology: str
    seconds: float
    """Of a step of `rows` rows of `length` tokens a device."""
    rows: int
    length: int
    settings: dict[str, object]
    hardware: dict[str, float]
    source: str


# MPT's block has 12 D^2 weights, as a SwiGLU block of width 8/3 D has; heads and vocabulary as
# published.
MPT_7B = {"model.intermediate_size": 10920, "model.vocab_size": 50368}
MPT_13B = {
    "model.hidden_size": 5120,
    "model.num_layers": 40,
    "model.num_heads": 40,
    "model.intermediate_size": 13656,
    "model.vocab_size": 50368,
}
LLAMA2_7B = {"model.vocab_size": 32000}
FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md, A100 80GB"
MAXTEXT = "AI-Hypercomputer/maxtext src/maxtext/configs/gpu/a3/llama_2_7b/README.md"
LLAMA2_FLOPS = (
    6 * 6.738e9 + 12 * 32 * 4096 * 4096
)  # a token, as MaxText counted: all parameters, full attention
A3 = {"inter_node_gbps": 100.0}  # a3-highgpu-8g: 4 x 200 Gb/s a node of 8


def _foundry(
    model: dict, name: str, rows: int, length: int, tokens_per_second: float, remat: str
) -> Row:
    return Row(
        f"{name}, {length} tokens",
        "a100:1x8",
        rows * length / tokens_per_second,
        rows,
        length,
        {**model, "model.remat": remat},
        {},
        FOUNDRY,
    )


def _maxtext(nodes: int, tflops: float) -> Row:
    seconds = 4 * 4096 * LLAMA2_FLOPS / (tflops * 1e12)
    return Row(
        f"Llama2-7B, {nodes} x A3",
        f"h100:{nodes}x8",
        seconds,
        4,
        4096,
        {**LLAMA2_7B, "model.remat": "none"},
        A3,
        MAXTEXT,
    )


ROWS = [
    _foundry(MPT_7B, "MPT-7B", 6, 2048, 4641, "none"),
    _foundry(MPT_7B, "MPT-7B", 16, 4096, 3684, "full"),
    _foundry(MPT_7B, "MPT-7B", 8, 8192, 3206, "full"),
    _foundry(MPT_13B, "MPT-13B", 2, 2048, 2262, "none"),
    Row(
        "Llama2-7B, DGX H100",
        "h100:1x8",
        0.721,
        2,
        4096,
        {**LLAMA2_7B, "model.remat": "none"},
        {},
        "NVIDIA/JAX-Toolbox docs/frameworks/maxtext/README.md",
    ),
    *(
        _maxtext(nodes, tflops)
        for nodes, tflops in ((1, 492), (2, 422), (4, 407), (8, 409), (16, 375))
    ),
]


def compiled(row: Row, cache: Path) -> hlo.Program:
    """The row's program, compiled once."""
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
        words = [f"--{name}={value}" for name, value in settings.items()]
        command = [
            sys.executable,
            "-m",
            "baichuan_jax.plan",
            "--config",
            "configs/baichuan_7b_a800.yaml",
        ]
        command += [
            "--topology",
            row.topology,
            "--hlo",
            str(path.resolve()),
            "--output",
            str(cache.resolve()),
            *words,
        ]
        subprocess.run(
            command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL
        )
    return hlo.parse(path.read_text(encoding="utf-8"))


def predicted(row: Row, program: hlo.Program, rates: roofline.Rates) -> float:
    """Seconds of the row's step."""
    topology = parse_topology(row.topology)
    topology = Topology(dataclasses.replace(topology.hardware, **row.hardware), topology.shape)
    mesh = AbstractMesh((topology.num_devices // 8, 8, 1, 1), AXES)
    return roofline.predict(program, mesh, topology, rates).seconds


MATMUL = [round(float(share), 2) for share in np.arange(0.46, 0.87, 0.02)]
NETWORK = [0.2, 0.3, 0.4, 0.6, 0.8]


def fit(rows: list[Row], seconds: dict[tuple[str, float, float], float]) -> tuple[float, float]:
    """The shares of peak and network with the least squared relative error over the rows."""

    def error(shares: tuple[float, float]) -> float:
        return sum((seconds[row.name, *shares] / row.seconds - 1) ** 2 for row in rows)

    return min(((matmul, network) for matmul in MATMUL for network in NETWORK), key=error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=["a100", "h100"],
        default=["a100", "h100"],
        help="(default: both)",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("cache/plan"), help="folder of compiled programs"
    )
    parser.add_argument("--json", metavar="FILE", help="save the table")
    options = parser.parse_args()
    programs = {}
    for row in [row for row in ROWS if row.topology.split(":")[0] in options.kinds]:
        print(f"compiling {row.name} ({row.topology})", file=sys.stderr)
        programs[row.name] = compiled(row, options.cache)
    table, lines = [], []
    for kind in options.kinds:
        rows = [row for row in ROWS if row.topology.startswith(kind)]
        seconds = {}
        for row in tqdm(rows, desc=f"predicting on {kind}", disable=None):
            alone = row.topology.endswith(":1x8")
            for matmul in MATMUL:
                for network in NETWORK:
                    known = seconds.get((row.name, matmul, NETWORK[0])) if alone else None
                    rates = dataclasses.replace(
                        roofline.RATES[kind], matmul=matmul, inter_node=network
                    )
                    seconds[row.name, matmul, network] = known or predicted(
                        row, programs[row.name], rates
                    )
        print(
            f"{kind}: products {fit(rows, seconds)[0]}, network {fit(rows, seconds)[1]} fit all rows best"
        )
        for row in rows:
            matmul, network = fit([other for other in rows if other is not row], seconds)
            found = seconds[row.name, matmul, network]
            table.append(
                {
                    "row": row.name,
                    "topology": row.topology,
                    "measured": row.seconds,
                    "predicted": found,
                    "error": found / row.seconds - 1,
                    "matmul": matmul,
                    "inter_node": network,
                    "source": row.source,
                }
            )
            lines.append(
                [
                    row.name,
                    row.topology,
                    f"{row.seconds:.3f}",
                    f"{found:.3f}",
                    f"{found / row.seconds - 1:+.1%}",
                    f"{matmul:.2f}",
                    f"{network:.2f}",
                ]
            )
    columns = ["run", "cluster", "measured s", "predicted s", "error", "products", "network"]
    results = Results()
    results.table("Published runs, each predicted with rates fitted on the others", columns, lines)
    results.save(options.json, rows=table)


if __name__ == "__main__":
    main()
