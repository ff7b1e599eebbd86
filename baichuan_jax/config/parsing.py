"""JSON and YAML that others wrote: read strictly, refused with file, place and reason.

In: a file or its text. Out: plain Python values. `require_type` compares a value with the
annotation that its reader expects (int, list[str], dict[str, float] | None), and `build` makes a
dataclass of an object, whose fields' annotations say what it must hold. What Python's parsers take
and nobody means is refused: keys that come twice, half characters, numbers that are none.
"""

import contextlib
import csv
import dataclasses
import errno
import io
import json
import math
import os
import re
import reprlib
import shlex
import stat
import string
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml

from baichuan_jax.config.messages import has_credentials, hide_secrets, printable
from baichuan_jax.config.schema import ConfigError, require

# Whole numbers beyond 64 bits fit into no array, and Python's would go on to any length.
LARGEST = (1 << 63) - 1
# More than any file of settings holds. PyYAML takes seconds for a megabyte.
MOST_VALUES = 100_000
MOST_YAML_BYTES = 1 << 20
# More than any file that is read whole.
MOST_BYTES = 1 << 28
# An object of one number takes seven characters of JSON and 250 bytes of memory: without a limit 16
# MiB of it would take a gigabyte. A vocabulary's counts are some hundred thousand values.
MOST_JSON_VALUES = 1_000_000
# A text in JSON, or what begins as one and does not end.
_JSON_TEXT = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)

# Seconds since the epoch, up to the year 9999, where Python's dates end.
Seconds = Annotated[float, (0.0, 1e11)]
Time = Annotated[float, (0.0, 253402300799.0)]
Count = Annotated[int, (0, LARGEST)]
Positive = Annotated[int, (1, LARGEST)]

# Errors that name a wrong path, and say nothing against the storage.
_OF_THE_PATH = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
)


class _Beginning(reprlib.Repr):
    """A value's beginning, for errors: a file may hold megabytes where a number should be."""

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write over 4,300 digits; YAML's 0x... has any number of them.
        return super().repr_int(x, level) if x.bit_length() < 1000 else hex(x)[:60] + "..."

    def repr_str(self, x: str, level: int) -> str:
        # Before it is cut: of half an address nobody sees where its password ends.
        return super().repr_str(hide_secrets(x), level)


_shown = _Beginning()
_shown.maxstring = _shown.maxother = _shown.maxlong = 60


def show(value: Any) -> str:
    """A value for a message, on one line: 60 characters a part and 300 in all at most."""
    text = _shown.repr(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


def show_path(path: Path | str) -> str:
    """A path as text that any file can hold and any terminal show.

    Bytes of it that are no UTF-8 and control characters are escapes.
    """
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"), one_line=True)


def quote_path(path: Path | str) -> str:
    """A path as a shell and a command's parser take it, for commands that messages advise."""
    # What begins with - would be an option.
    text = os.path.join(".", path) if os.fspath(path).startswith("-") else os.fspath(path)
    if show_path(text) == text:
        return shlex.quote(text)
    # Bytes that are no UTF-8 and control characters, as bash and zsh take them.
    plain = (string.ascii_letters + string.digits + "/._-").encode()
    letters = [chr(b) if b in plain else f"\\x{b:02x}" for b in os.fsencode(text)]
    return f"$'{''.join(letters)}'"


def require_utf8(path: Path | str, what: str) -> None:
    """Raise ConfigError for a path that libraries written in C++ cannot take, and no YAML hold."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{what}: {show_path(path)!r} is no UTF-8, and must be; rename that file or folder, or "
            "set LC_ALL=C.UTF-8 where the locale is another"
        ) from None


def refuse_credentials(text: str, what: str) -> None:
    """Raise ConfigError for an address with a password, a key or a signature in it."""
    if has_credentials(text):
        # Not the address: it stands in the message as little as in the run's records.
        raise ConfigError(
            f"{what}: an address that begins with {text.partition(':')[0][:60]}:// has "
            "credentials in it, which the run's records would keep; take them out: storage finds "
            "its credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), in "
            "files of the user (~/.aws/credentials), or in the role of the host"
        )


def require_text(text: str, what: str) -> None:
    """Raise ConfigError for a text that no UTF-8 can write: half a character, a byte of none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} must be UTF-8, and has {text[error.start]!a} at character {error.start + 1}"
        ) from None


def given_text(text: str, what: str) -> str:
    """The text of an argument, whose bytes are UTF-8 in every locale. Raises ConfigError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Python keeps bytes that the locale's encoding lacks (all but ASCII in LC_ALL=C) as halves
        # of characters.
        with contextlib.suppress(UnicodeError):
            return os.fsencode(text).decode()
        require_text(text, what)
    return text


def require_plain(path: Path | str, what: str) -> None:
    """Raise ConfigError for a folder whose path libraries take for a pattern, or cannot take.

    Orbax and daft expand *, ?, [ and {, and ArrayRecord finds no file behind a line break.
    """
    require_utf8(path, what)
    odd = re.search(r"[\x00-\x1f*?\[\]{}\\]", os.fspath(path))
    require(
        odd is None,
        f"{what}: {show_path(path)!r} has {odd[0] if odd else ''!r} in it, which libraries that "
        "write there do not take in a name; rename that folder",
    )


def read_bytes(file: Path | str, most: int = MOST_BYTES) -> bytes:
    """The content of a file.

    Raises ConfigError where there is none, for one of more than `most` bytes, and for what is no
    regular file: a read of a pipe or a device may never end. An error of the storage stays the
    OSError that it is: another try may succeed.
    """
    try:
        return read_regular(file, most)
    except OSError as error:
        raise no_file(file, error) or error from None


def no_file(file: Path | str, error: OSError) -> ConfigError | None:
    """What to raise for an error that names a wrong path; None: it is the storage's."""
    if error.errno not in _OF_THE_PATH:
        return None
    return ConfigError(f"{file} cannot be read: {error.strerror}")


def read_regular(file: Path | str, most: int = MOST_BYTES) -> bytes:
    """The content of a file.

    Raises ConfigError for what is no regular file and for more than `most` bytes, and OSError.
    """
    with open_regular(file) as opened:
        content = opened.read(most + 1)
        if len(content) > most:
            raise ConfigError(
                f"{file} has over {most:,} bytes ({os.fstat(opened.fileno()).st_size:,}), and no "
                "file of its kind is that large; name the right file, or repair it"
            )
    return content


def open_regular(file: Path | str) -> io.BufferedReader:
    """A file, opened to be read. Raises ConfigError for what is no regular file, and OSError."""
    # Looked at before it is opened: to open a device may already do something.
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ConfigError(
            f"{file} is a folder, a pipe or a device, and must be a file (save in one what comes "
            "through a pipe)"
        )
    return open(file, "rb")


def read_text(file: Path | str, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Raises ConfigError."""
    return decode(read_bytes(file, most), str(file))


def decode(content: bytes, file: str) -> str:
    """The text of a file's bytes, without a byte-order mark. Raises ConfigError."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise ConfigError(f"{file}, line {line} is no UTF-8 (byte {byte:#04x})") from None


def csv_rows(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, fields) of every row of a CSV text; a quoted field may span lines.

    Raises ConfigError at a row whose quotes are not in pairs: it would swallow those after it. A
    quote in the middle of a field without quotes is a character, as in the files of MMLU.
    """
    # newline="": the reader must see line breaks inside quoted fields.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        reason = f"is no CSV: {error}"
        if is_long := "field limit" in str(error):
            reason = f"has a field of over {csv.field_size_limit():,} characters, the most"
        # A quote that no other ends makes one field of the lines after it.
        if not is_long or '"' in text.split("\n")[line - 1]:
            reason += (
                "; a field that begins with a quote ends with one, and quotes in it are doubled"
            )
        raise ConfigError(f"{where}:{line}: the row that begins here {reason}") from None


def parse_json(text: str, where: str, *, paths: bool = False) -> Any:
    """The value of a JSON text. Raises ConfigError, whose message begins with `where`.

    `paths`: its texts may be names of files, whose bytes need not be UTF-8.
    """
    try:
        value = load_json(text, _each_key_once)
        # Only an escape can make half of a surrogate pair, which no file can hold in UTF-8.
        if "\\u" in text:
            _refuse_half_characters(value, "surrogateescape" if paths else "strict")
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {json_reason(error)}") from None
    return value


def load_json(text: str, object_of: Callable[[list[tuple[str, Any]]], Any]) -> Any:
    """The value of a JSON text; `object_of` makes an object of its pairs.

    Raises ValueError where it is none, where it is nested too deeply for what follows it with
    Python's stack, and where it holds more than MOST_JSON_VALUES values and brackets.
    """
    # A value and what divides it from the next are two characters at least.
    if len(text) > 2 * MOST_JSON_VALUES:
        outside = _JSON_TEXT.sub("", text)
        if sum(map(outside.count, "[{,")) > MOST_JSON_VALUES:
            raise ValueError(f"it holds more than {MOST_JSON_VALUES:,} values and brackets")
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_reason(error: Exception) -> str:
    """What is wrong in a JSON text: in one line by its character, as its reader names the line."""
    if isinstance(error, json.JSONDecodeError) and "\n" not in error.doc.rstrip():
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


def read_json(file: Path | str, *, paths: bool = False) -> Any:
    """The value of a JSON file, as parse_json gives it. Raises ConfigError."""
    return parse_json(read_text(file), str(file), paths=paths)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError, whose message begins with `where`."""
    require(
        len(text) <= MOST_YAML_BYTES,
        f"{where} has over {MOST_YAML_BYTES:,} characters, and no settings need as many",
    )
    try:
        # A SafeLoader: it makes plain values only.
        value = yaml.load(text, _EachKeyOnce)  # nosec B506
        _refuse_number_of_values(value)
        # "\ud83d" in double quotes.
        if "\\" in text:
            _refuse_half_characters(value)
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None
    except RecursionError:
        raise ConfigError(f"{where} is no YAML that can be read: it is nested too deeply") from None
    # Others than YAMLError: tags whose text is no such value (2001-99-99, !!bool x).
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
    return value


def read_yaml(file: Path | str) -> Any:
    """The value of a YAML file. Raises ConfigError."""
    return parse_yaml(read_text(file, MOST_YAML_BYTES), str(file))


def require_type(value: Any, kind: Any, where: str) -> Any:
    """The value itself, where it is of the kind that an annotation says. Raises ConfigError.

    A number must be finite, a whole one at most LARGEST; true is none. A tuple may be a list.
    """
    # The message is made where it is needed: files hold a million values.
    if not _is(value, kind):
        raise ConfigError(f"{where} is {show(value)} and must be {_name(kind)}")
    return value


def whole_number(text: str) -> int | None:
    """The number that a name or a key says as str() writes it: 12, and neither 012 nor ²."""
    # 18 digits: what fits into 64 bits.
    if not (text.isascii() and text.isdigit() and len(text) <= 18) or str(int(text)) != text:
        return None
    return int(text)


def environment_number(variable: str) -> int | None:
    """The whole number that an environment variable says; None where it is unset or empty."""
    text = os.environ.get(variable) or None
    if text is None:
        return None
    found = whole_number(text.strip())
    require(found is not None, f"{variable}={show(text)} must be a whole number, 0 or more")
    return found


def require_keys(content: Any, kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The object itself, where it has all these keys, each of its kind. Raises ConfigError."""
    require_type(content, dict, what)
    if missing := sorted(kinds.keys() - content.keys()):
        raise ConfigError(f"{what} lacks {', '.join(missing)}")
    for key, kind in kinds.items():
        require_type(content[key], kind, f"{what}: {key}")
    return content


Kind = TypeVar("Kind")


def build(kind: type[Kind], content: Any, what: str) -> Kind:
    """The dataclass that an object describes.

    A field that `kind` does not have is dropped, since versions may differ. Raises ConfigError,
    whose message begins with `what`, for one that is missing, of another type, or refused by `kind`
    itself.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{what} is {show(content)} and must be an object")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    # Both are MISSING where a field has no default.
    needed = {field.name for field in fields if field.default is field.default_factory}
    if missing := sorted(needed - set(content)):
        raise ConfigError(f"{what} lacks {', '.join(missing)}")
    known = {field.name: field.type for field in fields if field.name in content}
    for name, annotation in known.items():
        require_type(content[name], annotation, f"{what}'s {name}")
    try:
        return kind(**{name: content[name] for name in known})
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _is(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        low, high = arguments[1]
        return _is(value, arguments[0]) and low <= value <= high
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in arguments)
    if origin is typing.Literal:
        return any(value is each or (value == each and type(value) is str) for each in arguments)
    if origin in (list, tuple):
        # tuple[X, ...] has the dots as its second argument.
        return isinstance(value, list | tuple) and all(_is(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is(key, arguments[0]) and _is(each, arguments[1]) for key, each in value.items()
        )
    if kind is None or kind is types.NoneType:
        return value is None
    # To Python, and so in JSON, true is an int.
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and abs(value) <= LARGEST
    if kind is float:
        if isinstance(value, int):
            return abs(value) <= LARGEST
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, kind)


_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    types.NoneType: "null",
    Seconds: "seconds, 0 or more",
    Time: "seconds since the epoch",
    Count: "a whole number, 0 or more",
    Positive: "a whole number, 1 or more",
}


def _name(kind: Any) -> str:
    """An annotation in the words of JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if origin is Annotated:
        low, high = arguments[1]
        return f"{_name(arguments[0])} from {low} to {high}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, arguments))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return f"a list, each of {_name(arguments[0])}"
    if origin is dict:
        return f"an object, each value {_name(arguments[1])}"
    return getattr(kind, "__name__", str(kind))


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # Of a million keys too: the time grows with their number alone.
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {show(twice)} comes twice")
    return found


def _refuse_half_characters(value: Any, errors: str = "strict") -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8", errors)
        except UnicodeEncodeError:
            raise ValueError(f"the text {value[:60]!a} has half a character") from None
    elif isinstance(value, dict):
        for key, each in value.items():
            _refuse_half_characters(key, errors)
            _refuse_half_characters(each, errors)
    elif isinstance(value, list):
        for each in value:
            _refuse_half_characters(each, errors)


def _refuse_number_of_values(value: Any) -> None:
    left, waiting = MOST_VALUES, [value]
    while waiting:
        found = waiting.pop()
        inner = list(found.values()) if isinstance(found, dict) else found
        if isinstance(inner, list | tuple | set):
            left -= len(inner)
            if left < 0:
                raise ValueError(f"it has over {MOST_VALUES} values")
            waiting.extend(inner)


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a mapping has each key once, and every value stands where it is meant.

    PyYAML keeps the last of two keys and says nothing.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node. Raises ConfigError for an alias (*name), and for the anchor it would need.

        Nine aliases of nine aliases, nine times, are 342 bytes and gigabytes of values.
        """
        event = self.peek_event()
        if (name := getattr(event, "anchor", None)) is not None:
            is_alias = isinstance(event, yaml.events.AliasEvent)
            what = f"*{name} is an alias" if is_alias else f"&{name} is an anchor"
            raise ConfigError(
                f"line {event.start_mark.line + 1}: {what}, which settings may not have; write "
                "the value itself, wherever it is meant"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping. Raises ConstructorError where a key comes twice."""
        seen = set()
        for place, _ in node.value:
            key = self.construct_object(place, deep=True)
            # A list is no key: that is refused below.
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{show(key)} is set twice", place.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number. Raises ConstructorError for one of base 8 or 60: 010 is 8, 12:30 is 750."""
        if is_odd_number(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{show(node.value)} is a number of base 8 or 60", node.start_mark
            )
        whole = node.tag.endswith("int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


def is_odd_number(text: str) -> bool:
    """Whether YAML 1.1 takes a text for a number of base 8 or 60, which nobody means."""
    return (
        re.fullmatch(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)", text) is not None
    )


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _EachKeyOnce.add_constructor(_tag, _EachKeyOnce.construct_number)
