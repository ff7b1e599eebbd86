"""Runs a whole command on hostile files: within limits, and with a judgement of how it ends.

A module beside this one lists files of one kind in `HOSTILE`; test_hostile.py tries them all. A new
file is a function that writes it and an entry in such a list.
"""

import contextlib
import dataclasses
import functools
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from launches import SHARED, Done, environment, fork_server, run, run_module, write_config

# Of a command with all its workers, as the memory that it alone occupies and its share of the rest.
MEMORY = 2 << 30
SECONDS = 60
# Bytes of all hostile files of one entry: what blows up is small.
LARGEST = 1 << 20


@dataclasses.dataclass(frozen=True)
class Hostile:
    """Hostile files, and every command that reads their kind."""

    name: str
    # Writes the files into an empty folder.
    make: Callable[[Path], None]
    # A command's name -> what follows `python -m`, for the folder with the files.
    commands: Mapping[str, Callable[[Path], list[str]]]
    # What a refusal names: a regular expression.
    place: str
    # A command that goes on instead -> what its output says of it: a regular expression.
    counted: Mapping[str, str] = dataclasses.field(default_factory=dict)


@functools.cache
def finished_run() -> Path:
    """The folder of a run of two steps."""
    folder = Path(tempfile.mkdtemp(dir=SHARED))
    run(
        write_config(folder),
        folder / "run",
        "--train.num_steps",
        "2",
        "--optimizer.warmup_steps",
        "1",
    )
    return folder / "run"


@functools.cache
def exported_run() -> Path:
    """A Hugging Face folder of `finished_run`."""
    folder = finished_run().with_name("exported")
    done = run_module("baichuan_jax.hf", "export", str(finished_run()), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def run_limited(module: str, *argv: str, cwd: Path) -> Done:
    """What `python -m MODULE ARGV` prints. Fails where it takes more memory or time than it may."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = fork_server().start(module, list(argv), environment(), cwd, stdout, stderr)
        family = {process.pid}
        try:
            deadline = time.monotonic() + SECONDS
            while process.poll() is None:
                family |= _descendants(family)
                used = sum(_memory(pid) for pid in family)
                assert used <= MEMORY, f"{used >> 20} MiB of memory in use"
                assert time.monotonic() < deadline, f"still running after {SECONDS} s"
                time.sleep(0.05)
        finally:
            process.kill()
            for pid in family - {process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for file in (stdout, stderr):
            file.seek(0)
        return Done(process.wait(), stdout.read().decode(), stderr.read().decode())


def judge(hostile: Hostile, command: str, done: Done) -> None:
    """Fail unless a command refused the files in one line that names them, or counted them."""
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output
    # Nothing of a file's content may steer the terminal; a bar of progress returns to its line.
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", output), repr(output)
    if command in hostile.counted:
        assert done.returncode == 0, f"exit code {done.returncode}\n{output}"
        assert re.search(hostile.counted[command], output), output
        return
    assert done.returncode == 78, f"exit code {done.returncode}\n{output}"
    error = [line for line in re.split(r"[\r\n]", done.stderr) if "error: " in line]
    assert len(error) == 1, output
    assert re.search(hostile.place, error[0]), error[0]
    assert len(error[0]) < 2000, f"{len(error[0])} characters: {error[0][:200]}"


def _descendants(pids: Iterable[int]) -> set[int]:
    """The processes that these have started, and those that they have, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                # The name, in brackets, may hold anything.
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2]
                parents.setdefault(int(stat.split()[1]), []).append(int(entry))
    found: set[int] = set()
    new = list(pids)
    while new:
        new = [child for pid in new for child in parents.get(pid, []) if child not in found]
        found.update(new)
    return found


def _memory(pid: int) -> int:
    """Bytes in use by a process, where those that several share are divided among them."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        if found := re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE):
            return int(found[1]) << 10
    return 0
