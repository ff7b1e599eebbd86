"""What follows from the end of a launch: restart or stop, and the hosts of the next one."""

import pytest

from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.launch_files import (
    History,
    HostEnd,
    LaunchPlan,
    ProcessEnd,
    Report,
    Verdict,
    VerdictRecord,
)
from baichuan_jax.resilience.policy import choose_hosts, conclude, decide, hosts_needed

HANG, BUG, UNSAVED = (c.exit_code for c in (Cause.HANG, Cause.EXCEPTION, Cause.STORAGE))
NUMERICS, BAD_HOST = Cause.NUMERICS.exit_code, Cause.BAD_HOST.exit_code
CONFIGURATION, PREEMPTED = Cause.CONFIGURATION.exit_code, Cause.PREEMPTED.exit_code


def verdict(
    cause: str, host: str | None = "b", processes: tuple[int, ...] = (1,), evidence: str = "e"
) -> Verdict:
    return Verdict(Cause(cause), "rule", evidence, host, processes if host else ())


@pytest.mark.parametrize(
    ("found", "fields", "restart", "code"),
    [
        (verdict("completed", None), {}, False, 0),
        (verdict("killed"), {}, True, HANG),
        (verdict("killed"), {"asked": True}, False, PREEMPTED),
        # A scheduler's SIGTERM to one process: saved, so go on.
        (verdict("preempted", None), {}, True, PREEMPTED),
        (verdict("configuration", None), {}, False, CONFIGURATION),
        (verdict("exception"), {}, True, BUG),  # one of four
        (verdict("exception", None), {}, False, BUG),  # all four
        (verdict("exception", "a", (0,)), {"processes": 1}, False, BUG),  # the only one
        (verdict("exception"), {"before": verdict("exception")}, False, BUG),
        (verdict("exception"), {"before": verdict("exception", evidence="other")}, True, BUG),
        (verdict("numerics", None), {}, True, NUMERICS),
        (verdict("bad host"), {}, True, BAD_HOST),
        (verdict("storage", None), {}, True, UNSAVED),
        (verdict("hang", None), {"fruitless": 3}, True, HANG),
        (verdict("hang", None), {"fruitless": 4}, False, HANG),
    ],
)
def test_what_follows_from_a_verdict(found, fields, restart, code):
    decision = decide(
        found, **{"processes": 4, "asked": False, "fruitless": 1, "before": None, **fields}
    )
    assert (decision.restart, decision.code) == (restart, code)


@pytest.mark.parametrize(
    ("alive", "fields", "chosen"),
    [
        ("abcd", {}, "abc"),
        # The spare takes the place of the one that was named.
        ("abcd", {"attributed": {"b": 1}}, "acd"),
        ("abc", {"attributed": {"b": 1}}, "abc"),  # no spare: once is forgiven
        ("abc", {"attributed": {"b": 2}, "at_least": 2}, "ac"),
        ("abc", {"attributed": {"b": 2}}, "abc"),  # too few without it
        ("abcd", {"attributed": {"a": 2, "d": 1}}, "bcd"),
        ("ab", {}, ""),
        ("acd", {"before": ["c", "a", "b"]}, "cad"),
        (
            "abc",
            {"wanted": 4, "at_least": 1, "before": "abcd", "usable": {1, 2, 4}.__contains__},
            "ab",
        ),
    ],
)
def test_the_hosts_of_the_next_launch(alive, fields, chosen):
    settings = {
        "wanted": 3,
        "at_least": 3,
        "before": ["a", "b", "c"],
        "attributed": {},
        "usable": lambda count: True,
        **fields,
    }
    assert "".join(choose_hosts(set(alive), **settings)) == chosen


@pytest.mark.parametrize(
    ("alive", "waited", "needed"), [(2, 0.0, 4), (3, 9.9, 4), (3, 10.1, 2), (4, 0.0, 2)]
)
def test_all_hosts_are_waited_for_before_a_launch_makes_do_with_the_minimum(alive, waited, needed):
    assert hosts_needed(4, 2, alive, waited, patience_seconds=10.0) == needed


PLAN = LaunchPlan(("a", "b"), processes=2)


def ends(**codes: tuple[int, int]) -> dict[str, HostEnd]:
    """How the two processes of each host ended."""
    return {
        host: HostEnd(
            exits={p: ProcessEnd(both[p % 2], time=50.0 + p) for p in PLAN.processes_of(host)}
        )
        for host, both in codes.items()
    }


def reports(**causes: str) -> dict[int, Report]:
    return {
        p: Report(p, "ab"[p // 2], time=40.0 + p, cause=Cause(cause))
        for p, cause in enumerate(causes.values())
    }


def concluded(before: VerdictRecord | None = None, checkpoint: int = 10, **fields) -> VerdictRecord:
    """A launch in which process 2 on host b raised and all others lost it."""
    exits = ends(a=(HANG, HANG), b=(BUG, HANG))
    found = reports(p0="peer", p1="peer", p2="exception", p3="peer")
    arguments = {"ends": exits, "reports": found, **fields}
    return conclude(PLAN, before=before, checkpoint=checkpoint, now=60.0, **arguments)


def test_a_verdict_has_all_that_the_next_plan_needs():
    record = concluded()
    assert (record.verdict.cause, record.verdict.host) == (Cause.EXCEPTION, "b")
    assert (record.restart, record.code) == (True, BUG)
    assert (record.detected, record.concluded) == (40.0, 60.0)  # the first exit report
    assert record.lost == ()
    assert record.history == History({"b": 1}, ("a", "b"), fruitless=1, checkpoint=10)


def test_history_goes_on_from_restart_to_restart_and_progress_resets_what_was_fruitless():
    first = concluded()
    second = concluded(before=first, reports={}, ends=ends(a=(HANG, HANG), b=(-9, HANG)))
    assert second.history == History({"b": 2}, ("a", "b"), fruitless=2, checkpoint=10)
    assert second.restart
    third = concluded(before=second, checkpoint=20)
    assert third.history == History({"b": 3}, ("a", "b"), fruitless=1, checkpoint=20)
    # The same exception at the same place without progress: it would return.
    again = concluded(before=first)
    assert (again.restart, again.history.fruitless) == (False, 2)
    # A run that stopped and was started by hand begins anew.
    assert concluded(before=again).history == first.history


def test_a_check_weighs_as_much_as_two_faults_and_a_lost_host_is_remembered():
    found = {0: Report(0, "a", cause=Cause.BAD_HOST, named=(2, 3))}
    record = concluded(reports=found, ends=ends(a=(BAD_HOST, BAD_HOST)))
    assert record.history.attributed == {"b": 2}
    assert record.lost == ("b",)


def test_whoever_was_asked_to_stop_stops_the_run():
    asked = {"a": HostEnd(asked=True, exits={0: ProcessEnd(75)}), "b": HostEnd()}
    record = concluded(reports={}, ends=asked)
    assert (record.restart, record.code) == (False, PREEMPTED)
