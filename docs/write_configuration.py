"""Writes docs/configuration.md from the dataclasses that are the settings: python docs/write_configuration.py"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
HEAD = """# Configuration

Made by `python docs/write_configuration.py` from the dataclasses themselves. A YAML file holds the settings that differ from the
defaults, below the names of their sections; the command line overrides it with dotted names:

```
python -m baichuan_jax.train --config configs/tiny.yaml --optimizer.learning_rate 1e-3 --data.train '{"text/*.jsonl": 1.0}'
python -m baichuan_jax.train --config configs/tiny.yaml --print_config
```

`--config` takes a file, or the name alone (`tiny`) of one of `configs/`, which an installed package brings along. A misspelt setting
is refused with the nearest right name; settings that contradict each other are refused with both values. In a notebook
`load_config("configs/tiny.yaml", ["train.num_steps=60"])` gives the same object.
"""
PARTS = (
    (
        "A run",
        "`python -m baichuan_jax.train`, `.launch`, `.plan`",
        "baichuan_jax/config.py",
        "Config",
    ),
    (
        "The data pipeline",
        "`python -m baichuan_jax.data.pipeline`",
        "baichuan_jax/data/corpus_config.py",
        "CorpusConfig",
    ),
)


def classes(file: Path) -> dict[str, ast.ClassDef]:
    """The dataclasses of a module."""
    return {
        node.name: node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def settings(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, explanation) of every field, from the source; the explanation is empty for a section."""
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and item.value is not None
        ):
            words = (
                after.value.value
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                else ""
            )
            yield (
                item.target.id,
                ast.unparse(item.annotation),
                ast.unparse(item.value),
                " ".join(str(words).split()),
            )


def plain(kind: str, default: str) -> tuple[str, str]:
    """A type and a default as YAML has them."""
    if kind.startswith("Literal["):
        kind = " or ".join(
            part.strip().strip("'")
            for part in kind.removeprefix("Literal[").removesuffix("]").split(",")
        )
    default = default.replace("field(default_factory=dict)", "{}").replace(
        "field(default_factory=list)", "[]"
    )
    words = {"None": "null", "True": "true", "False": "false"}
    return kind.replace(" | None", " or null"), words.get(default, default.strip("'") or '""')


def table(node: ast.ClassDef, prefix: str) -> list[str]:
    """A section's settings as Markdown."""
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for name, kind, default, words in settings(node):
        if words:
            kind, default = plain(kind, default)
            rows.append(f"| `{prefix}{name}` | {kind} | `{default}` | {words.replace('|', '/')} |")
    return [*rows, ""] if len(rows) > 2 else []


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, used_by, file, top in PARTS:
        found = classes(REPOSITORY / file)
        lines += [f"## {title}", "", f"{used_by}: `{file}`", "", *table(found[top], "")]
        for name, kind, _, words in settings(found[top]):
            if not words:
                lines += [
                    f"### {name}",
                    "",
                    f"{ast.get_docstring(found[kind])}",
                    "",
                    *table(found[kind], f"{name}."),
                ]
    return "\n".join(lines)


if __name__ == "__main__":
    (
        Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("configuration.md")
    ).write_text(page(), encoding="utf-8")
