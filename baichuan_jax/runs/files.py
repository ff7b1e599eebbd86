"""Files that are there whole or not at all, whatever is killed and however full the disk is."""

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import shutil
import stat
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from baichuan_jax.config.parsing import read_regular, refuse_credentials, require_plain
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.runs.private import is_of_others, refuse_planted_links, without_links

# The disk is full, or the user's share of it.
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
# No wrong setting or option: the same command works once there is room, or the disk is mended.
_OF_THE_DISK = FULL_DISK | {errno.EIO, errno.ESTALE}
# What os.link says on a file system without hard links: SMB, exFAT, object storage through FUSE.
_NO_LINKS = frozenset(
    {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL}
)

# Linux numbers processes up to this.
LARGEST_PROCESS = 1 << 22


def draft_of(path: Path, process: int | None = None) -> Path:
    """Where this process writes what gets the name `path` once it is whole.

    Two that write the same file at once must not share an unfinished one, and in containers the
    processes of several hosts have the same number.
    """
    return path.with_name(f"{path.name}.{_numbering()}.{process or os.getpid()}.tmp")


def new_draft(draft: Path) -> BinaryIO:
    """Open a draft for writing, anew: a file or a link that has its name is not written through.

    Close it at once where a library opens the draft by its name. Raises OSError.
    """
    # Tried first: on network storage each call is a message, and there is hardly ever one.
    try:
        return open(draft, "xb")
    except FileExistsError:
        draft.unlink(missing_ok=True)
        return open(draft, "xb")


def new_draft_folder(draft: Path) -> None:
    """Make a draft that is a folder, anew, and its parents. Raises OSError."""
    try:
        draft.mkdir(parents=True)
    except FileExistsError:
        _remove(draft)
        draft.mkdir(parents=True)


def _numbering() -> str:
    """Names what a process number counts in: a host since its start, and a container."""
    container = ""
    with contextlib.suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")
    known = "\n".join((os.uname().nodename, boot_id(), container))
    return hashlib.sha256(known.encode()).hexdigest()[:8]


@functools.cache
def boot_id() -> str:
    """Names this kernel until its next start, for all containers on it; "" where nothing says."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the drafts of a file or folder, or of all in a folder, whose process was killed.

    Best effort: whether a process of another host lives is not known here.
    """
    pattern = re.compile(rf"(.*)\.{_numbering()}\.(\d+)\.tmp", re.DOTALL)
    with contextlib.suppress(OSError):
        for draft in os.listdir(folder):
            match = pattern.fullmatch(draft)
            if match and name in (None, match[1]) and not _is_alive(int(match[2])):
                _remove(folder / draft)


def process_stat(pid: int) -> list[str]:
    """What /proc/PID/stat says behind the name, from field 3 on. [] where nothing says."""
    try:
        # A name may hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def has_ended(stat: list[str]) -> bool:
    """Whether a process is a zombie. Where nobody asks for its end it stays one for good."""
    return stat[:1] in (["Z"], ["X"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # Another user's.
        return True
    return not has_ended(process_stat(pid))


def _remove(path: Path) -> None:
    """Remove a file or a folder. Best effort."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def require_writable(folder: Path | str, setting: str) -> None:
    """Make a folder that a setting names. Raises ConfigError where it cannot be written."""
    refuse_credentials(str(folder), setting)
    require_plain(Path(folder).absolute(), setting)
    refuse_planted_links(Path(folder), setting)
    probe = draft_of(Path(folder) / ".probe")
    # Tried and not looked up: permission bits do not show a read-only mount.
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        new_draft(probe).close()
        probe.unlink()
        remove_leftovers(probe.parent)
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise
        raise ConfigError(
            f"{setting}={str(folder)!r} cannot be written in {os.getcwd()!r} ({error.strerror}); "
            f"name another folder with --{setting}, or start from one that may be written"
        ) from None


def writable(text: str) -> str:
    """The type of a command's option that names what it writes at its end: refused before that.

    Of a link its target: that is replaced, and not the link.
    """
    try:
        refuse_credentials(text, "the output")
        refuse_planted_links(Path(text), "the output")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if _is_written_itself(Path(text)):
        if not os.access(text, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written: Permission denied")
        return text
    text = os.path.realpath(text) if os.path.islink(text) else text
    path = Path(text).absolute()
    try:
        require_plain(path, "the output")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        # A name of 255 bytes is one, and its draft's is not.
        with contextlib.suppress(FileNotFoundError):
            draft_of(path, LARGEST_PROCESS).lstat()
    except OSError as error:
        # Of the disk: the write itself will say so.
        if error.errno not in _OF_THE_DISK:
            # argparse names the option before this.
            reason = f"{text!r} cannot be written: {error.strerror}"
            raise argparse.ArgumentTypeError(reason) from None
    remove_leftovers(path.parent, path.name)
    return text


def writable_file(text: str) -> str:
    """As `writable`, for a file."""
    # Not Path.is_dir, which raises at a name that is too long.
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is a folder")
    return writable(text)


def refuse_inputs(
    outputs: Mapping[str, Iterable[Path | str | None]], inputs: Mapping[str, Iterable[Path | str]]
) -> None:
    """Refuse to write over what a command reads, or to write two results into one file.

    Every command that has an output calls this before its work, with what it will write and what
    it reads, by option. None: an output that was not asked for. A folder that is read stands for
    all in it. Links to a file are that file. Raises ConfigError; also where a link on the way to an
    output is one that another user may have planted.
    """
    written: dict[Any, str] = {}
    for option, paths in outputs.items():
        for path in paths:
            if path is None:
                continue
            refuse_planted_links(Path(path), option)
            # A device or a pipe loses nothing.
            if _is_written_itself(Path(path)):
                continue
            # A folder's name is in the records of what lies there.
            refuse_credentials(str(path), option)
            shown = f"{option} {path}"
            for name in _names_of(path):
                if (other := written.setdefault(name, shown)) != shown:
                    raise ConfigError(f"{shown} and {other} are one file; give each its own")
    places = [name for name in written if isinstance(name, str)]
    for option, paths in inputs.items() if written else ():
        for path in paths:
            if lost := next((written[name] for name in _names_of(path) if name in written), None):
                raise ConfigError(
                    f"{lost} would replace {path}, which {option} names; name another file"
                )
            if not os.path.isdir(path):
                continue
            # By its place, since it may be a new file, and as a link that lies elsewhere.
            inside = f"{os.path.realpath(path)}{os.sep}"
            found = [written[name] for name in places if name.startswith(inside)]
            # Looked for only where an output is there already.
            if len(places) < len(written):
                found += [written[name] for name in _linked_in(path) if name in written]
            for lost in found:
                raise ConfigError(
                    f"{lost} would be written into {path}, which {option} names; name another file"
                )


def identity_of(state: os.stat_result) -> tuple[int, ...]:
    """The same for all names and links of one file."""
    # Size and time too: some network file systems give several files one number.
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _names_of(path: Path | str) -> Iterator[Any]:
    """What a file is known by: its path without links and, where it is there, the file itself."""
    yield os.path.realpath(path)
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            yield identity_of(found)


def _linked_in(folder: Path | str) -> Iterator[Any]:
    """What the files in a folder are known by that have a second name."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                if os.stat(file := os.path.join(parent, name)).st_nlink > 1:
                    yield from _names_of(file)


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file under another name, then rename it: nobody ever sees half of it.

    Makes its folder. Not durable: faster, and a power failure may lose it. A device, a pipe and
    stdout are written as they are. Raises OSError, which names the file; nothing is left of it
    then.
    """
    temporary = draft_of(path)
    with naming(path):
        if _is_written_itself(path):
            _write_itself(path, content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new_draft(temporary) as file:
                file.write(content)
            if durable:
                publish(temporary, path)
            else:
                os.replace(temporary, path)
        except OSError:
            # Half a file is of no use, and it takes room on a disk that is full.
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _is_written_itself(path: Path) -> bool:
    """Whether a path is no file that can be replaced: a device, a pipe, or where stdout goes.

    A rename would put a file in the place of /dev/stdout, for every program on the machine. Another
    user's link or pipe is replaced: it leads where that user likes.
    """
    if is_of_others(path):
        return False
    try:
        found = os.stat(path)
    except OSError:
        return False
    kind = found.st_mode
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) or _stream_of(found) is not None


def _stream_of(found: os.stat_result) -> int | None:
    """The descriptor of stdout or stderr that goes to this file, or None."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(number)):
                return number
    return None


def _write_itself(path: Path, content: bytes) -> None:
    """Write to a device, a pipe or a stream. One whose reader has ended wants no more."""
    number = _stream_of(os.stat(path))
    for stream in (sys.stdout, sys.stderr):
        if number is not None and stream is not None:
            # What was printed before stands before it.
            stream.flush()
    target = path if number is None else number
    with (
        contextlib.suppress(BrokenPipeError),
        open(target, "wb", buffering=0, closefd=number is None) as file,
    ):
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once its content is on the disk."""
    with naming(path):
        # Without fsync a power failure could keep the new name and lose the content.
        _flush(temporary)
        os.replace(temporary, path)


def _flush(path: Path) -> None:
    """Return once a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Where the block makes a folder, which gets its name once all of it is on the disk.

    The caller owns `path`, which is not there or empty. Raises OSError.
    """
    draft = draft_of(path)
    new_draft_folder(draft)
    try:
        # Inside, so that what a library writes beside it is a part of the draft too.
        folder = draft / path.name
        yield folder
        for file in (folder, *folder.rglob("*")):
            _flush(file)
        folder.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure, whole or not at all; the format is that of the path's suffix."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        # A folder may be named a$b^$: no formula, and as one an error.
        text.set_parse_math(False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:] or "png", dpi=dpi)
    write_atomically(path, content.getvalue())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the name of the file that it is about.

    Python names the file where it is opened, and not where it is written.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


class Appender:
    """Appends records to a file, each whole or not at all; what the disk refuses waits in memory.

    `waiting`: the records that are not written yet, in their order. Every call tries again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: deque[bytes] = deque()
        self._file: io.FileIO | None = None
        # Where the whole records end; None before the file was opened.
        self._end: int | None = None

    def add(self, record: bytes) -> OSError | None:
        """Append a record behind all that wait. Returns why it waits; None: it is written."""
        self.waiting.append(record)
        return self.flush()

    def flush(self) -> OSError | None:
        """Write what waits. Returns the error that stopped it, or None."""
        try:
            with naming(self.path):
                # Kept open: opening a file on network storage at every step would cost more than
                # the line.
                file = self._file = self._file or self._open()
                while self.waiting:
                    self._end = end = os.fstat(file.fileno()).st_size
                    # Unbuffered and in append mode: one write of a whole record.
                    if file.write(self.waiting[0]) < len(self.waiting[0]):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._end = end + len(self.waiting.popleft())
        except OSError as error:
            # Half a record may be there. It is cut off now, or when the file is opened again.
            with contextlib.suppress(OSError):
                self.close()
                self._file = self._open()
            return error
        return None

    def close(self) -> None:
        """Close the file; what waits is kept."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self) -> io.FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+b", buffering=0, opener=without_links)  # noqa: SIM115
        try:
            if self._end is None:
                # What a killed writer left of its last line: the next one would be appended to it,
                # and neither could be read.
                file.seek(0)
                self._end = file.read().rfind(b"\n") + 1
            file.truncate(self._end)
        except OSError:
            file.close()
            raise
        return file


def create_once(path: Path, content: bytes) -> bool:
    """Write a file of which there is one; False where another process was first.

    Of processes that race exactly one gets True, on any host, and no reader sees half of a file,
    whatever is killed. `read_once` reads it. Raises ConfigError on a file system that can do
    neither of two things. The first: a hard link can be made only once, NFS included; open(O_EXCL)
    would leave an empty file where its writer is killed. The second, where links are not there: a
    folder cannot be renamed onto one that holds a file. Then the file lies in PATH.once/.
    """
    # Complete and on the disk before it has its name.
    draft = draft_of(path.with_name(f".{path.name}"))
    try:
        new_draft_folder(draft)
        write_atomically(draft / path.name, content)
        try:
            # Also where links work again: a host that lacked them may have been first.
            if read_once(path) is not None:
                return False
            os.link(draft / path.name, path)
            return True
        except FileExistsError:
            # An NFS client that lost the reply asks again, and is told of its own link.
            return os.path.samefile(draft / path.name, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _rename_once(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename_once(draft: Path, path: Path) -> bool:
    try:
        os.rename(draft, _once(path))
        return True
    except OSError as error:
        # As with links: the rename may have been done although it says otherwise.
        if not draft.exists():
            return True
        if read_once(path) is not None:
            return False
        raise ConfigError(
            f"{path.parent} lies on a file system without hard links, where a folder cannot be "
            f"renamed either ({error.strerror}): processes cannot agree there who is first; "
            "choose a folder on another one"
        ) from None


def read_once(path: Path) -> bytes | None:
    """The content of a file of create_once, or what replaced it; None where there is none.

    Raises ConfigError for what is no regular file.
    """
    for file in (path, _once(path) / path.name):
        try:
            return read_regular(file)
        except OSError as error:
            # A link to itself leads to no file. ESTALE: on NFS, of a file that was replaced while
            # it was read; the next look finds the new one.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE):
                raise
    return None


def remove_once(path: Path) -> None:
    """Remove a file of create_once. Best effort."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    shutil.rmtree(_once(path), ignore_errors=True)


def _once(path: Path) -> Path:
    return path.with_name(f"{path.name}.once")
