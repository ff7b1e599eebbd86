"""The report of a pipeline's run for people: tables, and the funnel as PNG and HTML."""

import html
import io
from typing import Any

from matplotlib.figure import Figure

from baichuan_jax.runs.console import Display

COLOURS = {"left": "#9dbfe0", "removed": "#d0d7de"}


def show(report: dict[str, Any], display: Display) -> None:
    """Print every stage with what it removed, and what was wrong with the input."""
    rows = []
    for stage in report["stages"]:
        removed = stage["documents_in"] - stage["documents_out"]
        rows.append(
            [
                stage["stage"],
                f"{stage['documents_in']:,}",
                f"{removed:,}",
                f"{removed / max(1, stage['documents_in']):.2%}",
                f"{stage['documents_out']:,}",
                f"{stage['bytes_in'] / 1e6:,.1f}",
                f"{stage['bytes_out'] / 1e6:,.1f}",
            ]
        )
    display.table(
        "the corpus, stage by stage",
        ["stage", "documents in", "removed", "share", "out", "MB in", "MB out"],
        rows,
    )
    reasons = [
        [
            f"{stage['stage']}: {reason}",
            f"{found['documents']:,}",
            f"{found['bytes'] / 1e6:,.2f}",
            _example(found),
        ]
        for stage in report["stages"]
        for reason, found in _by_size(stage["removed"])
    ]
    display.table("why", ["stage: reason", "documents", "MB", "for example"], reasons)
    for problem in report["problems"]:
        lines = (
            f"{', '.join(map(str, problem['lines'][:5]))}{', ...' if problem['count'] > 5 else ''}"
        )
        display.say(
            f"{problem['file']}: {problem['count']:,} {problem['reason']} at line {lines}: {problem['detail']}",
            "yellow",
        )


def _by_size(removed: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(removed.items(), key=lambda item: (-item[1]["documents"], item[0]))


def _example(found: dict[str, Any]) -> str:
    text = found["examples"][0]["text"] if found["examples"] else ""
    return "".join(
        character if character.isprintable() else " " for character in " ".join(text.split())
    )[:24]


def picture(report: dict[str, Any]) -> bytes:
    """The funnel: documents and bytes that are left after each stage, as PNG."""
    stages = report["stages"]
    names = ["input", *(stage["stage"] for stage in stages)]
    figure = Figure(figsize=(9, 0.5 * len(names) + 1.2), layout="constrained")
    for axes, unit, scale in zip(
        figure.subplots(1, 2, sharey=True), ("documents", "bytes"), (1, 1e6), strict=True
    ):
        values = [report["input"][unit], *(stage[f"{unit}_out"] for stage in stages)]
        for place, value in enumerate(values):
            axes.barh(
                place,
                values[0] / scale,
                left=-values[0] / scale / 2,
                color=COLOURS["removed"],
                height=0.8,
            )
            axes.barh(
                place, value / scale, left=-value / scale / 2, color=COLOURS["left"], height=0.8
            )
            share = value / max(values[0], 1)
            text = f"{value / scale:,.{0 if scale == 1 else 1}f}{'' if scale == 1 else ' MB'} ({share:.1%})"
            axes.text(0, place, text, ha="center", va="center", fontsize=8)
        axes.set_title(unit)
        axes.set_xticks([])
        axes.set_yticks(range(len(names)), names)
        axes.spines[:].set_visible(False)
    figure.axes[0].invert_yaxis()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def page(report: dict[str, Any]) -> str:
    """The funnel with every reason, its counts and examples, as one HTML page beside funnel.png."""
    parts = []
    for stage in report["stages"]:
        parts.append(
            f"<h2>{_escape(stage['stage'])}</h2><p>{stage['documents_in']:,} documents, {stage['bytes_in'] / 1e6:,.1f} MB in; "
            f"{stage['documents_out']:,} documents, {stage['bytes_out'] / 1e6:,.1f} MB out"
            + (
                f"; {stage['bytes_cut'] / 1e6:,.2f} MB cut from documents that stay"
                if stage["bytes_cut"]
                else ""
            )
            + ".</p>"
        )
        if stage["removed"]:
            rows = "".join(
                f"<tr><td>{_escape(reason)}<td class=n>{found['documents']:,}<td class=n>{found['bytes'] / 1e6:,.2f}<td>"
                + "".join(
                    f"<p><code>{_escape(e['id'])}</code> {_escape(e['text'])}</p>"
                    for e in found["examples"]
                )
                for reason, found in _by_size(stage["removed"])
            )
            parts.append(f"<table><tr><th>reason<th>documents<th>MB<th>examples{rows}</table>")
    if report["problems"]:
        rows = "".join(
            f"<tr><td>{_escape(p['file'])}<td>{_escape(p['reason'])}<td class=n>{p['count']:,}"
            f"<td>{', '.join(map(str, p['lines'][:20]))}<td>{_escape(p['detail'])}"
            for p in report["problems"]
        )
        parts.append(
            f"<h2>problems</h2><table><tr><th>file<th>problem<th>times<th>lines<th>detail{rows}</table>"
        )
    style = (
        "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #d0d7de;padding:.3em .6em;text-align:left;vertical-align:top}.n{text-align:right}"
        "td p{margin:.2em 0;overflow-wrap:anywhere}img{max-width:100%}"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>the corpus</title><style>{style}</style>"
        f"<h1>{report['final']['documents']:,} of {report['input']['documents']:,} documents are left</h1>"
        f"<img src=funnel.png alt='documents and bytes after each stage'>{''.join(parts)}</html>"
    )


def _escape(value: Any) -> str:
    return html.escape(str(value))
