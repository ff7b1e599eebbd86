"""Where the metrics of a run are written: metrics.jsonl, TensorBoard, Weights & Biases.

No failure of any of them ends a launch. What a disk refuses waits in memory, in its order, and is
written when there is room. Weights & Biases has a thread of its own, since any of its calls may
raise or hang; what it loses is in metrics.jsonl.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import queue
import re
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baichuan_jax.config.parsing import read_text, show
from baichuan_jax.config.schema import Config, ConfigError, require
from baichuan_jax.runs.events import Event
from baichuan_jax.runs.files import Appender, process_stat, write_atomically
from baichuan_jax.runs.folder import Run, refuse_outside
from baichuan_jax.runs.private import require_file

# How long the end of a launch waits for Weights & Biases to send what it has.
WANDB_SECONDS = 60.0
# Steps that may wait for Weights & Biases; those after them are left out there.
WANDB_QUEUE = 10_000


def seconds_since_process_start() -> float:
    """Age of this process where the system tells (Linux), else 0: the time that imports took."""
    try:
        # Field 22 of all: the start, in ticks since boot.
        started = int(process_stat(os.getpid())[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return 0.0


class Writer:
    """Writes metrics.jsonl and events.jsonl of a run, small files of its folder, and the trackers.

    Only process 0 is `active`; on others every method does nothing. Each line is written at once,
    so that a killed run has all its lines. `warn` shows what cannot be written. Raises ConfigError
    where metrics.wandb_project is set and the wandb package is missing.
    """

    def __init__(
        self, run_path: Path, config: Config, warn: Callable[[str], None], active: bool = True
    ) -> None:
        self._path, self._config, self._warn, self._active = run_path, config, warn, active
        self._metrics = Appender(run_path / "metrics.jsonl")
        self._events = Appender(run_path / "events.jsonl")
        self._tensorboard: _TensorBoard | None = None
        self._wandb: _WandB | None = None
        # Small files that could not be written yet.
        self._files: dict[Path, bytes] = {}
        # Files whose last write failed: each outage is shown once.
        self._failing: set[Path] = set()
        if not active:
            return
        for file in self._appenders():
            require_file(file.path)
        if config.metrics.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"metrics.wandb_project={config.metrics.wandb_project!r} needs the wandb package: "
                "pip install wandb"
            )
        if config.metrics.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            # No error: it is on by default, and metrics.jsonl has the same numbers.
            warn(
                "TensorBoard events are not written: tensorboardX is not installed; pip install "
                "tensorboardX, or turn them off with --metrics.tensorboard false"
            )

    def begin(self, first_step: int) -> None:
        """Open the trackers of a launch whose first step is this one.

        The launches of a run are one run there: TensorBoard hides what was written of this step
        and later ones before, and Weights & Biases goes on with the same run.
        """
        metrics = self._config.metrics
        if not self._active:
            return
        if metrics.tensorboard and importlib.util.find_spec("tensorboardX") is not None:
            self._tensorboard = _TensorBoard(self._path / "tensorboard", first_step)
        if metrics.wandb_project is not None:
            self._wandb = _WandB(self._path, self._config)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One line for a step or an evaluation; a number that is not finite is written as null.

        JSON has no word for NaN, and readers in other languages refuse Python's.
        """
        if not self._active:
            return
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._append(self._metrics, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        # TensorBoard and Weights & Biases take numbers only; a bool is an int to Python.
        numbers = {
            k: v
            for k, v in finite.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
        if self._tensorboard is not None:
            self._append(self._tensorboard.file, self._tensorboard.record(step, numbers))
        if self._wandb is not None:
            self._wandb.log(step, numbers)
            self._show_failure_of_wandb()
        for path in list(self._files):
            self._try(path)

    def event(self, event: Event) -> None:
        """One line of events.jsonl."""
        if self._active:
            self._append(self._events, event.to_line())

    def require_events(self) -> None:
        """Raise OSError where an event waits: without its first one a run is not known again."""
        if self._active and (error := self._events.flush()) is not None:
            raise error

    def file(self, path: Path, content: bytes) -> None:
        """Write a small file whole; where that fails, it is tried again with every later line."""
        if self._active:
            self._files[path] = content
            self._try(path)

    def close(self) -> list[str]:
        """Write what waits, and end the trackers.

        Returns what is lost of the run's own files: the disk refused it to the end.
        """
        if self._wandb is not None:
            self._wandb.finish(WANDB_SECONDS)
            self._show_failure_of_wandb()
        lost = []
        for file in self._appenders():
            error = file.flush() if file.waiting else None
            self._note(file.path, error)
            file.close()
            if error is not None and file.waiting:
                lost.append(f"{len(file.waiting)} records of {file.path} ({error.strerror})")
        for path in list(self._files):
            if (error := self._try(path)) is not None:
                lost.append(f"{path} ({error.strerror})")
        return lost

    def _appenders(self) -> list[Appender]:
        if not self._active:
            return []
        trackers = [] if self._tensorboard is None else [self._tensorboard.file]
        return [self._metrics, self._events, *trackers]

    def _append(self, file: Appender, record: bytes) -> None:
        self._note(file.path, file.add(record))

    def _try(self, path: Path) -> OSError | None:
        """Write a small file that waits."""
        error = None
        try:
            write_atomically(path, self._files[path])
        except OSError as caught:
            error = caught
        else:
            del self._files[path]
        self._note(path, error)
        return error

    def _note(self, path: Path, error: OSError | None) -> None:
        """Show that an outage of a file begins or ends."""
        if error is not None and path not in self._failing:
            self._failing.add(path)
            self._warn(
                f"{path} cannot be written ({error.strerror}); the run goes on, and what belongs "
                "there is kept in memory and written when it can be"
            )
        elif error is None and path in self._failing:
            self._failing.discard(path)
            self._warn(f"{path} is written again; nothing of it is lost")

    def _show_failure_of_wandb(self) -> None:
        if self._wandb is not None and (failure := self._wandb.failure()) is not None:
            self._warn(f"Weights & Biases: {failure}; metrics.jsonl has every step")


class _TensorBoard:
    """The event file of one launch: records that an Appender writes.

    tensorboardX's own writer is not used: its thread ends at the first write that fails, and the
    eleventh number after that waits for it for ever.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        self.file = Appender(folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}")
        # Here, since the import takes half a second.
        from tensorboardX.proto import event_pb2, summary_pb2

        events: Any = event_pb2
        self._event, self._summary = events.Event, summary_pb2
        start = events.SessionLog(status=events.SessionLog.START)
        # In front of the first record: all that was written of first_step and later is hidden.
        self._head = self._framed(file_version="brain.Event:2")
        self._head += self._framed(step=first_step, session_log=start)

    def record(self, step: int, numbers: Mapping[str, float]) -> bytes:
        """The record of a step's numbers, as it stands in the file."""
        summary: Any = self._summary
        values = [summary.Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        head, self._head = self._head, b""
        return head + self._framed(step=step, summary=summary.Summary(value=values))

    def _framed(self, **fields: Any) -> bytes:
        """A record of TensorFlow's format: length, content, and a checksum behind each of them."""
        from tensorboardX.record_writer import masked_crc32c

        content = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        return length + sums[0] + content + sums[1]


class _WandB:
    """One Weights & Biases run, however many launches the run has.

    `log` puts a step into a queue and returns; a thread makes all calls, in order. After a call
    that raised no other is made. Steps that an earlier launch has logged are not logged again:
    Weights & Biases takes steps in their order only.
    """

    def __init__(self, run_path: Path, config: Config) -> None:
        self._path, self._config = run_path, config
        self._logged = max((line["step"] for line in Run(run_path).metrics), default=0)
        self._calls: queue.Queue[Callable[[Any], object] | None] = queue.Queue(WANDB_QUEUE)
        self._failure: str | None = None
        self._left_out = 0
        # A daemon: a call that never returns must not keep the process.
        self._thread = threading.Thread(target=self._make_calls, daemon=True, name="wandb")
        self._thread.start()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step beside the training."""
        if step <= self._logged:
            return
        try:
            if self._thread.is_alive():
                self._calls.put_nowait(lambda run: run.log(numbers, step=step))
                return
        except queue.Full:
            pass
        self._left_out += 1

    def finish(self, seconds: float) -> None:
        """Wait this long until all is sent."""
        deadline = time.monotonic() + seconds
        # Full where the thread has ended or hangs.
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=seconds if self._thread.is_alive() else 0.0)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._failure = (
                f"it has not finished within {seconds:.0f} s; what it has not sent may be in "
                f"{self._path / 'wandb'}"
            )
        if self._left_out:
            before = f"{self._failure}; " if self._failure else ""
            self._failure = f"{before}{self._left_out} steps are left out"

    def failure(self) -> str | None:
        """What has failed since the last call."""
        failure, self._failure = self._failure, None
        return failure

    def _make_calls(self) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]

            run = wandb.init(
                project=self._config.metrics.wandb_project,
                name=self._path.name,
                id=_identity(self._path / "wandb" / "id.txt"),
                resume="allow",
                dir=str(self._path),
                config=dataclasses.asdict(self._config),
            )
            while (call := self._calls.get()) is not None:
                call(run)
            run.finish()
        # Of any type, and SystemExit too: it must never end more than itself.
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}; nothing more is sent"


def _identity(file: Path) -> str:
    """The run's name at Weights & Biases: made by its first launch, and kept in its folder."""
    refuse_outside(file.parents[1], file)
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex.encode())
    found = read_text(file).strip()
    require(
        re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found) is not None,
        f"{file} holds {show(found)} and no name of a run; delete it, and a new run begins there",
    )
    return found
