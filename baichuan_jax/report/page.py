"""The page: its sections with their text, tables and places for figures, put into page.html.

In: recorded runs. Out: one HTML file that needs no network: plotly's script, the figures as JSON
and all text are in it. A section is a function of the page and the runs, called in the order of
SECTIONS; a new section is one more. Text from runs is escaped where it enters (`Page.say`,
`table`), labels by `Recorded.label`.
"""

import base64
import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from baichuan_jax import __version__
from baichuan_jax.config.files import flatten
from baichuan_jax.config.messages import as_html
from baichuan_jax.config.parsing import quote_path, show_path
from baichuan_jax.config.schema import TASKS, Config
from baichuan_jax.evaluate.tables import COLUMNS, cautions, columns, percent, published_rows
from baichuan_jax.report import figures
from baichuan_jax.report.recorded import Recorded
from baichuan_jax.runs.events import Completed, Sampled, Started, UpdateSkipped, latest, of_kind

# Settings that differ between any two runs and say nothing about them.
PLACES = ("run_dir",)


class Page:
    """Collects sections, and the figures that belong into their places."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.links: list[str] = []
        self.figures: dict[str, Any] = {}

    def section(self, name: str, title: str) -> None:
        """Begin a section, with a link in the page's bar."""
        self.links.append(f'<a href="#{name}">{title}</a>')
        self.parts.append(f'<h2 id="{name}">{title}</h2>')

    def say(self, text: str, kind: str = "soft") -> None:
        """A paragraph; the text is escaped."""
        self.parts.append(f'<p class="{kind}">{as_html(text)}</p>')

    def figure(
        self, name: str, figure: go.Figure | None, title: str = "", missing: str = ""
    ) -> str:
        """The place of a figure, or a line that says what is missing instead of it."""
        heading = f"<h3>{as_html(title)}</h3>" if title else ""
        if figure is None:
            return f'<div>{heading}<p class="none">{as_html(missing)}</p></div>'
        # plotly's own encoder first: it knows numpy's and infinite numbers.
        self.figures[f"figure-{name}"] = json.loads(str(figure.to_json()))
        # The page's button switches these axes to a logarithm.
        over = "tokens" if figure.layout.xaxis.title.text == "tokens" else ""
        # The height is reserved before the script draws, so that the page does not jump.
        place = (
            f'<div class="figure" id="figure-{name}" data-over="{over}" '
            f'style="height:{figure.layout.height}px"></div>'
        )
        return f'<div>{heading}<div class="legend"></div>{place}</div>'

    def add(self, *parts: str) -> None:
        """Figures' places, side by side where there is room."""
        together = "".join(parts)
        self.parts.append(f'<div class="pair">{together}</div>' if len(parts) > 1 else together)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, numbers: bool = True) -> str:
    """A table of texts, which are escaped; all columns but the first hold numbers, or text."""

    def cell(tag: str, place: int, text: str) -> str:
        # Long text gets a minimum width, or a table squeezes it to a word a line.
        kind = "number" if numbers and place else "long" if len(text) > 40 else ""
        return f'<{tag} class="{kind}">{as_html(text)}</{tag}>'

    def row(tag: str, texts: Iterable[str]) -> str:
        return "".join(cell(tag, place, text) for place, text in enumerate(texts))

    lines = "".join(f"<tr>{row('td', texts)}</tr>" for texts in rows)
    return f'<div class="table"><table><tr>{row("th", head)}</tr>{lines}</table></div>'


def make_page(records: list[Recorded], now: datetime.datetime) -> str:
    """The whole HTML file."""
    page = Page()
    # Sections first: they fill the page's links and figures.
    for section in SECTIONS:
        section(page, records)
    names = ", ".join(record.name for record in records)
    dots = "".join(f'<span class="run">{_dot(record)}{record.label}</span> ' for record in records)
    folders = as_html(", ".join(show_path(record.run.path) for record in records))
    fields = {
        "title": as_html(f"{names}: training report"),
        "head": f"<h1>{dots}</h1>",
        "links": "".join(page.links),
        "body": "\n".join(page.parts),
        "foot": f"baichuan_jax {__version__}, made {now:%Y-%m-%d %H:%M} from {folders}",
        # Inside a script element only "</" could end it, and "<!--" begin a comment.
        "figures": json.dumps(page.figures, ensure_ascii=False).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # The browser runs these two scripts and no other, and asks no network for anything: what
    # escaping might miss stays text.
    own = template.rpartition("<script>")[2].partition("</script>")[0]
    fields["scripts"] = " ".join(f"'sha256-{_digest(text)}'" for text in (fields["plotly"], own))
    # One pass: text of a run that looks like a place (@body@) is not replaced again.
    return re.sub(r"@(\w+)@", lambda found: fields[found[1]], template)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which such a time is given, and its seconds."""
    # From two of a unit on: 90 minutes are not 1.5 hours.
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return unit, size
    return "seconds", 1.0


def _summary(page: Page, records: list[Recorded]) -> None:
    page.section("summary", "Summary")
    # A row for each fact that any run has; "-" where one lacks it.
    facts: dict[str, list[str]] = {}
    for number, record in enumerate(records):
        for name, value in (_results(record) | _setup(record)).items():
            facts.setdefault(name, ["-"] * len(records))[number] = value
    rows = [[name, *values] for name, values in facts.items()]
    page.parts.append(table(["", *(record.name for record in records)], rows, numbers=False))


def _results(record: Recorded) -> dict[str, str]:
    """How far a run came, how well and how fast."""
    last, accounting = record.steps[-1], record.accounting
    # What the newest launch was asked for.
    wanted = record.settings.get("train.num_steps")
    # One step's loss is noise; 20 are what the run's own summary takes.
    losses = [line["loss"] for line in record.steps[-20:] if line["loss"] is not None]
    _, validation = record.validation("eval_loss")
    # Medians: the first step after a start is slow and says nothing.
    rates = sorted(line["tokens_per_second"] for line in record.steps)
    mfus = sorted(line["mfu"] for line in record.steps if line.get("mfu") is not None)
    # The folder cannot tell a killed run from a running one.
    status = {"running": "not ended: running, or killed"}.get(record.run.status, record.run.status)
    goodput = faults = "not recorded"
    if accounting.launches:
        unit, size = time_unit(accounting.total)
        goodput = f"{accounting.goodput:.1%} of {accounting.total / size:.1f} {unit}"
        faults = f"{accounting.launches}, {len(accounting.faults)}"
    return {
        "status": status,
        "steps": f"{last['step']:,}" + (f" of {wanted:,}" if wanted is not None else ""),
        "tokens": f"{record.tokens[last['step']]:,}",
        "training loss, mean of the last 20 steps": (
            f"{sum(losses) / len(losses):.4f}" if losses else "not finite"
        ),
        "validation loss": f"{validation[-1]:.4f}" if validation else "none",
        "tokens a second, median": f"{rates[len(rates) // 2]:,.0f}",
        "MFU, median": f"{mfus[len(mfus) // 2]:.1%}" if mfus else "unknown peak",
        "goodput": goodput,
        "launches, faults": faults,
    }


def _setup(record: Recorded) -> dict[str, str]:
    """What the newest launch ran on and what it chose; "-" where an older program wrote nothing."""
    started = latest(record.events, Started)
    if started is None:
        names = ("MFU is a share of", "parameters", "devices", "mesh", "text", "jax")
        return dict.fromkeys(names, "-")
    rows = started.rows.values()
    devices = f"{started.devices} x {started.device} in {started.processes} process(es)"
    facts = {
        "MFU is a share of": started.mfu_of,
        "parameters": f"{started.parameters:,}" if started.parameters else "-",
        "devices": devices if started.device else "-",
        "mesh": ", ".join(f"{name} {size}" for name, size in started.mesh.items()) or "-",
        "text": f"{len(rows)} corpora, {sum(rows):,} rows" if rows else "-",
        "jax": started.jax or "-",
    }
    if started.attention is not None:
        facts["attention"] = f"{started.attention} ({started.attention_reason})"
    if started.rms_norm is not None:
        facts["rms_norm"] = f"{started.rms_norm} ({started.rms_norm_reason})"
    if started.xla_flags:
        facts["XLA flags"] = ", ".join(started.xla_flags)
    return facts


def _loss(page: Page, records: list[Recorded]) -> None:
    page.section("loss", "Loss")
    page.add(page.figure("loss", figures.loss(records)))
    page.say(
        "Losses of different tokenizers are not comparable token by token; that holds for the "
        "published curve too, whose vocabulary has 64,000 pieces. Drag to zoom, double-click to go "
        "back; names in the legend switch curves on and off."
    )
    # What is missing is said, so that nobody looks for it.
    without = [record.name for record in records if not record.validation("eval_loss")[0]]
    if without:
        page.say(f"{', '.join(without)}: no validation loss was recorded.", "none")
    for record in records:
        _, _, size = figures.thin(*record.curve("loss"))
        if size > 1:
            page.say(
                f"{record.name}: {len(record.steps):,} steps, of which every {size} are drawn as "
                "their smallest and largest value."
            )


def _speed(page: Page, records: list[Recorded]) -> None:
    page.section("speed", "Speed")
    rates = figures.curve(records, "tokens_per_second", "tokens a second")
    mfus = figures.curve(records, "mfu", "MFU, %", unit=" %", scale=100)
    missing = "MFU is not known: the devices' peak is not; set metrics.peak_tflops."
    page.add(
        page.figure("throughput", rates, "Throughput"),
        page.figure("mfu", mfus, "Model FLOP/s utilisation", missing),
    )
    page.say("MFU counts all pairs of positions in attention, as the original's 58.3 % does.")


def _goodput(page: Page, records: list[Recorded]) -> None:
    page.section("goodput", "Goodput and faults")
    missing = "No launch left a record of its time."
    where = figures.where_time_went(records)
    page.add(page.figure("causes", where, "Where the time went", missing))
    for number, record in enumerate(records):
        # One unit for a run, so that its axis and its numbers agree.
        unit, seconds = time_unit(record.accounting.total)
        missing = f"{record.name}: no timeline, since its attempts/ folder is not there."
        figure = figures.goodput(record, unit, seconds)
        page.add(page.figure(f"goodput-{number}", figure, record.name, missing))
        launches = record.accounting.launches
        if record.accounting.faults:
            page.parts.append(_faults(record))
        elif launches:
            page.say(f"{record.name}: {launches} launch(es), no verdict on a fault.", "none")


def _faults(record: Recorded) -> str:
    """A row for each fault."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    head = ["time", "launch", "what", "host: process", "rule", "evidence"]
    head += ["detect s", "localise s", "recover s"]
    rows = []
    for fault in record.accounting.faults:
        who = "nobody"
        if fault.host is not None:
            who = f"{fault.host}: {', '.join(map(str, fault.processes))}"
        time = f"{datetime.datetime.fromtimestamp(fault.time):%m-%d %H:%M:%S}"
        times = [seconds(value) for value in (fault.detect, fault.localise, fault.recover)]
        rows.append(
            [time, str(fault.attempt), fault.cause, who, fault.rule, fault.evidence, *times]
        )
    return table(head, rows, numbers=False)


def _optimisation(page: Page, records: list[Recorded]) -> None:
    page.section("optimisation", "Optimisation")
    # Norms of a run span decades.
    norms = figures.curve(records, "grad_norm", "global norm", log=True)
    rates = figures.curve(records, "learning_rate", "learning rate")
    page.add(
        page.figure("grad_norm", norms, "Gradient norm before clipping"),
        page.figure("learning_rate", rates, "Learning rate"),
    )
    for record in records:
        skipped = len(of_kind(record.events, UpdateSkipped))
        if skipped:
            page.say(f"{record.name}: {skipped} update(s) were not finite and were skipped.")


def _memory(page: Page, records: list[Recorded]) -> None:
    page.section("memory", "Memory")
    used = figures.curve(records, "memory_gib", "GiB", unit=" GiB")
    page.add(page.figure("memory", used, "Most memory used so far, first device"))
    for number, record in enumerate(records):
        for index, (name, plan) in enumerate(record.plans.items()):
            figure = figures.memory_plan(plan)
            title = f"{record.name}: plan for {name}"
            page.add(page.figure(f"plan-{number}-{index}", figure, title))
            fits = "fits" if plan["fits"] else "does not fit"
            # A plan is compiled for devices that may not be here; it says so.
            page.say(
                f"Compiled for {plan['num_devices']} devices, not run there: peak "
                f"{plan['peak_gib']:.1f} of {plan['capacity_gib']:.1f} GiB, {fits}; predicted "
                f"{plan['predicted_step_seconds'] * 1e3:,.0f} ms a step, MFU "
                f"{plan['predicted_mfu']:.1%}{_interval(plan)}."
            )
    if not any(record.plans for record in records):
        page.say(
            "No memory plan is in the folder: python -m baichuan_jax.plan --config CONFIG "
            f"--topology a800:128x8 --output {quote_path(records[0].run.path / 'plans')}",
            "none",
        )


def _interval(plan: dict[str, Any]) -> str:
    """The range of a plan's MFU; plans of earlier versions have none."""
    if "predicted_mfu_interval" not in plan:
        return ""
    low, high = plan["predicted_mfu_interval"]
    return f" (90 % interval {low * 100:.1f} to {high:.1%})"


def _tests(page: Page, records: list[Recorded]) -> None:
    page.section("tests", "Tests")
    during = [task for task in TASKS if any(record.validation(task)[0] for record in records)]
    places = []
    for task in during:
        figure = figures.scores_over_tokens(records, task)
        places.append(page.figure(f"during-{task}", figure, f"{task} during training"))
    if places:
        page.add(*places)
    # dict.fromkeys keeps the first order and drops repetitions.
    names = list(dict.fromkeys(name for record in records for name in record.tests))
    for number, name in enumerate(names):
        _test(page, records, number, name)
    if not names and not during:
        run = records[0].run.path
        page.say(
            f"None was asked: python -m baichuan_jax.evaluate mmlu --checkpoint {quote_path(run)} "
            f"--data DIR --output {quote_path(run / 'evaluations' / 'mmlu')}, or evaluate.tasks "
            "during a run.",
            "none",
        )


def _test(page: Page, records: list[Recorded], number: int, name: str) -> None:
    """One folder of results: a test of multiple choice, or a curve of perplexity."""
    results = {record.name: record.tests[name] for record in records if name in record.tests}
    if "curve" in next(iter(results.values())):
        figure = figures.perplexity(records, name)
        title = f"{name}: perplexity by context length"
        page.add(page.figure(f"perplexity-{number}", figure, title))
        return
    # C-Eval's test split has no public answers.
    scored = {run: result for run, result in results.items() if result["scored"]}
    if not scored:
        page.say(f"{name}: no public answers; hand in submission.json.", "none")
        return
    page.add(page.figure(f"scores-{number}", figures.scores(records, name), name))
    page.parts.append(_score_table(scored))
    for run, result in scored.items():
        for caution in cautions(result):
            page.say(f"{run}: {caution}.")


def _score_table(results: dict[str, dict[str, Any]]) -> str:
    """The original's table with these runs first; below it all subjects."""
    task = next(iter(results.values()))["task"]
    rows = [
        [run, *(percent(cell) for cell in columns(result).values())]
        for run, result in results.items()
    ]
    # The original's rows below, as its README has them.
    rows += [[model, *values] for model, values in published_rows(task)]
    subjects = list(
        dict.fromkeys(name for result in results.values() for name in result["subjects"])
    )
    by_subject = [
        [subject, *(percent(result["subjects"].get(subject)) for result in results.values())]
        for subject in subjects
    ]
    inner = table(["subject", *results], by_subject)
    return (
        table(["%", *COLUMNS[task]], rows)
        + f"<details><summary>{len(subjects)} subjects</summary>{inner}</details>"
    )


def _samples(page: Page, records: list[Recorded]) -> None:
    page.section("samples", "Samples")
    for record in records:
        # Written once, when the last step is done; by earlier versions in the event of that.
        newest = latest(record.events, Sampled) or latest(record.events, Completed)
        samples = {} if newest is None else newest.samples
        if not samples:
            page.say(
                f"{record.name}: none. A run writes them at its end for sample.prompts; at any "
                "time: python -m baichuan_jax.generate --checkpoint "
                f"{quote_path(record.run.path)} --prompt '春'",
                "none",
            )
        # A page of one run needs no colours for its samples.
        dot = _dot(record) if len(records) > 1 else ""
        for prompt, text in samples.items():
            content = f"<b>{as_html(prompt)}</b>{as_html(text)}"
            page.parts.append(f"<blockquote>{dot}{content}</blockquote>")


def _settings(page: Page, records: list[Recorded]) -> None:
    page.section("settings", "Settings")
    for record in records:
        if not record.settings:
            page.say(f"{record.name}: its config.yaml is not there.", "none")
    known = [record for record in records if record.settings]
    names = list(dict.fromkeys(name for record in known for name in record.settings))
    # As JSON, so that lists and dicts compare and print like numbers.
    values = {
        name: [json.dumps(record.settings.get(name), ensure_ascii=False) for record in known]
        for name in names
    }
    head = ["", *(record.name for record in known)]
    if len(known) > 1:
        # A setting that an older run lacks counts as null.
        differing = [name for name in names if len(set(values[name])) > 1 and name not in PLACES]
        if differing:
            page.say(f"{len(differing)} settings differ between these runs.")
            rows = [[name, *values[name]] for name in differing]
            page.parts.append(table(head, rows, numbers=False))
        else:
            page.say("All settings of these runs are equal.")
    if known:
        defaults = flatten(dataclasses.asdict(Config()))
        default = {name: json.dumps(defaults.get(name), ensure_ascii=False) for name in names}
        changed = [name for name in names if any(value != default[name] for value in values[name])]
        rows = [[name, *values[name], default[name]] for name in changed]
        title = f"{len(changed)} of {len(names)} settings are not at their defaults"
        inner = table([*head, "default"], rows, numbers=False)
        page.parts.append(f"<h3>{title}</h3>{inner}")
    for record in known:
        # The file itself, with all settings, as the run can be started again from it.
        text = as_html(record.config)
        summary = f"<summary>{record.label}: all settings</summary>"
        page.parts.append(f"<details>{summary}<pre>{text}</pre></details>")


SECTIONS: tuple[Callable[[Page, list[Recorded]], None], ...] = (
    _summary,
    _loss,
    _speed,
    _goodput,
    _optimisation,
    _memory,
    _tests,
    _samples,
    _settings,
)


def _dot(record: Recorded) -> str:
    """A dot in the run's colour."""
    return f'<span class="dot" style="background:{record.colour}"></span>'
