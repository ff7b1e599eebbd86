"""A process whose disk fails, or that is killed, at chosen calls, and the program inside it.

`python faulty_disk.py` runs one command of the program many times. Each time one call (or each from
one on) that changes files below a folder fails with an errno, or ends the command's processes with
SIGKILL: faulty_disk.c is preloaded, so a write of Python and one of TensorStore or Arrow are the
same. After each trial the same command runs undisturbed. A line of JSON for each trial says how
both ended.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_suffix(".c")
NEVER = (1 << 62, 1 << 62)
# As an errno: the processes are killed instead.
KILL = 0
# As an exit code: it did not end.
HANGS = 124


def build(folder: Path) -> Path:
    """The library to preload. Skips the test where no C compiler is installed."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    library = folder / "faulty_disk.so"
    argv = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(argv, check=True)
    return library


def run_trials(
    library: Path,
    module: str,
    argv: list[str],
    folder: Path,
    trials: Iterable[tuple[int, int, int]],
    variables: dict[str, str],
    seconds: float = 600,
    forked: bool = True,
    constants: dict[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run `python -m MODULE ARGV` once for each trial: (first failing call, last one, errno).

    {folder} in argv is a new folder below `folder`. Forked: it has one name in all trials, so that
    files that name it are equal, and another one behind each. Not forked: all trials are one
    process, which keeps what it compiles and cannot be killed. Yields for each trial: folder,
    calls, code, output, and of the undisturbed run behind it: again (its code), said.
    A forked command that ends with 0 is not run again. `constants`
    of modules, by their full names, are set to other values first.
    """
    request = {"module": module, "argv": argv, "folder": str(folder), "trials": list(trials)}
    request |= {"forked": forked, "constants": constants or {}}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(request)],
        env={**variables, "LD_PRELOAD": str(library), "FAULTY_DISK": str(library)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith('{"trial"')]
    assert len(results) == len(request["trials"]), done.stdout[-2000:] + done.stderr[-4000:]
    yield from map(json.loads, results)


class Disk:
    """The preloaded library, from inside the process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["FAULTY_DISK"])
        # Counted in a file, which the processes of a command share.
        self._counter = Path(tempfile.mkstemp(prefix="faulty-disk-")[1])

    @contextlib.contextmanager
    def failing(self, folder: Path, first: int, last: int, number: int) -> Iterator[None]:
        """Calls first to last (from 1) that change files below the folder fail."""
        self._counter.write_bytes(bytes(8))
        setting = [folder, first, last, number, self._counter]
        # The processes that the command starts read it too.
        os.environ["FAULTY_DISK_SET"] = "\n".join(map(str, setting))
        self._library.faulty_disk_read()
        try:
            yield
        finally:
            del os.environ["FAULTY_DISK_SET"]
            self._library.faulty_disk_read()

    @property
    def counted(self) -> int:
        """The calls of the last trial."""
        return int.from_bytes(self._counter.read_bytes(), sys.byteorder)

    def close(self) -> None:
        """Remove the counter."""
        self._counter.unlink()


def _run(main: Any, argv: list[str]) -> tuple[int, str]:
    """The exit code of a command and what it says, in this process."""
    from baichuan_jax.resilience.exits import run_command

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run_command(lambda: main(argv))
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()


def _run_forked(main: Any, argv: list[str], seconds: float = 120) -> tuple[int, str]:
    """The same in a process of its own, in a group that ends with it. -9: it was killed."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            code, text = _run(main, argv)
            os.write(2, text.encode())
            os._exit(code)
        ended, _, _ = select.select([os.pidfd_open(pid)], [], [], seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        said.seek(0)
        text = said.read().decode(errors="replace")
    return (os.waitstatus_to_exitcode(status) if ended else HANGS), text


def _main_module(name: str) -> str:
    """The module that `python -m NAME` runs."""
    is_package = hasattr(importlib.import_module(name), "__path__")
    return f"{name}.__main__" if is_package else name


def main() -> None:
    request = json.loads(sys.argv[1])
    command = importlib.import_module(_main_module(request["module"])).main
    for name, value in request["constants"].items():
        module, constant = name.rsplit(".", 1)
        setattr(importlib.import_module(module), constant, value)
    run = _run_forked if request["forked"] else _run
    disk = Disk()
    for index, (first, last, number) in enumerate(request["trials"]):
        kept = Path(request["folder"]) / f"{index}-{first}-{number}"
        folder = kept.with_name("now") if request["forked"] else kept
        argv = [word.replace("{folder}", str(folder)) for word in request["argv"]]
        with disk.failing(folder, first, last, number):
            code, said = run(command, argv)
        calls = disk.counted
        # A forked command that says that all went well is taken at its word.
        right = request["forked"] and code == 0
        again, more = (0, "") if right else run(command, argv)
        if folder != kept and folder.exists():
            folder.rename(kept)
        result = {"trial": [first, last, number], "folder": str(kept), "calls": calls}
        result |= {"code": code, "output": said, "again": again, "said": more}
        print(json.dumps(result), flush=True)
    disk.close()
    # Orbax's threads may wait ten minutes for a folder that was refused.
    os._exit(0)


if __name__ == "__main__":
    main()
