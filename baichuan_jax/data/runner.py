"""The one runner of resumable parts: the corpus pipeline's stages and packed rows' shards.

Input: parts, each of which knows whether it is finished and how to make itself. Output: their
files, each made once, in worker processes of this machine or on the Ray cluster that RAY_ADDRESS
names, whose hosts share the folders. A part writes its file under another name and renames it, then
in the same way a record of everything that the file was made from. The record comes last, so a part
is finished if and only if it has a record with the right content: a killed run leaves no half-done
part, and the next run makes what is missing. The first failure stops the run.
"""

import concurrent.futures
import logging
import multiprocessing
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from tqdm import tqdm

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.causes import Cause, SaveFailed, cause_of, describe
from baichuan_jax.resilience.waits import announced

# How often, in seconds, a log that is no terminal gets a line of progress, and from when on.
LOG_SECONDS = 30
# Parts take about a minute. Longer ones are no error, and storage or a cluster may hang.
STALLED_SECONDS = 300.0


class Part(Protocol):
    """A piece of work whose result is kept in files. It is pickled to the process that makes it."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def is_done(self) -> bool:
        """Whether its files are there and were made from what they would be made from now."""
        ...

    def make(self) -> None:
        """Write its files, whole or not at all. May run more than once, and on any host."""
        ...


@dataclass(frozen=True)
class Failure:
    """Why a part could not be made; a traceback does not survive the way between processes."""

    part: str
    text: str
    # What the run raises: ConfigError or SaveFailed where a user can mend it, so that the message
    # is enough and no traceback is shown.
    kind: type[Exception]

    def error(self) -> Exception:
        """What the run raises."""
        return self.kind(f"{self.part}: {self.text}" if self.kind is RuntimeError else self.text)


class Workers:
    """Processes that make parts. They live until `close`, so that what they import is kept."""

    def __init__(self, num_workers: int = 0, progress: bool = True) -> None:
        """`num_workers`: 0 means one for each core of this machine, or CPU of the Ray cluster."""
        self.on_ray = bool(os.environ.get("RAY_ADDRESS"))
        cores = _connect_to_ray() if self.on_ray else len(os.sched_getaffinity(0))
        self.number = num_workers or cores
        self._progress = progress
        # Made when there is something to do for more than one process.
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def finish(self, parts: Sequence[Part], description: str, unit: str = "part") -> int:
        """Make every part that is not done; returns how many that were.

        Raises ConfigError where a user can mend what failed (a setting, a file), SaveFailed for a
        disk that is full or fails, else RuntimeError with the worker's traceback: of several
        failures the one of the first part.
        """
        todo = [part for part in parts if not part.is_done()]
        if not todo:
            return 0
        failures = []
        done = len(parts) - len(todo)
        with _bar(len(parts), done, description, unit, self._progress) as bar:
            for failure in _announced(self._outcomes(todo), f"{description}: a {unit} to end"):
                if failure is None:
                    bar.update()
                else:
                    failures.append(failure)
        if failures:
            # Of the first part: what a user mends first, and the same one in every run.
            order = {part.name: number for number, part in enumerate(todo)}
            raise min(failures, key=lambda failure: order[failure.part]).error()
        return len(todo)

    def _outcomes(self, todo: Sequence[Part]) -> Iterator[Failure | None]:
        if self.on_ray:
            yield from _on_ray(todo, self.number)
        elif min(self.number, len(todo)) == 1:
            # Nothing to gain from a process: it takes a second or two to start.
            for part in todo:
                yield (failure := _attempt(part))
                if failure is not None:
                    return
        else:
            yield from self._in_processes(todo)

    def _in_processes(self, todo: Sequence[Part]) -> Iterator[Failure | None]:
        if self._pool is None:
            # spawn: a fork of a process whose jax or daft has threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.number, context, _end_with_parent
            )
        # All at once: the pool hands them to processes as these become free, in order. The
        # processes start with the first.
        with _without_script():
            futures = [self._pool.submit(_attempt, part) for part in todo]
        try:
            for future in concurrent.futures.as_completed(futures):
                if future.cancelled():
                    continue
                failure = future.result()
                if failure is not None:
                    # What runs already is waited for: it writes its files, and may fail in an
                    # earlier part, whose message is the one to show.
                    for other in futures:
                        other.cancel()
                yield failure
        except concurrent.futures.BrokenExecutor:
            self._pool = None
            raise RuntimeError(
                "a worker process was killed, most likely because memory ran out; start again "
                "with fewer workers (num_workers): finished parts are kept"
            ) from None
        # Ctrl-C. Not waited for: a part may take minutes, and an unfinished one is made again.
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            with announced("worker processes to end"):
                self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _announced(outcomes: Iterator[Failure | None], what: str) -> Iterator[Failure | None]:
    """The same outcomes; each is waited for without a limit, and not without a word."""
    done = object()
    while True:
        with announced(f"{what}; none has for {STALLED_SECONDS:.0f} s", STALLED_SECONDS):
            outcome = next(outcomes, done)
        if outcome is done:
            return
        yield cast(Failure | None, outcome)


def _attempt(part: Part) -> Failure | None:
    """In a worker: make a part, and report what went wrong as a value."""
    try:
        part.make()
    except Exception as error:
        cause = cause_of(error)
        if cause == Cause.STORAGE:
            return Failure(part.name, f"{describe(error)}: finished parts are kept", SaveFailed)
        if cause == Cause.CONFIGURATION:
            return Failure(part.name, describe(error), ConfigError)
        # Files that are missing or unreadable are the user's to mend.
        if isinstance(error, OSError):
            return Failure(part.name, str(error), ConfigError)
        return Failure(part.name, traceback.format_exc(), RuntimeError)
    return None


@contextmanager
def _without_script() -> Iterator[None]:
    """Processes that are started inside do not import the script of this one.

    A spawned process imports it first, so that it finds classes that are defined there. A script
    without "if __name__ == '__main__'" would start its work again in every worker, and these would
    wait for this process for ever. Parts are classes of this package, so a worker needs no script.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    # `python -m baichuan_jax...`: its classes are parts, and it has the guard.
    if spec is not None and spec.name.startswith("baichuan_jax"):
        yield
        return
    # What multiprocessing.spawn.get_preparation_data looks at.
    file = vars(main).pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _end_with_parent() -> None:
    """In a worker: end when the process that started it is killed.

    The pool's own processes would wait for their next part for ever, and one that is at work would
    write beside the next run.
    """
    # A pipe to the parent closes when it dies, whatever killed it.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _connect_to_ray() -> int:
    """Join the cluster that RAY_ADDRESS names, or start one where it is "local"; its CPUs."""
    address = os.environ["RAY_ADDRESS"]
    # Ray's own output would hide the progress bar and the error that matters.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # Ray runs the code of whoever reaches its ports. It reads these as it is imported.
        os.environ.update(
            # Its name for a cluster of this host alone: all ports are on loopback.
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            # Other users of this host reach loopback too. Ray's own token would lie in
            # ~/.ray, where all may read it.
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
        )
        options["include_dashboard"] = False
    import ray  # pyright: ignore[reportMissingImports]

    with announced(f"the Ray cluster at RAY_ADDRESS={address}"):
        ray.init(address, ignore_reinit_error=True, **options)
    return int(ray.cluster_resources().get("CPU", 1))


def _on_ray(todo: Sequence[Part], number: int) -> Iterator[Failure | None]:
    """Parts as Ray tasks. Ray itself repeats a task whose host was lost."""
    import ray  # pyright: ignore[reportMissingImports]

    attempt: Any = ray.remote(num_cpus=1)(_attempt)
    waiting = iter(todo)
    running: set[Any] = set()
    failed = False
    while True:
        # Only so many tasks at once as there are workers: this is what limits num_workers, and a
        # hundred thousand waiting tasks would burden the cluster's scheduler.
        while not failed and len(running) < number and (part := next(waiting, None)) is not None:
            running.add(attempt.remote(part))
        if not running:
            return
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        running.remove(ready)
        failure = ray.get(ready)
        failed = failed or failure is not None
        yield failure


def _bar(total: int, done: int, description: str, unit: str, progress: bool) -> tqdm:
    """A progress bar in a terminal; in a log a line now and then, and none of a short run."""
    # In a file every update would be a line.
    seconds = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=description,
        disable=not progress,
        mininterval=seconds,
        delay=0 if sys.stderr.isatty() else LOG_SECONDS,
    )
