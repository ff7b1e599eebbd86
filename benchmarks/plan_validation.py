"""Error of `plan`'s predictions on published runs, by leave-one-out cross-validation.

    python benchmarks/plan_validation.py [--cache cache/plan] [--json FILE]

Needs requirements-plan.txt. Every run (published_runs.py) is compared with our training step of its
model, batch, accumulation, sharding and recomputation: the step is compiled ahead of time for the
run's cluster (the programs are kept in the cache), and its time is predicted under a grid of rates.
On single nodes the share of the peak that products reach is fitted for each kind of GPU; over
several nodes the network's share, the contention and the stragglers as well. Each run is predicted
with the rates that fit the others of its table best: that error is the one to expect. Its range is
the interval that `plan` states.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
from jax.sharding import AbstractMesh
from published_runs import RUNS, Run
from results import Results
from tqdm import tqdm

from baichuan_jax.hardware.accelerators import Topology, parse_topology
from baichuan_jax.plan import hlo
from baichuan_jax.plan.interval import PERCENTILES, spread
from baichuan_jax.plan.prediction import predict
from baichuan_jax.plan.rates import NETWORK, RATES, assumptions_for
from baichuan_jax.sharding import AXES

CONFIGURATION = "configs/baichuan_7b_a800.yaml"
# The rates that are fitted on single nodes and on several, and the values that are tried.
MATMUL = {"matmul": np.arange(0.44, 0.90, 0.01)}
NODES = {
    "inter_node": np.array([0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    "contention": np.array([0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25]),
    "straggler": np.array([0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08]),
}
# The rates that XLA's scheduler is told. They are no table's: a fit must not change the programs
# that it is made from.
SCHEDULE = {
    "memory": 0.85,
    "intra_node": 0.78,
    "inter_node": 0.7,
    "contention": 0.06,
    "straggler": 0.0,
    "launch_us": 3.0,
    "intra_latency_us": 20.0,
    "inter_latency_us": 5.0,
}
SCHEDULE_PRODUCTS = {
    "a100": {"matmul": 0.68, "kernel": 0.65},
    "h100": {"matmul": 0.51, "kernel": 0.5},
}
# Modules of the package that change no program whose rates are given.
READERS = ("plan/rates.py", "plan/interval.py", "plan/report.py", "plan/search.py")
# A value of a rate fits as well as the best one where the mean error grows by so much at most.
AS_GOOD = 0.002


def plan_options(run: Run) -> list[str]:
    """The plan's options for the step of a run."""
    settings = {
        "model.scan_layers": "false",
        # As published, whatever the configuration's own mesh is.
        "mesh.data": -1,
        "mesh.state": 1,
        "mesh.fsdp": run.fsdp,
        "train.context_length": run.length,
        "train.micro_batch_size": run.rows,
        "train.global_batch_size": run.rows * run.accumulation * run.nodes * 8,
        **run.settings,
        **{f"hardware.{name}": value for name, value in run.hardware.items()},
        **{
            f"rates.{name}": value
            for name, value in (SCHEDULE | SCHEDULE_PRODUCTS[run.kind]).items()
        },
    }
    options = ["--config", CONFIGURATION, "--topology", run.topology]
    return options + [f"--{name}={value}" for name, value in settings.items()]


@functools.cache
def makers(package: Path, configuration: Path) -> str:
    """A digest of what makes a program beside its options: sources, configuration and compilers."""
    found = hashlib.sha256(configuration.read_bytes())
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name not in READERS:
            found.update(f"{name}\0{path.read_text(encoding='utf-8')}\0".encode())
    for name in ("jax", "jaxlib", "triton", "jax-triton"):
        found.update(f"{name}\0{importlib.metadata.version(name)}\0".encode())
    return found.hexdigest()


def compiled(run: Run, cache: Path) -> hlo.Program:
    """The run's program, compiled once.

    In a process of its own: the plan chooses a backend for the cluster before jax starts.
    """
    cache.mkdir(parents=True, exist_ok=True)
    options = plan_options(run)
    # Named by all that makes it: a corrected run is compiled anew, and so is every run after the
    # step has changed.
    made_by = makers(REPOSITORY / "baichuan_jax", REPOSITORY / CONFIGURATION)
    name = hashlib.sha256(" ".join([*options, made_by]).encode()).hexdigest()[:16]
    path = cache / f"{run.topology.replace(':', '-')}-{name}.hlo.txt"
    if not path.exists():
        files = ["--hlo", str(path.resolve()), "--output", str(cache.resolve())]
        command = [sys.executable, "-m", "baichuan_jax.plan", *options, *files]
        subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return hlo.parse(path.read_text(encoding="utf-8"))


def choices(axes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All combinations of some rates' values: an array [choices] for each rate."""
    grids = np.meshgrid(*axes.values(), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(axes, grids, strict=True)}


class Case:
    """A run, and the program of ours that it is compared with."""

    def __init__(self, run: Run, program: hlo.Program) -> None:
        self.run, self.program = run, program
        topology = parse_topology(run.topology)
        hardware = replace(topology.hardware, **run.hardware)
        self.topology = Topology(hardware, topology.shape)
        self.mesh = AbstractMesh((topology.num_devices // run.fsdp, 1, run.fsdp, 1, 1), AXES)

    def errors(self, rates: Mapping[str, np.ndarray]) -> np.ndarray:
        """Predicted over measured seconds, less 1, for each choice of some rates [choices]."""
        chosen = replace(RATES[self.run.kind], **rates)
        found = predict(self.program, self.mesh, self.topology, chosen)
        return np.asarray(found.seconds) / self.run.seconds - 1

    def interval(self) -> tuple[float, float]:
        """Seconds between which plan says that the step takes, the run's network being known."""
        given = {NETWORK: self.topology.hardware.inter_node_gbps}
        assumptions = assumptions_for(self.topology, given=given)
        found = spread(self.program, self.mesh, self.topology, assumptions).samples
        low, high = np.percentile(found, PERCENTILES)
        return float(low), float(high)

    def row(self, rates: Mapping[str, float], error: float) -> dict:
        """What is reported; error: of the prediction with these rates."""
        low, high = self.interval()
        seconds = self.run.seconds
        return {
            "run": self.run.name,
            "topology": self.run.topology,
            "source": self.run.source,
            "note": self.run.note,
            "measured": seconds,
            "predicted": seconds * (1 + float(error)),
            "error": float(error),
            "range": [low, high],
            "within": low <= seconds <= high,
            "rates": rates,
        }


def best(errors: np.ndarray) -> int:
    """The choice of rates with the least mean error, without sign; errors: [runs, choices].

    Not squared: one run of slower software would pull all rates to itself.
    """
    return int(np.abs(errors).mean(axis=0).argmin())


def left_out(errors: np.ndarray) -> list[int]:
    """For each run the choice of rates that fits the other runs best; errors: [runs, choices]."""
    return [best(np.delete(errors, index, axis=0)) for index in range(len(errors))]


def without_software(errors: np.ndarray, series: Sequence[Hashable]) -> np.ndarray:
    """Errors where each series has the share of products that suits it best [runs, choices].

    errors: [runs, shares of products, choices of other rates]. Sources differ in their kernels,
    which slow one GPU as well as a thousand. What is left tells of the network.
    """
    found = np.empty((errors.shape[0], errors.shape[2]))
    for one in dict.fromkeys(series):
        rows = [index for index, other in enumerate(series) if other == one]
        own = errors[rows]
        share = np.abs(own).mean(axis=0).argmin(axis=0)
        found[rows] = own[:, share, np.arange(share.size)]
    return found


def as_good(errors: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """The least and the greatest value of a rate that fits nearly as well as the best.

    errors: [runs, choices]; values: the rate's in each choice [choices].
    """
    mean = np.abs(errors).mean(axis=0)
    fitting = values[mean <= mean.min() + AS_GOOD]
    return float(fitting.min()), float(fitting.max())


def fit_nodes(
    cases: Sequence[Case], errors: np.ndarray, others: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float, float]]:
    """The network's share, contention and stragglers: (value, low, high) of each.

    errors: [runs, shares of products, choices]; others: the rates' values in each choice.
    """
    left = without_software(errors, [case.run.series for case in cases])
    choice = best(left)
    return {name: (values[choice], *as_good(left, values)) for name, values in others.items()}


def single_nodes(cases: Sequence[Case]) -> tuple[float, list[dict]]:
    """The share of products that fits single nodes best, and each run predicted by the others."""
    axes = choices(MATMUL)
    errors = np.stack([case.errors(axes) for case in cases])
    rows = []
    for case, own, choice in zip(cases, errors, left_out(errors), strict=True):
        rates = {"matmul": float(axes["matmul"][choice])}
        rows.append(case.row(rates, own[choice]))
    return float(axes["matmul"][best(errors)]), rows


def several_nodes(
    cases: Sequence[Case], single: Sequence[Case], matmul: float
) -> tuple[dict[str, tuple[float, float, float]], list[dict]]:
    """The rates of the network, and each run predicted by the others.

    matmul: the share of products of single nodes. Runs of the same series on one node (`single`)
    tell how fast its products are.
    """
    every = [*cases, *single]
    axes = choices({**MATMUL, **NODES})
    shape = (len(MATMUL["matmul"]), -1)
    others = {name: axes[name].reshape(shape)[0] for name in NODES}
    shown = tqdm(every, desc="predicting", disable=None)
    errors = np.stack([case.errors(axes).reshape(shape) for case in shown])
    series = [case.run.series for case in every]
    place = int(np.abs(MATMUL["matmul"] - matmul).argmin())
    telling = [index for index, case in enumerate(every) if case.run.overlaps]
    rows = []
    for index, case in enumerate(cases):
        rest = [other for other in telling if other != index]
        left = without_software(errors[rest], [series[other] for other in rest])
        choice = best(left)
        rates = {"matmul": matmul, **{name: float(others[name][choice]) for name in others}}
        row = case.row(rates, errors[index, place, choice])
        # As if one GPU had been measured with the run's software.
        own = [other for other in rest if series[other] == series[index]]
        if own:
            row["own_error"] = float(errors[index, best(errors[own, :, choice]), choice])
        rows.append(row)
    return fit_nodes([every[index] for index in telling], errors[telling], others), rows


def cells(row: dict) -> list[str]:
    """A row of the printed tables."""
    low, high = row["range"]
    own = row.get("own_error")
    return [
        row["run"],
        row["topology"],
        f"{row['measured']:.3f}",
        f"{row['predicted']:.3f}",
        f"{row['error']:+.1%}",
        "" if own is None else f"{own:+.1%}",
        f"{low:.3f} to {high:.3f}",
        "yes" if row["within"] else "no",
        row["note"],
    ]


COLUMNS = [
    *("run", "cluster", "measured s", "predicted s", "error", "error, products known"),
    *("plan's range, s", "within", "note"),
]


def main() -> None:
    """Predict every run with rates fitted to the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds, cache = ["a100", "h100"], Path("cache/plan")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="(default: both)")
    parser.add_argument(
        "--nodes", choices=("one", "all"), default="all", help="one: only runs on a single node"
    )
    parser.add_argument("--cache", type=Path, default=cache, help=f"of programs (default: {cache})")
    parser.add_argument("--json", metavar="FILE", help="save the table")
    options = parser.parse_args()
    results, table, fitted = Results(), [], {}
    for kind in options.kinds:
        runs = [run for run in RUNS if run.kind == kind]
        if options.nodes == "one":
            runs = [run for run in runs if run.nodes == 1]
        cases = []
        for run in runs:
            print(f"{run.name} ({run.topology})", file=sys.stderr)
            cases.append(Case(run, compiled(run, options.cache)))
        one = [case for case in cases if case.run.nodes == 1]
        matmul, rows = single_nodes(one)
        fitted[kind] = {"matmul": matmul}
        results.table(
            f"{kind}, single nodes: each run predicted with the share of products of the others",
            COLUMNS,
            [cells(row) for row in rows],
        )
        results.say(f"{kind}: products at {matmul:.2f} of the peak fit all single nodes best")
        table += rows
        # A network without RDMA has a share of its own.
        for network in dict.fromkeys(run.network for run in runs if run.nodes > 1):
            several = [c for c in cases if c.run.nodes > 1 and c.run.network == network]
            rates, rows = several_nodes(several, one, matmul)
            fitted[kind][network] = rates
            results.table(
                f"{kind}, several nodes ({network}): with the rates of the network of the others",
                COLUMNS,
                [cells(row) for row in rows],
            )
            for name, (value, low, high) in rates.items():
                results.say(f"{kind}, {network}: {name} {value:g} fits best, {low:g} to {high:g}")
            table += rows
    results.save(options.json, rows=table, fitted=fitted)


if __name__ == "__main__":
    main()
