"""Folders and files on a host that other users share: nothing that they planted is used.

In /tmp and /dev/shm anybody may make a folder or a link under a name that this program is about to
use. Whoever owns a folder decides what lies in it, and a link leads a write to a file elsewhere; as
root, to any file. So a folder is used only if no other user can replace it, and what other users
could have made is refused with its owner's name, never followed, emptied or removed.
"""

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from baichuan_jax.config.schema import ConfigError

# As many as Linux follows.
MOST_LINKS = 40
# Where jax, Triton and the CUDA driver keep compiled programs.
PROGRAMS = ("JAX_COMPILATION_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


def trusted_folder(path: Path, setting: str) -> Path:
    """The real path of a folder that no other user can replace; makes it and its parents (0700).

    A folder on the way that everybody may write must be sticky, as /tmp is. Raises ConfigError,
    which names the folder and its owner, and OSError.
    """
    real = "/"
    for place, found, _ in _way(path):
        if found is None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(place, 0o700)
            found = os.lstat(place)
        _require_owner(place, found, setting)
        if stat.S_ISLNK(found.st_mode):
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{setting}: {place} is no folder; name another one")
        if _is_replaceable_in(found):
            raise ConfigError(
                f"{setting}: every user may write {place} and replace what lies in it; take that "
                f"right away (chmod o-w {place}), or name another folder"
            )
        real = place
    return Path(real)


def open_private(path: Path, setting: str) -> int:
    """A descriptor of a folder that only this user can read and write; it is made if missing.

    Names in it are to be opened by the descriptor (dir_fd): it stays this folder, whatever becomes
    of its path. One of this user's that others may read or write is closed to them. Raises
    ConfigError for a link, and for a folder of another user; and OSError.
    """
    parent = trusted_folder(path.parent, setting)
    place = os.path.join(parent, path.name)
    with contextlib.suppress(FileExistsError):
        os.mkdir(place, 0o700)
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        owner = owner_name(os.lstat(place).st_uid)
        raise ConfigError(
            f"{setting}: {place} is a link or a file of {owner}, and must be a folder; remove it, "
            "or name another folder"
        ) from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise ConfigError(_of_another(place, found, setting))
        if found.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def require_private(path: Path, setting: str) -> None:
    """As `open_private`, for its ConfigError. A disk that fails is found when it is written."""
    with contextlib.suppress(OSError):
        os.close(open_private(path, setting))


def open_in(folder: int, name: str, flags: int) -> int:
    """Open a file of an `open_private` folder: no link, a regular file, this user's. OSError."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(descriptor)
        owner = owner_name(found.st_uid)
        raise OSError(errno.EPERM, f"it is no file of this user, but of {owner}", name)
    return descriptor


def without_links(path: str, flags: int) -> int:
    """An opener for `open`: a file that is written, where others may have planted something.

    Raises OSError for a link, which would lead the write elsewhere, a pipe, and a device.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _not_written(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_written(path)
    return descriptor


def _not_written(path: str) -> OSError:
    return OSError(
        errno.ELOOP, "it is a link, a pipe or a device, and only a file is written here", str(path)
    )


def require_file(path: Path) -> None:
    """Raise ConfigError where something that `without_links` refuses stands in a file's place."""
    try:
        kind = os.lstat(path).st_mode
    except OSError:
        # None yet. What else the path lacks is found when it is opened.
        return
    if not stat.S_ISREG(kind):
        raise ConfigError(
            f"{path} is a link, a folder, a pipe or a device, and only a file is written here; "
            "remove it"
        )


def refuse_planted_links(path: Path, what: str) -> None:
    """Raise ConfigError where a link on the way to a path is one that any user may have planted.

    Of another user, in a folder that all may write: the rule of Linux's fs.protected_symlinks,
    which containers and old systems lack.
    """
    try:
        for place, found, folder in _way(path):
            if found is None or not stat.S_ISLNK(found.st_mode):
                continue
            planted = found.st_uid not in {*_trusted(), folder.st_uid}
            if planted and folder.st_mode & stat.S_IWOTH:
                raise ConfigError(
                    f"{what}: {place} is a link that {owner_name(found.st_uid)} made in a folder "
                    "that all users may write; name another place"
                )
    except OSError:
        # Not to be found or entered: the write itself says so.
        return


def is_of_others(path: Path | str) -> bool:
    """Whether a link or a pipe is another user's: nothing is written through it."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    # The kind first: every write asks, and nearly all find a file.
    kind = found.st_mode
    return not (stat.S_ISREG(kind) or stat.S_ISCHR(kind) or stat.S_ISDIR(kind) or _trusts(found))


def why_not_run(folder: Path | str) -> str | None:
    """Why compiled programs of a folder must not be run; None: nothing is wrong with it.

    Whoever writes there, or may put another folder in its place, chooses what this process
    executes. A group that works together may share one.
    """
    last: os.stat_result | None = None
    try:
        # Links are judged too: their owner chooses the folder.
        for place, found, _ in _way(Path(folder)):
            if found is None:
                return None
            if not _trusts(found):
                return f"{place} belongs to {owner_name(found.st_uid)}"
            if _is_replaceable_in(found):
                return f"every user may write {place}"
            last = found
    except OSError:
        # None that can be read.
        return None
    # A sticky one keeps what lies in it, as /tmp does, and anybody adds to it.
    if last is not None and last.st_mode & stat.S_IWOTH:
        return f"every user may write {folder}"
    return None


def _is_replaceable_in(found: os.stat_result) -> bool:
    """Whether what lies in a folder can be replaced by every user: it is not sticky, as /tmp is."""
    return (
        stat.S_ISDIR(found.st_mode)
        and bool(found.st_mode & stat.S_IWOTH)
        and not found.st_mode & stat.S_ISVTX
    )


def refuse_programs_of_others() -> None:
    """Raise ConfigError where the environment names a folder of other users' compiled programs."""
    for variable in PROGRAMS:
        folder = os.environ.get(variable, "")
        # Object storage has rights of its own.
        if folder and "://" not in folder and (why := why_not_run(folder)) is not None:
            raise ConfigError(
                f"{variable}: {why}, and compiled programs are code that this process would run; "
                "name a folder that only you, or your group, may write"
            )


def owner_name(uid: int) -> str:
    """A user for a message, by name in quotes ('nobody'); by number where it has none here."""
    try:
        return repr(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return f"user {uid}"


def _way(path: Path) -> Iterator[tuple[str, os.stat_result | None, os.stat_result]]:
    """Every name on the way to a path, from the root on, with its state and its folder's.

    Links are followed. What is missing has no state; the caller may make it.
    """
    rest, place, links = list(reversed(path.absolute().parts[1:])), "/", 0
    while rest:
        if (name := rest.pop()) == "..":
            place = os.path.dirname(place)
            continue
        here, folder = os.path.join(place, name), os.stat(place)
        try:
            found = os.lstat(here)
        except FileNotFoundError:
            found = None
        yield here, found, folder
        if found is None or not stat.S_ISLNK(found.st_mode):
            place = here
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), here)
        target = Path(os.readlink(here))
        rest += [part for part in reversed(target.parts) if part != "/"]
        place = "/" if target.is_absolute() else place


def _require_owner(place: str, found: os.stat_result, setting: str) -> None:
    if not _trusts(found):
        raise ConfigError(_of_another(place, found, setting))


def _of_another(place: str, found: os.stat_result, setting: str) -> str:
    return (
        f"{setting}: {place} belongs to {owner_name(found.st_uid)}, who could change what is "
        "written there or lead it elsewhere; name a folder of your own"
    )


def _trusts(found: os.stat_result) -> bool:
    return found.st_uid in _trusted()


def _trusted() -> set[int]:
    """Users who can do this one no harm that they could not do anyway: itself, and root."""
    trusted = {0, os.geteuid()}
    # In a container without the host's root, what belongs to that is shown as nobody's.
    with contextlib.suppress(OSError, ValueError):
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if not any(int(outside) == 0 for _, outside, _ in ranges):
            trusted.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return trusted
