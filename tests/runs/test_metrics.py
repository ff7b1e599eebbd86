"""What a run writes of its steps, to files and to services."""

import importlib.machinery
import json
import math
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from baichuan_jax.config.schema import Config, ConfigError, MetricsConfig
from baichuan_jax.runs import metrics
from baichuan_jax.runs.events import Failed, of_kind
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.metrics import Writer


def test_lines_are_on_disk_at_once_and_never_hold_what_json_cannot(tmp_path):
    writer = Writer(tmp_path, Config(metrics=MetricsConfig(tensorboard=False)), print)
    writer.metrics(3, {"loss": 1.5, "grad_norm": math.nan})
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line == {"step": 3, "time": line["time"], "loss": 1.5, "grad_norm": None}
    writer.event(Failed(step=3, error="登鹳雀楼"))
    assert of_kind(Run(tmp_path).events, Failed)[0].error == "登鹳雀楼"
    assert "登鹳雀楼" in (tmp_path / "events.jsonl").read_text(encoding="utf-8")
    writer.close()


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert Run(tmp_path).metrics == [{"step": 1, "loss": 2.0}]


def test_a_line_after_one_cut_short_stands_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    writer = Writer(tmp_path, Config(metrics=MetricsConfig(tensorboard=False)), print)
    writer.metrics(2, {"loss": 1.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in Run(tmp_path).metrics] == [(1, 2.0), (2, 1.0)]


def shown_by_tensorboard(folder: Path) -> list[int]:
    """Steps of the losses in the order of the files, without those that a session start purges."""
    steps: list[int] = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "loss"]
    return steps


def test_tensorboard_shows_a_repeated_step_once(tmp_path):
    for first, last in ((1, 5), (3, 6), (2, 4)):  # the third as after a rollback
        writer = Writer(tmp_path, Config(), print)
        writer.begin(first)
        for step in range(first, last + 1):
            writer.metrics(step, {"loss": 2.0})
        # An evaluation of the last step before the first one's record hides nothing.
        assert writer.close() == []
    assert shown_by_tensorboard(tmp_path / "tensorboard") == [1, 2, 3, 4]


def test_wandb_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Writer(tmp_path, Config(metrics=MetricsConfig(wandb_project="x")), print)


class FakeWandb:
    """Stands for the package and for its run; raises or hangs where it is told to."""

    __spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def __init__(self, raises: str = "", hangs: str = "") -> None:
        self.raises, self.hangs = raises, hangs
        self.identities, self.steps, self.finished = [], [], 0

    def _fail(self, name: str) -> None:
        if name == self.hangs:
            threading.Event().wait(30)
        if name == self.raises:
            raise SystemExit("no network")

    def init(self, **settings: Any) -> "FakeWandb":
        self._fail("init")
        assert settings["resume"] == "allow"
        self.identities.append(settings["id"])
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._fail("log")
        self.steps.append(step)

    def finish(self) -> None:
        self._fail("finish")
        self.finished += 1


def write_steps(folder: Path, fake: FakeWandb, monkeypatch, *steps: int) -> list[str]:
    """One launch that tracks these steps; what it warns of."""
    monkeypatch.setitem(sys.modules, "wandb", fake)
    warnings: list[str] = []
    config = Config(metrics=MetricsConfig(tensorboard=False, wandb_project="x"))
    writer = Writer(folder, config, warnings.append)
    writer.begin(steps[0])
    for step in steps:
        writer.metrics(step, {"loss": 2.0})
    assert writer.close() == []
    return warnings


def test_all_launches_of_a_run_are_one_run_of_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    assert write_steps(tmp_path, fake, monkeypatch, 1, 2, 3) == []
    assert write_steps(tmp_path, fake, monkeypatch, 3, 4) == []
    assert len(set(fake.identities)) == 1
    assert len(fake.identities) == fake.finished == 2
    assert fake.steps == [1, 2, 3, 4]
    other = FakeWandb()
    write_steps(tmp_path / "other", other, monkeypatch, 1)
    assert other.identities[0] != fake.identities[0]


@pytest.mark.parametrize("name", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_wandb_stops_no_run(tmp_path, monkeypatch, name, how):
    monkeypatch.setattr(metrics, "WANDB_SECONDS", 0.3)
    warnings = write_steps(tmp_path, FakeWandb(**{how: name}), monkeypatch, 1, 2)
    reason = "SystemExit: no network" if how == "raises" else "has not finished within 0 s"
    assert any(reason in text for text in warnings), warnings
    assert Run(tmp_path).curve("loss") == {1: 2.0, 2: 2.0}


def test_what_a_disk_refuses_waits_and_is_written_in_order(tmp_path, monkeypatch):
    warnings: list[str] = []
    writer = Writer(tmp_path, Config(metrics=MetricsConfig(tensorboard=False)), warnings.append)
    writer.metrics(1, {"loss": 1.0})
    writer.event(Failed(step=1, error="e"))
    # A folder in the file's place is what root cannot write either.
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    writer._metrics.close()
    (tmp_path / "metrics.jsonl").mkdir()
    writer.metrics(2, {"loss": 2.0})
    writer.metrics(3, {"loss": 3.0})
    (warning,) = warnings
    assert "metrics.jsonl cannot be written (Is a directory); the run goes on" in warning
    assert "2 records of" in writer.close()[0]
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "kept").rename(tmp_path / "metrics.jsonl")
    writer.metrics(4, {"loss": 4.0})
    assert "is written again; nothing of it is lost" in warnings[-1]
    assert writer.close() == []
    assert [line["step"] for line in Run(tmp_path).metrics] == [1, 2, 3, 4]


def test_the_plot_is_a_png_and_takes_repeated_steps_once(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(tmp_path)
    assert run.curve("loss") == {1: 3.0, 2: 2.0}
    # A name between dollars is no formula, which matplotlib would refuse.
    run.path = tmp_path / "$_^$"
    run.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "step": 2}',
        '{"step": 1, "a": 1, "\\u0061": 2}',
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "loss": 1e999}',
        '{"step": 1.0}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1, "tokens": 1.5}',
        '{"step": 1, "loss": "x"}',
        '{"step": 1, "time": 1e17}',
        '{"loss": 1}',
        "[1]",
        "{",
    ],
)
def test_a_damaged_line_is_refused_beside_whole_ones(tmp_path, line):
    """The quick look at usual lines takes none that the full one refuses."""
    whole = '{"step": 1, "loss": 2.5, "time": 1.7e9, "tokens": 4000000000000}'
    odd = '{"step": 2, "loss": null, "clipped": true, "margin": -0.5}'
    (tmp_path / "metrics.jsonl").write_text(f"{whole}\n{odd}\n")
    assert [entry["step"] for entry in Run(tmp_path).metrics] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text(f"{whole}\n{line}\n{odd}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 .*; repair or delete that line"):
        _ = Run(tmp_path).metrics
