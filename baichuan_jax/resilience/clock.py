"""The clock of a process: what it is doing now, and what its time went to.

Every moment belongs to one phase. The heartbeat publishes the phase, the watchdog compares its age
with a limit, and the goodput accounting adds the phases up. Phases nest, and an inner one stops the
outer one's time, so that they add up to the time that passed.
"""

import contextlib
import time
from collections.abc import Iterator

# The phases of the loop. All others (imports, start, restore, compile, ...) belong to a launch's
# beginning or its end.
DATA, DISPATCH, WAIT, CHECKPOINT, EVALUATE = LOOP = (
    "data",
    "dispatch",
    "wait",
    "checkpoint",
    "evaluate",
)
# The phases of the loop in which a process waits for no other.
ALONE = (DATA,)


class Clock:
    """Seconds by phase. One thread enters and leaves phases, others may read."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.longest: dict[str, float] = {}
        self._stack: list[str] = ["other"]
        # The phase and when it was entered or come back to: one tuple, so that another thread
        # never reads the phase of one moment and the time of another.
        self._now = ("other", time.perf_counter())
        self._since = self._now[1]

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._charge()
        self._stack.append(phase)
        self._now = (phase, self._since)
        try:
            yield
        finally:
            began = self._now[1]
            self._charge()
            self.longest[phase] = max(self.longest.get(phase, 0.0), self._since - began)
            # The outer phase counts from here on: its age is the time without any change.
            self._stack.pop()
            self._now = (self._stack[-1], self._since)

    @property
    def now(self) -> tuple[str, float]:
        """The phase, and for how many seconds the process has been in it without a change."""
        phase, since = self._now
        return phase, time.perf_counter() - since

    def add(self, phase: str, seconds: float) -> None:
        """Add time that passed before this clock existed, as imports do."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def totals(self) -> dict[str, float]:
        """Seconds by phase until now."""
        phase = self._stack[-1]
        running = time.perf_counter() - self._since
        return {**self.seconds, phase: self.seconds.get(phase, 0.0) + running}

    def _charge(self) -> None:
        now, phase = time.perf_counter(), self._stack[-1]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
