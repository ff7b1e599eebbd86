"""Every test runs on the CPU with eight devices, so that meshes are real. Set before jax starts its backends."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import dataclasses

import jax
import numpy as np
import pytest

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
    """Rows [G, T+1] as a batch in this configuration's micro-batches; the first labels of the first row are ignored."""
    labels = rows[:, 1:].copy()
    labels[0, :ignored] = -100
    accumulation = config.accumulation_steps(config.mesh)
    batch = {"inputs": rows[:, :-1], "labels": labels}
    split = {
        name: array.reshape(accumulation, -1, array.shape[-1]) for name, array in batch.items()
    }
    return jax.device_put(split, steps.batch_sharding)
