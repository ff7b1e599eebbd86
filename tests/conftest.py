"""What all tests share: eight CPU devices, compiled programs, and a small model."""

import os

# Before jax starts its backends: eight devices of the CPU, so that meshes are real.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # as in launches.cpu_devices
)

import dataclasses
import gc
import io
from collections.abc import Iterator

import compile_cache
import jax
import launches  # noqa: F401 (makes the folder that the workers of pytest-xdist share)
import numpy as np
import pytest
import sentencepiece
from jax.experimental.compilation_cache import compilation_cache

from baichuan_jax.checkpoint.progress import Piece, Progress
from baichuan_jax.checkpoint.state import RunState
from baichuan_jax.config.schema import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from baichuan_jax.sharding import make_mesh
from baichuan_jax.step import Steps, TrainState, make_steps

# Files whose tests take longest come first: a worker that took one of them last would end alone.
# The two that start groups of processes, the first and the fifth, do not meet on two workers.
LONGEST = (
    "test_train.py",
    "test_triton.py",
    "test_notebooks.py",
    "test_step.py",
    "test_faults.py",
    "test_plan.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep what this process compiles."""
    if not hasattr(config, "workerinput"):  # not in each worker of pytest-xdist
        compile_cache.limit()
    compile_cache.install()
    # The long run of every case has the machine code that a user has.
    compile_cache.optimise_all = config.getoption("markexpr") == "slow"


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
    """The longest files first; the order in a file stays."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Leave what is there until the end, modules and tests, out of garbage collections."""
    gc.collect()
    gc.freeze()


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


def run_state(
    state: TrainState, step: int, position: int, batch_size: int = 1, seed: int = 42
) -> RunState:
    """A state as a run has it: before the batch at `position`."""
    pieces = (Piece(0, 0, batch_size),)
    return RunState(state, step, Progress(seed, position * batch_size, pieces=pieces))


def sentencepiece_defaults(text: str) -> bytes:
    """A model of a text as SentencePiece's own trainer makes it: white space squeezed, no bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([text] * 9),
        model_writer=model,
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()
