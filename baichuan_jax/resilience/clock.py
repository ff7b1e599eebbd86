"""What a process is doing now and what its time went to: one clock for the heartbeat, the watchdog and the ledger."""

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
ALONE = (DATA,)  # the phases of the loop in which a process waits for no other


class Clock:
    """Seconds by phase; phases never overlap. One thread enters and leaves them, others may read."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.longest: dict[str, float] = {}
        self._stack: list[str] = ["other"]
        self._now = ("other", time.perf_counter())  # phase, entered or come back to
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
            self._stack.pop()
            self._now = (self._stack[-1], self._since)

    @property
    def now(self) -> tuple[str, float]:
        """The phase, and for how many seconds nothing but it has happened."""
        phase, since = self._now
        return phase, time.perf_counter() - since

    def add(self, phase: str, seconds: float) -> None:
        """Time that passed before this clock existed."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def totals(self) -> dict[str, float]:
        """Seconds by phase until now."""
        phase = self._stack[-1]
        return {
            **self.seconds,
            phase: self.seconds.get(phase, 0.0) + time.perf_counter() - self._since,
        }

    def _charge(self) -> None:
        now, phase = time.perf_counter(), self._stack[-1]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
