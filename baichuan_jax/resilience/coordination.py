"""Small values that processes of a run exchange through jax's coordination service.

The service is a key-value store in process 0. It works before any device does and needs no
collective, but it ends with process 0, and a call blocks for as long as process 0 does not answer.
Its client is private API of jax; only this file uses it. Gloo, which finds its peers there, too.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from baichuan_jax.config.parsing import parse_json, show
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.causes import PeerFailed
from baichuan_jax.resilience.launch_files import Report
from baichuan_jax.resilience.waits import announced

# Hosts may begin this far apart: they import from a cold file system.
TIMEOUT_SECONDS = 300.0


class ReportService:
    """Reports of processes as keys of the service."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def publish(self, report: Report) -> None:
        """Replace the report of its process."""
        # A key may be set only once unless overwriting is allowed.
        key = f"report/{report.process}"
        self._client.key_value_set(key, report.to_json(), allow_overwrite=True)

    def reports(self) -> dict[int, Report]:
        """The newest report of every process that has one."""
        found = {}
        for key, text in self._client.key_value_dir_get("report/"):
            try:
                report = Report.from_json(parse_json(text, "it"))
            except ConfigError as error:
                raise ConfigError(f"{key} of jax's service is no report: {error}") from None
            found[report.process] = report
        return found


def report_service() -> ReportService | None:
    """The service of a run of several processes; None in a run of one."""
    client = _client()
    return None if client is None else ReportService(client)


def agree(name: str, choose: Callable[[], Any], seconds: float = TIMEOUT_SECONDS) -> Any:
    """What process 0 chooses (anything JSON can hold), on all processes.

    Every process must call this with the same name, once. `choose` runs on process 0 only; where it
    raises ConfigError, all processes do: they would wait for an answer that cannot come. Raises
    PeerFailed where process 0 does not answer within `seconds`.
    """
    client = _client()
    if client is None:
        return choose()
    if _process_id() != 0:
        with _in_time(f"process 0 to decide: {name}", seconds):
            text = client.blocking_key_value_get(f"agreed/{name}", int(1000 * seconds))
        answer = json.loads(text)
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        return answer["value"]
    try:
        value = choose()
    except ConfigError as error:
        client.key_value_set(f"agreed/{name}", json.dumps({"refused": str(error)}))
        raise
    client.key_value_set(f"agreed/{name}", json.dumps({"value": value}))
    return value


def gather(name: str, value: Any, seconds: float = TIMEOUT_SECONDS) -> list[Any]:
    """Every process's value (anything JSON can hold), in the order of the processes.

    Every process must call this with the same name, once. Raises PeerFailed where one does not
    within `seconds`.
    """
    client = _client()
    if client is None:
        # Through JSON here too, so that one process meets what several would: tuples become lists.
        return [json.loads(json.dumps(value))]
    # Six digits, so that the order of the keys is that of the processes.
    client.key_value_set(f"gathered/{name}/{_process_id():06}", json.dumps(value))
    # Nobody reads before everybody has written.
    with _in_time(f"the other processes to report: {name}", seconds):
        client.wait_at_barrier(f"gathered/{name}", int(1000 * seconds))
    return [json.loads(text) for _, text in sorted(client.key_value_dir_get(f"gathered/{name}/"))]


def refuse_together(name: str, check: Callable[[], object]) -> None:
    """Run a check on every process; where it raises ConfigError on one, all raise that.

    For what one host alone may lack: its processes would end, and the others wait for them. Every
    process must call this with the same name, once.
    """
    fault = None
    try:
        check()
    except ConfigError as error:
        fault = str(error)
    faults = gather(name, fault)
    for process, found in enumerate(faults):
        if found is not None:
            raise ConfigError(found if len(faults) == 1 else f"{found} (process {process})")


def require_same(
    what: str,
    value: Any,
    advice: str = "give all hosts the same files",
    seconds: float = TIMEOUT_SECONDS,
) -> None:
    """Raise ConfigError where this process's value (anything JSON can hold) is not process 0's.

    For what processes read from files that each of them sees by itself. Every process must call
    this with the same `what`, once. The error names the first difference.
    """
    own = json.loads(json.dumps(value))
    first = agree(what, lambda: own, seconds)
    if own != first:
        process = f"process {_process_id()} on {os.uname().nodename}"
        raise ConfigError(describe_difference(what, first, own, process, advice))


def describe_difference(what: str, first: Any, other: Any, process: str, advice: str) -> str:
    """Which part of a value is first another one than process 0's, as a message.

    Parts are the items of a dict or a list.
    """
    parts, others = _parts_of(first), _parts_of(other)
    differing = [
        name
        for name in {**parts, **others}
        if name not in parts or name not in others or parts[name] != others[name]
    ]
    name = differing[0]
    known, found = (show(of[name]) if name in of else "missing" for of in (parts, others))
    number = f" ({len(differing)} differ)" if len(differing) > 1 else ""
    return (
        f"the hosts of this run differ in {what}: {name} is {known} for process 0 and {found} for "
        f"{process}{number}; {advice}"
    )


def _parts_of(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {f"number {number}": part for number, part in enumerate(value, 1)}
    return {"it": value}


def coordinator_address() -> str | None:
    """Where process 0's service is reached; None in a run of one process."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address


def place_gloo(choose: Callable[[], str]) -> None:
    """Have Gloo, the collectives of CPUs, listen on the chosen address of this host alone.

    By itself it takes the address of the host's name, which may be a public one. Must be called
    before jax starts its devices. A process that no service connects has no Gloo.
    """
    client = _client()
    if client is None:
        return
    from jax._src import config, xla_bridge
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    if config.cpu_collectives_implementation.value != "gloo":
        return
    address = choose()

    def make_client() -> Any:
        gloo = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address)
        return xla_bridge.make_cpu_client(gloo)

    xla_bridge.register_backend_factory("cpu", make_client, priority=0, fail_quietly=False)


@contextlib.contextmanager
def _in_time(what: str, seconds: float) -> Iterator[None]:
    """Say what is waited for. Raises PeerFailed where it did not come within `seconds`."""
    try:
        with announced(f"{what} ({seconds:.0f} s at most)"):
            yield
    except Exception as error:
        # jax has no type of its own for it.
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise PeerFailed(f"waited {seconds:.0f} s in vain for {what}") from error


def _client() -> Any:
    # A process that has not imported jax is in no group; importing it here would cost a second.
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state.client


def _process_id() -> int:
    from jax._src import distributed

    return distributed.global_state.process_id
