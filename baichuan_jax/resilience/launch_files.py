"""The files of a launch, as typed records: all that supervisors and processes know of each other.

They lie in `attempts/` of the run's folder, on storage that all hosts share. A launch is one start
of all processes of a run; folder and events call it an attempt, as runs made long ago do.

    attempts/lock, lock-N          Owner          who writes the run (ownership.py)
    attempts/hosts/HOST.json       HostHeartbeat  a supervisor lives; where its host is reached
    attempts/hosts/HOST.lock, ...  Owner          which supervisor has this host's name
    attempts/N/plan.json           LaunchPlan     hosts and processes of the N-th launch
    attempts/N/coordinator.json    Coordinator    where process 0 listens
    attempts/N/process-P.json      Report         a process's newest heartbeat, or its exit report
    attempts/N/ended-HOST.json     HostEnd        how a host's processes ended
    attempts/N/verdict.json        VerdictRecord  what the launch ended from, and what follows
    attempts/N/unsupervised        (empty)        no supervisor planned this launch
    attempts/N/log-P.txt, stacks-P.txt            output and stacks of a process

Files appear whole, by a rename. Plan and verdict are written once, by whichever host is first
(`claim`), and never again: so all hosts agree without a leader. Everything else has one writer.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from baichuan_jax.config.parsing import (
    Count,
    Seconds,
    Time,
    build,
    decode,
    parse_json,
    require_type,
    show,
    whole_number,
)
from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.runs.files import (
    create_once,
    draft_of,
    new_draft_folder,
    read_once,
    write_atomically,
)
from baichuan_jax.runs.folder import refuse_outside

# The mark in a launch's folder that keeps supervisors from joining it.
UNSUPERVISED = "unsupervised"


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record that a JSON file holds; `name` is the file's, in front of whom it is about."""

    name: ClassVar[str] = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The record of an object; a field that it does not know is dropped. Raises ConfigError."""
        require_type(content, dict, "it")
        # JSON has lists only, and a frozen record has tuples.
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        return build(cls, {**content, **lists}, "it")


@dataclasses.dataclass(frozen=True)
class HostHeartbeat(_Record):
    """A supervisor's heartbeat: `beat` counts them since its process `pid` began."""

    address: str = ""
    pid: Count = 0
    beat: Count = 0


@dataclasses.dataclass(frozen=True)
class LaunchPlan(_Record):
    """The hosts of a launch in the order of their processes, and the processes on each."""

    name: ClassVar[str] = "plan"
    hosts: tuple[str, ...]
    processes: int

    def __post_init__(self) -> None:
        require(len(self.hosts) > 0, "it names no host")
        for host in self.hosts:
            # Files are named after it: HOST.json, ended-HOST.json.
            is_name = 0 < len(host) <= 200 and not set("/\0") & set(host)
            require(is_name, f"its host {show(host)} is no name of a host")
        # All of them are counted below: a damaged number must not fill the memory.
        most = 1024
        require(
            1 <= self.processes <= most,
            f"its processes={self.processes} a host must lie between 1 and {most}",
        )

    @property
    def host_of(self) -> dict[int, str]:
        """Process -> host."""
        every = [host for host in self.hosts for _ in range(self.processes)]
        return dict(enumerate(every))

    def processes_of(self, host: str) -> range:
        """The processes of one host."""
        first = self.hosts.index(host) * self.processes
        return range(first, first + self.processes)


@dataclasses.dataclass(frozen=True)
class Coordinator(_Record):
    """host:port of process 0's coordination service."""

    name: ClassVar[str] = "coordinator"
    address: str


@dataclasses.dataclass(frozen=True)
class Report(_Record):
    """One process at one moment: a heartbeat while it works, an exit report once it must leave."""

    name: ClassVar[str] = "process"
    process: Count
    host: str
    pid: Count = 0
    # Grows with every heartbeat.
    beat: Count = 0
    time: Time = 0.0
    step: Count = 0
    phase: str = "start"
    # Seconds in this phase so far.
    age: Seconds = 0.0
    # A step's median seconds outside of what it does together with the others.
    own_seconds: Seconds | None = None
    # Seconds by phase since the process began.
    seconds: dict[str, Seconds] = dataclasses.field(default_factory=dict)
    # From here on for an exit report only: why it leaves, and the text of its error.
    cause: Cause | None = None
    error: str | None = None
    # Functions on the main thread's stack, innermost last.
    stack: tuple[str, ...] = ()
    # Processes whose heartbeat timed out, as this one sees it.
    silent: tuple[int, ...] = ()
    # Processes that a check found bad.
    named: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, content: Any) -> Self:
        return super().from_json(_with_cause(content))


@dataclasses.dataclass(frozen=True)
class ProcessEnd(_Record):
    """How a process ended, and when (seconds since the epoch)."""

    # Negative for a signal.
    code: int
    # Its supervisor killed it, so the code says nothing.
    stopped: bool = False
    time: Time = 0.0


@dataclasses.dataclass(frozen=True)
class HostEnd(_Record):
    """How the processes of a host ended; empty where its supervisor was lost with them."""

    name: ClassVar[str] = "ended"
    # Somebody asked its supervisor to stop.
    asked: bool = False
    exits: dict[int, ProcessEnd] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        require_type(content, dict, "it")
        exits = require_type(content.get("exits"), dict, "its exits")
        # JSON's keys are text.
        numbers = [require_type(whole_number(key), Count, f"its process {key!r}") for key in exits]
        ends = [ProcessEnd.from_json(end) for end in exits.values()]
        return super().from_json({**content, "exits": dict(zip(numbers, ends, strict=True))})


@dataclasses.dataclass(frozen=True)
class Verdict(_Record):
    """The cause of a launch's end and whom it is attributed to; see attribution.py."""

    cause: Cause
    # The rule that decided, and what it saw.
    rule: str
    evidence: str
    # None and () where the fault cannot be attributed to one host.
    host: str | None = None
    processes: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, content: Any) -> Self:
        return super().from_json(_with_cause(content))

    def __str__(self) -> str:
        processes = ", ".join(map(str, self.processes))
        who = (
            "no host can be named"
            if self.host is None
            else f"host {self.host}, process {processes}"
        )
        return f"{self.cause}: {who} (rule: {self.rule}): {self.evidence}"


@dataclasses.dataclass(frozen=True)
class History(_Record):
    """What the next plan must know of the launches before it."""

    # Host -> how often a fault was attributed to it.
    attributed: dict[str, int] = dataclasses.field(default_factory=dict)
    # Of the newest launch, in the order of their processes.
    hosts: tuple[str, ...] = ()
    # Launches in a row that reached no checkpoint after this step.
    fruitless: int = 0
    checkpoint: int | None = None

    @classmethod
    def from_json(cls, content: Any) -> Self:
        # Verdicts written before the field had its name call it "blames".
        require_type(content, dict, "its history")
        return super().from_json({"attributed": content.get("blames", {}), **content})


@dataclasses.dataclass(frozen=True)
class VerdictRecord(_Record):
    """The verdict on a launch, and what follows from it."""

    name: ClassVar[str] = "verdict"
    verdict: Verdict
    # Restart, or stop with this exit code; and why.
    restart: bool
    code: int
    reason: str
    # When the first sign of the fault came, and when the verdict was reached.
    detected: Time
    concluded: Time
    # The newest saved step.
    checkpoint: int
    # Hosts whose supervisors ended with the launch.
    lost: tuple[str, ...]
    history: History

    @classmethod
    def from_json(cls, content: Any) -> Self:
        require_type(content, dict, "it")
        verdict = Verdict.from_json(content.get("verdict"))
        history = History.from_json(content.get("history"))
        return super().from_json({**content, "verdict": verdict, "history": history})


Kind = TypeVar("Kind", bound=_Record)


class LaunchFolder:
    """The folder of one launch. A record about a host or a process is kept under its `key`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def number(self) -> int:
        """The launch's number, from 1."""
        return int(self.path.name)

    @property
    def supervised(self) -> bool:
        return not (self.path / UNSUPERVISED).exists()

    def read(self, kind: type[Kind], key: str | int | None = None) -> Kind | None:
        """The record of this kind; None where there is none. Raises ConfigError, OSError."""
        return _read(self._file(kind, key), kind)

    def write(self, record: _Record, key: str | int | None = None) -> None:
        """Replace a record that this process alone writes."""
        _replace(self._file(type(record), key), record)

    def claim(self, record: _Record) -> bool:
        """Write a record of which there is one; False where another process was first."""
        return create_once(self._file(type(record), None), record.to_json().encode())

    def publish(self, report: Report) -> None:
        """Replace the report of its process."""
        self.write(report, report.process)

    def reports(self) -> dict[int, Report]:
        """The newest report of every process that has one."""
        found = (_read(file, Report) for file in self.path.glob(f"{Report.name}-*.json"))
        return {report.process: report for report in found if report is not None}

    def ended(self) -> set[int]:
        """Processes that have ended, as their supervisors have written."""
        ends = (_read(file, HostEnd) for file in self.path.glob(f"{HostEnd.name}-*.json"))
        return {process for end in ends if end is not None for process in end.exits}

    def _file(self, kind: type[_Record], key: str | int | None) -> Path:
        return self.path / (f"{kind.name}.json" if key is None else f"{kind.name}-{key}.json")


class Launches:
    """All launches of a run: the folder `attempts/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock(self) -> Path:
        """What the process that writes the run owns (ownership.py)."""
        return self.path / "lock"

    def host_lock(self, host: str) -> Path:
        """What the supervisor of this host's name owns."""
        return self.path / "hosts" / f"{host}.lock"

    def __getitem__(self, number: int) -> LaunchFolder:
        return LaunchFolder(self.path / str(number))

    def numbers(self) -> list[int]:
        """The numbers of the launches so far, in their order."""
        # The folder also holds hosts/ and drafts.
        found = (whole_number(path.name) for path in self.path.glob("[0-9]*"))
        return sorted(number for number in found if number is not None)

    def latest(self) -> int:
        """The number of the newest launch; 0 where there is none."""
        return max(self.numbers(), default=0)

    def begin_unsupervised(self) -> LaunchFolder:
        """The folder of a new launch that no supervisor planned."""
        path = self.path / str(self.latest() + 1)
        # Renamed into place with its mark inside: a supervisor that looks must not join it.
        draft = draft_of(path)
        new_draft_folder(draft)
        (draft / UNSUPERVISED).touch()
        draft.rename(path)
        return LaunchFolder(path)

    def write_heartbeat(self, host: str, heartbeat: HostHeartbeat) -> None:
        """Replace a host's heartbeat."""
        _replace(self.path / "hosts" / f"{host}.json", heartbeat)

    def remove_heartbeat(self, host: str) -> None:
        """A host's supervisor has ended: nobody needs to find out that it is silent."""
        (self.path / "hosts" / f"{host}.json").unlink(missing_ok=True)

    def read_heartbeats(self) -> dict[str, HostHeartbeat]:
        """The newest heartbeat of every host."""
        found = {f.stem: _read(f, HostHeartbeat) for f in (self.path / "hosts").glob("*.json")}
        return {host: heartbeat for host, heartbeat in found.items() if heartbeat is not None}


def _read(file: Path, kind: type[Kind]) -> Kind | None:
    # RUN/attempts/N/plan.json
    refuse_outside(file.parents[2], file)
    content = read_once(file)
    if content is None:
        return None
    delete = "files of a launch appear whole, so its disk is damaged; delete that file"
    try:
        return kind.from_json(parse_json(decode(content, str(file)), str(file)))
    except ConfigError as error:
        raise ConfigError(f"{file} is no {kind.__name__}: {error}; {delete}") from None


def _with_cause(content: Any) -> dict[str, Any]:
    """The content with its cause, a word, as a Cause."""
    require_type(content, dict, "it")
    cause = require_type(content.get("cause"), str | None, "its cause")
    return {**content, "cause": None if cause is None else Cause(cause)}


def _replace(file: Path, record: _Record) -> None:
    # Other hosts need it soon, and nobody needs it after a power failure.
    write_atomically(file, record.to_json().encode(), durable=False)
