"""When to save: by the settings, on request, and at the end; the same answer on all processes.

In: the number of steps done and the largest control request of all processes. Out: which tiers save
this step. Storage is due every `checkpoint.every` steps and at multiples of `keep_every`; without
`every`, process 0's clock and the Young/Daly interval (resilience/checkpoint_interval.py) make it
request a save, which all processes hear with the same step. Hosts' own copies are due every
`checkpoint.local_every` steps.
"""

import dataclasses
import time

from baichuan_jax.config.schema import Config
from baichuan_jax.resilience.checkpoint_interval import seconds_between_saves
from baichuan_jax.step import Request

# The interval before the first save by the clock, when the cost of a save is not known yet.
FIRST_SECONDS = 60.0
# Between two saves by the clock. A request is heard two steps after it was made, and until then the
# process repeats it: without this gap one request would save twice.
MIN_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Due:
    """What to save of a step. `must_succeed`: the launch ends here and waits for it."""

    storage: bool = False
    local: bool = False
    must_succeed: bool = False

    def __bool__(self) -> bool:
        return self.storage or self.local


class Schedule:
    """Decides for one launch when a save is due. `seconds_per_fault`: mean time between faults."""

    def __init__(self, config: Config, seconds_per_fault: float) -> None:
        self._config, self._num_steps = config.checkpoint, config.train.num_steps
        self._seconds_per_fault = seconds_per_fault
        self._interval = FIRST_SECONDS
        # When the newest save on storage began, or the launch.
        self._began = time.monotonic()
        # As if a save lay that far back: the launch's first request counts.
        self._step = -MIN_STEPS

    def due(self, step: int, request: Request) -> Due:
        """The saves that are due after `step` steps; the same on all processes."""
        last, stop = step == self._num_steps, request is Request.STOP
        every, keep = self._config.every, self._config.keep_every
        # keep_every too: without `every`, the clock would hardly ever hit a multiple of it.
        regular = any(period is not None and step % period == 0 for period in (every, keep))
        asked = request is Request.SAVE and step - self._step >= MIN_STEPS
        local = self._config.local_every
        return Due(
            storage=last or stop or regular or asked,
            # Where the launch ends, storage has the step: a copy would be older than it at once.
            local=local is not None and step % local == 0 and not (last or stop),
            must_succeed=last or stop,
        )

    def wanted(self) -> bool:
        """Whether it is time for a save by this process's clock."""
        waited = time.monotonic() - self._began
        return self._config.every is None and waited > self._interval

    def begin(self, step: int) -> float:
        """A save of this step begins on storage; the seconds since the one before began."""
        now = time.monotonic()
        between, self._began, self._step = now - self._began, now, step
        return between

    def took(self, blocked: float, duration: float) -> float | None:
        """Learn what a save cost; the seconds to the next one, None where steps decide."""
        self._interval = seconds_between_saves(blocked, duration, self._seconds_per_fault)
        return self._interval if self._config.every is None else None
