"""Text that a terminal, a record or a page may have: no control characters, no secrets.

Names, hosts, records of other processes and the text of models come from anywhere. A terminal acts
on the control characters in them, and shows text in another order than it is written behind an
override of direction. Secrets come from addresses, and from the environment through the errors of
libraries.
"""

import html
import os
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

# ASCII's and Latin-1's control characters, line and paragraph separators, and what overrides or
# isolates the direction of text.
_CONTROLS = (
    *range(32),
    *range(0x7F, 0xA0),
    *(0x2028, 0x2029),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
_ESCAPES = {number: repr(chr(number))[1:-1] for number in _CONTROLS}
_LINES_KEPT = {number: text for number, text in _ESCAPES.items() if chr(number) not in "\n\t"}

HIDDEN = "***"
# What a name of a parameter or a variable ends with, or has as a word, where its value is a secret.
# Not tokens (max_tokens), tokenizer, nor any key (cache_key, ssh_key_name).
_KEY = r"(?:access|api|account|private|secret|storage|shared)[_-]?key"
_WORD = rf"(?:secrets?|token|passw(?:or)?d|passphrase|signature|credentials?|{_KEY})"
_NAME = re.compile(rf"(?i){_WORD}(?:_|$)|_(?:pat|pwd|auth|jwt)$")
# Of a variable's value: shorter ones, numbers and plain words (train, checkpoint) stand in texts
# that have nothing to do with them. A secret that is a word of under 16 small letters is shown.
_VALUE = re.compile(
    r"(?=.*[^\d\s])(?:.{16}|(?=.{8})(?:.*\d|.*[a-z].*[A-Z]|.*[A-Z].*[a-z]))", re.DOTALL
)

# All begin behind scheme:/, the one slash that Path leaves of two.
_BEGIN = r"(?<=[A-Za-z0-9]):/+"
_PART = r"[^\s/@:?#\[\"\']"
# user:password@, up to the last @ of a word, as a password may have / and @ in it. A port has
# digits only.
_WORDS = re.compile(r"[^\s\"\']+")
_PASSWORD = re.compile(rf"{_BEGIN}{_PART}*:(?!\d{{1,5}}(?![^\s/?#]))")
_OTHERS = (
    # token@: with the beginning that a host gives its tokens, or as no user and no container is
    # named: 16 characters with digits, small and capital letters, or 32 without a sign.
    re.compile(
        rf"{_BEGIN}(?P<secret>(?:gh[a-z]_|github_pat_|glpat-|hf_|xox[a-z]-|eyJ){_PART}+"
        rf"|(?={_PART}*\d)(?={_PART}*[a-z])(?={_PART}*[A-Z]){_PART}{{16,}}"
        rf"|(?=[a-z]*\d)[0-9a-z]{{32,}})(?=@)"
    ),
    # ?X-Amz-Signature=..., &secret_key=..., #token=...; sig is that of Azure.
    re.compile(
        rf"(?i)[?&;#](?:[\w.-]*{_WORD}(?:[_.-][\w.-]*)?|(?:[\w.-]*[_.-])?"
        r"(?:auth|authorization|jwt|pat|pass|pwd|sig)|key|awsaccesskeyid)="
        r"(?P<secret>[^&;#\s\"\']+)"
    ),
)
# An address may have another one as a parameter, whose signs are encoded twice.
_MOST_DECODED = 4
_ENCODED = re.compile("%[0-9A-Fa-f]{2}")


def printable(text: str, one_line: bool = False) -> str:
    """The text with its control characters as escapes; of line breaks and tabs only `one_line`."""
    return text.translate(_ESCAPES if one_line else _LINES_KEPT)


def as_html(text: str) -> str:
    """The text as HTML shows it, outside of a tag; it keeps its line breaks."""
    return html.escape(printable(hide_secrets(text)))


def hide_secrets(text: str) -> str:
    """The text with *** for secrets: in addresses, and the values of variables that hold some."""
    text = hide_credentials(text)
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return text


def hide_credentials(text: str) -> str:
    """The text with *** for the secrets of addresses in it; the environment changes nothing."""
    end = len(text)
    shown = []
    for start, stop in sorted(_credentials(text), reverse=True):
        # One that begins within another reaches no further back than this.
        if start < end:
            shown += [text[max(stop, start) : end] if stop < end else "", HIDDEN]
            end = start
    return text[:end] + "".join(reversed(shown))


def without_secrets(value: Any) -> Any:
    """hide_secrets of all texts in a JSON value. Of its keys, which are names, only addresses."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {hide_credentials(key): without_secrets(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value


def has_credentials(text: str) -> bool:
    """Whether an address has a password, a token, a key or a signature in it, encoded or not."""
    return bool(_credentials(text))


def _credentials(text: str) -> set[tuple[int, int]]:
    """[start, stop) of the secrets of addresses, percent-encoded or not."""
    found = set()
    # Of every character and of the end: its place in the text as it was given.
    places: Sequence[int] = range(len(text) + 1)
    for _ in range(_MOST_DECODED):
        if ":/" in text:
            spans = [each.span("secret") for other in _OTHERS for each in other.finditer(text)]
            for word in _WORDS.finditer(text) if "@" in text else ():
                if (user := _PASSWORD.search(text, *word.span())) is not None:
                    spans.append((user.end(), text.rfind("@", *word.span())))
            found |= {(places[start], places[stop]) for start, stop in spans if start < stop}
        decoded, left, last = [], [], 0
        for each in _ENCODED.finditer(text):
            # The signs of addresses are one byte each; other characters matter to no pattern.
            decoded += [text[last : each.start()], chr(int(each[0][1:], 16))]
            left += places[last : each.start() + 1]
            last = each.end()
        if not last:
            break
        text, places = "".join([*decoded, text[last:]]), [*left, *places[last:]]
    return found


def _environment_secrets() -> list[str]:
    """Values of variables that hold secrets; the longest first, as one may contain another."""
    found = set()
    for name, value in os.environ.items():
        # Some hold the path of a file of secrets, which is none.
        if _NAME.search(name) and not (os.path.isabs(value) and os.path.exists(value)):
            found.add(value)
        elif name.lower().endswith("_proxy"):
            # Not urlsplit, which refuses a password with a slash.
            found.update(re.findall(r"://[^:@]*:(.+)@", value))
    found |= {urllib.parse.quote(value, safe="") for value in found}
    return sorted(filter(_VALUE.match, found), key=len, reverse=True)
