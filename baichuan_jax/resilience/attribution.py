"""Fault attribution: from what is known after a launch to its cause and the host that caused it.

Input: the newest report of every process (an exit report, or else its last heartbeat) and, where a
supervisor knows, how each process ended. Output: a `Verdict` that names one host or none. It is a
pure function, so that any host reaches the same verdict from the same files.

In synchronous training one process's fault stops all: within seconds everybody hangs in a
collective or has lost a connection. So most reports describe the consequence. The rules go from
direct evidence (a check, a signal, a missing heartbeat, an exception of its own) to indirect (who
was not in the collective, who had done fewer steps, whose stack differs, as in MegaScale, Jiang et
al. 2024). The first rule that finds something decides; a rule that finds several hosts names none,
because taking out a good host costs more than another restart.
"""

import dataclasses
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.clock import ALONE
from baichuan_jax.resilience.launch_files import ProcessEnd, Report, Verdict

# Exit codes of an exception: Python's own 1 and 2 where the program never began, and ours.
EXCEPTION_CODES = (1, 2, Cause.EXCEPTION.exit_code)
# Of two hosts, neither is the odd one.
MIN_HOSTS_OF_MAJORITY = 3


@dataclasses.dataclass(frozen=True)
class _Evidence:
    """What is known: the host of every process, reports and ends where there are any."""

    hosts: Mapping[int, str]
    reports: Mapping[int, Report]
    ends: Mapping[int, ProcessEnd]

    @property
    def exit_reports(self) -> dict[int, Report]:
        return {p: report for p, report in self.reports.items() if report.cause is not None}

    @property
    def left(self) -> set[int]:
        """Processes that ended by themselves, not by their supervisor's hand."""
        return {process for process, end in self.ends.items() if not end.stopped}

    def errors(self, cause: Cause) -> dict[int, str]:
        """The error's text of every process whose exit report has this cause."""
        found = self.exit_reports.items()
        return {process: report.error or "" for process, report in found if report.cause == cause}

    def where(self, processes: Iterable[int]) -> str:
        """The phases and steps in which these processes were last seen."""
        found = [self.reports[process] for process in processes if process in self.reports]
        places = sorted({f"{report.phase} at step {report.step}" for report in found})
        return f"in {', '.join(places)}" if places else "before its first heartbeat"

    def name(self, cause: Cause, rule: str, processes: Iterable[int], evidence: str) -> Verdict:
        """A verdict on these processes; on nobody where they belong to several hosts."""
        found = tuple(sorted(processes))
        # Several processes of one host are one culprit: they share its devices and its network.
        theirs = sorted({self.hosts[process] for process in found})
        if len(theirs) == 1:
            return Verdict(cause, rule, evidence, theirs[0], found)
        # Of hundreds of hosts, a few tell where to look.
        shown = ", ".join(theirs[:4])
        return Verdict(cause, rule, f"{evidence}; no host named: {len(theirs)} hosts ({shown})")


_Rule = Callable[[_Evidence], Verdict | None]


def attribute_fault(
    hosts: Mapping[int, str], reports: Mapping[int, Report], ends: Mapping[int, ProcessEnd]
) -> Verdict:
    """The verdict on a launch that has ended or must end.

    `hosts` maps every process to its host, `reports` to its exit report or, where it left none, to
    its last heartbeat; `ends` to how it ended, where a supervisor knows.
    """
    codes = [end.code for end in ends.values()]
    # A host that was lost has no codes, so a launch without them all is not complete.
    if len(codes) == len(hosts) and set(codes) == {0}:
        return Verdict(Cause.COMPLETED, "exit codes", "every process ended with 0")
    known = _Evidence(hosts, reports, ends)
    for rule in DIRECT:
        if (verdict := rule(known)) is not None:
            return verdict
    # Only now: a process may also be asked to stop while another one fails.
    preempted = Cause.PREEMPTED.exit_code
    if preempted in codes and set(codes) <= {0, preempted}:
        return Verdict(Cause.PREEMPTED, "exit codes", "asked to stop; saved")
    for rule in INDIRECT:
        if (verdict := rule(known)) is not None:
            return verdict
    # Nothing tells the hosts apart; whoever reads the verdict may see more in where they were.
    seen = [p for p in sorted(hosts) if p in reports]
    places = "; ".join(f"process {p} on {hosts[p]} {known.where([p])}" for p in seen)
    cause = Cause.HANG if known.exit_reports else Cause.UNKNOWN
    return Verdict(cause, "unknown", places or "no process left a report")


def _checked(known: _Evidence) -> Verdict | None:
    """A check (preflight, or replicas' digests) found a host bad."""
    errors = known.errors(Cause.BAD_HOST)
    if not errors:
        return None
    text = next(iter(errors.values()))
    # All processes take part in a check, so their findings agree; any one of them may be missing.
    named = {p for process in errors for p in known.exit_reports[process].named}
    if not named:
        return Verdict(Cause.BAD_HOST, "named by a check", text)
    return known.name(Cause.BAD_HOST, "named by a check", named, text)


def _killed(known: _Evidence) -> Verdict | None:
    """A process ended by a signal that neither its supervisor nor jax sent."""
    exits = known.exit_reports
    signals = {p: -known.ends[p].code for p in known.left - set(exits) if known.ends[p].code < 0}
    # jax aborts a process whose coordination service is lost: an abort is a consequence, ...
    first = {process for process, number in signals.items() if number != signal.SIGABRT}
    # ... unless it is the only end by a signal and all others just lost their connection to it.
    others_lost_it = all(report.cause == Cause.PEER for report in exits.values())
    if not first and len(signals) == 1 and len(exits) == len(known.hosts) - 1 and others_lost_it:
        first = set(signals)
    if not first:
        return None
    # Usually SIGKILL: the kernel's out-of-memory killer, or a person.
    names = ", ".join(sorted({signal.Signals(signals[process]).name for process in first}))
    evidence = f"{names} {known.where(first)}"
    return known.name(Cause.KILLED, "ended by a signal", first, evidence)


def _silent(known: _Evidence) -> Verdict | None:
    """A process whose heartbeat timed out at others, and which left no exit report."""
    exits = known.exit_reports
    accused = {process for report in exits.values() for process in report.silent}
    # Who wrote an exit report, or left by itself, was alive after all.
    found = accused - set(exits) - known.left
    if not found:
        return None
    witnesses = sum(bool(set(report.silent) & found) for report in exits.values())
    evidence = f"heartbeat timed out at {witnesses} other(s), last {known.where(found)}"
    return known.name(Cause.SILENT, "silent", found, evidence)


def _could_not_save(known: _Evidence) -> Verdict | None:
    """A checkpoint could not be written. All hosts share the disk, so no host is named."""
    errors = list(known.errors(Cause.STORAGE).values())
    return Verdict(Cause.STORAGE, "could not save", errors[0]) if errors else None


def _configuration(known: _Evidence) -> Verdict | None:
    # A process that refuses its settings before the watch begins leaves its code only.
    code = Cause.CONFIGURATION.exit_code
    errors = known.errors(Cause.CONFIGURATION)
    refused = [process for process, end in known.ends.items() if end.code == code]
    found = errors | {process: f"exit code {code}" for process in refused if process not in errors}
    return _raised(known, Cause.CONFIGURATION, "refused a setting or an input", found)


def _exception(known: _Evidence) -> Verdict | None:
    # Where there is a report, it decides: a lost peer is an exception too, and exits with 76.
    by_code = {
        process: f"exit code {end.code}"
        for process, end in known.ends.items()
        if process not in known.exit_reports and end.code in EXCEPTION_CODES
    }
    found = known.errors(Cause.EXCEPTION) | by_code
    return _raised(known, Cause.EXCEPTION, "an exception of its own", found)


def _raised(known: _Evidence, cause: Cause, rule: str, errors: dict[int, str]) -> Verdict | None:
    """Processes that ended by an error of their own, with its first line as evidence."""
    if not errors:
        return None
    # One line: equal errors of two launches must compare equal (policy.decide).
    lines = next(iter(errors.values())).splitlines()
    evidence = f"{lines[0][:300] if lines else ''} {known.where(errors)}"
    return known.name(cause, rule, errors, evidence)


def _numerics(known: _Evidence) -> Verdict | None:
    """Bad numbers are the same on all replicas, so no host is named."""
    errors = list(known.errors(Cause.NUMERICS).values())
    return Verdict(Cause.NUMERICS, "not finite or a spike", errors[0]) if errors else None


def _did_not_end(known: _Evidence) -> Verdict | None:
    """A process had to be stopped, without an exit report: those that ended waited for it."""
    found = set(known.hosts) - known.left - set(known.exit_reports)
    # If nobody ended by itself, somebody stopped them all, and nothing follows.
    if not found or not known.left:
        return None
    return known.name(Cause.SILENT, "did not end", found, f"last {known.where(found)}")


def _not_in_the_collective(known: _Evidence) -> Verdict | None:
    """The one host in a phase that waits for nobody, while the others wait."""
    exits = known.exit_reports
    # All others need it for their collective, and it does not need them.
    alone = {process for process, report in exits.items() if report.phase in ALONE}
    if not alone or len(alone) == len(exits):
        return None
    return _one_host(known, "not in the collective", alone, known.where(alone))


def _lowest_step(known: _Evidence) -> Verdict | None:
    """The one host that has done fewer steps than all others."""
    exits = known.exit_reports
    # Steps count when they are dispatched, so the others may be one ahead of the one that hangs.
    steps = sorted({report.step for report in exits.values()})
    if len(steps) < 2:
        return None
    behind = {process for process, report in exits.items() if report.step == steps[0]}
    evidence = f"{known.where(behind)}; all others reached step {steps[1]}"
    return _one_host(known, "lowest step", behind, evidence)


def _minority_stack(known: _Evidence) -> Verdict | None:
    """The one host whose main thread is elsewhere, while all others are at one place."""
    reports = known.exit_reports.items()
    places = {process: (report.phase, report.stack) for process, report in reports if report.stack}
    counts = Counter(places.values())
    enough = len({known.hosts[process] for process in places}) >= MIN_HOSTS_OF_MAJORITY
    if not enough or len(counts) != 2:
        return None
    # Two places exactly: with more, the processes are on their way and not stuck.
    (_, most), (rare, few) = counts.most_common()
    if few >= most:
        return None
    odd = {process for process, place in places.items() if place == rare}
    evidence = f"{known.where(odd)}, in {rare[1][-1]}; the others elsewhere"
    return _one_host(known, "minority stack", odd, evidence)


def _one_host(known: _Evidence, rule: str, processes: set[int], evidence: str) -> Verdict | None:
    """A verdict of an indirect rule: it counts only where it names one host."""
    verdict = known.name(Cause.HANG, rule, processes, evidence)
    return None if verdict.host is None else verdict


# In this order; see the module's docstring.
DIRECT: tuple[_Rule, ...] = (
    _checked,
    _killed,
    _silent,
    _could_not_save,
    _configuration,
    _exception,
    _numerics,
)
INDIRECT: tuple[_Rule, ...] = (_did_not_end, _not_in_the_collective, _lowest_step, _minority_stack)
