"""A run's folder, read back: its metrics, its events, its loss curve. What train() returns and a notebook holds on to."""

import io
import json
import math
import time
from pathlib import Path
from typing import Any, BinaryIO

from baichuan_jax.config.schema import ConfigError


class Run:
    """One run, finished or not. `status` of the last launch: "completed", "interrupted" or "running"."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl in order: one a step, one an evaluation. After a restart a repeated step stands again."""
        return _read_lines(self.path / "metrics.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        """Lines of events.jsonl in order."""
        return _read_lines(self.path / "events.jsonl")

    @property
    def status(self) -> str:
        for event in reversed(self.events):
            if event["kind"] in ("completed", "interrupted"):
                return event["kind"]
            if event["kind"] == "started":
                break
        return "running"

    def curve(self, name: str) -> dict[int, float]:
        """Step -> value of one figure, the latest where a step was repeated."""
        return {line["step"]: line[name] for line in self.metrics if line.get(name) is not None}

    def plot(self, path: Path | str | None = None) -> Any:
        """The loss curve as a matplotlib figure, also written as PNG to `path` (default: loss.png in the run's folder)."""
        loss, validation = self.curve("loss"), self.curve("eval_loss")
        started = [event for event in self.events if event["kind"] == "started"]
        entropy = started[-1].get("unigram_entropy") if started else None
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
        figure.savefig(path or self.path / "loss.png", dpi=120)
        return figure

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status}, {len(self.curve('loss'))} steps)"


def append_event(path: Path, kind: str, **fields: Any) -> None:
    """Add a line to the events of a run in which no process is training, after what a killed writer left of its last line."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "events.jsonl", "a+b") as file:
        drop_unfinished_line(file)
        file.write(
            (
                json.dumps(
                    {"time": round(time.time(), 3), "kind": kind, **fields}, ensure_ascii=False
                )
                + "\n"
            ).encode()
        )


def drop_unfinished_line(file: BinaryIO) -> None:
    """Cut off what a killed writer left of its last line."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def _make_figure(**settings: Any) -> Any:
    """A matplotlib figure that a notebook shows by itself, without pyplot and its global state."""
    from matplotlib.figure import Figure  # imported late: reading a run's figures needs no plotting

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    return Shown(**settings)


def smooth(values: list[float], share: float = 0.015) -> list[float]:
    """Exponential mean over about this share of the curve, corrected for its start."""
    keep = math.exp(-1 / max(1.0, share * len(values)))
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a last line that a killed writer left unfinished is not one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ConfigError(
                f"{path}, line {number} is no JSON: {line[:60]!r}; repair or delete that line"
            ) from None
    return found
