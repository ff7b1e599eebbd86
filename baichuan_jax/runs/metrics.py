"""Where the metrics of a run are written: metrics.jsonl, TensorBoard, Weights & Biases."""

import dataclasses
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.runs.events import Event, drop_unfinished_line


def seconds_since_process_start() -> float:
    """Age of this process where the system tells (Linux), else 0: the time that imports took."""
    try:
        # Field 22: the start, in ticks since boot. Counted from behind the program's name, which
        # stands in parentheses and may hold spaces.
        started = int(
            Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        ) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return 0.0


class Writer:
    """Appends to metrics.jsonl and events.jsonl of a run, to TensorBoard and to Weights & Biases.

    Only process 0 is `active`; on others every method does nothing. Each line is flushed, so that
    a killed run has all its lines. `warnings`: what is not written although the settings say so,
    for the caller to show.
    """

    def __init__(self, run_path: Path, config: Config, active: bool = True) -> None:
        self._files: dict[str, Any] = {}
        self._tensorboard = self._wandb = None
        self.warnings: list[str] = []
        if not active:
            return
        if config.metrics.wandb_project is not None:
            self._wandb = _wandb_run(run_path, config)
        if config.metrics.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            # No error: it is on by default, and metrics.jsonl has the same numbers.
            self.warnings.append(
                "TensorBoard events are not written: tensorboardX is not installed; pip install "
                "tensorboardX, or turn them off with --metrics.tensorboard false"
            )
        elif config.metrics.tensorboard:
            # Here, since its import takes half a second.
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_path / "tensorboard"))
        # Kept open: opening a file on network storage at every step would cost more than the line.
        for name in ("metrics", "events"):
            file = open(run_path / f"{name}.jsonl", "a+b")  # noqa: SIM115
            # The step that half a line describes is done again and written again.
            drop_unfinished_line(file)
            self._files[name] = file

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One line for a step or an evaluation; a number that is not finite is written as null.

        JSON has no word for NaN, and readers in other languages refuse Python's.
        """
        if not self._files:
            return
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._write("metrics", (json.dumps(line, ensure_ascii=False) + "\n").encode())
        # TensorBoard and Weights & Biases take numbers only; a bool is an int to Python.
        numbers = {
            k: v
            for k, v in finite.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def event(self, event: Event) -> None:
        """One line of events.jsonl."""
        if self._files:
            self._write("events", event.to_line())

    def _write(self, name: str, line: bytes) -> None:
        self._files[name].write(line)
        self._files[name].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(run_path: Path, config: Config) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"metrics.wandb_project={config.metrics.wandb_project!r} needs the wandb package: "
            "pip install wandb"
        ) from None
    return wandb.init(
        project=config.metrics.wandb_project,
        name=run_path.name,
        dir=str(run_path),
        config=dataclasses.asdict(config),
    )
