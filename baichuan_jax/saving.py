"""The loop's checkpoints: started, waited for, and reported; one that failed does not count and ends nothing."""

import contextlib
from collections.abc import Iterator

from baichuan_jax.checkpoint import Checkpoints
from baichuan_jax.console import Display
from baichuan_jax.metrics import Writer
from baichuan_jax.resilience.clock import CHECKPOINT, Clock
from baichuan_jax.step import TrainState


class Saver:
    """Saves a run's state through `checkpoints`, and says what became of it."""

    def __init__(self, checkpoints: Checkpoints, clock: Clock, writer: Writer, display: Display) -> None:
        self._checkpoints, self._clock, self._writer, self._display = checkpoints, clock, writer, display

    def save(self, state: TrainState, step: int, position: int, must_succeed: bool) -> None:
        """Start a checkpoint; wait for it where it must succeed, and raise where it then failed."""
        self.finish(must_succeed=False)
        with self._clock(CHECKPOINT), self._reported(step, must_succeed):
            self._checkpoints.save(state, step, position)
        if must_succeed:
            self.finish(must_succeed=True)

    def finish(self, must_succeed: bool) -> None:
        """Wait for the save under way, if there is one."""
        saving = self._checkpoints.saving
        if saving is None:
            return
        with self._clock(CHECKPOINT), self._reported(saving, must_succeed):
            self._checkpoints.finish()
            self._writer.event("checkpoint", step=saving)

    @contextlib.contextmanager
    def _reported(self, step: int, must_succeed: bool) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writer.event("checkpoint_failed", step=step, reason=str(error))
            self._display.say(f"checkpoint {step} failed and does not count: {error}", style="red")
            if must_succeed:
                raise
