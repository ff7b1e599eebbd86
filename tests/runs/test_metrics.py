"""What a run writes of its steps, to files and to services."""

import json
import math
import sys

import pytest

from baichuan_jax.config.schema import Config, ConfigError, MetricsConfig
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


def test_tensorboard_events_hold_the_metrics(tmp_path):
    writer = Writer(tmp_path, Config(), print)
    writer.metrics(1, {"loss": 2.0})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_wandb_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Writer(tmp_path, Config(metrics=MetricsConfig(wandb_project="x")), print)


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
    run.plot()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
