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


@pytest.mark.slow
def test_a_wheel_trains_from_another_folder(tmp_path):
    source, away = tmp_path / "source", tmp_path / "away"
    away.mkdir()
    caches = shutil.ignore_patterns("__pycache__")
    for name in ("baichuan_jax", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=caches)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    left_out = ("PYTHONPATH", "XLA_FLAGS")
    variables = {name: value for name, value in os.environ.items() if name not in left_out}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=away, env=variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("baichuan_jax-*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    run(*pip, "install", "--no-deps", "--target", packages, wheel)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home = run(python, "-c", "import baichuan_jax; print(baichuan_jax.__file__)")
    assert home.startswith(str(packages))
    console = packages / "bin" / "baichuan-jax"
    assert "baichuan-jax COMMAND" in run(python, console)
    shipped_model = "from baichuan_jax.data.quality import MODEL\n"
    run(python, "-c", shipped_model + "assert (MODEL / 'zh.ftz').stat().st_size > 1e5")
    settings = {
        "train.num_steps": "2",
        "optimizer.warmup_steps": "1",
        "train.global_batch_size": "2",
        "sample.prompts": "[]",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    output = run(python, console, "train", "--config", "tiny", *options)
    assert "validation loss" in output
    run(python, "-m", "baichuan_jax.report", "runs/tiny")
    assert (away / "report.html").stat().st_size > 1e6
