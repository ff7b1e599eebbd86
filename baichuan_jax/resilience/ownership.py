"""Who may write a folder: one owner at a time, and a dead owner's claim ends.

Input: a lock file in the folder or beside it. Output: a claim that this process holds until it
releases it or dies. Two signs tell whether an owner lives. The first is flock: the kernel ends it
with its process, so a killed owner of the same machine is known at once. But on some shared storage
flock holds within a machine only, or is not there (Lustre without -o flock, NFS with local locks,
FUSE). So an owner also writes a record (who, where, since when) with a beat that grows; an owner of
another machine whose beat stands still for `silence` seconds is dead. Clocks are never compared.

Records are numbered: LOCK-1, LOCK-2, ... A claim is the creation of the next number, of which there
is one (`create_once`), and the largest number owns. So of processes that take a dead owner's place
one succeeds, without flock too, and an owner that was only suspended finds itself succeeded and
leaves. The newest record is never deleted: a number is never given twice.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from baichuan_jax.config.messages import hide_secrets
from baichuan_jax.config.parsing import (
    Count,
    Time,
    build,
    decode,
    parse_json,
    require_plain,
    show_path,
    whole_number,
)
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.coordination import TIMEOUT_SECONDS, agree
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.heartbeats import BEAT, HeartbeatMonitor
from baichuan_jax.resilience.waits import wait_until
from baichuan_jax.runs.files import (
    boot_id,
    create_once,
    has_ended,
    process_stat,
    read_once,
    remove_leftovers,
    remove_once,
    write_atomically,
)
from baichuan_jax.runs.folder import refuse_outside
from baichuan_jax.runs.private import refuse_planted_links, without_links

# As long as a supervisor gives another: twice resilience.silence_seconds by default. A process that
# compiles may hold Python's lock, and with it the beat, for some seconds.
SILENCE_SECONDS = 20.0
# How long an owner may take to end that was asked to, or that gives no sign of life.
STOPPING_SECONDS = 300.0
# How long a group of processes gives the one before it. A scheduler may start it while those still
# find out that one of them is lost, in a collective that no signal interrupts: hang_seconds, ten
# seconds for exit reports, and the scheduler's own grace before it kills them.
LEAVING_SECONDS = 60.0
# How long a cache that another process fills is waited for. What takes longer is better made before
# the run, where it does not hold a cluster.
CACHE_SECONDS = 3600.0


# What a read-only mount or a folder of another user says. A full disk is no wrong setting.
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})


@dataclasses.dataclass(frozen=True)
class Owner:
    """A claim's record: the owning process, and its newest sign of life."""

    host: str = "?"
    pid: Count = 0
    # One kernel, within which flock holds.
    machine: str = ""
    # What tells it from a later process of its number; "" where the system does not say.
    process: str = ""
    command: str = ""
    # Seconds since the epoch, for messages only.
    since: Time = 0.0
    # The launch that it belongs to, where a supervisor planned that; 0: a supervisor itself.
    launch: Count | None = None
    # Whether it holds the flock, so that a free one means that it is dead.
    locked: bool = False
    # Grows while it lives.
    beat: Count = 0
    # It was asked to stop, and saves.
    stopping: bool = False
    released: bool = False

    def __str__(self) -> str:
        launch = f", launch {self.launch}" if self.launch else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{launch}, since {since} ({self.command})"


def _machine() -> str:
    """What names this kernel: the same for all containers on it, another after a reboot."""
    return boot_id() or socket.gethostname()


def _process(pid: int) -> str:
    """What names a living process of this container; "" where there is none or nothing says."""
    stat = process_stat(pid)
    try:
        # Numbers mean something within a namespace.
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    # Field 22 of all is the start, in ticks.
    return f"{namespace} {stat[19]}" if stat and not has_ended(stat) else ""


def owner_of(lock: Path) -> Owner | None:
    """The newest record of a lock, whether its process lives or not; None where there is none."""
    return _newest(lock)[1]


class Claim:
    """A lock that this process owns. A thread of it shows that the process lives."""

    def __init__(self, file: IO[str], record: Path, owner: Owner) -> None:
        self._file, self._record, self._owner = file, record, owner
        self._stopping = False
        self._closed, self._writing = threading.Event(), threading.Lock()
        threading.Thread(target=self._beat, daemon=True, name="owner").start()

    def fileno(self) -> int:
        """The open lock file. A child that inherits it keeps the flock when this process dies."""
        return self._file.fileno()

    def stopping(self) -> None:
        """Say that this process was asked to stop: a successor waits instead of being refused."""
        # The next beat carries it: a signal handler calls this, and must not write files.
        self._stopping = True

    def release(self) -> None:
        """Let the next one in at once."""
        self._closed.set()
        with self._writing:
            self._owner = dataclasses.replace(self._owner, released=True)
            # Where it cannot be written, the flock or the beat's end says the same.
            with contextlib.suppress(OSError):
                write_atomically(self._record, _content(self._owner), durable=False)
        self._file.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            with self._writing:
                if self._closed.is_set():
                    return
                # A file system that fails now may work again; a damaged record is replaced.
                with contextlib.suppress(OSError, ConfigError):
                    self._show_life()

    def _show_life(self) -> None:
        if read_once(self._record) is None:
            number, successor = _newest(_lock_of(self._record))
            if number > _number_of(self._record):
                # It stood still for so long that it was taken for dead. Two must not write.
                say(f"{successor} took this process for dead and goes on in its place; leaving")
                os._exit(Cause.HANG.exit_code)
        beat = self._owner.beat + 1
        self._owner = dataclasses.replace(self._owner, beat=beat, stopping=self._stopping)
        write_atomically(self._record, _content(self._owner), durable=False)


class _Contender:
    """One process's try to own a lock."""

    def __init__(self, lock: Path, silence: float, launch: int | None) -> None:
        # A look may come just before a beat, and a beat may be late.
        self.lock, self.silence, self.launch = lock, max(silence, 3 * BEAT), launch
        lock.parent.mkdir(parents=True, exist_ok=True)
        refuse_outside(lock.parent, lock)
        # Not "w", which would change the file of another owner. Closed by the claim, or by `owned`.
        self.file = open(lock, "a", opener=without_links)  # noqa: SIM115
        self.claim: Claim | None = None
        self.owner: Owner | None = None
        self._locked: bool | None = False
        self._monitor: HeartbeatMonitor[int] = HeartbeatMonitor()
        self._number = 0

    def look(self) -> bool:
        """Take the lock if it is free; whether this process owns it now."""
        if self._locked is False:
            self._locked = _flock(self.file)
        self._number, self.owner = _newest(self.lock)
        if self.owner is not None:
            self._monitor.look({self._number: self.owner.beat})
        if self._is_free(self.owner):
            self._take()
        return self.claim is not None

    def is_alive(self) -> bool:
        """Whether the owner was seen to beat, and was not asked to stop."""
        owner = self.owner
        lives = self._number in self._monitor.alive(self.silence)
        return owner is not None and lives and not owner.stopping and not owner.released

    def _is_free(self, owner: Owner | None) -> bool:
        # A verdict says that the launches before have ended, also where storage has not noticed
        # yet: a restart waits for nothing.
        before = None if owner is None else owner.launch
        if before is not None and self.launch is not None and before < self.launch:
            return True
        if self._locked is False:
            return False
        if owner is None or owner.released:
            return True
        if owner.machine == _machine():
            if self._locked and owner.locked:
                return True
            own = _process(os.getpid()).split(" ")[0]
            if owner.process.startswith(own + " ") and _process(owner.pid) != owner.process:
                return True
        return self._monitor.age(self._number) >= self.silence

    def _take(self) -> None:
        owner = Owner(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process=_process(os.getpid()),
            # In one line: it stands in messages.
            command=hide_secrets(" ".join(" ".join(["python", *sys.orig_argv[1:]]).split()))[:200],
            since=time.time(),
            launch=self.launch,
            locked=bool(self._locked),
        )
        record = _record(self.lock, self._number + 1)
        if not create_once(record, _content(owner)):
            return
        # Others may have come and gone since the newest number was read.
        numbers = _numbers(self.lock)
        if max(numbers) != self._number + 1:
            remove_once(record)
            return
        for number in numbers:
            if number <= self._number:
                remove_once(_record(self.lock, number))
        self.claim = Claim(self.file, record, owner)


@contextlib.contextmanager
def owned(
    lock: Path,
    what: str,
    otherwise: str,
    *,
    silence: float = SILENCE_SECONDS,
    launch: int | None = None,
    shared: bool = False,
    tolerance: float = 0.0,
    seconds: float = STOPPING_SECONDS,
) -> Iterator[Claim]:
    """Own what a lock file guards, inside the block.

    A living owner is refused with ConfigError, after `tolerance` seconds in which it may end;
    `shared`: it is waited for, as what it makes serves all. One that is stopping, or that gives no
    sign of life and is not dead for certain, is waited for. `seconds` limits all waits. `what` and
    `otherwise` are the message's beginning and its end: what is owned, and what to do instead.
    """
    require_plain(lock.absolute(), what)
    refuse_planted_links(lock.parent, what)
    try:
        contender = _Contender(lock, silence, launch)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        raise ConfigError(
            f"{what} cannot be written ({error.strerror}: {error.filename}); {otherwise}"
        ) from None
    began = time.monotonic()
    refused = lambda: contender.is_alive() and time.monotonic() - began >= tolerance and not shared
    alone = contextlib.ExitStack()
    alone.callback(contender.file.close)
    with alone:
        wait_until(
            lambda: contender.look() or refused(),
            lambda: f"{contender.owner or 'another process'}, which owns {what}",
            seconds,
        )
        if contender.claim is None:
            raise ConfigError(_refusal(contender, what, otherwise, seconds))
        alone.pop_all()
    # Of owners that were killed.
    remove_leftovers(lock.parent)
    try:
        yield contender.claim
    finally:
        contender.claim.release()


def _refusal(contender: _Contender, what: str, otherwise: str, seconds: float) -> str:
    owner = contender.owner
    if owner is None:
        return f"{what} is owned by another process, which holds {contender.lock}; {otherwise}"
    stop = f"wait for its end, or stop it (kill {owner.pid} on {owner.host}); {otherwise}"
    if contender.is_alive():
        return f"{what} is owned by {owner}, which is at work; {stop}"
    how = "is stopping" if owner.stopping else "or a child of it holds it without a sign of life"
    return f"{what} is owned by {owner}, which {how} for more than {seconds:.0f} s; {stop}"


@contextlib.contextmanager
def owned_output(
    folder: Path, *, beside: bool = False, seconds: float = STOPPING_SECONDS
) -> Iterator[Claim]:
    """`owned` for the folder that a command writes. `beside`: nothing else may lie in it."""
    lock = lock_beside(folder) if beside else folder / "lock"
    with owned(lock, f"the output {folder}", "choose another output", seconds=seconds) as claim:
        remove_leftovers(folder)
        yield claim


def lock_beside(folder: Path) -> Path:
    """The lock of a folder in which nothing else may lie, one for all its names."""
    real = actual(folder)
    return real.with_name(f".{real.name}.lock")


def actual(folder: Path) -> Path:
    """A folder's own path, behind links and `.`: beside it lies its lock, one for all its names.

    Raises ConfigError for the root, which has nothing beside it, and where another user may have
    planted a link on the way.
    """
    # Here, since the path that is returned shows none of them.
    refuse_planted_links(folder, f"the output {folder}")
    real = Path(os.path.realpath(folder))
    if not real.name:
        raise ConfigError(f"{folder} is the root of a file system; choose a folder in it")
    return real


def require_own(paths: Iterable[Path], lock: Path, begun: Callable[[], bool]) -> None:
    """Refuse folders, and files, in which a command would remove and replace what others made.

    Before the lock is taken: where there is one, the command has worked. `begun`: whether a version
    has that had no lock, or on a copy. Raises ConfigError naming what lies there.
    """
    for path in paths:
        # In this order: an owner makes its lock before all else.
        if path.is_dir():
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            folder, held = path, names[0] if names else None
        else:
            folder, held = path.parent, path.name if path.exists() else None
        if held is not None and not lock.exists() and not begun():
            raise ConfigError(
                f"{folder} holds {held!r}, which no earlier run of this command made, and would "
                "lose it; choose another output"
            )


@contextlib.contextmanager
def owned_together(
    lock: Path, what: str, otherwise: str, **settings: Any
) -> Iterator[Claim | None]:
    """`owned` by process 0 for all processes of a run, which are refused together.

    Yields None in the others. Every process must call this, once for a lock.
    """
    with contextlib.ExitStack() as stack:
        claims: list[Claim] = []
        limit = settings.get("seconds", STOPPING_SECONDS) + TIMEOUT_SECONDS
        claim = lambda: claims.append(stack.enter_context(owned(lock, what, otherwise, **settings)))
        agree(f"owner of {what}", claim, limit)
        yield claims[0] if claims else None


def _flock(file: IO[str]) -> bool | None:
    """Whether this process holds the flock now; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # ENOLCK, ENOTSUP, ENOSYS and more.
    except OSError:
        return None
    return True


def _content(owner: Owner) -> bytes:
    # An argument of the command may be the name of a file, whose bytes need not be UTF-8.
    content = {**dataclasses.asdict(owner), "command": show_path(owner.command)}
    return json.dumps(content, ensure_ascii=False).encode()


def _record(lock: Path, number: int) -> Path:
    return lock.with_name(f"{lock.name}-{number}")


def _lock_of(record: Path) -> Path:
    return record.with_name(record.name.rpartition("-")[0])


def _number_of(record: Path) -> int:
    return int(record.name.rpartition("-")[2])


def _numbers(lock: Path) -> list[int]:
    """The numbers of a lock's records."""
    beginning, found = f"{lock.name}-", set()
    # The folder is not there before the first claim.
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(lock.parent):
            number = whole_number(name.removeprefix(beginning).removesuffix(".once"))
            if name.startswith(beginning) and number is not None:
                found.add(number)
    return sorted(found)


def _newest(lock: Path) -> tuple[int, Owner | None]:
    """The newest record's number and content; 0 and None where there is none."""
    for number in reversed(_numbers(lock)):
        record = _record(lock, number)
        refuse_outside(lock.parent, record)
        content = read_once(record)
        # Removed meanwhile, by the owner of a larger number.
        if content is None:
            continue
        try:
            return number, build(Owner, parse_json(decode(content, "it"), "it"), "it")
        except ConfigError as error:
            raise ConfigError(f"{record} is no owner's record ({error}); delete it") from None
    return 0, None
