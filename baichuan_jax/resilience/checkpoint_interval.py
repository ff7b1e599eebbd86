"""How often to save, where checkpoint.every is not set: Young's and Daly's optimum from what saves cost and how often faults come."""

import math

# Before a run has faults of its own: Llama 3's 54 days on 16,384 GPUs had 419 (Grattafiori et al.
# 2024), one in 50,700 GPU-hours.
DEVICE_SECONDS_PER_FAULT = 50_700 * 3600.0
MAX_BLOCKED_SHARE = 0.01  # of the time between saves, that the loop may stand still for one
HEADROOM = 1.5  # a save is over this much before the next one begins


def seconds_between_saves(blocked: float, duration: float, seconds_per_fault: float) -> float:
    """Seconds of training between saves that block the loop for `blocked` seconds and are whole after `duration`.

    sqrt(2 * blocked * seconds_per_fault) (Young 1974; Daly 2006 to first order) loses the least to
    saves and repeated steps together; never so often that the loop stands still for more than a
    hundredth of the time, or that saves overlap.
    """
    return max(
        math.sqrt(2 * blocked * seconds_per_fault), blocked / MAX_BLOCKED_SHARE, HEADROOM * duration
    )


def seconds_per_fault(devices: int, run_seconds: float, faults: int) -> float:
    """Mean time between faults of a run so far, the prior counted as one fault in its time."""
    return (DEVICE_SECONDS_PER_FAULT / devices + run_seconds) / (1 + faults)
