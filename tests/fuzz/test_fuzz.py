"""Files of any shape: a right result, or a refusal that names file, place and reason.

Few examples by default and two minutes of them among the slow tests, the same ones each time; an
hour of random ones: make fuzz.
"""

import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed (make dev)")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (make data-deps)")
sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import HealthCheck, given, settings
from strategies import spellings
from targets import TARGETS, Target, judge, target, try_example

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.files import Slice, find_files
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.evaluate import results
from baichuan_jax.resilience.goodput import account
from baichuan_jax.runs.folder import Run

# Examples by default; some readers take a tenth of a second.
FEW = {"run": 4, "quality_model": 3, "hugging_face_import": 3, "documents.parquet": 8}
FEW |= {
    "settings": 3,
    "argv": 3,
    "corpus_settings": 5,
    "shards": 5,
    "torch": 8,
    "owner": 8,
    "pipeline": 1,
}
# Of each format among the slow tests: two minutes on two cores, all together.
SLOW_SECONDS = 4.0


def fuzz(name: str, examples: int, seconds: float = float("inf")) -> None:
    """Try a format on the same damaged folders each time."""
    ends = time.monotonic() + seconds

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target(name).examples)
    def run(files):
        if time.monotonic() < ends:
            try_example(name, files)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_a_valid_folder_is_read_and_damaged_ones_are_refused_well(name):
    # What a reader gives for the valid folder; None would be a refusal.
    assert try_example(name, target(name).valid) is not None or name == "launch"
    fuzz(name, FEW.get(name, 20))


@pytest.mark.parametrize("name", [name for name in TARGETS if target(name).respelled])
def test_the_same_values_in_another_spelling_are_read_alike(name):
    expected = try_example(name, target(name).valid)
    for valid in spellings(target(name).valid):
        assert try_example(name, valid) == expected


def test_a_planted_fault_is_found(monkeypatch):
    """A reader that takes a value for a number without a look at it."""

    def careless(content, kinds, what):
        return content

    monkeypatch.setattr(results, "require_keys", careless)
    monkeypatch.setattr(
        results.Results,
        "finish",
        lambda self, result, records: [record["num_tokens"] + 1 for record in records],
    )
    with pytest.raises((TypeError, KeyError, AttributeError)):
        fuzz("evaluation", 300)


def test_a_refusal_must_name_its_file(tmp_path):
    for message in ("'a.json' is no JSON", "it is none", f"{tmp_path}/a.json" + "x" * 2000):

        def refuse(folder, message=message):
            raise ConfigError(message)

        with pytest.raises(AssertionError):
            judge(Target({}, refuse), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_folders_are_refused_well(name):
    fuzz(name, 2000, SLOW_SECONDS)


NAMES = [b"a\nb", b"a'b\"", b"[ab]*?", b"%s$HOME", b"-rf", b"x" * 248, b" ", b"{}~#", b"\xff\xfe"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_file_of_any_name_is_read(tmp_path, name):
    file = os.path.join(os.fsencode(tmp_path), name + b".jsonl")
    with open(file, "wb") as content:
        content.write(b'{"text": "one"}\n')
    found = find_files([str(tmp_path / "*")])
    assert list(read_texts(map(Slice, found), "text")) == ["one"]


@pytest.mark.parametrize("kind", ["folder", "dangling", "loop", "pipe", "device"])
@pytest.mark.parametrize("name", ["settings", "launch", "hugging_face", "run", "rates"])
def test_what_is_no_file_is_refused_where_a_file_belongs(tmp_path, kind, name):
    """Neither a hang on a pipe nor memory filled from a device."""
    files = target(name).valid
    for place in files:
        if place.endswith((".json", ".jsonl", ".yaml")):
            folder = tmp_path / place.replace("/", "-")
            for other, content in files.items():
                (folder / other).parent.mkdir(parents=True, exist_ok=True)
                (folder / other).write_bytes(content)
            path = folder / place
            path.unlink()
            if kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                target_of = {"dangling": "none", "loop": path.name, "device": "/dev/zero"}[kind]
                path.symlink_to(target_of)
            judge(target(name), folder)


def test_a_clock_that_was_set_back_gives_no_negative_time(tmp_path):
    lines = (tmp_path / "run").mkdir() or []
    for name, content in target("run").valid.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        # The first launch of the run seems to come an hour after the second.
        file.write_bytes(content.replace(b": 101", b": 461"))
    accounting = account(tmp_path / "run")
    assert lines == []
    assert accounting.total > 0
    assert all(seconds >= 0 for seconds in accounting.seconds.values())
    assert sum(accounting.seconds.values()) == pytest.approx(accounting.total)


def test_a_line_cut_inside_a_character_is_left_out(tmp_path):
    whole = b'{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + '{"step": 2, "春'.encode()[:-1])
    assert Run(tmp_path).metrics == [{"step": 1, "loss": 2.0}]


def test_yaml_that_means_more_than_it_says_is_refused(tmp_path):
    from baichuan_jax.config.parsing import read_yaml

    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    for text in ("\n".join(lines), "&a [*a]"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"a\.yaml, line 1: &a.* is an anchor"):
            read_yaml(tmp_path / "a.yaml")
