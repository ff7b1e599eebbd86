"""Which files hold the text, and the slices of them that are read in parallel.

Input: globs. Output: files, then slices: a whole file, the lines that begin in a range of bytes of
a plain JSONL file, or consecutive row groups of a Parquet file. Slices depend on the files and the
size asked for, never on the number of workers, so what is made of a slice can be kept and found
again. A compressed or .txt file cannot be entered in the middle and is one slice.
"""

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from baichuan_jax.config.parsing import show_path
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.storage import open_binary, open_parquet, pyarrow_for
from baichuan_jax.resilience.waits import announced

KINDS = (".jsonl", ".json", ".txt", ".parquet")
EXPECTED = (
    "expected .jsonl or .json (a document a line) or .txt (a document a file), also with .gz or "
    ".zst; or .parquet"
)
# The folder that the package lies in: a checkout, or site-packages.
INSTALLED = Path(__file__).parents[2]
# How much larger text is than its .gz or .zst, about. An estimate: it only balances parts.
INFLATION = 4
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


def find_files(patterns: list[str]) -> list[str]:
    """Local files that globs name, sorted, each once.

    baichuan_jax/... means the files that come with the program, wherever it is installed and
    whatever the working directory is. Raises ConfigError where a glob matches no file, a broken
    link or a file of an unknown kind, and where two names are one file, whose text would be read
    twice.
    """
    return _known(each_once(path for pattern in patterns for path in _matches(pattern)))


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
        other = found.setdefault(identity_of(os.stat(path)), path)
        if other != path:
            raise ConfigError(
                f"{other} and {path} are the same file, by a link: its text would be read twice; "
                "name one of them"
            )
    return list(found.values())


def identity_of(state: os.stat_result) -> tuple[int, ...]:
    """The same for all names and links of one file."""
    # Size and time too: some network file systems give several files one number.
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def states(files: Iterable[str]) -> dict[str, State]:
    """The local files as they are now: what is made of them is named by this."""
    found = ((path, os.stat(path)) for path in files)
    return {path: State(state.st_size, state.st_mtime_ns) for path, state in found}


def require_unchanged(files: Mapping[str, State]) -> None:
    """Raise ConfigError where a local file is not what it was when it was looked at.

    For the end of long work on it: what was made of it is of neither state.
    """
    for path, before in files.items():
        if before.modified_ns is None:
            continue
        try:
            now = states([path])[path]
        except FileNotFoundError:
            raise ConfigError(f"{path} was removed while it was read; {_AGAIN}") from None
        if now != before:
            size = "" if now.size == before.size else f" from {before.size:,} to {now.size:,} bytes"
            raise ConfigError(f"{path} changed{size} while it was read; {_AGAIN}")


def count_unread(patterns: list[str]) -> dict[str, int]:
    """Local text files that globs may seem to mean and leave out, for the user to see.

    `hidden_files`: a name in their path begins with a dot. `files_in_folders`: they lie in a folder
    that a glob matches, of which it matches no file. Neither is refused: a folder may be what an
    earlier run wrote beside its input.
    """
    hidden: set[str] = set()
    inside: set[str] = set()
    read: set[str] = set()
    for pattern in patterns:
        if "://" in pattern:
            continue
        shown = set(glob.glob(_own(pattern), recursive=True))
        hidden |= set(glob.glob(_own(pattern), recursive=True, include_hidden=True)) - shown
        read |= {os.path.abspath(path) for path in shown}
        # With ** all files below are matched where they are meant.
        folders = [path for path in shown if os.path.isdir(path)] if "**" not in pattern else []
        for folder in folders:
            for parent, inner, names in os.walk(folder):
                inner[:] = [name for name in inner if not name.startswith(".")]
                shown_names = (name for name in names if not name.startswith("."))
                inside |= {os.path.abspath(os.path.join(parent, name)) for name in shown_names}
    count = lambda paths: sum(kind_of(path) in KINDS and os.path.isfile(path) for path in paths)
    return {"hidden_files": count(hidden), "files_in_folders": count(inside - read)}


def find_inputs(patterns: list[str]) -> dict[str, State]:
    """Every file that globs name, here or as s3://, gs://, hdfs:// addresses, as it is now.

    Local paths are absolute, and all are sorted. Raises ConfigError as find_files does.
    """
    found: dict[str, State] = {}
    local: list[str] = []
    for pattern in patterns:
        if "://" in pattern:
            remote = {path: State(size, None) for path, size in _find_remote(pattern)}
            if not remote:
                raise ConfigError(f"{pattern!r} matches no file")
            found.update(remote)
        else:
            # Absolute: ids are made from paths, whatever the working directory is.
            local += map(os.path.abspath, _matches(pattern))
    found |= states(each_once(local))
    return {path: found[path] for path in _known(sorted(found))}


def _own(pattern: str) -> str:
    """A glob, with the folder that the package lies in before baichuan_jax/."""
    if pattern.startswith("baichuan_jax/"):
        return os.path.join(glob.escape(str(INSTALLED)), pattern)
    return pattern


def _matches(pattern: str) -> list[str]:
    found, folders = [], []
    for path in glob.glob(_own(pattern), recursive=True):
        if os.path.isdir(path):
            folders.append(path)
        elif os.path.isfile(path):
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


def _known(files: list[str]) -> list[str]:
    """The files again. Raises ConfigError at one whose kind nothing reads."""
    for path in files:
        if kind_of(path) not in KINDS:
            # Names differ in case too: .TXT is another kind to this program.
            raise ConfigError(f"{path}: its kind is {kind_of(path) or 'not named'!r}; {EXPECTED}")
    return files


def _find_remote(pattern: str) -> Iterator[tuple[str, int]]:
    """(address, size) of what matches a glob in object storage: one listing of its fixed folder."""
    fs = pyarrow_for(pattern).fs
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0].rsplit("/", 1)[0]
    filesystem, root = fs.FileSystem.from_uri(fixed)
    # pyarrow lists paths without the scheme and host that the address had.
    prefix = fixed.removesuffix(root)
    # The limits of connections are pyarrow's own.
    with announced(f"{fixed} to be listed"):
        listed = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
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

    A file that cannot be opened is left whole: its reader reports it, with all other problems.
    """
    try:
        with open_parquet(path) as table:
            metadata = table.metadata
    except OSError:
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
