"""What follows from settings that differ between two launches of a run."""

import dataclasses

import numpy as np
import pytest

from baichuan_jax.checkpoint.progress import Given, Progress
from baichuan_jax.config.files import KEYS, dump_config
from baichuan_jax.config.schema import (
    Config,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from baichuan_jax.optimizer import learning_rate
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import (
    Completed,
    DataChanged,
    Measured,
    Started,
    append_event,
    of_kind,
)
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.metrics import Writer
from baichuan_jax.runs.output import Output
from baichuan_jax.train import _settings_before, train
from baichuan_jax.training.changes import (
    compare,
    consequence,
    more_steps,
    show_changes,
    show_other_tests,
)

CONFIG = Config(
    train=TrainConfig(num_steps=50),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
)


def with_options(config: Config, options: list[str]) -> Config:
    """The configuration with --SECTION.NAME VALUE ... put in."""
    for name, value in zip(options[::2], options[1::2], strict=True):
        section, field = name.removeprefix("--").split(".")
        old = getattr(config, section)
        kind = type(getattr(old, field))
        changed = dataclasses.replace(old, **{field: kind(value)})
        config = dataclasses.replace(config, **{section: changed})
    return config


def said(before: str | None, config: Config, step: int, tmp_path, capsys) -> str:
    output = Output(Writer(tmp_path, config, print, active=False), Display())
    show_changes(Run(tmp_path), before, config, step, output)
    return " ".join(capsys.readouterr().out.split())


def rate(config: Config, step: int) -> float:
    return float(learning_rate(config.optimizer, config.train.num_steps, step - 1))


def test_every_setting_has_a_consequence():
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    for key in KEYS:
        if key not in sections:
            assert consequence(key), key


def test_numpy_and_jax_compute_the_same_schedule():
    for step in (0, 1, 2, 30, 49, 80):
        jax_rate = float(learning_rate(CONFIG.optimizer, 50, step))
        numpy_rate = float(learning_rate(CONFIG.optimizer, 50, step, np))
        assert numpy_rate == pytest.approx(jax_rate, rel=1e-5)


def test_more_steps_say_both_learning_rates_and_how_to_keep_the_low_one(tmp_path, capsys):
    longer = with_options(CONFIG, ["--train.num_steps", "100"])
    text = said(dump_config(CONFIG), longer, 50, tmp_path, capsys)
    assert "train.num_steps │ 50 │ 100 │ another learning rate, see below" in text
    # A finished run's last: the step after it was never done.
    old, new = rate(CONFIG, 50), rate(longer, 51)
    assert f"learning rate at step 51: {old:.6g} before, {new:.6g} now" in text
    assert "train.num_steps 50 -> 100 stretches the cosine" in text
    assert f"{rate(CONFIG, 50):.6g} before, at step 50, {rate(longer, 100):.6g} now, at 100" in text
    options = text.split("To keep it at ")[1].split(": ")[1].split()[:6]
    kept = with_options(longer, options)
    assert [rate(kept, step) for step in (51, 75, 100)] == pytest.approx([old] * 3, rel=1e-4)


def test_a_finished_run_says_what_more_steps_do(tmp_path):
    text = more_steps(Run(tmp_path), CONFIG, 50)
    longer = with_options(CONFIG, ["--train.num_steps", "100"])
    assert f"goes from {rate(CONFIG, 50):.6g} to {rate(longer, 51):.6g} at step 51" in text
    kept = with_options(longer, text.split("add ")[1].split()[:6])
    assert rate(kept, 60) == pytest.approx(rate(CONFIG, 50), rel=1e-4)


def test_the_options_that_a_finished_run_advises_are_not_warned_of(tmp_path, capsys):
    """Six digits of a rate, of whatever size, are that rate."""
    for high in (3e-3, 1.234567e-4, 0.7654321):
        config = with_options(CONFIG, ["--optimizer.learning_rate", str(high)])
        options = more_steps(Run(tmp_path), config, 50).split("add ")[1].split()[:6]
        longer = with_options(config, ["--train.num_steps", "75", *options])
        text = said(dump_config(config), longer, 50, tmp_path, capsys)
        assert "optimizer.final_learning_rate_ratio" in text
        assert "learning rate at step" not in text


def test_a_run_that_was_ended_early_says_what_more_steps_do_from_the_step_reached(tmp_path, capsys):
    """60 of 1000 steps were done, then 50 asked for: the next one is 61, at the rate of step 60."""
    first = with_options(CONFIG, ["--train.num_steps", "1000"])
    writer = Writer(tmp_path, CONFIG, print)
    writer.metrics(60, {"learning_rate": rate(first, 60)})
    writer.close()
    text = more_steps(Run(tmp_path), CONFIG, 60, dump_config(CONFIG))
    longer = with_options(CONFIG, ["--train.num_steps", "120"])
    reached = f"with 120 steps it goes from {rate(first, 60):.6g} to {rate(longer, 61):.6g} at"
    assert f"{reached} step 61. To keep it" in text
    kept = with_options(longer, text.split("add ")[1].split()[:6])
    assert rate(kept, 61) == pytest.approx(rate(first, 60), rel=1e-4)
    # Going on as advised is not warned of, and otherwise the rate of step 60 is what was before.
    assert "learning rate at step" not in said(dump_config(CONFIG), kept, 60, tmp_path, capsys)
    text = said(dump_config(CONFIG), longer, 60, tmp_path, capsys)
    assert f"learning rate at step 61: {rate(first, 60):.6g} before, {rate(longer, 61):.6g}" in text


@pytest.fixture
def complete(tmp_path):
    """A complete run of CONFIG, with a mesh that its launch resolved."""
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path / "run"))
    for event in (Started(attempt=1), Completed(step=50, loss=3.25)):
        append_event(tmp_path / "run", event)
    resolved = dataclasses.replace(config, mesh=MeshConfig(8, 1, 1, 1))
    (tmp_path / "run" / "config.yaml").write_text(dump_config(resolved))
    return config


def test_a_complete_run_says_which_settings_no_longer_act(complete, capsys):
    train(complete)
    text = " ".join(capsys.readouterr().out.split())
    assert "is complete: 50 steps, loss 3.250" in text
    assert "Settings differ" not in text
    own = more_steps(Run(complete.run_dir), CONFIG, 50)
    assert own in text
    other = ["--train.num_steps", "20", "--optimizer.learning_rate", "0.5"]
    train(with_options(complete, other))
    text = " ".join(capsys.readouterr().out.split())
    assert "train.num_steps │ 50 │ 20 │ nothing: all steps are done" in text
    assert "optimizer.learning_rate │ 0.003 │ 0.5 │ nothing" in text
    # What more steps would do follows from the rate that it was trained with.
    assert own in text


def test_settings_of_another_run_are_refused_of_a_complete_one(complete):
    other = ["--train.seed", "7", "--model.hidden_size", "8192", "--train.num_steps", "40"]
    with pytest.raises(ConfigError) as error:
        train(with_options(complete, other))
    assert "complete run of other settings than " in str(error.value)
    assert str(error.value).endswith("--run_dir, or set --model.hidden_size 4096 --train.seed 42")


def test_a_warning_needs_a_rate_that_changes(tmp_path, capsys):
    other = with_options(CONFIG, ["--evaluate.num_batches", "3"])
    text = said(dump_config(CONFIG), other, 5, tmp_path, capsys)
    assert "results before and after cannot be compared" in text
    assert "learning rate" not in text
    assert said(dump_config(CONFIG), CONFIG, 5, tmp_path, capsys) == ""
    assert said(None, CONFIG, 0, tmp_path, capsys) == ""
    lower = with_options(CONFIG, ["--optimizer.learning_rate", "0.001"])
    text = said(dump_config(CONFIG), lower, 10, tmp_path, capsys)
    assert "learning rate at step 11" in text
    assert "To keep it" not in text
    fresh = said(dump_config(CONFIG), lower, 0, tmp_path, capsys)
    assert "the run begins anew" in fresh
    assert "learning rate at step" not in fresh


def test_other_validation_text_and_tests_under_the_same_names_are_said_and_recorded(
    tmp_path, capsys
):
    output = Output(Writer(tmp_path, CONFIG, print), Display())
    run, progress = Run(tmp_path), Progress(seed=42).follow(42, [Given("en", "r", 1.0)], 8).at(40)

    def launch(step: int, validation: dict[str, str], tasks: dict[str, str]) -> str:
        show_other_tests(run, Measured(validation=validation, tasks=tasks), step, progress, output)
        return " ".join(capsys.readouterr().out.split())

    # Of an earlier version, whose launches recorded nothing: from the second on it is compared.
    assert launch(5, {"v": "a", "w": "b"}, {"mmlu": "c"}) == ""
    assert launch(5, {"v": "a", "w": "b"}, {"mmlu": "c"}) == ""
    assert len(of_kind(run.events, Measured)) == 1
    said = launch(5, {"v": "a", "w": "B"}, {"mmlu": "C"})
    assert "data.validation: the rows of w are others than before, so results" in said
    assert "evaluate.tasks: the questions of mmlu are others than before" in said
    (changed,) = of_kind(run.events, DataChanged)
    assert (changed.step, changed.position, changed.row, len(changed.changes)) == (5, 5, 40, 2)
    # Other names are other settings, which the table names; at step 0 there is nothing to compare.
    assert launch(5, {"x": "y"}, {}) == ""
    assert launch(0, {"x": "z"}, {}) == ""
    assert launch(5, {}, {}) == ""
    assert len(of_kind(run.events, DataChanged)) == 1
    assert output.writer.close() == []


def test_a_mapping_s_entries_and_settings_of_another_version_are_compared():
    data = dataclasses.replace(CONFIG.data, train={"a": 1.0, "b": 2.0})
    before = dataclasses.replace(CONFIG, data=data)
    after = dataclasses.replace(CONFIG, data=dataclasses.replace(data, train={"a": 1.0, "b": 3.0}))
    assert compare(dump_config(before), after) == [("data.train: b", 2.0, 3.0)]
    text = dump_config(CONFIG).replace("  z_loss: 0.0\n", "") + "of_another_version: 1\n"
    assert compare(text, CONFIG) == []
    assert compare("{}", CONFIG) == []


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "a: [", "", "optimizer: 3", "optimizer: {beta1: [x]}", "train: {num_steps: x}"),
        "optimizer: {learning_rate: 0}",
    ],
)
def test_damaged_settings_of_the_last_launch_are_named(text, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"^config\.yaml in the run's folder.*; delete it, and"):
        said(text, CONFIG, 1, tmp_path, capsys)


def test_settings_of_the_last_launch_that_are_no_text_say_what_to_do(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"config\.yaml, line 1 is no UTF-8 .*; delete it, and"):
        _settings_before(Run(tmp_path))
