"""Beside the code: workflow, templates, citation, changelog, badges, output that git ignores."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

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
    ".github/dependabot.yml": "dependabot",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/ISSUE_TEMPLATE/bug_report.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/feature_request.yml": "github-issue-forms",
}


def tracked() -> list[str]:
    """The files that git knows."""
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    names = [name for name in done.stdout.split("\0") if name]
    return [name for name in names if (REPOSITORY / name).is_file()]


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
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    assert command == "bash .ci/run"
    options: dict = {}
    for step in job["steps"]:
        options |= step.get("with", {})
    versions = options["python-version"]
    tested = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert sorted(versions.split()) == sorted(tested)
    # A workflow runs what strangers send: it may read, and leaves no token in the checkout.
    assert workflow["permissions"] == {"contents": "read"}
    assert options["persist-credentials"] is False
    assert "pull_request_target" not in workflow[True], "`on`, which YAML reads as a Boolean"
    for step in job["steps"]:
        assert re.fullmatch(
            r"actions/[\w-]+@[0-9a-f]{40}", step.get("uses", "actions/x@" + "0" * 40)
        )


def test_no_secret_is_committed():
    """The check before a commit, over all files."""
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (hook,) = [hook for hook in config["repos"][0]["hooks"] if hook["id"] == "secrets"]
    secret = re.compile(hook["entry"].encode())
    for planted in (
        b"-----BEGIN RSA PRIVATE KEY-----",
        b"key=AKIA" + b"A" * 16,
        b"hf_" + b"a" * 34,
    ):
        assert secret.search(planted)
    for path in tracked():
        if not re.match(hook["exclude"], path):
            assert not secret.search((REPOSITORY / path).read_bytes()), path
    files = [".env", ".env.local", "deploy.pem", "launch/registry.key", ".netrc"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *files],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == files


def test_what_bandit_lets_pass_has_a_rule_and_a_reason():
    """The rule behind `nosec`, the reason in the line above."""
    for path in tracked():
        if path.endswith(".py") and not path.startswith("tests/"):
            lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
            for above, line in pairwise(lines):
                if "# nosec" in line:
                    assert re.search(r"  # nosec B\d{3}$", line), f"{path}: {line}"
                    assert above.strip().startswith("# "), f"{path}: {line}"


def load_audit() -> ModuleType:
    """The module .ci/audit.py."""
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finding(*names: str) -> dict:
    """A package as pip-audit reports it, with a vulnerability of these names."""
    found = {
        "id": names[0],
        "aliases": list(names[1:]),
        "fix_versions": ["2.0"],
        "description": "-",
    }
    return {"name": "thing", "version": "1.0", "vulns": [found]}


SOUND = {"name": "sound", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "gone", "skip_reason": "gone (1.0) is not known"}


@pytest.mark.parametrize(
    ("packages", "good", "said"),
    [
        ([SOUND], True, "audited 1 of 1"),
        ([SOUND, finding("PYSEC-1", "CVE-1")], False, r"thing 1.0: PYSEC-1 = CVE-1, fixed in 2.0"),
        # Allowed by its other name.
        ([SOUND, finding("PYSEC-2", "CVE-2")], True, "allowed: not reachable, 2026-11-28"),
        # A release that PyPI has deleted.
        ([SOUND, UNKNOWN], False, "gone .1.0. is not known"),
        # A mirror without advisories.
        ([UNKNOWN], True, "NOT AUDITED: .*is not known"),
        ([], True, "NOT AUDITED"),
    ],
)
def test_an_audit_fails_on_what_it_finds_and_says_what_it_could_not_ask(
    packages, good, said, monkeypatch
):
    audit = load_audit()
    monkeypatch.setattr(audit, "ALLOWED", {"CVE-2": "not reachable, 2026-11-28"})
    result, lines = audit.judge(json.dumps({"dependencies": packages}), "")
    assert result is good
    assert re.search(said, "\n".join(lines))


def test_an_audit_without_a_network_is_no_clean_one():
    good, lines = load_audit().judge("", "Traceback\nConnectionError: no route to pypi.org\n")
    assert good
    assert lines == ["NOT AUDITED: ConnectionError: no route to pypi.org"]


def test_a_vulnerability_is_allowed_for_a_reason_with_a_date():
    for name, reason in load_audit().ALLOWED.items():
        assert re.search(r"\w+ .*\d{4}-\d\d-\d\d", reason), name


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
