"""Who is named for what is known: a table, written from what each fault looks like to those who survive it."""

import signal

import pytest

from baichuan_jax.resilience.attribution import Exit, Verdict, blame
from baichuan_jax.resilience.exits import (
    BAD_HOST,
    BUG,
    CONFIGURATION,
    HANG,
    NUMERICS,
    PREEMPTED,
    UNSAVED,
)
from baichuan_jax.resilience.policy import choose_hosts, decide
from baichuan_jax.resilience.reports import Report

HOSTS = {0: "a", 1: "b", 2: "c", 3: "d"}
KILL, ABORT = -signal.SIGKILL, -signal.SIGABRT
COLLECTIVE = ("train.py:main", "trainer.py:loop", "pjit.py:call")


def beat(process: int, step: int = 10, phase: str = "wait") -> Report:
    return Report(process, HOSTS[process], step=step, phase=phase)


def word(
    process: int, cause: str = "hang", step: int = 10, phase: str = "wait", **fields
) -> Report:
    return Report(
        process,
        HOSTS[process],
        step=step,
        phase=phase,
        cause=cause,
        **{"stack": COLLECTIVE, **fields},
    )


def reports(*found: Report) -> dict[int, Report]:
    return {report.process: report for report in found}


def ended(*codes: int | None) -> dict[int, Exit]:
    """Exits in the order of processes; None: its supervisor had to end it."""
    return {
        process: Exit(KILL if code is None else code, stopped=code is None)
        for process, code in enumerate(codes)
    }


TABLE = {
    # what happened: (reports, exits, cause, rule, host, processes)
    "all complete": ([], ended(0, 0, 0, 0), "completed", "exit codes", None, ()),
    "asked to stop": ([], ended(75, 75, 75, 75), "preempted", "exit codes", None, ()),
    "worker killed, the others lost their connection": (
        [word(0, "peer"), beat(1, phase="data"), word(2, "peer"), word(3, "peer")],
        ended(HANG, KILL, HANG, HANG),
        "killed",
        "ended by a signal",
        "b",
        (1,),
    ),
    "process 0 killed, jax aborts the others": (
        [beat(0), beat(1), beat(2), beat(3)],
        ended(KILL, ABORT, ABORT, ABORT),
        "killed",
        "ended by a signal",
        "a",
        (0,),
    ),
    "segmentation fault": (
        [word(0, "peer"), word(1, "peer"), beat(2), word(3, "peer")],
        ended(HANG, HANG, -signal.SIGSEGV, HANG),
        "killed",
        "ended by a signal",
        "c",
        (2,),
    ),
    "worker aborts by itself": (
        [word(0, "peer"), beat(1), word(2, "peer"), word(3, "peer")],
        ended(HANG, ABORT, HANG, HANG),
        "killed",
        "ended by a signal",
        "b",
        (1,),
    ),
    "process 0 raised and the others were aborted": (
        [word(0, "exception", error="ValueError: x"), beat(1), beat(2), beat(3)],
        ended(BUG, ABORT, ABORT, ABORT),
        "exception",
        "an exception of its own",
        "a",
        (0,),
    ),
    "process 0 hung, left, and one other was aborted before its last word": (
        [word(0, phase="data"), word(1), word(2), beat(3)],
        ended(HANG, HANG, HANG, ABORT),
        "hang",
        "not in the collective",
        "a",
        (0,),
    ),
    "worker stopped (SIGSTOP): not heard": (
        [word(0, silent=(1,)), beat(1), word(2, silent=(1,)), word(3, silent=(1,))],
        ended(HANG, None, HANG, HANG),
        "silent",
        "silent",
        "b",
        (1,),
    ),
    "stopped and nobody supervises": (
        [word(0, silent=(1,)), beat(1), word(2), word(3)],
        {},
        "silent",
        "silent",
        "b",
        (1,),
    ),
    "its whole host is gone": (
        [word(0, silent=(1,)), beat(1), word(2, silent=(1,)), word(3)],
        {p: Exit(HANG) for p in (0, 2, 3)},
        "silent",
        "silent",
        "b",
        (1,),
    ),
    "two hosts silent: nobody is named": (
        [word(0, silent=(1, 2)), beat(1), beat(2), word(3, silent=(1, 2))],
        ended(HANG, None, None, HANG),
        "silent",
        "silent",
        None,
        (),
    ),
    "accused, but it has a last word": (
        [word(0, silent=(1,)), word(1, phase="data"), word(2), word(3)],
        ended(HANG, HANG, HANG, HANG),
        "hang",
        "not in the collective",
        "b",
        (1,),
    ),
    "an exception on one": (
        [
            word(0, "peer"),
            word(1, "peer"),
            word(2, "exception", error="OSError: disk"),
            word(3, "peer"),
        ],
        ended(HANG, HANG, BUG, HANG),
        "exception",
        "an exception of its own",
        "c",
        (2,),
    ),
    "an exception on all is nobody's": (
        [word(p, "exception", error="TypeError") for p in HOSTS],
        ended(BUG, BUG, BUG, BUG),
        "exception",
        "an exception of its own",
        None,
        (),
    ),
    "an exception on one, the others stuck where they say nothing": (
        [
            beat(0, 0, "start"),
            beat(1, 0, "start"),
            word(2, "exception", 0, "start"),
            beat(3, 0, "start"),
        ],
        ended(None, None, BUG, None),
        "exception",
        "an exception of its own",
        "c",
        (2,),
    ),
    "a setting refused everywhere": (
        [word(p, "configuration", error="ConfigError") for p in HOSTS],
        ended(*[CONFIGURATION] * 4),
        "configuration",
        "refused a setting or an input",
        None,
        (),
    ),
    "it never began": (
        [],
        ended(1, None, None, None),
        "exception",
        "an exception of its own",
        "a",
        (0,),
    ),
    "not finite": (
        [word(p, "numerics", error="3 steps") for p in HOSTS],
        ended(*[NUMERICS] * 4),
        "numerics",
        "not finite or a spike",
        None,
        (),
    ),
    "a full disk, met by two": (
        [
            word(0, "storage", error="no space"),
            word(1, "peer"),
            word(2, "storage", error="no space"),
            word(3, "peer"),
        ],
        ended(UNSAVED, HANG, UNSAVED, HANG),
        "storage",
        "could not save",
        None,
        (),
    ),
    "a check names one": (
        [word(p, "bad host", named=(3,), error="digest") for p in HOSTS],
        ended(*[BAD_HOST] * 4),
        "bad host",
        "named by a check",
        "d",
        (3,),
    ),
    "a check finds a pair": (
        [word(p, "bad host", named=(0, 1), error="digest") for p in HOSTS],
        ended(*[BAD_HOST] * 4),
        "bad host",
        "named by a check",
        None,
        (),
    ),
    "hang in the data phase": (
        [word(0, step=11), word(1, phase="data"), word(2, step=11), word(3, step=11)],
        ended(HANG, HANG, HANG, HANG),
        "hang",
        "not in the collective",
        "b",
        (1,),
    ),
    "data phase on two hosts, one of them a step behind": (
        [word(0, step=11), word(1, phase="data"), word(2, step=11, phase="data"), word(3, step=11)],
        {},
        "hang",
        "lowest step",
        "b",
        (1,),
    ),
    "one a step behind, all in the collective": (
        [word(0, step=11), word(1, step=11), word(2, step=10), word(3, step=11)],
        {},
        "hang",
        "lowest step",
        "c",
        (2,),
    ),
    "one elsewhere in the code": (
        [
            word(0),
            word(1),
            word(2),
            word(3, stack=("train.py:main", "trainer.py:loop", "socket.py:recv")),
        ],
        {},
        "hang",
        "minority stack",
        "d",
        (3,),
    ),
    "two stacks, two each: unknown": (
        [word(0), word(1), word(2, stack=("x",)), word(3, stack=("x",))],
        {},
        "hang",
        "unknown",
        None,
        (),
    ),
    "all at one place: unknown": (
        [word(p) for p in HOSTS],
        ended(*[HANG] * 4),
        "hang",
        "unknown",
        None,
        (),
    ),
    "did not end, said nothing, was accused by nobody": (
        [word(0, "peer"), beat(1), word(2, "peer"), word(3, "peer")],
        ended(HANG, None, HANG, HANG),
        "silent",
        "did not end",
        "b",
        (1,),
    ),
    "nothing is known": ([], {}, "unknown", "unknown", None, ()),
}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.replace(" ", "-"))
def test_blame(case):
    found, exits, cause, rule, host, processes = TABLE[case]
    verdict = blame(HOSTS, reports(*found), exits)
    assert (verdict.cause, verdict.rule, verdict.host, verdict.processes) == (
        cause,
        rule,
        host,
        processes,
    ), verdict
    assert verdict.evidence


def test_processes_of_one_host_are_named_together():
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    found = reports(word(0), word(1), word(2, phase="data"), word(3, phase="data"))
    verdict = blame(hosts, found, {})
    assert (verdict.host, verdict.processes) == ("b", (2, 3))


def test_two_hosts_give_no_minority():
    hosts = {0: "a", 1: "b"}
    assert blame(hosts, reports(word(0), word(1, stack=("x",))), {}).host is None


def verdict(
    cause: str, host: str | None = "b", processes: tuple[int, ...] = (1,), evidence: str = "e"
) -> Verdict:
    return Verdict(cause, "rule", evidence, host, processes if host else ())


@pytest.mark.parametrize(
    ("found", "fields", "restart", "code"),
    [
        (verdict("completed", None), {}, False, 0),
        (verdict("killed"), {}, True, HANG),
        (verdict("killed"), {"asked": True}, False, PREEMPTED),
        (
            verdict("preempted", None),
            {},
            True,
            PREEMPTED,
        ),  # a scheduler's SIGTERM to one process: saved, so go on
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
        (
            "abcd",
            {"blames": {"b": 1}},
            "acd",
        ),  # the spare takes the place of the one that was named
        ("abc", {"blames": {"b": 1}}, "abc"),  # no spare: once is forgiven
        ("abc", {"blames": {"b": 2}, "at_least": 2}, "ac"),
        ("abc", {"blames": {"b": 2}}, "abc"),  # too few without it
        ("abcd", {"blames": {"a": 2, "d": 1}}, "bcd"),
        ("ab", {}, ""),
        ("acd", {"before": ["c", "a", "b"]}, "cad"),
        (
            "abc",
            {
                "wanted": 4,
                "at_least": 1,
                "before": ["a", "b", "c", "d"],
                "usable": lambda count: count in (1, 2, 4),
            },
            "ab",
        ),
    ],
)
def test_the_hosts_of_the_next_launch(alive, fields, chosen):
    settings = {
        "wanted": 3,
        "at_least": 3,
        "before": ["a", "b", "c"],
        "blames": {},
        "usable": lambda count: True,
        **fields,
    }
    assert "".join(choose_hosts(set(alive), **settings)) == chosen
