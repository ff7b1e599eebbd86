"""Folders of runs that somebody else made: what lies in them, on every command that opens a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from harness import SHORT, Hostile, finished_run

# What must not be shown: the text of a file beside the run.
SECRET = "nobody's business"


def received(files: Path) -> str:
    """A finished run with these files in the place of its own, or beside them."""
    run = files / "run"
    shutil.copytree(finished_run(), run)
    for path in sorted((files / "over").rglob("*")):
        place = run / path.relative_to(files / "over")
        if path.is_dir() and not path.is_symlink():
            place.mkdir(parents=True, exist_ok=True)
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        path.rename(place)
    return str(run)


def _train(files: Path) -> list[str]:
    config = finished_run().with_name("config.yaml")
    argv = ["baichuan_jax.train", "--config", str(config), *SHORT, "--train.num_steps", "4"]
    return [*argv, "--run_dir", received(files)]


def _launch(files: Path) -> list[str]:
    return ["baichuan_jax.launch", "--", *_train(files)[1:]]


def _report(files: Path) -> list[str]:
    return ["baichuan_jax.report", received(files), "-o", "page.html"]


def _report_beside_another(files: Path) -> list[str]:
    return ["baichuan_jax.report", str(finished_run()), received(files), "-o", "page.html"]


def _goodput(files: Path) -> list[str]:
    return ["baichuan_jax.resilience", received(files)]


def _generate(files: Path) -> list[str]:
    return ["baichuan_jax.generate", "--checkpoint", received(files), "--prompt", "a"]


def _perplexity(files: Path) -> list[str]:
    (files / "text.txt").write_text("a text of some words " * 100)
    argv = ["baichuan_jax.evaluate", "perplexity", "--checkpoint", received(files)]
    return [*argv, "--text", str(files / "text.txt"), "--context", "32,64", "--output", "out"]


def _export(files: Path) -> list[str]:
    return ["baichuan_jax.hf", "export", received(files), "out"]


def _init(files: Path) -> list[str]:
    config = finished_run().with_name("config.yaml")
    argv = ["baichuan_jax.train", "--config", str(config), *SHORT, "--run_dir", "new"]
    return [*argv, "--train.num_steps", "2", "--init_from", received(files)]


SETTINGS = {"report": _report, "reports": _report_beside_another, "train": _train}
RECORDS = {"report": _report, "goodput": _goodput, "train": _train}
WEIGHTS = {
    "generate": _generate,
    "perplexity": _perplexity,
    "export": _export,
    "init_from": _init,
    "train": _train,
}


def _write(text: str, *names: str) -> Callable[[Path], None]:
    """Files with this text in the run."""

    def make(folder: Path) -> None:
        for name in names:
            _place(folder, name).write_text(text)

    return make


def _link(text: str | None, *names: str) -> Callable[[Path], None]:
    """Links in the run to a file beside it with this text; None: to a folder."""

    def make(folder: Path) -> None:
        if text is None:
            (folder / "elsewhere").mkdir()
        else:
            (folder / "elsewhere").write_text(text)
        for name in names:
            _place(folder, name).symlink_to(folder / "elsewhere")

    return make


def _pipe(*names: str) -> Callable[[Path], None]:
    """Named pipes in the run, which nobody writes to."""

    def make(folder: Path) -> None:
        for name in names:
            os.mkfifo(_place(folder, name))

    return make


def _place(folder: Path, name: str) -> Path:
    path = folder / "over" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _bomb() -> str:
    """Nine aliases of nine aliases, eight times: 43 million values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for above, name in zip("abcdefgh", "bcdefghi", strict=False):
        lines.append(f"{name}: &{name} [{', '.join([f'*{above}'] * 9)}]")
    return "\n".join(lines)


def _event(**more: object) -> str:
    """The first event of a launch, which names its device, and the verdict on a fault."""
    started = {"time": 1.0, "kind": "started", "attempt": 1, "device": "cpu"}
    verdict = {"time": 3.0, "kind": "verdict", "attempt": 1, "cause": "killed", **more}
    verdict |= {"processes": [0], "rule": "r", "evidence": "e", "detected": 2.0, "concluded": 2.5}
    return "".join(json.dumps(line) + "\n" for line in (started, verdict))


READ_BY_ALL = ("config.yaml", "metrics.jsonl", "events.jsonl")
HOSTILE = [
    Hostile("alias_bomb", _write(_bomb(), "config.yaml"), SETTINGS, r"config\.yaml.*, line 1: &a"),
    Hostile("deep_yaml", _write("[" * 200_000, "config.yaml"), SETTINGS, r"config\.yaml.* deeply"),
    Hostile(
        "twice_yaml",
        _write("".join(f"a{n}: 1\n" for n in range(20_000)) + "a19999: 2\n", "config.yaml"),
        SETTINGS,
        r"config\.yaml.* 'a19999' is set twice",
    ),
    Hostile(
        "files_elsewhere",
        _link(SECRET, *READ_BY_ALL),
        RECORDS,
        r"(config\.yaml|(metrics|events)\.jsonl) is a link out",
    ),
    Hostile(
        "pipes",
        _pipe(*READ_BY_ALL),
        RECORDS,
        r"(config\.yaml|(metrics|events)\.jsonl) is a folder, a pipe",
    ),
    Hostile(
        "deep_lines",
        _write('{"step": 1, "x": ' + "[" * 400_000 + "\n", "metrics.jsonl", "events.jsonl"),
        RECORDS,
        r"(metrics|events)\.jsonl, line 1 .*deeply",
    ),
    Hostile(
        "long_lines",
        _write(f'{{"step": 1, "x": "{"x" * 400_000}"}}\n', "metrics.jsonl", "events.jsonl"),
        RECORDS,
        r"(metrics|events)\.jsonl, line 1 ",
    ),
    Hostile(
        "launches_elsewhere",
        _link(None, "attempts"),
        {"train": _train, "launch": _launch},
        r"attempts is a link out",
    ),
    Hostile(
        "records_elsewhere",
        _link('{"process": 0, "host": "h"}', "attempts/1/process-0.json"),
        {"report": _report, "goodput": _goodput},
        r"process-0\.json is a link out",
    ),
    Hostile(
        "results_elsewhere",
        _link('{"scored": false}', "evaluations/mmlu/result.json", "plans/p.json"),
        {"report": _report, "reports": _report_beside_another},
        r"(result|p)\.json is a link out",
    ),
    Hostile("tokenizer_elsewhere", _link(SECRET, "tokenizer.model"), WEIGHTS, r"model is a link o"),
    Hostile(
        "checkpoint_elsewhere",
        _link(SECRET, "checkpoints/2/run/metadata"),
        WEIGHTS,
        r"metadata is a link out",
    ),
    Hostile(
        "weights_elsewhere",
        _link(SECRET, "checkpoints/2/params/manifest.ocdbt"),
        WEIGHTS,
        r"manifest\.ocdbt is a link out",
    ),
    Hostile(
        "terminal_names",
        _write("{", "evaluations/\x1b]0;me\x07\x1b[2J\x9b\u202e/result.json"),
        {"report": _report, "reports": _report_beside_another},
        r"\\x1b\]0;me\\x07\\x1b\[2J\\x9b\\u202e/result\.json",
    ),
    Hostile(
        "terminal_events",
        _write(_event(host="\x1b[2J\x1b]0;me\x07\x9b1m\u202ehost"), "events.jsonl"),
        {"report": _report, "goodput": _goodput},
        "",
        counted={"report": r"page\.html", "goodput": r"\\x1b\[2J\\x1b\]0;me\\x07\\x9b1m\\u202e"},
    ),
]
