"""The page's interactive figures (plotly). Colours of ground, text and grid, and the legends, are the page's: see page.html."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from baichuan_jax.evaluate.tables import COLUMNS, PUBLISHED, columns
from baichuan_jax.report.recorded import Recorded
from baichuan_jax.resilience.goodput import CATEGORIES
from baichuan_jax.runs.folder import smooth

MOST_POINTS = 2000  # of a curve; a longer one is drawn as the smallest and the largest value of equal stretches
GREY = "#8b929c"
# Read off the loss curve in Baichuan-7B's README, whose left edge is at about 3.0: tokens, loss.
PUBLISHED_LOSS = ((1e9, 3.0), (1e11, 2.2), (3e11, 2.0), (1.2e12, 1.79))
STATES = {
    "starting": ("starting (imports, packing, restoring, compiling)", "#d9a53f"),
    "steps": ("steps, with evaluations and saves", "#2f9e6e"),
    "lost": ("steps that were done again", "#d1495b"),
    "ending": ("ending, or standing still", "#8a7a6a"),
    "down": ("no process", "#b7bcc4"),
}
CAUSE_COLOURS = dict(
    zip(
        CATEGORIES,
        (
            "#2f9e6e",
            "#2aa5b5",
            "#d9a53f",
            "#a3861a",
            "#e0701e",
            "#c98bd6",
            "#3b82d6",
            "#7fb0e6",
            "#8a7a6a",
            "#d1495b",
            "#8c2f3b",
            "#b7bcc4",
        ),
        strict=True,
    )
)
# Events that are worth a mark of their own; verdicts come from the ledger.
INCIDENTS = (
    "update_skipped",
    "numerics",
    "corruption",
    "rolled_back",
    "window_skipped",
    "straggler",
    "checkpoint_failed",
    "checkpoint_corrupt",
    "port_taken",
    "failed",
    "interrupted",
)


def thin(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[Any], list[Any], int]:
    """At most about MOST_POINTS of a curve, and of how many points each two of them are the smallest and the largest."""
    size = math.ceil(2 * len(x) / MOST_POINTS) if len(x) > MOST_POINTS else 1
    if size == 1:
        return list(x), list(y), 1
    kept: list[int] = []
    for start in range(0, len(x), size):
        part = [index for index in range(start, min(start + size, len(x))) if y[index] is not None]
        if part:
            kept += sorted(
                {min(part, key=lambda index: y[index]), max(part, key=lambda index: y[index])}
            )
    return [x[index] for index in kept], [y[index] for index in kept], size


def _figure(y_title: str, x_title: str = "tokens", height: int = 340, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        hovermode="closest",
        showlegend=False,
        **layout,
    )
    figure.update_xaxes(title_text=x_title, automargin=True)
    figure.update_yaxes(title_text=y_title, automargin=True)
    return figure


def _line(
    figure: go.Figure, record: Recorded, x: Sequence[Any], y: Sequence[Any], name: str, **style: Any
) -> None:
    """A curve over tokens in the run's colour."""
    unit = style.pop("unit", "")
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        mode=style.pop("mode", "lines"),
        line={"color": record.colour, **style.pop("line", {})},
        hovertemplate=f"{record.label}<br>%{{x:.4s}} tokens<br>%{{y:.5g}}{unit}<extra></extra>",
        **style,
    )


def curve(
    records: list[Recorded],
    key: str,
    title: str,
    *,
    unit: str = "",
    scale: float = 1.0,
    log: bool = False,
) -> go.Figure | None:
    """A figure of the steps over tokens for every run that has it: every step, or their extremes; None where none has."""
    figure = _figure(title)
    for record in records:
        x, y, _ = thin(*record.curve(key))
        if any(value is not None for value in y):
            values = [None if value is None else scale * value for value in y]
            _line(
                figure,
                record,
                x,
                values,
                record.label,
                line={"width": 1.3},
                unit=unit,
                showlegend=len(records) > 1,
            )
    if log:
        figure.update_yaxes(type="log", dtick="D2", minorloglabels="complete")
    return figure if figure.data else None


def loss(records: list[Recorded]) -> go.Figure:
    """Training loss, every step and smoothed, validation loss, and the original's published curve."""
    figure = _figure("nats per token", height=460)
    for record in records:
        start = f"{record.label} " if len(records) > 1 else ""
        x, y = record.curve("loss")
        points = [(tokens, value) for tokens, value in zip(x, y, strict=True) if value is not None]
        smoothed = smooth(
            [value for _, value in points], min(0.015, 100 / max(1, len(points)))
        )  # 100 steps lag little
        thin_x, thin_y, _ = thin(x, y)
        every = max(1, len(points) // MOST_POINTS)
        _line(figure, record, thin_x, thin_y, f"{start}every step", line={"width": 1}, opacity=0.3)
        _line(
            figure,
            record,
            [tokens for tokens, _ in points][::every],
            smoothed[::every],
            f"{start}smoothed",
            line={"width": 2.2},
        )
        tokens, values = record.validation("eval_loss")
        if tokens:
            marker = {"size": 8 if len(tokens) < 50 else 4, "symbol": "diamond"}
            _line(
                figure,
                record,
                tokens,
                values,
                f"{start}validation",
                mode="lines+markers",
                line={"dash": "dot"},
                marker=marker,
            )
        if (entropy := record.last_event("started").get("unigram_entropy")) is not None:
            _line(
                figure,
                record,
                [x[0], x[-1]],
                [entropy] * 2,
                f"{start}unigram entropy",
                line={"dash": "dash", "width": 1},
                visible="legendonly" if len(records) > 1 else True,
            )
    reached = max(record.tokens[record.steps[-1]["step"]] for record in records)
    figure.add_scatter(
        x=[tokens for tokens, _ in PUBLISHED_LOSS],
        y=[value for _, value in PUBLISHED_LOSS],
        name="Baichuan-7B, published",
        mode="lines+markers",
        line={"color": GREY, "dash": "dash"},
        visible=True if reached >= PUBLISHED_LOSS[0][0] else "legendonly",
        hovertemplate="Baichuan-7B, read off its README's figure<br>%{x:.4s} tokens<br>%{y:.2f}<extra></extra>",
    )
    return figure


def goodput(record: Recorded, unit: str, seconds: float) -> go.Figure | None:
    """Goodput so far over the run's time, every fault, verdict and recovery on it, above what each launch was doing."""
    if not record.ledger.launches:
        return None
    figure = _figure("goodput so far", f"{unit} since the beginning", height=360)
    x, y, _ = thin(*record.goodput())
    figure.add_scatter(
        x=[value / seconds for value in x],
        y=y,
        name="goodput",
        line={"color": record.colour, "width": 2},
        hovertemplate=f"%{{x:.4g}} {unit}<br>goodput %{{y:.1%}}<extra></extra>",
    )
    for name, symbol, colour, points in marks(record):
        if points:
            figure.add_scatter(
                x=[time / seconds for time, _ in points],
                y=[_share_at(x, y, time) for time, _ in points],
                name=name,
                mode="markers",
                text=[text for _, text in points],
                hovertemplate=f"%{{text}}<br>at %{{x:.4g}} {unit}<extra></extra>",
                marker={
                    "symbol": symbol,
                    "size": 11,
                    "color": colour,
                    "line": {"width": 1, "color": "#ffffff"},
                },
            )
    for state, (name, colour) in STATES.items():
        spans = [span for span in record.spans if span.state == state]
        if spans:
            figure.add_bar(
                x=[(span.end - span.begin) / seconds for span in spans],
                base=[span.begin / seconds for span in spans],
                y=[""] * len(spans),
                orientation="h",
                yaxis="y2",
                name=name,
                marker={"color": colour, "line": {"width": 0}},
                text=[
                    f"launch {span.launch}: {state}, {span.end - span.begin:,.1f} s"
                    for span in spans
                ],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
    figure.update_layout(
        barmode="overlay",
        yaxis={"domain": [0.3, 1.0], "range": [0, min(1.05, 1.3 * max(y))], "tickformat": ".0%"},
        yaxis2={"domain": [0.0, 0.16], "showticklabels": False, "fixedrange": True},
    )
    figure.update_xaxes(rangemode="tozero", anchor="y2")
    return figure


def _share_at(seconds: list[float], shares: list[float], time: float) -> float:
    """Goodput at a time between two steps: it falls from the earlier one's on."""
    return next(
        (
            share * at / time
            for at, share in zip(reversed(seconds), reversed(shares), strict=True)
            if at <= time
        ),
        0.0,
    )


def marks(record: Recorded) -> list[tuple[str, str, str, list[tuple[float, str]]]]:
    """What is marked on the goodput: (name, symbol, colour, [(seconds since the beginning, words)])."""
    faults, verdicts, recoveries = [], [], []
    for fault in record.ledger.faults:
        who = (
            "nobody named"
            if fault.host is None
            else f"{fault.host}: process {', '.join(map(str, fault.processes))}"
        )
        at = fault.time - record.began
        detect = "" if fault.detect is None else f", noticed after {fault.detect:.1f} s"
        faults.append((at, f"fault in launch {fault.attempt}: {fault.cause}{detect}"))
        verdicts.append(
            (at + fault.localise, f"verdict: {who}<br>{fault.rule}<br>{_wrap(fault.evidence)}")
        )
        if fault.recover is not None:
            recoveries.append(
                (
                    at + fault.recover,
                    f"first new step, {fault.recover:.1f} s after the fault was noticed",
                )
            )
    restored = [
        (event["time"] - record.began, f"restored step {event['step']}")
        for event in record.events
        if event["kind"] == "restored"
    ]
    saves = [
        (event["time"] - record.began, f"checkpoint of step {event['step']}")
        for event in record.events
        if event["kind"] == "checkpoint"
    ]
    others = [
        (
            event["time"] - record.began,
            _wrap(f"{event['kind'].replace('_', ' ')}: {_describe(event)}"),
        )
        for event in record.events
        if event["kind"] in INCIDENTS
    ]
    return [
        ("fault", "x", "#d1495b", faults),
        ("verdict", "diamond", "#b163c9", verdicts),
        ("recovery", "triangle-up", "#2f9e6e", recoveries),
        ("restored", "star", "#2aa5b5", restored),
        ("checkpoint", "line-ns-open", GREY, saves),
        ("event", "circle", "#d9a53f", others),
    ]


def _describe(event: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in event.items() if name not in ("time", "kind")
    )


def _wrap(text: str, width: int = 70, lines: int = 6) -> str:
    """Words for a hover label: broken into lines, and cut with a mark where there are too many."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    parts = [escaped[start : start + width] for start in range(0, len(escaped), width)]
    return "<br>".join(parts[:lines]) + (" …" if len(parts) > lines else "")


def where_time_went(records: list[Recorded]) -> go.Figure | None:
    """Shares of each run's time by cause."""
    shown = [record for record in records if record.ledger.total]
    if not shown:
        return None
    figure = _figure("", "share of the run's time", height=80 + 44 * len(shown), barmode="stack")
    for cause in CATEGORIES:
        seconds = [max(0.0, record.ledger.seconds[cause]) for record in shown]
        if max(seconds) >= 0.05:
            figure.add_bar(
                x=[
                    value / record.ledger.total
                    for value, record in zip(seconds, shown, strict=True)
                ],
                y=[record.label for record in shown],
                orientation="h",
                name=cause,
                marker={"color": CAUSE_COLOURS[cause]},
                customdata=seconds,
                hovertemplate=f"{cause}: %{{customdata:,.1f}} s, %{{x:.1%}}<extra>%{{y}}</extra>",
            )
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(autorange="reversed")
    return figure


def memory_plan(plan: dict[str, Any]) -> go.Figure:
    """A device's memory by what it holds, beside its capacity."""
    figure = _figure("", "GiB of one device", height=140, barmode="stack")
    for (part, size), colour in zip(
        plan["memory_gib"].items(), CAUSE_COLOURS.values(), strict=False
    ):
        figure.add_bar(
            x=[size],
            y=[""],
            orientation="h",
            name=f"{part} {size:.1f}",
            marker={"color": colour},
            hoverinfo="name+x",
        )
    figure.add_vline(x=plan["capacity_gib"], line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(
        range=[0, 1.05 * max(plan["capacity_gib"], sum(plan["memory_gib"].values()))]
    )
    figure.update_yaxes(showticklabels=False)
    return figure


def scores(records: list[Recorded], name: str) -> go.Figure:
    """A test's columns as the original's table has them, each run beside Baichuan-7B's published row."""
    figure = _figure("accuracy, %", "", barmode="group")
    task = ""
    for record in records:
        result = record.tests.get(name)
        if result is not None and result["scored"]:
            task, cells = result["task"], columns(result)
            figure.add_bar(
                x=list(cells),
                y=[None if cell is None else 100 * cell["accuracy"] for cell in cells.values()],
                name=record.label,
                marker={"color": record.colour},
                hovertemplate=f"{record.label}<br>%{{x}}: %{{y:.1f}} %<extra></extra>",
                error_y={
                    "type": "data",
                    "array": [100 * ((cell or {}).get("stderr") or 0) for cell in cells.values()],
                    "color": GREY,
                },
            )
    published = PUBLISHED[task]["Baichuan-7B"]
    figure.add_bar(
        x=COLUMNS[task],
        y=published,
        name="Baichuan-7B, published",
        marker={"color": GREY},
        hoverinfo="name+y",
    )
    figure.add_hline(y=25, line={"color": GREY, "dash": "dash", "width": 1})
    return figure


def scores_over_tokens(records: list[Recorded], task: str) -> go.Figure:
    """A test's score at every evaluation during training, with its standard error; chance is a quarter."""
    figure = _figure(f"{task}, % right")
    for record in records:
        x, y = record.validation(task)
        if x:
            errors = [100 * value for value in record.validation(f"{task}_stderr")[1]]
            bars = {"type": "data", "array": errors} if len(errors) == len(y) else None
            _line(
                figure,
                record,
                x,
                [100 * value for value in y],
                record.label,
                mode="lines+markers",
                error_y=bars,
                showlegend=len(records) > 1,
            )
    figure.add_hline(y=25, line={"color": GREY, "dash": "dash", "width": 1})
    return figure


def perplexity(records: list[Recorded], name: str) -> go.Figure:
    """Perplexity by context length."""
    figure = _figure("perplexity", "context length (tokens)")
    for record in records:
        if name in record.tests:
            rows = record.tests[name]["curve"]
            lengths = [row["context"] for row in rows]
            for key, words, dash in (
                ("perplexity", "whole windows", "solid"),
                ("tail_perplexity", "their last tokens", "dot"),
            ):
                figure.add_scatter(
                    x=lengths,
                    y=[row[key] for row in rows],
                    name=f"{record.label}, {words}",
                    mode="lines+markers",
                    line={"color": record.colour, "dash": dash},
                    hovertemplate="%{x} tokens: %{y:.3f}<extra></extra>",
                )
    return figure
