"""The files of a launch: written, read back, claimed once, and read as old versions wrote them."""

import errno
import json
import multiprocessing
import os

import pytest

from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.launch_files import (
    Coordinator,
    History,
    HostEnd,
    HostHeartbeat,
    Launches,
    LaunchPlan,
    ProcessEnd,
    Report,
    Verdict,
    VerdictRecord,
)

REPORT = Report(
    process=1,
    host="b",
    pid=7,
    beat=3,
    time=5.5,
    step=4,
    phase="wait",
    age=1.5,
    own_seconds=0.25,
    seconds={"wait": 2.0},
    cause=Cause.BAD_HOST,
    error="größer",
    stack=("a.py:f", "b.py:g"),
    silent=(0,),
    named=(1, 2),
)
VERDICT = VerdictRecord(
    verdict=Verdict(Cause.KILLED, "ended by a signal", "SIGKILL in wait", "b", (2, 3)),
    restart=True,
    code=76,
    reason="after killed",
    detected=1.5,
    concluded=2.5,
    checkpoint=40,
    lost=("b",),
    history=History({"b": 1}, ("a", "b"), fruitless=1, checkpoint=40),
)
RECORDS = [
    (LaunchPlan(("a", "b"), 2), None),
    (Coordinator("a:7733"), None),
    (HostEnd(True, {2: ProcessEnd(-9, True, 3.5), 3: ProcessEnd(75)}), "b"),
    (REPORT, 1),
    (VERDICT, None),
]


@pytest.fixture
def launches(tmp_path) -> Launches:
    return Launches(tmp_path / "attempts")


@pytest.mark.parametrize(("record", "key"), RECORDS, ids=lambda value: type(value).__name__)
def test_what_is_written_is_read_back(launches, record, key):
    launch = launches[3]
    assert launch.read(type(record), key) is None
    launch.write(record, key)
    assert launch.read(type(record), key) == record
    assert launch.read(type(record), "another") is None


def test_a_plan_knows_its_processes():
    plan = LaunchPlan(("a", "b"), 2)
    assert plan.host_of == {0: "a", 1: "a", 2: "b", 3: "b"}
    assert list(plan.processes_of("b")) == [2, 3]


def test_reports_and_ends_of_all_are_read_together(launches):
    launch = launches[1]
    assert (launch.reports(), launch.ended()) == ({}, set())
    launch.publish(REPORT)
    launch.publish(Report(0, "a"))
    launch.write(HostEnd(exits={0: ProcessEnd(0)}), "a")
    launch.write(HostEnd(exits={1: ProcessEnd(0)}), "b")
    assert launch.reports() == {0: Report(0, "a"), 1: REPORT}
    assert launch.ended() == {0, 1}
    assert sorted(path.name for path in launch.path.iterdir()) == [
        "ended-a.json",
        "ended-b.json",
        "process-0.json",
        "process-1.json",
    ]


def test_launches_are_numbered(launches):
    assert (launches.numbers(), launches.latest()) == ([], 0)
    for number in (2, 10):
        launches[number].write(Coordinator("a:1"))
    launches.write_heartbeat("a", HostHeartbeat("a", 1, 1))
    assert (launches.numbers(), launches.latest()) == ([2, 10], 10)
    launch = launches.begin_unsupervised()
    assert (launch.number, launch.supervised, launches[10].supervised) == (11, False, True)
    assert launches.read_heartbeats() == {"a": HostHeartbeat("a", 1, 1)}


def claim(launches: Launches, name: str, start, won) -> None:
    start.wait()
    if launches[1].claim(LaunchPlan((name,), 1)):
        won.put(name)


def test_of_many_processes_one_writes_the_plan(launches):
    # Not fork: other tests have started jax's threads in this process.
    context = multiprocessing.get_context("spawn")
    start, won = context.Event(), context.Queue()
    names = [f"h{number}" for number in range(8)]
    processes = [context.Process(target=claim, args=(launches, n, start, won)) for n in names]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(30)
    plan = launches[1].read(LaunchPlan)
    assert plan == LaunchPlan((won.get(timeout=5),), 1)
    assert won.empty()
    assert [path.name for path in launches[1].path.iterdir()] == ["plan.json"]


def test_a_plan_is_written_once_where_hard_links_are_missing(launches, monkeypatch):
    def missing(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", missing)
    assert launches[1].claim(LaunchPlan(("a",), 1))
    assert not launches[1].claim(LaunchPlan(("b",), 1))
    assert launches[1].read(LaunchPlan) == LaunchPlan(("a",), 1)


# As a launch of the version before these records wrote its files.
OLD = {
    "plan": {"hosts": ["a", "b"], "processes": 2},
    "coordinator": {"address": "a:7733"},
    "ended-b": {
        "asked": True,
        "exits": {
            "2": {"code": -9, "stopped": True, "time": 3.5},
            "3": {"code": 75, "stopped": False, "time": 0.0},
        },
    },
    "process-1": {
        "process": 1,
        "host": "b",
        "pid": 7,
        "beat": 3,
        "time": 5.5,
        "step": 4,
        "phase": "wait",
        "age": 1.5,
        "own_seconds": 0.25,
        "seconds": {"wait": 2.0},
        "cause": "bad host",
        "error": "größer",
        "stack": ["a.py:f", "b.py:g"],
        "silent": [0],
        "named": [1, 2],
    },
    "verdict": {
        "verdict": {
            "cause": "killed",
            "rule": "ended by a signal",
            "evidence": "SIGKILL in wait",
            "host": "b",
            "processes": [2, 3],
        },
        "restart": True,
        "code": 76,
        "reason": "after killed",
        "detected": 1.5,
        "concluded": 2.5,
        "checkpoint": 40,
        "lost": ["b"],
        "history": {"blames": {"b": 1}, "hosts": ["a", "b"], "fruitless": 1, "checkpoint": 40},
    },
}


def test_files_of_older_versions_are_read(launches):
    launch = launches[1]
    launch.path.mkdir(parents=True)
    for name, content in OLD.items():
        (launch.path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for record, key in RECORDS:
        assert launch.read(type(record), key) == record
    # And a newer version's field is no error.
    newer = {**OLD["coordinator"], "scheme": "grpc"}
    (launch.path / "coordinator.json").write_text(json.dumps(newer), encoding="utf-8")
    assert launch.read(Coordinator) == Coordinator("a:7733")


@pytest.mark.parametrize("cause", [None, "hang", "peer", "storage", "exception", "numerics"])
def test_causes_in_reports_are_the_words_that_older_versions_wrote(cause):
    report = Report.from_json({**OLD["process-1"], "cause": cause})
    assert report.cause == cause
    assert json.loads(report.to_json())["cause"] == cause
