"""Writes docs/configuration.md from the dataclasses that hold the settings.

`python docs/write_configuration.py`, after a change of a setting or of its text. It reads the
source, so it needs no package. tests/test_docs.py compares the page with what this would write.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
HEAD = """# Configuration

`python docs/write_configuration.py` makes this page from the dataclasses that hold the settings. A
YAML file holds the settings that differ from the defaults, below the names of their sections; the
command line overrides it with dotted names:

```
python -m baichuan_jax.train --config configs/tiny.yaml --optimizer.learning_rate 1e-3 \\
    --data.train '{"text/*.jsonl": 1.0}'
python -m baichuan_jax.train --config configs/tiny.yaml --print_config
```

`--config` takes a file, or the name alone (`tiny`) of one of `configs/`, which an installed package
brings along. Options on the command line win wherever `--config` stands; of several files a later
one wins. A misspelt setting is refused with the nearest right name; settings that contradict each
other are refused with both values. In a notebook `load_config("configs/tiny.yaml",
["train.num_steps=60"])` gives the same object.
"""
PARTS = (
    (
        "A run",
        "`python -m baichuan_jax.train`, `.launch`, `.plan`",
        "baichuan_jax/config/schema.py",
        "Config",
    ),
    (
        "The data pipeline",
        "`python -m baichuan_jax.data.pipeline`",
        "baichuan_jax/data/corpus/config.py",
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
    """(name, type, default, text) of every field, from the source; a section has no text."""
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and item.value is not None
        ):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            yield item.target.id, ast.unparse(item.annotation), ast.unparse(item.value), text


def plain(kind: str, default: str) -> tuple[str, str]:
    """A type and a default as YAML has them."""
    if kind.startswith("Literal["):
        choices = kind.removeprefix("Literal[").removesuffix("]").split(",")
        kind = " or ".join(choice.strip().strip("'") for choice in choices)
    yaml = {
        "field(default_factory=dict)": "{}",
        "field(default_factory=list)": "[]",
        "None": "null",
        "True": "true",
        "False": "false",
    }
    return kind.replace(" | None", " or null"), yaml.get(default, default.strip("'") or '""')


def table(node: ast.ClassDef, prefix: str) -> list[str]:
    """A section's settings as Markdown."""
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for name, kind, default, text in settings(node):
        if text:
            kind, default = plain(kind, default)
            rows.append(f"| `{prefix}{name}` | {kind} | `{default}` | {text.replace('|', '/')} |")
    return [*rows, ""] if len(rows) > 2 else []


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, used_by, file, top in PARTS:
        found = classes(REPOSITORY / file)
        lines += [f"## {title}", "", f"{used_by}: `{file}`", "", *table(found[top], "")]
        for name, kind, _, text in settings(found[top]):
            if not text:
                about = " ".join((ast.get_docstring(found[kind]) or "").split())
                lines += [f"### {name}", "", about, "", *table(found[kind], f"{name}.")]
    return "\n".join(lines)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("configuration.md")
    target.write_text(page(), encoding="utf-8")
