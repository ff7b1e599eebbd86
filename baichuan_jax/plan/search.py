"""`plan --search`: compile the ways to run the same batch, and keep the fastest that fits.

First what is recomputed and the rows a pass, with the state shared by as many replicas as may be:
so each is tried with the most memory free. Then, for the best of these, fewer replicas to a copy of
the state. Not every pair of the two: a compilation takes minutes.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from baichuan_jax.config.schema import Config, ConfigError, MeshConfig
from baichuan_jax.hardware.accelerators import Topology
from baichuan_jax.plan.ahead_of_time import trace_step
from baichuan_jax.plan.rates import Rates
from baichuan_jax.plan.report import capacity_gib, report
from baichuan_jax.xla_flags import message_options

SHOWN = (
    *("remat", "micro_batch_size", "state", "gradient_dtype"),
    *("fits", "peak_gib", "predicted_step_seconds", "predicted_mfu"),
)
"""What is kept of the report of each candidate; None where it was not compiled."""
# Candidates whose times differ by less are equally fast: then the one with fewer replicas to a copy
# of the state is taken, whose copies can be compared and kept on hosts.
EQUAL = 0.002


class Left(NamedTuple):
    """Sizes of mesh.state that a setting excludes."""

    sizes: list[int]
    setting: str


def states(config: Config, num_devices: int) -> tuple[list[int], list[Left]]:
    """Sizes of mesh.state for the same replicas, ascending, and those that a setting excludes."""
    mesh = config.mesh.resolve(num_devices)
    replicas = mesh.data * mesh.state
    shared = math.gcd(replicas, config.model.hidden_size // mesh.fsdp)
    sizes, left = [size for size in range(1, shared + 1) if shared % size == 0], []
    for setting, given, most in (
        # A host's copy is the whole state.
        ("checkpoint.local_dir", config.checkpoint.local_dir is not None, 1),
        # There must be two copies to compare.
        ("resilience.check_every", config.resilience.check_every > 0, max(replicas // 2, 1)),
    ):
        if given and sizes[-1] > most:
            left.append(Left([size for size in sizes if size > most], setting))
            sizes = [size for size in sizes if size <= most]
    return sizes, left


def candidates(config: Config, num_devices: int) -> Iterator[Config]:
    """What is recomputed, and rows a pass, for the same batch.

    The least recomputation comes first.
    """
    # The rows of one pass divide a device's share of the batch.
    mesh = config.mesh.resolve(num_devices)
    share = config.train.global_batch_size // mesh.batch_shards
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= share and share % size == 0]
    for remat in ("none", "matmuls", "full"):
        model = dataclasses.replace(config.model, remat=remat)
        for size in sizes:
            train = dataclasses.replace(config.train, micro_batch_size=size)
            yield dataclasses.replace(config, train=train, model=model)


def search(
    config: Config, topology: Topology, devices: list[Any], rates: Rates
) -> tuple[Config, dict[str, Any]]:
    """The candidate of least predicted time that fits, and for the report what was found.

    Raises ConfigError where none fits.
    """
    sizes, left = states(config, topology.num_devices)
    mesh = config.mesh.resolve(topology.num_devices)
    with_state = lambda config, size: dataclasses.replace(config, mesh=_shared(mesh, size))
    trial = _Trial(topology, devices, rates)
    trial.run(candidates(with_state(config, sizes[-1]), topology.num_devices), "candidates")
    if not trial.fitting and len(sizes) > 1:
        # With several micro-batches gathered weights may take more memory than a share frees.
        trial.run(candidates(with_state(config, sizes[0]), topology.num_devices), "candidates")
    if not trial.fitting:
        raise ConfigError(trial.why_nothing_fits())
    best = trial.best()
    others = [size for size in sizes if size != best.mesh.state]
    trial.run([with_state(best, size) for size in others], "sizes of mesh.state")
    best = trial.best()
    # Never chosen: it changes the numbers of a run. Its row says what it would cost.
    dtype = best.train.gradient_dtype or best.model.dtype
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    train = dataclasses.replace(best.train, gradient_dtype=other)
    alike = _Trial(topology, devices, rates)
    alike.run([dataclasses.replace(best, train=train)], "train.gradient_dtype")
    left_out = [item._asdict() for item in left]
    return best, {"search": trial.tried + alike.tried, "search_left_out": left_out}


def _shared(mesh: MeshConfig, size: int) -> MeshConfig:
    """The mesh with copies of the state shared by `size` replicas each."""
    return dataclasses.replace(mesh, data=mesh.data * mesh.state // size, state=size)


class _Trial:
    """Compiles candidates, and keeps what was found of each."""

    def __init__(self, topology: Topology, devices: list[Any], rates: Rates) -> None:
        self._where = (topology, devices, rates)
        self.tried: list[dict[str, Any]] = []
        self.fitting: list[tuple[float, Config]] = []

    def run(self, configs: Iterable[Config], what: str) -> None:
        """Compile each. what: they are, for the bar."""
        # One after the other: each compilation uses all cores, and gigabytes of memory.
        # disable=None: no bar where stderr is no terminal.
        for config in tqdm(list(configs), desc=f"compiling {what}", unit="program", disable=None):
            result = _try(config, *self._where) | {
                "state": config.mesh.state,
                "gradient_dtype": config.train.gradient_dtype or config.model.dtype,
            }
            self.tried.append({name: result.get(name) for name in SHOWN})
            if result["fits"]:
                self.fitting.append((result["predicted_step_seconds"], config))

    def best(self) -> Config:
        """The fastest that fits; of equally fast ones that with the smallest mesh.state."""
        least = min(seconds for seconds, _ in self.fitting)
        equal = [item for item in self.fitting if item[0] <= least * (1 + EQUAL)]
        # Of equal times the first one, which recomputes least.
        return min(equal, key=lambda item: (item[1].mesh.state, item[0]))[1]

    def why_nothing_fits(self) -> str:
        """The message, with what each candidate takes."""
        hardware, state = self._where[0].hardware, self.tried[0]["state"]
        # The compiler may refuse a program that is too large, and not say its size.
        size = lambda gib: "too large to compile" if gib is None else f"{gib:.1f} GiB"
        listed = ", ".join(
            f"{item['remat']} x {item['micro_batch_size']:g}: {size(item['peak_gib'])}"
            for item in self.tried
        )
        return (
            f"nothing fits into {capacity_gib(hardware):.1f} GiB of {hardware.name}, with "
            f"mesh.state={state} ({listed}); raise mesh.fsdp or mesh.tensor, or use more devices"
        )


def _try(config: Config, topology: Topology, devices: list[Any], rates: Rates) -> dict[str, Any]:
    """A candidate's report; where the compiler finds that it does not fit, only that."""
    try:
        compile_step = trace_step(config, devices, message_options(config, topology))
        return report(compile_step(), topology, rates)
    # XLA raises several types here; only the text says that memory is exhausted.
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = {"remat": config.model.remat, "micro_batch_size": config.train.micro_batch_size}
        return {**sizes, "fits": False}
