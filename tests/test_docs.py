"""The documentation names what exists: settings, modules, commands, files and pages."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launches import REPOSITORY

DOCS, PACKAGE = REPOSITORY / "docs", REPOSITORY / "baichuan_jax"
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *DOCS.glob("*.md"), *(REPOSITORY / "baichuan_jax").rglob("*.md")]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def names(pages):
    return [str(page.relative_to(REPOSITORY)) for page in pages]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_settings_is_what_the_dataclasses_say():
    spec = importlib.util.spec_from_file_location(
        "write_configuration", DOCS / "write_configuration.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == module.page(), (
        "run python docs/write_configuration.py"
    )


def test_every_setting_is_on_its_page():
    from baichuan_jax.config.files import KEYS

    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    missing = [key for key in KEYS if f"| `{key}` |" not in text and key not in sections]
    assert not missing


def test_the_map_has_every_module_and_no_other():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("## The order of imports")[0]
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", tree))
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    modules = {name for name in modules if not name.endswith(("__init__.py", "__main__.py"))}
    assert (modules - named, named - modules) == (set(), set())


def test_the_map_has_the_order_of_imports():
    from test_structure import ORDER

    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert " → ".join(f"`{name}`" for name in ORDER) in text


def test_the_walks_name_functions_that_exist():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    walks = text.split("## Four walks")[1].split("\n## ")[0]
    assert walks.count("\n### ") == 4
    steps = re.findall(r"`((?:\w+/)*\w+\.py)` `([\w.]+)`", walks)
    assert len(steps) >= 40
    for file, name in steps:
        assert name in defined(PACKAGE / file), f"{file} defines no {name}"


def test_every_threat_names_the_tests_that_show_the_answer():
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    tables = text.split("## Threats")[1].split("\n## ")[0]
    rows = [line for line in tables.splitlines() if re.match(r"\| (?!threat )", line)]
    assert len(rows) >= 20
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row.split("|")[-2])
        assert tests, row
        for file, name in tests:
            path = REPOSITORY / file
            # A kind of hostile files has no functions of tests: test_hostile.py tries its list.
            wanted = name or "(HOSTILE|test_)"
            assert re.search(rf"^(def )?{wanted}", path.read_text(encoding="utf-8"), re.M), row


def defined(file: Path) -> set[str]:
    """Functions and classes of a module, methods as Class.method."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_files_and_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), (
                f"{page.name} links to {target}"
            )
    for path in re.findall(
        r"`((?:baichuan_jax|configs|docs|launch|notebooks|tests|benchmarks)/[\w./-]+\.\w+)`", text
    ):
        assert (REPOSITORY / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"python -m baichuan_jax((?:\.\w+)*)", text):
        path = REPOSITORY.joinpath("baichuan_jax", *module.split(".")[1:])
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
            f"{page.name}: python -m baichuan_jax{module}"
        )


def test_every_page_is_in_the_sites_contents():
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [item if isinstance(item, str) else next(iter(item.values())) for item in site["nav"]]
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed (make docs)")
    options = ["build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    command = [sys.executable, "-m", "mkdocs", *options]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # mkdocs-material imports jieba where it is installed (make bench), which says so.
    jieba = re.compile(r"Building prefix dict|Loading model|Prefix dict|Dumping model")
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if not jieba.match(line)] == []
    pages = [path.parent.name for path in (tmp_path / "site").glob("*/index.html")]
    assert {"architecture", "configuration", "operations"} <= set(pages)
    text = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    # The site needs no other server.
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?https?:""", text)
