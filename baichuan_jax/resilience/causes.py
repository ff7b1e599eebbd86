"""Why a process or a launch ends: the one vocabulary for faults, and the exceptions that mean them.

A `Cause` says with which code a command exits, whether a restart may help, and what happened. A
training process takes its cause from the exception that ends it (`cause_of`); attribution.py adds
the causes that only others can see: a process that was killed, or whose heartbeat timed out. The
tables of exit codes in `launch --help`, both READMEs and docs/operations.md show `exit_code_table`
(tests/resilience/test_causes.py compares them).
"""

import enum
import errno
import itertools
import os
import re

from baichuan_jax.config.messages import printable
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.runs.files import FULL_DISK


class Cause(enum.StrEnum):
    """Why something ended. The value is the word in reports, verdicts and events.

    Codes from 70 to 78 have their meaning from sysexits.h where it has a fitting one: 70 internal
    error, 74 input/output, 75 try again later, 78 configuration. 130 is a shell's code for SIGINT.
    """

    exit_code: int
    # Whether a restart may help. A scheduler that knows only the code may act on it.
    restart: bool
    # One sentence for tables and messages.
    meaning: str

    COMPLETED = "completed", 0, False, "complete"
    EXCEPTION = "exception", 70, False, "an error of the program, or of one host alone"
    STORAGE = "storage", 74, True, "a file cannot be read or written, or the disk fails; make room"
    PREEMPTED = "preempted", 75, True, "asked to stop (Ctrl-C, SIGTERM, SIGHUP), and saved"
    HANG = "hang", 76, True, "a phase took longer than its limit"
    SILENT = "silent", 76, True, "a heartbeat timed out"
    KILLED = "killed", 76, True, "a signal ended a process"
    PEER = "peer", 76, True, "another process failed"
    UNKNOWN = "unknown", 76, True, "the reason is unknown"
    NUMERICS = "numerics", 77, True, "values not finite, or a spike; the next launch rolls back"
    CONFIGURATION = "configuration", 78, False, "a setting or an input is wrong"
    BAD_HOST = "bad host", 79, True, "a check found a bad host, or too few hosts came"
    INTERRUPTED = "interrupted", 130, False, "a second Ctrl-C; not saved"

    def __new__(cls, word: str, exit_code: int, restart: bool, meaning: str) -> "Cause":
        # The value is the word alone, so that Cause("hang") reads what a file holds.
        member = str.__new__(cls, word)
        member._value_ = word
        member.exit_code, member.restart, member.meaning = exit_code, restart, meaning
        return member

    @classmethod
    def _missing_(cls, value: object) -> "Cause":
        # A report or an event of another version, whose words may differ.
        return cls.UNKNOWN


def exit_code_table() -> list[tuple[str, str, str, str]]:
    """Rows of exit code, its causes, whether a restart may help (yes, no), meaning."""
    rows = []
    # Causes with one code stand next to each other above.
    for code, group in itertools.groupby(Cause, lambda cause: cause.exit_code):
        causes = list(group)
        restart = "yes" if causes[0].restart else "no"
        meaning = "; ".join(cause.meaning for cause in causes)
        rows.append((str(code), ", ".join(causes), restart, meaning))
    return rows


class NumericsError(RuntimeError):
    """Losses or gradients that are not finite, or a spike: the run must go back to a checkpoint."""


class PeerFailed(RuntimeError):
    """Another process of the run failed, and this one with it."""


class SaveFailed(RuntimeError):
    """A checkpoint, or what a run must not lose, could not be written: a full disk, a lost one."""


class BadHost(RuntimeError):
    """A check found that `processes` compute or communicate wrongly."""

    def __init__(self, message: str, processes: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.processes = processes


# In this order: an exception of two kinds has the first cause.
EXCEPTIONS: dict[type[BaseException], Cause] = {
    ConfigError: Cause.CONFIGURATION,
    NumericsError: Cause.NUMERICS,
    PeerFailed: Cause.PEER,
    BadHost: Cause.BAD_HOST,
    SaveFailed: Cause.STORAGE,
}


# More files are open than the process, or the host, may have.
_MANY_FILES = frozenset({errno.EMFILE, errno.ENFILE})
# A disk is full, over quota, read-only or failing: a restart may find it mended.
_STORAGE = _MANY_FILES | {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EREMOTEIO,
}
# So does a file system of a network; where the error names no file, it is of another connection.
_NETWORK = frozenset({errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN})
# This user may not do that: a restart would meet it again.
_REFUSED = frozenset({errno.EACCES, errno.EPERM})
# The path itself is wrong, whatever the disk does.
_NO_PATH = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})


# How TensorStore and ArrayRecord name the file.
_FILE = re.compile(r'"(/[^"\n]+)"|(?:opening|writing) (/[^;\n]+);')


def errno_of(error: BaseException) -> int | None:
    """The system's number of a disk's error; None of other errors.

    Libraries in C++ (TensorStore, ArrayRecord, Arrow, Daft) raise errors of Python's other types,
    which quote the system's words.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    return next((n for n in sorted(_STORAGE | _REFUSED) if os.strerror(n) in text), None)


def cause_of(error: BaseException) -> Cause:
    """The cause that an exception means by its type, or by the system's number in it."""
    for kind, cause in EXCEPTIONS.items():
        if isinstance(error, kind):
            return cause
    number = errno_of(error)
    if number in _STORAGE or (number in _NETWORK and getattr(error, "filename", None)):
        return Cause.STORAGE
    if number in _REFUSED | _NO_PATH:
        return Cause.CONFIGURATION
    return Cause.EXCEPTION


def describe(error: BaseException) -> str:
    """One line: what a command says of an error that is no bug."""
    number = errno_of(error)
    # Ours say what to do, and quote the system too.
    if number is None or isinstance(error, tuple(EXCEPTIONS)):
        return str(error)
    named = _FILE.search(str(error))
    file = getattr(error, "filename", None) or (named[1] or named[2] if named else "a file")
    # Object storage has errors of its own words, without a number. A planted link has ours.
    worded = number in (errno.EREMOTEIO, errno.ELOOP)
    own = error.strerror if isinstance(error, OSError) and worded else None
    return printable(f"{file}: {own or os.strerror(number)}; {what_to_do(number)}", one_line=True)


def what_to_do(number: int | None) -> str:
    """What helps against an error of a disk, by its errno; None where that is not known."""
    if number in FULL_DISK:
        return "make room, and start the same command again"
    if number in _MANY_FILES:
        return "raise the limit of open files (ulimit -n), and start the same command again"
    if number in _REFUSED:
        return "give this user the right to it, or name another place"
    if number in _NO_PATH:
        return "name another place"
    return "mend the disk, or make room, and start the same command again"


# XLA's errors begin with a status. They come as JaxRuntimeError, but as ValueError where an array
# is fetched, so the type does not tell them apart from the program's own.
_STATUS = re.compile(r"[A-Z_]+: ")

# What such an error says when a peer is lost, rather than something here being wrong: gloo, the
# coordination service, NCCL.
_LOST_PEER = (
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


def cause_among_peers(error: BaseException) -> Cause:
    """The cause in a run of several processes, where an error may be another process's failure."""
    cause = cause_of(error)
    # A failed save too: when a peer is lost, Orbax's barrier fails and the save with it.
    if cause not in (Cause.EXCEPTION, Cause.STORAGE):
        return cause
    # The error that says so may be wrapped, as in a SaveFailed.
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        if _STATUS.match(text) and any(words in text for words in _LOST_PEER):
            return Cause.PEER
        link = link.__cause__ or link.__context__
    return cause
