"""The numerics guard: what a spike is, and what a launch does after one that ended because of numbers."""

import dataclasses
import math
import statistics
from collections import deque
from typing import Any

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
    events: tuple[dict[str, Any], ...] = ()


def plan_rollback(events: list[dict[str, Any]], skip: list[list[int]], max_skips: int) -> Rollback:
    """From a run's events and the windows of its settings. Raises RuntimeError after max_skips windows of its own.

    A `numerics` event (step, begin, end) that no `rolled_back` follows is answered: the first time
    by a replay of the same data, since the cause may have passed; again at the same place by
    leaving its window out and going one checkpoint further back. A `corruption` event (step) is
    answered by going back to before that step, whose data are not to blame.
    """
    windows = [(begin, end) for begin, end in skip]
    windows += [
        (event["begin"], event["end"]) for event in events if event["kind"] == "window_skipped"
    ]
    faults = [
        index for index, event in enumerate(events) if event["kind"] in ("numerics", "corruption")
    ]
    if not faults or any(event["kind"] == "rolled_back" for event in events[faults[-1] :]):
        return Rollback(tuple(windows))
    fault = events[faults[-1]]
    recorded: list[dict[str, Any]] = []
    if fault["kind"] == "corruption":
        recorded.append(
            {
                "kind": "rolled_back",
                "before": fault["step"],
                "skipped": False,
                "reason": fault["reason"],
            }
        )
        return Rollback(tuple(windows), fault["step"], 0, tuple(recorded))
    faults = [index for index in faults if events[index]["kind"] == "numerics"]
    repeats = sum(
        events[i]["begin"] < fault["end"] and fault["begin"] < events[i]["end"] for i in faults[:-1]
    )
    if repeats:
        skips = sum(event["kind"] == "window_skipped" for event in events)
        if skips >= max_skips:
            raise RuntimeError(
                f"{fault['reason']} at step {fault['step']}, and {skips} windows of data have been left out already "
                f"(resilience.max_skips={max_skips}): it is not the data; lower optimizer.learning_rate, or look at the events"
            )
        windows.append((fault["begin"], fault["end"]))
        recorded.append(
            {
                "kind": "window_skipped",
                "begin": fault["begin"],
                "end": fault["end"],
                "reason": fault["reason"],
            }
        )
    recorded.append(
        {
            "kind": "rolled_back",
            "before": fault["step"],
            "skipped": bool(repeats),
            "reason": fault["reason"],
        }
    )
    return Rollback(tuple(windows), fault["step"], repeats, tuple(recorded))
