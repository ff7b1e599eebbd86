"""What a run's folder holds, read for its page: curves over tokens, events, where its time went, results and plans."""

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import yaml

from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.resilience.goodput import Accounting, account, launch_spans
from baichuan_jax.runs.folder import Run

# Told apart by people who see few colours, on light and on dark ground.
COLOURS = ("#3b82d6", "#e0701e", "#2f9e6e", "#b163c9", "#d1495b", "#a3861a", "#2aa5b5", "#8a7a6a")
MAX_RUNS = len(COLOURS)


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a launch, in seconds since the run's beginning. `state`: see STATES of figures.py."""

    launch: int
    state: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One run. `steps` holds the newest line of every step, `tokens` what had been trained when a step was done."""

    name: str
    colour: str
    run: Run
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    tokens: dict[int, int]
    ledger: Accounting
    spans: list[Span]
    began: float
    tests: dict[str, dict[str, Any]]
    plans: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        """The name as HTML, which plotly's words are too."""
        return html.escape(self.name, quote=False)

    def curve(self, name: str) -> tuple[list[int], list[Any]]:
        """Tokens and values of a figure of the steps; None where it was not finite."""
        found = [line for line in self.steps if name in line]
        return [self.tokens[line["step"]] for line in found], [line[name] for line in found]

    def validation(self, name: str) -> tuple[list[int], list[Any]]:
        """Tokens and values of a figure of the evaluations, the newest where a step was evaluated twice."""
        newest = {
            line["step"]: line[name] for line in self.validations if line.get(name) is not None
        }
        return [self.tokens.get(step, 0) for step in newest], list(newest.values())

    def last_event(self, kind: str) -> dict[str, Any]:
        """The newest event of a kind, or nothing."""
        return next((event for event in reversed(self.events) if event["kind"] == kind), {})

    def goodput(self) -> tuple[list[float], list[float]]:
        """Seconds since the beginning, and the share of them that went into steps which count, after each such step."""
        seconds, shares, good = [], [], 0.0
        for line in sorted(self.steps, key=lambda line: line["time"]):
            good += line["step_seconds"]
            elapsed = line["time"] - self.began
            if elapsed > 0:
                seconds.append(elapsed)
                shares.append(min(1.0, good / elapsed))
        if self.spans and self.spans[-1].end > seconds[-1]:
            seconds.append(self.spans[-1].end)
            shares.append(good / seconds[-1])
        return seconds, shares


def read_runs(paths: list[Path]) -> list[Recorded]:
    """The runs in the order given. Raises ConfigError with what is wrong of a folder that cannot be shown."""
    if len(paths) > MAX_RUNS:
        raise ConfigError(
            f"{len(paths)} runs were given and a page shows at most {MAX_RUNS}, one a colour; choose fewer"
        )
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigError(f"a run is given twice: {', '.join(map(str, paths))}")
    return [
        _read(path, name, colour)
        for path, name, colour in zip(paths, _names(resolved), COLOURS, strict=False)
    ]


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, name: str, colour: str) -> Recorded:
    _refuse_no_run(path)
    run = Run(path)
    lines, events = run.metrics, run.events
    newest = {line["step"]: line for line in lines if "step_seconds" in line}
    if not newest:
        raise ConfigError(
            f"{path}/metrics.jsonl has no finished step yet, so there is nothing to draw; what happened so far: "
            f"python -m baichuan_jax.resilience {path}"
        )
    steps = [newest[step] for step in sorted(newest)]
    tokens, total = {}, 0
    for line in steps:
        total += line["tokens"]
        tokens[line["step"]] = total
    launches = launch_spans(path)
    every = [line for line in lines if "step_seconds" in line]
    began = min(
        [begin for begin, _ in launches.values()],
        default=every[0]["time"] - every[0]["step_seconds"],
    )
    return Recorded(
        name,
        colour,
        run,
        _settings(path / "config.yaml"),
        steps,
        [line for line in lines if "step_seconds" not in line],
        events,
        tokens,
        account(path),
        _spans(launches, every, began),
        began,
        _results(path, "evaluations/*/result.json"),
        _results(path, "plans/*.json"),
    )


def _refuse_no_run(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"there is no folder {str(path)!r} (working directory: {Path.cwd()})")
    if not (path / "metrics.jsonl").exists():
        inside = sorted(file.parent.name for file in path.glob("*/metrics.jsonl"))
        hint = f"; runs in it: {', '.join(inside)}" if inside else ""
        raise ConfigError(f"{path} is no run's folder: it has no metrics.jsonl{hint}")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of the settings in a configuration's sections."""
    sections = {
        item.name for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type)
    }
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flatten(value, f"{key}.")
            if not prefix and key in sections and isinstance(value, dict)
            else {prefix + key: value}
        )
    return found


def _settings(file: Path) -> dict[str, Any]:
    """The run's settings by dotted name; none where its config.yaml is lost."""
    if not file.exists():
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold settings by name and holds {type(tree).__name__}")
    return flatten(tree)


def _results(path: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """JSON files of the run's folder by the name of their folder, or by their own."""
    found = {}
    for file in sorted(path.glob(pattern)):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is no JSON: {error}") from None
        for item in content if isinstance(content, list) else [content]:
            name = (
                file.parent.name if file.name == "result.json" else item.get("topology", file.stem)
            )
            found[name] = item
    return found


def _spans(
    launches: dict[int, tuple[float, float]], lines: list[dict[str, Any]], began: float
) -> list[Span]:
    """What every launch did when: starting, steps, steps that were done again later, ending; between launches nothing ran."""
    newest = {line["step"]: index for index, line in enumerate(lines)}
    spans: list[Span] = []
    before = None
    for number, (begin, end) in launches.items():
        if before is not None and begin > before:
            spans.append(Span(number, "down", before - began, begin - began))
        mine = [
            (index, line) for index, line in enumerate(lines) if begin <= line["time"] <= end + 1.0
        ]
        here = begin
        for index, line in mine:
            state = "steps" if newest[line["step"]] == index else "lost"
            if here == begin:
                here = max(begin, line["time"] - line["step_seconds"])
                spans.append(Span(number, "starting", begin - began, here - began))
            if spans[-1].state == state:
                spans[-1] = dataclasses.replace(spans[-1], end=line["time"] - began)
            else:
                spans.append(Span(number, state, here - began, line["time"] - began))
            here = line["time"]
        if end > here:
            spans.append(Span(number, "ending" if mine else "starting", here - began, end - began))
        before = max(end, here)
    return spans
