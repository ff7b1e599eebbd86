"""Nothing that is shown can end a command: closed pipes and terminals, full disks, encodings."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launches import REPOSITORY, environment

from baichuan_jax import train
from baichuan_jax.data import pipeline
from baichuan_jax.resilience.exits import run_command, signals, stop_signals
from baichuan_jax.runs.console import Display, Stream, lasting_streams, shown_text


class Failing(io.StringIO):
    """A stream whose writes fail with an errno until it is mended."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("number", [32, 5, 28])  # EPIPE, EIO, ENOSPC
def test_a_stream_that_fails_is_left_out(number, monkeypatch):
    stream = Failing(number)
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_streams() as stdout:
        display = Display()
        display.say("lost")
        display.table("t", ["a"], [["1"]])
        with display.progress(0, 2) as progress:
            progress.update(2, 1.0, 1.0, None)
        stream.number = 0
        display.say("seen")
    assert stdout.error.errno == number
    # A disk may get room again; a reader that has ended does not come back.
    assert ("seen" in stream.getvalue()) == (number == 28)
    assert sys.stdout is stream


def test_characters_that_an_encoding_lacks_are_shown_as_escapes():
    bytes_ = io.BytesIO()
    stream = Stream(io.TextIOWrapper(bytes_, encoding="latin-1", write_through=True))
    stream.write("é 春")
    assert bytes_.getvalue() == b"\xe9 \\u6625"


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


CLEAR = "a\x1b[2J\x1b]0;me\x07\x9b1m\u202eb"
SHOWN = r"a\x1b[2J\x1b]0;me\x07\x9b1m\u202eb"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_messages_and_tables_have_no_command_to_a_terminal(kind, monkeypatch):
    """Not in a file either: a log is read in a terminal later."""
    stream = kind()
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_streams():
        display = Display()
        display.say(f"{CLEAR}\nsecond", style="yellow")
        display.table(CLEAR, [CLEAR], [[CLEAR]])
    shown = stream.getvalue()
    assert shown.replace(SHOWN, "").count("b") == 0
    assert shown.count(SHOWN) == 4
    assert re.search("\n.*second", shown)
    # The style's own colours are all that is left in a terminal.
    for each in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\u202e"):
        assert each not in shown


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_the_text_of_a_model_reaches_a_file_as_it_is_and_no_terminal(kind, monkeypatch):
    stream = kind()
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_streams():
        print(shown_text(CLEAR + "\x1b[8m"), end="")
        # What a command prints without thinking of it.
        print(CLEAR, end="")
    wanted = CLEAR + "\x1b[8m" + CLEAR if kind is io.StringIO else SHOWN + r"\x1b[8m" + SHOWN
    assert stream.getvalue() == wanted


def test_an_error_has_no_command_to_a_terminal(capfd):
    def fail() -> int:
        raise RuntimeError(CLEAR)

    for error in (lambda: Path(CLEAR).stat(), fail):
        with pytest.raises(SystemExit):
            run_command(error)
        shown = capfd.readouterr().err
        assert SHOWN in shown
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_settings_are_utf_8_under_every_locale(tmp_path):
    (tmp_path / "a.yaml").write_text("run_dir: runs/春眠\n", encoding="utf-8")
    program = "import sys; from baichuan_jax.config.files import load_config\n"
    program += "print(ascii(load_config(sys.argv[1]).run_dir))"
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.yaml")],
        env={**os.environ, **variables, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ascii("runs/春眠")


def test_no_stream_at_all_and_a_closed_one(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with lasting_streams():
            Display().say("anything")
            print("anything")
            print("anything", file=sys.stderr)


CODE = """
import sys
from baichuan_jax.resilience.exits import run_command
def main():
    for _ in range(20000): print("春" * 9)
    return {code}
run_command(main, result_is_shown={shown})
"""


@pytest.mark.parametrize(
    ("redirect", "code", "shown", "expected"),
    [
        ("| true", 0, False, 0),
        (">&- 2>&-", 75, False, 75),
        ("> /dev/full 2>&1", 0, False, 0),
        ("> /dev/full", 0, True, 74),
        ("| head -n 1 > /dev/null", 0, True, 0),
    ],
)
def test_a_command_ends_with_its_own_code(tmp_path, redirect, code, shown, expected):
    script = tmp_path / "script.py"
    script.write_text(CODE.format(code=code, shown=shown), encoding="utf-8")
    command = f"{sys.executable} {script} {redirect}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        env=environment(PYTHONIOENCODING="ascii"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expected
    assert "Traceback" not in done.stderr
    assert ("the result cannot be written to stdout" in done.stderr) == (expected == 74)


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (train.main, ["--config", "tiny", "--print_config"]),
        (pipeline.main, ["--help"]),
    ],
)
def test_what_was_asked_for_alone_is_not_lost_on_a_full_disk(command, argv, monkeypatch, capsys):
    full = open("/dev/full", "w")  # noqa: SIM115 (its end fails)
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: command(argv))
    with contextlib.suppress(OSError):
        full.close()
    assert end.value.code == 74
    assert "the result cannot be written to stdout" in capsys.readouterr().err


def test_commands_whose_result_is_nowhere_else_end_with_an_error_on_a_full_disk():
    """The others write it into a folder, and only say where."""
    shown, kept = set(), set()
    package = REPOSITORY / "baichuan_jax"
    for file in package.rglob("*.py"):
        call = file.read_text(encoding="utf-8").rpartition('if __name__ == "__main__":\n')[2]
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        if call.startswith("    run_command("):
            shown |= {name} if "result_is_shown=True" in call else set()
            kept |= {name} if "interrupted=" in call else set()
    # What is kept at Ctrl-C: of the others nothing is.
    assert kept == {"train", "launch", "evaluate.__main__", "data.rows", "data.pipeline"}
    assert shown == {
        *("tokenizer", "kernels.__main__", "xla_flags", "resilience.__main__", "generate"),
        *("data.rows", "data.decontaminate", "data.quality", "data.mixture", "preflight"),
    }


def test_a_terminal_that_closes_asks_to_save_and_nohup_goes_on():
    asked = []
    with signals(asked.append, lambda: None):
        os.kill(os.getpid(), signal.SIGHUP)
        # A second one means no more than the first.
        os.kill(os.getpid(), signal.SIGHUP)
    assert asked == ["SIGHUP"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with signals(asked.append, lambda: None):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert asked == ["SIGHUP"]


@pytest.mark.parametrize(
    ("command", "argv"),
    [(train.main, ["--config", "tiny"]), (pipeline.main, ["--input", "a", "--output", "b"])],
)
def test_a_working_directory_that_was_deleted_is_one_line(
    command, argv, tmp_path, monkeypatch, capsys
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: command(argv))
    assert end.value.code == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the working directory was deleted; change into one")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (28, 74, "make room"),
        (122, 74, "make room"),
        (30, 74, "mend"),
        (5, 74, "mend"),
        (1, 78, "give this user the right"),
        (13, 78, "give this user the right"),
    ],
)
def test_an_error_of_a_disk_is_one_line_with_the_documented_code(number, code, said, capsys):
    def command() -> int:
        raise OSError(number, os.strerror(number), "/shared/run/file")

    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: /shared/run/file: {os.strerror(number)}; ")
    assert said in line


def test_names_are_shown_as_they_are_and_whole(capsys):
    """In a table too, where rich would take [b] for a style, :fire: for a sign, and cut a path."""
    name, path = "data/[b]x[/i]:fire:春.jsonl", "data/" + 70 * "ab春" + ".jsonl"
    display = Display()
    display.say(name)
    display.table(None, ["file [b]", "texts"], [[name, "1"], [path, "2"]])
    shown = capsys.readouterr().out
    assert shown.count(name) == 2
    assert "file [b]" in shown
    assert path in "".join(line.split("│")[1].strip() for line in shown.splitlines() if "│" in line)
