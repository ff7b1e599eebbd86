"""From what is known after a fault to who caused it: a pure function. It names one host or none; it never guesses."""

import dataclasses
import signal
from collections import Counter
from collections.abc import Iterable, Mapping

from baichuan_jax.resilience.clock import ALONE
from baichuan_jax.resilience.exits import BUG, PREEMPTED
from baichuan_jax.resilience.exits import CONFIGURATION as REFUSED
from baichuan_jax.resilience.reports import (
    BAD_HOST,
    CONFIGURATION,
    EXCEPTION,
    NUMERICS,
    PEER,
    STORAGE,
    Report,
)


@dataclasses.dataclass(frozen=True)
class Exit:
    """How a process ended: its code, negative for a signal; `stopped` where its supervisor ended it."""

    code: int
    stopped: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What happened, to whom, and how that is known.

    `cause`: completed, preempted, bad host, killed, silent, storage, hang, exception,
    configuration, numerics or unknown. `rule` is the line of blame() that decided. `host` and
    `processes` are the culprit, None and () where nobody can be named.
    """

    cause: str
    rule: str
    evidence: str
    host: str | None = None
    processes: tuple[int, ...] = ()

    def __str__(self) -> str:
        who = (
            "nobody can be named"
            if self.host is None
            else f"host {self.host}, process {', '.join(map(str, self.processes))}"
        )
        return f"{self.cause}: {who} (rule: {self.rule}): {self.evidence}"


def blame(
    hosts: Mapping[int, str], reports: Mapping[int, Report], exits: Mapping[int, Exit]
) -> Verdict:
    """The verdict on a launch that has ended or that must end.

    `hosts` maps every process to its host, `reports` to its last word or, where it had none, to its
    last heartbeat; `exits` to how it ended, where a supervisor knows. Rules, in this order: all
    ended well; named by a check; ended by a signal; silent; could not save; an exception of its
    own; did not end; not in the collective; lowest step; minority stack; unknown. A rule that
    points at several hosts names none.
    """
    codes = [ended.code for ended in exits.values()]
    if len(codes) == len(hosts) and set(codes) == {0}:
        return Verdict("completed", "exit codes", "every process ended with 0")
    words = {process: report for process, report in reports.items() if report.cause is not None}
    for rule in (_checked, _killed, _silent, _unsaved, _configuration, _exception, _numerics):
        verdict = rule(hosts, reports, words, exits)
        if verdict is not None:
            return verdict
    if PREEMPTED in codes and set(codes) <= {0, PREEMPTED}:
        return Verdict("preempted", "exit codes", "asked to stop; saved")
    for rule in (_did_not_end, _not_in_the_collective, _lowest_step, _minority_stack):
        verdict = rule(hosts, reports, words, exits)
        if verdict is not None:
            return verdict
    return Verdict(
        "hang" if words else "unknown",
        "unknown",
        _positions(hosts, reports) or "no process left a report",
    )


def _name(
    hosts: Mapping[int, str], cause: str, rule: str, processes: Iterable[int], evidence: str
) -> Verdict:
    """A verdict on these processes where they are of one host, and on nobody where they are not."""
    found = tuple(sorted(processes))
    theirs = {hosts[process] for process in found}
    if len(theirs) == 1:
        return Verdict(cause, rule, evidence, theirs.pop(), found)
    return Verdict(
        cause,
        rule,
        f"{evidence}; that is {len(theirs)} hosts ({', '.join(sorted(theirs)[:4])}), so none is blamed",
    )


def _checked(hosts, reports, words, exits) -> Verdict | None:
    found = {process: report for process, report in words.items() if report.cause == BAD_HOST}
    if not found:
        return None
    named = {process for report in found.values() for process in report.named}
    text = next(iter(found.values())).error or ""
    return (
        _name(hosts, "bad host", "named by a check", named, text)
        if named
        else Verdict("bad host", "named by a check", text)
    )


def _killed(hosts, reports, words, exits) -> Verdict | None:
    """Ended by a signal that neither its supervisor nor jax sent: jax aborts a process whose coordinator is gone."""
    found = {
        process: ended.code
        for process, ended in exits.items()
        if ended.code < 0 and not ended.stopped and process not in words
    }
    first = {process for process, code in found.items() if code != -signal.SIGABRT}
    if (
        not first
        and len(found) == 1
        and len(words) == len(hosts) - 1
        and all(word.cause == PEER for word in words.values())
    ):
        first = set(found)  # an abort of its own: all others only lost their connection to it
    if not first:
        return None
    names = ", ".join(sorted({signal.Signals(-found[process]).name for process in first}))
    return _name(hosts, "killed", "ended by a signal", first, f"{names} {_where(reports, first)}")


def _silent(hosts, reports, words, exits) -> Verdict | None:
    """Not heard by others, and without a last word."""
    ended = {process for process, end in exits.items() if not end.stopped}
    found = {process for report in words.values() for process in report.silent} - set(words) - ended
    witnesses = sum(1 for report in words.values() if set(report.silent) & found)
    heard = f"not heard by {witnesses} other(s), last {_where(reports, found)}"
    return _name(hosts, "silent", "silent", found, heard) if found else None


def _did_not_end(hosts, reports, words, exits) -> Verdict | None:
    """Had to be stopped, without a last word, while others ended by themselves: these waited for it."""
    ended = {process for process, end in exits.items() if not end.stopped}
    found = set(hosts) - ended - set(words)
    return (
        _name(hosts, "silent", "did not end", found, f"last {_where(reports, found)}")
        if found and ended
        else None
    )


def _unsaved(hosts, reports, words, exits) -> Verdict | None:
    """All hosts share the disk: who writes when it is full is no culprit."""
    errors = [report.error for report in words.values() if report.cause == STORAGE]
    return Verdict("storage", "could not save", errors[0] or "") if errors else None


def _configuration(hosts, reports, words, exits) -> Verdict | None:
    found = {
        process: report.error for process, report in words.items() if report.cause == CONFIGURATION
    }
    for process, ended in exits.items():
        if ended.code == REFUSED:
            found.setdefault(process, "exit code 78")
    return _own(hosts, reports, "configuration", "refused a setting or an input", found)


def _exception(hosts, reports, words, exits) -> Verdict | None:
    found = {
        process: report.error for process, report in words.items() if report.cause == EXCEPTION
    }
    for process, ended in exits.items():
        if process not in words and ended.code in (
            1,
            2,
            BUG,
        ):  # 1 and 2: Python's own, where the program never began
            found.setdefault(process, f"exit code {ended.code}")
    return _own(hosts, reports, "exception", "an exception of its own", found)


def _own(hosts, reports, cause: str, rule: str, found: Mapping[int, str | None]) -> Verdict | None:
    if not found:
        return None
    error = next(iter(found.values())) or ""
    return _name(
        hosts,
        cause,
        rule,
        found,
        f"{error.splitlines()[0][:300] if error else ''} {_where(reports, found)}",
    )


def _numerics(hosts, reports, words, exits) -> Verdict | None:
    errors = [report.error for report in words.values() if report.cause == NUMERICS]
    return Verdict("numerics", "not finite or a spike", errors[0] or "") if errors else None


def _not_in_the_collective(hosts, reports, words, exits) -> Verdict | None:
    """The one host whose process is in a phase that waits for nobody, while others wait."""
    alone = {process for process, report in words.items() if report.phase in ALONE}
    if not alone or len(alone) == len(words):
        return None
    verdict = _name(hosts, "hang", "not in the collective", alone, _where(words, alone))
    return verdict if verdict.host is not None else None


def _lowest_step(hosts, reports, words, exits) -> Verdict | None:
    if not words:
        return None
    lowest = min(report.step for report in words.values())
    behind = {process for process, report in words.items() if report.step == lowest}
    if len(behind) == len(words):
        return None
    others = min(report.step for report in words.values() if report.step > lowest)
    verdict = _name(
        hosts,
        "hang",
        "lowest step",
        behind,
        f"{_where(words, behind)}; all others reached step {others}",
    )
    return verdict if verdict.host is not None else None


def _minority_stack(hosts, reports, words, exits) -> Verdict | None:
    """The one host whose main thread stands elsewhere, where at least three hosts spoke and all others stand at one place."""
    stacks = {
        process: (report.phase, report.stack) for process, report in words.items() if report.stack
    }
    counts = Counter(stacks.values())
    if len({hosts[process] for process in stacks}) < 3 or len(counts) != 2:
        return None
    (_, most), (rare, few) = counts.most_common()
    if few * 2 >= most + few:
        return None
    odd = {process for process, stack in stacks.items() if stack == rare}
    verdict = _name(
        hosts,
        "hang",
        "minority stack",
        odd,
        f"{_where(words, odd)}, in {rare[1][-1]}; the others elsewhere",
    )
    return verdict if verdict.host is not None else None


def _where(reports: Mapping[int, Report], processes: Iterable[int]) -> str:
    places = {f"{reports[p].phase} at step {reports[p].step}" for p in processes if p in reports}
    return f"in {', '.join(sorted(places))}" if places else "before its first heartbeat"


def _positions(hosts: Mapping[int, str], reports: Mapping[int, Report]) -> str:
    return "; ".join(
        f"process {p} on {hosts[p]} {_where(reports, [p])}" for p in sorted(hosts) if p in reports
    )
