"""How a command ends: exit codes for a supervisor to act on, signals that ask for a saved stop."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from baichuan_jax.config.schema import ConfigError

BUG = 70  # an error of the program: a restart would meet it again, unless it is one host's alone
UNSAVED = 74  # a checkpoint could not be written: make room, start again
PREEMPTED = 75  # asked to stop, saved: start again at will
HANG = 76  # nothing moved, or another process failed: start again
NUMERICS = 77  # losses or gradients not finite, or a spike: start again, which rolls back
CONFIGURATION = 78  # a setting or input that cannot be right: a restart would meet it again
BAD_HOST = 79  # a check found a host bad: start again without it
INTERRUPTED = 130  # a second Ctrl-C: nothing saved


class NumericsError(RuntimeError):
    """Losses or gradients that are not finite, or a spike: the run must go back to a checkpoint."""


class PeerFailed(RuntimeError):
    """Another process of the run failed, and this one with it."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written: a full disk, a lost file system."""


class BadHost(RuntimeError):
    """A check found that `processes` compute or communicate wrongly."""

    def __init__(self, message: str, processes: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.processes = processes


MEANINGS: dict[type[BaseException], int] = {
    ConfigError: CONFIGURATION,
    NumericsError: NUMERICS,
    PeerFailed: HANG,
    BadHost: BAD_HOST,
    SaveFailed: UNSAVED,
}


def exit_code(error: BaseException) -> int:
    """The code that an error means."""
    return next((code for kind, code in MEANINGS.items() if isinstance(error, kind)), BUG)


def leave(code: int) -> NoReturn:
    """End this process with a code. With other processes in the run, at once: jax would wait minutes for them at its own exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    jax = sys.modules.get("jax")
    if code not in (0, PREEMPTED) and jax is not None and jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def say(text: str) -> None:
    """Write a line to stderr. Where that cannot be (its file lies on a full disk), nothing else is kept from being done."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command's main function and leave with its code, or with the one that its error means."""
    try:
        code = command()
    except tuple(MEANINGS) as error:
        say(f"error: {error}")
        code = exit_code(error)
    except KeyboardInterrupt:
        say("interrupted: nothing was saved after the last checkpoint")
        code = INTERRUPTED
    except Exception:
        say(traceback.format_exc())
        code = BUG
    leave(code)


@contextlib.contextmanager
def signals(on_stop: Callable[[str], None], on_trace: Callable[[], None]) -> Iterator[None]:
    """Inside: the first SIGINT or SIGTERM calls on_stop(name), a later SIGINT raises KeyboardInterrupt; SIGUSR1 calls on_trace.

    A later SIGTERM means the same as the first: schedulers send one to every process of a job, and
    supervisors pass it on.

    Only the main thread may handle signals; elsewhere (a server's thread) this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            if number == signal.SIGTERM:
                return
            raise KeyboardInterrupt
        asked = True
        on_stop(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: on_trace())
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
