"""Heartbeats: who is silent, who is alive, and that one's own lateness accuses nobody."""

import json

import pytest

from baichuan_jax.resilience.boards import Peers
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.heartbeats import LOOK, HeartbeatMonitor, HostHeartbeats
from baichuan_jax.resilience.launch_files import HostHeartbeat, Launches, Report


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def monitor(time) -> HeartbeatMonitor[str]:
    return HeartbeatMonitor(time)


def look(monitor, time, seconds: float, **beats: int) -> None:
    """Time passes, then the monitor looks at these heartbeats."""
    time.now += seconds
    monitor.look(beats)


def test_a_peer_whose_heartbeat_stands_still_grows_silent_and_one_that_beats_does_not(
    monitor, time
):
    for number in range(11):
        look(monitor, time, 1.0, a=number, b=5)
    assert monitor.age("a") == 0.0
    assert monitor.age("b") == 10.0
    assert monitor.silent(9.0) == ("b",)
    assert monitor.silent(10.0) == ()
    look(monitor, time, 1.0, a=11, b=6)
    assert monitor.silent(0.5) == ()


def test_any_change_is_a_sign_of_life(monitor, time):
    """A supervisor that was started again counts from 1."""
    look(monitor, time, 1.0, a=900)
    look(monitor, time, 1.0, a=1)
    assert monitor.alive(5.0) == {"a"}


def test_an_old_file_alone_is_no_sign_of_life(monitor, time):
    look(monitor, time, 1.0, a=900)
    assert monitor.alive(5.0) == set()
    assert monitor.age("a") == 0.0  # nor is it silent yet
    look(monitor, time, 1.0, a=901)
    assert monitor.alive(5.0) == {"a"}
    for _ in range(5):
        look(monitor, time, 1.0, a=901)
    assert monitor.alive(5.0) == set()


def test_time_in_which_this_process_did_not_look_says_nothing_about_the_others(monitor, time):
    look(monitor, time, 1.0, a=1, b=1)
    look(monitor, time, 1.0, a=2, b=1)
    # Stopped for an hour; b's file has not changed meanwhile, and a's has.
    look(monitor, time, 3600.0, a=3, b=1)
    assert monitor.age("b") == 1.0 + LOOK
    assert monitor.silent(5.0) == ()
    for _ in range(3):
        look(monitor, time, 1.0, a=4, b=1)
    assert monitor.silent(5.0) == ("b",)


def test_looks_that_are_a_little_late_still_count(monitor, time):
    look(monitor, time, 1.0, a=1)
    for _ in range(3):
        look(monitor, time, LOOK, a=1)
    assert monitor.age("a") == 3 * LOOK


def test_a_peer_that_was_never_heard_ages_from_the_start(monitor, time):
    for _ in range(8):
        look(monitor, time, 1.0)
    assert monitor.age("a") == 8.0
    assert monitor.silent(1.0) == ()
    assert monitor.alive(100.0) == set()
    look(monitor, time, 3600.0)
    assert monitor.age("a") == 8.0 + LOOK


def test_whether_a_peer_was_heard_since_a_moment(monitor, time):
    look(monitor, time, 1.0, a=1)
    moment = time.now
    look(monitor, time, 1.0, a=1)
    assert not monitor.heard_since("a", moment)
    assert not monitor.heard_since("b", moment)
    look(monitor, time, 1.0, a=2)
    assert monitor.heard_since("a", moment)


def test_hosts_see_each_other_through_files(tmp_path):
    launches = Launches(tmp_path / "attempts")
    ours, theirs = (HostHeartbeats(launches, host, host, 20.0) for host in ("a", "b"))
    assert ours.alive() == set()
    ours.beat()
    theirs.beat()
    ours.beat()
    assert ours.alive() == {"a"}  # b's first file may be an old one
    theirs.beat()
    ours.beat()
    assert ours.alive() == {"a", "b"}
    assert not ours.lost("b")
    assert not ours.lost("never heard")
    assert HostHeartbeats(launches, "c", "c", 0.0).lost("b")
    content = json.loads((tmp_path / "attempts" / "hosts" / "b.json").read_text())
    assert HostHeartbeat.from_json(content).beat == 2


def test_two_boards_of_which_one_stands_still_are_not_two_signs_of_life():
    peers = Peers(silence_seconds=1e9)
    folder, service = ({1: Report(1, "b", beat=beat)} for beat in (5, 6))
    peers.hear(folder, own=0)
    peers.hear(service, own=0)
    since = peers._monitor._seen[1].since
    for _ in range(3):
        peers.hear(folder, own=0)
        peers.hear(service, own=0)
    assert peers._monitor._seen[1].since == since


def test_exit_reports_are_kept_and_ones_own_is_not_heard():
    peers = Peers(silence_seconds=0.0)
    peers.hear({0: Report(0, "a", cause=Cause.HANG), 1: Report(1, "b", cause=Cause.PEER)}, own=0)
    peers.hear({1: Report(1, "b")}, own=0)  # an older heartbeat on the other board
    assert set(peers.exit_reports) == {1}
    assert 0 not in peers.silent()
