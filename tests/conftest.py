"""What all tests share: eight CPU devices, compiled programs, a small model, and the machine."""

import os

# Before jax starts its backends: eight devices of the CPU, so that meshes are real.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import contextlib
import dataclasses
import fcntl
import hashlib
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from launches import REPOSITORY, SHARED

from baichuan_jax.config.schema import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from baichuan_jax.sharding import make_mesh
from baichuan_jax.step import Steps, make_steps

# Files whose tests take longest come first: a worker that took one of them last would end alone.
LONGEST = ("test_train.py", "test_step.py", "test_pallas.py", "test_attention.py")
COMPILED_GIB = 2  # of kept programs; then they are all compiled again


def pytest_configure() -> None:
    """Keep what is compiled, for all tests, their processes, and later calls of pytest.

    jax's key of a program holds all that it was compiled from but the CPU's features, so these
    name the folder.
    """
    try:
        described = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        described = []
    features = sorted({line for line in described if line.startswith(("flags", "Features"))})
    name = hashlib.sha256("".join(features).encode()).hexdigest()[:8]
    folder = REPOSITORY / "cache" / "tests" / f"compiled-{name}"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        size = sum(path.stat().st_size for path in folder.glob("*"))
        if size > COMPILED_GIB << 30:
            shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Compile instead of reading what is kept.

    For what is seen only while a program is compiled, and for programs of accelerators, which jax
    cannot read on a machine without one.
    """

    def keep(value: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()  # it looks at the setting once

    keep(False)
    yield
    keep(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, those with tests of real time last; the order in a file stays."""
    timed = {item.path for item in items if item.get_closest_marker("timing")}

    def place(item: pytest.Item) -> int:
        if item.path in timed:
            return len(LONGEST) + 1
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Leave the machine to a test of real time: no other worker runs a test meanwhile."""
    with contextlib.ExitStack() as held:
        if "PYTEST_XDIST_WORKER" in os.environ:
            timed = item.get_closest_marker("timing") is not None
            machine = held.enter_context(open(SHARED / "machine", "w"))
            # Whoever waits for the machine holds the gate, so that who comes later waits behind.
            with open(SHARED / "gate", "w") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(machine, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture
def tiny_config() -> Config:
    """A model of two layers whose sizes eight devices divide; 16 rows of 32 tokens a step."""
    return Config(
        model=ModelConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=176,
            num_layers=2,
            num_heads=4,
            dtype="float32",
            remat="none",
        ),
        train=TrainConfig(num_steps=8, context_length=32, global_batch_size=16, loss_chunk_size=24),
        optimizer=OptimizerConfig(warmup_steps=1, learning_rate=1e-2),
        tokenizer=TokenizerConfig(vocab_size=512),
    )


@pytest.fixture
def tokens() -> np.ndarray:
    """Rows of 33 random tokens for four steps of tiny_config: [4, 16, 33]."""
    return np.random.default_rng(0).integers(0, 512, (4, 16, 33)).astype(np.int32)


def build(config: Config, shape: tuple[int, int, int, int]) -> tuple[Config, Steps]:
    """The steps of a configuration on a mesh (data, fsdp, context, tensor) of the first devices."""
    config = dataclasses.replace(config, mesh=MeshConfig(*shape))
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
    return config, make_steps(config, mesh)


def batch_of(
    config: Config, steps: Steps, rows: np.ndarray, ignored: int = 5
) -> dict[str, jax.Array]:
    """Rows [G, T+1] as a batch in micro-batches; the first labels of the first row are ignored."""
    labels = rows[:, 1:].copy()
    labels[0, :ignored] = -100
    accumulation = config.accumulation_steps(config.mesh)
    batch = {"inputs": rows[:, :-1], "labels": labels}
    split = {
        name: array.reshape(accumulation, -1, array.shape[-1]) for name, array in batch.items()
    }
    return jax.device_put(split, steps.batch_sharding)
