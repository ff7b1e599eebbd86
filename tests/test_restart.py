"""Every command that works for seconds is killed at its writes, or its disk fails there.

Started again it ends, and what it wrote is what an undisturbed one wrote, byte for byte.
"""

import dataclasses
import errno
import gzip
import importlib.util
import os
import random
import re
from pathlib import Path

import exam
import faulty_disk
import jax
import numpy as np
import pytest
from launches import SAMPLE, SHARED, environment, losses, run, run_module, write_config

from baichuan_jax.checkpoint.weights import find_checkpoint, load_params

GOLDEN = Path(__file__).parent / "golden"
ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EPERM")
# `make test-disk`: every call, instead of a sample.
ALL = os.environ.get("FAULTY_DISK_TESTS") == "all"
# Of JSON and HTML: what they say of the time that the work took, and of when it was done.
TIMES = re.compile(
    rb'"\w*seconds\w*": ([\d.e-]+|\{[^}]*\})|"speed": \{[^}]*\}|made \d{4}-\d\d-\d\d \d\d:\d\d'
)
NEVER = (*faulty_disk.NEVER, faulty_disk.KILL)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that writes below {folder}, with {inputs} in `argv` for what it reads."""

    module: str
    argv: str
    # Constants that make several parts of little text, by their names.
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    # A module that it needs and that is not installed everywhere.
    needs: str = "json"
    # What it makes; other files are its notes on the way.
    results: tuple[str, ...] = ("**/*",)
    # Calls to try in the slow tests, at most.
    sample: int = 8


COMMANDS = {
    "tokenizer": Command(
        "baichuan_jax.tokenizer",
        "train --input {inputs}/*.jsonl --vocab_size 400 --output {folder}/new/a.model",
    ),
    "rows": Command(
        "baichuan_jax.data.rows",
        "pack --input {inputs}/*.jsonl --output {folder}/rows --context_length 64 "
        "--tokenizer {inputs}/tokenizer.model --num_workers 1",
        {"baichuan_jax.data.shards.SHARD_BYTES": 20_000},
    ),
    "rows, two workers": Command(
        "baichuan_jax.data.rows",
        "pack --input {inputs}/*.jsonl --output {folder}/rows --context_length 64 "
        "--tokenizer {inputs}/tokenizer.model --num_workers 2",
        {"baichuan_jax.data.shards.SHARD_BYTES": 20_000},
        sample=4,
    ),
    "pipeline": Command(
        "baichuan_jax.data.pipeline",
        "--input {inputs}/*.jsonl --output {folder}/clean --num_workers 1",
        {"baichuan_jax.data.corpus.reading.PART_BYTES": 20_000},
        needs="pyarrow",
        results=("clean/final/*", "clean/removed/*", "clean/*.*"),
    ),
    "quality": Command(
        "baichuan_jax.data.quality",
        "train --good {inputs}/books/* --output {folder}/quality --json {folder}/card.json "
        "--size 2000",
        needs="fasttext",
    ),
    "decontaminate": Command(
        "baichuan_jax.data.decontaminate",
        "--evaluation {inputs}/mmlu/test/*.csv --input {inputs}/*.jsonl --json {folder}/found.json",
        needs="pyarrow",
    ),
    "mixture": Command(
        "baichuan_jax.data.mixture",
        "learn --config {inputs}/config.yaml --output {folder}/mixture --runs 6 --steps 2 "
        "--optimizer.warmup_steps 1",
        results=("mixture/mixture.*",),
        sample=1,
    ),
    "train": Command(
        "baichuan_jax.train",
        "--config {inputs}/config.yaml --run_dir {folder}/run --train.num_steps 4 "
        "--optimizer.warmup_steps 1 --checkpoint.every 2 --evaluate.every 4 "
        "--metrics.tensorboard true --data.cache_dir {folder}/cache",
        results=("cache/**/*",),
        sample=4,
    ),
    "mmlu": Command(
        "baichuan_jax.evaluate",
        "mmlu --checkpoint {inputs}/run --data {inputs}/mmlu --output {folder}/mmlu --dtype "
        "float32 --subjects anatomy,virology --json {folder}/mmlu.json",
    ),
    "perplexity": Command(
        "baichuan_jax.evaluate",
        "perplexity --checkpoint {inputs}/run --text {inputs}/train-en.jsonl --context 32,64 "
        "--max_tokens 4096 --output {folder}/perplexity --dtype float32",
    ),
    "import": Command("baichuan_jax.hf", "import {inputs}/hf {folder}/weights"),
    "export": Command("baichuan_jax.hf", "export {inputs}/run {folder}/exported"),
    "report": Command("baichuan_jax.report", "{inputs}/run -o {folder}/new/report.html"),
    "plan": Command(
        "baichuan_jax.plan",
        "--config {inputs}/config.yaml --topology h100:1x2 --output {folder}/plans "
        "--json {folder}/new/plan.json",
        needs="jax_cuda12_plugin",
        sample=1,
    ),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return faulty_disk.build(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Text, a tokenizer, a test set, a finished run, a Hugging Face folder of its weights."""
    folder = tmp_path_factory.mktemp("inputs")
    config = write_config(folder)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(str(SHARED), str(folder)), encoding="utf-8")
    for file in SHARED.glob("*.jsonl"):
        (folder / file.name).write_bytes(file.read_bytes())
    run(config, folder / "run", "--train.num_steps", "4", "--optimizer.warmup_steps", "1")
    with gzip.open(SAMPLE / "train-en.jsonl.gz", "rt", encoding="utf-8") as file:
        (folder / "books").mkdir()
        (folder / "books" / "en.jsonl").write_text(
            "".join(next(file) for _ in range(60)), encoding="utf-8"
        )
    (folder / "tokenizer.model").write_bytes((GOLDEN / "exam" / "tokenizer.model").read_bytes())
    exam.make_mmlu(folder / "mmlu", ["anatomy", "virology"], 3)
    done = run_module("baichuan_jax.hf", "export", str(folder / "run"), str(folder / "hf"))
    assert done.returncode == 0, done.stderr
    return folder


def trials(library, inputs, tmp_path, name, chosen):
    """The command's trials, an undisturbed one first."""
    command = COMMANDS[name]
    if importlib.util.find_spec(command.needs) is None:
        pytest.skip(f"{command.needs} is not installed")
    return faulty_disk.run_trials(
        library,
        command.module,
        [word.replace("{inputs}", str(inputs)) for word in command.argv.split()],
        tmp_path / name,
        [NEVER, *chosen],
        environment(),
        seconds=120 + 120 * len(chosen),
        constants=command.constants,
    )


def results(folder, command):
    """What a command made, without what differs between two undisturbed runs: times, locks."""
    found = {}
    files = {file for pattern in command.results for file in folder.glob(pattern)}
    # Orbax gives its files random names.
    weights = [file.parent for file in files if file.name == "_CHECKPOINT_METADATA"]
    for file in files:
        inside = any(path in file.parents for path in weights) and file.suffix != ".model"
        if file.is_file() and not re.search(r"lock(-\d+)?$", file.name) and not inside:
            content = file.read_bytes()
            if file.suffix in (".json", ".html"):
                content = TIMES.sub(b"", content)
            found[str(file.relative_to(folder))] = content
    if (folder / "run").exists():
        found["losses"] = losses(folder / "run")
        weights.append(folder / "run")
    for path in weights:
        _, params = load_params(find_checkpoint(path))
        for place, array in jax.tree_util.tree_leaves_with_path(params):
            found[f"{path.name}{jax.tree_util.keystr(place)}"] = np.asarray(array).tobytes()
    return found


def leftovers(folder):
    """Unfinished files below a folder."""
    return [file for file in folder.rglob("*") if re.search(r"tmp|draft", file.name)]


def judge(done, wanted, command):
    """Started again, it made what was wanted, or says why not and what to delete."""
    assert "Traceback" not in done["output"] + done["said"], done
    folder = Path(done["folder"])
    if done["again"] != 0:
        assert done["again"] == 78, done
        assert "delete" in done["said"], done
    elif done["code"] != 0:
        assert leftovers(folder) == [], done
    # A draft that a failing disk did not let it delete is small.
    assert not [file for file in leftovers(folder) if "orbax" in file.name], done
    found = results(folder, command)
    made = {name: found[name] for name in found if name in wanted or not leftovers(folder)}
    assert made.keys() == wanted.keys(), done
    assert [name for name in wanted if made[name] != wanted[name]] == [], done


def try_calls(library, inputs, tmp_path, name, number, most):
    """One trial for each call that changes a file, of a sample of at most so many."""
    command = COMMANDS[name]
    [whole] = trials(library, inputs, tmp_path / "whole", name, [])
    assert whole["code"] == 0, whole
    calls = range(1, whole["calls"] + 1)
    if not ALL and len(calls) > most:
        # A time of fewer digits may need one write less: the last calls are not made each time.
        calls = calls[: 1 + len(calls) * 9 // 10]
        calls = sorted(random.Random(f"{name}{number}").sample(calls, most))
    chosen = [(call, call, number) for call in calls]
    first, *others = trials(library, inputs, tmp_path / "tried", name, chosen)
    wanted = results(Path(first["folder"]), command)
    assert wanted
    for done in others:
        judge(done, wanted, command)
    return others


@pytest.mark.parametrize("name", ["tokenizer", "rows", "report"])
def test_a_command_that_was_killed_at_a_write_makes_the_same_bytes(library, inputs, tmp_path, name):
    done = try_calls(library, inputs, tmp_path, name, faulty_disk.KILL, 4)
    assert -9 in [trial["code"] for trial in done]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_any_command_that_was_killed_at_any_write_makes_the_same_bytes(
    library, inputs, tmp_path, name
):
    most = COMMANDS[name].sample
    done = try_calls(library, inputs, tmp_path, name, faulty_disk.KILL, most)
    # 76: a training of a search was killed, and the search says so.
    assert {-9, 76} & {trial["code"] for trial in done}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_any_command_whose_disk_fails_at_any_call_says_so_and_loses_nothing(
    library, inputs, tmp_path, name
):
    """With 0 it made what was wanted all the same."""
    errors = ERRORS if ALL else [random.Random(name).choice(ERRORS)]
    for error in errors:
        number = getattr(errno, error)
        # 78 for what this user may not do, or where the whole disk may not be written.
        refused = (78,) if error in ("EPERM", "EROFS") else ()
        most = max(1, COMMANDS[name].sample // 2)
        for done in try_calls(library, inputs, tmp_path / error, name, number, most):
            assert done["code"] in (0, 74, *refused), done
