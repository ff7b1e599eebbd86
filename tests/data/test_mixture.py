"""Mixtures: temperature by its formula, the law from its own losses, a search that is killed."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launches import REPOSITORY, environment, write_config

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data import mixture
from baichuan_jax.data.mixture import (
    LEAST_SHARE,
    Law,
    draw_mixtures,
    fit_law,
    main,
    temperature_weights,
)


def test_temperature_weights_follow_their_formula():
    sizes = np.array([100, 400, 2500])
    assert temperature_weights(sizes, 1) == pytest.approx(sizes / 3000)
    assert temperature_weights(sizes, 2) == pytest.approx(np.sqrt(sizes) / np.sqrt(sizes).sum())
    assert temperature_weights(sizes, 1e6) == pytest.approx(np.full(3, 1 / 3), abs=1e-5)
    assert temperature_weights(np.array([1e300, 1e-300]), 0.01).tolist() == [
        1.0,
        0.0,
    ]  # no overflow
    with pytest.raises(ConfigError, match="temperature=0"):
        temperature_weights(sizes, 0)


def test_drawn_mixtures_are_around_the_given_one():
    prior = np.array([0.6, 0.3, 0.1])
    drawn = draw_mixtures(prior, 2000, 2.0, seed=3)
    assert drawn[0] == pytest.approx(prior)
    assert np.abs(drawn.sum(axis=1) - 1).max() < 2e-4  # four digits each
    assert drawn.min() > 0.9 * LEAST_SHARE
    assert drawn.mean(axis=0) == pytest.approx(prior, abs=0.02)
    assert (draw_mixtures(prior, 2000, 2.0, seed=3) == drawn).all()
    assert draw_mixtures(prior, 500, 100.0, seed=3).std(axis=0).max() < drawn.std(axis=0).min()


def test_the_law_is_found_back_from_its_own_losses():
    true = Law(4.0, np.array([0.5, -0.3, 0.0]), np.array([0.2, 0.4, 0.0]))
    weights = draw_mixtures(np.full(3, 1 / 3), 20, 1.0, seed=0)
    noise = np.random.default_rng(1).normal(0, 0.01, 20)
    law, left_out = fit_law(weights, true.predict(weights) + noise)
    new = draw_mixtures(np.full(3, 1 / 3), 200, 2.0, seed=9)
    assert np.abs(law.predict(new) - true.predict(new)).max() < 0.1  # losses spread over 3.9 to 6.4
    assert np.corrcoef(left_out, true.predict(weights))[0, 1] > 0.99
    assert (law.gains >= 0).all()
    flat, _ = fit_law(weights, np.full(20, 3.0))
    assert flat.predict(new) == pytest.approx(np.full(200, 3.0))


def test_a_loss_that_is_left_out_does_not_help_its_own_prediction():
    weights = draw_mixtures(np.full(2, 0.5), 8, 1.0, seed=0)
    losses = np.random.default_rng(0).normal(4, 1, 8)
    _, left_out = fit_law(weights, losses)
    losses[3] += 50
    _, other = fit_law(weights, losses)
    changed = np.abs(other - left_out)
    assert changed[3] < 1.5  # only through the penalty that the whole set chooses
    assert np.delete(changed, 3).max() > 5


@pytest.mark.parametrize(
    "law",
    [
        Law(1.0, np.array([0.5, -0.3, 0.1]), np.array([0.2, 0.4, 0.1])),
        Law(
            1.0, np.array([0.0, 0.0, 0.0]), np.array([1.0, 2.0, 3.0])
        ),  # the best: proportional to the gains
        Law(
            1.0, np.array([2.0, 0.1, 3.0]), np.array([0.0, 0.0, 0.0])
        ),  # the best: all that may go to the second
        Law(1.0, np.array([0.0, 5.0, 0.0]), np.array([0.3, 0.0, 0.3])),
    ],
)
def test_the_best_mixture_is_that_of_a_fine_grid(law):
    floor = np.array([0.05, 0.02, 0.1])
    grid = [
        (a, b, 1 - a - b)
        for a, b in itertools.product(np.arange(0.05, 1, 0.005), np.arange(0.02, 1, 0.005))
        if 1 - a - b >= 0.1
    ]
    best = law.best(floor)
    assert best.sum() == pytest.approx(1)
    assert (best >= floor - 1e-9).all()
    assert law.predict(best) <= law.predict(np.array(grid)).min() + 1e-6


def test_temperature_of_a_configuration_counts_text(tmp_path, capsys):
    config = write_config(tmp_path)
    out = tmp_path / "out.json"
    argv = ["temperature", "--config", str(config), "--temperature", "2", "--json", str(out)]
    assert main(argv) == 0
    figures = json.loads(out.read_text())
    assert [Path(path).name for path in figures["corpora"]] == ["train-en.jsonl", "train-zh.jsonl"]
    sizes = [
        sum(len(json.loads(line)["text"].encode()) for line in Path(path).read_text().splitlines())
        for path in figures["corpora"]
    ]
    assert figures["sizes"] == sizes
    assert figures["weights"] == pytest.approx((np.sqrt(sizes) / np.sqrt(sizes).sum()).tolist())
    # The printed weights are those, in four digits, as a shell and the trainer take them.
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[0] == "--data.train"
    again = load_config(config, [f"{words[0]}={words[1]}"]).data.train
    assert list(again.values()) == pytest.approx(figures["weights"], rel=1e-4)


def test_printed_weights_of_a_small_corpus_are_taken_by_the_trainer(tmp_path, capsys):
    """1 of 20,000 bytes is no weight of 0; a name with a quote is quoted."""
    small, big = tmp_path / "it's small.jsonl", tmp_path / "big.jsonl"
    small.write_text('{"text": "a"}\n')
    big.write_text(json.dumps({"text": "a" * 200_000}) + "\n")
    config = tmp_path / "b.yaml"
    config.write_text(json.dumps({"data": {"train": {str(small): 1, str(big): 1}}}))
    argv = ["temperature", "--config", str(config), "--temperature"]
    assert main([*argv, "1"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    again = load_config(config, [f"{words[0]}={words[1]}"]).data.train
    assert again == {str(small): pytest.approx(1 / 200_001, rel=1e-3), str(big): 1.0}
    with pytest.raises(ConfigError, match=r"--temperature 0\.1 makes weights .* give a larger"):
        main([*argv, "0.1"])


def test_what_cannot_be_searched_is_refused(tmp_path):
    config = str(write_config(tmp_path))
    learn = ["learn", "--config", config, "--output", str(tmp_path / "out")]
    for words, message in (
        (["--runs", "5"], "--runs 5 is too few for 2 corpora; give 6"),
        (["--train.num_steps", "7"], r"--train\.num_steps is set by the search itself"),
        (["--train.context_length"], "expected pairs of --SETTING VALUE"),
        (["--train.contextlength", "7"], "there is no setting 'train.contextlength'"),
        (["--data.validation", "{}"], r"data\.validation names no corpus"),
        (["--tokenizer.path", "gone.model"], r"there is no tokenizer 'gone\.model'"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*learn, *words])
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_search_is_of_one_text(tmp_path, monkeypatch, capsys):
    """A file that changes between two trainings, or between two searches, is named."""
    texts = [tmp_path / f"{name}.jsonl" for name in "abv"]
    for text in texts:
        text.write_text('{"text": "some words"}\n')
    config = tmp_path / "config.yaml"
    train = f"{{train: {{{texts[0]}: 1, {texts[1]}: 1}}, validation: {{{texts[2]}: 1}}}}"
    config.write_text(f"data: {train}\n")
    change = lambda: texts[1].write_text('{"text": "other words"}\n')
    losses = iter(range(100))
    monkeypatch.setattr(mixture.Trainings, "loss", lambda *_: 3.0 + next(losses) % 7 / 10)
    settings = {"runs": 6, "steps": 10, "concentration": 1.0, "seed": 0}
    learn = lambda folder: mixture.learn(str(config), [], tmp_path / folder, **settings)
    assert learn("out")
    assert learn("out")
    assert "not read" not in capsys.readouterr().err
    (tmp_path / ".a.jsonl").touch()
    star = {f"{tmp_path}/a*": 1, f"{tmp_path}/*.jsonl": 1}
    weights = ["--data.train", json.dumps(star), "--data.validation", "{}"]
    assert main(["temperature", "--config", str(config), "--temperature", "2", *weights]) == 0
    assert f"{tmp_path}/*.jsonl: 1 hidden files not read" in capsys.readouterr().err
    plan = tmp_path / "out" / "plan.json"
    given = json.loads(plan.read_text())
    change()
    with pytest.raises(ConfigError, match=r"with other text: .*b\.jsonl has changed, was added"):
        learn("out")
    with pytest.raises(ConfigError, match=r"a search with other settings \(steps\); choose"):
        mixture._keep_plan(tmp_path / "out", {**given, "steps": 7})
    # Of an earlier version.
    plan.write_text(json.dumps({name: given[name] for name in given if name != "files"}))
    assert learn("out")
    assert list(json.loads(plan.read_text())["files"]) == list(map(str, texts))
    texts[1].write_text('{"text": "the words that are there at first"}\n')
    monkeypatch.setattr(mixture.Trainings, "loss", lambda *_: change() and 3.0)
    with pytest.raises(ConfigError, match=r"b\.jsonl changed from .* while it was read"):
        learn("new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mixture.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds mixture\.json of no search"):
        learn("mine")
    (tmp_path / "runs" / "run-000").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds run-000 of no search \(no plan\.json\)"):
        learn("runs")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mixture.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds mixture\.json of no search"):
        learn("own")


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_killed(tmp_path):
    """Six trainings and the best, by the real trainer.

    The search is killed in the second training, which survives and is used.
    """
    config = write_config(tmp_path)
    words = [
        sys.executable,
        "-m",
        "baichuan_jax.data.mixture",
        "learn",
        "--config",
        str(config),
        "--output",
        str(tmp_path / "out"),
        "--runs",
        "6",
        "--steps",
        "30",
        "--json",
        str(tmp_path / "out.json"),
    ]
    first = subprocess.Popen(words, env=environment(), cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while (
        not (tmp_path / "out" / "run-001" / "metrics.jsonl").exists()
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = (tmp_path / "out" / "run-000" / "metrics.jsonl").read_bytes()
    done = subprocess.run(
        words, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "run-000" / "metrics.jsonl").read_bytes() == kept
    starts = [
        json.loads(line)["kind"]
        for line in (tmp_path / "out" / "run-001" / "events.jsonl").read_text().splitlines()
    ]
    assert starts.count("started") == 1  # the orphan was waited for
    figures = json.loads((tmp_path / "out.json").read_text())
    for number, run in enumerate(figures["runs"]):
        lines = [
            json.loads(line)
            for line in (tmp_path / "out" / f"run-{number:03d}" / "metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        assert run["loss"] == next(
            line["eval_loss"] for line in lines if line.get("eval_loss") and line["step"] == 30
        )
        recorded = (tmp_path / "out" / f"run-{number:03d}" / "config.yaml").read_text()
        assert all(f"jsonl: {weight}" in recorded for weight in run["weights"])
    assert len({run["loss"] for run in figures["runs"]}) == 6
    assert (tmp_path / "out" / "mixture.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="holds a search with other settings"):
        main([*words[3:8], "--runs", "7", "--steps", "30"])
