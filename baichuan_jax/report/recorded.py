"""What a run's folder holds, read for its page.

In: the folders of runs. Out: a `Recorded` for each, with its curves over tokens, events, the
accounting of its time, a timeline of its launches, results of tests and plans. Everything is read
once, so that a page of a run that still trains agrees with itself.
"""

import dataclasses
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from baichuan_jax.config.files import flatten
from baichuan_jax.config.messages import hide_secrets, printable
from baichuan_jax.config.parsing import (
    Count,
    Time,
    decode,
    parse_json,
    parse_yaml,
    quote_path,
    require_keys,
    require_type,
    show,
    show_path,
)
from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.resilience.goodput import Accounting, account, launch_spans
from baichuan_jax.runs.events import Event
from baichuan_jax.runs.folder import Run, read_own

# One a run. Distinct on light and on dark ground, also to people who see few colours.
COLOURS = ("#3b82d6", "#e0701e", "#2f9e6e", "#b163c9", "#d1495b", "#a3861a", "#2aa5b5", "#8a7a6a")
MAX_RUNS = len(COLOURS)
# Results of `evaluate` and of `plan` in a run's folder.
TESTS, PLANS = "evaluations/*/result.json", "plans/*.json"
# More than a page can show: a figure takes a hundredth of a second to make, and longer to draw.
MOST_RESULTS = 300
# Of all results of a run together: subjects of tests, and lengths of curves of perplexity.
MOST_ROWS = 20_000
MOST_RESULT_BYTES = 1 << 24


def markup(text: str) -> str:
    """The text as HTML and as plotly's texts show it.

    These know a few tags, links among them, and no &quot;; %{x} is a number of the point there.
    """
    escaped = html.escape(printable(hide_secrets(text)), quote=False)
    return escaped.replace("%{", "&#37;{")


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a launch, in seconds since the run's beginning. `state`: see figures.STATES."""

    launch: int
    state: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When a run began, in seconds since the epoch, and what its launches did when."""

    began: float
    spans: list[Span]


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One run."""

    name: str
    colour: str
    run: Run
    # The text of config.yaml, and its settings by dotted name; empty where the run has none.
    config: str
    settings: dict[str, Any]
    # Lines of metrics.jsonl, the newest of each step, in order.
    steps: list[dict[str, Any]]
    # Lines of evaluations.
    validations: list[dict[str, Any]]
    events: list[Event]
    # Step -> tokens trained on when it was done.
    tokens: dict[int, int]
    accounting: Accounting
    timeline: Timeline
    # Results of `evaluate` in RUN/evaluations, by folder.
    tests: dict[str, dict[str, Any]]
    # Results of `plan` in RUN/plans, by topology.
    plans: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        """The name as `markup`."""
        return markup(self.name)

    def curve(self, name: str) -> tuple[list[int], list[Any]]:
        """Tokens and values of a metric of the steps; None where it was not finite."""
        found = [line for line in self.steps if name in line]
        return [self.tokens[line["step"]] for line in found], [line[name] for line in found]

    def validation(self, name: str) -> tuple[list[int], list[Any]]:
        """Tokens and values of a metric of the evaluations, the newest of each step."""
        newest = {
            line["step"]: line[name] for line in self.validations if line.get(name) is not None
        }
        return [self.tokens.get(step, 0) for step in newest], list(newest.values())

    def goodput(self) -> tuple[list[float], list[float]]:
        """Seconds since the beginning, and goodput until then, after each step that counts.

        Goodput is the share of the time in steps that count: those not done again later.
        """
        seconds, shares, good = [], [], 0.0
        for line in sorted(self.steps, key=lambda line: line["time"]):
            # Lines of steps done again later are not in self.steps: their time counts as lost.
            good += line["step_seconds"]
            elapsed = line["time"] - self.timeline.began
            if elapsed > 0:
                seconds.append(elapsed)
                # A step's time is measured by another clock than its end: the share may pass 1.
                shares.append(min(1.0, good / elapsed))
        spans = self.timeline.spans
        if spans and spans[-1].end > max(seconds, default=0.0):
            seconds.append(spans[-1].end)
            shares.append(min(1.0, good / seconds[-1]))
        return seconds, shares


# What the page takes from a step's line, and from the files of `evaluate` and `plan`.
_STEP = {
    "time": Time,
    "loss": float | None,
    "tokens": Count,
    "tokens_per_second": float,
}
_RESULT = {
    "task": Literal["mmlu", "ceval", "agieval", "gaokao"],
    "protocol": str,
    "average": float,
    "stderr": float | None,
    "categories": dict,
    "subjects": dict,
    "manifest": dict,
}
_SCORE = {"accuracy": float, "stderr": float | None}
_MANIFEST = {
    "subjects_of_task": Count,
    "split": str,
    "limit": int | None,
    "shot_order": str,
    "shots": Count,
}
# What results of earlier versions lack.
_LEFT_OUT = {
    "twins": dict,
    "twins_of_examples": dict[str, list],
    "left_out": dict[str, Count],
    "prompts_with_fewer_shots": Count,
}
_TWINS = {
    "examples": dict[str, Count],
    "questions": dict[str, Count],
    "subjects": Count,
    "splits": dict[str, dict[str, Count]],
}
_CURVE = {"context": Count, "perplexity": float, "tail_perplexity": float}
_PLAN = {
    "topology": str,
    "num_devices": Count,
    "memory_gib": dict[str, float],
    "peak_gib": float,
    "capacity_gib": float,
    "fits": bool,
    "predicted_step_seconds": float,
    "predicted_mfu": float,
}
# What plans of earlier versions lack: two numbers.
_INTERVAL = "predicted_mfu_interval"


def read_runs(paths: list[Path]) -> list[Recorded]:
    """The runs in the order given. Raises ConfigError for a folder that cannot be shown."""
    if len(paths) > MAX_RUNS:
        raise ConfigError(
            f"{len(paths)} runs were given and a page shows at most {MAX_RUNS}, one for each "
            "colour; choose fewer"
        )
    # Resolved: `runs/a` and `runs/../runs/a` are one run, and `.` has a name.
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigError(f"a run is given twice: {', '.join(map(str, paths))}")
    named = zip(paths, _names(resolved), COLOURS, strict=False)
    return [_read(path, name, colour) for path, name, colour in named]


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = [show_path("/".join(path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(map(show_path, paths))


def _read(path: Path, name: str, colour: str) -> Recorded:
    _refuse_no_run(path)
    run = Run(path)
    lines, events, config = run.metrics, run.events, run.settings or ""
    every_step = [
        require_keys(line, _STEP, f"{path}/metrics.jsonl: a line of step {line['step']}")
        for line in lines
        if "step_seconds" in line
    ]
    # After a restart metrics.jsonl has steps twice; later lines replace earlier ones.
    newest = {line["step"]: line for line in every_step}
    if not newest:
        raise ConfigError(
            f"{path}/metrics.jsonl has no finished step yet, so there is nothing to draw; what "
            f"happened so far: python -m baichuan_jax.resilience {quote_path(path)}"
        )
    steps = [newest[step] for step in sorted(newest)]
    tokens, total = {}, 0
    for line in steps:
        # Counted anew from the lines: the tokens of a step may differ (ignored labels).
        total += line["tokens"]
        tokens[line["step"]] = total
    return Recorded(
        name=name,
        colour=colour,
        run=run,
        config=config,
        settings=_settings(config, path / "config.yaml") if config else {},
        steps=steps,
        validations=[line for line in lines if "step_seconds" not in line],
        events=events,
        tokens=tokens,
        accounting=account(path),
        timeline=_timeline(launch_spans(path), every_step),
        tests=_results(path, TESTS),
        plans=_results(path, PLANS),
    )


def _refuse_no_run(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"there is no folder {str(path)!r} (working directory: {Path.cwd()})")
    if not (path / "metrics.jsonl").exists():
        # `runs/` in place of `runs/tiny` is the usual slip.
        inside = sorted(file.parent.name for file in path.glob("*/metrics.jsonl"))
        hint = f"; runs in it: {', '.join(inside)}" if inside else ""
        raise ConfigError(f"{path} is no run's folder: it has no metrics.jsonl{hint}")


def _settings(text: str, file: Path) -> dict[str, Any]:
    """The settings of a config.yaml by dotted name. Raises ConfigError."""
    try:
        tree = parse_yaml(text, str(file))
        if not isinstance(tree, dict):
            raise ConfigError(f"{file} must hold settings by name and holds {type(tree).__name__}")
    except ConfigError as error:
        raise ConfigError(
            f"{error}; repair it, or delete it: the run's next launch writes it anew"
        ) from None
    settings = flatten(tree)
    for name, value in settings.items():
        require_type(name, str, f"{file}: a setting's name")
        try:
            # Shown as JSON, which has no dates, bytes or sets.
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{file}: {name} is {show(value)}, which no setting may be") from None
    require_type(settings.get("train.num_steps"), Count | None, f"{file}: train.num_steps")
    return settings


def _results(path: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """JSON files below the run's folder: result.json by its folder, plans by their topology."""
    found, rows = {}, 0
    files = sorted(path.glob(pattern))
    _require_at_most(len(files), MOST_RESULTS, f"{path}", f"files {pattern}")
    for file in files:
        content = parse_json(decode(read_own(path, file, MOST_RESULT_BYTES), str(file)), str(file))
        if file.name == "result.json":
            result = found[file.parent.name] = _check_result(content, str(file))
            rows += sum(
                len(result[name])
                for name in ("curve", "subjects", "categories")
                if isinstance(result.get(name), list | dict)
            )
            _require_at_most(rows, MOST_ROWS, str(file), "rows (with those of results before it)")
            continue
        # A plan of several topologies is a list.
        for item in content if isinstance(content, list) else [content]:
            plan = require_keys(item, _PLAN, str(file))
            _require_kinds(plan, {_INTERVAL: list[float]}, str(file))
            require(len(plan.get(_INTERVAL, "12")) == 2, f"{file}: {_INTERVAL} must be two numbers")
            found[plan["topology"]] = plan
        _require_at_most(len(found), MOST_RESULTS, str(file), "plans (with those before it)")
    return found


def _require_at_most(count: int, most: int, where: str, what: str) -> None:
    if count > most:
        raise ConfigError(
            f"{where} has {count:,} {what} and a page shows at most {most:,}; move some of them "
            "elsewhere"
        )


def _check_result(content: Any, where: str) -> dict[str, Any]:
    """What `evaluate` wrote: a test's scores, or a curve of perplexity. Raises ConfigError."""
    if isinstance(content, dict) and "curve" in content:
        for row in require_type(content["curve"], list[dict], f"{where}: curve"):
            require_keys(row, _CURVE, f"{where}: a row of curve")
        return content
    # C-Eval's test split has no public answers, and its result no scores.
    if require_keys(content, {"scored": bool}, where)["scored"]:
        require_keys(content, _RESULT, where)
        manifest = require_keys(content["manifest"], _MANIFEST, f"{where}: manifest")
        _require_kinds(manifest, _LEFT_OUT, f"{where}: manifest")
        _require_kinds(manifest.get("twins", {}), _TWINS, f"{where}: twins")
        for name, cell in (content["categories"] | content["subjects"]).items():
            require_keys(cell, _SCORE, f"{where}: {show(name)}")
    return content


def _require_kinds(content: dict[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for name in kinds.keys() & content.keys():
        require_type(content[name], kinds[name], f"{where}: {name}")


def _timeline(launches: dict[int, tuple[float, float]], lines: list[dict[str, Any]]) -> Timeline:
    """What every launch did when, from the times of launches and the lines of all steps."""
    first = lines[0]["time"] - lines[0]["step_seconds"]
    # A run without attempts/ (an old one) begins with its first step.
    began = min([begin for begin, _ in launches.values()], default=first)
    newest = {line["step"]: index for index, line in enumerate(lines)}
    spans: list[Span] = []

    def add(launch: int, state: str, begin: float, end: float) -> None:
        spans.append(Span(launch, state, begin - began, end - began))

    before = None
    for number, (begin, end) in launches.items():
        if before is not None and begin > before:
            add(number, "down", before, begin)
        # A second more: the launch's last report may be older than its last line.
        mine = [
            (index, line) for index, line in enumerate(lines) if begin <= line["time"] <= end + 1.0
        ]
        here = begin
        for index, line in mine:
            # A step with a newer line was done again: its time was lost.
            state = "steps" if newest[line["step"]] == index else "lost"
            # Before its first step a launch was starting.
            if here == begin:
                here = max(begin, line["time"] - line["step_seconds"])
                add(number, "starting", begin, here)
            if spans[-1].state == state:
                spans[-1] = dataclasses.replace(spans[-1], end=line["time"] - began)
            else:
                add(number, state, here, line["time"])
            here = line["time"]
        # A launch without a step never got past its start.
        if end > here:
            add(number, "ending" if mine else "starting", here, end)
        before = max(end, here)
    return Timeline(began, spans)
