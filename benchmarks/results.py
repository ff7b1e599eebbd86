"""What a benchmark found: tables for a person and, in JSON, the same with all figures; benchmarks/all.py puts them together."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from baichuan_jax.runs.console import Display


def reason(error: BaseException, length: int = 160) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines()
    return lines[0][:length] if lines else type(error).__name__


def machine() -> str:
    """This machine in words."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), {memory:.0f} GiB"


def version_of(package: str) -> str:
    """As its metadata tell, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def markdown_table(table: dict[str, Any]) -> str:
    """A table of Results.table as Markdown, under its title."""

    def line(cells: list[str]) -> str:
        return (
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )

    columns = table["columns"]
    return "\n".join(
        [
            f"**{table['title']}**",
            "",
            line(columns),
            "|---" * len(columns) + "|",
            *map(line, table["rows"]),
        ]
    )


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
            Path(path).write_text(
                json.dumps({**figures, "tables": self._tables}, indent=1, ensure_ascii=False),
                encoding="utf-8",
            )
