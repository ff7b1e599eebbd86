"""The loop's checkpoints: when one is due, how it is started and waited for, and what is said of it."""

import contextlib
import time
from collections.abc import Iterator

import jax

from baichuan_jax.checkpoint.local_copies import LocalCopies
from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.config.schema import CheckpointConfig
from baichuan_jax.resilience.causes import SaveFailed
from baichuan_jax.resilience.checkpoint_interval import seconds_between_saves, seconds_per_fault
from baichuan_jax.resilience.clock import CHECKPOINT, Clock
from baichuan_jax.resilience.exits import say
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import (
    CheckpointFailed,
    CheckpointSaved,
    LocalCopyFailed,
    LocalCopySaved,
)
from baichuan_jax.runs.metrics import Writer
from baichuan_jax.step import TrainState

FIRST_SECONDS = 60.0  # before the first save, whose cost is not known yet
RECORDED = 2  # steps after a copy's at whose figures it counts: process 0 took part in them, so it has written the copy's before
MIN_STEPS = 4  # between saves that the clock asks for; a wish for one takes two steps to be heard


class Saver:
    """Saves a run's state through `checkpoints`.

    A save that failed does not count, is reported, and ends nothing where it need not succeed;
    among several processes it ends this one with SaveFailed, since Orbax leaves the others waiting.
    `faults` so far and the `run_seconds` they came in decide how often to save, unless
    checkpoint.every does. Where there are `copies`, the state is kept on every host's own disk as
    well; one that fails there is told, and nothing ends. A copy counts once process 0 has surely
    written the figures of all steps up to it.
    """

    copies: LocalCopies | None = None

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: CheckpointConfig,
        clock: Clock,
        writer: Writer,
        display: Display,
        *,
        devices: int,
        faults: int,
        run_seconds: float,
    ) -> None:
        self._checkpoints, self._config = checkpoints, config
        self._clock, self._writer, self._display = clock, writer, display
        self._seconds_per_fault = seconds_per_fault(devices, run_seconds, faults)
        self._interval = FIRST_SECONDS
        self._began = time.monotonic()  # of the newest save
        self._blocked = 0.0
        self._step = -MIN_STEPS
        self.blocked_share: float | None = None
        self._copying: tuple[int, float, float] | None = (
            None  # step, when it began, seconds that the loop stood still for it
        )

    def due(self, step: int) -> bool:
        """Whether the settings want a checkpoint of this step; the same on all processes."""
        every, keep = self._config.every, self._config.keep_every
        return (every is not None and step % every == 0) or (keep is not None and step % keep == 0)

    def copy_due(self, step: int) -> bool:
        """Whether the settings want a copy of this step on every host."""
        return self._config.local_every is not None and step % self._config.local_every == 0

    def wanted(self) -> bool:
        """Whether, by this process's clock, it is time for one."""
        return self._config.every is None and time.monotonic() - self._began > self._interval

    def far_enough(self, step: int) -> bool:
        """Whether a wish for a save, heard at this step, is not an echo of the one before; the same on all processes."""
        return step - self._step >= MIN_STEPS

    def save(self, state: TrainState, step: int, position: int, must_succeed: bool) -> None:
        """Start a checkpoint; wait for it where it must succeed, and raise SaveFailed where it then failed."""
        self.finish(must_succeed=False)
        between = time.monotonic() - self._began
        self._step, self._began, self._blocked = step, time.monotonic(), 0.0
        with self._blocking(), self._reported(step, must_succeed):
            self._checkpoints.save(state, step, position)
        self.blocked_share = self._blocked / max(between, 1e-9)
        if must_succeed:
            self.finish(must_succeed=True)
            self._finish_copy()  # or its draft would stay behind

    def copy(self, state: TrainState, step: int, position: int) -> None:
        """Start a copy of the state on every host's own disk."""
        assert self.copies is not None
        self._finish_copy()
        began = time.monotonic()
        with self._clock(CHECKPOINT):
            self.copies.save(state, step, position)
        self._copying = step, began, time.monotonic() - began

    def _finish_copy(self) -> None:
        if self.copies is None or self._copying is None:
            return
        (step, began, blocked), self._copying = self._copying, None
        waited = time.monotonic()
        try:
            with self._clock(CHECKPOINT):
                self.copies.finish()
        except Exception as error:
            self._writer.event(LocalCopyFailed(step=step, reason=str(error)))
            say(
                f"the copy of step {step} in checkpoint.local_dir failed and does not count: {error}"
            )
            return
        now = time.monotonic()
        self._writer.event(
            LocalCopySaved(
                step=step,
                seconds=round(now - began, 3),
                blocked_seconds=round(blocked + now - waited, 4),
            )
        )

    def poll(self, recorded: int) -> None:
        """Notice that what is being saved is whole, as soon as it is. `recorded`: the step whose figures came last."""
        counts = self._copying is not None and recorded >= self._copying[0] + RECORDED
        if counts and self.copies is not None and not self.copies.is_saving():
            self._finish_copy()
        if self._checkpoints.saving is not None and not self._checkpoints.is_saving():
            self.finish(must_succeed=False)

    def finish(self, must_succeed: bool) -> None:
        """Wait for the save under way, if there is one."""
        saving = self._checkpoints.saving
        if saving is None:
            return
        with self._blocking(), self._reported(saving, must_succeed):
            self._checkpoints.finish()
            duration = time.monotonic() - self._began
            self._interval = seconds_between_saves(self._blocked, duration, self._seconds_per_fault)
            self._writer.event(
                CheckpointSaved(
                    step=saving,
                    seconds=round(duration, 3),
                    blocked_seconds=round(self._blocked, 4),
                    blocked_share=self.blocked_share,
                    next_in_seconds=self._interval if self._config.every is None else None,
                )
            )

    @contextlib.contextmanager
    def _blocking(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._clock(CHECKPOINT):
            yield
        self._blocked += time.perf_counter() - began

    @contextlib.contextmanager
    def _reported(self, step: int, must_succeed: bool) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writer.event(CheckpointFailed(step=step, reason=str(error)))
            self._display.say(f"checkpoint {step} failed and does not count: {error}", style="red")
            if must_succeed or jax.process_count() > 1:
                raise SaveFailed(
                    f"checkpoint {step} could not be written: {type(error).__name__}: {error}"
                ) from error
