"""What follows from the end of a launch: restart or stop, and on which hosts.

Input: the verdict on a launch and the history before it. Output: the record of the verdict
(`conclude`), and the hosts of the next launch (`choose_hosts`). These are pure functions, so that
any host's supervisor may ask them.

A restart is cheap and most faults pass, so the policy restarts after all that may pass, and stops
after what would return: a wrong setting, an exception on all hosts, or restarts without progress.
A fault counts against the host that it is attributed to: a spare takes its place at once, and after
two the launch goes on with fewer hosts rather than with this one.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from baichuan_jax.resilience.attribution import attribute_fault
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.launch_files import (
    History,
    HostEnd,
    LaunchPlan,
    Report,
    Verdict,
    VerdictRecord,
)

# Restarts in a row that reach no new checkpoint.
MAX_FRUITLESS = 3
# Faults of a host, after which it is left out even without a spare: one may be chance.
MAX_ATTRIBUTED = 2
# A restart waits this long for more hosts, once there are enough.
REJOIN_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """Restart, or stop with exit code `code`; and why."""

    restart: bool
    code: int
    reason: str


def decide(
    verdict: Verdict, *, processes: int, asked: bool, fruitless: int, before: Verdict | None
) -> Decision:
    """What to do after a launch of so many processes ended with this verdict.

    `asked`: somebody asked a supervisor to stop. `fruitless`: launches in a row, this one included,
    that reached no new checkpoint. `before`: the verdict on the launch before, where this one made
    no progress over it.
    """
    cause, code = verdict.cause, verdict.cause.exit_code
    if cause == Cause.COMPLETED:
        return Decision(False, code, cause.meaning)
    if asked:
        return Decision(False, Cause.PREEMPTED.exit_code, "asked to stop")
    # An exception on one host may be that host's (a full disk, a broken device); on all it is the
    # program's.
    if cause == Cause.EXCEPTION:
        if verdict.host is None or len(verdict.processes) == processes:
            reason = "an exception on all hosts is a bug: a restart would meet it again"
            return Decision(False, code, reason)
        if before is not None and (before.cause, before.evidence) == (cause, verdict.evidence):
            return Decision(False, code, "the same exception at the same place again")
    elif not cause.restart:
        return Decision(False, code, f"{cause.meaning}: a restart would meet it again")
    if fruitless > MAX_FRUITLESS:
        return Decision(False, code, f"{MAX_FRUITLESS} restarts without a new checkpoint")
    return Decision(True, code, f"after {cause}")


def conclude(
    plan: LaunchPlan,
    ends: Mapping[str, HostEnd],
    reports: Mapping[int, Report],
    before: VerdictRecord | None,
    *,
    checkpoint: int,
    now: float,
) -> VerdictRecord:
    """The verdict on a launch that has ended everywhere, and what follows from it.

    `ends` has the hosts whose supervisors said how they ended; `before` is the record of the launch
    before; `checkpoint` the newest saved step; `now` in seconds since the epoch.
    """
    exits = {process: end for ended in ends.values() for process, end in ended.exits.items()}
    verdict = attribute_fault(plan.host_of, reports, exits)
    history = history_of(before)
    # A launch that saved nothing new continues the series of those that did not.
    fruitless = history.fruitless + 1 if checkpoint == history.checkpoint else 1
    decision = decide(
        verdict,
        processes=len(plan.host_of),
        asked=any(end.asked for end in ends.values()),
        fruitless=fruitless,
        before=before.verdict if before is not None and fruitless > 1 else None,
    )
    attributed = dict(history.attributed)
    if verdict.host is not None:
        # A check measures the host itself, so its finding weighs as much as two faults.
        weight = MAX_ATTRIBUTED if verdict.cause == Cause.BAD_HOST else 1
        attributed[verdict.host] = attributed.get(verdict.host, 0) + weight
    # The first exit report or exit code; a process that was stopped is a consequence.
    signs = [report.time for report in reports.values() if report.cause is not None]
    signs += [end.time for end in exits.values() if end.code != 0 and not end.stopped]
    return VerdictRecord(
        verdict,
        restart=decision.restart,
        code=decision.code,
        reason=decision.reason,
        detected=min(signs, default=now),
        concluded=now,
        checkpoint=checkpoint,
        lost=tuple(sorted(set(plan.hosts) - set(ends))),
        history=History(attributed, plan.hosts, fruitless, checkpoint),
    )


def history_of(before: VerdictRecord | None) -> History:
    """The history that the next launch goes on with: a run started again by hand begins anew."""
    return before.history if before is not None and before.restart else History()


def hosts_needed(
    wanted: int, minimum: int, alive: int, waited: float, patience_seconds: float
) -> int:
    """How many hosts a launch needs now: all that are wanted, and after a while the minimum."""
    return wanted if alive < wanted and waited < patience_seconds else minimum


def choose_hosts(
    alive: Collection[str],
    *,
    wanted: int,
    at_least: int,
    before: Sequence[str],
    attributed: Mapping[str, int],
    usable: Callable[[int], bool],
) -> list[str]:
    """The hosts of the next launch, in the order of their processes; empty where there are too few.

    Hosts with the fewest faults come first, then those of the launch before, then spares by name.
    One with MAX_ATTRIBUTED faults is left out as long as `at_least` others remain. `usable` says
    whether mesh and batch divide by so many hosts.
    """
    place = {host: index for index, host in enumerate(before)}

    def faults(host: str) -> int:
        return attributed.get(host, 0)

    def order(host: str) -> tuple[int, str]:
        return place.get(host, len(place)), host

    good = sorted(alive, key=lambda host: (faults(host), *order(host)))
    trusted = [host for host in good if faults(host) < MAX_ATTRIBUTED]
    # Those that are not trusted only where too few others are left.
    for candidates in (trusted, good):
        for count in range(min(wanted, len(candidates)), at_least - 1, -1):
            if usable(count):
                # In the order of the launch before: local copies of the state stay where they are.
                return sorted(candidates[:count], key=order)
    return []
