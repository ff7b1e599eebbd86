"""Slow hosts: whose own work, outside of what it does together with the others, takes longer, round after round."""

import dataclasses
import statistics
from collections.abc import Mapping

RATIO = 1.5  # times the median's own time
FLOOR_SECONDS = 0.005  # above the median; less costs nobody anything
ROUNDS = 3  # in a row


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A process that holds the others up: its own seconds a step, and the median's."""

    process: int
    seconds: float
    median: float


class Stragglers:
    """Names a process once it was slow in several rounds in a row; again only after a round in which it was not."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}

    def look(self, own_seconds: Mapping[int, float]) -> list[Straggler]:
        """One round: the processes that are now to be named, slowest first. Of two processes none can be called slow."""
        if len(own_seconds) < 3:
            return []
        median = statistics.median(own_seconds.values())
        slow = {
            p
            for p, own in own_seconds.items()
            if own > RATIO * median and own - median > FLOOR_SECONDS
        }
        self._slow = {process: self._slow.get(process, 0) + 1 for process in slow}
        named = [
            Straggler(p, own_seconds[p], median)
            for p, rounds in self._slow.items()
            if rounds == ROUNDS
        ]
        return sorted(named, key=lambda straggler: -straggler.seconds)
