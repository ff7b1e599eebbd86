"""Beside the code: workflow, templates, citation, changelog, badges, output that git ignores."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from launches import REPOSITORY

import baichuan_jax
from baichuan_jax.config.schema import Config, DataConfig

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GITHUB = REPOSITORY / ".github"
CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    ".github/workflows/ci.yml": "github-workflows",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/ISSUE_TEMPLATE/bug_report.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/feature_request.yml": "github-issue-forms",
}


def program(name: str) -> Path:
    """A program of this environment; skips the test where it is not installed."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed (make dev)")
    return path


def test_files_for_github_match_their_schemas():
    there = {str(path.relative_to(REPOSITORY)) for path in GITHUB.rglob("*.yml")}
    assert there | {"CITATION.cff"} == set(SCHEMAS)
    check = program("check-jsonschema")
    for file, schema in SCHEMAS.items():
        done = subprocess.run(
            [check, "--builtin-schema", f"vendor.{schema}", REPOSITORY / file],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_is_clean_and_runs_what_a_developer_runs():
    file = GITHUB / "workflows" / "ci.yml"
    done = subprocess.run([program("actionlint"), file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    assert command == "bash .ci/run"
    (versions,) = [step["with"]["python-version"] for step in job["steps"] if "with" in step]
    tested = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert sorted(versions.split()) == sorted(tested)


def test_the_citation_names_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == baichuan_jax.__version__
    assert citation["license"] == PROJECT["license"]


def test_the_changelog_has_the_usual_form():
    """Keep a Changelog: newest version first, and below each one the kinds of change."""
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", name) for name in versions[1:])
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert kinds
    assert set(kinds) <= CHANGES


def test_badges_are_true():
    """The same badges in both READMEs: the license, and the versions of Python that are tested."""
    tested = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    wanted = [f"license-{PROJECT['license'].replace('-', '--')}", f"python-{'_|_'.join(tested)}"]
    for name in ("README.md", "README.zh.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        badges = re.findall(r"img\.shields\.io/badge/(\S+)-blue\)", text)
        assert badges == wanted, name


def test_git_ignores_what_commands_write():
    """The defaults of commands, and what the examples in the documentation name."""
    written = {"plans", "report.html", "gpu-results", "site", "dist", "build"}
    written |= {DataConfig().cache_dir, Config().run_dir or "runs/tiny"}
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    for page in pages:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            written |= set(re.findall(r"(?:--output|--json|--folder|-o) ([\w./-]+)", block))
            written |= set(re.findall(r"baichuan_jax\.hf \w+ \S+ ([\w./-]+)", block))
    # A name without a suffix is a folder, whose files have to be ignored.
    files = {name if Path(name).suffix else f"{name}/file" for name in written}
    inside = sorted(name for name in files if not name.startswith("/"))
    command = ["git", "check-ignore", "--no-index", *inside]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert set(inside) - set(done.stdout.split()) == set()
