"""Start the real program in real processes, for the tests that kill it."""

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from baichuan_jax.resilience.placement import HOST_VARIABLE

REPOSITORY = Path(__file__).parents[1]
COMPILED = tempfile.mkdtemp(
    prefix="compiled-"
)  # programs that one test's process has compiled need no other's time
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
SAMPLE = REPOSITORY / "baichuan_jax" / "data" / "sample"


def write_config(folder: Path, **settings: str) -> Path:
    """A configuration that compiles in seconds and steps in milliseconds, on a slice of the bundled text."""
    import gzip

    for name in ("train-en", "train-zh", "validation-en"):
        with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [next(file) for _ in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{vocab_size: 512, hidden_size: 64, intermediate_size: 176, num_layers: 2, num_heads: 4, dtype: float32, remat: none}}
train: {{num_steps: 60, context_length: 64, global_batch_size: 8, loss_chunk_size: 256}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 5}}
tokenizer: {{vocab_size: 512}}
data:
  train: {{"{folder}/train-en.jsonl": 1.0, "{folder}/train-zh.jsonl": 2.0}}
  validation: {{"{folder}/validation-en.jsonl": 1.0}}
  cache_dir: "{folder}/cache"
checkpoint: {{every: 5, keep_last: 2}}
evaluate: {{every: 30, num_batches: 2}}
metrics: {{tensorboard: false}}
""",
        encoding="utf-8",
    )
    return path


def command(config: Path, run_dir: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "baichuan_jax.train",
        "--config",
        str(config),
        "--run_dir",
        str(run_dir),
        *words,
    ]


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": COMPILED,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA warns of every program that it takes from there
        **variables,
    }


def start(
    config: Path, run_dir: Path, *words: str, devices: int = 1, **variables: str
) -> subprocess.Popen:
    """One process of a training run, output kept in run_dir's sibling NAME.log."""
    with open(run_dir.with_suffix(f".{variables.get('JAX_PROCESS_ID', '0')}.log"), "a") as log:
        return subprocess.Popen(
            command(config, run_dir, *words),
            env=environment(devices, **variables),
            stdout=log,
            stderr=log,
            cwd=run_dir.parent,
        )


def run(
    config: Path,
    run_dir: Path,
    *words: str,
    expect: int = 0,
    devices: int = 1,
    cwd: Path | None = None,
) -> str:
    """Run to its end; its output. Fails where the exit code is another than expected."""
    done = subprocess.run(
        command(config, run_dir, *words),
        env=environment(devices),
        cwd=cwd or run_dir.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def start_all(
    config: Path, run_dir: Path, *words: str, processes: int, devices: int, hosts: str | None = None
) -> list[subprocess.Popen]:
    """All processes of a run on this machine, `devices` CPU devices each; a letter of `hosts` names the host of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start(
            config,
            run_dir,
            *words,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(number),
            **({} if hosts is None else {HOST_VARIABLE: hosts[number]}),
        )
        for number in range(processes)
    ]


def wait_all(processes: list[subprocess.Popen], seconds: float = 240) -> list[int]:
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


def wait_for_step(
    process: subprocess.Popen, run_dir: Path, step: int, seconds: float = 600
) -> None:
    """Until the run has written this step. Fails where it ends or stalls first."""
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in lines(run_dir)):
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline, f"no step {step} within {seconds} s"
        time.sleep(0.02)


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> int:
    """Send a signal and wait for the end."""
    process.send_signal(number)
    return process.wait(120)
