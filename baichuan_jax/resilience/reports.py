"""What processes tell each other, and the two places where they do: a folder of the run, and jax's coordination service.

A report is a process's heartbeat while it works, and its last word once it knows that it must
leave. The service is fast and dies with process 0; the folder stays. The service's client is
private API of jax: only this file uses it.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a last word says. "peer" is secondary: another one's failure reached this process.
EXCEPTION, CONFIGURATION, NUMERICS, BAD_HOST = "exception", "configuration", "numerics", "bad host"
STORAGE, HANG, PEER = "storage", "hang", "peer"


@dataclasses.dataclass(frozen=True)
class Report:
    """One process at one moment.

    `beat` counts its heartbeats; `age` is the seconds spent in `phase`; `seconds` its time by
    phase. The rest is for a last word: `cause`, `error` its text, `stack` the main thread's
    functions (innermost last), `silent` the processes that it has not heard for longer than a
    heartbeat may take, `named` those that a check found bad.
    """

    process: int
    host: str
    pid: int = 0
    beat: int = 0
    time: float = 0.0
    step: int = 0
    phase: str = "start"
    age: float = 0.0
    own_seconds: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    cause: str | None = None
    error: str | None = None
    stack: tuple[str, ...] = ()
    silent: tuple[int, ...] = ()
    named: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def parse(cls, text: str) -> "Report":
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Report":
        return cls(
            **{**fields, **{name: tuple(fields[name]) for name in ("stack", "silent", "named")}}
        )


class Folder:
    """Reports as files of one folder that all hosts share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def publish(self, report: Report) -> None:
        """Replace this process's file. Not synced to the disk: other hosts need it soon, and nobody after a power cut."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f"process-{report.process}.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(report.text, encoding="utf-8")
        os.replace(temporary, file)

    def read(self) -> dict[int, Report]:
        """The reports so far."""
        found = {}
        for file in self.path.glob("process-*.json"):
            report = Report.parse(file.read_text(encoding="utf-8"))
            found[report.process] = report
        return found

    def ended(self) -> set[int]:
        """Processes of which supervisors have written here that they have ended."""
        files = [
            json.loads(file.read_text(encoding="utf-8")) for file in self.path.glob("ended-*.json")
        ]
        return {int(process) for content in files for process in content["exits"]}


class Service:
    """Reports as keys of jax's coordination service. Every call may block for as long as process 0 does not answer."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def publish(self, report: Report) -> None:
        self._client.key_value_set(f"report/{report.process}", report.text, allow_overwrite=True)

    def read(self) -> dict[int, Report]:
        """The reports so far."""
        reports = [Report.parse(text) for _, text in self._client.key_value_dir_get("report/")]
        return {report.process: report for report in reports}


def service() -> Service | None:
    """The coordination service of a run of several processes, or None."""
    client = _client()
    return None if client is None else Service(client)


def _client() -> Any:
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed  # the client has no public name

    return distributed.global_state.client


def agree(name: str, choose: Callable[[], Any], seconds: float = 300.0) -> Any:
    """What process 0 chooses (anything JSON can hold), on all processes. Every process must call this with the same name, once."""
    from jax._src import distributed

    client = _client()
    if client is None:
        return choose()
    if distributed.global_state.process_id != 0:
        return json.loads(client.blocking_key_value_get(f"agreed/{name}", int(1000 * seconds)))
    value = choose()
    client.key_value_set(f"agreed/{name}", json.dumps(value))
    return value


def gather(name: str, value: Any, seconds: float = 300.0) -> list[Any]:
    """Every process's value (anything JSON can hold) in their order. Every process must call this with the same name, once."""
    from jax._src import distributed

    client = _client()
    if client is None:
        return [json.loads(json.dumps(value))]
    client.key_value_set(
        f"gathered/{name}/{distributed.global_state.process_id:06}", json.dumps(value)
    )
    client.wait_at_barrier(f"gathered/{name}", int(1000 * seconds))
    return [json.loads(text) for _, text in sorted(client.key_value_dir_get(f"gathered/{name}/"))]


def coordinator_address() -> str | None:
    """Where process 0's coordination service is reached, or None in a run of one process."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address
