"""The extras are the requirements files, and a wheel holds all that a run needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from launches import REPOSITORY

from baichuan_jax.config.files import load_config, shipped
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.files import find_files

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirements(name: str) -> list[str]:
    lines = (REPOSITORY / f"requirements-{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line.replace('"', "'") for line in lines if line and not line.startswith(("#", "-r"))]


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_is_its_requirements_file(extra):
    assert EXTRAS[extra] == requirements(extra)


def test_what_users_install_is_an_extra():
    """The files that are none serve benchmarks only."""
    files = {
        path.stem.removeprefix("requirements-") for path in REPOSITORY.glob("requirements-*.txt")
    }
    assert {name for name in files if not name.endswith("bench")} == set(EXTRAS)


def test_every_package_is_installed():
    found = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for path in (REPOSITORY / "baichuan_jax").rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"baichuan_jax.configs"}


def test_what_is_shipped_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny", ["train.num_steps=60"])
    assert config.run_dir == "runs/tiny"
    assert len(find_files(list(config.data.train))) == 2
    for name in ("tinny", "tinny.yaml"):
        with pytest.raises(ConfigError, match=r"there is no configuration .*small.*tiny"):
            load_config(name)
    assert {"tiny", "small", "baichuan_7b_a800", "baichuan_7b_v5p", "corpus"} == set(shipped())


LEFT_OUT = ("PYTHONPATH", "XLA_FLAGS")
VARIABLES = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
SHORT = {
    "train.num_steps": "2",
    "optimizer.warmup_steps": "1",
    "train.global_batch_size": "2",
    "sample.prompts": "[]",
}
TRAIN = ["train", "--config", "tiny", *(f"--{name}={value}" for name, value in SHORT.items())]


def run(folder: Path, *command: str | Path, variables: dict[str, str] = VARIABLES) -> str:
    """The output of a command in a folder."""
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, Path]:
    """A Python with the package as a wheel, and the folder of its packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    caches = shutil.ignore_patterns("__pycache__")
    for name in ("baichuan_jax", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=caches)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = (sys.executable, "-m", "pip")
    run(folder, *pip, "wheel", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("baichuan_jax-*.whl")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    run(folder, *pip, "install", "--no-deps", "--target", packages, wheel)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "python", packages


@pytest.mark.slow
def test_a_wheel_trains_from_another_folder(installed, tmp_path):
    python, packages = installed
    home = run(tmp_path, python, "-c", "import baichuan_jax; print(baichuan_jax.__file__)")
    assert home.startswith(str(packages))
    console = packages / "bin" / "baichuan-jax"
    assert "baichuan-jax COMMAND" in run(tmp_path, python, console)
    shipped_model = "from baichuan_jax.data.quality import MODEL\n"
    run(tmp_path, python, "-c", shipped_model + "assert (MODEL / 'zh.ftz').stat().st_size > 1e5")
    assert "validation loss" in run(tmp_path, python, console, *TRAIN)
    run(tmp_path, python, "-m", "baichuan_jax.report", "runs/tiny")
    assert (tmp_path / "report.html").stat().st_size > 1e6


@pytest.mark.slow
def test_a_run_needs_no_root_no_name_no_home_and_one_folder_to_write(installed, tmp_path):
    """As in a pod: a uid without an entry in passwd, and a root file system that is read-only."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can become another user and mount")
    os.chown(tmp_path, 10001, 10001)
    # pytest's folders are root's alone, so both get a place that others can reach. The other user
    # keeps the right to read what is root's alone, such as root's Python, and no other.
    only = "-all,+dac_read_search"
    become = [f"--{kind}={only}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    become += ["--reuid=10001", "--regid=10001", "--clear-groups", "--no-new-privs"]
    begin = (
        "mount -t tmpfs -o mode=755 none /mnt && mkdir /mnt/venv /mnt/work"
        ' && mount --bind "$1" /mnt/venv && mount --bind . /mnt/work && shift'
        ' && mount -o remount,ro,bind / && cd /mnt/work && umask 077 && exec "$@"'
    )
    home = installed[0].parents[1]
    argv = ["unshare", "--mount", "sh", "-c", begin, "sh", home, "setpriv", *become]
    python = "/mnt/venv/bin/python"
    probe = subprocess.run([*argv, "true"], cwd=tmp_path, capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"this machine does not let root mount: {probe.stderr}")
    # What `python -m` would import from the working folder, if it looked there.
    (tmp_path / "numpy.py").write_text("raise SystemExit('planted')")
    variables = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONSAFEPATH": "1"}
    writes = "try:\n    open('/written', 'w')\nexcept OSError as error:\n    print(error)"
    assert "Read-only" in run(tmp_path, *argv, python, "-c", writes, variables=variables)
    module, *options = TRAIN
    train = [*argv, python, "-m", f"baichuan_jax.{module}", *options]
    assert "validation loss" in run(tmp_path, *train, variables=variables)
    report = [*argv, python, "-m", "baichuan_jax.report", "runs/tiny"]
    run(tmp_path, *report, variables=variables)
    status = (tmp_path / "report.html").stat()
    assert status.st_uid == 10001
    assert status.st_mode & 0o077 == 0
