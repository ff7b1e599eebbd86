"""One vocabulary for faults: exceptions, exit codes, and the tables that show them."""

import argparse
import errno
import subprocess
import sys
from pathlib import Path

import pytest
from launches import REPOSITORY, environment

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.launch import main as launch
from baichuan_jax.resilience.causes import (
    BadHost,
    Cause,
    NumericsError,
    PeerFailed,
    SaveFailed,
    cause_among_peers,
    cause_of,
    describe,
    exit_code_table,
)
from baichuan_jax.resilience.exits import run_command


def test_a_cause_is_its_word_and_knows_its_code():
    assert Cause("bad host") is Cause.BAD_HOST
    assert (f"{Cause.BAD_HOST}", Cause.BAD_HOST.exit_code) == ("bad host", 79)
    codes = {cause.exit_code for cause in Cause}
    assert codes == {0, 70, 74, 75, 76, 77, 78, 79, 130}
    for code in codes:  # a code is all that a scheduler knows
        assert len({cause.restart for cause in Cause if cause.exit_code == code}) == 1


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConfigError("x"), Cause.CONFIGURATION),
        (NumericsError("x"), Cause.NUMERICS),
        (PeerFailed("x"), Cause.PEER),
        (BadHost("x", (1,)), Cause.BAD_HOST),
        (SaveFailed("x"), Cause.STORAGE),
        (OSError(errno.ENAMETOOLONG, "x", "f"), Cause.CONFIGURATION),
        (OSError(errno.ELOOP, "x", "f"), Cause.CONFIGURATION),
        (OSError(errno.EMFILE, "x", "f"), Cause.STORAGE),
        (RuntimeError("INTERNAL: open(): Too many open files"), Cause.STORAGE),
        (OSError(errno.ETIMEDOUT, "x", "f"), Cause.STORAGE),
        # Of a connection.
        (OSError(errno.ETIMEDOUT, "x"), Cause.EXCEPTION),
        (OSError("x"), Cause.EXCEPTION),
        (RuntimeError("x"), Cause.EXCEPTION),
    ],
)
def test_an_exception_means_one_cause_and_a_command_exits_with_its_code(error, cause, capsys):
    assert cause_of(error) == cause
    assert cause_among_peers(error) == cause

    def command() -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(command)
    assert caught.value.code == cause.exit_code
    # Whoever meets a bug needs its traceback, and whoever mistypes a setting does not.
    assert ("Traceback" in capsys.readouterr().err) == (cause == Cause.EXCEPTION)


def test_wrong_argv_exits_with_the_code_of_a_wrong_setting(capsys):
    """argparse exits with 2, which a scheduler would start again."""
    parser = argparse.ArgumentParser()
    for argv, code in ((["--unknown"], Cause.CONFIGURATION.exit_code), (["--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            run_command(lambda argv=argv: parser.parse_args(argv) and 1)
        assert caught.value.code == code
    assert "unrecognized arguments: --unknown" in capsys.readouterr().err


def test_a_command_exits_with_the_code_that_it_returns_and_ctrl_c_has_its_own(capsys):
    for code in (0, 2, 75):
        with pytest.raises(SystemExit) as caught:
            run_command(lambda code=code: code)
        assert caught.value.code == code

    def interrupted() -> int:
        raise KeyboardInterrupt

    # Not every command has checkpoints: each says what it keeps.
    for kept, said in (("", "interrupted\n"), ("all is kept", "interrupted: all is kept\n")):
        with pytest.raises(SystemExit) as caught:
            run_command(interrupted, interrupted=kept)
        assert caught.value.code == Cause.INTERRUPTED.exit_code
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("seconds, said", [(0.6, "waiting for threads of libraries"), (0.0, "")])
def test_the_end_of_python_is_waited_for_with_a_word(seconds, said):
    """Its libraries' threads are joined after the last line of a program."""
    program = (
        "import threading, time; from baichuan_jax.resilience import exits; "
        "exits.SAY_SECONDS = 0.1; "
        f"threading.Thread(target=time.sleep, args=({seconds},)).start(); "
        "exits.run_command(lambda: 75)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 75
    assert done.stderr.partition(" to end (")[0] == said


def test_a_peer_s_failure_is_told_from_one_s_own():
    """As fetching an array raises it: seen where another process had left between two steps."""
    lost = (
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/transport/tcp/pair.cc:547] "
        "Connection closed by peer [127.0.0.1]:22762"
    )
    assert cause_among_peers(ValueError(lost)) == "peer"
    assert cause_among_peers(ValueError("the Gloo of our own")) == "exception"
    full = SaveFailed("checkpoint 5 could not be written: No space left on device")
    assert cause_among_peers(full) == "storage"
    failed = SaveFailed("checkpoint 5 could not be written")
    failed.__cause__ = ValueError(lost)
    assert cause_among_peers(failed) == "peer"
    # Alone there is no peer.
    assert cause_of(ValueError(lost)) == "exception"


def table_of(file: Path) -> list[list[str]]:
    """Cells of the table of exit codes in a page: the rows below the one that begins with 0."""
    lines = file.read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("| 0 |"))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


YES = {"是": "yes", "否": "no"}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/operations.md"])
def test_the_pages_show_the_codes_that_the_program_has(page):
    """Code, causes, restart and meaning; the Chinese page has its own words for the last two.

    docs/operations.md has a column more, and below our codes those of the system's signals.
    """
    rows = {code: row for code, *row in table_of(REPOSITORY / page)}
    for code, causes, restart, meaning in exit_code_table():
        shown = rows.pop(code)
        assert shown[:1] == [causes], code
        assert YES.get(shown[1], shown[1]) == restart, code
        assert shown[2], code
        if not page.endswith(".zh.md"):
            assert shown[2] == meaning, code
    ours = [code for code in rows if page != "docs/operations.md" or int(code[:3]) < 131]
    assert ours == []


def test_the_supervisor_s_help_shows_them_too(capsys):
    with pytest.raises(SystemExit):
        launch(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for code, _, restart, meaning in exit_code_table():
        assert f" {code} {restart} {meaning} " in said


def test_what_a_disk_refuses_is_described_once_whichever_library_met_it():
    """In ours stands more than the system's words."""
    ours = SaveFailed("the run x: No space left on device; make room: finished parts are kept")
    assert describe(ours) == str(ours)
    assert cause_of(ours) == "storage"
    store = ValueError(
        "Error writing: Failed to open: \"/a b/c\": No space left on device [os_error_code='28' x]"
    )
    rows = RuntimeError("open() failed: Read-only file system; opening /a b/c.tmp; Failed to")
    assert describe(store).startswith("/a b/c: No space left on device; make room")
    assert describe(rows).startswith("/a b/c.tmp: Read-only file system; mend the disk")
    assert [cause_of(error) for error in (store, rows)] == ["storage", "storage"]
    refused = RuntimeError("write() failed: Operation not permitted; writing /a; at byte 0")
    assert cause_of(refused) == "configuration"
    assert cause_of(RuntimeError("a bug")) == "exception"
