"""A run's page: what it shows, what it says of wrong files, and that a browser draws it."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import run, write_config

from baichuan_jax.config.parsing import quote_path
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate.evaluation import FILTERS
from baichuan_jax.evaluate.results import summarise
from baichuan_jax.evaluate.tasks import Subject, known_subjects
from baichuan_jax.report.__main__ import main
from baichuan_jax.report.figures import CATEGORY_COLOURS, thin
from baichuan_jax.report.recorded import read_runs
from baichuan_jax.resilience.__main__ import main as resilience
from baichuan_jax.resilience.goodput import CATEGORIES
from baichuan_jax.resilience.launch_files import Report
from baichuan_jax.runs.console import lasting_streams

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
TOKENS = 512  # a step


def step_line(step: int, time: float, loss: float = 3.0, **more) -> dict:
    """A line of metrics.jsonl as the trainer writes it."""
    return {
        "step": step,
        "time": time,
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "step_seconds": 1.0,
        "tokens": TOKENS,
        "tokens_per_second": float(TOKENS),
        "mfu": 0.5,
        "memory_gib": 1.0,
        **more,
    }


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_faulty_run(path: Path) -> Path:
    """A run of two launches, by the second.

    The first starts at 1000, does steps 1 to 6 from 1010 to 1016 and is killed. The second starts
    at 1020, restores step 4 and ends at 1040 with step 8.
    """
    first = [step_line(step, 1010.0 + step) for step in range(1, 7)]
    second = [step_line(step, 1030.0 + step - 4) for step in range(5, 9)]
    write_lines(
        path / "metrics.jsonl",
        [
            *first,
            *second,
            {"step": 8, "time": 1036.0, "eval_loss": 2.9, "mmlu": 0.3, "mmlu_stderr": 0.02},
        ],
    )
    machine = {
        "jax": "0",
        "device": "cpu",
        "devices": 2,
        "processes": 1,
        "mesh": {"data": 2},
        "mfu_of": "peak",
        "parameters": 9,
    }
    verdict = {
        "cause": "killed",
        "host": "node-7",
        "processes": [0],
        "rule": "ended by a signal",
        "evidence": "SIGKILL <in wait>",
    }
    write_lines(
        path / "events.jsonl",
        [
            {"time": 1009.0, "kind": "started", "attempt": 1, **machine},
            {
                "time": 1014.5,
                "kind": "checkpoint",
                "step": 4,
                "seconds": 0.2,
                "blocked_seconds": 0.1,
            },
            {
                "time": 1018.0,
                "kind": "verdict",
                "attempt": 1,
                "detected": 1017.0,
                "concluded": 1017.5,
                "restart": True,
                **verdict,
            },
            {"time": 1029.0, "kind": "started", "attempt": 2, **machine},
            {"time": 1029.5, "kind": "restored", "step": 4, "position": 4},
        ],
    )
    for number, end, seconds in (
        (1, 1016.5, {"start": 10.0, "wait": 6.5}),
        (2, 1040.0, {"start": 10.0, "wait": 4.0, "evaluate": 6.0}),
    ):
        folder = path / "attempts" / str(number)
        folder.mkdir(parents=True)
        (folder / "process-0.json").write_text(
            Report(0, "node-7", time=end, seconds=seconds).to_json()
        )
    (path / "config.yaml").write_text(
        "run_dir: x\ntrain: {num_steps: 8, seed: 1}\noptimizer: {learning_rate: 0.001}\n"
    )
    return path


def add_results(path: Path) -> None:
    """A test's result, a perplexity curve and a plan, as evaluate and plan leave them."""
    subjects = [
        Subject(name, name, "en", ("STEM",), [], [], 0) for name in ("anatomy", "astronomy")
    ]
    records = [
        {"subject": s.name, "prediction": "A", "answer": "AB"[n % 2]}
        for s in subjects
        for n in range(10)
    ]
    manifest = {
        "shots": 5,
        "split": "test",
        "limit": None,
        "shot_order": "file",
        "filter": FILTERS["mmlu"],
    }
    result = {
        "task": "mmlu",
        "protocol": "original",
        **summarise("mmlu", "original", subjects, records),
    }
    result["manifest"] = manifest | {"subjects_of_task": len(known_subjects("mmlu"))}
    rows = [{"context": n, "perplexity": 9.0, "tail_perplexity": 8.0} for n in (4096, 5120)]
    plan = {
        "topology": "a800:1x8",
        "num_devices": 8,
        "memory_gib": {"parameters": 3.0, "activations and temporaries": 9.5},
        "peak_gib": 12.5,
        "capacity_gib": 73.6,
        "fits": True,
        "predicted_step_seconds": 0.25,
        "predicted_mfu": 0.55,
        "predicted_mfu_interval": [0.501, 0.6],
    }
    for name, content in (
        ("evaluations/mmlu/result.json", result),
        ("evaluations/long/result.json", {"curve": rows}),
        ("plans/p.json", plan),
    ):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A real run of eight steps."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "run"
    options = [
        "--train.num_steps",
        "8",
        "--evaluate.every",
        "4",
        "--sample.prompts",
        '["It is"]',
        "--sample.max_new_tokens",
        "4",
    ]
    output = run(write_config(folder), path, *options)
    assert "python -m baichuan_jax.report" in output
    return path


def make(tmp_path: Path, *runs: Path) -> str:
    """The page's own text: without plotly's."""
    assert main([*map(str, runs), "-o", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return re.sub(r"<script>/\*\*\n\* plotly\.js.*?</script>", "", text, flags=re.DOTALL)


def test_a_real_run_is_shown_whole(trained, tmp_path):
    text = make(tmp_path, trained)
    assert "plotly.js" not in text
    for words in (
        "8 of 8",
        "4,096",
        "completed",
        "1 launch(es), no verdict on a fault",
        "1 x cpu in 1 process(es)",
        "<b>It is</b>",
        "train.context_length",
        "None was asked",
        "No memory plan",
    ):
        assert words in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    assert {
        "figure-loss",
        "figure-throughput",
        "figure-mfu",
        "figure-causes",
        "figure-goodput-0",
        "figure-grad_norm",
        "figure-learning_rate",
        "figure-memory",
    } == set(figures)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    names = [trace.get("name") for trace in figures["figure-loss"]["data"]]
    assert names == [
        "every step",
        "smoothed",
        "validation",
        "unigram entropy",
        "Baichuan-7B, published",
    ]


def test_time_of_a_faulty_run_is_accounted_for(tmp_path):
    (record,) = read_runs([write_faulty_run(tmp_path / "run")])
    spans = [(span.launch, span.state, span.begin, span.end) for span in record.timeline.spans]
    assert spans == [
        (1, "starting", 0, 10),
        (1, "steps", 10, 14),
        (1, "lost", 14, 16),
        (1, "ending", 16, 16.5),
        (2, "down", 16.5, 20),
        (2, "starting", 20, 30),
        (2, "steps", 30, 34),
        (2, "ending", 34, 40),
    ]
    assert record.tokens[8] == 8 * TOKENS
    seconds, shares = record.goodput()
    assert (seconds[-1], shares[-1]) == (40, 8 / 40)  # eight steps of a second, in 40 seconds
    assert seconds[3] == 14
    assert shares[3] == pytest.approx(4 / 14)


def test_faults_are_in_the_page_and_their_words_are_escaped(tmp_path):
    path = write_faulty_run(tmp_path / "<b>run")
    text = make(tmp_path, path)
    assert "<td>" not in text.split("node-7: 0")[0][-10:]
    for words in ("node-7: 0", "ended by a signal", "SIGKILL &lt;in wait&gt;", "&lt;b&gt;run"):
        assert words in text
    assert "SIGKILL <in" not in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    marks = {trace["name"]: trace for trace in figures["figure-goodput-0"]["data"]}
    assert {"fault", "verdict", "recovery", "restored", "checkpoint"} <= set(marks)
    assert marks["fault"]["x"] == [17.0]
    assert marks["recovery"]["x"] == [31.0]  # the second launch's first step


ATTACK = """<img src=x onerror="window.hit=1"><a href='javascript:window.hit=1'>%{x}</a>\u202e"""


def write_hostile_run(path: Path) -> Path:
    """A run with markup and fields of plotly's templates in every text that it has."""
    write_faulty_run(path)
    add_results(path)
    texts = {"device", "jax", "mfu_of", "host", "rule", "evidence"}
    found = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    lines = [{k: ATTACK + v if k in texts else v for k, v in line.items()} for line in found]
    lines[0]["mesh"] = {ATTACK: 2}
    lines += [
        {"time": 1030.0, "kind": "failed", "step": 5, "error": ATTACK + "</script><!--\u2028"},
        {"time": 1031.0, "kind": "straggler", "step": 6, "host": ATTACK, "process": 0}
        | {"seconds": 2.0, "median": 1.0},
        {"time": 1040.0, "kind": "sampled", "step": 8, "samples": {ATTACK: ATTACK + "</script>"}},
    ]
    write_lines(path / "events.jsonl", lines)
    (path / "config.yaml").write_text(
        json.dumps({"run_dir": ATTACK, "data": {"train": {ATTACK: 1.0}}, ATTACK: ATTACK}),
        encoding="utf-8",
    )
    plan = json.loads((path / "plans" / "p.json").read_text())
    plan |= {"topology": ATTACK, "memory_gib": {ATTACK: 3.0, "other": 1.0}}
    (path / "plans" / "p.json").write_text(json.dumps(plan))
    result = json.loads((path / "evaluations" / "mmlu" / "result.json").read_text())
    for what in ("subjects", "categories"):
        result[what] = {ATTACK + name: cell for name, cell in result[what].items()}
    result["manifest"]["filter"] = ATTACK
    place = path / "evaluations" / "<img src=x onerror='window.hit=1'>"
    (path / "evaluations" / "mmlu").rename(place)
    (place / "result.json").write_text(json.dumps(result))
    return path


def test_no_text_of_a_run_is_markup(tmp_path):
    run = write_hostile_run(tmp_path / "<img src=x onerror='window.hit=1'>%{x}")
    text = make(tmp_path, run, write_faulty_run(tmp_path / "other"))
    body = text.partition("<body>")[2].partition("<script")[0]
    assert not re.search(r"<(img|a href='|/?script|!--)", body)
    assert "\u202e" not in text
    assert body.count("&lt;img src=x onerror") > 15
    data = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in data
    shown = json.dumps(json.loads(data), ensure_ascii=False)
    # plotly draws <b>, <a> and others; only its own breaks and <extra> are there.
    assert set(re.findall(r"<[^>]*>?", shown)) <= {"<br>", "<extra>", "</extra>"}
    assert "&lt;img src=x onerror" in shown
    # No name is a field of a template.
    assert not re.search(r"</a&gt;%\{|onerror='window.hit=1'&gt;%\{", shown)
    assert "&#37;{x}" in shown
    title = re.search("<title>(.*?)</title>", text)[1]
    assert title.startswith("&lt;img src=x")


def test_a_page_runs_its_own_scripts_alone(tmp_path):
    make(tmp_path, write_faulty_run(tmp_path / "run"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert policy.startswith("default-src 'none'; script-src ")
    assert re.findall("'sha256-(.*?)'", policy) == digests
    assert len(scripts) == 2


def test_results_and_plans_in_the_runs_folder_are_shown(tmp_path):
    path = write_faulty_run(tmp_path / "run")
    add_results(path)
    text = make(tmp_path, path)
    for words in (
        "figure-during-mmlu",
        "figure-scores-1",
        "figure-perplexity-0",
        "50.0 ± 11.5",
        "38.4",
        "2 of 57 subjects",
        "peak 12.5 of 73.6 GiB, fits",
        "MFU 55.0% (90 % interval 50.1 to 60.0%).",
        "figure-plan-0-0",
    ):
        assert words in text
    assert "None was asked" not in text


def test_a_plan_without_an_interval_is_shown_and_one_of_other_lengths_refused(tmp_path):
    path = write_faulty_run(tmp_path / "run")
    add_results(path)
    file = path / "plans" / "p.json"
    plan = json.loads(file.read_text())
    file.write_text(json.dumps(plan | {"predicted_mfu_interval": [0.5]}))
    with pytest.raises(ConfigError, match=r"p\.json: predicted_mfu_interval must be two numbers"):
        make(tmp_path, path)
    del plan["predicted_mfu_interval"]
    file.write_text(json.dumps(plan))
    assert "MFU 55.0%.<" in make(tmp_path, path)


def test_differences_between_runs_are_named(tmp_path, trained):
    text = make(tmp_path, trained, write_faulty_run(tmp_path / "other"))
    assert "settings differ between these runs" in text
    row = re.search(r"<tr><td class=\"\">train.seed</td>.*?</tr>", text)[0]
    assert row.count("<td") == 3
    twin = tmp_path / "twin"
    shutil.copytree(tmp_path / "other", twin)
    assert "All settings of these runs are equal" in make(tmp_path, tmp_path / "other", twin)


def test_a_last_line_that_is_half_written_is_left_out(tmp_path):
    path = write_faulty_run(tmp_path / "run")
    before = read_runs([path])[0]
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss"')
    assert read_runs([path])[0].steps == before.steps


@pytest.mark.parametrize(
    "case, words",
    [
        ("absent", "there is no folder"),
        ("other folder", "no run's folder: it has no metrics.jsonl; runs in it: inner"),
        ("empty metrics", "has no finished step yet"),
        (
            "broken line",
            "metrics.jsonl, line 2 is no JSON: Expecting property name",
        ),
        ("broken result", "result.json is no JSON"),
        ("broken configuration", "config.yaml is no YAML"),
        ("listed configuration", "holds list; repair it, or delete it: the run's next launch"),
        ("twice", "a run is given twice"),
        ("too many", "9 runs were given and a page shows at most 8"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_the_reason(case, words, tmp_path):
    path = write_faulty_run(tmp_path / "outer" / "inner")
    output = tmp_path / "report.html"
    runs = {
        "absent": [tmp_path / "none"],
        "other folder": [tmp_path / "outer"],
        "twice": [path, path],
        "too many": [path] * 9,
    }.get(case, [path])
    if case == "empty metrics":
        (path / "metrics.jsonl").write_text("")
    elif case == "broken line":
        (path / "metrics.jsonl").write_text(
            json.dumps(step_line(1, 1.0)) + '\n{"step": 2, garbage\n'
        )
    elif case == "broken result":
        add_results(path)
        (path / "evaluations" / "mmlu" / "result.json").write_text("{")
    elif case == "broken configuration":
        (path / "config.yaml").write_text("a: [")
    elif case == "listed configuration":
        (path / "config.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=re.escape(words)):
        main([*map(str, runs), "-o", str(output)])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plans", "p.json has 5,000 plans (with those before it) and a page shows at most 300"),
        ("plans in files", "q1.json has 301 plans (with those before it) and a page shows at"),
        ("curve", "result.json has 120,000 rows (with those of results before it) and a page"),
        ("curves", "long2/result.json has 30,000 rows (with those of results before it) and a"),
    ],
)
def test_more_than_a_page_can_show_is_refused_in_seconds(kind, words, tmp_path):
    path = write_faulty_run(tmp_path / "run")
    add_results(path)
    (plan, curve) = (path / "plans" / "p.json", path / "evaluations" / "long" / "result.json")
    one, row = json.loads(plan.read_text()), json.loads(curve.read_text())["curve"][0]
    many = [one | {"topology": str(number)} for number in range(5000)]
    plan.write_text(json.dumps(many[: 5000 if kind == "plans" else 300]))
    if kind == "plans in files":
        (path / "plans" / "q1.json").write_text(json.dumps(many[-1]))
    for number in range(3 if kind == "curves" else 1):
        file = path / "evaluations" / f"long{number or ''}" / "result.json"
        file.parent.mkdir(exist_ok=True)
        rows = {"curve": 120_000, "curves": 10_000}.get(kind, 1)
        file.write_text(json.dumps({"curve": [row] * rows}))
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=re.escape(words)):
        main([str(path), "-o", str(tmp_path / "page.html")])
    # A second; 40 where each of these values has a message made for it.
    assert time.perf_counter() - began < 10


def test_a_page_that_cannot_be_written_is_refused_before_the_runs_are_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    for output, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "x", "File exists")):
        with pytest.raises(SystemExit) as end:
            main([str(tmp_path / "none"), "-o", str(output)])
        assert end.value.code == 2
        assert f"-o/--output: {str(output)!r} cannot be written: {why}" in capsys.readouterr().err


def test_every_category_of_time_has_a_colour():
    assert list(CATEGORY_COLOURS) == list(CATEGORIES)


def test_long_curves_keep_their_extremes():
    values = [float(step % 7) for step in range(100_000)]
    values[54_321], values[77_777], values[500] = 1e6, -1e6, None
    x, y, size = thin(range(100_000), values)
    assert (len(x) <= 2000, size) == (True, 100)
    assert (x[y.index(1e6)], x[y.index(-1e6)]) == (54_321, 77_777)
    assert x == sorted(x)
    assert thin([1, 2], [3.0, None]) == ([1, 2], [3.0, None], 1)


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [write_faulty_run(tmp_path / name / "run") for name in "ab"]
    assert [record.name for record in read_runs(paths)] == ["a/run", "b/run"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (make browser-deps)"
    )
    if BROWSER is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclasses.dataclass
class Opened:
    """The page in a browser, with all that it complained of or asked the network for."""

    page: object
    complaints: list[str]

    def js(self, code: str):
        return self.page.evaluate(code)


def opened(browser, path: Path, width: int, scheme: str) -> Opened:
    context = browser.new_context(
        color_scheme=scheme,
        viewport={"width": width, "height": 800},
        has_touch=width < 700,
        offline=True,
    )
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("file:", "data:", "blob:")) or complaints.append(request.url)
        ),
    )
    page.goto(path.as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn === 'yes'", timeout=60_000)
    return Opened(page, complaints)


def test_a_browser_draws_it_without_a_complaint(browser, trained, tmp_path):
    faulty = write_faulty_run(tmp_path / "with a space 运行")
    add_results(faulty)
    make(tmp_path, trained, faulty)
    for width, scheme in ((1200, "light"), (1200, "dark"), (360, "light")):
        shown = opened(browser, tmp_path / "report.html", width, scheme)
        places, drawn = shown.js(
            "['.figure', '.figure .main-svg'].map(s => document.querySelectorAll(s).length)"
        )
        assert places == 13
        assert drawn >= places
        assert (
            shown.js("document.documentElement.scrollWidth") == width
        )  # nothing sticks out; wide tables scroll by themselves
        light = shown.js("getComputedStyle(document.body).backgroundColor")
        assert (light == "rgb(255, 255, 255)") == (scheme == "light")
        text = "document.querySelector('#figure-loss').layout.font.color"
        before = shown.js(text)
        shown.page.click("#theme")
        assert shown.js(text) != before
        assert shown.js("getComputedStyle(document.body).backgroundColor") != light
        shown.page.click("#log")
        assert shown.js(
            "['loss', 'memory'].map(n => document.querySelector('#figure-' + n).layout.xaxis.type)"
        ) == ["log", "log"]
        traces = "document.querySelector('#figure-loss').data"
        visible = f"{traces}.find(t => t.name.endsWith('smoothed')).visible"
        assert shown.js(visible) is not False
        shown.page.click(".legend button:has-text('smoothed') >> nth=0")
        assert shown.js(visible) is False
        assert shown.complaints == []
        shown.page.context.close()


def test_a_browser_runs_nothing_of_a_hostile_run(browser, tmp_path):
    run = write_hostile_run(tmp_path / "<img src=x onerror='window.hit=1'>%{x}")
    make(tmp_path, run, write_faulty_run(tmp_path / "other"))
    shown = opened(browser, tmp_path / "report.html", 1200, "light")
    # Every point of every figure, as a mouse finds it.
    seen = shown.js(
        """() => {
          const seen = [];
          for (const place of document.querySelectorAll('.figure')) {
            place.data.forEach((trace, curve) => {
              for (let point = 0; point < Math.min(4, (trace.x ?? trace.y).length); point++) {
                try { Plotly.Fx.hover(place, [{curveNumber: curve, pointNumber: point}]); }
                catch (error) { continue; }
                seen.push(...[...place.querySelectorAll('.hovertext')].map(e => e.textContent));
              }
            });
          }
          return seen.join('\\n');
        }"""
    )
    assert "<img src=x onerror" in seen
    assert shown.js("document.querySelectorAll('img, svg a, main a').length") == 0
    assert shown.js("window.hit") is None
    # A picture of a figure is made within the page's policy.
    picture = "Plotly.toImage(document.querySelector('#figure-loss'), {format: 'png'})"
    assert shown.js(picture).startswith("data:image/png")
    assert shown.complaints == []
    # What escaping might miss does not run either.
    shown.js(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(ATTACK)})")
    shown.page.wait_for_timeout(200)
    assert shown.js("window.hit") is None
    shown.page.context.close()


def test_a_run_whose_name_is_no_text_has_a_page(tmp_path):
    run = write_faulty_run(tmp_path / os.fsdecode(b"a\xff<b>\n"))
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a\\xff&lt;b" in page
    # In commands to copy, as a shell takes it.
    quoted = f"printf %s {quote_path(run)}"
    assert subprocess.run(["bash", "-c", quoted], capture_output=True).stdout == os.fsencode(run)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "gb18030"])
def test_commands_print_in_any_encoding(encoding, tmp_path, monkeypatch):
    run = write_faulty_run(tmp_path / "春眠")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    with lasting_streams() as stdout:
        assert resilience([str(run)]) == 0
        assert main([str(run), "--output", str(tmp_path / "頁.html")]) == 0
        stdout.flush()
    assert stdout.error is None
    assert b"goodput" in shown.getvalue().lower()
