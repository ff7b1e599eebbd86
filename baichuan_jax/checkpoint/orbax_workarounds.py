"""What Orbax does not do yet, worked around in one place; each entry goes when its cause is mended.

Seen with orbax-checkpoint 0.12.8 under jax 0.10.1 and 0.11.2.
"""

import contextlib
import gc
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp

# How long the other reads of a failed restore still go on.
READS_END_SECONDS = 0.5


def barrier() -> Callable[..., None]:
    """Orbax's barrier between processes, which a saving thread does not enter after a failure.

    On its way out of an exception the thread waits at the barrier for the other processes, and
    these wait for its files: nobody hears of the failure until the barrier times out, ten minutes
    later by default. https://github.com/google/orbax/issues/605 made the thread's errors reach the
    caller in a run of one process.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
        # Inside an `except` or `finally` this is the exception on its way out; else None.
        failure = sys.exc_info()[1]
        if failure is not None and threading.current_thread() is not threading.main_thread():
            raise failure
        wait(key=key, timeout_ms=timeout_ms)

    return wait_unless_failed


def forget_failed_save(manager: ocp.CheckpointManager) -> None:
    """Take a save that failed out of the manager's list of steps.

    The list records a step when the blocking half of `save` returns, and keeps it when the write in
    the background fails: `all_steps` would name a checkpoint that is not there
    (https://github.com/AI-Hypercomputer/maxtext/pull/5260 describes the same). `reload` reads the
    list from the folder. It is a barrier, so only a run of one process may call this after a
    failure.
    """
    manager.reload()


@contextlib.contextmanager
def quiet_saves() -> Iterator[None]:
    """Keep the tracebacks of a failed save off the screen: the caller raises its error.

    Orbax's threads log the same error at every level that it passes, and TensorStore's threads
    print one traceback for each array whose event loop has ended: a thousand lines for a full disk.
    No report of it is known.
    """

    def is_news(record: logging.LogRecord) -> bool:
        # Those that only repeat an exception on its way to the caller.
        return record.exc_info is None or record.levelno < logging.ERROR

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    # For good: what a failed save leaves behind may print at the end of the process.
    logging.getLogger("asyncio").addFilter(_is_no_save)
    sys.excepthook = _without_late_errors(sys.excepthook, lambda kind, error, trace: error)
    sys.unraisablehook = _without_late_errors(sys.unraisablehook, lambda found: found.exc_value)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _without_late_errors(hook: Any, error_of: Callable[..., BaseException | None]) -> Any:
    """A hook of Python that leaves out what `_is_late` names."""

    def quiet(*arguments: Any) -> None:
        if not _is_late(error_of(*arguments)):
            hook(*arguments)

    # Once, however many stores a process opens.
    return hook if getattr(hook, "__name__", "") == quiet.__name__ else quiet


def _is_no_save(record: logging.LogRecord) -> bool:
    """Whether asyncio says something else than that a write of TensorStore failed."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, ValueError) and "os_error_code=" in str(error))


def _is_late(error: BaseException | None) -> bool:
    """Whether a thread of TensorStore met an event loop that a failed save has ended."""
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
    """Keep the tracebacks of a damaged file's reads off the screen; other output is passed on.

    When one array cannot be read, `asyncio.run` closes its event loop while the reads of other
    arrays go on in TensorStore's threads. Each of them prints a traceback ("Event loop is closed",
    "coroutine was never awaited") from a destructor, pages of them. No report of it is known. The
    failure itself is raised again.
    """
    # Destructors report through the hook, asyncio through a logger, TensorStore on stderr.
    hook, level, printed = sys.unraisablehook, logging.getLogger("absl").level, io.StringIO()
    sys.unraisablehook = lambda _: None
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(printed):
            try:
                yield
            # Not a ConfigError, of a checkpoint that is whole.
            except (RuntimeError, OSError, MemoryError):
                time.sleep(READS_END_SECONDS)
                # Coroutines that never started print when they are collected.
                gc.collect()
                printed.truncate(0)
                raise
    finally:
        # Where nothing was damaged: then this is worth reading, whatever else went wrong.
        sys.stderr.write(printed.getvalue())
        sys.unraisablehook = hook
        logging.getLogger("absl").setLevel(level)
