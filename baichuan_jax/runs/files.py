"""Files that are there whole or not at all, whatever is killed."""

import argparse
import errno
import os
import tempfile
from pathlib import Path

from baichuan_jax.config.schema import ConfigError


def require_writable(folder: Path | str, setting: str) -> None:
    """Make a folder that a setting names. Raises ConfigError where it cannot be written."""
    probe = Path(folder) / f".{os.getpid()}.tmp"
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


def writable(text: str) -> str:
    """The type of a command's option that names what it writes at its end: refused before that."""
    path = Path(text).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        # A disk that is full or fails is no wrong option; the write itself will say so.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE):
            # argparse names the option before this.
            reason = f"{text!r} cannot be written: {error.strerror}"
            raise argparse.ArgumentTypeError(reason) from None
    return text


def writable_file(text: str) -> str:
    """As `writable`, for a file."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is a folder")
    return writable(text)


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file under another name, then rename it: nobody ever sees half of it.

    Makes its folder. Not durable: faster, and a power failure may lose it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # By process: two that write the same file at once must not share an unfinished one.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
