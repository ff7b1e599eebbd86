import json
import math
import sys

import pytest

from baichuan_jax.config.schema import Config, ConfigError, MetricsConfig, ModelConfig
from baichuan_jax.hardware.devices import peak_flops
from baichuan_jax.hardware.flops import flops_per_token
from baichuan_jax.runs.events import Failed, of_kind
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.metrics import Throughput, Writer


def test_7b_flops_follow_the_published_formula():
    """6 N D with all weights but the embedding, and 12 L D T for attention (PaLM, appendix B)."""
    model = ModelConfig()
    full, causal = flops_per_token(model, 4096)
    products = model.num_parameters - model.vocab_size * model.hidden_size
    attention = 12 * 32 * 4096 * 4096
    assert full == pytest.approx(
        6 * products + attention, rel=1e-4
    )  # norms' weights are in N and in no product
    assert full - causal == attention / 2


def test_mfu_of_the_original():
    """182 TFLOP/s of an A800's 312 are 58.3 %: the original's throughput gives that MFU."""
    config = Config()
    full, causal = flops_per_token(config.model, 4096)
    throughput = Throughput(config, 1000, 312.0 * 1e12)
    seconds = throughput.tokens * full / (182e12 * 1000)
    speed = throughput.add(seconds)
    assert speed["mfu"] == pytest.approx(0.583, abs=5e-4)
    assert speed["mfu_causal"] == pytest.approx(0.583 * causal / full, abs=5e-4)


class Device:
    def __init__(self, platform, kind):
        self.platform, self.device_kind = platform, kind


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
    ],
)
def test_the_peak_comes_from_the_table(kind, tflops):
    assert peak_flops(Config(), Device("gpu", kind))[0] == tflops * 1e12


def test_an_unknown_accelerator_shows_no_mfu_and_names_the_setting():
    peak, why = peak_flops(Config(), Device("gpu", "NVIDIA Z1"))
    assert peak is None
    assert "metrics.peak_tflops" in why
    assert Throughput(Config(), 8, None).add(1.0)["mfu"] is None
    peak, why = peak_flops(
        Config(metrics=MetricsConfig(peak_tflops=7.0)), Device("gpu", "NVIDIA Z1")
    )
    assert peak == 7e12


def test_lines_are_on_disk_at_once_and_never_hold_what_json_cannot(tmp_path):
    writer = Writer(tmp_path, Config(metrics=MetricsConfig(tensorboard=False)))
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
    writer = Writer(tmp_path, Config(metrics=MetricsConfig(tensorboard=False)))
    writer.metrics(2, {"loss": 1.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in Run(tmp_path).metrics] == [(1, 2.0), (2, 1.0)]


def test_tensorboard_events_hold_the_metrics(tmp_path):
    writer = Writer(tmp_path, Config())
    writer.metrics(1, {"loss": 2.0})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_wandb_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Writer(tmp_path, Config(metrics=MetricsConfig(wandb_project="x")))


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
