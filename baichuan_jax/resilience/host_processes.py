"""A host's training processes in one launch, as its supervisor starts, watches and ends them.

What is to be done with them is decided elsewhere (waiting.py), by a supervisor (launch.py).
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable

from baichuan_jax.resilience.causes import BadHost
from baichuan_jax.resilience.clock import WAIT
from baichuan_jax.resilience.heartbeats import BEAT
from baichuan_jax.resilience.launch_files import LaunchFolder, ProcessEnd
from baichuan_jax.resilience.placement import Placement

# How long a process may take to end once it was killed.
KILL_SECONDS = 60.0


class HostProcesses:
    """This host's processes of a launch, by their numbers in the run."""

    def __init__(self, launch: LaunchFolder, host: str) -> None:
        self.launch, self.host = launch, host
        # How those ended that have.
        self.exits: dict[int, ProcessEnd] = {}
        self._children: dict[int, subprocess.Popen] = {}
        # Process -> when it was killed.
        self._killed: dict[int, float] = {}

    def start(self, placement: Placement, argv: list[str], coordinator: str) -> None:
        """Start one process. Only process 0 writes to this terminal, the others to log-P.txt."""
        process = placement.process
        command = [sys.executable, "-m", "baichuan_jax.train", *argv]
        variables = {**os.environ, **placement.to_environment(coordinator)}
        # A session of its own: Ctrl-C in the terminal reaches the supervisor only, which passes on
        # what it means.
        if process == 0:
            child = subprocess.Popen(command, env=variables, start_new_session=True)
        else:
            with open(self.launch.path / f"log-{process}.txt", "wb") as log:
                child = subprocess.Popen(
                    command, env=variables, start_new_session=True, stdout=log, stderr=log
                )
        self._children[process] = child

    def poll(self) -> frozenset[int]:
        """Those that run. Raises BadHost where one does not end although it was killed.

        It waits in the kernel, for a device or a file system. The other hosts go on without this
        one once its heartbeat ends.
        """
        for process, child in self._children.items():
            if process not in self.exits and (code := child.poll()) is not None:
                self.exits[process] = ProcessEnd(code, process in self._killed, time.time())
        running = self._children.keys() - self.exits.keys()
        now = time.monotonic()
        late = [p for p in running if now - self._killed.get(p, now) > KILL_SECONDS]
        if late:
            raise BadHost(
                f"process {late[0]} (number {self._children[late[0]].pid}) on {self.host} has not "
                f"ended {KILL_SECONDS:.0f} s after SIGKILL: a device or a file system of this host "
                "does not answer; look at dmesg, and start this supervisor again when it has ended"
            )
        return frozenset(running)

    def kill(self, processes: Iterable[int]) -> None:
        """End processes at once, since nothing more will come from them."""
        for process in processes:
            self._killed.setdefault(process, time.monotonic())
            self._children[process].kill()

    def send(self, number: int) -> None:
        """Send a signal to those that run."""
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(number)

    def silent(self, seconds: float) -> frozenset[int]:
        """Those whose heartbeat was more than `seconds` ago and that left no exit report."""
        reports = self.launch.reports()
        # Of the clock that counts from the boot of this host: the other one may jump.
        last = (time.monotonic() - seconds) / BEAT
        mine = [reports[process] for process in self._children if process in reports]
        # Not before the first step: tracing may hold Python's lock, and with it the heartbeat.
        working = [report for report in mine if report.cause is None and WAIT in report.seconds]
        return frozenset(report.process for report in working if report.beat < last)
