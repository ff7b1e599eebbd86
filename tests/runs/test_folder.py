"""What is read of a run's folder: nothing outside of it, and nothing without a limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.report.recorded import TESTS, _results
from baichuan_jax.resilience.launch_files import Launches, Report
from baichuan_jax.runs import folder
from baichuan_jax.runs.folder import Run, read_own, refuse_links_in_run, refuse_outside
from baichuan_jax.runs.metrics import _identity

READERS = {
    "config.yaml": lambda run: run.settings,
    "metrics.jsonl": lambda run: run.metrics,
    "events.jsonl": lambda run: run.events,
    "attempts/1/process-0.json": lambda run: Launches(run.path / "attempts")[1].reports(),
    "attempts/hosts/a.json": lambda run: Launches(run.path / "attempts").read_heartbeats(),
    "evaluations/mmlu/result.json": lambda run: _results(run.path, TESTS),
    "wandb/id.txt": lambda run: _identity(run.path / "wandb" / "id.txt"),
}


def write_run(path: Path) -> Run:
    """A run with one file for each reader."""
    for name in READERS:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text("run_dir: x\n")
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    (path / "events.jsonl").write_text(
        '{"time": 1.0, "kind": "restored", "step": 1, "position": 1}\n'
    )
    (path / "attempts/1/process-0.json").write_text(Report(0, "a").to_json())
    (path / "attempts/hosts/a.json").write_text("{}")
    (path / "evaluations/mmlu/result.json").write_text('{"scored": false}')
    (path / "wandb/id.txt").write_text("abc")
    return Run(path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("how", ["file", "folder", "relative", "missing"])
def test_a_link_out_of_the_run_is_not_read(tmp_path, name, how):
    run = write_run(tmp_path / "run")
    file = run.path / name
    assert READERS[name](run)
    moved = file if how in ("file", "relative", "missing") else file.parent
    if moved == run.path:
        pytest.skip("the run's own folder may be a link")
    if how == "missing" and name.startswith("evaluations"):
        pytest.skip("a glob finds no such file")
    outside = tmp_path / "outside"
    moved.rename(outside)
    target = "../" * (len(Path(name).parts) - 1) + "../outside"
    moved.symlink_to(target if how == "relative" else outside)
    if how == "missing":
        outside.unlink()
    with pytest.raises(ConfigError, match=rf"{file.name} is a link out of the run's folder"):
        READERS[name](run)


@pytest.mark.parametrize("name", READERS)
def test_links_inside_of_the_run_and_to_it_are_followed(tmp_path, name):
    run = write_run(tmp_path / "run")
    (run.path / name).rename(run.path / "kept")
    (run.path / name).symlink_to(run.path / "kept")
    (tmp_path / "link").symlink_to(run.path)
    for path in (run.path, tmp_path / "link"):
        assert READERS[name](Run(path))


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    (run.path / "checkpoints").symlink_to(tmp_path / "disk")
    refuse_links_in_run(run.path)
    refuse_outside(run.path / "checkpoints", run.path / "checkpoints" / "1" / "x")
    (run.path / "attempts").rename(tmp_path / "attempts")
    (run.path / "attempts").symlink_to(tmp_path / "attempts")
    with pytest.raises(ConfigError, match="attempts is a link out"):
        refuse_links_in_run(run.path)


def test_a_file_is_read_up_to_a_limit(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    # A file with a hole takes no room on the disk.
    for name in ("config.yaml", "evaluations/mmlu/result.json"):
        os.truncate(run.path / name, 1 << 36)
        with pytest.raises(ConfigError, match=rf"{Path(name).name} has over .* bytes"):
            READERS[name](run)
    with pytest.raises(ConfigError, match=r"has over 5 bytes \(25\)"):
        read_own(run.path, run.path / "metrics.jsonl", 5)
    for name in ("metrics.jsonl", "events.jsonl"):
        before = (run.path / name).read_bytes()
        with open(run.path / name, "ab") as file:
            file.truncate(1 << 36)
        with pytest.raises(ConfigError, match=rf"{name}, line 2 has over 16,777,216 bytes"):
            READERS[name](run)
        (run.path / name).write_bytes(before * 4)
    for limit, name in {"MOST_METRICS": "metrics.jsonl", "MOST_EVENTS": "events.jsonl"}.items():
        monkeypatch.setattr(folder, limit, 3)
        with pytest.raises(ConfigError, match=rf"{name} has over 3 lines"):
            READERS[name](run)


@pytest.mark.slow
def test_a_run_of_a_million_steps_opens(tmp_path):
    """Names of metrics are one text in all lines: they would take more than the numbers."""
    line = {"step": 1, "time": 1e9, "loss": 3.0, "perplexity": 20.0, "grad_norm": 1.0}
    line |= {"learning_rate": 1e-3, "step_seconds": 1.0, "tokens": 512, "tokens_per_second": 512.0}
    line |= {"mfu": 0.5, "data_wait_seconds": 0.1, "memory_gib": 1.0}
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1_000_000):
            file.write(json.dumps({**line, "step": step}) + "\n")
    # Not ru_maxrss, which begins with what this process has.
    program = (
        "import re, sys; from baichuan_jax.runs.folder import Run; "
        "print(len(Run(sys.argv[1]).metrics)); "
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    count, mebibytes = map(int, done.stdout.split())
    assert count == 1_000_000
    assert mebibytes < 1500
