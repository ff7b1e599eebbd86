"""The report of a pipeline's run for people: tables, and the funnel as PNG and HTML."""

import io
from typing import Any

from matplotlib.figure import Figure

from baichuan_jax.config.messages import as_html
from baichuan_jax.documents.files import UNREAD
from baichuan_jax.runs.console import Display

LEFT, REMOVED = "#9dbfe0", "#d0d7de"
STYLE = (
    "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}"
    "td,th{border:1px solid #d0d7de;padding:.3em .6em;text-align:left;vertical-align:top}"
    ".n{text-align:right}td p{margin:.2em 0;overflow-wrap:anywhere}img{max-width:100%}"
)


def show(report: dict[str, Any], display: Display) -> None:
    """Print every stage with what it removed, and what was wrong with the input."""
    rows = []
    for stage in report["stages"]:
        removed = stage["documents_in"] - stage["documents_out"]
        # A stage may get no document.
        share = removed / max(1, stage["documents_in"])
        documents = (f"{stage['documents_in']:,}", f"{removed:,}", f"{share:.2%}")
        sizes = (f"{stage[name] / 1e6:,.1f}" for name in ("bytes_in", "bytes_out"))
        rows.append([stage["stage"], *documents, f"{stage['documents_out']:,}", *sizes])
    columns = ["stage", "documents in", "removed", "share", "out", "MB in", "MB out"]
    display.table("the corpus, stage by stage", columns, rows)
    reasons = []
    for stage in report["stages"]:
        for reason, found in _by_size(stage["removed"]):
            counts = (f"{found['documents']:,}", f"{found['bytes'] / 1e6:,.2f}")
            reasons.append([f"{stage['stage']}: {reason}", *counts, _example(found)])
    display.table("why", ["stage: reason", "documents", "MB", "for example"], reasons)
    given = report["input"]
    counted = [
        (given["files"], "files read"),
        *((given[name], words) for name, words in UNREAD.items()),
        (given["documents"], "documents"),
        (given["without_id"], "documents without an id of their own"),
    ]
    display.say(f"input: {', '.join(f'{count:,} {what}' for count, what in counted if count)}")
    # Last, where a terminal shows it: what was wrong with the input is what a user can mend.
    for problem in report["problems"]:
        more = ", ..." if problem["count"] > 5 else ""
        lines = f"{', '.join(map(str, problem['lines'][:5]))}{more}"
        display.say(
            f"{problem['file']}: {problem['count']:,} {problem['reason']} at line {lines}: "
            f"{problem['detail']}",
            "yellow",
        )


def _by_size(removed: dict[str, Any]) -> list[tuple[str, Any]]:
    # By name where counts are equal, so that the same report gives the same page.
    return sorted(removed.items(), key=lambda item: (-item[1]["documents"], item[0]))


def _example(found: dict[str, Any]) -> str:
    """The beginning of the first example, short enough for a column, without control characters."""
    text = " ".join(found["examples"][0]["text"].split()) if found["examples"] else ""
    return "".join(character if character.isprintable() else " " for character in text)[:24]


def picture(report: dict[str, Any]) -> bytes:
    """The funnel: documents and bytes that are left after each stage, as PNG."""
    stages = report["stages"]
    names = ["input", *(stage["stage"] for stage in stages)]
    figure = Figure(figsize=(9, 0.5 * len(names) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, scale, unit in ((left, "documents", 1, ""), (right, "bytes", 1e6, " MB")):
        values = [report["input"][name], *(stage[f"{name}_out"] for stage in stages)]
        whole = values[0] / scale
        for place, value in enumerate(values):
            size = value / scale
            # Grey, the whole input; blue before it, what is left. Both around the middle.
            axes.barh(place, whole, left=-whole / 2, color=REMOVED, height=0.8)
            axes.barh(place, size, left=-size / 2, color=LEFT, height=0.8)
            share = value / max(values[0], 1)
            text = f"{size:,.{1 if unit else 0}f}{unit} ({share:.1%})"
            axes.text(0, place, text, ha="center", va="center", fontsize=8)
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks(range(len(names)), names)
        axes.spines[:].set_visible(False)
    # Once: both share the axis, and a second call would turn it back.
    figure.axes[0].invert_yaxis()
    content = io.BytesIO()
    # Without the version of matplotlib, the same report gives the same bytes.
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def page(report: dict[str, Any]) -> str:
    """The funnel with every reason, its counts and examples, as an HTML page beside funnel.png."""
    parts = [_stage(stage) for stage in report["stages"]]
    if report["problems"]:
        columns = ("file", "problem", "times", "lines", "detail")
        # Cells and rows need no closing tags in HTML.
        rows = "".join(
            f"<tr><td>{_escape(p['file'])}<td>{_escape(p['reason'])}<td class=n>{p['count']:,}"
            f"<td>{', '.join(map(str, p['lines'][:20]))}<td>{_escape(p['detail'])}"
            for p in report["problems"]
        )
        parts.append(f"<h2>problems</h2>{_table(columns, rows)}")
    left, given = report["final"]["documents"], report["input"]["documents"]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>the corpus</title>"
        # No script at all, and the picture beside this page alone.
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; img-src 'self' file:\">"
        f"<style>{STYLE}</style><h1>{left:,} of {given:,} documents are left</h1>"
        "<img src=funnel.png alt='documents and bytes after each stage'>"
        f"{''.join(parts)}</html>"
    )


def _stage(stage: dict[str, Any]) -> str:
    """A stage's heading, its counts, and a table of its reasons."""
    size_in, size_out = (stage[name] / 1e6 for name in ("bytes_in", "bytes_out"))
    text = (
        f"<h2>{_escape(stage['stage'])}</h2>"
        f"<p>{stage['documents_in']:,} documents, {size_in:,.1f} MB in; "
        f"{stage['documents_out']:,} documents, {size_out:,.1f} MB out"
    )
    if stage["bytes_cut"]:
        text += f"; {stage['bytes_cut'] / 1e6:,.2f} MB cut from documents that stay"
    text += ".</p>"
    rows = "".join(
        f"<tr><td>{_escape(reason)}<td class=n>{found['documents']:,}"
        f"<td class=n>{found['bytes'] / 1e6:,.2f}<td>{_examples(found['examples'])}"
        for reason, found in _by_size(stage["removed"])
    )
    return text + (_table(("reason", "documents", "MB", "examples"), rows) if rows else "")


def _examples(examples: list[dict[str, str]]) -> str:
    return "".join(f"<p><code>{_escape(e['id'])}</code> {_escape(e['text'])}</p>" for e in examples)


def _table(columns: tuple[str, ...], rows: str) -> str:
    return f"<table><tr>{''.join(f'<th>{name}' for name in columns)}{rows}</table>"


def _escape(value: Any) -> str:
    # Examples are raw text, with markup of its own.
    return as_html(str(value))
