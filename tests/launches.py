"""Start the real program in real processes, for the tests that kill it.

They come from the fork server (fork_server.py): what `python -m` starts, but jax is imported. A
test that needs `python -m` itself takes `command` and `environment`.
"""

import atexit
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fork_server import NUMBER

from baichuan_jax.resilience.exits import run_command
from baichuan_jax.resilience.placement import HOST_VARIABLE

REPOSITORY = Path(__file__).parents[1]
SAMPLE = REPOSITORY / "baichuan_jax" / "data" / "sample"


def _share() -> Path:
    """The folder that all processes of one call of pytest share; the first of them makes it."""
    if "BAICHUAN_JAX_TESTS" in os.environ:
        return Path(os.environ["BAICHUAN_JAX_TESTS"])
    folder = Path(tempfile.mkdtemp(prefix="baichuan-jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("train-en", "train-zh", "validation-en"):
        with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [next(file) for _ in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    os.environ["BAICHUAN_JAX_TESTS"] = str(folder)
    return folder


# Holds slices of the bundled text, and the tokenizer and rows that runs make of them.
SHARED = _share()


def write_config(folder: Path) -> Path:
    """A configuration that compiles in seconds and steps in milliseconds.

    All name the same slice of the bundled text and the same cache, so that it is packed once.
    """
    path = folder / "config.yaml"
    path.write_text(
        f"""
model:
  vocab_size: 512
  hidden_size: 64
  intermediate_size: 176
  num_layers: 2
  num_heads: 4
  dtype: float32
  remat: none
train: {{num_steps: 60, context_length: 64, global_batch_size: 8, loss_chunk_size: 256}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 5}}
tokenizer: {{vocab_size: 512}}
data:
  train: {{"{SHARED}/train-en.jsonl": 1.0, "{SHARED}/train-zh.jsonl": 2.0}}
  validation: {{"{SHARED}/validation-en.jsonl": 1.0}}
  cache_dir: "{SHARED}/cache"
checkpoint: {{every: 5, keep_last: 2}}
evaluate: {{every: 30, num_batches: 2}}
metrics: {{tensorboard: false, peak_tflops: 0.1}}  # a peak that is measured takes 0.3 s
""",
        encoding="utf-8",
    )
    return path


def command(config: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "baichuan_jax.train",
        "--config",
        str(config),
        "--run_dir",
        str(run_dir),
        *options,
    ]


def cpu_devices(devices: int) -> str:
    """XLA's flags for so many devices of the CPU."""
    # XLA ends the process when the threads of a collective have not all come within 40 s, which
    # happens on a loaded machine.
    return (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices(devices),
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(SHARED / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA warns of every program that it takes from jax's cache
        **variables,
    }


class Launch:
    """A process of the fork server, with the methods of subprocess.Popen that tests use."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe  # from the server: the pid, and when the process has ended its status
        self.pid = self._read()
        self.returncode: int | None = None

    def _read(self) -> int:
        content = os.read(self._pipe, NUMBER.size)
        assert content, "the fork server has ended"
        return NUMBER.unpack(content)[0]

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it. Raises TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._pipe], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(self._read())
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None where it has not ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        os.close(self._pipe)


class ForkServer:
    """The process that forks launches. It ends with this one."""

    # Of what a launch's environment says, these act where they are read, after the fork. jax and
    # Python read others as they start: those must be the server's own.
    FREE = frozenset(
        {"XLA_FLAGS", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    )

    def __init__(self) -> None:
        self._environment = environment()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Not a terminal, so that its children buffer their output as they would in a pipe.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).parent / "fork_server.py"),
                    str(theirs.fileno()),
                ],
                env=self._environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        assert self._channel.recv(64) == b"ready", "the fork server did not start"
        atexit.register(self.close)

    def close(self) -> None:
        """End the server and every launch that has not ended."""
        self._channel.close()
        self._process.wait()

    def start(
        self,
        module: str,
        argv: list[str],
        variables: dict[str, str],
        cwd: Path,
        stdout: IO,
        stderr: IO,
    ) -> Launch:
        """What `python -m MODULE ARGV` starts."""
        for name in variables.keys() | self._environment.keys():
            if name.startswith(("JAX_", "PYTHON", "TF_")) and name not in self.FREE:
                assert variables.get(name) == self._environment.get(name), f"{name} needs python -m"
        message = {"module": module, "argv": argv, "environment": variables, "cwd": str(cwd)}
        ours, theirs = os.pipe()
        try:
            files = [theirs, stdout.fileno(), stderr.fileno()]
            socket.send_fds(self._channel, [json.dumps(message).encode()], files)
        finally:
            os.close(theirs)
        return Launch(ours)


@functools.cache
def fork_server() -> ForkServer:
    """This process's own server."""
    return ForkServer()


def start(config: Path, run_dir: Path, *options: str, devices: int = 1, **variables: str) -> Launch:
    """One process of a training run, output kept in run_dir's sibling NAME.log."""
    argv = ["--config", str(config), "--run_dir", str(run_dir), *options]
    with open(run_dir.with_suffix(f".{variables.get('JAX_PROCESS_ID', '0')}.log"), "a") as log:
        return fork_server().start(
            "baichuan_jax.train", argv, environment(devices, **variables), run_dir.parent, log, log
        )


def start_module(module: str, *argv: str) -> Launch:
    """What `python -m MODULE ARGV` starts in the repository's folder; its output is dropped."""
    with open(os.devnull, "w") as nowhere:
        return fork_server().start(module, list(argv), environment(), REPOSITORY, nowhere, nowhere)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run_module(
    module: str, *argv: str, cwd: Path = REPOSITORY, devices: int = 1, seconds: float = 600
) -> Done:
    """What `python -m MODULE ARGV` prints until it ends."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = fork_server().start(module, list(argv), environment(devices), cwd, stdout, stderr)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        for file in (stdout, stderr):
            file.seek(0)
        return Done(code, stdout.read().decode(), stderr.read().decode())


def run_here(command: Callable[[], int]) -> Done:
    """What a command's main function does in this process, its end as run_command makes it."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run_command(command)
        except SystemExit as end:
            return Done(int(end.code or 0), stdout.getvalue(), stderr.getvalue())


def run(
    config: Path,
    run_dir: Path,
    *options: str,
    expect: int = 0,
    devices: int = 1,
    cwd: Path | None = None,
) -> str:
    """Train to the end; the output. Fails where the exit code is another than expected."""
    argv = ["--config", str(config), "--run_dir", str(run_dir), *options]
    done = run_module("baichuan_jax.train", *argv, cwd=cwd or run_dir.parent, devices=devices)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def start_all(
    config: Path,
    run_dir: Path,
    *options: str,
    processes: int,
    devices: int,
    hosts: str | None = None,
) -> list[Launch]:
    """All processes of a run, `devices` CPU devices each; a letter of `hosts` names a host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start(
            config,
            run_dir,
            *options,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(number),
            **({} if hosts is None else {HOST_VARIABLE: hosts[number]}),
        )
        for number in range(processes)
    ]


def wait_all(processes: list[Launch], seconds: float = 240) -> list[int]:
    """Exit codes; what is still running after the time is killed."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def lines(run_dir: Path, name: str = "metrics") -> list[dict]:
    """Whole lines of a run's JSONL so far."""
    path = run_dir / f"{name}.jsonl"
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]
        if re.match(r"\{.*\}$", line)
    ]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss; fails where a repeated step came out otherwise."""
    found: dict[int, float] = {}
    for line in lines(run_dir):
        if "loss" in line:
            assert found.setdefault(line["step"], line["loss"]) == line["loss"], (
                f"step {line['step']} was repeated otherwise"
            )
    return found


def wait_for_step(process: Launch, run_dir: Path, step: int, seconds: float = 600) -> None:
    """Until the run has written this step. Fails where it ends or stalls first."""
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in lines(run_dir)):
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline, f"no step {step} within {seconds} s"
        time.sleep(0.02)


def kill(process: Launch, number: int = signal.SIGKILL) -> int:
    """Send a signal and wait for the end."""
    process.send_signal(number)
    return process.wait(120)
