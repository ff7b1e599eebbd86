"""Scores as Markdown tables and charts, beside the rows that Baichuan-7B's README published.

In: the content of result.json (results.py). The published numbers are those of README.md in
baichuan-inc/Baichuan-7B; report/ draws them too.
"""

from pathlib import Path
from typing import Any

from baichuan_jax.config.messages import printable
from baichuan_jax.runs.files import save_figure

# task -> columns of the original's table.
COLUMNS = {
    "mmlu": ["Humanities", "Social Sciences", "STEM", "Other", "Average"],
    "ceval": ["Average", "Avg(Hard)", "STEM", "Social Sciences", "Humanities", "Others"],
    "agieval": ["Average"],
    "gaokao": ["Average"],
}
# task -> model -> percentages in these columns. C-Eval: the test split. MMLU: the test split, micro
# averages. The order of the models is the original's, also where it is not that of the scores.
PUBLISHED: dict[str, dict[str, list[float | None]]] = {
    "mmlu": {
        "ChatGLM-6B": [35.4, 41.0, 31.3, 40.5, 36.9],
        "BLOOMZ-7B": [31.3, 42.1, 34.4, 39.0, 36.1],
        "mpt-7B": [None, None, None, None, 35.6],
        "LLaMA-7B": [34.0, 38.3, 30.5, 38.1, 35.1],
        "Falcon-7B": [None, None, None, None, 35.0],
        "moss-moon-003-sft (16B)": [30.5, 33.8, 29.3, 34.4, 31.9],
        "BLOOM-7B": [25.0, 24.4, 26.5, 26.4, 25.5],
        "moss-moon-003-base (16B)": [24.2, 22.8, 22.4, 24.4, 23.6],
        "Baichuan-7B": [38.4, 48.9, 35.6, 48.1, 42.3],
    },
    "ceval": {
        "GPT-4": [68.7, 54.9, 67.1, 77.6, 64.5, 67.8],
        "ChatGPT": [54.4, 41.4, 52.9, 61.8, 50.9, 53.6],
        "Claude-v1.3": [54.2, 39.0, 51.9, 61.7, 52.1, 53.7],
        "Claude-instant-v1.0": [45.9, 35.5, 43.1, 53.8, 44.2, 45.4],
        "BLOOMZ-7B": [35.7, 25.8, 31.3, 43.5, 36.6, 35.6],
        "ChatGLM-6B": [34.5, 23.1, 30.4, 39.6, 37.4, 34.5],
        "Ziya-LLaMA-13B-pretrain": [30.2, 22.7, 27.7, 34.4, 32.0, 28.9],
        "moss-moon-003-base (16B)": [27.4, 24.5, 27.0, 29.1, 27.2, 26.9],
        "LLaMA-7B-hf": [27.1, 25.9, 27.1, 26.8, 27.9, 26.3],
        "Falcon-7B": [25.8, 24.3, 25.8, 26.0, 25.8, 25.6],
        "TigerBot-7B-base": [25.7, 27.0, 27.3, 24.7, 23.4, 26.1],
        "Aquila-7B": [25.5, 25.2, 25.6, 24.6, 25.2, 26.6],
        "Open-LLaMA-v2-pretrain (7B)": [24.0, 22.5, 23.1, 25.3, 25.2, 23.2],
        "BLOOM-7B": [22.8, 20.2, 21.8, 23.3, 23.9, 23.3],
        "Baichuan-7B": [42.8, 31.5, 38.2, 52.0, 46.2, 39.3],
    },
    "agieval": {
        "BLOOMZ-7B": [30.27],
        "LLaMA-7B": [28.17],
        "Ziya-LLaMA-13B-pretrain": [27.64],
        "Falcon-7B": [27.18],
        "BLOOM-7B": [26.55],
        "Aquila-7B": [25.58],
        "TigerBot-7B-base": [25.19],
        "ChatGLM-6B": [23.49],
        "Open-LLaMA-v2-pretrain": [23.49],
        "Baichuan-7B": [34.44],
    },
    "gaokao": {
        "BLOOMZ-7B": [28.72],
        "LLaMA-7B": [27.81],
        "BLOOM-7B": [26.96],
        "TigerBot-7B-base": [25.94],
        "Falcon-7B": [23.98],
        "Ziya-LLaMA-13B-pretrain": [23.17],
        "ChatGLM-6B": [21.41],
        "Open-LLaMA-v2-pretrain": [21.41],
        "Aquila-7B": [24.39],
        "Baichuan-7B": [36.24],
    },
}
# Columns whose name is not that of the category: what the category may be called.
_CATEGORIES = {
    "Humanities": ("humanities", "Humanities"),
    "Social Sciences": ("social sciences", "Social Sciences"),
    "Other": ("other (business, health, misc.)",),
    "Avg(Hard)": ("Hard",),
}


def columns(result: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """{column of the original's table: {accuracy, stderr, ...}}, None where no subject is of it."""
    whole = {"Average": {"accuracy": result["average"], "stderr": result["stderr"]}}
    found = whole | result["categories"]
    return {
        # MMLU and C-Eval write the same category differently.
        column: next(
            (found[name] for name in _CATEGORIES.get(column, (column,)) if name in found), None
        )
        for column in COLUMNS[result["task"]]
    }


def markdown(result: dict[str, Any]) -> str:
    """The table as the original laid it out, this model first, then all categories and subjects."""
    task, manifest = result["task"], result["manifest"]
    title = {"mmlu": "MMLU", "ceval": "C-Eval", "agieval": "AGIEval", "gaokao": "Gaokao"}[task]
    lines = [
        f"# {title}, {manifest['shots']}-shot, protocol {result['protocol']}, "
        f"split {manifest['split']}",
        "",
    ]
    if not result["scored"]:
        count = result["questions"]
        lines += [f"{count} questions without public answers: hand in submission.json.", ""]
        lines += [line for counted in left_out(manifest) for line in (f"{counted}.", "")]
        return "\n".join(lines)
    for caution in cautions(result):
        lines += [f"{caution}.", ""]
    lines += [_row(["Model", *COLUMNS[task]]), _row([":-", *["-:"] * len(COLUMNS[task])])]
    lines.append(_row(["**this model**", *(percent(cell) for cell in columns(result).values())]))
    for model, values in published_rows(task):
        lines.append(_row([model, *values]))
    unit = "subject" if result["aggregation"] == "macro" else "question"
    lines += ["", f"Per cent, ± standard error. An average counts every {unit} alike."]
    # AGIEval and Gaokao have no categories.
    for what in ("categories", "subjects"):
        if result[what]:
            lines += ["", _row([what, "questions", "accuracy"]), _row([":-", "-:", "-:"])]
            for name, cell in result[what].items():
                lines.append(_row([name, str(cell["questions"]), percent(cell)]))
    return "\n".join([*lines, ""])


def published_rows(task: str) -> list[tuple[str, list[str]]]:
    """(model, percentages as text) of the original's table, Baichuan-7B first."""
    # Sorting is stable: the others keep the original's order.
    rows = sorted(PUBLISHED[task].items(), key=lambda item: item[0] != "Baichuan-7B")
    return [
        (f"{model} (published)", ["-" if value is None else f"{value}" for value in values])
        for model, values in rows
    ]


def percent(cell: dict[str, Any] | None) -> str:
    """A score as text: per cent, ± standard error where there is one."""
    if cell is None:
        return "-"
    error = "" if cell["stderr"] is None else f" ± {100 * cell['stderr']:.1f}"
    return f"{100 * cell['accuracy']:.1f}{error}"


def cautions(result: dict[str, Any]) -> list[str]:
    """Why these scores may not compare with the published ones."""
    task, manifest = result["task"], result["manifest"]
    # Each is a sentence without its full stop: the console, the table and the page end it.
    asked, known = len(result["subjects"]), manifest["subjects_of_task"]
    found = []
    if asked < known:
        found.append(f"{asked} of {known} subjects: not comparable with the published rows")
    if manifest["limit"] is not None:
        found.append(f"only the first {manifest['limit']} questions of each subject")
    if task == "ceval" and manifest["split"] != "test":
        found.append(
            f"the published rows are of the split test, these scores of {manifest['split']}"
        )
    if task == "ceval" and result["protocol"] == "original" and manifest["shot_order"] == "file":
        found.append(
            "the examples are in a fixed order, and the original shuffles them for every question"
        )
    if task in ("agieval", "gaokao"):
        found.append(
            "the original published neither its prompts nor which questions it drew as examples"
        )
    return found + left_out(manifest)


def left_out(manifest: dict[str, Any]) -> list[str]:
    """What of the files is not asked, or is asked more than once, as sentences."""
    # Results of earlier versions lack some of these.
    twins = manifest.get("twins", {})
    of_examples = sum(map(len, manifest.get("twins_of_examples", {}).values()))
    drawn = manifest.get("drawn_examples") is not None
    fewer = manifest.get("prompts_with_fewer_shots", 0)
    not_asked = "rows cannot be asked: the filter is " + str(manifest.get("filter"))
    leaked = (
        "questions are left out: an example is the same question"
        if drawn
        else "questions are asked without the example that is the same question"
    )
    counted = [
        (sum(manifest.get("left_out", {}).values()), not_asked),
        (of_examples, leaked),
        (fewer, f"prompts have fewer than {manifest['shots']} examples"),
        (sum(twins.get("examples", {}).values()), "examples are the same as another one"),
        (sum(twins.get("questions", {}).values()), "questions stand in a file twice, and count so"),
        (twins.get("subjects", 0), "questions are asked in several subjects"),
        *(
            (sum(subjects.values()), f"questions stand in the split {split} too")
            for split, subjects in sorted(twins.get("splits", {}).items())
        ),
    ]
    return [f"{count:,} {what}" for count, what in counted if count]


def chart(result: dict[str, Any], path: Path | str) -> None:
    """Bars as PNG: the original's columns beside Baichuan-7B's, then categories and subjects."""
    # Not at the head of this file: training shows what a test leaves out, and has no matplotlib.
    from matplotlib.figure import Figure

    cells = columns(result)
    # Wide enough for MMLU's 57 names side by side.
    parts = result["categories"] | result["subjects"]
    figure = Figure(figsize=(max(8.0, 0.22 * len(parts) + 2), 8), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1.2])
    # A bar of no height where nothing was published.
    published = [value or 0 for value in PUBLISHED[result["task"]]["Baichuan-7B"]]
    places = range(len(cells))
    ours = [_height(cell) for cell in cells.values()]
    top.bar([place - 0.2 for place in places], ours, 0.4, label="this model")
    top.bar([place + 0.2 for place in places], published, 0.4, label="Baichuan-7B (published)")
    top.set_xticks(list(places), list(cells))
    shots, questions = result["manifest"]["shots"], result["questions"]
    top.set_title(f"{result['task']}, {shots}-shot, {questions} questions")
    heights = [_height(cell) for cell in parts.values()]
    # One question alone has no standard error.
    errors = [100 * (cell["stderr"] or 0) for cell in parts.values()]
    bottom.bar(list(parts), heights, yerr=errors, color="tab:blue", ecolor="gray")
    bottom.set_xticks(range(len(parts)), list(parts), rotation=90, fontsize=7)
    for axes in (top, bottom):
        label = "chance" if axes is top else None
        # Every question has four options.
        axes.axhline(25, color="gray", linestyle="--", linewidth=1, label=label)
        axes.set_ylabel("accuracy, %")
        axes.grid(axis="y", alpha=0.3)
    top.margins(y=0.25)  # room for the legend
    top.legend(loc="upper center", ncols=3)
    save_figure(figure, Path(path), dpi=120)


def _row(cells: list[str]) -> str:
    # Names of subjects and categories come from files.
    plain = (printable(cell, one_line=True).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(cell.replace('<', '&lt;') for cell in plain)} |"


def _height(cell: dict[str, Any] | None) -> float:
    return 0.0 if cell is None else 100 * cell["accuracy"]
