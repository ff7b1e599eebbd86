"""Which files hold the text, and the slices of them that are read in parallel.

Input: globs. Output: files, then slices: a whole file, the lines that begin in a range of bytes of
a plain JSONL file, or consecutive row groups of a Parquet file. Slices depend on the files and the
size asked for, never on the number of workers, so what is made of a slice can be kept and found
again. A compressed or .txt file cannot be entered in the middle and is one slice.
"""

import errno
import fnmatch
import glob
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from baichuan_jax.config.parsing import refuse_credentials, show_path
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.parquet import open_parquet
from baichuan_jax.documents.storage import of_storage, open_binary, pyarrow_for
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.files import identity_of


class Kinds(NamedTuple):
    """Which files a command reads, by the ends of their names, and that in words."""

    names: tuple[str, ...]
    expected: str
    # Whether .gz or .zst may follow.
    compressed: bool = True

    def has(self, path: str) -> bool:
        """Whether a file is of one of these kinds."""
        return (kind_of(path) if self.compressed else Path(path).suffix) in self.names


TEXT = Kinds(
    (".jsonl", ".json", ".txt", ".parquet"),
    "expected .jsonl or .json (a document a line) or .txt (a document a file), also with .gz or "
    ".zst; or .parquet",
)
# What globs leave out, as `count_unread` counts it, in words.
UNREAD = {
    "hidden_files": "hidden files not read",
    "files_in_folders": "files in matched folders not read",
}
# The folder that the package lies in: a checkout, or site-packages.
INSTALLED = Path(__file__).parents[2]
# How much larger text is than its .gz or .zst, about. An estimate: it only balances parts.
INFLATION = 4
# What the system says of a path that leads to nothing: a link to a file that is gone or to itself,
# a file in place of a folder. Any other error hides what is there.
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_AGAIN = "start again when nothing writes to it"


@dataclass(frozen=True)
class Slice:
    """A file, or lines that begin in its bytes [start, stop), or its row groups [start, stop)."""

    path: str
    start: int = 0
    stop: int | None = None
    # One more than the newlines before `start`, or than the rows before the first row group.
    # 1 where nobody has counted them.
    first_line: int = 1
    # Bytes of text, estimated.
    size: int = field(default=0, compare=False)

    @property
    def shown(self) -> str:
        """Its path as text for messages, tables and ids: Linux's names need not be UTF-8."""
        return show_path(self.path)

    @property
    def by_bytes(self) -> bool:
        """Whether it is a range of a plain file, whose first line's number has to be counted."""
        return self.stop is not None and kind_of(self.path) != ".parquet"


class State(NamedTuple):
    """What a file was like when it was looked at. Object storage has no time to compare."""

    size: int
    modified_ns: int | None


def kind_of(path: str) -> str:
    """The suffix below .gz or .zst."""
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix


def find_files(patterns: list[str], kinds: Kinds = TEXT) -> list[str]:
    """Local files that globs name, sorted, each once.

    baichuan_jax/... means the files that come with the program, wherever it is installed and
    whatever the working directory is. Raises ConfigError where a glob matches no file, a broken
    link or a file of an unknown kind, and where two names are one file, whose text would be read
    twice; OSError where a folder cannot be looked into, whose files would be missing.
    """
    files = each_once(path for pattern in patterns for path in _matches(pattern))
    return _require_known(files, kinds)


def each_once(paths: Iterable[str]) -> list[str]:
    """Local files, sorted, each once. Raises ConfigError where two names are one file."""
    # Sorted, so that the same globs give the same order on every host.
    files = sorted(set(paths))
    # By its absolute path: a.txt and ./a.txt are one name.
    named = {os.path.abspath(path): path for path in reversed(files)}
    found: dict[tuple[int, ...], str] = {}
    for path in files:
        if named[os.path.abspath(path)] != path:
            continue
        other = found.setdefault(identity_of(_stat(path)), path)
        if other != path:
            raise ConfigError(
                f"{other} and {path} are the same file, by a link: its text would be read twice; "
                "name one of them"
            )
    return list(found.values())


def states(files: Iterable[str]) -> dict[str, State]:
    """The local files as they are now: what is made of them is named by this."""
    found = ((path, _stat(path)) for path in files)
    return {path: State(state.st_size, state.st_mtime_ns) for path, state in found}


def require_unchanged(files: Mapping[str, State]) -> None:
    """Raise ConfigError where a local file is not what it was when it was looked at.

    For the end of long work on it: what was made of it is of neither state.
    """
    for path, before in files.items():
        if before.modified_ns is None:
            continue
        now = states([path])[path]
        if now != before:
            size = "" if now.size == before.size else f" from {before.size:,} to {now.size:,} bytes"
            raise ConfigError(f"{path} changed{size} while it was read; {_AGAIN}")


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError:
        raise removed(path) from None


def removed(path: str) -> ConfigError:
    """What is raised where a file is gone that was there when it was looked at."""
    return ConfigError(f"{show_path(path)} was removed while it was read; {_AGAIN}")


def count_unread(patterns: list[str]) -> dict[str, int]:
    """Local text files that globs may seem to mean and leave out, for the user to see.

    `hidden_files`: a name in their path begins with a dot. `files_in_folders`: they lie in a folder
    that a glob matches, of which it matches no file. Neither is refused: a folder may be what an
    earlier run wrote beside its input.
    """
    hidden, inside = find_unread(patterns, TEXT)
    return {"hidden_files": len(hidden), "files_in_folders": len(inside)}


def say_unread(patterns: list[str]) -> None:
    """Say on stderr what `count_unread` counts: for commands whose result does not hold it."""
    counted = [f"{n:,} {UNREAD[name]}" for name, n in count_unread(patterns).items() if n]
    if counted:
        others = f" and {len(patterns) - 1:,} more" if len(patterns) > 1 else ""
        named = f"{show_path(patterns[0])}{others}"
        say(f"{named}: {', '.join(counted)}; a glob that matches them has them read")


def find_unread(patterns: list[str], kinds: Kinds) -> tuple[list[str], list[str]]:
    """The files of these kinds that `count_unread` counts: hidden ones, and those in folders.

    A matched folder that cannot be looked into stands for the files in it.
    """
    hidden: set[str] = set()
    inside: set[str] = set()
    read: set[str] = set()
    closed: list[str] = []
    for pattern in patterns:
        if "://" in pattern:
            continue
        shown = glob.glob(_own(pattern), recursive=True)
        all_names = glob.glob(_own(pattern), recursive=True, include_hidden=True)
        hidden |= set(map(os.path.abspath, all_names))
        read |= set(map(os.path.abspath, shown))
        # With ** all files below are matched where they are meant.
        folders = [path for path in shown if os.path.isdir(path)] if "**" not in pattern else []
        for folder in folders:
            for parent, inner, names in os.walk(
                folder, onerror=lambda error: closed.append(error.filename)
            ):
                inner[:] = [name for name in inner if not name.startswith(".")]
                shown_names = (name for name in names if not name.startswith("."))
                inside |= {os.path.abspath(os.path.join(parent, name)) for name in shown_names}
    known = lambda paths: sorted(p for p in paths if kinds.has(p) and os.path.isfile(p))
    return known(hidden - read), known(inside - read) + closed


def find_inputs(patterns: list[str]) -> dict[str, State]:
    """Every file that globs name, here or as s3://, gs://, hdfs:// addresses, as it is now.

    Local paths are absolute, and all are sorted. Raises as find_files does.
    """
    found: dict[str, State] = {}
    local: list[str] = []
    for pattern in patterns:
        if "://" in pattern:
            refuse_credentials(pattern, "an input")
            remote = {path: State(size, None) for path, size in _find_remote(pattern)}
            if not remote:
                raise ConfigError(f"{pattern!r} matches no file")
            found.update(remote)
        else:
            # Absolute: ids are made from paths, whatever the working directory is.
            local += map(os.path.abspath, _matches(pattern))
    found |= states(each_once(local))
    return {path: found[path] for path in _require_known(sorted(found), TEXT)}


def _own(pattern: str) -> str:
    """A glob, with the folder that the package lies in before baichuan_jax/."""
    if pattern.startswith("baichuan_jax/"):
        return os.path.join(glob.escape(str(INSTALLED)), pattern)
    return pattern


def _matches(pattern: str) -> list[str]:
    refuse_credentials(pattern, "an input")
    found, folders = [], []
    for path in _expand(_own(pattern)):
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            folders.append(path)
        elif stat.S_ISREG(mode):
            found.append(path)
        else:
            # Of a link whose target is gone only the name is left.
            what = "a broken link" if os.path.islink(path) else "no regular file"
            raise ConfigError(f"{path} is {what} and matches {pattern!r}; mend or remove it")
    if not found:
        hint = ""
        if folders:
            example = os.path.join(glob.escape(folders[0]), "*.jsonl")
            hint = f"; {folders[0]} is a folder: name its files, such as {example!r}"
        raise ConfigError(f"{pattern!r} matches no file (working directory: {os.getcwd()}){hint}")
    return found


def _expand(pattern: str, folders: bool = False) -> Iterator[str]:
    """What glob.glob(pattern, recursive=True) gives; only the folders where that is asked for.

    glob.glob leaves out in silence what lies in a folder that it may not enter, or that the disk
    fails to list. Here that raises OSError.
    """
    parent, name = os.path.split(pattern)
    if not glob.has_magic(pattern):
        if _is_there(pattern):
            yield pattern
        return
    for folder in _expand(parent, folders=True) if glob.has_magic(parent) else [parent]:
        if name == "**":
            # Itself is one of the folders, with a slash at its end.
            if folder or folders:
                yield os.path.join(folder, "")
            yield from _below(folder, folders)
        elif glob.has_magic(name):
            for entry in _entries(folder):
                if _fits(entry.name, name) and (not folders or _is_folder(entry)):
                    yield os.path.join(folder, entry.name)
        elif _is_there(path := os.path.join(folder, name)):
            yield path


def _fits(found: str, name: str) -> bool:
    # As in a shell: only a pattern that begins with a dot matches what is hidden.
    hidden = found.startswith(".") and not name.startswith(".")
    return not hidden and fnmatch.fnmatchcase(found, name)


def _below(folder: str, folders: bool) -> Iterator[str]:
    """All that lies in a folder and in those in it, or the folders alone; nothing hidden."""
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        path, inner = os.path.join(folder, entry.name), _is_folder(entry)
        if inner or not folders:
            yield path
        if inner:
            yield from _below(path, folders)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing where it is none."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            return list(entries)
    except OSError as error:
        if error.errno not in _NOTHING:
            raise
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Of what is no link the kind is known without another look.
    return stat.S_ISDIR(_mode(entry.path)) if entry.is_symlink() else entry.is_dir()


def _is_there(path: str) -> bool:
    """Whether there is a file, a folder or a link of this name; one in `x/` must be a folder."""
    if path.endswith(os.sep):
        return stat.S_ISDIR(_mode(path))
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno not in _NOTHING:
            raise
        return False
    return True


def _mode(path: str) -> int:
    """The mode of what a path leads to; 0 where it leads to nothing."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in _NOTHING:
            raise
        return 0


def _require_known(files: list[str], kinds: Kinds) -> list[str]:
    """The files again. Raises ConfigError at one that is of none of these kinds."""
    for path in files:
        if not kinds.has(path):
            # Names differ in case too: .TXT is another kind to this program.
            kind = kind_of(path) or "not named"
            raise ConfigError(f"{path}: its kind is {kind!r}; {kinds.expected}")
    return files


def _find_remote(pattern: str) -> Iterator[tuple[str, int]]:
    """(address, size) of what matches a glob in object storage: one listing of its fixed folder."""
    fs = pyarrow_for(pattern).fs
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0].rsplit("/", 1)[0]
    # The limits of connections are pyarrow's own.
    with announced(f"{fixed} to be listed"), of_storage(fixed):
        filesystem, root = fs.FileSystem.from_uri(fixed)
        listed = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    # pyarrow lists paths without the scheme and host that the address had.
    prefix = fixed.removesuffix(root)
    for info in listed:
        scheme = pattern.split("://")[0]
        address = f"{prefix}{info.path}" if prefix else f"{scheme}://{info.path}"
        if info.type == fs.FileType.File and fnmatch.fnmatchcase(address, pattern):
            yield address, info.size


def split_files(sizes: Mapping[str, int], slice_bytes: int) -> list[Slice]:
    """Slices of about slice_bytes each, in the order of the files; small files stay whole.

    Raises ConfigError where a Parquet file is named and pyarrow is not installed.
    """
    slices = []
    for path, size in sizes.items():
        if kind_of(path) == ".parquet":
            slices += _row_groups(path, slice_bytes)
        elif path.endswith((".jsonl", ".json")) and size > slice_bytes:
            # Borders anywhere: the reader gives a line to the slice that it begins in.
            borders = [*range(0, size, slice_bytes), size]
            slices += [Slice(path, a, b, size=b - a) for a, b in itertools.pairwise(borders)]
        else:
            inflated = size * (INFLATION if path.endswith((".gz", ".zst")) else 1)
            slices.append(Slice(path, size=inflated))
    return slices


def make_parts(sizes: Mapping[str, int], part_bytes: int) -> list[list[Slice]]:
    """Slices in parts of about part_bytes: large files are cut, small ones share a part."""
    parts: list[list[Slice]] = [[]]
    weight = 0
    for piece in split_files(sizes, part_bytes):
        # A slice that is larger than a part is a part by itself.
        if parts[-1] and weight + piece.size > part_bytes:
            parts.append([])
            weight = 0
        parts[-1].append(piece)
        weight += piece.size
    return parts


def _row_groups(path: str, slice_bytes: int) -> list[Slice]:
    """Consecutive row groups of a Parquet file, about slice_bytes together.

    A damaged file is left whole: its reader reports it, with all other problems.
    """
    try:
        with open_parquet(path) as table:
            metadata = table.metadata
    except OSError as error:
        if error.errno is not None:
            raise
        return [Slice(path, size=slice_bytes)]
    slices = []
    start = row = weight = rows = 0
    for group in range(metadata.num_row_groups):
        weight += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if weight >= slice_bytes or group + 1 == metadata.num_row_groups:
            slices.append(Slice(path, start, group + 1, row + 1, size=weight))
            start, row, weight, rows = group + 1, row + rows, 0, 0
    return slices or [Slice(path)]


def count_lines(piece: Slice) -> int:
    """Newlines of a plain file in its bytes [start, stop)."""
    assert piece.stop is not None
    left, total = piece.stop - piece.start, 0
    with open_binary(piece.path) as file:
        file.seek(piece.start)
        # In pieces: a slice may be larger than the memory.
        while left and (chunk := file.read(min(left, 1 << 20))):
            total += chunk.count(b"\n")
            left -= len(chunk)
    return total
