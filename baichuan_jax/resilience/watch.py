"""The watch over one process: heartbeats, a watchdog, and a last word before it leaves.

There is a side thread for each board (the run's folder, jax's coordination service): it publishes
the heartbeat and, while this process stands still, listens to the others; it may block for as long
as its board does. The watchdog, one more thread, looks at memory only, so nothing blocks it. A
process leaves through os._exit where its phase outlasts its limit, where a peer is not heard any
more, or where a peer has said a last word. It says its own first: where it stood, and the stacks of
all its threads.
"""

import contextlib
import dataclasses
import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baichuan_jax.config.schema import ConfigError, ResilienceConfig
from baichuan_jax.resilience.attribution import blame
from baichuan_jax.resilience.clock import CHECKPOINT, EVALUATE, LOOP, WAIT, Clock
from baichuan_jax.resilience.exits import HANG, BadHost, NumericsError, PeerFailed, SaveFailed, say
from baichuan_jax.resilience.reports import (
    BAD_HOST,
    CONFIGURATION,
    EXCEPTION,
    NUMERICS,
    PEER,
    STORAGE,
    Folder,
    Report,
    Service,
    agree,
    service,
)
from baichuan_jax.resilience.reports import HANG as HUNG
from baichuan_jax.resilience.stragglers import Stragglers

BEAT = 1.0  # seconds between heartbeats: together under 0.1 % of a core
LISTEN = 2.5  # seconds in one phase, from which on others are listened to
GRACE = 3.0  # seconds that others get to say their last word
PATIENCE = 5  # a phase may last this many times its longest so far
ROUND = 4  # heartbeats between two looks for slow processes
PUBLISH = 2.0  # seconds that a board gets to take a last word

# Variables by which a supervisor (launch.py) tells a process that it is not alone.
FOLDER_VARIABLE, HOST_VARIABLE, SUPERVISOR_VARIABLE, FULL_VARIABLE = (
    "BAICHUAN_JAX_ATTEMPT",
    "BAICHUAN_JAX_HOST",
    "BAICHUAN_JAX_SUPERVISOR",
    "BAICHUAN_JAX_FULL_PROCESSES",
)
UNSUPERVISED = "unsupervised"  # a file in the folder of a launch that no supervisor planned


class Watch:
    """A context around everything that a process of a run does; an error that leaves it is the process's last word.

    `step` and `own_seconds` are what the loop last said. Inside a group of processes, or under a
    supervisor, a standstill ends the process with exit code 76; alone it is reported on stderr and
    nothing is ended, since nobody would start it again.
    """

    def __init__(self, config: ResilienceConfig, clock: Clock, attempts: Path) -> None:
        self.step = 0
        self.own_seconds: float | None = None
        self.host = os.environ.get(HOST_VARIABLE) or socket.gethostname()
        self._config, self._clock, self._attempts = config, clock, attempts
        self._supervised = FOLDER_VARIABLE in os.environ
        self._process, self._processes = int(os.environ.get("JAX_PROCESS_ID", 0)), 1
        self._folder: Folder | None = None
        self._service: Service | None = None
        self._beat = 0
        self._heard: dict[
            int, tuple[int, float]
        ] = {}  # process -> its newest beat, when that was first seen
        self._listened = 0.0
        self._words: dict[int, Report] = {}
        self._closed = threading.Event()
        self._leaving = threading.Lock()
        self._locks = {Folder: threading.Lock(), Service: threading.Lock()}
        self._stacks: Any = None
        self._warned: tuple[str, int] | None = None
        self.on_straggler: Callable[..., None] = lambda **_: (
            None
        )  # on process 0, from a side thread
        self._stragglers = Stragglers()

    def __enter__(self) -> "Watch":
        if self._supervised:
            self._open(Path(os.environ[FOLDER_VARIABLE]))
        self._start(self._watchdog)
        return self

    def join(self) -> None:
        """The other processes are there (or there are none): from now on listen to them."""
        import jax

        self._process, self._processes = jax.process_index(), jax.process_count()
        self._service = service()
        if self._service is not None:
            self._start(self._publish_on, self._service)
        if self._folder is None:
            self._open(Path(agree("attempt", lambda: str(_next_attempt(self._attempts)))))

    @property
    def _alone(self) -> bool:
        return self._processes == 1 and not self._supervised

    @property
    def attempt(self) -> Path:
        """The folder of this launch's reports."""
        assert self._folder is not None, "join() comes first"
        return self._folder.path

    def _open(self, path: Path) -> None:
        self._folder = Folder(path)
        path.mkdir(parents=True, exist_ok=True)
        if not self._alone:
            self._stacks = open(path / f"stacks-{self._process}.txt", "w")  # noqa: SIM115
            faulthandler.enable(self._stacks)  # jax aborts a process whose coordinator is gone
        self._start(self._publish_on, self._folder)

    def _start(self, target: Any, *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, daemon=True, name=target.__name__).start()

    def report(self, **word: Any) -> Report:
        """This process now."""
        phase, age = self._clock.now
        return Report(
            self._process,
            self.host,
            os.getpid(),
            self._beat,
            time.time(),
            self.step,
            phase,
            round(age, 3),
            self.own_seconds,
            {name: round(seconds, 3) for name, seconds in self._clock.totals().items()},
            **word,
        )

    def _publish_on(self, board: Folder | Service) -> None:
        first = board is self._folder or self._folder is None
        while not self._closed.wait(BEAT):
            self._beat += first
            try:
                self._publish(board, self.report())
                if self._clock.now[1] > LISTEN:
                    self._listen(board.read())
                elif (
                    first and self._process == 0 and self._processes > 1 and self._beat % ROUND == 0
                ):
                    self._look_for_stragglers(board.read())
            except (
                Exception
            ) as error:  # a board that fails for now is one that the others do not hear from either
                say(f"heartbeat: {type(board).__name__.lower()}: {error}")
                self._closed.wait(5 * BEAT)

    def _look_for_stragglers(self, reports: dict[int, Report]) -> None:
        own = {
            process: report.own_seconds
            for process, report in reports.items()
            if report.own_seconds is not None
        }
        for found in self._stragglers.look(own):
            self.on_straggler(host=reports[found.process].host, **dataclasses.asdict(found))

    def _publish(self, board: Folder | Service, report: Report) -> None:
        with self._locks[type(board)]:  # so that no heartbeat comes after the last word
            if report.cause is not None or not self._closed.is_set():
                board.publish(report)

    def _listen(self, reports: dict[int, Report]) -> None:
        now = time.monotonic()
        late = (
            now - self._listened - 2 * BEAT
        )  # what passed while this process did not listen says nothing about the others
        if late > 0:
            self._heard = {
                process: (beat, since + late) for process, (beat, since) in self._heard.items()
            }
        self._listened = now
        for process, report in reports.items():
            if process == self._process:
                continue
            if process not in self._heard or self._heard[process][0] < report.beat:
                self._heard[process] = (report.beat, now)
            if report.cause is not None:
                self._words[process] = report

    def _watchdog(self) -> None:
        while not self._closed.wait(BEAT / 2):
            if self._supervised and os.getppid() != int(os.environ[SUPERVISOR_VARIABLE]):
                os._exit(
                    HANG
                )  # its supervisor is gone, and others may have begun without this process
            phase, age = self._clock.now
            limit = self._limit(phase)
            if age > limit:
                if not self._alone:
                    self._leave(HUNG, f"{age:.0f} s in {phase}, over its limit of {limit:.0f} s")
                elif self._warned != (phase, self.step):
                    self._warned = (phase, self.step)
                    say(f"\nnothing has happened for {age:.0f} s (in {phase} at step {self.step}):")
                    faulthandler.dump_traceback(sys.stderr)
            elif age > LISTEN and self._words:
                self._leave(PEER, _first_line(next(iter(self._words.values())).error))
            elif age > LISTEN and (silent := self._silent()):
                self._leave(
                    HUNG,
                    f"process {', '.join(map(str, silent))} not heard for {self._config.silence_seconds:g} s",
                )

    def _limit(self, phase: str) -> float:
        """Seconds that a phase may last: its setting, or a multiple of its longest; the first of its kind as long as a start.

        As long as a start, too, before the first step is done: who has its programs from a cache
        waits for those who compile.
        """
        config = self._config
        if phase not in LOOP or not {phase, WAIT} <= set(self._clock.longest):
            return config.start_seconds
        limit = config.hang_seconds * (10 if phase in (CHECKPOINT, EVALUATE) else 1)
        return max(limit, PATIENCE * self._clock.longest[phase])

    def _silent(self) -> tuple[int, ...]:
        """Peers whose heartbeat stands still, once all have done a step: before, a long call may hold Python's lock."""
        if WAIT not in self._clock.longest:
            return ()
        heard, listened = dict(self._heard), self._listened
        return tuple(
            p
            for p, (_, since) in sorted(heard.items())
            if listened - since > self._config.silence_seconds
        )

    def _leave(self, cause: str, error: str) -> None:
        """From the watchdog: say the last word, hear the others', leave."""
        with self._leaving:
            if self._closed.is_set():
                return
            word = self._say(cause, error)
            words = self._hear_the_others()
            at = f"at step {word.step} in {word.phase}; stacks: {self._stacks.name}"
            say(f"\nprocess {self._process} on {self.host}: {cause}: {error}; {at}")
            if not self._supervised and self._process == min(words):
                say(f"verdict: {self._verdict(words)}")
            if self._process == 0:
                time.sleep(
                    BEAT
                )  # its coordination service ends with it, and jax aborts those that still use it
            os._exit(HANG)

    def _verdict(self, words: dict[int, Report]) -> str:
        reports = {**(self._folder.read() if self._folder else {}), **words}
        hosts = {
            process: reports[process].host if process in reports else "?"
            for process in range(self._processes)
        }
        return str(blame(hosts, reports, {}))

    def _say(self, cause: str, error: str, named: tuple[int, ...] = ()) -> Report:
        """Publish the last word; heartbeats end with it."""
        self._closed.set()
        if self._stacks is not None:
            faulthandler.dump_traceback(self._stacks)
        silent = self._silent()
        word = self.report(
            cause=cause, error=error[:2000], stack=_main_stack(), silent=silent, named=named
        )
        self._words[self._process] = word
        boards = [board for board in (self._folder, self._service) if board is not None]
        threads = [
            threading.Thread(target=_quietly, args=(self._publish, board, word), daemon=True)
            for board in boards
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PUBLISH)
        return word

    def _hear_the_others(self) -> dict[int, Report]:
        """Last words of all processes that can still speak, or as many as come in time."""
        deadline = time.monotonic() + GRACE
        mute = set(self._words[self._process].silent)

        def listen() -> None:
            assert self._folder is not None
            mute.update(self._folder.ended())
            self._listen(self._folder.read())

        while (
            len(self._words) + len(mute - set(self._words)) < self._processes
            and time.monotonic() < deadline
        ):
            reader = threading.Thread(target=_quietly, args=(listen,), daemon=True)
            reader.start()
            reader.join(deadline - time.monotonic())
            time.sleep(0.1)
        return dict(self._words)

    def fail(self, error: BaseException) -> None:
        """Say an error as this process's last word, at once: the others wait for it in a collective or a barrier."""
        with self._leaving:
            if self._alone or self._closed.is_set() or not isinstance(error, Exception):
                return
            self._say(
                _cause(error), f"{type(error).__name__}: {error}", getattr(error, "processes", ())
            )
            if self._process == 0:
                self._hear_the_others()  # the coordination service ends with this process

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End the watch. An error is the last word; raises PeerFailed in place of one that another process's failure caused."""
        if isinstance(error, Exception):
            self.fail(error)
        self._closed.set()
        if self._stacks is not None:
            faulthandler.disable()
            self._stacks.close()
        if (
            isinstance(error, Exception)
            and not self._alone
            and _cause(error) == PEER
            and not isinstance(error, PeerFailed)
        ):
            raise PeerFailed(f"another process failed: {_first_line(str(error))}") from error


# What jax's errors say when a peer is gone, rather than something here being wrong: gloo, the
# coordination service, NCCL.
PEER_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "UNAVAILABLE",
    "unhealthy",
    "Gloo",
    "DEADLINE_EXCEEDED",
    "Barrier",
    "CoordinationService",
    "remote process exited",
    "ncclRemoteError",
    "ncclSystemError",
    "heartbeat",
)

# XLA's errors begin with a status; they come as JaxRuntimeError, and where an array is fetched as
# ValueError.
_STATUS = re.compile(r"[A-Z_]+: ")


def _cause(error: BaseException) -> str:
    for kind, cause in (
        (PeerFailed, PEER),
        (ConfigError, CONFIGURATION),
        (NumericsError, NUMERICS),
        (BadHost, BAD_HOST),
    ):
        if isinstance(error, kind):
            return cause
    link: BaseException | None = error
    while link is not None:
        if _STATUS.match(str(link)) and any(words in str(link) for words in PEER_WORDS):
            return PEER
        link = link.__cause__ or link.__context__
    return STORAGE if isinstance(error, SaveFailed) else EXCEPTION


def _first_line(text: str | None) -> str:
    return (text or "").splitlines()[0][:300] if text else ""


def _quietly(function: Any, *arguments: Any) -> None:
    with contextlib.suppress(Exception):
        function(*arguments)


def _main_stack() -> tuple[str, ...]:
    """Functions on the main thread's stack, innermost last, without line numbers."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    names = []
    while frame is not None:
        names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(names[:24]))


def _next_attempt(attempts: Path) -> Path:
    numbers = [int(path.name) for path in attempts.glob("[0-9]*") if path.name.isdigit()]
    path = attempts / str(max(numbers, default=0) + 1)
    draft = path.with_name(f".{os.getpid()}")
    draft.mkdir(parents=True, exist_ok=True)
    (draft / UNSUPERVISED).touch()
    draft.rename(path)
    return path
