"""The flags for a cluster.

The installed jaxlib knows them, model and mesh decide their values, and what is set already wins.
"""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from launches import REPOSITORY, environment, run_module

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import Config, ConfigError, DataConfig
from baichuan_jax.hardware.accelerators import (
    Topology,
    detect_topology,
    hardware_of,
    parse_topology,
)
from baichuan_jax.xla_flags import apply_flags, choose_flags, keep_compiled, message_options

A800 = str(REPOSITORY / "configs" / "baichuan_7b_a800.yaml")


def start_jax(flags: str) -> subprocess.CompletedProcess:
    variables = {**environment(), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_installed_jaxlib_knows_every_flag(tmp_path):
    profile = tmp_path / "plan.pbtxt"
    profile.write_text('costs { name: "dot.1" cost_us: 5.0 }\n')
    config = load_config(A800, ["train.deterministic=true", f"train.schedule_profile={profile}"])
    flags = choose_flags(config, parse_topology("a800:128x8")).xla
    assert len(flags) > 10
    assert f"--xla_gpu_pgle_profile_file_or_directory_path={profile}" in flags
    done = start_jax(" ".join(flags))
    assert done.returncode == 0, done.stderr
    # jax refuses an unknown flag, so that the test above would have failed.
    assert start_jax("--xla_gpu_no_such_flag=true").returncode != 0


@pytest.mark.parametrize(
    ("version", "fused"), [("0.0.41", True), ("0.0.48.1", False), (None, False)]
)
def test_a_tpus_gathers_are_fused_only_where_libtpu_takes_it(monkeypatch, version, fused):
    """Each installed libtpu compiles with its own flags in test_plan.py.

    Where none is installed, the newest is assumed.
    """

    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("baichuan_jax.xla_flags.importlib.metadata.version", installed)
    flags = choose_flags(load_config(A800), parse_topology("v5p:4x4x8")).libtpu
    assert any("fuse_all_gather" in flag for flag in flags) == fused
    assert any("sparse_core" in flag for flag in flags) != fused


def test_a_message_holds_one_layer_of_this_model_on_this_mesh():
    def threshold(kind: str, *overrides: str) -> int:
        flags = choose_flags(load_config(A800, list(overrides)), parse_topology("a800:128x8")).xla
        (flag,) = [flag for flag in flags if f"{kind}_combine_threshold" in flag]
        return int(flag.split("=")[1])

    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert threshold("all_gather") == 2 * layer  # bfloat16, whole
    # The shard of one of 8 devices.
    shard = 2 * layer // 8
    assert threshold("reduce_scatter") == shard
    copies = ("mesh.data=-1", "mesh.state=1")
    assert threshold("reduce_scatter", *copies) == threshold("all_reduce", *copies) == shard
    assert threshold("all_gather", "mesh.tensor=2", "mesh.fsdp=4") == layer
    # Where replicas share copies of the state, what is scattered over them; but with one copy no
    # sum follows, and a message over fsdp need not be as small.
    for data, state, scattered in ((8, 16, 2 * layer // 8 // 16), (1, 128, 2 * layer // 8)):
        sizes = (f"mesh.data={data}", f"mesh.state={state}")
        assert threshold("reduce_scatter", *sizes) == scattered
        assert threshold("all_reduce", *sizes) == 2 * layer // 8 // state


def test_one_process_compiles_for_meshes_with_their_own_message_sizes(monkeypatch):
    """The search's: XLA_FLAGS are those of the command's mesh, then the user's."""
    topology, name = parse_topology("a800:128x8"), "xla_gpu_all_gather_combine_threshold_bytes"
    ours = " ".join(choose_flags(load_config(A800), topology).xla)
    monkeypatch.setenv("XLA_FLAGS", ours)
    config = load_config(A800, ["mesh.data=8", "mesh.state=16"])
    found = message_options(config, topology)
    flags = choose_flags(config, topology).xla
    assert found == dict(flag[2:].split("=") for flag in flags if "_combine_threshold" in flag)
    assert {key for key, value in found.items() if f"--{key}={value}" not in ours.split()} == {
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        "xla_gpu_all_reduce_combine_threshold_bytes",
    }
    monkeypatch.setenv("XLA_FLAGS", f"{ours} --{name}=1")
    assert message_options(config, topology) == {k: v for k, v in found.items() if k != name}
    assert message_options(config, parse_topology("v5p:4x4x8")) == {}


def test_a_profile_that_is_not_there_is_refused():
    config = load_config(A800, ["train.schedule_profile=nowhere.pbtxt"])
    with pytest.raises(ConfigError, match="plan writes it"):
        choose_flags(config, parse_topology("a800:1x8"))


def test_a_cpu_gets_no_flag_that_was_not_asked_for():
    config = load_config(A800)
    assert choose_flags(config, None).reasons == {}
    asked = choose_flags(load_config(A800, ["train.deterministic=true"]), None).reasons
    assert list(asked) == ["--xla_gpu_deterministic_ops=true"]


def test_network_settings_need_a_network():
    one, many = (
        choose_flags(load_config(A800), parse_topology(name)).environment
        for name in ("a800:1x8", "a800:2x8")
    )
    assert not any(name.startswith("NCCL") for name in one)
    assert any(name.startswith("NCCL") for name in many)


def test_what_is_already_set_wins(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in (
        "XLA_CLIENT_MEM_FRACTION",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "NCCL_CROSS_NIC",
        "NCCL_IB_TIMEOUT",
        "NCCL_IB_RETRY_CNT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        "baichuan_jax.xla_flags.detect_topology", lambda: parse_topology("a800:2x8")
    )
    added = apply_flags(load_config(A800))
    assert "NCCL_DEBUG=WARN" not in added
    assert os.environ["NCCL_DEBUG"] == "INFO"
    flags = os.environ["XLA_FLAGS"].split()
    assert flags.count("--xla_gpu_enable_latency_hiding_scheduler=false") == 1
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" not in flags
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.92"


def test_the_command_prints_lines_that_a_shell_takes():
    argv = ["--config", A800, "--topology", "a800:128x8"]
    done = run_module("baichuan_jax.xla_flags", *argv)
    assert done.returncode == 0, done.stderr
    script = f'unset XLA_FLAGS NCCL_DEBUG\n{done.stdout}\necho "$XLA_FLAGS|$NCCL_DEBUG"'
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    flags, debug = shell.stdout.strip().split("|")
    assert flags.split() == list(choose_flags(load_config(A800), parse_topology("a800:128x8")).xla)
    assert debug == "WARN"


def test_devices_are_known_by_what_jax_calls_them():
    names = {
        "NVIDIA A800-SXM4-80GB": "a800",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H200": "h200",
    }
    assert {kind: hardware_of(kind).name for kind in names} == names
    assert hardware_of("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize("name", ["a800", "a800:8", "a900:8x8", "v5p:4", "a800:0x8", "a800:8x8x8"])
def test_a_topology_that_means_nothing_is_refused(name):
    with pytest.raises(ConfigError, match="topology="):
        parse_topology(name)


def test_a_topology_counts_its_devices():
    gpus, tpus = parse_topology("a800:128x8"), parse_topology("v5p:4x4x8")
    assert (gpus.num_devices, gpus.devices_per_node) == (1024, 8)
    assert (tpus.num_devices, tpus.devices_per_node) == (128, 128)


def test_gpus_are_found_without_jax(tmp_path, monkeypatch):
    for number in range(8):
        folder = tmp_path / f"0000:{number:02x}:00.0"
        folder.mkdir()
        (folder / "information").write_text("Model: \t\t NVIDIA A800-SXM4-80GB\nIRQ:   \t\t 1\n")
    paths = sorted(str(path) for path in tmp_path.glob("*/information"))
    monkeypatch.setattr(
        "baichuan_jax.hardware.accelerators.glob.glob",
        lambda pattern: paths if "nvidia" in pattern else [],
    )
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "16")
    assert detect_topology() == Topology(hardware_of("A800"), (16, 8))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert detect_topology() is None


def test_gpus_are_found_where_a_container_hides_proc(tmp_path, monkeypatch):
    """From nvidia-smi; one that fails, or is not there, finds none."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'\necho 'NVIDIA H100 80GB HBM3'\n")
    program.chmod(0o755)
    monkeypatch.setattr("baichuan_jax.hardware.accelerators.glob.glob", lambda pattern: [])
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for name in (
        "JAX_PLATFORMS",
        "CUDA_VISIBLE_DEVICES",
        "JAX_LOCAL_DEVICE_IDS",
        "SLURM_NTASKS",
        "JAX_NUM_PROCESSES",
    ):
        monkeypatch.delenv(name, raising=False)
    assert detect_topology() == parse_topology("h100:1x2")
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert detect_topology() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert detect_topology() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_users_of_one_cache_have_compiled_programs_of_their_own(tmp_path, monkeypatch):
    """Whoever writes compiled programs decides what those who read them run."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    used = []
    monkeypatch.setattr("jax.config.update", lambda name, value: used.append(value))
    config = Config(data=DataConfig(cache_dir=str(tmp_path)))
    assert keep_compiled(config, "cpu") is None
    assert not used
    for _ in range(2):
        assert keep_compiled(config, "gpu") is None
    assert (tmp_path / "compiled").stat().st_mode & 0o777 == 0o700
    os.chown(tmp_path / "compiled", 65534, 65534)
    assert keep_compiled(config, "gpu") is None
    own = tmp_path / f"compiled-{os.geteuid()}"
    assert used == [str(tmp_path / "compiled")] * 2 + [str(own)]
    own.chmod(0o777)
    assert keep_compiled(config, "gpu") == (
        f"programs are compiled anew at every start: {tmp_path}/compiled belongs to 'nobody' and "
        f"every user may write {own}; set JAX_COMPILATION_CACHE_DIR to a folder of your own"
    )
    assert len(used) == 3
