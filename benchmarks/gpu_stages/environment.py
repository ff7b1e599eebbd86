"""The machine: driver, device, clocks, memory and versions, and the kernels that `auto` chooses.

As `nvidia-smi` and jax report them. A clock below its maximum while products run (the last rows)
lowers every speed of the other stages by the same share.
"""

import platform
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from results import machine, reason, version_of
from stage import REPOSITORY, Stage

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import detect_topology, hardware_of
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.kernels.attention.api import choose_attention
from baichuan_jax.kernels.rms_norm.api import choose_rms_norm

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton"),
    *("flax", "optax", "orbax-checkpoint", "grain", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("nvidia-cublas", "torch", "tokamax", "numpy"),
)
QUERY = (
    *("name", "driver_version", "memory.total", "memory.used"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw", "temperature.gpu"),
    *("pcie.link.gen.current", "ecc.mode.current", "mig.mode.current"),
)
# Assemblers that are known to miscompile Triton's code for sm_90a.
BAD_PTXAS = ("12.8.93", "13.0.88")


def run(stage: Stage) -> None:
    """Fill the tables, first those that need no working device. Nothing here can be wrong."""
    _versions(stage)
    driver = shutil.which("nvidia-smi") is not None
    if driver:
        quiet = _query()
        stage.record(nvidia_smi=quiet)
        stage.table("nvidia-smi", ["", "quiet"], [[name, quiet[name]] for name in QUERY])
    else:
        stage.leave_out("driver, clocks, NVLink", "nvidia-smi is not installed")
    _device(stage)
    _choices(stage, jax.devices()[0])
    _flags(stage)
    if driver:
        busy = _query_under_load(512 if stage.sizes.small else 8192)
        stage.record(nvidia_smi_under_load=busy)
        rows = [[name, quiet[name], busy[name]] for name in QUERY]
        stage.table("nvidia-smi", ["", "quiet", "while products run"], rows)
        _links(stage)


def _device(stage: Stage) -> None:
    device = jax.devices()[0]
    stage.record(device=device.device_kind, platform=device.platform, devices=jax.device_count())
    stage.headline(f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}")
    memory = device.memory_stats() or {}
    ptxas = bridge.ptxas_version() if bridge.obstacle() is None else None
    stage.record(ptxas=ptxas)
    limit = memory.get("bytes_limit")
    rows = [
        ["device", device.device_kind],
        ["devices", str(jax.device_count())],
        ["host", machine()],
        ["Python", platform.python_version()],
        ["memory that jax may use", f"{limit / 2**30:.1f} GiB" if limit else "unknown"],
        ["compute capability", str(getattr(device, "compute_capability", "-"))],
        ["row of accelerators.py", getattr(hardware_of(device.device_kind), "name", "none")],
        ["topology as train sees it", str(detect_topology() or "none")],
        ["ptxas", f"{ptxas} ({bridge.ptxas()})" if ptxas else f"no Triton: {bridge.obstacle()}"],
    ]
    stage.table("Device", ["", ""], rows)
    if ptxas in BAD_PTXAS:
        stage.say(
            f"ptxas {ptxas} is known to miscompile Triton's code for sm_90a: a result that is "
            "wrong on sm_90 alone may be the assembler's."
        )


def _links(stage: Stage) -> None:
    for argv in (["topo", "-m"], ["nvlink", "--status"]):
        done = subprocess.run(["nvidia-smi", *argv], capture_output=True, text=True, timeout=20)
        # Whole, in log.txt.
        print(done.stdout, done.stderr)
    links = sum("GB/s" in line for line in done.stdout.splitlines())
    stage.record(nvlinks=links)
    none = f"none is seen ({done.stdout.strip()[:100] or 'no answer'})"
    stage.say(f"NVLink: {f'{links} active links' if links else none}.")


def _versions(stage: Stage) -> None:
    """Installed versions beside those that requirements.txt asks for.

    An older package may work, but was not tested.
    """
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and line[0] != "#"]
    asked = {requirement.name: requirement.specifier for requirement in found}
    rows = []
    stage.record(versions={name: version_of(name) for name in PACKAGES})
    for name in dict.fromkeys((*PACKAGES, *asked)):
        version, wanted = version_of(name), asked.get(name, SpecifierSet())
        fits = version == "not installed" or wanted.contains(version, prereleases=True)
        rows.append([name, version, str(wanted) or "-"])
        if not fits:
            stage.say(
                f"{name} {version} is not what requirements.txt asks for ({wanted}): it was not "
                "tested."
            )
    stage.table("Versions", ["package", "installed", "asked for"], rows)


def _flags(stage: Stage) -> None:
    try:
        # It needs jsonargparse; the other tables do not.
        from baichuan_jax.xla_flags import choose_flags
    except ImportError as error:
        stage.leave_out("settings for XLA", reason(error), needed=True)
        return
    reasons = choose_flags(Config(), detect_topology()).reasons
    stage.record(flags=list(reasons))
    rows = [[flag, why] for flag, why in reasons.items()]
    stage.table("Settings that training gives to XLA here", ["setting", "why"], rows)


def _choices(stage: Stage, device: object) -> None:
    rows = []
    for dtype in ("bfloat16", "float32"):
        for masked in (False, True):
            sizes = {"head_dim": 128, "masked": masked, "length": 4096, "context": 1}
            name, why = choose_attention("auto", device=device, dtype=dtype, **sizes)
            rows.append([f"attention {dtype}{', document masks' if masked else ''}", name, why])
        name, why = choose_rms_norm("auto", device=device, dtype=dtype, width=4096)
        rows.append([f"RMSNorm {dtype}", name, why])
    stage.table("What `auto` chooses", ["operator", "implementation", "why"], rows)


def _query() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    # A field that this driver does not know fails the whole query.
    if len(cells) != len(QUERY):
        return dict.fromkeys(QUERY, f"unknown: {(done.stdout + done.stderr).strip()[:60]}")
    return dict(zip(QUERY, cells, strict=True))


def _query_under_load(size: int, seconds: float = 2.0) -> dict[str, str]:
    """nvidia-smi's values while large products run."""
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(jnp.bfloat16)
    product = jax.jit(lambda x: jnp.matmul(x, x) / size)
    jax.block_until_ready(product(x))
    found: list[dict[str, str]] = []
    timer = threading.Timer(seconds / 2, lambda: found.append(_query()))
    timer.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end or timer.is_alive():
        jax.block_until_ready([product(x) for _ in range(20)])
    return found[0] if found else dict.fromkeys(QUERY, "unknown")
