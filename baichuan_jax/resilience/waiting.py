"""What a supervisor does while its launch runs: a pure function of status and time.

Input: what is known now (`Status`), what was seen before (`Seen`) and the time. Output: what to do
(`Action`), and what to remember. The loop around it (launch.py) only polls and acts.

A launch whose first process has failed is over: its other processes hang in a collective. They get
EXIT_SECONDS to notice, write their exit reports and leave, because these reports tell who caused
the fault; then they are killed. After a good end processes wait for each other, and PARTING_SECONDS
bound that. A launch on too few hosts is asked to save and stop once more hosts stay ready.
"""

import dataclasses
import math

from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.policy import REJOIN_SECONDS

# After a failure: 2.5 s until a process listens to the others, 3 s for their exit reports, 2 s to
# publish its own, and slack.
EXIT_SECONDS = 10.0
# After a good end: when the others are done, process 0 still draws and samples.
PARTING_SECONDS = 90.0
GOOD_CODES = (Cause.COMPLETED.exit_code, Cause.PREEMPTED.exit_code)


@dataclasses.dataclass(frozen=True)
class Status:
    """What is known of a launch now."""

    # This host's processes that have not ended.
    running: frozenset[int]
    # Those of them whose heartbeat timed out and that left no exit report.
    silent: frozenset[int] = frozenset()
    # Exit codes so far, on all hosts.
    codes: tuple[int, ...] = ()
    # More hosts are ready, with which the launch could be larger.
    can_grow: bool = False


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a supervisor remembers of a launch, in seconds of its clock."""

    # When the first process ended, and when the first one failed.
    ended: float | None = None
    failed: float | None = None
    # Since when the launch could grow; infinity once it was asked to, so that it is asked once.
    growable: float | None = None


@dataclasses.dataclass(frozen=True)
class Action:
    """What to do now."""

    # Processes to kill.
    kill: frozenset[int] = frozenset()
    # Ask all processes to save and stop, so that the next launch takes in more hosts.
    grow: bool = False
    # All processes of this host have ended.
    done: bool = False


def next_action(status: Status, seen: Seen, now: float) -> tuple[Action, Seen]:
    """What to do now, and what to remember for the next time."""
    if status.codes and seen.ended is None:
        seen = dataclasses.replace(seen, ended=now)
    if seen.failed is None and any(code not in GOOD_CODES for code in status.codes):
        seen = dataclasses.replace(seen, failed=now)
    if not status.running:
        return Action(done=True), seen
    kill = _to_kill(status, seen, now)
    # A launch that is ending will be planned anew anyway.
    if status.can_grow and not status.codes:
        since = now if seen.growable is None else seen.growable
        grow = now - since > REJOIN_SECONDS
        return Action(kill, grow), dataclasses.replace(seen, growable=math.inf if grow else since)
    # The other hosts went away again: when they come back, they must stay as long.
    if seen.growable != math.inf:
        seen = dataclasses.replace(seen, growable=None)
    return Action(kill), seen


def _to_kill(status: Status, seen: Seen, now: float) -> frozenset[int]:
    """Processes from which neither an exit report nor a good end will come."""
    if seen.failed is not None and now - seen.failed > EXIT_SECONDS:
        return status.running
    if seen.ended is not None and now - seen.ended > PARTING_SECONDS:
        return status.running
    # A silent one may only be slow, so it is killed only where the launch has failed anyway.
    return status.silent & status.running if seen.failed is not None else frozenset()
