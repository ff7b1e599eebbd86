"""The program as its users start it: real processes, real signals, and the same losses."""

import json
import random
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launches import (
    REPOSITORY,
    SHARED,
    command,
    environment,
    kill,
    lines,
    losses,
    run,
    start,
    start_all,
    wait_all,
    wait_for_step,
    write_config,
)

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.runs.folder import Run
from baichuan_jax.train import main, train


def run_python_m(
    config: Path, run_dir: Path, *argv: str, **variables: str
) -> subprocess.CompletedProcess:
    """Train in a process that the fork server has no part in."""
    return subprocess.run(
        command(config, run_dir, *argv),
        env=environment(**variables),
        cwd=run_dir.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """A run of 60 steps, from start to end in one process with one device, by `python -m`."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    argv = ["--sample.prompts", '["It is", "春"]', "--sample.max_new_tokens", "8"]
    argv += ["--metrics.peak_tflops", "null"]
    done = run_python_m(config, folder, *argv)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_a_run_ends_with_everything_a_user_wants_to_see(undisturbed):
    folder, output = undisturbed
    for words in (
        "validation loss",
        "unigram entropy",
        "Where the time went",
        "median step",
        "loss.png",
        "'It is' continues",
        "'春' continues",
        "python -m baichuan_jax.generate --checkpoint",
        "attention: reference (64 tokens",
        "MFU: the measured matrix-product peak",
    ):
        assert words in output
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "config.yaml").exists()
    assert (folder / "tokenizer.model").exists()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["55", "60"]
    steps = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    for name in (
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu",
        "mfu_causal",
        "perplexity",
        "memory_gib",
        "data_wait_seconds",
    ):
        assert all(line[name] > 0 for line in steps[1:]), name
    assert [line["step"] for line in lines(folder) if "eval_loss" in line] == [30, 60]
    kinds = [event["kind"] for event in lines(folder, "events")]
    assert kinds[:3] == ["started", "measured", "compiled"]
    assert kinds[-2:] == ["completed", "sampled"]


def test_the_loss_falls_below_the_unigram_entropy(undisturbed):
    (completed,) = [
        event for event in lines(undisturbed[0], "events") if event["kind"] == "completed"
    ]
    assert completed["loss"] < completed["unigram_entropy"] - 0.15
    assert completed["eval_loss"] < completed["unigram_entropy"]


def test_a_second_start_says_that_the_run_is_complete(config, undisturbed, capsys):
    folder, _ = undisturbed
    before = lines(folder)
    assert main(["--config", str(config), "--run_dir", str(folder)]) == 0
    assert "is complete: 60 steps" in capsys.readouterr().out
    assert lines(folder) == before


def test_sigkills_at_random_moments_change_no_bit_of_any_loss(config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    rng = random.Random(0)
    for step in sorted(rng.sample(range(3, 55), 3)):
        process = start(config, folder)
        wait_for_step(process, folder, step)
        kill(process)
    run(config, folder)
    assert losses(folder) == losses(undisturbed[0])
    restored = [event["step"] for event in lines(folder, "events") if event["kind"] == "restored"]
    assert len(restored) >= 2
    assert Run(folder).status == "completed"


def test_a_launch_that_finds_no_step_to_do_compiles_none(config, undisturbed, tmp_path):
    """As after a kill between the last checkpoint and the end."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    events = [event for event in lines(folder, "events") if event["kind"] != "completed"]
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    run(config, folder)
    kinds = [event["kind"] for event in lines(folder, "events")[len(events) :]]
    assert kinds == ["started", "restored", "completed"]


def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_same_numbers(
    config, undisturbed, tmp_path
):
    """Its progress in the data is a position alone."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    shutil.rmtree(folder / "checkpoints" / "60")
    checkpoint = folder / "checkpoints" / "55"
    (checkpoint / "sizes.json").unlink()
    file = checkpoint / "run" / "metadata"
    saved = json.loads(file.read_text())
    assert saved.pop("progress")["row"] == 440
    file.write_text(json.dumps(saved))
    events = [event for event in lines(folder, "events") if event["kind"] != "completed"]
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    said = run(config, folder)
    assert "does not say which rows it read" in " ".join(said.split())
    assert losses(folder) == losses(undisturbed[0])
    kinds = [event["kind"] for event in lines(folder, "events")[len(events) :]]
    assert kinds[:3] == ["started", "restored", "compiled"]


def test_a_run_goes_on_with_another_batch_size_and_other_weights_at_the_same_rows(config, tmp_path):
    folder = tmp_path / "run"
    few = ("--evaluate.every", "1000", "--optimizer.warmup_steps", "1")
    run(config, folder, *few, "--train.num_steps", "5")
    english, chinese = (f"{SHARED}/train-{name}.jsonl" for name in ("en", "zh"))
    other = (
        "--train.global_batch_size",
        "4",
        "--data.train",
        f'{{"{chinese}": 1, "{english}": 1}}',
    )
    said = run(config, folder, *few, *other, "--train.num_steps", "9")
    assert "data: going on at row 40 of the run (5 batches so far); batches of 4 rows" in " ".join(
        said.split()
    )
    file = folder / "checkpoints" / "9" / "run" / "metadata"
    saved = json.loads(file.read_text())
    progress = saved["progress"]
    assert (saved["position"], progress["row"], progress["since"]) == (9, 56, 40)
    assert progress["pieces"] == [[0, 0, 8], [5, 40, 4]]
    taken = {corpus["name"]: corpus["before"] for corpus in progress["corpora"]}
    assert taken == {english: 14, chinese: 26}
    changed = [event for event in lines(folder, "events") if event["kind"] == "data_changed"]
    assert [(event["step"], event["position"], event["row"]) for event in changed] == [(5, 5, 40)]
    refused = run(config, folder, *few, "--train.num_steps", "12", "--train.seed", "1", expect=78)
    assert "56 rows in the order of seed 42" in " ".join(refused.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_first_signal_saves_and_exits_75_and_the_next_start_goes_on_there(
    config, undisturbed, tmp_path, number
):
    folder = tmp_path / "run"
    process = start(config, folder, "--checkpoint.every", "1000")
    wait_for_step(process, folder, 8)
    assert kill(process, number) == 75
    log = (tmp_path / "run.0.log").read_text()
    assert f"{number.name}: saving after this step" in log
    assert "stopped and saved at step" in log
    stopped = lines(folder, "events")[-1]
    assert stopped["kind"] == "interrupted"
    assert max(losses(folder)) == stopped["step"]
    run(config, folder)
    assert losses(folder) == losses(undisturbed[0])
    steps = [line["step"] for line in lines(folder) if "loss" in line]
    assert len(steps) == len(set(steps)) == 60  # nothing was done twice


def test_a_second_ctrl_c_quits_unsaved(config, tmp_path):
    folder = tmp_path / "run"
    process = start(config, folder, "--checkpoint.every", "1000", "--train.num_steps", "100000")
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # may arrive as one: then the run has saved and left
    assert process.wait(60) in (130, 75)


@pytest.mark.slow
def test_two_processes_train_to_the_losses_of_one(config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    options = ("--mesh.fsdp", "2", "--mesh.tensor", "2", "--checkpoint.every", "30")
    assert wait_all(start_all(config, folder, *options, processes=2, devices=4)) == [0, 0]
    single = losses(undisturbed[0])
    both = losses(folder)
    assert list(both) == list(single)
    np.testing.assert_allclose(
        list(both.values()), list(single.values()), rtol=3e-5
    )  # sums in another order, 60 steps on
    np.testing.assert_allclose(list(both.values())[:5], list(single.values())[:5], rtol=2e-6)


def test_two_processes_killed_and_resumed_and_then_one_alone(config, tmp_path):
    """Two processes with kills equal two without, bit for bit; one alone goes on to rounding.

    They share one copy of the state; the one alone has all of it.
    """
    options = ("--mesh.data", "1", "--mesh.state", "2", "--mesh.fsdp", "2")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    seldom = ("--checkpoint.every", "20")  # saving changes no number
    assert wait_all(start_all(config, straight, *options, *seldom, processes=2, devices=2)) == [
        0,
        0,
    ]
    processes = start_all(config, killed, *options, processes=2, devices=2)
    wait_for_step(processes[0], killed, 22)
    kill(processes[1])
    kill(processes[0])
    processes = start_all(config, killed, *options, processes=2, devices=2)
    wait_for_step(processes[0], killed, 33)
    processes[1].send_signal(
        signal.SIGTERM
    )  # to one of them: both must stop at the same step, saved
    assert wait_all(processes) == [75, 75]
    wanted = losses(straight)
    assert all(wanted[step] == loss for step, loss in losses(killed).items())
    stopped = lines(killed, "events")[-1]
    assert stopped["kind"] == "interrupted"
    run(config, killed, "--mesh.data", "-1", "--mesh.state", "1", "--mesh.fsdp", "1")
    got = losses(killed)
    np.testing.assert_allclose([got[step] for step in wanted], list(wanted.values()), rtol=3e-5)


def test_weights_of_a_run_start_another_with_a_fresh_schedule(config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    run(config, folder, "--init_from", str(undisturbed[0]), "--train.num_steps", "6")
    first, last = losses(folder)[1], losses(undisturbed[0])[60]
    assert abs(first - last) < 1.0 < losses(undisturbed[0])[1] - first
    rates = [line["learning_rate"] for line in lines(folder) if "loss" in line]
    assert rates[0] < rates[1] < rates[4]
    with pytest.raises(ConfigError, match=r"has num_layers=2 and this run has model\.num_layers=1"):
        train(
            load_config(
                config,
                [
                    f"run_dir={tmp_path / 'other'}",
                    f"init_from={undisturbed[0]}",
                    "model.num_layers=1",
                ],
            )
        )


def test_three_nonfinite_steps_in_a_row_exit_77(config, tmp_path):
    folder = tmp_path / "run"
    output = run(
        config,
        folder,
        "--optimizer.learning_rate",
        "1e30",
        "--optimizer.warmup_steps",
        "0",
        expect=77,
    )
    assert "3 steps in a row" in output
    skipped = [
        event["in_a_row"] for event in lines(folder, "events") if event["kind"] == "update_skipped"
    ]
    assert skipped == [1, 2, 3]


def test_configuration_errors_exit_78_with_one_line(config, tmp_path):
    for options, message in (
        (("--train.num_step", "5"), "the nearest is 'train.num_steps'"),
        (("--mesh.data", "2"), "needs 2 devices and there are 1"),
        (("--data.train", '{"nowhere/*.jsonl": 1}'), "'nowhere/*.jsonl' matches no file"),
        (("--kernels.attention", "cudnn"), "cuDNN needs a GPU"),
    ):
        output = run(config, tmp_path / "run", *options, expect=78)
        assert message in output
        assert "Traceback" not in output
        assert output.strip().count("\n") == 0, output


def test_a_profile_is_written_for_the_steps_asked_for(config, tmp_path):
    folder = tmp_path / "run"
    run(config, folder, "--profile.steps", "[4, 5]", "--train.num_steps", "6")
    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert [event["step"] for event in lines(folder, "events") if event["kind"] == "profiled"] == [
        5
    ]


@pytest.mark.slow
def test_packages_that_only_draw_or_unpack_may_be_missing(config, tmp_path):
    """A run ends well without them, and says what it left out and how to get it."""
    hidden = ("matplotlib", "plotly", "tensorboardX", "zstandard")
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules |= dict.fromkeys({hidden})\n"
    )
    argv = ["--train.num_steps", "6", "--metrics.tensorboard", "true"]
    path = f"{tmp_path}:{REPOSITORY}"
    done = run_python_m(config, tmp_path / "run", *argv, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    for words in (
        "tensorboardX is not installed; pip install tensorboardX, or turn them off with "
        "--metrics.tensorboard false",
        "loss.png is not drawn: matplotlib is not installed; pip install matplotlib",
    ):
        assert words in " ".join(done.stdout.split())
    assert "loss curve:" not in done.stdout
    assert "tensorboard --logdir" not in done.stdout
    assert lines(tmp_path / "run", "events")[-1]["kind"] == "completed"
    Run(tmp_path / "run").plot()
    assert (tmp_path / "run" / "loss.png").exists()


def test_documents_can_be_kept_apart(config, tmp_path):
    folder = tmp_path / "run"
    run(config, folder, "--data.document_mask", "true", "--train.num_steps", "6")
    assert len(losses(folder)) == 6


def test_out_of_memory_keeps_a_profile_and_names_what_would_fit(config, tmp_path):
    folder = tmp_path / "run"
    output = run(
        config,
        folder,
        *("--model.vocab_size", "524288", "--train.context_length", "16384"),
        # All logits at once: 137 GB.
        *("--train.loss_chunk_size", "65536", "--train.micro_batch_size", "4"),
        expect=78,
    )
    assert "out of memory at step" in output
    assert "--train.micro_batch_size 2 (now 4)" in output
    assert "Traceback" not in output
    assert (folder / "memory.prof").stat().st_size > 0


@pytest.mark.slow
def test_bfloat16_ends_within_half_a_percent_of_float32(tmp_path):
    """Sixty steps of the tiny configuration: the original's mixed precision without loss."""
    ends = {}
    for dtype in ("float32", "bfloat16"):
        run(
            REPOSITORY / "configs" / "tiny.yaml",
            tmp_path / dtype,
            "--model.dtype",
            dtype,
            "--train.num_steps",
            "60",
            "--optimizer.warmup_steps",
            "10",
            "--data.cache_dir",
            str(tmp_path / "cache"),
            cwd=REPOSITORY,
        )
        ends[dtype] = Run(tmp_path / dtype).curve("eval_loss")[60]
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=5e-3)


def test_a_folder_that_cannot_be_written_is_named_with_its_setting(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"run_dir='.*file/run' cannot be written in .*Not a directory.*--run_dir"
    ):
        main(["--config", str(config), "--run_dir", str(tmp_path / "file" / "run")])
