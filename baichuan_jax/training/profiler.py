"""Profiler traces of the steps that the settings or SIGUSR1 ask for."""

from pathlib import Path

import jax

from baichuan_jax.config.schema import ProfileConfig

# Steps that SIGUSR1 traces: a single one may be unusual.
STEPS_ON_DEMAND = 3


class Profiler:
    """Writes jax.profiler traces into `folder`.

    `until`: the last step of the trace under way; None where there is none.
    """

    def __init__(self, config: ProfileConfig, folder: Path, num_steps: int) -> None:
        self.folder, self.until = folder, None
        self._steps, self._num_steps = config.steps, num_steps
        self._requested = False

    def request(self) -> None:
        """Trace the next steps; may be called from a signal's handler."""
        self._requested = True

    def before(self, step: int) -> None:
        """Start a trace where one is due with this step (the first is 1)."""
        due = self._requested or (self._steps and self._steps[0] == step)
        if self.until is not None or not due:
            return
        last = step + STEPS_ON_DEMAND - 1 if self._requested else self._steps[1]
        # First: a trace that cannot start is not tried again with the next step.
        self._requested = False
        jax.profiler.start_trace(str(self.folder))
        self.until = min(last, self._num_steps)

    def stop(self) -> None:
        """End the trace under way, and write it."""
        # First: a trace that cannot be written is over too.
        self.until = None
        jax.profiler.stop_trace()
