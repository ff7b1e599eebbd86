"""What a person sees of a command: messages, tables, and the progress of training.

Progress has three forms: a bar in a terminal, a table in a notebook that changes in place, and a
line every ten seconds in a file. Only process 0 of a run shows anything. Nothing shown may end a
command: a reader that ends, a terminal that closes, a log on a full disk, an encoding that lacks
Chinese (`lasting_streams`).
"""

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from baichuan_jax.config.messages import hide_secrets, printable

# The width of a table in a file or a pipe, which have none of their own.
FILE_COLUMNS = 140
_NUMBER = re.compile(r"-|[-+]?[\d.,]+%?")
# After these a stream may work again: a disk gets room, a slow reader reads.
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR})


class Stream:
    """stdout or stderr, whose writes never raise: what cannot be shown is left out.

    `error`: the first error, None where there was none. Characters that the encoding lacks are
    shown as escapes, and so are those that a terminal would act on (`_for_terminal`). Of
    `messages` (stderr: argparse and other libraries write there too) secrets are hidden. Everything
    else is the stream's own.
    """

    def __init__(self, stream: TextIO | None, messages: bool = False) -> None:
        # None: a process without a console (pythonw, a daemon whose streams were closed).
        self._stream = stream
        self._messages = messages
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write, or leave out."""
        if self._stream is not None:
            shown = hide_secrets(text) if self._messages else text
            # A file or a pipe gets the text of a model as it is.
            self._attempt(self._write, _for_terminal(shown) if self.isatty() else shown)
        return len(text)

    def flush(self) -> None:
        """Flush what is written."""
        if self._stream is not None:
            self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        """Whether it is a terminal that still works."""
        try:
            return self._stream is not None and self._stream.isatty()
        # Closed by whoever embeds the program.
        except ValueError:
            return False

    def settle(self) -> None:
        """At a command's end: leave nothing that Python would fail to flush when it exits."""
        self.flush()
        if self.error is not None:
            self._end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        assert self._stream is not None
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            encoded = text.encode(error.encoding, "backslashreplace")
            self._stream.write(encoded.decode(error.encoding))

    def _attempt(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        # ValueError: the stream is closed.
        except (OSError, ValueError) as error:
            self.error = self.error or error
            if getattr(error, "errno", None) not in _PASSING:
                self._end()

    def _end(self) -> None:
        """Show nothing more."""
        stream, self._stream = self._stream, None
        # The file itself too: libraries write to it below Python, and Python flushes what waits
        # when it exits (which would then be exit code 120).
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = cast(TextIO, stream).fileno()
            if number in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


# What rich and tqdm write: a colour, a line up, the beginning of the line.
_OWN_COMMANDS = re.compile(r"(\x1b\[[\d;]*m|\x1b\[A|\r)")


def _for_terminal(text: str) -> str:
    """The text without commands to a terminal but those of this program's own tables and bars."""
    parts = _OWN_COMMANDS.split(text)
    return "".join(part if place % 2 else printable(part) for place, part in enumerate(parts))


def shown_text(text: str) -> str:
    """The text of a model or a file as stdout takes it: in a terminal without any command."""
    return printable(text) if sys.stdout.isatty() else text


@contextlib.contextmanager
def lasting_streams() -> Iterator[Stream]:
    """Inside, no write to stdout or stderr raises. Yields stdout."""
    # Closed files: the next file that is opened would take their number, and what libraries write
    # to stderr would land in it.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    streams = [Stream(sys.stdout), Stream(sys.stderr, messages=True)]
    sys.stdout, sys.stderr = cast(list[TextIO], streams)
    try:
        yield streams[0]
    finally:
        for stream in streams:
            stream.settle()
        sys.stdout, sys.stderr = before


class Display:
    """Messages and progress of one process; silent where not `active` (processes other than 0)."""

    def __init__(self, active: bool = True) -> None:
        self.active = active
        width = None if sys.stdout.isatty() else FILE_COLUMNS
        # Text is shown as it is: rich would colour numbers and paths, and take [x] and :fire: in a
        # name for its own signs.
        self._console = Console(
            highlight=False, markup=False, emoji=False, soft_wrap=True, width=width
        )

    def say(self, text: str = "", style: str | None = None) -> None:
        """One message, above the progress bar where one is shown."""
        if self.active:
            with tqdm.external_write_mode():
                self._console.print(_message(text), style=style)

    def table(self, title: str | None, columns: list[str], rows: list[list[str]]) -> None:
        """A table; columns of numbers align at the right."""
        if not self.active:
            return
        rows = [[_message(cell) for cell in row] for row in rows]
        table = Table(title=title and _message(title), title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            numbers = all(_NUMBER.fullmatch(row[index]) for row in rows)
            # fold: a long path is broken, and not cut.
            table.add_column(
                _message(column), justify="right" if numbers else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        with tqdm.external_write_mode():
            self._console.print(table)

    def progress(self, start: int, total: int) -> "Progress":
        """Progress from step `start` to `total`, as a context."""
        return Progress(self, start, total)


def _message(text: str) -> str:
    # Into files too: a log is read in a terminal later.
    return printable(hide_secrets(text))


class Progress:
    """Progress of the steps: step, loss, tokens a second, time left."""

    def __init__(self, display: Display, start: int, total: int) -> None:
        self._display, self._start, self._total = display, start, total
        self._bar = self._handle = None
        self._began = self._last = time.monotonic()
        if not display.active:
            return
        if _in_notebook():
            from IPython.display import display as show  # pyright: ignore[reportMissingImports]

            # A handle to one output, which `update` replaces: a notebook's file keeps the last
            # state only.
            self._handle = show(_Html(""), display_id=True)
        elif sys.stderr.isatty():
            # smoothing: the time left follows many steps, so that one slow step hardly moves it.
            self._bar = tqdm(
                initial=start, total=total, unit="step", dynamic_ncols=True, smoothing=0.05
            )

    def update(
        self, step: int, loss: float, tokens_per_second: float, eval_loss: float | None
    ) -> None:
        """Show that `step` steps are done."""
        if self._bar is not None:
            validation = "" if eval_loss is None else f" val {eval_loss:.3f}"
            text = f"loss {loss:.3f}{validation} {tokens_per_second:,.0f} tok/s"
            # Not drawn here: `update` below draws the bar.
            self._bar.set_postfix_str(text, refresh=False)
            # tqdm counts increments.
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        # A notebook's table replaces the one before; a file's lines stay, so they are few.
        every = 0.5 if self._handle is not None else 10.0
        if not self._display.active or (now - self._last < every and step != self._total):
            return
        self._last = now
        # At the mean speed of this launch, evaluations and saves included.
        left = int((now - self._began) / max(step - self._start, 1) * (self._total - step))
        values = {
            "step": f"{step}/{self._total}",
            "loss": f"{loss:.3f}",
            "validation": "-" if eval_loss is None else f"{eval_loss:.3f}",
            "tokens/s": f"{tokens_per_second:,.0f}",
            "left": f"{left // 60}:{left % 60:02d}",
        }
        if self._handle is not None:
            heads = "".join(f"<th>{name}</th>" for name in values)
            cells = "".join(f"<td>{value}</td>" for value in values.values())
            self._handle.update(_Html(f"<table><tr>{heads}</tr><tr>{cells}</tr></table>"))
        else:
            self._display.say("  ".join(f"{name} {value}" for name, value in values.items()))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Html(str):
    def _repr_html_(self) -> str:
        return str(self)


def _in_notebook() -> bool:
    # Asked of IPython only where something imported it already: the import takes a second.
    shell: Any = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    # IPython in a terminal has a shell of another class, and shows no HTML.
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"
