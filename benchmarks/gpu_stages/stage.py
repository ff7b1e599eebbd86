"""One stage of benchmarks/gpu.py in a process of its own: its inputs and its report.

    python benchmarks/gpu_stages/stage.py NAME STATE WORK OUTPUT SECONDS full|small

NAME is a module of this folder with `run(stage)`. The stage reads its sizes and its time from
`stage`, and adds headlines, tables, numbers and errors to it. Every addition is on disk at once
(STATE), so a stage that is killed keeps its results until then.
"""

import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
for folder in (REPOSITORY / "tests", REPOSITORY / "benchmarks", Path(__file__).parent, REPOSITORY):
    sys.path.insert(0, str(folder))

from baichuan_jax.runs.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all stages. `small`: the rehearsal on a CPU, with Triton kernels interpreted."""

    small: bool
    # Of attention in the numerical checks, and how many processes check at once.
    lengths: tuple[int, ...]
    workers: int
    # Of attention where it is timed, and of the training step.
    batch: int
    length: int
    heads: int
    head_dim: int
    # Of the training step that is timed: the width of Baichuan-7B, with fewer blocks.
    hidden: int
    intermediate: int
    vocab: int
    layers: int
    loss_chunk: int
    # How often each call is sampled, in turn with the others, and how long one sample takes.
    rounds: int
    sample_seconds: float
    # The array whose copy measures the memory's bandwidth.
    copy_bytes: int
    # The run that is killed: its steps, and its overrides of configs/tiny.yaml.
    train_steps: int
    train_settings: tuple[str, ...]


def settings(hidden: int, intermediate: int, layers: int, heads: int, **others: str) -> tuple:
    """Overrides of configs/tiny.yaml for a model of these sizes, all activations kept."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers}
    model = {**sizes, "num_heads": heads, "scan_layers": "false", "remat": "none"}
    return (
        *(f"model.{name}={value}" for name, value in model.items()),
        *(f"{name.replace('__', '.')}={value}" for name, value in others.items()),
    )


FULL = Sizes(
    small=False,
    lengths=(1, 127, 4095, 4096, 8192),
    workers=8,
    batch=2,
    length=4096,
    heads=32,
    head_dim=128,
    hidden=4096,
    intermediate=11008,
    vocab=64000,
    layers=4,
    loss_chunk=2048,
    rounds=5,
    sample_seconds=0.03,
    copy_bytes=2**31,
    train_steps=100,
    # 350 million parameters with heads of 128, as the 7B has.
    train_settings=settings(
        *(1024, 2816, 26, 8),
        train__context_length="1024",
        train__global_batch_size="8",
        train__loss_chunk_size="2048",
        optimizer__learning_rate="3e-4",
        optimizer__warmup_steps="10",
    ),
)
SMALL = Sizes(
    small=True,
    lengths=(1, 40, 127),
    workers=2,
    batch=1,
    length=64,
    heads=2,
    head_dim=64,
    hidden=128,
    intermediate=344,
    vocab=512,
    layers=2,
    loss_chunk=64,
    rounds=1,
    sample_seconds=0.0,
    copy_bytes=2**24,
    train_steps=20,
    train_settings=settings(
        *(64, 176, 2, 1),
        train__context_length="64",
        train__global_batch_size="4",
        train__loss_chunk_size="128",
        optimizer__learning_rate="1e-3",
        optimizer__warmup_steps="2",
    ),
)


class Stage:
    """A stage's sizes, folders and time, and its report, which is written at every addition."""

    def __init__(self, sizes: Sizes, state: Path, work: Path, output: Path, seconds: float) -> None:
        self.sizes, self.work, self.output = sizes, work, output
        self._state, self._deadline = state, time.monotonic() + seconds
        lists = ("notes", "tables", "wrong", "left_out")
        self._report: dict[str, Any] = {name: [] for name in lists}
        self._report |= {"headline": "", "values": {}, "error": None}
        self._report |= {"lacking": False, "finished": False}
        self._save()

    @property
    def seconds_left(self) -> float:
        """Until the stage is stopped."""
        return self._deadline - time.monotonic()

    def values_of(self, stage: str) -> dict[str, Any]:
        """The numbers that an earlier stage recorded; empty where it has not run."""
        path = self.work / f"{stage}.json"
        return json.loads(path.read_text(encoding="utf-8"))["values"] if path.exists() else {}

    def headline(self, text: str) -> None:
        """Set the line of this stage in the table of all stages."""
        self._report["headline"] = text
        self._save()

    def say(self, text: str) -> None:
        """Add a sentence below the tables."""
        print(text, flush=True)
        self._report["notes"].append(text)
        self._save()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Add a table, or replace the one of this title."""
        print(title, columns, *rows, sep="\n", flush=True)
        tables = [table for table in self._report["tables"] if table["title"] != title]
        self._report["tables"] = [*tables, {"title": title, "columns": columns, "rows": rows}]
        self._save()

    def record(self, **values: Any) -> None:
        """Add numbers to results.json."""
        self._report["values"] |= values
        self._save()

    def wrong(self, what: str) -> None:
        """Report a wrong result: the outcome of the stage becomes "wrong"."""
        print("WRONG:", what, flush=True)
        self._report["wrong"].append(what)
        self._save()

    def leave_out(self, what: str, why: str, needed: bool = False) -> None:
        """Report something that was not checked, and the reason.

        `needed`: the outcome of the stage becomes "incomplete".
        """
        print("left out:", what, "-", why, flush=True)
        self._report["left_out"].append(f"{what}: {why}")
        self._report["lacking"] = self._report["lacking"] or needed
        self._save()

    def fail(self, error: BaseException) -> None:
        """Report the exception that ended the stage, as a line and as a traceback."""
        reason = f"{type(error).__name__}: {error}".strip()
        self._report["error"] = "".join(traceback.format_exception(error))
        self._report["reason"] = reason.splitlines()[0]
        self._save()

    def finish(self) -> None:
        """Report that the stage reached its end."""
        self._report["finished"] = True
        self._save()

    def _save(self) -> None:
        write_atomically(self._state, json.dumps(_finite(self._report), default=str).encode())


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as text, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def end_with_parent() -> None:
    """End this process and its children when benchmarks/gpu.py ends: they would keep the GPU."""
    parent = int(os.environ.get("BAICHUAN_JAX_GPU_PARENT", "0"))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    """Run one stage; 1 where it raises."""
    name, state, work, output, seconds, size = argv
    end_with_parent()
    sizes = SMALL if size == "small" else FULL
    stage = Stage(sizes, Path(state), Path(work), Path(output), float(seconds))
    try:
        importlib.import_module(name).run(stage)
    except BaseException as error:
        stage.fail(error)
        traceback.print_exc()
        return 1
    stage.finish()
    return 0


if __name__ == "__main__":
    # The stages import this file as `stage`. Without this line it would exist twice.
    from stage import main as run_stage

    sys.exit(run_stage(sys.argv[1:]))
