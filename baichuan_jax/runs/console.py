"""What a person sees of a run: a progress bar in a terminal, a table in a notebook, plain lines in a file; tables and sections."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm


class Display:
    """Messages and progress of one process; silent where not `active` (processes other than 0)."""

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self._console = Console(
            highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140
        )  # a file has room

    def say(self, text: str = "", style: str | None = None) -> None:
        """One message, above the progress bar where one is shown."""
        if self.active:
            with tqdm.external_write_mode():
                self._console.print(text, style=style, markup=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        if not self.active:
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        with tqdm.external_write_mode():
            self._console.print(table)

    def progress(self, start: int, total: int) -> "Progress":
        return Progress(self, start, total)


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

            self._handle = show(_Html(""), display_id=True)
        elif sys.stderr.isatty():
            self._bar = tqdm(
                initial=start, total=total, unit="step", dynamic_ncols=True, smoothing=0.05
            )

    def update(
        self, step: int, loss: float, tokens_per_second: float, eval_loss: float | None
    ) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            validation = "" if eval_loss is None else f" val {eval_loss:.3f}"
            self._bar.set_postfix_str(
                f"loss {loss:.3f}{validation} {tokens_per_second:,.0f} tok/s", refresh=False
            )
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        every = 0.5 if self._handle is not None else 10.0
        if not self._display.active or (now - self._last < every and step != self._total):
            return
        self._last = now
        left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
        figures = {
            "step": f"{step}/{self._total}",
            "loss": f"{loss:.3f}",
            "validation": "-" if eval_loss is None else f"{eval_loss:.3f}",
            "tokens/s": f"{tokens_per_second:,.0f}",
            "left": f"{int(left) // 60}:{int(left) % 60:02d}",
        }
        if self._handle is not None:
            cells = (
                "".join(f"<th>{name}</th>" for name in figures),
                "".join(f"<td>{v}</td>" for v in figures.values()),
            )
            self._handle.update(_Html(f"<table><tr>{cells[0]}</tr><tr>{cells[1]}</tr></table>"))
        else:
            self._display.say("  ".join(f"{name} {value}" for name, value in figures.items()))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Html(str):
    def _repr_html_(self) -> str:
        return str(self)


def _in_notebook() -> bool:
    shell: Any = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"
