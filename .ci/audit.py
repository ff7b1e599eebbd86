"""Known vulnerabilities of locked packages, by pip-audit (PyPI's advisories).

    python .ci/audit.py launch/*.lock

Exit code 1 where one is found that ALLOWED does not name, or where PyPI knows only some of the
packages: it deletes releases that turn out to be malicious. Exit code 0 where the service cannot
be asked: the output says NOT AUDITED, since such a result is no clean one.
"""

import importlib.util
import json
import subprocess
import sys

# Identifier (or an alias) -> why it does not concern us, and the date of that judgement.
ALLOWED: dict[str, str] = {}
SECONDS = 50


def audit(locks: list[str]) -> tuple[bool, list[str]]:
    """Whether what lock files name may be used, and lines that say why."""
    if importlib.util.find_spec("pip_audit") is None:
        return False, ["pip-audit is not installed (make dev)"]
    argv = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    # Without pip: what is locked is what is asked for, and nothing is downloaded.
    argv += ["--disable-pip", "--require-hashes", "--timeout", "10"]
    argv += [f"--requirement={lock}" for lock in locks]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return judge("", f"no answer within {SECONDS} s")
    return judge(done.stdout, done.stderr)


def judge(report: str, errors: str) -> tuple[bool, list[str]]:
    """The same from pip-audit's report (JSON, empty where it failed) and its messages."""
    try:
        packages = json.loads(report)["dependencies"]
    except ValueError:
        reason = (errors.strip().splitlines() or ["pip-audit gave no reason"])[-1]
        return True, [f"NOT AUDITED: {reason}"]
    lines = [package["skip_reason"] for package in packages if "skip_reason" in package]
    audited = len(packages) - len(lines)
    if not audited:
        # An index that has files only, such as a mirror, answers "not found" to every question.
        return True, [f"NOT AUDITED: none of {len(packages)} packages: {lines[:1]}"]
    good = not lines
    for package in packages:
        for found in package.get("vulns", []):
            names = [found["id"], *found["aliases"]]
            reason = next((ALLOWED[name] for name in names if name in ALLOWED), None)
            good = good and reason is not None
            fixed = ", ".join(found["fix_versions"]) or "no version"
            lines.append(
                f"{package['name']} {package['version']}: {' = '.join(names)}, fixed in {fixed}: "
                + (f"allowed: {reason}" if reason else found["description"][:200])
            )
    return good, [*lines, f"audited {audited} of {len(packages)} packages"]


if __name__ == "__main__":
    good, lines = audit(sys.argv[1:])
    print("\n".join(lines))
    sys.exit(not good)
