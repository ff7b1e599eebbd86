"""What happens in a run, as typed records: the lines of `events.jsonl`.

A line is one JSON object: `time` (seconds since the epoch), `kind` and the fields of one class
below. Process 0 writes most of them; a supervisor adds its own while no process trains. Readers
ask for classes (`of_kind(events, Restored)`), never for the strings. Lines of earlier versions stay
readable: a field that they lack takes its default, a field that no longer exists is dropped, and a
kind that is not known here becomes `Unknown`.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

from baichuan_jax.config.messages import without_secrets
from baichuan_jax.config.parsing import Count, Positive, Time, build, show
from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.runs.files import Appender

# Fields that hold words of this program and names that readers look for: whatever the environment
# says, they stay. All others may hold any text.
_OWN_WORDS = frozenset(
    {
        *("kind", "cause", "rule", "host", "hosts", "lost", "attention", "rms_norm"),
        *("jax", "device", "mesh", "mfu_of", "seconds", "validation", "tasks"),
    }
)


# kw_only: `time` has a default, and subclasses have fields without one behind it.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at `time`, seconds since the epoch."""

    kind: ClassVar[str] = ""
    time: Time = dataclasses.field(default_factory=lambda: round(time.time(), 3))

    # `kind` is a class variable, so it is no field and needs its own place in to_json.
    @property
    def fields(self) -> dict[str, Any]:
        """What describes it: everything but kind and time."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name != "time"}

    def to_json(self) -> dict[str, Any]:
        """What parse_event reads: time, kind, fields."""
        return {"time": self.time, "kind": self.kind, **self.fields}

    def to_line(self) -> bytes:
        """The line of events.jsonl, with its end; it holds no secrets."""
        # Errors of libraries quote addresses and settings of the environment.
        content = {
            name: value if name in _OWN_WORDS else without_secrets(value)
            for name, value in self.to_json().items()
        }
        # ensure_ascii off: samples and paths in Chinese stay readable.
        return (json.dumps(content, ensure_ascii=False) + "\n").encode()


# Filled by the decorator below, so that a new event is one class and nothing else.
KINDS: dict[str, type[Event]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _event(kind: str) -> Any:
    """Class decorator: a frozen record that is written under this kind."""

    # One decorator in place of two and of a table: a class cannot be left out of KINDS.
    def register(cls: type) -> type:
        made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        made.kind = kind
        KINDS[kind] = made
        return made

    return register


@_event("started")
class Started(Event):
    """A launch has its devices and its data, and chose how to run."""

    attempt: Count
    jax: str = ""
    device: str = ""
    devices: Positive = 1
    processes: Positive = 1
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    attention: str | None = None
    rms_norm: str | None = None
    attention_reason: str = ""
    rms_norm_reason: str = ""
    xla_flags: list[str] = dataclasses.field(default_factory=list)
    mfu_of: str = "-"
    parameters: int = 0
    tokenizer: str = ""
    tokenizer_loses: list[str] = dataclasses.field(default_factory=list)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    unigram_entropy: float | None = None


@_event("initialised")
class Initialised(Event):
    """The first launch took its weights from `source` (init_from)."""

    source: str


@_event("restored")
class Restored(Event):
    """A launch goes on from a checkpoint; `local`: from a copy on a host's own disk."""

    step: int
    position: int
    local: bool = False


@_event("data_changed")
class DataChanged(Event):
    """Settings of the data differ from those of the checkpoint that the launch goes on from.

    The data go on at `row` of the run, its batch at `position`; `changes` says what follows.
    """

    step: int
    position: int
    row: int
    changes: list[str] = dataclasses.field(default_factory=list)


@_event("measured")
class Measured(Event):
    """What losses and scores are of from here on: hashes of the validation rows and of the tests.

    Written where they are new, so the newest one counts.
    """

    validation: dict[str, str] = dataclasses.field(default_factory=dict)
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)


@_event("compiled")
class Compiled(Event):
    """The training step is compiled: its seconds, and the seconds since the process began."""

    seconds: float
    since_launch: float


@_event("checkpoint")
class CheckpointSaved(Event):
    """A checkpoint is whole on storage.

    `seconds` from its start; `blocked_seconds` of them the loop stood still; `blocked_share` of the
    time since the save before; `next_in_seconds` where the interval is chosen by the clock.
    """

    step: int
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    blocked_share: float | None = None
    next_in_seconds: float | None = None


@_event("checkpoint_failed")
class CheckpointFailed(Event):
    """A checkpoint could not be written, and does not count."""

    step: int
    reason: str


@_event("checkpoint_corrupt")
class CheckpointCorrupt(Event):
    """A checkpoint is damaged, and was passed over."""

    step: int
    path: str
    reason: str


@_event("local_copy")
class LocalCopySaved(Event):
    """The hosts' own copies of a step count from now on."""

    step: int
    seconds: float = 0.0
    blocked_seconds: float = 0.0


@_event("local_copy_failed")
class LocalCopyFailed(Event):
    """A host could not write its copy, which does not count."""

    step: int
    reason: str


@_event("local_copy_corrupt")
class LocalCopyCorrupt(Event):
    """A host's copy is damaged, and was passed over."""

    step: int
    path: str
    reason: str


@_event("interrupted")
class Interrupted(Event):
    """The launch was asked to stop: it saved, and the next one goes on from here."""

    step: int
    position: int


@_event("completed")
class Completed(Event):
    """The last step is done: losses, seconds by phase, and the median step's speed.

    `samples` are of runs of earlier versions; `Sampled` has them since.
    """

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    unigram_entropy: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    samples: dict[str, str] = dataclasses.field(default_factory=dict)
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    mfu_causal: float | None = None


@_event("sampled")
class Sampled(Event):
    """What the finished model wrote: prompt -> its continuation."""

    step: int
    samples: dict[str, str]


@_event("left_out")
class LeftOut(Event):
    """Something beside the training failed and was left out; the launch went on."""

    what: str
    error: str


@_event("failed")
class Failed(Event):
    """An exception ended the launch."""

    step: int
    error: str


@_event("profiled")
class Profiled(Event):
    """A profile that lasted until this step is written."""

    step: int


@_event("straggler")
class StragglerFound(Event):
    """A process is slow in its own work: its seconds a step, and the median's."""

    step: int
    host: str
    process: int
    seconds: float
    median: float


@_event("update_skipped")
class UpdateSkipped(Event):
    """A step was not finite and changed nothing; `in_a_row` of them, `total` so far."""

    step: int
    position: int
    total: int = 1
    loss: str = ""
    grad_norm: str = ""
    in_a_row: int = 1


@_event("numerics")
class NumericsFault(Event):
    """Numbers ended the launch at `step`, whose data lie at positions [begin, end).

    `rows`: [begin, end) among all rows of the run; earlier versions wrote none.
    """

    step: int
    begin: int
    end: int
    reason: str
    rows: list[int] | None = None


@_event("corruption")
class Corruption(Event):
    """Replicas computed different bits at this step or after it."""

    step: int
    reason: str


@_event("window_skipped")
class WindowSkipped(Event):
    """The data at positions [begin, end) are left out from now on; `rows` as in NumericsFault."""

    begin: int
    end: int
    reason: str
    rows: list[int] | None = None


@_event("rolled_back")
class RolledBack(Event):
    """The launch went back to before a step; `skipped`: it leaves a window of data out as well."""

    before: int
    skipped: bool = False
    reason: str = ""


@_event("port_taken")
class PortTaken(Event):
    """A supervisor passed over a port that something else listens on."""

    attempt: int
    host: str
    port: int


# Its fields are flat, since this line is older than the records of resilience/launch_files.py.
@_event("verdict")
class VerdictReached(Event):
    """A launch has ended everywhere: its cause, who caused it, and what follows.

    `detected` and `concluded` are times; `lost` are the hosts whose supervisors ended too.
    """

    attempt: Count
    hosts: list[str] = dataclasses.field(default_factory=list)
    cause: str = ""
    rule: str = ""
    evidence: str = ""
    host: str | None = None
    processes: list[int] = dataclasses.field(default_factory=list)
    restart: bool = False
    code: int = 0
    reason: str = ""
    detected: Time = 0.0
    concluded: Time = 0.0
    checkpoint: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unknown(Event):
    """A kind that another version of the program wrote; `content` is its line."""

    content: dict[str, Any]


def parse_event(content: dict[str, Any]) -> Event:
    """The event of a line of events.jsonl. Raises ConfigError for a line that is none."""
    if not isinstance(content, dict) or not {"kind", "time"} <= set(content):
        raise ConfigError("an event has a kind and a time")
    kind = content["kind"]
    require(isinstance(kind, str), f"its kind is {show(kind)} and must be text")
    cls = KINDS.get(kind)
    # A newer version of the program may have gone on with this run.
    if cls is None:
        return build(Unknown, {"time": content["time"], "content": content}, "an event")
    # Earlier versions wrote a loss that was not finite as NaN, which counts as null, as in
    # metrics.jsonl.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in content.items()
    }
    return build(cls, finite, kind)


Kind = TypeVar("Kind", bound=Event)


def of_kind(events: Iterable[Event], kind: type[Kind]) -> list[Kind]:
    """The events of one class, in their order."""
    return [event for event in events if isinstance(event, kind)]


def latest(events: Iterable[Event], kind: type[Kind]) -> Kind | None:
    """The newest event of one class; None where there is none."""
    found = of_kind(events, kind)
    return found[-1] if found else None


def append_event(run: Path, event: Event) -> None:
    """Add a line where no process trains; what a killed writer left of its last line is dropped."""
    # One write of a whole line in append mode: two supervisors' lines cannot mix.
    file = Appender(run / "events.jsonl")
    error = file.add(event.to_line())
    file.close()
    if error is not None:
        raise error
