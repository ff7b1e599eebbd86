"""Checks before a run, in seconds: can every device count and remember, every pair of hosts talk, every host save?

`train` makes them at every start; `python -m baichuan_jax.preflight --config FILE` makes them
alone, started on every host like it.

What a check finds is a BadHost error that names the processes (exit code 79), a ConfigError (78)
where no host is to blame, or SaveFailed (74) where none can save.
"""

import dataclasses
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_jax.config.files import make_parser, parse_config
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.hardware.processes import initialize_processes
from baichuan_jax.resilience.causes import BadHost, SaveFailed
from baichuan_jax.resilience.coordination import coordinator_address, gather
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.console import Display

BAD_JAX = {
    "0.10.2": "it miscompiles on the CPU (jax#39103)",
    "0.11.0": "it miscompiles on the CPU (jax#39103)",
}
MATRIX = 512  # side of the products; small integers, so that float32 holds every sum exactly, in any order
MEMORY_SHARE, MEMORY_ON_CPU = (
    0.02,
    16 << 20,
)  # of a device's memory, and bytes where it does not tell, that are written and read
COLLECTIVE_SECONDS = 60.0  # for one collective with its compilation and first connection
MAX_SKEW_SECONDS = 5.0  # between hosts' clocks: reports and events would be in the wrong order


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the checks measured: seconds by check, and warnings that stop nothing."""

    seconds: dict[str, float]
    warnings: list[str]


def preflight(config: Config) -> Findings:
    """Make all checks, on all processes together. Raises BadHost, ConfigError, SaveFailed."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def took(check: str) -> None:
        nonlocal began
        seconds[check], began = time.perf_counter() - began, time.perf_counter()

    warnings = compare_hosts(gather("preflight/host", _describe()), coordinator_address())
    took("versions and clocks")
    _refuse(gather("preflight/devices", _device_fault()))
    took("devices")
    faults = gather("preflight/storage", storage_fault(config.run_path / "checkpoints"))
    if all(faults):
        raise SaveFailed(f"preflight: {faults[0]}")
    _refuse(faults)
    if (local := config.checkpoint.local_path) is not None:
        _refuse(gather("preflight/local storage", storage_fault(local)))
    took("storage")
    if jax.process_count() > 1:
        rounds = [
            gather(f"preflight/pairs {number}", _try_pair(pairs))
            for number, pairs in enumerate(pairs_of(jax.process_count()))
        ]
        took("pairs")
        warnings += judge_pairs(rounds)
        together = gather("preflight/all", _in_time(lambda: _sum_over(jax.devices())))
        if not all(together):
            raise BadHost(
                "preflight: every pair of hosts can talk, and all together cannot: look at the switches between them"
            )
        took("all")
    return Findings(seconds, warnings)


def _describe() -> dict[str, Any]:
    """What must not differ between hosts, and the time."""
    packages = {
        name: version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    device = jax.local_devices()[0]
    return {
        "host": platform.node(),
        "time": time.time(),
        "versions": {
            "python": platform.python_version(),
            **packages,
            "driver": str(device.client.platform_version).splitlines()[0],
        },
        "devices": [jax.local_device_count(), device.device_kind],
    }


def compare_hosts(hosts: Sequence[Mapping[str, Any]], coordinator: str | None) -> list[str]:
    """Warnings about processes' descriptions. Raises ConfigError for a bad jax, for other versions or devices, for loopback."""
    found = hosts[0]["versions"]["jax"]
    if found in BAD_JAX:
        raise ConfigError(f"jax {found}: {BAD_JAX[found]}; install another (requirements.txt)")
    for what in ("versions", "devices"):
        for process, host in enumerate(hosts):
            if host[what] != hosts[0][what]:
                raise ConfigError(
                    f"process {process} on {host['host']} has other {what} than process 0 on {hosts[0]['host']}: {host[what]} and "
                    f"{hosts[0][what]}; install the same everywhere"
                )
    names = {host["host"] for host in hosts}
    if (
        coordinator is not None
        and len(names) > 1
        and coordinator.rsplit(":", 1)[0] in ("localhost", "127.0.0.1", "[::1]", "::1")
    ):
        raise ConfigError(
            f"the coordinator's address {coordinator} is each host's own; give the one by which all reach process 0"
        )
    times = [host["time"] for host in hosts]
    skew = max(times) - min(times)
    return (
        [f"clocks differ by up to {skew:.1f} s: times of events on several hosts mislead"]
        if skew > MAX_SKEW_SECONDS
        else []
    )


def _refuse(faults: Sequence[str | None]) -> None:
    """Raise BadHost with the processes that have a fault."""
    bad = {process: words for process, words in enumerate(faults) if words}
    if bad:
        told = "; ".join(
            f"process {process}: {words}" for process, words in sorted(bad.items())[:4]
        )
        raise BadHost(f"preflight: {told}", tuple(sorted(bad)))


def _device_fault() -> str | None:
    """What is wrong with this process's devices; None: nothing."""
    for device in jax.local_devices():
        if not products_are_right(device):
            return f"{device} multiplies matrices wrongly"
        if not memory_is_right(device):
            return f"{device} does not remember what was written"
    return None


def products_are_right(device: Any, multiply: Callable = jnp.matmul) -> bool:
    """Whether a device's products of integer matrices equal NumPy's in 64-bit integers."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, (MATRIX, MATRIX)) for _ in range(2))
    product = jax.jit(multiply)(*(jax.device_put(x.astype(np.float32), device) for x in (a, b)))
    return np.array_equal(np.asarray(product).astype(np.int64), a @ b)


def memory_is_right(device: Any) -> bool:
    """Whether a share of a device's memory gives back two patterns, one the other's complement."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    count = (int(limit * MEMORY_SHARE) if limit else MEMORY_ON_CPU) // 4
    write = jax.jit(lambda mask: jnp.arange(count, dtype=jnp.uint32) ^ mask)
    wrong = jax.jit(lambda x, mask: jnp.sum(x != jnp.arange(count, dtype=jnp.uint32) ^ mask))
    masks = [jax.device_put(np.uint32(mask), device) for mask in (0x55555555, 0xAAAAAAAA)]
    return all(int(wrong(write(mask), mask)) == 0 for mask in masks)


def storage_fault(folder: Path) -> str | None:
    """What is wrong with writing and reading a mebibyte where checkpoints go; None: nothing."""
    content = os.urandom(1 << 20)
    file = folder / f".preflight-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        same = file.read_bytes() == content
        file.unlink()
    except OSError as error:
        return f"cannot save in {folder}: {error}"
    return None if same else f"{folder} gives back other bytes than were written"


def pairs_of(count: int) -> list[list[tuple[int, int]]]:
    """Two rounds of disjoint pairs of processes; each has another partner in the second, so that a bad one fails in both."""
    first = [(a, a + 1) for a in range(0, count - 1, 2)]
    if count == 2:
        return [first]
    second = [(a, a + 1) for a in range(1, count - 1, 2)]
    return [first, [*second, (count - 1, 0)] if count % 2 == 0 else second]


def judge_pairs(rounds: Sequence[Sequence[tuple[Sequence[int], bool] | None]]) -> list[str]:
    """From every process's (pair, whether it worked) in each round. Raises BadHost with those that failed with every partner.

    A pair that failed while both worked with others is a warning: the way between them is bad, not
    one of them.
    """
    tried: dict[int, list[bool]] = {}
    failed = set()
    for results in rounds:
        for process, result in enumerate(results):
            if result is not None:
                tried.setdefault(process, []).append(result[1])
                if not result[1]:
                    failed.add(tuple(result[0]))
    suspects = {process for process, worked in tried.items() if not any(worked)}
    # A partner of a suspect that had no other partner is not a suspect for that.
    named = {p for p in suspects if len(tried[p]) > 1} or suspects
    if named:
        raise BadHost(
            f"preflight: collectives of {sorted(failed)} failed",
            tuple(sorted(named)) if len(named) == 1 else (),
        )
    return [
        f"processes {a} and {b} cannot talk, each of them can with others"
        for a, b in sorted(failed)
    ]


def _try_pair(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], bool] | None:
    mine = next((pair for pair in pairs if jax.process_index() in pair), None)
    if mine is None:
        return None
    devices = [
        next(device for device in jax.devices() if device.process_index == process)
        for process in mine
    ]
    return mine, _in_time(lambda: _sum_over(devices))


def _sum_over(devices: Sequence[Any]) -> bool:
    """Whether a sum over these devices, which several processes own, is right."""
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("all"))
    values = np.arange(len(devices), dtype=np.float32) + 1
    x = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(x)
    return float(jax.device_get(total)) == values.sum()


def _in_time(check: Callable[[], bool]) -> bool:
    """A check's result; False where it raised or did not come back in time (its thread stays, and the process is about to leave)."""
    results: list[bool] = []

    def run() -> None:
        try:
            results.append(check())
        except Exception as error:
            print(f"preflight: {type(error).__name__}: {error}", file=sys.stderr)
            results.append(False)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(COLLECTIVE_SECONDS)
    return bool(results and results[0])


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = make_parser(
        "python -m baichuan_jax.preflight",
        "Check devices, storage and the ways between hosts, in seconds.",
    )
    config = parse_config(parser, words)
    initialize_processes(config.distributed, config.resilience)
    findings = preflight(config)
    display = Display(active=jax.process_index() == 0)
    for warning in findings.warnings:
        display.say(warning, style="yellow")
    rows = [[check, f"{seconds:.2f}"] for check, seconds in findings.seconds.items()]
    display.table(
        f"Checks of {jax.process_count()} process(es), {jax.device_count()} device(s): all well",
        ["", "seconds"],
        rows,
    )
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
