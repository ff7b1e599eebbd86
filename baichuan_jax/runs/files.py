"""Files that are there whole or not at all, whatever is killed."""

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path

from baichuan_jax.config.schema import ConfigError

# What os.link says on a file system without hard links: SMB, exFAT, object storage through FUSE.
_NO_LINKS = frozenset(
    {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL}
)


def require_writable(folder: Path | str, setting: str) -> None:
    """Make a folder that a setting names. Raises ConfigError where it cannot be written."""
    probe = Path(folder) / f".{uuid.uuid4().hex}.tmp"
    # Tried and not looked up: permission bits do not show a read-only mount.
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{setting}={str(folder)!r} cannot be written in {os.getcwd()!r} ({error.strerror}); "
            f"name another folder with --{setting}, or start from one that may be written"
        ) from None


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file under another name, then rename it: nobody ever sees half of it.

    Makes its folder. Not durable: faster, and a power failure may lose it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # By host and process: two that write the same file at once must not share an unfinished one,
    # and in containers the processes of several hosts have the same number.
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    if durable:
        publish(temporary, path)
    else:
        os.replace(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once its content is on the disk."""
    # Without fsync a power failure could keep the new name and lose the content.
    descriptor = os.open(temporary, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    os.replace(temporary, path)


def create_once(path: Path, content: bytes) -> bool:
    """Write a file of which there is one; False where another process was first.

    Of processes that race exactly one gets True, on any host, and no reader sees half of a file,
    whatever is killed. `read_once` reads it. Raises ConfigError on a file system that can do
    neither of two things. The first: a hard link can be made only once, NFS included; open(O_EXCL)
    would leave an empty file where its writer is killed. The second, where links are not there: a
    folder cannot be renamed onto one that holds a file. Then the file lies in PATH.once/.
    """
    # Complete and on the disk before it has its name.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
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
    """The content of a file of create_once, or what replaced it; None where there is none."""
    for file in (path, _once(path) / path.name):
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            # On NFS, of a file that was replaced while it was read: the next look finds the new.
            if error.errno != errno.ESTALE:
                raise
    return None


def remove_once(path: Path) -> None:
    """Remove a file of create_once. Best effort."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    shutil.rmtree(_once(path), ignore_errors=True)


def _once(path: Path) -> Path:
    return path.with_name(f"{path.name}.once")
