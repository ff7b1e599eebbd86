"""Write docs/configuration.md from the dataclasses of the settings.

    python docs/write_configuration.py [FILE]

Reads the source, not the classes: a field's explanation is the string below it, which Python drops.
A test compares the page with the result.
"""

import ast
import re
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
other are refused with both values. A file has at most 1 MiB and no aliases (`*name`) of YAML: the
value itself stands wherever it is meant. Addresses in object storage have no credentials in them,
since records of runs keep settings: storage finds them in the environment (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`), in `~/.aws`, or in the host's role. In a notebook
`load_config("configs/tiny.yaml", ["train.num_steps=60"])` gives the same object.
"""
# (heading, commands that use it, file, class)
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
YAML = {"None": "null", "True": "true", "False": "false"}


def classes(file: Path) -> dict[str, ast.ClassDef]:
    """The classes of a module, by name."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def settings(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, explanation) of every field; a section has no explanation."""
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        if item.value is None:
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        yield item.target.id, ast.unparse(item.annotation), ast.unparse(item.value), text


def as_yaml(kind: str, default: str) -> tuple[str, str]:
    """A type and a default as YAML has them."""
    if found := re.fullmatch(r"Literal\[(.*)\]( \| None)?", kind):
        values = found[1].split(",")
        kind = " or ".join(value.strip().strip("'") for value in values) + (found[2] or "")
    default = re.sub(r"^field\(default_factory=(?:lambda: )?(.+)\)$", r"\1", default)
    default = {"dict": "{}", "list": "[]"}.get(default, default)
    return kind.replace(" | None", " or null"), YAML.get(default, default.strip("'") or '""')


def table(node: ast.ClassDef, prefix: str) -> list[str]:
    """The settings of a section as a Markdown table."""
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for name, kind, default, text in settings(node):
        if text:
            kind, default = as_yaml(kind, default)
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
                section = found[kind]
                lines += [f"### {name}", "", f"{ast.get_docstring(section)}", ""]
                lines += table(section, f"{name}.")
    return "\n".join(lines)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("configuration.md")
    target.write_text(page(), encoding="utf-8")
