"""The numerics guard: what a spike is, and what a launch does after one that ended because of numbers."""

import dataclasses
import math
import statistics
from collections import deque

from baichuan_jax.runs.events import (
    Corruption,
    Event,
    NumericsFault,
    RolledBack,
    WindowSkipped,
    of_kind,
)

WINDOW = 128  # steps whose losses and gradient norms say what is usual
ENOUGH = 64  # of them must be there before anything is called a spike
# A steady curve has a tiny spread; a spike is at least this share above the median as well.
FLOOR = 0.2


# Steps in a row above the limit that make a spike. One large gradient is clipped and does no harm:
# ordinary data have some.
IN_A_ROW = {"loss": 1, "grad_norm": 3}


class Spikes:
    """Notices losses and gradient norms above median + k * 1.4826 MAD of the last steps (1.4826 MAD is a normal's deviation)."""

    def __init__(self, mads: float, losses: list[float]) -> None:
        self._mads = mads
        self._windows = {"loss": deque(losses[-WINDOW:], WINDOW), "grad_norm": deque(maxlen=WINDOW)}
        self._above = dict.fromkeys(IN_A_ROW, 0)

    def check(self, **values: float) -> tuple[str, int] | None:
        """Words on what has become a spike, and over how many steps; or None. What is above the limit does not become usual."""
        if not self._mads:
            return None
        found = None
        for name, value in values.items():
            window = self._windows[name]
            if len(window) >= ENOUGH and math.isfinite(value):
                median = statistics.median(window)
                spread = 1.4826 * statistics.median(abs(other - median) for other in window)
                limit = median + max(self._mads * spread, FLOOR * abs(median))
                self._above[name] = self._above[name] + 1 if value > limit else 0
                if value > limit:
                    words = f"median {median:.4g} + {self._mads:g} deviations of {spread:.3g}"
                    if self._above[name] >= IN_A_ROW[name]:
                        found = (
                            f"{name} {value:.4g} is above {limit:.4g}: {words}",
                            self._above[name],
                        )
                    continue
            if math.isfinite(value):
                window.append(value)
        return found


@dataclasses.dataclass(frozen=True)
class Rollback:
    """What a launch does about numbers: the data windows [begin, end) it leaves out, and how far back it goes.

    `before`: only checkpoints of earlier steps are good (None: all are); `back`: so many of these
    are passed over too. `events` are to be recorded.
    """

    windows: tuple[tuple[int, int], ...] = ()
    before: int | None = None
    back: int = 0
    events: tuple[RolledBack | WindowSkipped, ...] = ()


def plan_rollback(events: list[Event], skip: list[list[int]], max_skips: int) -> Rollback:
    """From a run's events and the windows of its settings: what this launch begins with.

    Raises RuntimeError after max_skips windows of its own. A NumericsFault that no RolledBack
    follows is answered: the first time by a replay of the same data, since the cause may have
    passed; again at the same place by leaving its window out and going one checkpoint further back.
    A Corruption is answered by going back to before its step, whose data are not to blame.
    """
    windows = [(begin, end) for begin, end in skip]
    skipped = of_kind(events, WindowSkipped)
    windows += [(event.begin, event.end) for event in skipped]
    newest: NumericsFault | Corruption | None = None  # the newest fault that is not answered yet
    for event in events:
        if isinstance(event, NumericsFault | Corruption):
            newest = event
        elif isinstance(event, RolledBack):
            newest = None
    if newest is None:
        return Rollback(tuple(windows))
    if isinstance(newest, Corruption):
        answer = RolledBack(before=newest.step, reason=newest.reason)
        return Rollback(tuple(windows), newest.step, 0, (answer,))
    before = of_kind(events, NumericsFault)[:-1]
    repeats = sum(fault.begin < newest.end and newest.begin < fault.end for fault in before)
    recorded: list[RolledBack | WindowSkipped] = []
    if repeats:
        if len(skipped) >= max_skips:
            raise RuntimeError(
                f"{newest.reason} at step {newest.step}, and {len(skipped)} windows of data have been "
                f"left out already (resilience.max_skips={max_skips}): it is not the data; lower "
                "optimizer.learning_rate, or look at the events"
            )
        windows.append((newest.begin, newest.end))
        recorded.append(WindowSkipped(begin=newest.begin, end=newest.end, reason=newest.reason))
    recorded.append(RolledBack(before=newest.step, skipped=bool(repeats), reason=newest.reason))
    return Rollback(tuple(windows), newest.step, repeats, tuple(recorded))
