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
# A word of these in a variable's or a parameter's name: its value is a secret.
_SECRET = r"secret|token|passw|signature|credential|(?:access|api|account|private)[_-]?key"
_NAME = re.compile(rf"(?i){_SECRET}|_key$|_pat$")
# scheme://user:password@: a port has digits only. A password may have a slash in it.
_PASSWORD = re.compile(
    r"(?P<kept>[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:?#\"']*:)(?!\d{1,5}(?![^\s/?#]))[^\s@\"']*(?=@)"
)
# ?X-Amz-Signature=..., &secret_key=...; sig is that of Azure.
_PARAMETER = re.compile(
    rf"(?i)(?P<kept>[?&;](?:[\w.-]*(?:{_SECRET})[\w.-]*|awsaccesskeyid|sig)=)[^&;#\s\"']+"
)


def printable(text: str, one_line: bool = False) -> str:
    """The text with its control characters as escapes; of line breaks and tabs only `one_line`."""
    return text.translate(_ESCAPES if one_line else _LINES_KEPT)


def as_html(text: str) -> str:
    """The text as HTML shows it, outside of a tag; it keeps its line breaks."""
    return html.escape(printable(hide_secrets(text)))


def hide_secrets(text: str) -> str:
    """The text with *** for secrets: in addresses, and the values of variables that hold some."""
    if "://" in text:
        text = _PASSWORD.sub(rf"\g<kept>{HIDDEN}", text)
        text = _PARAMETER.sub(rf"\g<kept>{HIDDEN}", text)
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(value: Any) -> Any:
    """hide_secrets of all texts in a JSON value."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value


def has_credentials(text: str) -> bool:
    """Whether an address has a password, a key or a signature in it, percent-encoded or not."""
    # Twice: an address may have another one as a parameter (endpoint_override).
    for _ in range(3):
        if "://" in text and (_PASSWORD.search(text) or _PARAMETER.search(text)):
            return True
        text = urllib.parse.unquote(text)
    return False


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
    # Shorter ones, and numbers, stand in texts that have nothing to do with them.
    secrets = (value for value in found if len(value) >= 8 and not value.isdigit())
    return sorted(secrets, key=len, reverse=True)
