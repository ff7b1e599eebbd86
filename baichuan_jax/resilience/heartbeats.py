"""Heartbeats: when did each peer last give a sign of life, as far as this process could see?

Input: now and then the newest heartbeat of every peer, any value that changes while the peer lives.
Output: for how long a peer's heartbeat has not changed. The clocks of hosts are never compared;
only this process's own clock counts.

A process that does not run (a stopped container, a suspended machine, a file system that blocks)
sees no heartbeat change, and that says nothing about its peers. So each look has a deadline: when
one comes later, every peer is given the time by which it was late. Without this, whoever wakes up
takes all others for dead.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.launch_files import HostHeartbeat, Launches
from baichuan_jax.resilience.waits import wait_until

# Seconds between heartbeats. One costs under 0.1 % of a core's second (a test measures it).
BEAT = 1.0
# Seconds between two looks at the others. Twice a heartbeat: a look may come just before one.
LOOK = 2 * BEAT

Peer = TypeVar("Peer", int, str)


@dataclasses.dataclass
class _Seen:
    """A peer's newest heartbeat, when it was first seen, and whether an older one came before."""

    beat: Any
    since: float
    changed: bool


class HeartbeatMonitor(Generic[Peer]):
    """Ages of peers' heartbeats. Several threads may look and ask; nothing here blocks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Peer, _Seen] = {}
        self._began = self._looked = clock()
        self._lock = threading.Lock()

    def look(self, beats: Mapping[Peer, Any]) -> None:
        """Take in the newest heartbeats."""
        with self._lock:
            now = self._clock()
            # Give every peer the time by which this look is late.
            late = max(0.0, now - self._looked - LOOK)
            self._began += late
            for seen in self._seen.values():
                seen.since += late
            self._looked = now
            for peer, beat in beats.items():
                before = self._seen.get(peer)
                if before is None:
                    self._seen[peer] = _Seen(beat, now, changed=False)
                elif before.beat != beat:
                    self._seen[peer] = _Seen(beat, now, changed=True)

    def age(self, peer: Peer) -> float:
        """Seconds without a new heartbeat at the last look; of an unknown peer since the start."""
        with self._lock:
            since = self._seen[peer].since if peer in self._seen else self._began
            return self._looked - since

    def silent(self, seconds: float) -> tuple[Peer, ...]:
        """Known peers whose heartbeat did not change for longer than this, in their order."""
        with self._lock:
            found = [p for p, seen in self._seen.items() if self._looked - seen.since > seconds]
        return tuple(sorted(found))

    def alive(self, seconds: float) -> set[Peer]:
        """Peers whose heartbeat changed within this time."""
        with self._lock:
            # The first heartbeat that is seen may be the old file of a supervisor that is dead.
            return {
                peer
                for peer, seen in self._seen.items()
                if seen.changed and self._looked - seen.since < seconds
            }

    def heard_since(self, peer: Peer, moment: float) -> bool:
        """Whether a heartbeat came after a moment of this monitor's clock."""
        with self._lock:
            return peer in self._seen and self._seen[peer].since > moment


class HostHeartbeats:
    """A supervisor's heartbeat, and those of the other hosts' supervisors.

    A host is lost after `seconds` without a heartbeat.
    """

    def __init__(self, launches: Launches, host: str, address: str, seconds: float) -> None:
        self._launches, self._host, self._address = launches, host, address
        self._seconds = seconds
        self._beat = 0
        self._monitor: HeartbeatMonitor[str] = HeartbeatMonitor()
        self._ended, self._writing = False, threading.Lock()

    def beat(self) -> None:
        """Publish this host's heartbeat and look at the others'. Raises OSError."""
        self._beat += 1
        own = HostHeartbeat(self._address, os.getpid(), self._beat)
        # Look even where the write fails: a full disk can still be read.
        try:
            with self._writing:
                if not self._ended:
                    self._launches.write_heartbeat(self._host, own)
        finally:
            self._monitor.look(self._launches.read_heartbeats())

    def end(self) -> None:
        """Publish no more. Best effort."""
        with self._writing, contextlib.suppress(OSError):
            self._ended = True
            self._launches.remove_heartbeat(self._host)

    def alive(self) -> set[str]:
        """Hosts whose supervisors live, this one's included once it has begun to publish."""
        # A change in one's own file is not waited for: that would delay a launch by a heartbeat.
        own = {self._host} if self._beat else set()
        return self._monitor.alive(self._seconds) | own

    def heard_since(self, host: str, moment: float) -> bool:
        """Whether a host's heartbeat came after a moment of time.monotonic()."""
        return self._monitor.heard_since(host, moment)

    def lost(self, host: str) -> bool:
        """Whether a host has had no heartbeat for so long, as far as this host could see."""
        return self._monitor.age(host) >= self._seconds


def refuse_beside_supervisors(launches: Launches, run_dir: str) -> None:
    """Raise ConfigError where a supervisor of the run lives; it takes two heartbeats to see that.

    At once where none was there or all have ended well.
    """
    monitor: HeartbeatMonitor[str] = HeartbeatMonitor()

    def lives() -> bool:
        monitor.look(launches.read_heartbeats())
        return bool(monitor.alive(LOOK))

    if not launches.read_heartbeats():
        return
    if wait_until(lives, f"signs of life of supervisors of {run_dir}", LOOK + BEAT):
        hosts = {host: launches.read_heartbeats().get(host) for host in monitor.alive(LOOK)}
        named = [f"{host} (process {beat.pid})" for host, beat in sorted(hosts.items()) if beat]
        raise ConfigError(
            f"run_dir={run_dir!r} is kept going by supervisors (python -m baichuan_jax.launch) on "
            f"{', '.join(named)}; stop that first (Ctrl-C, SIGTERM), or give this run a folder of "
            "its own with --run_dir"
        )
