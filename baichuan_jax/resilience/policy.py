"""What follows from a verdict: start again or stop, and on which hosts. Pure functions, which any host's supervisor may ask."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

from baichuan_jax.resilience.attribution import Verdict
from baichuan_jax.resilience.exits import (
    BAD_HOST,
    BUG,
    CONFIGURATION,
    HANG,
    NUMERICS,
    PREEMPTED,
    UNSAVED,
)

MAX_FRUITLESS = 3  # restarts that reach no new checkpoint
MAX_BLAMES = 2  # times that a host is named before it is left out even though no other stands ready
CODES = {
    "completed": 0,
    "preempted": PREEMPTED,
    "configuration": CONFIGURATION,
    "exception": BUG,
    "numerics": NUMERICS,
    "bad host": BAD_HOST,
    "storage": UNSAVED,
}


@dataclasses.dataclass(frozen=True)
class Decision:
    """Start again, or stop with `code`; why."""

    restart: bool
    code: int
    reason: str


def decide(
    verdict: Verdict, *, processes: int, asked: bool, fruitless: int, before: Verdict | None
) -> Decision:
    """After a launch of so many processes ended with this verdict.

    `asked`: somebody asked a supervisor to stop. `fruitless`: launches in a row, this one included,
    that reached no new checkpoint. `before`: the verdict on the launch before, where this one made
    no progress over it.
    """
    code = CODES.get(verdict.cause, HANG)
    if verdict.cause == "completed":
        return Decision(False, 0, "complete")
    if asked:
        return Decision(False, PREEMPTED, "asked to stop")
    if verdict.cause == "configuration":
        return Decision(
            False, code, "a setting or an input cannot be right: a restart would meet it again"
        )
    if verdict.cause == "exception":
        if verdict.host is None or len(verdict.processes) == processes:
            return Decision(
                False,
                code,
                "an exception on all of several hosts is a bug: a restart would meet it again",
            )
        if (
            before is not None
            and before.cause == "exception"
            and before.evidence == verdict.evidence
        ):
            return Decision(False, code, "the same exception at the same place again")
    if fruitless > MAX_FRUITLESS:
        return Decision(False, code, f"{MAX_FRUITLESS} restarts without a new checkpoint")
    return Decision(True, code, f"after {verdict.cause}")


def choose_hosts(
    alive: Collection[str],
    *,
    wanted: int,
    at_least: int,
    before: Sequence[str],
    blames: dict[str, int],
    usable: Callable[[int], bool],
) -> list[str]:
    """The hosts of the next launch, in the order of their processes; empty where there are too few.

    Hosts named least often come first, then those of the launch before, then the spares by name.
    One named MAX_BLAMES times is out as long as `at_least` others remain. `usable` says whether so
    many hosts divide mesh and batch.
    """
    place = {host: index for index, host in enumerate(before)}
    good = sorted(alive, key=lambda host: (blames.get(host, 0), place.get(host, len(place)), host))
    trusted = [host for host in good if blames.get(host, 0) < MAX_BLAMES]
    for candidates in (trusted, good):
        for count in range(min(wanted, len(candidates)), at_least - 1, -1):
            if usable(count):
                return sorted(
                    candidates[:count], key=lambda host: (place.get(host, len(place)), host)
                )
    return []
