"""A run's folder, read back: metrics, events, loss curve. `train()` returns a Run.

A folder may come from somebody else. What reads a file of a run asks `refuse_outside` first, or
reads it with `read_own`: a link may lead to any file of this user, whose content would then stand
in a message, a table or a page.
"""

import contextlib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baichuan_jax.config.parsing import (
    MOST_BYTES,
    MOST_YAML_BYTES,
    Count,
    Seconds,
    Time,
    decode,
    no_file,
    open_regular,
    parse_json,
    quote_path,
    read_bytes,
    require_type,
)
from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.runs.events import Completed, Event, Interrupted, Started, latest, parse_event
from baichuan_jax.runs.files import save_figure

# What a launch writes in the folder. Of these names, the first four may be a user's file that lay
# there before.
_ALIKE = ("config.yaml", "tokenizer.model", "loss.png", "memory.prof")
_OWN = (
    *_ALIKE,
    *("metrics.jsonl", "events.jsonl", "local_copies.json"),
    *("checkpoints", "attempts", "tensorboard", "profile", "wandb"),
)


class Run:
    """One run, finished or not.

    Every access reads its files again, so that a run that trains meanwhile shows its newest lines.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl in order, one for each step and evaluation.

        A step that was repeated after a restart has a line for each time, with the same numbers.
        Raises ConfigError with the number of a damaged one.
        """
        return list(_metrics(self.path))

    @property
    def events(self) -> list[Event]:
        """Lines of events.jsonl in order. Raises ConfigError with the number of a damaged one."""
        events = []
        for where, text in _lines(self.path, "events.jsonl", MOST_EVENTS):
            line = _parse(text, where)
            try:
                events.append(parse_event(line))
            except ConfigError as error:
                raise ConfigError(f"{where} is no event: {error}; {_REPAIR}") from None
        return events

    @property
    def settings(self) -> str | None:
        """The text of its config.yaml; None where there is none. Raises ConfigError."""
        file = self.path / "config.yaml"
        refuse_outside(self.path, file)
        if not file.exists():
            return None
        return decode(read_bytes(file, MOST_YAML_BYTES), str(file))

    @property
    def own(self) -> list[Path]:
        """The files and folders that training writes there, whether they are there yet or not."""
        return [self.path / name for name in _OWN]

    @property
    def status(self) -> str:
        """Of the last launch: "completed", "interrupted" or "running" (a kill leaves that too)."""
        # Back to the newest start only: how an earlier launch ended says nothing about this one.
        for event in reversed(self.events):
            if isinstance(event, Completed | Interrupted):
                return event.kind
            if isinstance(event, Started):
                break
        return "running"

    def curve(self, name: str) -> dict[int, float]:
        """Step -> value of one metric, the latest where a step was repeated."""
        # An evaluation's line has no loss, and a number that was not finite is null.
        return {line["step"]: line[name] for line in self.metrics if line.get(name) is not None}

    def losses(self, until: int) -> list[float]:
        """The training losses of the steps up to `until`, in their order."""
        return [loss for step, loss in self.curve("loss").items() if step <= until]

    def plot(self, path: Path | str | None = None) -> Any:
        """The loss curve as a matplotlib figure, also written as PNG to `path`.

        Default: loss.png in the run's folder.
        """
        loss, validation = self.curve("loss"), self.curve("eval_loss")
        started = latest(self.events, Started)
        entropy = None if started is None else started.unigram_entropy
        figure = _make_figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(
            list(loss),
            list(loss.values()),
            color="tab:blue",
            alpha=0.35,
            linewidth=1,
            label="training, every step",
        )
        axes.plot(
            list(loss),
            smooth(list(loss.values())),
            color="tab:blue",
            linewidth=2,
            label="training, smoothed",
        )
        if validation:
            axes.plot(
                list(validation),
                list(validation.values()),
                "o-",
                color="tab:orange",
                label="validation",
            )
        # A loss above this line shows that nothing was learned from the context yet.
        if entropy is not None:
            axes.axhline(
                entropy,
                color="gray",
                linestyle="--",
                linewidth=1,
                label=f"unigram entropy {entropy:.2f}",
            )
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=str(self.path.name))
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, Path(path or self.path / "loss.png"), dpi=120)
        return figure

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status}, {len(self.curve('loss'))} steps)"


def refuse_other_files(path: Path, tokenizer: str | None, begun: bool) -> None:
    """Raise ConfigError where a run would replace files that it did not make.

    `path`: the run's folder; `tokenizer`: the file that the settings name, if any; `begun`: whether
    the run has a checkpoint. Called by every process before the first of them writes there.
    """
    refuse_links_in_run(path)
    # In this order: on network storage this process may see a new file late, and the event that
    # came before it then too.
    there = [path / name for name in _ALIKE if (path / name).exists()]
    # A run's first event is on the disk before any of these files.
    if begun or not there or latest(Run(path).events, Started) is not None:
        return
    for file in there:
        named = ""
        if file.name == "tokenizer.model":
            # What the run keeps there is a copy of this.
            if tokenizer is not None and read_bytes(tokenizer) == read_bytes(file):
                continue
            named = f" (name it with --tokenizer.path {quote_path(file)} to train with it)"
        raise ConfigError(
            f"run_dir={str(path)!r} holds a {file.name} and no run, which would replace that "
            f"file{named}; give the run another folder with --run_dir, or move the file"
        )


def _make_figure(**settings: Any) -> Any:
    """A matplotlib figure that a notebook shows by itself, without pyplot and its global state."""
    # Imported late: reading a run's metrics needs no plotting.
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    return Shown(**settings)


def smooth(values: list[float], share: float = 0.015) -> list[float]:
    """A curve's exponential mean over about this share of it, corrected for its start."""
    # Without the correction the curve would begin at zero and rise (Kingma and Ba 2015, section 3).
    keep = math.exp(-1 / max(1.0, share * len(values)))
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


_REPAIR = "repair or delete that line"
# What these must be where a line has them. All others are numbers, or null where one was not
# finite.
_METRICS = {
    "step": Count,
    "time": Time,
    "loss": float | None,
    "step_seconds": Seconds,
    "tokens": Count,
    "tokens_per_second": float,
}
_NUMBERS = frozenset({int, float})


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    for where, text in _lines(path, "metrics.jsonl", MOST_METRICS):
        # Nearly all lines, of which a run may have millions: a quarter of the full look's time.
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if _is_usual(line, text):
                yield _with_shared_names(line)
                continue
        yield _with_shared_names(_check_metrics(_parse(text, where), where))


def _with_shared_names(line: dict[str, Any]) -> dict[str, Any]:
    """The line with one text for a name in all lines: they would be most of the memory."""
    return dict(zip(map(sys.intern, line), line.values(), strict=True))


def _is_usual(line: Any, text: str) -> bool:
    """Whether a line has numbers alone, all of them finite, not negative and of no odd size."""
    if type(line) is not dict or type(line.get("step")) is not int:
        return False
    values = line.values()
    return (
        _NUMBERS.issuperset(map(type, values))
        and type(line.get("tokens", 0)) is int
        and min(values) >= 0
        # NaN makes a sum NaN, which is not less than anything.
        and sum(values) < 1e18
        and line.get("time", 0) < 1e11
        and line.get("step_seconds", 0) < 1e11
        # More quotes than the keys have: a key that comes twice, or an escape.
        and text.count('"') == 2 * len(line)
    )


def _check_metrics(line: Any, where: str) -> dict[str, Any]:
    """A line of metrics.jsonl. Raises ConfigError for one that no reader could go on with."""
    try:
        require_type(line, dict, "it")
        require("step" in line, "it has no step")
        for name, value in line.items():
            require_type(value, _METRICS.get(name, float | bool | None), f"its {name}")
    except ConfigError as error:
        raise ConfigError(f"{where} is no line of metrics: {error}; {_REPAIR}") from None
    return line


# Far more than runs have: a line for each step and evaluation, an event for each save and fault.
# The longest lines hold samples.
MOST_METRICS = 5_000_000
MOST_EVENTS = 1_000_000
MOST_LINE_BYTES = 1 << 24


def _lines(run: Path, name: str, most: int) -> Iterator[tuple[str, str]]:
    """(file and number, text) of the lines of a run's JSONL file.

    A last line that a killed writer left unfinished is none. Raises ConfigError.
    """
    path = run / name
    refuse_outside(run, path)
    try:
        file = open_regular(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        raise no_file(path, error) or error from None
    with file:
        for number in itertools.count(1):
            line = file.readline(MOST_LINE_BYTES + 1)
            where = f"{path}, line {number}"
            require(
                len(line) <= MOST_LINE_BYTES,
                f"{where} has over {MOST_LINE_BYTES:,} bytes, and no run writes such; {_REPAIR}",
            )
            if not line.endswith(b"\n"):
                return
            require(number <= most, f"{path} has over {most:,} lines, and no run has as many")
            try:
                yield where, line[:-1].decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise ConfigError(f"{where} is no UTF-8 (byte {byte:#04x}); {_REPAIR}") from None


def refuse_links_in_run(run: Path) -> None:
    """Raise ConfigError where a link would take what a launch reads and writes out of its run."""
    for name in (*_ALIKE, "metrics.jsonl", "events.jsonl", "attempts", "attempts/hosts"):
        refuse_outside(run, run / name)


def refuse_outside(run: Path, file: Path) -> None:
    """Raise ConfigError for a file below a run's folder that a link takes out of it.

    The folder itself may be a link, and so may its checkpoints/, which are not read as text. Each
    reader of a run's files asks here first.
    """
    below = itertools.takewhile(lambda part: part != run, (file, *file.parents))
    # Without a link there is nothing to resolve: supervisors read hundreds of files twice a second.
    if not any(part.is_symlink() for part in below):
        return
    target, folder = os.path.realpath(file), os.path.realpath(run)
    require(
        target.startswith(folder + os.sep),
        f"{file} is a link out of the run's folder, and is not read; put the file itself in its "
        "place, or delete the link",
    )


def read_own(run: Path, file: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file below a run's folder. Raises ConfigError, as for a link out of it."""
    refuse_outside(run, file)
    return read_bytes(file, most)


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text, where)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_REPAIR}") from None
