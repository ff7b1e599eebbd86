"""How often to save a checkpoint, where checkpoint.every is not set.

Input: for how long a save blocks the loop, how long it takes, and how often faults come. Output:
seconds between saves. Frequent saves cost the time that they block; rare ones cost the steps that
a fault makes the run repeat, half an interval on average. Together these are least at
sqrt(2 * blocked * seconds_per_fault) (Young 1974, "A first order approximation to the optimum
checkpoint interval"; Daly 2006, "A higher order estimate ...", gives the same to first order).
"""

import dataclasses
import math
from collections.abc import Sequence

from baichuan_jax.runs.events import Completed, Event, Interrupted, Started, of_kind

# Before a run has faults of its own: Llama 3's 54 days on 16,384 GPUs had 419 (Grattafiori et al.
# 2024), one in 50,700 GPU-hours.
DEVICE_SECONDS_PER_FAULT = 50_700 * 3600.0
# Saves may block the loop for this share of the time.
MAX_BLOCKED_SHARE = 0.01
# Saves begin at least this many times a save's duration apart, so that they do not overlap.
HEADROOM = 1.5


@dataclasses.dataclass(frozen=True)
class FaultHistory:
    """Faults of a run so far, and the seconds since its first launch."""

    faults: int = 0
    run_seconds: float = 0.0


def fault_history(events: Sequence[Event]) -> FaultHistory:
    """The faults of a run so far: launches that were neither completed nor stopped on request."""
    begun = of_kind(events, Started)
    if not begun:
        return FaultHistory()
    # A launch that was killed has written nothing of its end: it is counted by its beginning.
    good = sum(isinstance(event, Interrupted | Completed) for event in events)
    # Not below 0: a clock that was set back would make saves of a negative interval.
    seconds = max(0.0, events[-1].time - begun[0].time)
    return FaultHistory(max(0, len(begun) - good), seconds)


def seconds_between_saves(blocked: float, duration: float, seconds_per_fault: float) -> float:
    """Seconds between saves that block the loop for `blocked` seconds and take `duration` in all.

    The optimum of Young and Daly, but never so often that saves overlap or that they block the loop
    for more than a hundredth of the time.
    """
    optimum = math.sqrt(2 * blocked * seconds_per_fault)
    return max(optimum, blocked / MAX_BLOCKED_SHARE, HEADROOM * duration)


def seconds_per_fault(devices: int, run_seconds: float, faults: int) -> float:
    """Mean time between faults of a run so far."""
    # The prior counts as one fault in its time; faults of the run's own soon outweigh it.
    return (DEVICE_SECONDS_PER_FAULT / devices + run_seconds) / (1 + faults)
