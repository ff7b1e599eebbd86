"""Which of CUDA's compilers are found, of CUDA 12 or 13, and which assembler is taken."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
from launches import REPOSITORY, environment

from baichuan_jax.hardware.accelerators import parse_topology
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.plan import ahead_of_time as plan


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has asked for nothing yet, on a machine without toolkits."""
    for function in (bridge.obstacle, bridge.ptxas, bridge.ptxas_version):
        function.cache_clear()
    for name in ("CUDA_ROOT", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "")
    yield
    for function in (bridge.obstacle, bridge.ptxas, bridge.ptxas_version):
        function.cache_clear()


def program(folder):
    """A ptxas that says its version."""
    folder.mkdir(parents=True)
    (folder / "ptxas").write_text(
        "#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n"
    )
    (folder / "ptxas").chmod(0o755)
    return folder / "ptxas"


def packages(monkeypatch, found):
    """Only these packages are installed, of those that bridge asks for: name -> folder."""

    def find_spec(name):
        if name not in found:
            return None
        spec = ModuleSpec(name, None, origin=str(found[name] / "__init__.py"), is_package=True)
        spec.submodule_search_locations = [str(found[name])]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize("plugin", ["jax_cuda12_plugin", "jax_cuda13_plugin"])
def test_either_plugin_serves(monkeypatch, tmp_path, fresh, plugin):
    monkeypatch.setattr(bridge, "_jax_triton", lambda: (None, "0.4.1"))
    packages(monkeypatch, dict.fromkeys(("triton", "jax_triton"), tmp_path))
    assert (
        "jax_cuda12_plugin or jax_cuda13_plugin not installed (requirements-cuda12.txt or"
        in bridge.obstacle()
    )
    bridge.obstacle.cache_clear()
    packages(monkeypatch, dict.fromkeys(("triton", "jax_triton", plugin), tmp_path))
    assert bridge.obstacle() is None


def test_the_assembler_is_the_one_that_xla_takes(monkeypatch, tmp_path, fresh):
    """CUDA_ROOT, NVIDIA's wheels, PATH, toolkits, and triton's own where there is none of these."""
    installed = {"triton": tmp_path / "triton"}
    packages(monkeypatch, installed)
    monkeypatch.setattr(bridge, "TOOLKITS", (tmp_path / "local", tmp_path / "opt"))
    wanted = [program(tmp_path / "triton" / "backends" / "nvidia" / "bin")]
    assert bridge.xla_ptxas() is None
    assert bridge.ptxas() == wanted[0]
    for folder in (tmp_path / "opt", tmp_path / "local"):
        assert program(folder / "bin") == bridge.xla_ptxas()
    on_path = program(tmp_path / "path")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert bridge.xla_ptxas() == on_path
    installed["nvidia"] = tmp_path / "nvidia"
    for name in ("cuda_nvcc", "cu13"):
        assert program(tmp_path / "nvidia" / name / "bin") == bridge.xla_ptxas()
    root = program(tmp_path / "root" / "bin")
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path / "root"))
    bridge.ptxas.cache_clear()
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name)
    assert bridge.ptxas() == root
    assert os.environ["TRITON_PTXAS_PATH"] == str(root)
    assert bridge.ptxas_version() == "13.1.80"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (make plan-deps)"
)
def test_the_version_of_the_installed_assembler():
    assert re.fullmatch(r"\d+\.\d+\.\d+", bridge.ptxas_version())


@pytest.mark.parametrize(
    ("installed", "toolkit", "wanted"),
    [
        ({"jax-cuda13-plugin", "jax-cuda13-pjrt", "triton", "jax-triton"}, True, []),
        ({"jax-cuda12-plugin", "jax-cuda12-pjrt", "triton", "jax-triton"}, True, []),
        (
            {"jax-cuda13-plugin", "triton"},
            False,
            ["jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm", "jax-triton"],
        ),
        (
            {"triton", "jax-triton"},
            False,
            ["jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"],
        ),
    ],
)
def test_a_plan_asks_for_what_xla_needs(monkeypatch, tmp_path, fresh, installed, toolkit, wanted):
    packages(monkeypatch, {})
    monkeypatch.setattr(bridge, "TOOLKITS", (tmp_path / "local", tmp_path / "opt"))
    if toolkit:
        program(tmp_path / "opt" / "bin")
        (tmp_path / "opt" / "nvvm" / "libdevice").mkdir(parents=True)
        (tmp_path / "opt" / "nvvm" / "libdevice" / "libdevice.10.bc").touch()
    monkeypatch.setattr(plan, "_installed", installed.__contains__)
    assert plan.missing(parse_topology("h100:1x8")) == wanted


@pytest.mark.parametrize("cuda", ["cuda12", "cuda13"])
def test_a_compiler_without_a_gpu_is_hidden_from_jax(tmp_path, cuda):
    (tmp_path / f"jax_{cuda}_plugin").mkdir()
    (tmp_path / f"jax_{cuda}_plugin" / "__init__.py").touch()
    variables = environment() | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    for name in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        variables.pop(name, None)
    code = f"""
import glob, os, sys
glob.glob = lambda path: []  # no device, whatever this machine has
import baichuan_jax
assert os.environ["JAX_PLATFORMS"] == "cpu"
assert sys.modules["jax_{cuda}_plugin"] is None
sys.modules["jax_plugins.xla_{cuda}"].initialize()
"""
    subprocess.run([sys.executable, "-c", code], env=variables, check=True)
