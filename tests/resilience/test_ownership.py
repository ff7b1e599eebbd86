"""Owners of folders: one at a time, among real processes that are killed, stopped and raced."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launches import (
    REPOSITORY,
    SHARED,
    environment,
    fork_server,
    kill,
    lines,
    run_module,
    start,
    start_all,
    wait_all,
    wait_for_step,
    write_config,
)

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data import mixture, pipeline, quality
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.evaluate import __main__ as evaluate
from baichuan_jax.hf import __main__ as hf
from baichuan_jax.resilience import heartbeats, ownership
from baichuan_jax.resilience.heartbeats import HostHeartbeats, refuse_beside_supervisors
from baichuan_jax.resilience.launch_files import Launches
from baichuan_jax.resilience.ownership import Owner, owned, owner_of

# A process that owns a lock until its input ends. Words switch flock off, name another machine,
# say that it is stopping.
PROGRAM = """
import errno, sys
from pathlib import Path
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience import ownership, waits

waits.SAY_SECONDS, ownership.BEAT = 1.0, 0.3
lock, machine, words, silence, seconds, launch = sys.argv[1:]

def missing(*_):
    raise OSError(errno.ENOLCK, "no locks available")

if "no-flock" in words:
    ownership.fcntl.flock = missing
ownership._machine = lambda: machine
settings = {"silence": float(silence), "seconds": float(seconds), "shared": "shared" in words}
if launch:
    settings["launch"] = int(launch)
if "race" in words:
    print("ready", flush=True)
    sys.stdin.readline()
try:
    with ownership.owned(Path(lock), "the folder", "choose another", **settings) as claim:
        if "stopping" in words:
            claim.stopping()
        print("in", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(f"refused: {error}", flush=True)
"""


class Process:
    """One process of PROGRAM."""

    def __init__(
        self,
        lock: Path,
        words: str = "",
        machine: str = "a",
        silence: float = 60,
        seconds: float = 60,
        launch: str = "",
    ) -> None:
        argv = [str(lock), machine, words, str(silence), str(seconds), launch]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *argv],
            env=environment(),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, number: int | None = None) -> int:
        if number is not None:
            self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture
def processes():
    made: list[Process] = []

    def make(*args, **words) -> Process:
        made.append(Process(*args, **words))
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        each.process.communicate()


# Where flock is missing, or is the other machine's, the record alone decides.
WHERE = [("", "a"), ("no-flock", "a"), ("no-flock", "b")]


@pytest.mark.parametrize(("words", "machine"), WHERE)
def test_a_living_owner_is_refused_and_one_that_has_ended_is_not_waited_for(
    processes, tmp_path, words, machine
):
    lock = tmp_path / "sub" / "lock"
    first = processes(lock, words)
    assert first.says() == "in"
    refused = processes(lock, words, machine).says()
    assert re.match(
        rf"refused: the folder is owned by process {first.process.pid} on \S+, since 20.* \(.*\), "
        rf"which is at work; wait for its end, or stop it \(kill {first.process.pid} on \S+\); "
        "choose another",
        refused,
    )
    assert first.end() == 0
    began = time.monotonic()
    assert processes(lock, words, machine).says() == "in"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("words", ["", "no-flock"])
def test_a_killed_owner_of_this_machine_is_not_waited_for(processes, tmp_path, words):
    first = processes(tmp_path / "lock", words)
    assert first.says() == "in"
    first.end(signal.SIGKILL)
    assert not owner_of(tmp_path / "lock").released
    assert processes(tmp_path / "lock", words, seconds=30).says() == "in"


@pytest.mark.parametrize(("words", "machine"), [("", "b"), ("no-flock", "b")])
def test_a_killed_owner_without_flock_is_dead_once_its_beat_stands_still(
    processes, tmp_path, words, machine
):
    first = processes(tmp_path / "lock", words)
    assert first.says() == "in"
    first.end(signal.SIGKILL)
    began = time.monotonic()
    assert processes(tmp_path / "lock", words, machine, silence=1.5).says() == "in"
    assert time.monotonic() - began > 1.5


def test_an_owner_that_is_stopping_is_waited_for_and_named(processes, tmp_path):
    first = processes(tmp_path / "lock", "stopping")
    assert first.says() == "in"
    second = processes(tmp_path / "lock")
    assert second.process.stderr is not None
    said = second.process.stderr.readline()
    assert re.match(rf"waiting for process {first.process.pid} on .*, which owns the folder", said)
    assert first.end() == 0
    assert second.says() == "in"


def test_a_cache_that_another_process_fills_is_waited_for(processes, tmp_path):
    first = processes(tmp_path / "lock", "shared")
    assert first.says() == "in"
    second = processes(tmp_path / "lock", "shared")
    assert second.process.stderr is not None
    assert second.process.stderr.readline().startswith("waiting for process")
    assert first.end() == 0
    assert second.says() == "in"


def test_a_stopped_owner_keeps_its_lock_and_the_wait_for_it_ends(processes, tmp_path):
    first = processes(tmp_path / "lock")
    assert first.says() == "in"
    first.process.send_signal(signal.SIGSTOP)
    second = processes(tmp_path / "lock", silence=0.5, seconds=2.5).says()
    assert "holds it without a sign of life for more than 2 s; wait for its end, or" in second
    first.process.send_signal(signal.SIGCONT)


def test_an_owner_that_slept_finds_its_successor_and_leaves(processes, tmp_path):
    first = processes(tmp_path / "lock", "no-flock")
    assert first.says() == "in"
    first.process.send_signal(signal.SIGSTOP)
    second = processes(tmp_path / "lock", "no-flock", "b", silence=1.5)
    assert second.says() == "in"
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(20) == 76
    assert second.process.poll() is None


@pytest.mark.parametrize("words", ["race", "race no-flock"])
def test_of_many_that_take_a_dead_owners_place_one_succeeds(processes, tmp_path, words):
    lock = tmp_path / "lock"
    (tmp_path / "lock-7").write_text(json.dumps({"host": "gone", "machine": "gone", "beat": 5}))
    racing = [processes(lock, words, f"m{n}", silence=2.0, seconds=4.0) for n in range(6)]
    for each in racing:
        assert each.says() == "ready"
    for each in racing:
        assert each.process.stdin is not None
        each.process.stdin.write("\n")
        each.process.stdin.flush()
    said = [each.says() for each in racing]
    assert said.count("in") == 1, said
    assert sum(line.startswith("refused") for line in said) == 5
    assert [path.name for path in tmp_path.glob("lock-*")] == ["lock-8"]


def test_a_launch_takes_the_place_of_the_one_before_at_once(processes, tmp_path):
    """A verdict says that it has ended; storage may take long to notice."""
    first = processes(tmp_path / "lock", launch="3")
    assert first.says() == "in"
    # Its host lost its connection: it is not dead, and finds that it has a successor.
    assert processes(tmp_path / "lock", machine="b", launch="4").says() == "in"
    assert first.process.wait(20) == 76
    # Any other is refused, and so is a launch beside an unsupervised process.
    assert processes(tmp_path / "lock", machine="c").says().startswith("refused")
    alone = processes(tmp_path / "other")
    assert alone.says() == "in"
    assert processes(tmp_path / "other", machine="b", launch="1").says().startswith("refused")


def test_a_number_is_never_given_twice(tmp_path):
    """A contender that read the newest number long ago must not succeed with it."""
    lock, owner = tmp_path / "lock", json.dumps({"released": True})
    (tmp_path / "lock-4").write_text(owner)
    slow = ownership._Contender(lock, 60, None)
    slow._number, slow._locked = 4, None
    # Meanwhile others come and go; the records before theirs are removed.
    (tmp_path / "lock-4").unlink()
    (tmp_path / "lock-6").write_text(owner)
    slow._take()
    assert slow.claim is None
    assert [path.name for path in tmp_path.glob("lock-*")] == ["lock-6"]
    slow.file.close()


def test_where_nothing_can_be_written_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"^the folder cannot be written \(.*file.*\); choose"),
        owned(tmp_path / "file" / "lock", "the folder", "choose another"),
    ):
        pass


def test_a_newer_versions_record_is_read_and_a_damaged_one_named(tmp_path):
    (tmp_path / "lock-1").write_text('{"host": "h", "colour": "red"}')
    assert owner_of(tmp_path / "lock") == Owner(host="h")
    # No numbers of records.
    for name in ("lock-²", "lock-02", "lock-x"):
        (tmp_path / name).write_text("")
    damages = ["[]", "", '{"since": null}', '{"since": 1e300}', '{"beat": "x"}', '{"launch": -1}']
    for damage in [*damages, '{"process": 3}', "[" * 5000, '{"host": "\\ud800"}']:
        (tmp_path / "lock-2").write_text(damage)
        with pytest.raises(ConfigError, match=r"lock-2 is no owner's record .*; delete it"):
            owner_of(tmp_path / "lock")


def test_nobody_trains_beside_a_supervisor_that_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "LOOK", 0.5)
    monkeypatch.setattr(heartbeats, "BEAT", 0.3)
    launches = Launches(tmp_path / "attempts")
    refuse_beside_supervisors(launches, "R")
    supervisor = HostHeartbeats(launches, "host", "host", 10)
    supervisor.beat()
    # Killed: its file stays as it is.
    refuse_beside_supervisors(launches, "R")
    closed = threading.Event()

    def beat() -> None:
        while not closed.wait(0.2):
            supervisor.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ConfigError, match=rf"kept going by .* on host \(process {os.getpid()}\)"):
        refuse_beside_supervisors(launches, "R")
    closed.set()
    thread.join()
    supervisor.end()
    supervisor.beat()
    assert launches.read_heartbeats() == {}


GOLDEN = REPOSITORY / "tests" / "golden"


def import_there(folder: Path) -> None:
    hf.main(["import", str(GOLDEN / "tiny"), str(folder)])


def evaluate_there(folder: Path) -> None:
    tokenizer = str(GOLDEN / "exam" / "tokenizer.model")
    model = ["--checkpoint", str(GOLDEN / "tiny"), "--tokenizer", tokenizer]
    text = ["--text", str(SHARED / "train-en.jsonl"), "--output", str(folder)]
    evaluate.main(["perplexity", *model, *text])


def clean_there(folder: Path) -> None:
    pytest.importorskip("daft", reason="make data-deps")
    pipeline.run(CorpusConfig(input=[str(SHARED / "train-en.jsonl")], output=str(folder)))


def score_there(folder: Path) -> None:
    good = ["--good", str(SHARED / "train-en.jsonl"), "--output", str(folder)]
    quality.main(["train", *good])


def learn_there(folder: Path) -> None:
    config = write_config(folder.parent)
    mixture.main(["learn", "--config", str(config), "--output", str(folder), "--runs", "6"])


@pytest.mark.parametrize(
    ("write", "beside"),
    [
        (import_there, True),
        (evaluate_there, False),
        (clean_there, False),
        (score_there, True),
        (learn_there, False),
    ],
)
def test_every_command_refuses_an_output_that_another_process_writes(
    tmp_path, monkeypatch, write, beside
):
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    with (
        ownership.owned_output(tmp_path / "out", beside=beside),
        pytest.raises(ConfigError, match=r"^the output .*out is owned by process .* at work; wait"),
    ):
        write(tmp_path / "out")


def test_all_names_of_an_output_have_one_owner(tmp_path, monkeypatch):
    """A link, a link to nothing yet, and `.`; the root has no place for a lock beside it."""
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    (tmp_path / "link").symlink_to("out")
    for made in (False, True):
        if made:
            (tmp_path / "out").mkdir()
            monkeypatch.chdir(tmp_path / "out")
        for name in ("link", "out/."):
            with (
                ownership.owned_output(tmp_path / "out", beside=True),
                pytest.raises(ConfigError, match="is owned by process"),
                ownership.owned_output(Path("." if made else tmp_path / name), beside=True),
            ):
                pass
    with (
        pytest.raises(ConfigError, match=r"^/ is the root of a file system"),
        ownership.owned_output(Path("/"), beside=True),
    ):
        pass


def test_an_export_refuses_an_output_that_another_process_writes(tmp_path, monkeypatch):
    import_there(tmp_path / "weights")
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    with (
        ownership.owned_output(tmp_path / "out", beside=True),
        pytest.raises(ConfigError, match=r"^the output .*out is owned by process"),
    ):
        hf.main(["export", str(tmp_path / "weights"), str(tmp_path / "out")])


# The real program


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path)


LONG = ["--train.num_steps", "3000", "--evaluate.every", "3000", "--checkpoint.every", "500"]


def test_a_run_that_trains_refuses_a_second_launch_and_loses_nothing(config, tmp_path):
    run_dir = tmp_path / "run"
    first = start(config, run_dir, *LONG)
    wait_for_step(first, run_dir, 2)
    argv = ["--config", str(config), "--run_dir", str(run_dir), *LONG]
    second = run_module("baichuan_jax.train", *argv, "--optimizer.learning_rate", "1e-3")
    assert second.returncode == 78, second.stderr
    (line,) = second.stderr.strip().split("\n")
    assert line.startswith(f"error: run_dir='{run_dir}' is owned by process {first.pid} on ")
    assert first.poll() is None
    # A kill ends the claim, and the next launch is as before.
    kill(first)
    step = max(line["step"] for line in lines(run_dir))
    third = start(config, run_dir, *LONG)
    wait_for_step(third, run_dir, step + 2)
    assert kill(third, signal.SIGTERM) == 75
    assert len({line["learning_rate"] for line in lines(run_dir) if line["step"] == 2}) == 1
    assert [line["kind"] for line in lines(run_dir, "events")].count("started") == 2


def test_of_two_launches_that_start_together_one_trains(config, tmp_path):
    run_dir = tmp_path / "run"
    both = [start(config, run_dir, *LONG) for _ in range(2)]
    deadline = time.monotonic() + 120
    while all(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    refused, trains = sorted(both, key=lambda process: process.poll() is None)
    assert (refused.poll(), trains.poll()) == (78, None)
    wait_for_step(trains, run_dir, 2)
    assert kill(trains, signal.SIGTERM) == 75
    assert len(list((run_dir / "attempts").glob("[0-9]*"))) == 1


def supervise(config: Path, run_dir: Path, log: Path, *options: str):
    argv = [*options, "--", "--config", str(config), "--run_dir", str(run_dir), *LONG]
    with log.open("w") as output:
        return fork_server().start(
            "baichuan_jax.launch", argv, environment(), config.parent, output, output
        )


@pytest.mark.slow
def test_supervisors_and_launches_without_one_refuse_each_other(config, tmp_path):
    run_dir = tmp_path / "run"
    first = supervise(config, run_dir, tmp_path / "first.log", "--host", "h")
    wait_for_step(first, run_dir, 2)
    # The same host's name.
    second = supervise(config, run_dir, tmp_path / "second.log", "--host", "h")
    assert second.wait(60) == 78
    assert "host h of run_dir" in (tmp_path / "second.log").read_text()
    # Beside its launch.
    argv = ["--config", str(config), "--run_dir", str(run_dir), *LONG]
    alone = run_module("baichuan_jax.train", *argv)
    assert alone.returncode == 78
    assert (
        "is kept going by supervisors (python -m baichuan_jax.launch) on h (process" in alone.stderr
    )
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 75
    # A supervisor beside a launch without one.
    alone = start(config, run_dir, *LONG)
    step = max(line["step"] for line in lines(run_dir))
    wait_for_step(alone, run_dir, step + 2)
    third = supervise(config, run_dir, tmp_path / "third.log", "--host", "h")
    assert third.wait(60) == 78
    assert "is owned by process" in (tmp_path / "third.log").read_text()
    assert alone.poll() is None
    kill(alone)


@pytest.mark.slow
def test_a_successor_waits_for_a_launch_that_saves(config, tmp_path):
    """As a scheduler does that starts a job again before its processes have ended."""
    run_dir = tmp_path / "run"
    first = start(config, run_dir, *LONG)
    wait_for_step(first, run_dir, 2)
    first.send_signal(signal.SIGTERM)
    second = start(config, run_dir, *LONG)
    assert first.wait(60) == 75
    saved = max(line["step"] for line in lines(run_dir))
    wait_for_step(second, run_dir, saved + 2)
    assert kill(second, signal.SIGTERM) == 75


@pytest.mark.slow
def test_processes_of_one_run_share_a_claim_and_are_refused_together(config, tmp_path):
    run_dir = tmp_path / "run"
    first = start_all(config, run_dir, *LONG, processes=2, devices=1)
    wait_for_step(first[0], run_dir, 2)
    assert wait_all(start_all(config, run_dir, *LONG, processes=2, devices=1), 240) == [78, 78]
    for number in range(2):
        text = run_dir.with_suffix(f".{number}.log").read_text()
        assert f"error: run_dir='{run_dir}' is owned by process {first[0].pid} on " in text
    for process in first:
        process.send_signal(signal.SIGTERM)
    assert wait_all(first, 120) == [75, 75]


@pytest.mark.parametrize(
    "address",
    ["s3://K:pLanTed@bucket/x", "s3://K%3ApLanTed%40bucket/x", "s3:/K:pLanTed@bucket/x"],
)
def test_an_owners_command_is_kept_without_secrets(address, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "a", "--text", address, "--output", "o"])
    with owned(tmp_path / "lock", "the folder", "choose another"):
        owner = owner_of(tmp_path / "lock")
        assert owner is not None
        assert "***" in owner.command
        assert owner.command.endswith("--output o")
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert not [file for file in files if b"pLanTed" in file.read_bytes()]
