"""Checks before a run, in seconds: devices, storage, and collectives between hosts.

`train` runs them at every start; `python -m baichuan_jax.preflight --config FILE` runs them alone,
started on every host like `train`. All processes run every check together and exchange the results
through the coordinator, which needs no collective. A fault raises BadHost (exit code 79) with the
processes that have it, ConfigError (78) where no host can be named, or SaveFailed (74) where no
host can save.
"""

import contextlib
import dataclasses
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_jax.checkpoint.local_copies import SETTING
from baichuan_jax.config.files import make_parser, parse_config
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.resilience.addresses import exposure, is_each_hosts_own, listening
from baichuan_jax.resilience.causes import BadHost, SaveFailed
from baichuan_jax.resilience.coordination import (
    coordinator_address,
    describe_difference,
    gather,
    refuse_together,
)
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.resilience.processes import initialize_processes
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import draft_of, new_draft, remove_leftovers
from baichuan_jax.runs.private import refuse_planted_links, trusted_folder

BAD_JAX = dict.fromkeys(("0.10.2", "0.11.0"), "it miscompiles on the CPU (jax#39103)")
# Side of the products. Their elements are small integers, so that float32 holds every sum exactly,
# in any order of summation.
MATRIX = 512
MEMORY_SHARE = 0.02  # of a device's memory that is written and read
MEMORY_ON_CPU = 16 << 20  # bytes of it where the device does not report its memory
COLLECTIVE_SECONDS = 60.0  # for one collective with its compilation and first connection
MAX_SKEW_SECONDS = 5.0  # between hosts' clocks: reports and events would be in the wrong order


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the checks measured."""

    seconds: dict[str, float]
    """By check."""
    warnings: list[str]
    """What is wrong and stops nothing."""


def preflight(config: Config) -> Findings:
    """Run all checks, on all processes together. Raises BadHost, ConfigError, SaveFailed."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def took(check: str) -> None:
        nonlocal began
        seconds[check], began = time.perf_counter() - began, time.perf_counter()

    # The cheapest first, and what would make the later ones fail for the wrong reason.
    warnings = compare_hosts(gather("preflight/host", _describe()), coordinator_address())
    took("versions and clocks")
    _refuse(gather("preflight/devices", _device_fault()))
    took("devices")
    planted = lambda: refuse_planted_links(config.run_path, "run_dir")
    refuse_together("preflight/run folder", planted)
    faults = gather("preflight/storage", storage_fault(config.run_path / "checkpoints"))
    if all(faults):  # the storage itself, and not a host
        raise SaveFailed(f"preflight: {faults[0]}")
    _refuse(faults)
    # A host whose own disk fails is left out, also where all of them fail: nothing else would help.
    if (local := config.checkpoint.local_path) is not None:
        refuse_together("preflight/local folder", lambda: _require_trusted(local))
        _refuse(gather("preflight/local storage", storage_fault(local)))
    took("storage")
    if jax.process_count() > 1:
        # Pairs first: a collective of all would fail too, and not say whose fault it is.
        rounds = [
            gather(f"preflight/pairs {number}", _try_pair(pairs))
            for number, pairs in enumerate(pairs_of(jax.process_count()))
        ]
        took("pairs")
        warnings += judge_pairs(rounds)
        together = gather("preflight/all", _in_time(lambda: _sum_over(jax.devices())))
        if not all(together):
            raise BadHost(
                "preflight: collectives of every pair of hosts work, and those of all hosts fail: "
                "look at the switches between them"
            )
        took("all")
    # Last: collectives open ports of their own.
    warnings += exposed(gather("preflight/ports", (platform.node(), listening())))
    took("open ports")
    return Findings(seconds, warnings)


def _describe() -> dict[str, Any]:
    """What must not differ between hosts, and the time."""
    # Of what decides about the compiled program or the checkpoint's format.
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.local_devices()[0]
    return {
        "host": platform.node(),
        "time": time.time(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
            "driver": str(device.client.platform_version).splitlines()[0],
        },
        "devices": {"their number": jax.local_device_count(), "their kind": device.device_kind},
    }


def compare_hosts(hosts: Sequence[Mapping[str, Any]], coordinator: str | None) -> list[str]:
    """Warnings from the descriptions of all processes.

    Raises ConfigError for a version of jax that is known to be wrong, for versions or devices that
    differ, and for a coordinator at a loopback address, which is another one on each host.
    """
    # Different versions would compile different programs, whose collectives do not match.
    found = hosts[0]["versions"]["jax"]
    if found in BAD_JAX:
        raise ConfigError(f"jax {found}: {BAD_JAX[found]}; install another (requirements.txt)")
    for what in ("versions", "devices"):
        for process, host in enumerate(hosts):
            if host[what] != hosts[0][what]:
                place, advice = (
                    f"process {process} on {host['host']}",
                    "install the same everywhere",
                )
                raise ConfigError(
                    describe_difference(what, hosts[0][what], host[what], place, advice)
                )
    several = len({host["host"] for host in hosts}) > 1
    if several and coordinator is not None and is_each_hosts_own(coordinator):
        raise ConfigError(
            f"the coordinator's address {coordinator} is each host's own; "
            "give the one by which all reach process 0"
        )
    times = [host["time"] for host in hosts]
    skew = max(times) - min(times)
    if skew <= MAX_SKEW_SECONDS:
        return []
    return [f"clocks differ by up to {skew:.1f} s: times of events on several hosts mislead"]


def exposed(hosts: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> list[str]:
    """A warning where strangers may reach ports of a run; none where they cannot.

    From every process's host and (address, port) on which it listens: those on all addresses of a
    host, or on a public one. A firewall before them cannot be seen from inside.
    """
    found = [
        f"process {process} on {host} listens on port {port} of {where}"
        for process, (host, listening) in enumerate(hosts)
        for address, port in listening
        if (where := exposure(address)) is not None
    ]
    if not found:
        return []
    more = f" (and {len(found) - 1} more ports like it)" if len(found) > 1 else ""
    return [
        f"{found[0]}{more}: whoever reaches it can end this run, since nothing asks who connects; "
        "give process 0 an address of a private network, or keep others out with a firewall "
        "(docs/operations.md, Trusted network)"
    ]


def _refuse(faults: Sequence[str | None]) -> None:
    """Raise BadHost with the processes that have a fault."""
    bad = {process: fault for process, fault in enumerate(faults) if fault}
    if bad:
        listed = [f"process {process}: {fault}" for process, fault in list(bad.items())[:4]]
        raise BadHost(f"preflight: {'; '.join(listed)}", tuple(bad))


def _device_fault() -> str | None:
    """What is wrong with this process's devices; None: nothing."""
    # The first fault is enough: the host is left out as a whole.
    for device in jax.local_devices():
        if not products_are_right(device):
            return f"{device} multiplies matrices wrongly"
        if not memory_is_right(device):
            return f"{device} returns other values than were written to its memory"
    return None


def products_are_right(device: Any, multiply: Callable = jnp.matmul) -> bool:
    """Whether a device's product of two integer matrices is right.

    Silent data corruption of a device shows as a wrong sum (Hochschild et al. 2021, Cores that
    don't count). The host checks that all elements are integers of a possible size, and that
    (AB)r = A(Br) for a random vector r (Freivalds 1977): exact arithmetic, in a hundredth of the
    time of a product of its own, for each of a host's devices. No element of r is 0, so one wrong
    element in a row is always seen, and several with a probability of 1 - 1e-6 at least.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, (MATRIX, MATRIX)) for _ in range(2))
    r = rng.integers(1, 1 << 20, MATRIX)
    product = jax.jit(multiply)(*(jax.device_put(x.astype(np.float32), device) for x in (a, b)))
    elements = np.asarray(product, np.float64)
    # A NaN equals nothing; a sum of 512 products is at most 512 * 8 * 8.
    possible = (elements == elements.round()) & (np.abs(elements) <= MATRIX * 8 * 8)
    return bool(possible.all()) and np.array_equal(elements.astype(np.int64) @ r, a @ (b @ r))


def memory_is_right(device: Any) -> bool:
    """Whether a share of a device's memory returns two patterns, one the other's complement.

    With both, every bit is 0 once and 1 once.
    """
    # Each element holds its own index, so that a wrong address is seen too.
    limit = (device.memory_stats() or {}).get("bytes_limit")
    count = (int(limit * MEMORY_SHARE) if limit else MEMORY_ON_CPU) // 4
    write = jax.jit(lambda mask: jnp.arange(count, dtype=jnp.uint32) ^ mask)
    wrong = jax.jit(lambda x, mask: jnp.sum(x != jnp.arange(count, dtype=jnp.uint32) ^ mask))
    masks = [jax.device_put(np.uint32(mask), device) for mask in (0x55555555, 0xAAAAAAAA)]
    return all(int(wrong(write(mask), mask)) == 0 for mask in masks)


def _require_trusted(folder: Path) -> None:
    """Raise ConfigError where other users of this host could replace what is written in a folder.

    Its rights stay: it may be /dev/shm, and the run has a folder of its own in it.
    """
    # A disk that fails: `storage_fault` says it, and the host is left out.
    with contextlib.suppress(OSError):
        trusted_folder(folder, SETTING)


def storage_fault(folder: Path) -> str | None:
    """What is wrong with writing and reading a mebibyte where checkpoints go; None: nothing."""
    # Random, so that no cache or compression can answer from something older.
    content = os.urandom(1 << 20)
    file = draft_of(folder / ".preflight")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of a launch that was killed here.
        remove_leftovers(folder, ".preflight")
        with new_draft(file) as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())  # a full or broken disk reports it here at the latest
        same = file.read_bytes() == content
        file.unlink()
    except OSError as error:
        return f"cannot save in {folder}: {error}"
    return None if same else f"{folder} returns other bytes than were written"


def pairs_of(count: int) -> list[list[tuple[int, int]]]:
    """Two rounds of disjoint pairs of processes.

    Each process has another partner in the second round, so that a bad one fails in both, and a
    good one with a bad partner only once.
    """
    # 0-1 2-3 4-5, then 1-2 3-4 5-0. Of an odd number the first and the last have one partner only.
    first = [(a, a + 1) for a in range(0, count - 1, 2)]
    if count == 2:
        return [first]
    second = [(a, a + 1) for a in range(1, count - 1, 2)]
    return [first, [*second, (count - 1, 0)] if count % 2 == 0 else second]


def judge_pairs(rounds: Sequence[Sequence[tuple[Sequence[int], bool] | None]]) -> list[str]:
    """Warnings from every process's (pair, whether it worked) in each round.

    A pair that failed while both worked with others is a warning: the link between them is bad, not
    one of them. Raises BadHost with the processes that failed with every partner; with none where
    it cannot tell which of several.
    """
    tried: dict[int, list[bool]] = {}
    failed = set()
    for results in rounds:
        for process, result in enumerate(results):
            if result is not None:
                tried.setdefault(process, []).append(result[1])
                if not result[1]:
                    failed.add(tuple(result[0]))
    # The host that fails with everybody is bad; a link is bad where both ends work with others.
    suspects = {process for process, worked in tried.items() if not any(worked)}
    # A process whose only partner is bad fails with every partner too. It counts as a suspect only
    # where nobody with two partners is one.
    named = {p for p in suspects if len(tried[p]) > 1} or suspects
    if named:
        found = tuple(named) if len(named) == 1 else ()
        raise BadHost(f"preflight: collectives of {sorted(failed)} failed", found)
    return [
        f"collectives of processes {a} and {b} fail, and those of each of them with others work"
        for a, b in sorted(failed)
    ]


def _try_pair(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], bool] | None:
    # A process outside of these devices does not run the program at all.
    mine = next((pair for pair in pairs if jax.process_index() in pair), None)
    if mine is None:
        return None
    devices = [
        next(device for device in jax.devices() if device.process_index == process)
        for process in mine
    ]
    return mine, _in_time(lambda: _sum_over(devices))


def _sum_over(devices: Sequence[Any]) -> bool:
    """Whether a sum over these devices, which belong to several processes, is right."""
    # One device of each process is enough: the network is checked, not NVLink.
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("all"))
    values = np.arange(len(devices), dtype=np.float32) + 1
    x = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(x)
    return float(jax.device_get(total)) == values.sum()


def _in_time(check: Callable[[], bool]) -> bool:
    """A check's result; False where it raised or did not return in time.

    A thread that waits in a collective cannot be stopped. It stays, and the process is about to
    exit.
    """
    # NCCL waits for a peer that does not answer, for minutes. So the check runs in a thread, and
    # this one stops waiting first.
    results: list[bool] = []

    def run() -> None:
        try:
            results.append(check())
        except Exception as error:
            say(f"preflight: {type(error).__name__}: {error}")
            results.append(False)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with announced(f"a collective between processes ({COLLECTIVE_SECONDS:.0f} s at most)"):
        thread.join(COLLECTIVE_SECONDS)
    return bool(results and results[0])


def main(argv: list[str]) -> int:
    """Run the checks and print their times; see --help. Returns the exit code."""
    parser = make_parser(
        "python -m baichuan_jax.preflight",
        "Check devices, storage and the links between hosts, in seconds.",
    )
    config = parse_config(parser, argv)
    initialize_processes(config.distributed, config.resilience)
    findings = preflight(config)
    display = Display(active=jax.process_index() == 0)
    for warning in findings.warnings:
        display.say(warning, style="yellow")
    rows = [[check, f"{seconds:.2f}"] for check, seconds in findings.seconds.items()]
    counts = f"{jax.process_count()} process(es), {jax.device_count()} device(s)"
    warned = f", {len(findings.warnings)} warning(s)" if findings.warnings else ""
    display.table(f"Checks of {counts}: all passed{warned}", ["", "seconds"], rows)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True, joins=True)
