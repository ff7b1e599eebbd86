"""A process whose disk fails at chosen calls, and the program inside it.

`python faulty_disk.py` runs one command of the program several times in one process. Each time one
call (or each from one on) that changes files below a folder fails with an errno: faulty_disk.c is
preloaded, so a write of Python and one of TensorStore or Arrow are the same. After each trial the
same command runs undisturbed. A line of JSON for each trial says how both ended.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_suffix(".c")
NEVER = (1 << 62, 1 << 62)


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
) -> Iterator[dict[str, Any]]:
    """Run `python -m MODULE ARGV` once for each trial: (first failing call, last one, errno).

    {folder} in argv is a new folder below `folder` for each trial. Yields for each: calls, code,
    output, and of the undisturbed run behind it: again (its code), said.
    """
    request = {"module": module, "argv": argv, "folder": str(folder), "trials": list(trials)}
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
        self._library.faulty_disk_calls.restype = ctypes.c_long
        self._library.faulty_disk_set.argtypes = [
            ctypes.c_char_p,
            ctypes.c_long,
            ctypes.c_long,
            ctypes.c_int,
        ]

    @contextlib.contextmanager
    def failing(self, folder: Path, first: int, last: int, number: int) -> Iterator[None]:
        """Calls first to last (from 1) that change files below the folder fail."""
        self._library.faulty_disk_set(os.fsencode(folder), first, last, number)
        try:
            yield
        finally:
            self.counted = self._library.faulty_disk_calls()
            self._library.faulty_disk_set(b"", *NEVER, 0)


def _run(main: Any, argv: list[str]) -> tuple[int, str]:
    """The exit code of a command and what it says, in this process."""
    from baichuan_jax.resilience.exits import run_command

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run_command(lambda: main(argv))
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()


def main() -> None:
    request = json.loads(sys.argv[1])
    command = importlib.import_module(request["module"]).main
    disk = Disk()
    for index, (first, last, number) in enumerate(request["trials"]):
        folder = Path(request["folder"]) / f"{index}-{first}-{number}"
        argv = [word.replace("{folder}", str(folder)) for word in request["argv"]]
        with disk.failing(folder, first, last, number):
            code, said = _run(command, argv)
        again, more = _run(command, argv)
        result = {"trial": [first, last, number], "folder": str(folder), "calls": disk.counted}
        result |= {"code": code, "output": said, "again": again, "said": more}
        print(json.dumps(result), flush=True)
    # Orbax's threads may wait ten minutes for a folder that was refused.
    os._exit(0)


if __name__ == "__main__":
    main()
