"""The page: its sections in words, tables and places for figures, put into page.html."""

import dataclasses
import datetime
import html
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from baichuan_jax import __version__
from baichuan_jax.config.schema import Config
from baichuan_jax.evaluate.tables import COLUMNS, PUBLISHED, cautions, columns
from baichuan_jax.report import figures
from baichuan_jax.report.recorded import Recorded, flatten

TASKS = tuple(COLUMNS)
# Differ between any two runs and say nothing of them.
PLACES = ("run_dir",)


class Page:
    """Collects sections, and the figures that their places name."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.links: list[str] = []
        self.figures: dict[str, Any] = {}

    def section(self, name: str, title: str) -> None:
        self.links.append(f'<a href="#{name}">{title}</a>')
        self.parts.append(f'<h2 id="{name}">{title}</h2>')

    def say(self, text: str, kind: str = "soft") -> None:
        """A paragraph; the text is escaped."""
        self.parts.append(f'<p class="{kind}">{html.escape(text)}</p>')

    def figure(
        self, name: str, figure: go.Figure | None, title: str = "", missing: str = ""
    ) -> str:
        """The place of a figure, or a line that says what is missing instead of it."""
        heading = f"<h3>{html.escape(title)}</h3>" if title else ""
        if figure is None:
            return f'<div>{heading}<p class="none">{html.escape(missing)}</p></div>'
        self.figures[f"figure-{name}"] = json.loads(str(figure.to_json()))
        over = "tokens" if figure.layout.xaxis.title.text == "tokens" else ""
        place = f'<div class="figure" id="figure-{name}" data-over="{over}" style="height:{figure.layout.height}px"></div>'
        return f'<div>{heading}<div class="legend"></div>{place}</div>'

    def add(self, *parts: str) -> None:
        """Figures' places, side by side where there is room."""
        together = "".join(parts)
        self.parts.append(f'<div class="pair">{together}</div>' if len(parts) > 1 else together)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, numbers: bool = True) -> str:
    """A table of words, which are escaped; all columns but the first hold numbers, or words."""

    def cell(tag: str, place: int, word: str) -> str:
        kind = "number" if numbers and place else "long" if len(word) > 40 else ""
        return f'<{tag} class="{kind}">{html.escape(word)}</{tag}>'

    def row(tag: str, words: Iterable[str]) -> str:
        return "".join(cell(tag, place, word) for place, word in enumerate(words))

    lines = "".join(f"<tr>{row('td', words)}</tr>" for words in rows)
    return f'<div class="table"><table><tr>{row("th", head)}</tr>{lines}</table></div>'


def make_page(records: list[Recorded], now: datetime.datetime) -> str:
    """The whole HTML file."""
    page = Page()
    for section in (
        _summary,
        _loss,
        _speed,
        _goodput,
        _optimisation,
        _memory,
        _tests,
        _samples,
        _settings,
    ):
        section(page, records)
    names = ", ".join(record.name for record in records)
    dots = "".join(
        f'<span class="run"><span class="dot" style="background:{record.colour}"></span>{record.label}</span> '
        for record in records
    )
    head = f"<h1>{dots}</h1>"
    foot = f"baichuan_jax {__version__}, made {now:%Y-%m-%d %H:%M} from {html.escape(', '.join(str(r.run.path) for r in records))}"
    fields = {
        "title": html.escape(f"{names}: training report"),
        "head": head,
        "links": "".join(page.links),
        "body": "\n".join(page.parts),
        "foot": foot,
        "figures": json.dumps(page.figures, ensure_ascii=False).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda found: fields[found[1]], template)


def _word(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _summary(page: Page, records: list[Recorded]) -> None:
    page.section("summary", "Summary")
    facts: dict[str, list[str]] = {}
    for number, record in enumerate(records):
        for name, value in _facts(record).items():
            facts.setdefault(name, ["-"] * len(records))[number] = value
    rows = [[name, *values] for name, values in facts.items()]
    page.parts.append(table(["", *(record.name for record in records)], rows, numbers=False))


def _facts(record: Recorded) -> dict[str, str]:
    """What a run came to and what it ran on."""
    started, last = record.last_event("started"), record.steps[-1]
    wanted = record.settings.get("train.num_steps")
    losses = [line["loss"] for line in record.steps[-20:] if line["loss"] is not None]
    _, validation = record.validation("eval_loss")
    rates = sorted(line["tokens_per_second"] for line in record.steps)
    shares = sorted(line["mfu"] for line in record.steps if line.get("mfu") is not None)
    status = {"running": "not ended: running, or killed"}.get(record.run.status, record.run.status)
    ledger = record.ledger
    facts = {
        "status": status,
        "steps": f"{last['step']:,}" + (f" of {wanted:,}" if wanted is not None else ""),
        "tokens": f"{record.tokens[last['step']]:,}",
        "training loss, mean of the last 20 steps": f"{sum(losses) / len(losses):.4f}"
        if losses
        else "not finite",
        "validation loss": f"{validation[-1]:.4f}" if validation else "none",
        "tokens a second, median": f"{rates[len(rates) // 2]:,.0f}",
        "MFU, median": f"{shares[len(shares) // 2]:.1%}" if shares else "unknown peak",
        "MFU is a share of": started.get("mfu_of", "-"),
        "goodput": f"{ledger.goodput:.1%} of {_duration(ledger.total)}"
        if ledger.launches
        else "not recorded",
        "launches, faults": f"{ledger.launches}, {len(ledger.faults)}"
        if ledger.launches
        else "not recorded",
        "parameters": f"{started['parameters']:,}" if "parameters" in started else "-",
        "devices": f"{started['devices']} x {started['device']} in {started['processes']} process(es)"
        if started
        else "-",
        "mesh": ", ".join(f"{name} {size}" for name, size in started.get("mesh", {}).items())
        or "-",
        "text": f"{len(started['rows'])} corpora, {sum(started['rows'].values()):,} rows"
        if "rows" in started
        else "-",
        "jax": started.get("jax", "-"),
    }
    for operator in ("attention", "rms_norm"):
        if operator in started:
            facts[operator] = f"{started[operator]} ({started.get(f'{operator}_reason', '')})"
    if started.get("xla_flags"):
        facts["XLA flags"] = ", ".join(started["xla_flags"])
    return facts


def _duration(seconds: float) -> str:
    unit, size = time_unit(seconds)
    return f"{seconds / size:.1f} {unit}"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that such a time is told in, and its seconds."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return unit, size
    return "seconds", 1.0


def _loss(page: Page, records: list[Recorded]) -> None:
    page.section("loss", "Loss")
    page.add(page.figure("loss", figures.loss(records)))
    page.say(
        "Losses of different tokenizers are not comparable token by token; that holds for the published curve too, whose vocabulary "
        "has 64,000 pieces. Drag to zoom, double-click to go back; names in the legend switch curves on and off."
    )
    without = [record.name for record in records if not record.validation("eval_loss")[0]]
    if without:
        page.say(f"{', '.join(without)}: no validation loss was recorded.", "none")
    for record in records:
        _, _, size = figures.thin(*record.curve("loss"))
        if size > 1:
            page.say(
                f"{record.name}: {len(record.steps):,} steps, of which every {size} are drawn as their smallest and largest value."
            )


def _speed(page: Page, records: list[Recorded]) -> None:
    page.section("speed", "Speed")
    page.add(
        page.figure(
            "throughput",
            figures.curve(records, "tokens_per_second", "tokens a second"),
            "Throughput",
        ),
        page.figure(
            "mfu",
            figures.curve(records, "mfu", "MFU, %", unit=" %", scale=100),
            "Model FLOP/s utilisation",
            "MFU is not known: the devices' peak is not; set metrics.peak_tflops.",
        ),
    )
    page.say("MFU counts all pairs of positions in attention, as the original's 58.3 % does.")


def _goodput(page: Page, records: list[Recorded]) -> None:
    page.section("goodput", "Goodput and faults")
    page.add(
        page.figure(
            "causes",
            figures.where_time_went(records),
            "Where the time went",
            "No launch left a record of its time.",
        )
    )
    for number, record in enumerate(records):
        unit, seconds = time_unit(record.ledger.total)
        missing = f"{record.name}: no timeline, since its attempts/ folder is not there."
        page.add(
            page.figure(
                f"goodput-{number}", figures.goodput(record, unit, seconds), record.name, missing
            )
        )
        if record.ledger.faults:
            page.parts.append(_faults(record))
        elif record.ledger.launches:
            page.say(
                f"{record.name}: {record.ledger.launches} launch(es), no verdict on a fault.",
                "none",
            )


def _faults(record: Recorded) -> str:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    rows = [
        [
            f"{datetime.datetime.fromtimestamp(fault.time):%m-%d %H:%M:%S}",
            str(fault.attempt),
            fault.cause,
            "nobody"
            if fault.host is None
            else f"{fault.host}: {', '.join(map(str, fault.processes))}",
            fault.rule,
            fault.evidence,
            seconds(fault.detect),
            seconds(fault.localise),
            seconds(fault.recover),
        ]
        for fault in record.ledger.faults
    ]
    head = [
        "time",
        "launch",
        "what",
        "host: process",
        "rule",
        "evidence",
        "detect s",
        "localise s",
        "recover s",
    ]
    return table(head, rows, numbers=False)


def _optimisation(page: Page, records: list[Recorded]) -> None:
    page.section("optimisation", "Optimisation")
    page.add(
        page.figure(
            "grad_norm",
            figures.curve(records, "grad_norm", "global norm", log=True),
            "Gradient norm before clipping",
        ),
        page.figure(
            "learning_rate",
            figures.curve(records, "learning_rate", "learning rate"),
            "Learning rate",
        ),
    )
    for record in records:
        skipped = sum(event["kind"] == "update_skipped" for event in record.events)
        if skipped:
            page.say(f"{record.name}: {skipped} update(s) were not finite and were skipped.")


def _memory(page: Page, records: list[Recorded]) -> None:
    page.section("memory", "Memory")
    page.add(
        page.figure(
            "memory",
            figures.curve(records, "memory_gib", "GiB", unit=" GiB"),
            "Most memory used so far, first device",
        )
    )
    for number, record in enumerate(records):
        for index, (name, plan) in enumerate(record.plans.items()):
            page.add(
                page.figure(
                    f"plan-{number}-{index}",
                    figures.memory_plan(plan),
                    f"{record.name}: plan for {name}",
                )
            )
            fits = "fits" if plan["fits"] else "does not fit"
            page.say(
                f"Compiled for {plan['num_devices']} devices, not run there: peak {plan['peak_gib']:.1f} of "
                f"{plan['capacity_gib']:.1f} GiB, {fits}; predicted "
                f"{plan['predicted_step_seconds'] * 1e3:,.0f} ms a step, MFU {plan['predicted_mfu']:.1%}."
            )
    if not any(record.plans for record in records):
        page.say(
            "No memory plan lies in the folder: python -m baichuan_jax.plan --config CONFIG --topology a800:128x8 --output "
            f"{_word(records[0].run.path / 'plans')}",
            "none",
        )


def _tests(page: Page, records: list[Recorded]) -> None:
    page.section("tests", "Tests")
    during = [task for task in TASKS if any(record.validation(task)[0] for record in records)]
    if during:
        page.add(
            *(
                page.figure(
                    f"during-{task}",
                    figures.scores_over_tokens(records, task),
                    f"{task} during training",
                )
                for task in during
            )
        )
    names = list(dict.fromkeys(name for record in records for name in record.tests))
    for number, name in enumerate(names):
        results = {record.name: record.tests[name] for record in records if name in record.tests}
        if "curve" in next(iter(results.values())):
            page.add(
                page.figure(
                    f"perplexity-{number}",
                    figures.perplexity(records, name),
                    f"{name}: perplexity by context length",
                )
            )
            continue
        scored = {run: result for run, result in results.items() if result["scored"]}
        if not scored:
            page.say(f"{name}: no public answers; hand in submission.json.", "none")
            continue
        page.add(page.figure(f"scores-{number}", figures.scores(records, name), name))
        page.parts.append(_score_table(scored))
        for run, result in scored.items():
            for caution in cautions(result):
                page.say(f"{run}: {caution}.")
    if not names and not during:
        page.say(
            f"None was asked: python -m baichuan_jax.evaluate mmlu --checkpoint {_word(records[0].run.path)} --data DIR --output "
            f"{_word(records[0].run.path / 'evaluations' / 'mmlu')}, or evaluate.tasks during a run.",
            "none",
        )


def _score_table(results: dict[str, dict[str, Any]]) -> str:
    """The original's table with these runs first; below it all subjects."""

    def percent(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return "-"
        return f"{100 * cell['accuracy']:.1f}" + (
            "" if cell["stderr"] is None else f" ± {100 * cell['stderr']:.1f}"
        )

    task = next(iter(results.values()))["task"]
    rows = [
        [run, *(percent(cell) for cell in columns(result).values())]
        for run, result in results.items()
    ]
    published = sorted(PUBLISHED[task].items(), key=lambda item: item[0] != "Baichuan-7B")
    rows += [
        [f"{model} (published)", *("-" if value is None else f"{value}" for value in values)]
        for model, values in published
    ]
    subjects = list(
        dict.fromkeys(name for result in results.values() for name in result["subjects"])
    )
    inner = table(
        ["subject", *results],
        [
            [subject, *(percent(result["subjects"].get(subject)) for result in results.values())]
            for subject in subjects
        ],
    )
    return (
        table(["%", *COLUMNS[task]], rows)
        + f"<details><summary>{len(subjects)} subjects</summary>{inner}</details>"
    )


def _samples(page: Page, records: list[Recorded]) -> None:
    page.section("samples", "Samples")
    for record in records:
        samples = record.last_event("completed").get("samples", {})
        if not samples:
            page.say(
                f"{record.name}: none; a run writes them at its end for sample.prompts, and python -m baichuan_jax.generate "
                f"--checkpoint {_word(record.run.path)} --prompt '春' at any time.",
                "none",
            )
        for prompt, text in samples.items():
            dot = (
                f'<span class="dot" style="background:{record.colour}"></span>'
                if len(records) > 1
                else ""
            )
            page.parts.append(
                f"<blockquote>{dot}<b>{html.escape(prompt)}</b>{html.escape(text)}</blockquote>"
            )


def _settings(page: Page, records: list[Recorded]) -> None:
    page.section("settings", "Settings")
    defaults = flatten(dataclasses.asdict(Config()))
    for record in records:
        if not record.settings:
            page.say(f"{record.name}: its config.yaml is not there.", "none")
    known = [record for record in records if record.settings]
    names = list(dict.fromkeys(name for record in known for name in record.settings))
    values = {
        name: [json.dumps(record.settings.get(name), ensure_ascii=False) for record in known]
        for name in names
    }
    differing = [name for name in names if len(set(values[name])) > 1 and name not in PLACES]
    if len(known) > 1:
        page.say(
            f"{len(differing)} settings differ between these runs."
            if differing
            else "All settings of these runs are equal."
        )
        if differing:
            page.parts.append(
                table(
                    ["", *(record.name for record in known)],
                    [[name, *values[name]] for name in differing],
                    numbers=False,
                )
            )
    if known:
        default = {name: json.dumps(defaults.get(name), ensure_ascii=False) for name in names}
        changed = [name for name in names if any(value != default[name] for value in values[name])]
        rows = [[name, *values[name], default[name]] for name in changed]
        inner = table(["", *(record.name for record in known), "default"], rows, numbers=False)
        page.parts.append(
            f"<h3>{len(changed)} of {len(names)} settings are not at their defaults</h3>{inner}"
        )
    for record in known:
        text = html.escape((record.run.path / "config.yaml").read_text(encoding="utf-8"))
        page.parts.append(
            f"<details><summary>{record.label}: all settings</summary><pre>{text}</pre></details>"
        )
