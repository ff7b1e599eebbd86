"""The numerics guard: what a spike is, and what a launch does after one that ended by bad numbers.

Spikes. Input: the loss and the gradient norm of every step. A value is a spike when it is far above
the last steps: above median + k * 1.4826 * MAD (the median absolute deviation; times 1.4826 it is
the standard deviation of a normal distribution). Unlike mean and deviation, these are not moved by
the spike itself.

Rollback. Input: the events of the run. Output: how far back the next launch goes, and which windows
of data it leaves out. The first time at a place it replays the same data, since the cause may have
been a passing fault of a device; the second time it also skips the data, as PaLM's authors did by
hand (Chowdhery et al. 2022, section 5.1).
"""

import dataclasses
import math
import statistics
from collections import deque
from typing import NamedTuple

from baichuan_jax.runs.events import (
    CheckpointSaved,
    Corruption,
    Event,
    NumericsFault,
    RolledBack,
    WindowSkipped,
    of_kind,
)

# Steps that say what is usual, and how many must be there before anything is called a spike.
WINDOW = 128
ENOUGH = 64
# The standard deviation of a normal distribution, as a multiple of its MAD.
DEVIATION_OF_MAD = 1.4826
# A steady curve has a tiny spread; a spike is at least this share above the median as well.
FLOOR = 0.2
# Steps in a row above the limit that make a spike. One large gradient is clipped and does no harm:
# ordinary data have some.
IN_A_ROW = {"loss": 1, "grad_norm": 3}


class Window(NamedTuple):
    """Data of the run: positions [begin, end), which count batches, and rows [begin, end).

    Rows say which data they are whatever the batch size; None: an earlier version wrote none.
    """

    begin: int
    end: int
    rows: tuple[int, int] | None = None

    @classmethod
    def of(cls, event: NumericsFault | WindowSkipped) -> "Window":
        """The window of an event."""
        rows = None if event.rows is None else (event.rows[0], event.rows[1])
        return cls(event.begin, event.end, rows)

    def until(self, last: "Window") -> "Window":
        """From this window's begin to the end of a later one."""
        rows = None
        if self.rows is not None and last.rows is not None:
            rows = (self.rows[0], last.rows[1])
        return Window(self.begin, last.end, rows)

    def overlaps(self, other: "Window") -> bool:
        """Whether they have data in common."""
        (a, b), (c, d) = (self[:2], other[:2])
        if self.rows is not None and other.rows is not None:
            (a, b), (c, d) = self.rows, other.rows
        return a < d and c < b


class Spike(NamedTuple):
    """Why something is a spike, and over how many steps it has lasted."""

    reason: str
    steps: int


class Spikes:
    """Finds spikes of the loss and the gradient norm; `mads` is k, and 0 turns it off."""

    def __init__(self, mads: float, losses: list[float]) -> None:
        self._mads = mads
        # Losses are known from before a restart; gradient norms begin anew.
        self._windows = {"loss": deque(losses[-WINDOW:], WINDOW), "grad_norm": deque(maxlen=WINDOW)}
        self._above = dict.fromkeys(IN_A_ROW, 0)

    def check(self, **values: float) -> Spike | None:
        """Take in a step's values; a spike where one of them is one now."""
        if not self._mads:
            return None
        found = [self._check(name, value) for name, value in values.items()]
        return next((spike for spike in reversed(found) if spike is not None), None)

    def _check(self, name: str, value: float) -> Spike | None:
        window = self._windows[name]
        # The loop counts these itself.
        if not math.isfinite(value):
            return None
        if len(window) >= ENOUGH:
            median = statistics.median(window)
            spread = statistics.median(abs(other - median) for other in window) * DEVIATION_OF_MAD
            limit = median + max(self._mads * spread, FLOOR * abs(median))
            if value > limit:
                self._above[name] += 1
                if self._above[name] < IN_A_ROW[name]:
                    return None
                usual = f"median {median:.4g} + {self._mads:g} deviations of {spread:.3g}"
                reason = f"{name} {value:.4g} is above {limit:.4g}: {usual}"
                return Spike(reason, self._above[name])
            self._above[name] = 0
        # Only here: values above the limit must not become usual.
        window.append(value)
        return None


@dataclasses.dataclass(frozen=True)
class Rollback:
    """What a launch leaves out and how far back it goes.

    `windows`: data to skip. `before`: the step of the fault; None: all checkpoints are good.
    `newest`: else only those up to this step are; where none is left, the oldest before the fault
    serves. `events` are to be recorded.
    """

    windows: tuple[Window, ...] = ()
    before: int | None = None
    newest: int = 0
    events: tuple[RolledBack | WindowSkipped, ...] = ()


def plan_rollback(events: list[Event], max_skips: int) -> Rollback:
    """What a launch begins with, from the run's events.

    A NumericsFault that no RolledBack follows is answered: the first time by a replay; again at the
    same place by skipping its window and going one checkpoint further back. A Corruption is
    answered by going back to before its step; its data are good. Raises RuntimeError where
    max_skips windows are skipped already.
    """
    windows = _skipped(events)
    # The newest fault that no launch has answered yet.
    fault: NumericsFault | Corruption | None = None
    for event in events:
        if isinstance(event, NumericsFault | Corruption):
            fault = event
        elif isinstance(event, RolledBack):
            fault = None
    if fault is None:
        return Rollback(tuple(windows))
    if isinstance(fault, Corruption):
        answer = RolledBack(before=fault.step, reason=fault.reason)
        return Rollback(tuple(windows), fault.step, fault.step - 1, (answer,))
    # Windows that overlap are one place: a spike may be noticed a step earlier or later.
    before, window = of_kind(events, NumericsFault)[:-1], Window.of(fault)
    repeats = sum(Window.of(other).overlaps(window) for other in before)
    recorded: list[RolledBack | WindowSkipped] = []
    # A launch that was killed between its two events has recorded the window already.
    if repeats and window not in windows:
        if len(windows) >= max_skips:
            raise RuntimeError(
                f"{fault.reason} at step {fault.step}, and {len(windows)} windows of data have "
                f"been left out already (resilience.max_skips={max_skips}), so it is not the data; "
                "lower optimizer.learning_rate, or look at events.jsonl"
            )
        windows.append(window)
        begin, end, rows = fault.begin, fault.end, fault.rows
        recorded.append(WindowSkipped(begin=begin, end=end, rows=rows, reason=fault.reason))
    recorded.append(RolledBack(before=fault.step, skipped=bool(repeats), reason=fault.reason))
    newest = fault.step - 1
    if repeats:
        # One checkpoint further back each time: the state that the fault grew from may have been
        # saved already. Counted in the events and not on storage, where a launch that was killed
        # while it deleted has left fewer: the launch after it must come to the same step.
        saves = of_kind(events, CheckpointSaved)
        saved = sorted({save.step for save in saves if save.step < fault.step})
        newest = saved[max(len(saved) - 1 - repeats, 0)] if saved else 0
    return Rollback(tuple(windows), fault.step, newest, tuple(recorded))


def _skipped(events: list[Event]) -> list[Window]:
    """The windows that are left out, each once."""
    found = list(dict.fromkeys(Window.of(event) for event in of_kind(events, WindowSkipped)))
    # A window of an earlier version is recorded again once its rows are known.
    known = {window[:2] for window in found if window.rows is not None}
    return [window for window in found if window.rows is not None or window[:2] not in known]
