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

from baichuan_jax.resilience.causes import EXCEPTIONS, Cause, cause_of


def leave(code: int) -> NoReturn:
    """End this process with an exit code, at once where others of its run still live."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    jax = sys.modules.get("jax")
    # At its own exit jax waits minutes for the other processes, which a failed run may not have.
    saved = code in (Cause.COMPLETED.exit_code, Cause.PREEMPTED.exit_code)
    if not saved and jax is not None and jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def say(text: str) -> None:
    """Write a line to stderr. Best effort; never raises, so that a full disk stops nothing else."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


# What argparse exits with where argv is wrong, after it has said why.
USAGE_ERROR = 2


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command's main function; exit with its code, or with that of its error's cause."""
    try:
        code = command()
    # These name what is wrong and what to do; a traceback would hide it.
    except tuple(EXCEPTIONS) as error:
        say(f"error: {error}")
        code = cause_of(error).exit_code
    except SystemExit as end:
        if end.code != USAGE_ERROR:
            raise
        # Schedulers know the codes of the table only, and would start such a command again.
        code = Cause.CONFIGURATION.exit_code
    except KeyboardInterrupt:
        say("interrupted: nothing was saved after the last checkpoint")
        code = Cause.INTERRUPTED.exit_code
    except Exception:
        say(traceback.format_exc())
        code = Cause.EXCEPTION.exit_code
    leave(code)


@contextlib.contextmanager
def signals(on_stop: Callable[[str], None], on_trace: Callable[[], None]) -> Iterator[None]:
    """Handle signals inside: a first SIGINT or SIGTERM calls on_stop(name), SIGUSR1 on_trace.

    A later SIGINT raises KeyboardInterrupt. A later SIGTERM does nothing: schedulers send one to
    every process of a job, and supervisors pass it on. Only the main thread may handle signals; in
    any other (a server's thread) this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    # A handler runs between two bytecodes of the main thread, so it must do little.
    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            if number == signal.SIGTERM:
                return
            raise KeyboardInterrupt
        asked = True
        on_stop(signal.Signals(number).name)

    # Put back afterwards: a notebook has handlers of its own.
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: on_trace())
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
