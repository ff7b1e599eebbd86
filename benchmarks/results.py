"""What a benchmark found: tables for a person and, in JSON, the same with all figures; benchmarks/all.py puts them together."""

import json
from pathlib import Path
from typing import Any

from baichuan_jax.console import Display


def reason(error: BaseException, length: int = 160) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines()
    return lines[0][:length] if lines else type(error).__name__


class Results:
    """Tables are shown as they come; `save` writes them with the figures behind them, where a file is named."""

    def __init__(self) -> None:
        self.display = Display()
        self._tables: list[dict[str, Any]] = []

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.display.table(title, columns, rows)
        self._tables.append({"title": title, "columns": columns, "rows": rows})

    def say(self, text: str) -> None:
        self.display.say(text)

    def save(self, path: Path | str | None, **figures: Any) -> None:
        if path is not None:
            Path(path).write_text(json.dumps({**figures, "tables": self._tables}, indent=1, ensure_ascii=False), encoding="utf-8")
