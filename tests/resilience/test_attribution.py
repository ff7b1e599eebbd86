"""Fault attribution: a table of what each fault looks like to the processes that survive it."""

import signal

import pytest

from baichuan_jax.resilience.attribution import attribute_fault
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.launch_files import ProcessEnd, Report

HOSTS = {0: "a", 1: "b", 2: "c", 3: "d"}
KILL, ABORT = -signal.SIGKILL, -signal.SIGABRT
HANG, BUG, UNSAVED = (c.exit_code for c in (Cause.HANG, Cause.EXCEPTION, Cause.STORAGE))
NUMERICS, BAD_HOST = Cause.NUMERICS.exit_code, Cause.BAD_HOST.exit_code
CONFIGURATION = Cause.CONFIGURATION.exit_code
COLLECTIVE = ("train.py:main", "trainer.py:loop", "pjit.py:call")


def heartbeat(process: int, step: int = 10, phase: str = "wait") -> Report:
    return Report(process, HOSTS[process], step=step, phase=phase)


def exit_report(
    process: int, cause: str = "hang", step: int = 10, phase: str = "wait", **fields
) -> Report:
    return Report(
        process,
        HOSTS[process],
        step=step,
        phase=phase,
        cause=Cause(cause),
        **{"stack": COLLECTIVE, **fields},
    )


def reports(*found: Report) -> dict[int, Report]:
    return {report.process: report for report in found}


def ended(*codes: int | None) -> dict[int, ProcessEnd]:
    """Ends in the order of processes; None: its supervisor had to end it."""
    return {
        process: ProcessEnd(KILL if code is None else code, stopped=code is None)
        for process, code in enumerate(codes)
    }


TABLE = {
    # what happened: (reports, exits, cause, rule, host, processes)
    "all complete": ([], ended(0, 0, 0, 0), "completed", "exit codes", None, ()),
    "asked to stop": ([], ended(75, 75, 75, 75), "preempted", "exit codes", None, ()),
    "worker killed, the others lost their connection": (
        [
            exit_report(0, "peer"),
            heartbeat(1, phase="data"),
            exit_report(2, "peer"),
            exit_report(3, "peer"),
        ],
        ended(HANG, KILL, HANG, HANG),
        "killed",
        "ended by a signal",
        "b",
        (1,),
    ),
    "process 0 killed, jax aborts the others": (
        [heartbeat(0), heartbeat(1), heartbeat(2), heartbeat(3)],
        ended(KILL, ABORT, ABORT, ABORT),
        "killed",
        "ended by a signal",
        "a",
        (0,),
    ),
    "segmentation fault": (
        [exit_report(0, "peer"), exit_report(1, "peer"), heartbeat(2), exit_report(3, "peer")],
        ended(HANG, HANG, -signal.SIGSEGV, HANG),
        "killed",
        "ended by a signal",
        "c",
        (2,),
    ),
    "worker aborts by itself": (
        [exit_report(0, "peer"), heartbeat(1), exit_report(2, "peer"), exit_report(3, "peer")],
        ended(HANG, ABORT, HANG, HANG),
        "killed",
        "ended by a signal",
        "b",
        (1,),
    ),
    "process 0 raised and the others were aborted": (
        [
            exit_report(0, "exception", error="ValueError: x"),
            heartbeat(1),
            heartbeat(2),
            heartbeat(3),
        ],
        ended(BUG, ABORT, ABORT, ABORT),
        "exception",
        "an exception of its own",
        "a",
        (0,),
    ),
    "process 0 hung, left, and one other was aborted before its exit report": (
        [exit_report(0, phase="data"), exit_report(1), exit_report(2), heartbeat(3)],
        ended(HANG, HANG, HANG, ABORT),
        "hang",
        "not in the collective",
        "a",
        (0,),
    ),
    "worker stopped (SIGSTOP): not heard": (
        [
            exit_report(0, silent=(1,)),
            heartbeat(1),
            exit_report(2, silent=(1,)),
            exit_report(3, silent=(1,)),
        ],
        ended(HANG, None, HANG, HANG),
        "silent",
        "silent",
        "b",
        (1,),
    ),
    "stopped and nobody supervises": (
        [exit_report(0, silent=(1,)), heartbeat(1), exit_report(2), exit_report(3)],
        {},
        "silent",
        "silent",
        "b",
        (1,),
    ),
    "its whole host is gone": (
        [exit_report(0, silent=(1,)), heartbeat(1), exit_report(2, silent=(1,)), exit_report(3)],
        {p: ProcessEnd(HANG) for p in (0, 2, 3)},
        "silent",
        "silent",
        "b",
        (1,),
    ),
    "two hosts silent: nobody is named": (
        [exit_report(0, silent=(1, 2)), heartbeat(1), heartbeat(2), exit_report(3, silent=(1, 2))],
        ended(HANG, None, None, HANG),
        "silent",
        "silent",
        None,
        (),
    ),
    "accused, but it has an exit report": (
        [exit_report(0, silent=(1,)), exit_report(1, phase="data"), exit_report(2), exit_report(3)],
        ended(HANG, HANG, HANG, HANG),
        "hang",
        "not in the collective",
        "b",
        (1,),
    ),
    "an exception on one": (
        [
            exit_report(0, "peer"),
            exit_report(1, "peer"),
            exit_report(2, "exception", error="OSError: disk"),
            exit_report(3, "peer"),
        ],
        ended(HANG, HANG, BUG, HANG),
        "exception",
        "an exception of its own",
        "c",
        (2,),
    ),
    "an exception on all is nobody's": (
        [exit_report(p, "exception", error="TypeError") for p in HOSTS],
        ended(BUG, BUG, BUG, BUG),
        "exception",
        "an exception of its own",
        None,
        (),
    ),
    "an exception on one, the others stuck where they say nothing": (
        [
            heartbeat(0, 0, "start"),
            heartbeat(1, 0, "start"),
            exit_report(2, "exception", 0, "start"),
            heartbeat(3, 0, "start"),
        ],
        ended(None, None, BUG, None),
        "exception",
        "an exception of its own",
        "c",
        (2,),
    ),
    "a setting refused everywhere": (
        [exit_report(p, "configuration", error="ConfigError") for p in HOSTS],
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
        [exit_report(p, "numerics", error="3 steps") for p in HOSTS],
        ended(*[NUMERICS] * 4),
        "numerics",
        "not finite or a spike",
        None,
        (),
    ),
    "a full disk, met by two": (
        [
            exit_report(0, "storage", error="no space"),
            exit_report(1, "peer"),
            exit_report(2, "storage", error="no space"),
            exit_report(3, "peer"),
        ],
        ended(UNSAVED, HANG, UNSAVED, HANG),
        "storage",
        "could not save",
        None,
        (),
    ),
    "a check names one": (
        [exit_report(p, "bad host", named=(3,), error="digest") for p in HOSTS],
        ended(*[BAD_HOST] * 4),
        "bad host",
        "named by a check",
        "d",
        (3,),
    ),
    "a check finds a pair": (
        [exit_report(p, "bad host", named=(0, 1), error="digest") for p in HOSTS],
        ended(*[BAD_HOST] * 4),
        "bad host",
        "named by a check",
        None,
        (),
    ),
    "hang in the data phase": (
        [
            exit_report(0, step=11),
            exit_report(1, phase="data"),
            exit_report(2, step=11),
            exit_report(3, step=11),
        ],
        ended(HANG, HANG, HANG, HANG),
        "hang",
        "not in the collective",
        "b",
        (1,),
    ),
    "data phase on two hosts, one of them a step behind": (
        [
            exit_report(0, step=11),
            exit_report(1, phase="data"),
            exit_report(2, step=11, phase="data"),
            exit_report(3, step=11),
        ],
        {},
        "hang",
        "lowest step",
        "b",
        (1,),
    ),
    "one a step behind, all in the collective": (
        [
            exit_report(0, step=11),
            exit_report(1, step=11),
            exit_report(2, step=10),
            exit_report(3, step=11),
        ],
        {},
        "hang",
        "lowest step",
        "c",
        (2,),
    ),
    "one elsewhere in the code": (
        [
            exit_report(0),
            exit_report(1),
            exit_report(2),
            exit_report(3, stack=("train.py:main", "trainer.py:loop", "socket.py:recv")),
        ],
        {},
        "hang",
        "minority stack",
        "d",
        (3,),
    ),
    "two stacks, two each: unknown": (
        [
            exit_report(0),
            exit_report(1),
            exit_report(2, stack=("x",)),
            exit_report(3, stack=("x",)),
        ],
        {},
        "hang",
        "unknown",
        None,
        (),
    ),
    "all at one place: unknown": (
        [exit_report(p) for p in HOSTS],
        ended(*[HANG] * 4),
        "hang",
        "unknown",
        None,
        (),
    ),
    "did not end, said nothing, was accused by nobody": (
        [exit_report(0, "peer"), heartbeat(1), exit_report(2, "peer"), exit_report(3, "peer")],
        ended(HANG, None, HANG, HANG),
        "silent",
        "did not end",
        "b",
        (1,),
    ),
    "nothing is known": ([], {}, "unknown", "unknown", None, ()),
}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.replace(" ", "-"))
def test_attribution(case):
    found, exits, cause, rule, host, processes = TABLE[case]
    verdict = attribute_fault(HOSTS, reports(*found), exits)
    assert (verdict.cause, verdict.rule, verdict.host, verdict.processes) == (
        cause,
        rule,
        host,
        processes,
    ), verdict
    assert verdict.evidence


def test_processes_of_one_host_are_named_together():
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    found = reports(
        exit_report(0), exit_report(1), exit_report(2, phase="data"), exit_report(3, phase="data")
    )
    verdict = attribute_fault(hosts, found, {})
    assert (verdict.host, verdict.processes) == ("b", (2, 3))


def test_two_hosts_give_no_minority():
    hosts = {0: "a", 1: "b"}
    assert (
        attribute_fault(hosts, reports(exit_report(0), exit_report(1, stack=("x",))), {}).host
        is None
    )
