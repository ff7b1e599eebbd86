"""What a benchmark measured: tables for a person, and JSON with all numbers for a program.

benchmarks/all.py puts the tables of all benchmarks on one page.
"""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from baichuan_jax.runs.console import Display


def reason(error: BaseException, length: int = 160) -> str:
    """The first line of an exception's message; its type where it has no message."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines()
    return lines[0][:length] if lines else type(error).__name__


def machine() -> str:
    """Cores, processor and memory of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), {memory:.0f} GiB"


def version_of(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def markdown_table(table: dict[str, Any]) -> str:
    """A table of Results.table as Markdown, under its title."""

    def line(cells: list[str]) -> str:
        escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        return f"| {' | '.join(escaped)} |"

    columns = table["columns"]
    head = [f"**{table['title']}**", "", line(columns), "|---" * len(columns) + "|"]
    return "\n".join([*head, *map(line, table["rows"])])


class Results:
    """Tables that are shown as they come, and saved with the numbers behind them."""

    def __init__(self) -> None:
        self.display = Display()
        self._tables: list[dict[str, Any]] = []

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.display.table(title, columns, rows)
        self._tables.append({"title": title, "columns": columns, "rows": rows})

    def say(self, text: str) -> None:
        self.display.say(text)

    def save(self, path: Path | str | None, **numbers: Any) -> None:
        """Write tables and numbers as JSON, where a file is named."""
        if path is not None:
            content = {**numbers, "tables": self._tables}
            text = json.dumps(content, indent=1, ensure_ascii=False)
            Path(path).write_text(text, encoding="utf-8")
