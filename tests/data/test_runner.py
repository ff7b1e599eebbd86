"""Parts are made once, the first failure ends a run, and what is finished is never made again."""

import contextlib
import dataclasses
import ipaddress
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import REPOSITORY, environment

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data import runner
from baichuan_jax.data.runner import Workers
from baichuan_jax.resilience.addresses import listening
from baichuan_jax.resilience.causes import SaveFailed


@dataclasses.dataclass(frozen=True)
class Noted:
    """A part whose file holds the id of the process that made it."""

    folder: Path
    number: int
    # What it does before it is made, in words of the cases below.
    does: str = ""

    @property
    def name(self) -> str:
        return f"part {self.number}"

    @property
    def file(self) -> Path:
        return self.folder / str(self.number)

    def is_done(self) -> bool:
        return self.file.exists()

    def make(self) -> None:
        for word in self.does.split():
            match word:
                case "wait":
                    time.sleep(0.3)
                case "setting":
                    raise ConfigError(f"line {self.number} of the input is wrong")
                case "disk":
                    raise OSError(28, "No space left on device")
                case "bug":
                    raise ZeroDivisionError("a bug")
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
        self.file.write_text(str(os.getpid()))


def parts(folder: Path, count: int, *does: str) -> list[Noted]:
    """Parts, of which the first ones do something."""
    return [Noted(folder, n, does[n] if n < len(does) else "") for n in range(count)]


@pytest.mark.parametrize("number", [1, 2])
def test_only_what_is_missing_is_made(tmp_path, number):
    with Workers(number, progress=False) as workers:
        assert workers.finish(parts(tmp_path, 5), "some") == 5
        made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        (tmp_path / "3").unlink()
        assert workers.finish(parts(tmp_path, 6), "some") == 2
        assert workers.finish(parts(tmp_path, 6), "some") == 0
    later = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in made if made[name] == later[name]} == {"0", "1", "2", "4"}


def test_processes_live_from_one_call_to_the_next_and_one_worker_needs_none(tmp_path):
    with Workers(1, progress=False) as workers:
        workers.finish(parts(tmp_path, 2), "some")
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}
    made = []
    with Workers(2, progress=False) as workers:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            workers.finish(parts(tmp_path / name, 4, "wait", "wait"), name)
            made.append({path.read_text() for path in (tmp_path / name).iterdir()})
    assert made[0] >= made[1]
    assert str(os.getpid()) not in made[0]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "fails, error, message",
    [
        ("setting", ConfigError, "^line 2 of the input is wrong$"),
        (
            "disk",
            SaveFailed,
            "No space left on device; make room, and start the same command again",
        ),
        ("bug", RuntimeError, r"^part 2: Traceback(.|\n)*in make(.|\n)*ZeroDivisionError: a bug"),
    ],
)
def test_a_failure_ends_the_run_and_says_what_a_user_can_mend(
    tmp_path, number, fails, error, message
):
    failing = parts(tmp_path, 40, "", "", fails, *["wait"] * 37)
    with Workers(number, progress=False) as workers:
        with pytest.raises(error, match=message):
            workers.finish(failing, "some")
        # A few parts were handed to the processes already; the others were not begun. A loaded
        # machine is slow to hear of the failure, hence the wide bound.
        made = {int(path.name) for path in tmp_path.iterdir()}
        assert {0, 1} <= made <= set(range(30)) - {2}
        assert workers.finish(parts(tmp_path, 40), "some") == 40 - len(made)


def test_of_two_failures_that_of_the_first_part_is_shown(tmp_path):
    """Part 0 fails later than part 1, and what runs is waited for."""
    with Workers(2, progress=False) as workers:
        workers.finish(parts(tmp_path, 2, "wait", "wait"), "both processes have started")
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(ConfigError, match="line 0 of"):
            workers.finish(parts(tmp_path, 4, "wait setting", "setting"), "some")


def test_a_worker_that_is_killed_is_named(tmp_path):
    with Workers(2, progress=False) as workers:
        with pytest.raises(RuntimeError, match="a worker process was killed, most likely because"):
            workers.finish(parts(tmp_path, 4, "", "killed"), "some")
        # The pool is broken; the next call gets a new one.
        workers.finish(parts(tmp_path, 4), "some")
    assert len(list(tmp_path.iterdir())) == 4


SCRIPT = """
import sys
from pathlib import Path
from test_runner import parts
from baichuan_jax.data import runner
from baichuan_jax.data.runner import Workers

print("the script runs", flush=True)
with Workers(2, progress=False) as workers:
    print(workers.finish(parts(Path(sys.argv[1]), 4), "some"))
print(Path(__file__).name, __spec__)
"""


@pytest.mark.parametrize("how", ["file", "module"])
def test_a_script_needs_no_main_guard(tmp_path, how):
    """A worker that imported the script would start its work again, and wait for its parent."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    what = [str(tmp_path / "script.py")] if how == "file" else ["-m", "script"]
    # The parts are classes of this file.
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, *what, str(tmp_path / "parts")],
        cwd=tmp_path,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    ran, made, names = done.stdout.strip().split("\n")
    assert (ran, made) == ("the script runs", "4"), done.stderr
    # The script has its names back.
    assert names.startswith("script.py " + ("None" if how == "file" else "ModuleSpec"))


def test_parts_of_which_none_ends_are_waited_for_with_a_word(tmp_path, capsys, monkeypatch):
    """Storage or a cluster may hang, and a log has no progress bar."""
    monkeypatch.setattr(runner, "STALLED_SECONDS", 0.1)
    with Workers(1, progress=False) as workers:
        assert workers.finish(parts(tmp_path, 3, "wait"), "packing", unit="shard") == 3
    said = capsys.readouterr().err
    assert said == "waiting for packing: a shard to end; none has for 0 s\n"


@pytest.mark.slow
def test_a_ray_cluster_of_this_host_is_closed_to_strangers(tmp_path):
    """Ray runs the code of whoever reaches its ports."""
    pytest.importorskip("ray")
    script = (
        "import os, sys; from baichuan_jax.data.runner import Workers; Workers(); import ray; "
        "print(ray.get_runtime_context().gcs_address, os.environ['RAY_AUTH_TOKEN'], flush=True); "
        "sys.stdin.read()"
    )
    mark = f"BAICHUAN_JAX_MARK={tmp_path}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    variables = environment(RAY_ADDRESS="local", BAICHUAN_JAX_MARK=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], env=variables, **pipes) as cluster:
        assert cluster.stdout is not None
        assert cluster.stdin is not None
        place, token = cluster.stdout.readline().split()
        address, _, port = place.rpartition(":")
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            # One that has ended, or that belongs to somebody else, has none.
            with contextlib.suppress(OSError):
                if mark.encode() in (process / "environ").read_bytes():
                    found.update(listening(process.name))
        assert (address, int(port)) in found
        assert len(found) > 3
        assert {ipaddress.ip_address(each).is_loopback for each, _ in found} == {True}, found
        # Another user of this host reaches the ports, and does not know the token.
        for known, code in ((token, 0), ("0" * 64, 1)):
            stranger = subprocess.run(
                [sys.executable, "-c", f"import ray; ray.init('{place}')"],
                env=environment(
                    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
                    RAY_AUTH_MODE="token",
                    RAY_AUTH_TOKEN=known,
                ),
                capture_output=True,
                timeout=120,
            )
            assert stranger.returncode == code, stranger.stderr
        cluster.stdin.close()
    assert cluster.returncode == 0
