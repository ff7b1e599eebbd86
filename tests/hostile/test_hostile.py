"""Hostile files of every kind, on every command that reads their kind."""

import importlib
from pathlib import Path

import pytest
from harness import LARGEST, Hostile, judge, run_limited

MODULES = sorted(
    file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("test_")
)
FILES: list[Hostile] = [
    hostile for name in MODULES for hostile in getattr(importlib.import_module(name), "HOSTILE", ())
]
PAIRS = [(hostile, command) for hostile in FILES for command in hostile.commands]
# Of each file one command, another than that of the file before where there are several.
FIRST = {
    hostile.name: list(hostile.commands)[number % len(hostile.commands)]
    for number, hostile in enumerate(FILES)
}


def test_names_are_distinct():
    assert len({hostile.name for hostile in FILES}) == len(FILES)
    assert all(hostile.counted.keys() <= hostile.commands.keys() for hostile in FILES)


@pytest.mark.parametrize(
    ("hostile", "command"),
    [
        pytest.param(
            hostile,
            command,
            id=f"{hostile.name}-{command}",
            marks=() if FIRST[hostile.name] == command else pytest.mark.slow,
        )
        for hostile, command in PAIRS
    ],
)
def test_a_hostile_file_is_refused_or_counted(tmp_path, hostile, command):
    files, place = tmp_path / "files", tmp_path / "work"
    files.mkdir()
    place.mkdir()
    hostile.make(files)
    size = sum(path.lstat().st_size for path in files.rglob("*") if not path.is_dir())
    assert size <= LARGEST, f"{size} bytes"
    module, *argv = hostile.commands[command](files)
    judge(hostile, command, run_limited(module, *argv, cwd=place))


def test_a_command_that_takes_too_much_memory_or_time_is_found(tmp_path, monkeypatch):
    """The harness itself: a child's memory counts, and a command that hangs is ended."""
    (tmp_path / "greedy.py").write_text(
        "import subprocess, sys, time\n"
        "child = 'x = bytearray(300 << 20); import time; time.sleep(60)'\n"
        "subprocess.run([sys.executable, '-c', child if sys.argv[1] == 'memory' else "
        "'import time; time.sleep(60)'])\n"
    )
    monkeypatch.setattr("harness.MEMORY", 250 << 20)
    monkeypatch.setattr("harness.SECONDS", 2)
    with pytest.raises(AssertionError, match="MiB of memory"):
        run_limited("greedy", "memory", cwd=tmp_path)
    with pytest.raises(AssertionError, match="still running"):
        run_limited("greedy", "time", cwd=tmp_path)
