"""Stragglers: processes that slow the whole run down, because all others wait for them each step.

Input: now and then every process's own seconds a step, outside of what it does together with the
others (data and host work; the time in collectives is the same for all, so it tells nothing).
Output: the processes that are slow round after round. A single slow round means little, since hosts
have other work; and an excess of milliseconds delays nobody.
"""

import dataclasses
import statistics
from collections.abc import Mapping

# A slow process takes this many times the median's own time, and this much more: on a fast
# machine own times are microseconds, and a multiple of them delays nobody.
RATIO = 1.5
FLOOR_SECONDS = 0.005
# Rounds in a row. One slow round may be another program's doing.
ROUNDS = 3
# Of two processes, neither can be called the slow one.
MIN_PROCESSES = 3


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A slow process: its own seconds a step, and the median of all processes'."""

    process: int
    seconds: float
    median: float


class Stragglers:
    """Finds each straggler once; again only after a round in which it was not slow."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}

    def look(self, own_seconds: Mapping[int, float]) -> list[Straggler]:
        """Take in a round; the processes that are stragglers from now on, slowest first."""
        if len(own_seconds) < MIN_PROCESSES:
            return []
        # The median, since the slow ones themselves would raise a mean.
        median = statistics.median(own_seconds.values())
        limit = max(RATIO * median, median + FLOOR_SECONDS)
        slow = {process for process, own in own_seconds.items() if own > limit}
        # A process that is not slow now begins anew.
        self._slow = {process: self._slow.get(process, 0) + 1 for process in slow}
        found = [
            Straggler(process, own_seconds[process], median)
            for process, rounds in self._slow.items()
            if rounds == ROUNDS
        ]
        return sorted(found, key=lambda straggler: -straggler.seconds)
