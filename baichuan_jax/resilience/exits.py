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

from baichuan_jax.config.messages import hide_secrets, printable
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.causes import Cause, cause_of, describe
from baichuan_jax.runs.console import lasting_streams
from baichuan_jax.runs.files import FULL_DISK
from baichuan_jax.runs.private import refuse_programs_of_others

# A user who sees nothing for longer takes the program for dead.
SAY_SECONDS = 5.0
# How long the end of Python may last, with nothing left to save: Python waits for every library's
# threads, and those of Orbax wait ten minutes for a folder that a full disk has refused.
EXIT_SECONDS = 30.0
# The same where other processes are waited for, which jax does for five minutes.
PEERS_EXIT_SECONDS = 400.0


def leave(code: int) -> NoReturn:
    """End this process with an exit code, at once where others of its run still live."""
    jax = sys.modules.get("jax")
    # At its own exit jax waits minutes for the other processes, which a failed run may not have.
    saved = code in (Cause.COMPLETED.exit_code, Cause.PREEMPTED.exit_code)
    peers = jax is not None and jax.distributed.is_initialized()
    if not saved and peers:
        os._exit(code)
    limit = PEERS_EXIT_SECONDS if peers else EXIT_SECONDS
    what = "the other processes of this run" if peers else "threads of libraries"
    waits = f"waiting for {what} to end ({limit:.0f} s at most)"
    # Now: while Python ends it starts no thread.
    _at_the_end(SAY_SECONDS, lambda: say(waits))
    _at_the_end(limit, lambda: os._exit(code))
    sys.exit(code)


def _at_the_end(seconds: float, act: Callable[[], object]) -> None:
    """Act after some seconds where Python has not ended by then."""

    def look() -> None:
        # Not where a caller (a test, a notebook) has caught SystemExit and goes on.
        if not threading.main_thread().is_alive():
            act()

    timer = threading.Timer(seconds, look)
    timer.daemon = True
    timer.start()


def say(text: str) -> None:
    """Write a line to stderr. Best effort; never raises, so that a full disk stops nothing else."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(hide_secrets(text)), file=sys.stderr, flush=True)


def say_from_handler(text: str) -> None:
    """Write a line to stderr from a signal's handler. Best effort; never raises."""
    # Not print: a signal may come in the middle of one, and print is not reentrant.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{printable(text)}\n".encode())


# What argparse exits with where argv is wrong, after it has said why.
USAGE_ERROR = 2


def run_command(
    command: Callable[[], int],
    result_is_shown: bool = False,
    interrupted: str = "",
    joins: bool = False,
) -> NoReturn:
    """Run a command's main function; exit with its code, or with that of its error's cause.

    Nothing that it shows can end it: a closed pipe or terminal, a full disk under a log. Where the
    result itself is shown, a disk that refuses it is an error. `interrupted`: what Ctrl-C leaves of
    the command's work, for its user. `joins`: it may be one of several processes, and refuses
    others' compiled programs together with them, in initialize_processes.
    """
    with lasting_streams() as stdout:
        try:
            code = _code_of(command, interrupted, joins)
        except SystemExit as end:
            if end.code:
                raise
            # --help and --print_config: what they print is all that was asked for.
            code, result_is_shown = 0, True
        stdout.flush()
        lost = stdout.error
        # A reader that has ended, as in `| head`, wants no more.
        if result_is_shown and code == 0 and isinstance(lost, OSError) and lost.errno in FULL_DISK:
            say(f"error: the result cannot be written to stdout ({lost.strerror}); make room")
            code = Cause.STORAGE.exit_code
    leave(code)


def _code_of(command: Callable[[], int], interrupted: str, joins: bool) -> int:
    try:
        _require_working_directory()
        if not joins:
            refuse_programs_of_others()
        return command()
    except SystemExit as end:
        if end.code != USAGE_ERROR:
            raise
        # Schedulers know the codes of the table only, and would start such a command again.
        return Cause.CONFIGURATION.exit_code
    except KeyboardInterrupt:
        say(f"interrupted: {interrupted}" if interrupted else "interrupted")
        return Cause.INTERRUPTED.exit_code
    except Exception as error:
        cause = cause_of(error)
        # All but one name what is wrong and what to do; a traceback would hide it.
        say(traceback.format_exc() if cause == Cause.EXCEPTION else f"error: {describe(error)}")
        return cause.exit_code


def _require_working_directory() -> None:
    """Raise ConfigError where it was deleted: then no path means anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError(
            "the working directory was deleted; change into one that is there, and start the same "
            "command again"
        ) from None


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask to save and stop: Ctrl-C, a scheduler's, and a terminal that closes."""
    asked = (signal.SIGINT, signal.SIGTERM)
    # nohup ignores it: the run is to outlive its terminal.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return asked
    return (*asked, signal.SIGHUP)


@contextlib.contextmanager
def signals(on_stop: Callable[[str], None], on_trace: Callable[[], None]) -> Iterator[None]:
    """Handle signals inside: the first of stop_signals() calls on_stop(name), SIGUSR1 on_trace.

    A later SIGINT raises KeyboardInterrupt. A later SIGTERM or SIGHUP does nothing: schedulers send
    one to every process of a job, and supervisors pass it on. Only the main thread may handle
    signals; in any other (a server's thread) this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    # A handler runs between two bytecodes of the main thread, so it must do little.
    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            if number != signal.SIGINT:
                return
            raise KeyboardInterrupt
        asked = True
        on_stop(signal.Signals(number).name)

    # Put back afterwards: a notebook has handlers of its own.
    previous = {number: signal.signal(number, stop) for number in stop_signals()}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: on_trace())
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
