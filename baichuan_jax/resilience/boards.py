"""Boards: the two places where the processes of a launch publish reports and read each other's.

The launch's folder stays when processes end, and supervisors read it. jax's coordination service
answers faster and without a file system, and ends with process 0. A process uses both, so that the
loss of one hides nobody.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from baichuan_jax.resilience.heartbeats import HeartbeatMonitor
from baichuan_jax.resilience.launch_files import Report


class Board(Protocol):
    """A place for reports: LaunchFolder or ReportService. A call may block, or raise."""

    def publish(self, report: Report) -> None: ...

    def reports(self) -> dict[int, Report]: ...


class Channel:
    """This process's side of a board: no heartbeat is published after its exit report."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._lock = threading.Lock()
        self._sealed = False

    def publish(self, report: Report) -> None:
        """Publish a heartbeat or an exit report."""
        # Under the lock, so that a heartbeat that is under way does not replace the exit report.
        with self._lock:
            leaving = report.cause is not None
            if leaving or not self._sealed:
                self._sealed |= leaving
                self.board.publish(report)

    def seal(self) -> None:
        """Publish no more heartbeats. Does not wait for one that is under way."""
        # Without the lock, which a blocked board may hold for ever.
        self._sealed = True


class Peers:
    """What this process has heard of the others: heartbeats, and exit reports, its own included."""

    def __init__(self, silence_seconds: float) -> None:
        self.exit_reports: dict[int, Report] = {}
        self._silence_seconds = silence_seconds
        self._beats: dict[int, int] = {}
        self._monitor: HeartbeatMonitor[int] = HeartbeatMonitor()
        # Both boards' threads hear, and one may come while the other is at it.
        self._lock = threading.Lock()

    def hear(self, reports: Mapping[int, Report], own: int) -> None:
        """Take in the reports on a board; `own` is this process."""
        with self._lock:
            for process in set(reports) - {own}:
                report = reports[process]
                # The newest on either board: one that stands still must not look like a change.
                self._beats[process] = max(report.beat, self._beats.get(process, 0))
                if report.cause is not None:
                    self.exit_reports[process] = report
            self._monitor.look(self._beats)

    def silent(self) -> tuple[int, ...]:
        """Peers whose heartbeat timed out."""
        return self._monitor.silent(self._silence_seconds)


def call_within(calls: list[Callable[[], object]], seconds: float) -> None:
    """Make calls that may block, side by side, and wait this long for each. Best effort."""

    def quietly(call: Callable[[], object]) -> None:
        with contextlib.suppress(Exception):
            call()

    # Daemons: a call that never returns must not keep the process from leaving.
    threads = [threading.Thread(target=quietly, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, seconds))
