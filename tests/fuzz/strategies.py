"""Damage for files: values of any type in JSON, and bytes of any shape.

An example is a folder, as a dict of file names and contents. Every strategy begins with a valid
folder and changes it, so that a reader gets past its first check often enough to reach the others.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st


class Folder(dict[str, bytes]):
    """Contents by file name."""

    def __repr__(self) -> str:
        # Hypothesis prints what a strategy is made of, and weights have megabytes.
        return f"<{len(self)} files>"


NUMBERS = (0, -1, 1, 2, 3.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 63)
NUMBERS += (-(1 << 64), 10**30, 10**400)
WORDS = ("", "\0", "a\nb", "\u2028", "\ud800", "🙂", "../x", "/", "x" * 300, "NaN", "-1", "²", "٣")
SCALARS: tuple[Any, ...] = (None, True, False, *NUMBERS, *WORDS)
# In place of a value: a scalar, or something of another shape.
ODD = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
    ),
    max_leaves=4,
)
# Text that is no value at all, or one that Python's parser takes and nobody means.
LITERALS = ("NaN", "-Infinity", "1e400", "9" * 5000, "[" * 1100, "{", '"\\ud800"', "1_0", "tru", "")
PIECES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b'"', b"\xed\xa0\x80", b"{", b"9" * 400)


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    """The places of a JSON value, its own first."""
    inner: Any = ()
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(found for key, each in inner for found in _paths(each, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places changed, left out, or set twice."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_paths(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(ODD)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(("replace", "replace", "delete", "nest", "rename")))
        if action == "replace":
            parent[path[-1]] = draw(ODD)
        elif action == "delete":
            del parent[path[-1]]
        elif action == "nest":
            parent[path[-1]] = draw(st.sampled_from(([parent[path[-1]]], {"x": parent[path[-1]]})))
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(WORDS))] = parent.pop(path[-1])
    return value


@st.composite
def json_text(draw: st.DrawFn, value: Any) -> bytes:
    """A changed value as JSON, in odd forms of it now and then."""
    text = json.dumps(
        draw(changed(value)),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from((None, None, 1))),
    )
    places = [at for at, letter in enumerate(text) if letter in ":,"]
    if places and draw(st.integers(0, 4)) == 0:
        at = draw(st.sampled_from(places)) + 1
        text = text[:at] + draw(st.sampled_from(LITERALS)) + text[at:].lstrip(' "0123456789')
    # The first key twice.
    if text.startswith('{"') and draw(st.integers(0, 9)) == 0:
        key = text[1 : text.index('"', 2) + 1]
        text = "{" + key + ": 1, " + text[1:]
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are cut, flipped, doubled, joined with others, or in another encoding."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 64)))
        action = draw(st.sampled_from(("cut", "flip", "insert", "delete", "double", "lines", "16")))
        if action == "cut":
            content = content[:at]
        elif action == "flip" and at < len(content):
            bit = 1 << draw(st.integers(0, 7))
            content = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        elif action == "insert":
            content = content[:at] + draw(st.sampled_from(PIECES)) + content[at:]
        elif action == "delete":
            content = content[:at] + content[end:]
        elif action == "double":
            content = content[:at] + content[at:end] * 2 + content[end:]
        elif action == "lines":
            content = content.replace(b"\n", draw(st.sampled_from((b"\r\n", b"\r", b"", b"\n\n"))))
        elif action == "16":
            content = content.decode("latin-1").encode("utf-16")
    return content


@st.composite
def folders(draw: st.DrawFn, valid: Folder) -> Folder:
    """A valid folder with one or two files damaged, in the way that their kind allows."""
    found = Folder(valid)
    for name in draw(st.lists(st.sampled_from(sorted(valid)), min_size=1, max_size=2)):
        content = found.get(name, b"")
        kind = draw(st.sampled_from(("values", "values", "values", "bytes", "missing")))
        if kind == "missing":
            found.pop(name, None)
        elif name not in found:
            continue
        elif kind == "values" and (parsed := _parsed(name, content)) is not None:
            lines = name.endswith("jsonl")
            if lines and parsed:
                number = draw(st.integers(0, len(parsed) - 1))
                whole = content.split(b"\n")
                whole[number] = draw(json_text(parsed[number]))
                found[name] = b"\n".join(whole)
            else:
                found[name] = draw(json_text(parsed))
        else:
            found[name] = draw(damaged(content))
    return found


def spellings(valid: Folder) -> Iterator[Folder]:
    """The same values: another order of keys, white space, escapes, line ends, a BOM."""
    for ascii, indent in ((True, None), (False, 2)):
        yield Folder(
            {name: _respelled(name, content, ascii, indent) for name, content in valid.items()}
        )
    for change in (
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content.rstrip(b"\n") + b"\n",
    ):
        kept = {
            name: change(content) if _parsed(name, content) is not None else content
            for name, content in valid.items()
        }
        yield Folder(kept)


def _respelled(name: str, content: bytes, ascii: bool, indent: int | None) -> bytes:
    parsed = _parsed(name, content)
    if parsed is None:
        return content
    separators = (" ,  ", " : ")
    write = lambda value, indent: json.dumps(
        _reversed(value), ensure_ascii=ascii, indent=indent, separators=separators
    )
    if name.endswith("jsonl"):
        return "".join(write(value, None) + "\n" for value in parsed).encode()
    return write(parsed, indent).encode()


def _reversed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _reversed(value[key]) for key in reversed(value)}
    return [_reversed(each) for each in value] if isinstance(value, list) else value


def _parsed(name: str, content: bytes) -> Any:
    """The value of a JSON file, the values of a JSONL file's lines; None for other files."""
    try:
        if name.endswith("jsonl"):
            return [json.loads(line) for line in content.split(b"\n") if line]
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
