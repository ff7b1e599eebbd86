"""A clock that jumps: a run's numbers stay, and so do the commands that read its times."""

import subprocess
import sys

import pytest
from launches import environment, lines, losses, run, write_config

# As `python -m`: every look at the wall clock is followed by a jump of so many seconds. Not far
# ahead: Orbax measures the 600 s that a save may take with this clock.
PROGRAM = """
import importlib, itertools, sys, time

look, jumps = time.time, itertools.count(0, float(sys.argv.pop(1)))
time.time = lambda: look() + next(jumps)
time.time_ns = lambda: int(time.time() * 1e9)
from baichuan_jax.resilience.exits import run_command

run_command(lambda: importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


def with_jumping_clock(jump, module, *argv):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(jump), f"baichuan_jax.{module}", *map(str, argv)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def numbers(value):
    """All numbers in a line of JSON, by their keys."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from numbers(inner)
        elif isinstance(inner, int | float):
            yield key, inner


@pytest.mark.slow
@pytest.mark.parametrize("jump", [-60, 5])
def test_a_clock_that_jumps_changes_no_number_of_a_run(tmp_path, jump):
    config = write_config(tmp_path)
    options = ["--train.num_steps", "12", "--checkpoint.every", "4", "--metrics.tensorboard"]
    run(config, tmp_path / "steady", *options, "true")
    jumping = tmp_path / "jumping"
    # Twice: the second launch reads what the first one wrote, at times that may be in its future.
    for steps in ("6", "12"):
        argv = ["--config", config, "--run_dir", jumping, *options, "true"]
        with_jumping_clock(jump, "train", *argv, "--train.num_steps", steps)
    assert losses(jumping) == losses(tmp_path / "steady")
    for line in [*lines(jumping), *lines(jumping, "events")]:
        for key, number in numbers(line):
            assert number >= 0 or "seconds" not in key, line
    with_jumping_clock(jump, "report.__main__", jumping, "-o", tmp_path / "report.html")
    shares = with_jumping_clock(jump, "resilience.__main__", jumping)
    assert "-" not in [word[0] for word in shares.split() if word[1:2].isdigit()]
