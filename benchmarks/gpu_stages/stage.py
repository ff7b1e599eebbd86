"""One stage of benchmarks/gpu.py, in a process of its own: what it is given and what it reports.

    python benchmarks/gpu_stages/stage.py NAME STATE WORK OUTPUT SECONDS full|small

The report is on disk after every addition, so a stage that is killed keeps what it had found.
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
    """What the stages work on. `small` is the rehearsal on a CPU, where Triton kernels are interpreted."""

    small: bool
    lengths: tuple[int, ...]
    """Of attention in the numerical checks."""
    workers: int
    """Processes that check numbers side by side."""
    batch: int
    length: int
    heads: int
    head_dim: int
    """Of attention where it is timed, and of the training step."""
    hidden: int
    intermediate: int
    vocab: int
    layers: int
    """Of the training step that is measured; the model has the width of Baichuan-7B."""
    loss_chunk: int
    rounds: int
    """Times that each call is timed, in turn with the others."""
    sample_seconds: float
    """Seconds of one timing: as many calls as take this long."""
    copy_bytes: int
    """Size of the array whose copy measures the memory's bandwidth."""
    train_steps: int
    train_settings: tuple[str, ...]
    """Overrides of configs/tiny.yaml for the run that is killed."""


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
    train_settings=(
        # 350 million parameters with heads of 128, as the 7B has.
        "model.hidden_size=1024",
        "model.intermediate_size=2816",
        "model.num_layers=26",
        "model.num_heads=8",
        "model.scan_layers=false",
        "model.remat=none",
        "train.context_length=1024",
        "train.global_batch_size=8",
        "train.loss_chunk_size=2048",
        "optimizer.learning_rate=3e-4",
        "optimizer.warmup_steps=10",
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
    train_settings=(
        "model.hidden_size=64",
        "model.intermediate_size=176",
        "model.num_layers=2",
        "model.num_heads=1",
        "model.scan_layers=false",
        "model.remat=none",
        "train.context_length=64",
        "train.global_batch_size=4",
        "train.loss_chunk_size=128",
        "optimizer.learning_rate=1e-3",
        "optimizer.warmup_steps=2",
    ),
)


class Stage:
    """What a stage works on and reports; every addition is written to its state file at once."""

    def __init__(self, sizes: Sizes, state: Path, work: Path, output: Path, seconds: float) -> None:
        self.sizes, self.work, self.output = sizes, work, output
        self._state, self._deadline = state, time.monotonic() + seconds
        self._report: dict[str, Any] = {
            "headline": "",
            "notes": [],
            "tables": [],
            "values": {},
            "wrong": [],
            "left_out": [],
            "lacking": False,
            "error": None,
            "finished": False,
        }
        self._save()

    @property
    def seconds_left(self) -> float:
        """Until the stage is stopped."""
        return self._deadline - time.monotonic()

    def values_of(self, stage: str) -> dict[str, Any]:
        """What an earlier stage has recorded; nothing where it has not run."""
        path = self.work / f"{stage}.json"
        return json.loads(path.read_text(encoding="utf-8"))["values"] if path.exists() else {}

    def headline(self, text: str) -> None:
        """The one line that stands in the table of all stages."""
        self._report["headline"] = text
        self._save()

    def say(self, text: str) -> None:
        """A sentence below the tables."""
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
        """Numbers behind the tables, for the JSON."""
        self._report["values"] |= values
        self._save()

    def wrong(self, what: str) -> None:
        """A number that is not what it has to be: the stage counts as wrong."""
        print("WRONG:", what, flush=True)
        self._report["wrong"].append(what)
        self._save()

    def leave_out(self, what: str, why: str, needed: bool = False) -> None:
        """Something that was not looked at, and the reason. `needed`: without it the stage is not complete."""
        print("left out:", what, "-", why, flush=True)
        self._report["left_out"].append(f"{what}: {why}")
        self._report["lacking"] = self._report["lacking"] or needed
        self._save()

    def fail(self, error: BaseException) -> None:
        """What ended the stage, in a line and as a traceback."""
        reason = f"{type(error).__name__}: {error}".strip()
        self._report |= {
            "error": "".join(traceback.format_exception(error)),
            "reason": reason.splitlines()[0],
        }
        self._save()

    def finish(self) -> None:
        self._report["finished"] = True
        self._save()

    def _save(self) -> None:
        write_atomically(self._state, json.dumps(_finite(self._report), default=str).encode())


def _finite(value: Any) -> Any:
    """The same with NaN and infinity as text: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def end_with_parent() -> None:
    """End this process and all that it has started as soon as benchmarks/gpu.py is gone: they would keep the GPU."""
    parent = int(os.environ.get("BAICHUAN_JAX_GPU_PARENT", "0"))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    name, state, work, output, seconds, size = argv
    end_with_parent()
    stage = Stage(
        SMALL if size == "small" else FULL, Path(state), Path(work), Path(output), float(seconds)
    )
    try:
        importlib.import_module(name).run(stage)
    except BaseException as error:
        stage.fail(error)
        traceback.print_exc()
        return 1
    stage.finish()
    return 0


if __name__ == "__main__":
    # The stages import this file as `stage`: one module, not two.
    from stage import main as run_stage

    sys.exit(run_stage(sys.argv[1:]))
