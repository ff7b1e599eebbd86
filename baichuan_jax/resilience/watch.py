"""The watch over one training process: heartbeats, a watchdog, an exit report before it leaves.

A synchronous run hangs when one process does: all others wait for it in a collective, for as long
as the network library likes. So each process publishes once a second where it is, and finds out by
itself, within seconds, that it hangs or that a peer is lost. It then writes an exit report (its
phase, its stack, who is silent), from which attribution.py finds the culprit, and leaves with exit
code 76, because only a restart helps.

One thread for each board (boards.py) publishes the heartbeat and, while this process stands still,
listens to the others; it may block for as long as its board does. The watchdog, one more thread,
looks at memory only, so nothing blocks it. It leaves through os._exit: the main thread cannot be
interrupted inside a collective.
"""

import contextlib
import dataclasses
import faulthandler
import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from baichuan_jax.config.messages import hide_secrets
from baichuan_jax.config.schema import ConfigError, ResilienceConfig
from baichuan_jax.resilience.attribution import attribute_fault
from baichuan_jax.resilience.boards import Board, Channel, Peers, call_within
from baichuan_jax.resilience.causes import BadHost, Cause, PeerFailed, cause_among_peers
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.coordination import agree, report_service
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.heartbeats import BEAT
from baichuan_jax.resilience.launch_files import Launches, LaunchFolder, Report, Verdict
from baichuan_jax.resilience.limits import PhaseLimits
from baichuan_jax.resilience.placement import Placement
from baichuan_jax.resilience.stragglers import Stragglers
from baichuan_jax.runs.events import StragglerFound
from baichuan_jax.runs.private import without_links

# Seconds in one phase, after which the others are listened to. Most steps are shorter, so a healthy
# run reads nothing, and hundreds of processes do not all read hundreds of reports each second.
LISTEN = 2.5
# Seconds that others have to publish their exit reports, and a board has to take this process's.
GRACE = 3.0
PUBLISH = 2.0
# Heartbeats between two looks for stragglers, which read all reports, on process 0 alone.
ROUND = 4


class Watch:
    """A context around everything that a process of a run does; an error inside is reported.

    Inside a group of processes, or under a supervisor, a hang ends the process with exit code 76.
    Alone it is only reported on stderr, since nobody would start the run again.
    """

    def __init__(self, config: ResilienceConfig, clock: Clock, launches: Path) -> None:
        self._step = 0
        self._own_seconds: float | None = None
        # Shared between threads: what they exchange is either assigned whole or has its own lock.
        self._clock, self._limits = clock, PhaseLimits(config, clock)
        self._launches, self._placement = Launches(launches), Placement.from_environment()
        self._peers = Peers(config.silence_seconds)
        self._channels: list[Channel] = []
        self._found: queue.SimpleQueue[StragglerFound] = queue.SimpleQueue()
        self._closed, self._leaving = threading.Event(), threading.Lock()
        self._stacks: TextIO | None = None

    def __enter__(self) -> "Watch":
        # Under a supervisor before jax starts: an exception in the start is reported too.
        if self._placement.folder is not None:
            self._open(self._placement.folder)
        _start(self._watchdog)
        return self

    def join(self) -> int:
        """Watch the others too, once jax has connected them (or there are none).

        Returns the number of this launch, from 1 (`attempt` in events).
        """
        import jax

        self._placement = dataclasses.replace(
            self._placement, process=jax.process_index(), processes=jax.process_count()
        )
        # The service exists in a group of processes only.
        if (service := report_service()) is not None:
            self._open_channel(service)
        # Without a supervisor process 0 makes the folder, and the others learn its number.
        folder = self._placement.folder
        if folder is None:
            number = agree("launch", lambda: self._launches.begin_unsupervised().number)
            folder = self._launches[number]
            self._placement = dataclasses.replace(self._placement, folder=folder)
            self._open(folder)
        return folder.number

    def reached(self, step: int, own_seconds: float | None = None) -> None:
        """The loop has come to this step, which heartbeats report from here on.

        own_seconds: a step's median time outside of what it does together with other processes.
        """
        self._step, self._own_seconds = step, own_seconds

    @property
    def step(self) -> int:
        """The newest step that the loop has come to."""
        return self._step

    @property
    def launch(self) -> int | None:
        """The launch that a supervisor planned for this process; None without a supervisor."""
        folder = self._placement.folder
        return None if self._placement.supervisor is None or folder is None else folder.number

    @property
    def host(self) -> str:
        """The name of this process's host."""
        return self._placement.host

    def stragglers(self) -> list[StragglerFound]:
        """Slow processes found since the last call; on process 0 only."""
        # The loop asks, and writes the events: a thread of this class must not write to its files.
        found = []
        while not self._found.empty():
            found.append(self._found.get())
        return found

    def report(self, **leaving: Any) -> Report:
        """This process now; `leaving` are the fields of an exit report."""
        phase, age = self._clock.now
        return Report(
            process=self._placement.process,
            host=self.host,
            pid=os.getpid(),
            # Seconds, not a count: two threads publish, and both boards must show the same.
            beat=int(time.monotonic() / BEAT),
            time=time.time(),
            step=self._step,
            phase=phase,
            age=round(age, 3),
            own_seconds=self._own_seconds,
            seconds={name: round(spent, 3) for name, spent in self._clock.totals().items()},
            **leaving,
        )

    def _open(self, folder: LaunchFolder) -> None:
        if not self._placement.alone:
            self._open_stacks(folder)
        self._open_channel(folder)

    def _open_stacks(self, folder: LaunchFolder) -> None:
        """A file for the stacks of a crash, and of jax's abort without its coordination service."""
        file = folder.path / f"stacks-{self._placement.process}.txt"
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            # Closed in __exit__.
            self._stacks = open(file, "w", opener=without_links)  # noqa: SIM115
        except OSError as error:
            # They explain a fault, and no fault has happened.
            say(f"{file} cannot be written ({error.strerror}); a crash leaves no stacks")
            return
        faulthandler.enable(self._stacks)

    def _open_channel(self, board: Board) -> None:
        channel = Channel(board)
        self._channels.append(channel)
        _start(lambda: self._publish_on(channel), name=f"heartbeats on {type(board).__name__}")

    def _publish_on(self, channel: Channel) -> None:
        stragglers, failed = Stragglers(), False
        for beat in itertools.count(1):
            if self._closed.wait(BEAT):
                return
            try:
                channel.publish(self.report())
                failed = False
                process, processes = self._placement.process, self._placement.processes
                if self._clock.now[1] > LISTEN:
                    self._peers.hear(channel.board.reports(), own=process)
                elif process == 0 and processes > 1 and beat % ROUND == 0:
                    self._look_for_stragglers(stragglers, channel.board)
            except Exception as error:
                # A board that fails now may work again. Until then the others do not hear this
                # process on it, and decide what that means.
                if not failed:
                    where = type(channel.board).__name__
                    say(f"heartbeat not published in {where}: {error}; trying again")
                failed = True
                self._closed.wait(5 * BEAT)

    def _look_for_stragglers(self, stragglers: Stragglers, board: Board) -> None:
        # One board is enough, and the folder is always there.
        if not isinstance(board, LaunchFolder):
            return
        reports = board.reports()
        times = {p: r.own_seconds for p, r in reports.items() if r.own_seconds is not None}
        for slow in stragglers.look(times):
            host = reports[slow.process].host
            fields = dataclasses.asdict(slow)
            self._found.put(StragglerFound(step=self._step, host=host, **fields))

    def _watchdog(self) -> None:
        warned: tuple[str, int] | None = None
        supervisor = self._placement.supervisor
        while not self._closed.wait(BEAT / 2):
            if supervisor is not None and os.getppid() != supervisor:
                # The supervisor is dead. The other hosts may have begun the next launch without
                # this one, and two launches must not write the same checkpoints.
                os._exit(Cause.HANG.exit_code)
            phase, age = self._clock.now
            limit = self._limits.seconds(phase)
            if age > limit and not self._placement.alone:
                self._leave(Cause.HANG, f"{age:.0f} s in {phase}; its limit is {limit:.0f} s")
            # Once for each standstill, not twice a second.
            elif age > limit and warned != (phase, self._step):
                warned = (phase, self._step)
                say(f"\nnothing has happened for {age:.0f} s (in {phase} at step {self._step}):")
                # Where stderr is closed, or no file, as in a notebook.
                with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
                    faulthandler.dump_traceback(sys.stderr)
            elif age > LISTEN and (lost := self._lost_peer()) is not None:
                self._leave(*lost)

    def _lost_peer(self) -> tuple[Cause, str] | None:
        """Why this process waits in vain: a peer has left an exit report, or is silent."""
        if self._peers.exit_reports:
            first = next(iter(self._peers.exit_reports.values()))
            return Cause.PEER, _first_line(first.error)
        silent = self._silent()
        if not silent:
            return None
        return Cause.HANG, f"heartbeat of process {', '.join(map(str, silent))} timed out"

    def _silent(self) -> tuple[int, ...]:
        # Not before the first step: tracing may hold Python's lock, and with it the heartbeat.
        return self._peers.silent() if self._limits.has_stepped else ()

    def _leave(self, cause: Cause, error: str) -> None:
        """From the watchdog: publish the exit report, wait for the others', end the process."""
        with self._leaving:
            # The main thread was faster: it is ending already, well or with an error.
            if self._closed.is_set():
                return
            report = self._publish_exit_report(cause, error)
            reports = self._wait_for_exit_reports()
            process = self._placement.process
            stacks = self._stacks.name if self._stacks is not None else "none"
            at = f"at step {report.step} in {report.phase}; stacks: {stacks}"
            say(f"\nprocess {process} on {self.host}: {cause}: {error}; {at}")
            # A supervisor says the verdict itself, with exit codes as evidence too.
            if self._placement.supervisor is None and process == min(reports):
                # A damaged report of another process must not keep this one here.
                with contextlib.suppress(ConfigError, OSError):
                    say(f"verdict: {self._verdict(reports)}")
            if process == 0:
                # Its coordination service ends with it, and jax aborts those that still use it.
                time.sleep(BEAT)
            os._exit(Cause.HANG.exit_code)

    def _verdict(self, exit_reports: dict[int, Report]) -> Verdict:
        folder = self._placement.folder
        reports = {**(folder.reports() if folder is not None else {}), **exit_reports}
        processes = range(self._placement.processes)
        hosts = {p: reports[p].host if p in reports else "?" for p in processes}
        return attribute_fault(hosts, reports, {})

    def _publish_exit_report(self, cause: Cause, error: str, named: tuple[int, ...] = ()) -> Report:
        """Publish the exit report on all boards; heartbeats end with it."""
        self._closed.set()
        # Before the report: where nothing can be published, the stacks are there at least.
        if self._stacks is not None:
            faulthandler.dump_traceback(self._stacks)
        error = hide_secrets(error)[:2000]
        report = self.report(
            cause=cause, error=error, stack=_main_stack(), silent=self._silent(), named=named
        )
        self._peers.exit_reports[report.process] = report
        call_within([lambda c=c: c.publish(report) for c in self._channels], PUBLISH)
        return report

    def _wait_for_exit_reports(self) -> dict[int, Report]:
        """Exit reports of all processes that can still write one, or as many as come in time."""
        folder, own = self._placement.folder, self._placement.process
        deadline = time.monotonic() + GRACE
        found = self._peers.exit_reports
        # Processes from which none will come: silent, or ended without one.
        mute = set(found[own].silent)

        def listen() -> None:
            if folder is not None:
                mute.update(folder.ended())
                self._peers.hear(folder.reports(), own=own)

        while len(set(found) | mute) < self._placement.processes and time.monotonic() < deadline:
            call_within([listen], deadline - time.monotonic())
            time.sleep(0.1)
        return dict(found)

    def fail(self, error: BaseException) -> None:
        """Publish an error as the exit report, at once: the others wait for this process."""
        with self._leaving:
            # KeyboardInterrupt and SystemExit are no faults.
            if self._placement.alone or self._closed.is_set() or not isinstance(error, Exception):
                return
            named = error.processes if isinstance(error, BadHost) else ()
            text = f"{type(error).__name__}: {error}"
            self._publish_exit_report(cause_among_peers(error), text, named)
            if self._placement.process == 0:
                # The coordination service ends with this process, and the others use it.
                self._wait_for_exit_reports()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End the watch. Raises PeerFailed in place of an error that another process caused."""
        if isinstance(error, Exception):
            self.fail(error)
        self._closed.set()
        for channel in self._channels:
            channel.seal()
        if self._stacks is not None:
            faulthandler.disable()
            self._stacks.close()
        if isinstance(error, PeerFailed) or not isinstance(error, Exception):
            return
        # So the exit code is 76 and not a bug's: this process only met the consequence.
        if not self._placement.alone and cause_among_peers(error) == Cause.PEER:
            raise PeerFailed(f"another process failed: {_first_line(str(error))}") from error


def _start(target: Callable[[], None], name: str | None = None) -> None:
    threading.Thread(target=target, daemon=True, name=name or target.__name__).start()


def _first_line(text: str | None) -> str:
    return (text or "").splitlines()[0][:300] if text else ""


def _main_stack() -> tuple[str, ...]:
    """Functions on the main thread's stack, innermost last."""
    # Without line numbers, processes that wait at one place have equal stacks.
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    names = []
    while frame is not None:
        names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(names[:24]))
