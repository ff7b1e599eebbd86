"""The page's interactive figures, made with plotly.

In: recorded runs. Out: figures that page.py puts in their places; None where no run has what a
figure would show. A figure sets the colours of its data only: ground, text, grid and legends are
drawn by page.html's script, which knows the reader's theme.
"""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from baichuan_jax.config.messages import hide_secrets, printable
from baichuan_jax.evaluate.tables import COLUMNS, PUBLISHED, columns
from baichuan_jax.report.recorded import Recorded, markup
from baichuan_jax.resilience.goodput import CATEGORIES
from baichuan_jax.runs.events import (
    CheckpointCorrupt,
    CheckpointFailed,
    CheckpointSaved,
    Corruption,
    DataChanged,
    Event,
    Failed,
    Interrupted,
    NumericsFault,
    PortTaken,
    Restored,
    RolledBack,
    Started,
    StragglerFound,
    UpdateSkipped,
    WindowSkipped,
    latest,
    of_kind,
)
from baichuan_jax.runs.folder import smooth

# Points of a curve at the most: several times the pixels of a screen, and a page of a few MB.
MOST_POINTS = 2000
GREY = "#8b929c"
# Read off the loss curve in Baichuan-7B's README, whose left edge is at about 3.0: tokens, loss.
PUBLISHED_LOSS = ((1e9, 3.0), (1e11, 2.2), (3e11, 2.0), (1.2e12, 1.79))
# What a launch does: (name in the legend, colour).
STATES = {
    "starting": ("starting (imports, packing, restoring, compiling)", "#d9a53f"),
    "steps": ("steps, with evaluations and saves", "#2f9e6e"),
    "lost": ("steps that were done again", "#d1495b"),
    "ending": ("ending, or standing still", "#8a7a6a"),
    "down": ("no process", "#b7bcc4"),
}
CATEGORY_COLOURS = {
    "steps": "#2f9e6e",
    "data": "#2aa5b5",
    "imports and start": "#d9a53f",
    "pack": "#a3861a",
    "compile": "#e0701e",
    "restore": "#c98bd6",
    "save": "#3b82d6",
    "evaluate": "#7fb0e6",
    "finish": "#8a7a6a",
    "lost steps": "#d1495b",
    "hang": "#8c2f3b",
    "restart": "#b7bcc4",
}
# Events that get a mark of their own. Faults and verdicts come from the accounting.
INCIDENTS = (
    UpdateSkipped,
    NumericsFault,
    Corruption,
    RolledBack,
    WindowSkipped,
    DataChanged,
    StragglerFound,
    CheckpointFailed,
    CheckpointCorrupt,
    PortTaken,
    Failed,
    Interrupted,
)


def thin(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[Any], list[Any], int]:
    """At most about MOST_POINTS of a curve, and how many points each pair of them stands for.

    Of every stretch the smallest and the largest value are kept, in their order, so that no spike
    is lost; a mean or every n-th point would hide one.
    """
    size = math.ceil(2 * len(x) / MOST_POINTS) if len(x) > MOST_POINTS else 1
    # Short curves are drawn as they are.
    if size == 1:
        return list(x), list(y), 1
    kept: list[int] = []
    for start in range(0, len(x), size):
        # None breaks a line where a loss was not finite; an extreme of it does not exist.
        part = [index for index in range(start, min(start + size, len(x))) if y[index] is not None]
        if part:
            value = lambda index: y[index]
            kept += sorted({min(part, key=value), max(part, key=value)})
    return [x[index] for index in kept], [y[index] for index in kept], size


def curve(
    records: list[Recorded],
    key: str,
    title: str,
    *,
    unit: str = "",
    scale: float = 1.0,
    log: bool = False,
) -> go.Figure | None:
    """A metric of the steps over tokens, for every run that has it."""
    figure = _figure(title)
    several = len(records) > 1
    for record in records:
        # Thinned for each curve by itself: extremes of one metric are not those of another.
        x, y, _ = thin(*record.curve(key))
        if any(value is not None for value in y):
            values = [None if value is None else scale * value for value in y]
            line = {"width": 1.3}
            _line(figure, record, x, values, record.label, line=line, unit=unit, showlegend=several)
    # Labels at 1, 2 and 5 of each decade.
    if log:
        figure.update_yaxes(type="log", dtick="D2", minorloglabels="complete")
    return figure if figure.data else None


def loss(records: list[Recorded]) -> go.Figure:
    """Training loss, every step and smoothed, validation loss, and the original's curve."""
    figure = _figure("nats per token", height=460)
    several = len(records) > 1
    for record in records:
        _add_losses(figure, record, f"{record.label} " if several else "", several)
    reached = max(record.tokens[record.steps[-1]["step"]] for record in records)
    figure.add_scatter(
        x=[tokens for tokens, _ in PUBLISHED_LOSS],
        y=[value for _, value in PUBLISHED_LOSS],
        name="Baichuan-7B, published",
        mode="lines+markers",
        line={"color": GREY, "dash": "dash"},
        # A short run would shrink to a dot beside it.
        visible=True if reached >= PUBLISHED_LOSS[0][0] else "legendonly",
        hovertemplate="Baichuan-7B, read off its README's figure<br>%{x:.4s} tokens"
        "<br>%{y:.2f}<extra></extra>",
    )
    return figure


def _add_losses(figure: go.Figure, record: Recorded, start: str, several: bool) -> None:
    """One run's curves in the figure of losses."""
    x, y = record.curve("loss")
    thin_x, thin_y, _ = thin(x, y)
    _line(figure, record, thin_x, thin_y, f"{start}every step", line={"width": 1}, opacity=0.3)
    finite = [(tokens, value) for tokens, value in zip(x, y, strict=True) if value is not None]
    # At most about 100 steps of smoothing: the curve of a long run lags behind by no more.
    share = min(0.015, 100 / max(1, len(finite)))
    smoothed = smooth([value for _, value in finite], share)
    # A smooth curve has no extremes to lose: every n-th point will do.
    every = max(1, len(finite) // MOST_POINTS)
    tokens = [tokens for tokens, _ in finite]
    line = {"width": 2.2}
    _line(figure, record, tokens[::every], smoothed[::every], f"{start}smoothed", line=line)
    tokens, values = record.validation("eval_loss")
    if tokens:
        style: dict[str, Any] = {"mode": "lines+markers", "line": {"dash": "dot"}}
        style["marker"] = {"size": 8 if len(tokens) < 50 else 4, "symbol": "diamond"}
        _line(figure, record, tokens, values, f"{start}validation", **style)
    started = latest(record.events, Started)
    if started is not None and started.unigram_entropy is not None:
        ends, values = [x[0], x[-1]], [started.unigram_entropy] * 2
        style = {"line": {"dash": "dash", "width": 1}}
        style["visible"] = "legendonly" if several else True
        _line(figure, record, ends, values, f"{start}unigram entropy", **style)


def goodput(record: Recorded, unit: str, seconds: float) -> go.Figure | None:
    """Goodput over the run's time with its faults, above what each launch did.

    `unit` is the name of the time's unit, `seconds` its length.
    """
    if not record.accounting.launches:
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
    # Marks sit on the curve of goodput, so that its fall is seen beside its cause.
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
    _add_launches(figure, record, seconds)
    # No step may have ended after the beginning, where a clock was set back.
    top = 1.3 * max(y, default=1.0)
    # Two axes of one figure: zooming in time moves both.
    figure.update_layout(
        barmode="overlay",
        yaxis={
            "domain": [0.3, 1.0],
            "range": [0, min(1.05, top)],
            "tickformat": ".0%",
        },
        yaxis2={"domain": [0.0, 0.16], "showticklabels": False, "fixedrange": True},
    )
    figure.update_xaxes(rangemode="tozero", anchor="y2")
    return figure


def _add_launches(figure: go.Figure, record: Recorded, seconds: float) -> None:
    """What each launch did when, as bars on the figure's second axis."""
    # One trace a state, so that the legend has each once.
    for state, (name, colour) in STATES.items():
        spans = [span for span in record.timeline.spans if span.state == state]
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


def _share_at(seconds: list[float], shares: list[float], time: float) -> float:
    """Goodput at a time between two steps: after a step it falls until the next one ends."""
    for at, share in zip(reversed(seconds), reversed(shares), strict=True):
        if at <= time:
            return share * at / time
    return 0.0


def marks(record: Recorded) -> list[tuple[str, str, str, list[tuple[float, str]]]]:
    """Marks on the goodput: (name, symbol, colour, [(seconds since the beginning, text)])."""
    began = record.timeline.began
    faults, verdicts, recoveries = [], [], []
    for fault in record.accounting.faults:
        who = "no host can be named"
        if fault.host is not None:
            who = f"{fault.host}: process {', '.join(map(str, fault.processes))}"
        cause, rule, who = markup(fault.cause), markup(fault.rule), markup(who)
        # Times on the axis count from the run's beginning.
        at = fault.time - began
        detect = "" if fault.detect is None else f", noticed after {fault.detect:.1f} s"
        faults.append((at, f"fault in launch {fault.attempt}: {cause}{detect}"))
        evidence = _wrap(fault.evidence)
        verdicts.append((at + fault.localise, f"verdict: {who}<br>{rule}<br>{evidence}"))
        if fault.recover is not None:
            text = f"first new step, {fault.recover:.1f} s after the fault was noticed"
            recoveries.append((at + fault.recover, text))
    events = record.events
    restored = [(e.time - began, f"restored step {e.step}") for e in of_kind(events, Restored)]
    saved = of_kind(events, CheckpointSaved)
    saves = [(event.time - began, f"checkpoint of step {event.step}") for event in saved]
    incidents = [event for event in events if isinstance(event, INCIDENTS)]
    others = [(event.time - began, _wrap(_describe(event))) for event in incidents]
    return [
        ("fault", "x", "#d1495b", faults),
        ("verdict", "diamond", "#b163c9", verdicts),
        ("recovery", "triangle-up", "#2f9e6e", recoveries),
        ("restored", "star", "#2aa5b5", restored),
        ("checkpoint", "line-ns-open", GREY, saves),
        ("event", "circle", "#d9a53f", others),
    ]


def _describe(event: Event) -> str:
    fields = ", ".join(f"{name} {value}" for name, value in event.fields.items())
    return f"{event.kind.replace('_', ' ')}: {fields}"


def _wrap(text: str, width: int = 70, lines: int = 6) -> str:
    """Text for a hover label: escaped, broken into lines, cut with a mark where it is too long."""
    shown = printable(hide_secrets(text), one_line=True)
    # Cut at any character: evidence is often one long path or number. Before it is escaped, or an
    # escape could be cut in two.
    parts = [shown[start : start + width] for start in range(0, len(shown), width)]
    return "<br>".join(map(markup, parts[:lines])) + (" …" if len(parts) > lines else "")


def where_time_went(records: list[Recorded]) -> go.Figure | None:
    """Shares of each run's time by category."""
    shown = [record for record in records if record.accounting.total]
    if not shown:
        return None
    figure = _figure("", "share of the run's time", height=80 + 44 * len(shown), barmode="stack")
    # Shares and not seconds: runs of different length are compared.
    totals = [record.accounting.total for record in shown]
    # In the accounting's order, the same for all runs.
    for category in CATEGORIES:
        seconds = [max(0.0, record.accounting.seconds[category]) for record in shown]
        if max(seconds) >= 0.05:  # less is an entry in the legend for nothing
            figure.add_bar(
                x=[value / total for value, total in zip(seconds, totals, strict=True)],
                y=[record.label for record in shown],
                orientation="h",
                name=category,
                marker={"color": CATEGORY_COLOURS[category]},
                customdata=seconds,
                hovertemplate=f"{category}: %{{customdata:,.1f}} s, %{{x:.1%}}"
                "<extra>%{y}</extra>",
            )
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(autorange="reversed")
    return figure


def memory_plan(plan: dict[str, Any]) -> go.Figure:
    """A device's memory by what it holds, beside its capacity."""
    figure = _figure("", "GiB of one device", height=140, barmode="stack")
    parts = plan["memory_gib"]
    # Any distinct colours: parts of memory have none of their own.
    for (part, size), colour in zip(parts.items(), CATEGORY_COLOURS.values(), strict=False):
        figure.add_bar(
            x=[size],
            y=[""],
            orientation="h",
            name=f"{markup(part)} {size:.1f}",
            marker={"color": colour},
            hoverinfo="name+x",
        )
    figure.add_vline(x=plan["capacity_gib"], line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(range=[0, 1.05 * max(plan["capacity_gib"], sum(parts.values()))])
    figure.update_yaxes(showticklabels=False)
    return figure


def scores(records: list[Recorded], name: str) -> go.Figure:
    """A test's columns as in the original's table, each run beside Baichuan-7B's published row."""
    figure = _figure("accuracy, %", "", barmode="group")
    task = ""
    for record in records:
        result = record.tests.get(name)
        if result is not None and result["scored"]:
            task, cells = result["task"], columns(result)
            errors = [100 * ((cell or {}).get("stderr") or 0) for cell in cells.values()]
            figure.add_bar(
                x=list(cells),
                y=[None if cell is None else 100 * cell["accuracy"] for cell in cells.values()],
                name=record.label,
                marker={"color": record.colour},
                hovertemplate=f"{record.label}<br>%{{x}}: %{{y:.1f}} %<extra></extra>",
                error_y={"type": "data", "array": errors, "color": GREY},
            )
    figure.add_bar(
        x=COLUMNS[task],
        y=PUBLISHED[task]["Baichuan-7B"],
        name="Baichuan-7B, published",
        marker={"color": GREY},
        hoverinfo="name+y",
    )
    _add_chance(figure)
    return figure


def scores_over_tokens(records: list[Recorded], task: str) -> go.Figure:
    """A test's score at every evaluation during training, with its standard error."""
    figure = _figure(f"{task}, % right")
    for record in records:
        x, y = record.validation(task)
        if x:
            # A single question has no standard error; then none is drawn.
            errors = [100 * value for value in record.validation(f"{task}_stderr")[1]]
            style: dict[str, Any] = {"mode": "lines+markers", "showlegend": len(records) > 1}
            if len(errors) == len(y):
                style["error_y"] = {"type": "data", "array": errors}
            _line(figure, record, x, [100 * value for value in y], record.label, **style)
    _add_chance(figure)
    return figure


def perplexity(records: list[Recorded], name: str) -> go.Figure:
    """Perplexity by context length."""
    figure = _figure("perplexity", "context length (tokens)")
    curves = (
        ("perplexity", "whole windows", "solid"),
        ("tail_perplexity", "their last tokens", "dot"),
    )
    for record in records:
        if name in record.tests:
            rows = record.tests[name]["curve"]
            for key, what, dash in curves:
                figure.add_scatter(
                    x=[row["context"] for row in rows],
                    y=[row[key] for row in rows],
                    name=f"{record.label}, {what}",
                    mode="lines+markers",
                    line={"color": record.colour, "dash": dash},
                    hovertemplate="%{x} tokens: %{y:.3f}<extra></extra>",
                )
    return figure


def _figure(y_title: str, x_title: str = "tokens", height: int = 340, **layout: Any) -> go.Figure:
    figure = go.Figure()
    # No template: plotly's default one sets a ground of its own.
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
    # What remains of style goes to plotly as it is.
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


def _add_chance(figure: go.Figure) -> None:
    """A line at the score of guessing among four options."""
    figure.add_hline(y=25, line={"color": GREY, "dash": "dash", "width": 1})
