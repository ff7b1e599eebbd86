"""A disk that fails at any call: the documented exit code, one line, and nothing lost."""

import errno
import json
import os
import random
from pathlib import Path

import faulty_disk
import pytest
from launches import environment, lines, losses, write_config

from baichuan_jax.config.schema import Config
from baichuan_jax.resilience.causes import SaveFailed
from baichuan_jax.runs.events import Restored
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.runs.metrics import Writer

ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EPERM")
# `make test-disk`: every call with every error, instead of a sample.
ALL = os.environ.get("FAULTY_DISK_TESTS") == "all"
TRAIN = [
    *("--run_dir", "{folder}/run", "--train.num_steps", "4", "--optimizer.warmup_steps", "1"),
    *("--checkpoint.every", "2", "--evaluate.every", "4", "--metrics.tensorboard", "true"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return faulty_disk.build(tmp_path_factory.mktemp("library"))


def main(argv: list[str]) -> int:
    """A command that writes all small files of a run: three steps and an event."""
    folder = Path(argv[0])
    write_atomically(folder / "made", b"whole")
    writer = Writer(folder, Config(), print)
    writer.event(Restored(step=1, position=1))
    writer.begin(1)
    for step in (1, 2, 3):
        writer.metrics(step, {"loss": 1.0})
        writer.file(folder / "settings", b"whole")
    if lost := writer.close():
        raise SaveFailed("; ".join(lost))
    return 0


def python_path() -> dict[str, str]:
    tests = str(Path(__file__).parent)
    return environment() | {"PYTHONPATH": f"{tests}:{environment()['PYTHONPATH']}"}


def test_every_call_of_the_small_files_may_fail(library, tmp_path):
    """Once, and from there on; then the next launch writes what is missing."""
    argv = ["{folder}"]
    run = list(
        faulty_disk.run_trials(
            library,
            "test_disk",
            argv,
            tmp_path / "count",
            [(*faulty_disk.NEVER, 0)],
            python_path(),
            forked=False,
        )
    )
    calls = run[0]["calls"]
    assert calls > 15
    trials = [(k, last, errno.ENOSPC) for k in range(1, calls + 1) for last in (k, 1 << 60)]
    for done in faulty_disk.run_trials(
        library, "test_disk", argv, tmp_path / "runs", trials, python_path(), forked=False
    ):
        folder = Path(done["folder"])
        assert "Traceback" not in done["output"] + done["said"], done
        assert done["code"] in (0, 74), done
        assert done["again"] == 0, done
        steps = [line["step"] for line in lines(folder)]
        events = [line["kind"] for line in lines(folder, "events")]
        # What the disk took of the first try is there too, whole and in order; of a single failure
        # nothing is missing.
        assert steps[-3:] == [1, 2, 3]
        assert events[-1] == "restored"
        if done["code"] == 0:
            assert steps == [1, 2, 3] * 2
            assert events == ["restored"] * 2
        assert (folder / "metrics.jsonl").read_bytes().count(b"\n") == len(steps)
        assert {(folder / name).read_bytes() for name in ("made", "settings")} == {b"whole"}
        assert not list(folder.rglob("*.tmp"))


def train_trials(library, tmp_path, trials):
    """Train with each failure; whatever it was, the next launch ends with the same losses."""
    config = write_config(tmp_path)
    argv = ["--config", str(config), *TRAIN]
    never = (*faulty_disk.NEVER, 0)
    first, *others = faulty_disk.run_trials(
        library,
        "baichuan_jax.train",
        argv,
        tmp_path / "runs",
        [never, *trials],
        environment(),
        seconds=60 + 60 * len(trials),
        forked=False,
    )
    wanted = losses(Path(first["folder"]) / "run")
    assert list(wanted) == [1, 2, 3, 4]
    for done in others:
        number = done["trial"][2]
        # 78 for what this user may not do, or where the whole disk may not be written.
        refused = (78,) if number in (errno.EPERM, errno.EROFS) else ()
        assert done["code"] in (0, 74, *refused), done
        assert done["again"] == 0, done
        assert "Traceback" not in done["output"] + done["said"], done
        folder = Path(done["folder"]) / "run"
        assert losses(folder) == wanted
        # No half of a line, in the middle neither.
        for name in ("metrics", "events"):
            for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
                json.loads(line)
        if done["code"] == 0:
            assert [line["step"] for line in lines(folder) if "loss" in line] == [1, 2, 3, 4]
    return others


@pytest.mark.slow
def test_a_training_whose_disk_fails_ends_as_documented(library, tmp_path):
    # Before anything, in the first checkpoint, in the last one and from there on.
    trials = [(3, 3, errno.ENOSPC), (100, 100, errno.EDQUOT), (300, 1 << 60, errno.ENOSPC)]
    done = train_trials(library, tmp_path, trials)
    assert [trial["code"] for trial in done][::2] == [74, 74]
    assert "make room, and start the same command again" in done[0]["output"]
    assert len(done[0]["output"].splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_any_error_at_any_call_of_a_training(library, tmp_path, name):
    number = getattr(errno, name)
    # As a run counts them; the order of Orbax's threads varies.
    calls = range(1, 460) if ALL else sorted(random.Random(name).sample(range(1, 460), 10))
    train_trials(library, tmp_path, [(call, call, number) for call in calls])
