"""Weights alone: found in a run's folder or a checkpoint, read onto any mesh, written as a folder.

`init_from`, generate, evaluate and export read them here. A folder of weights is a checkpoint
without optimizer state: `params` and a `run` item with the model's settings and the digests.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from baichuan_jax.checkpoint.orbax import (
    CorruptCheckpoint,
    read_run,
    restore_items,
    save_arguments,
)
from baichuan_jax.checkpoint.orbax_workarounds import quiet_saves
from baichuan_jax.checkpoint.state import named_digest
from baichuan_jax.config.parsing import require_plain, whole_number
from baichuan_jax.config.schema import ConfigError, ModelConfig
from baichuan_jax.model import Params, abstract_model
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.digests import digest
from baichuan_jax.runs.files import naming
from baichuan_jax.sharding import Layout


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest of a run's folder.

    Raises ConfigError where there is none, and where weights lie beside a run's checkpoints.
    """
    checkpoints = path / "checkpoints"
    newest = max(_steps(checkpoints), default=None)
    own = weights_in(checkpoints) if newest is None else checkpoints / str(newest)
    given = weights_in(path)
    if own is not None and given is not None:
        raise ConfigError(
            f"{path} holds weights ({given.relative_to(path) / 'params'}) and a run's checkpoints; "
            f"name {checkpoints} for the run's newest, or move the weights to a folder of their own"
        )
    found = own or given
    if found is None:
        raise ConfigError(
            f"{path} is neither a run's folder with checkpoints nor a checkpoint (a folder with "
            "params/)"
        )
    return found


def weights_in(folder: Path) -> Path | None:
    """Weights in the folder itself: it, where it is a checkpoint, or the newest checkpoint in it.

    None where there are none: a folder with a number for a name is not yet a checkpoint.
    """
    if (folder / "params").is_dir():
        return folder
    steps = _steps(folder)
    if any((folder / str(step) / "params").is_dir() for step in steps):
        return folder / str(max(steps))
    return None


def has_checkpoint(run_path: Path) -> bool:
    """Whether a run has saved a checkpoint, damaged or not.

    Only in checkpoints/: what else lies in the folder says nothing about the run.
    """
    return bool(_steps(run_path / "checkpoints"))


def _steps(folder: Path) -> list[int]:
    # Only numbers: a damaged checkpoint is STEP.corrupt, an unfinished one has Orbax's suffix.
    entries = folder.iterdir() if folder.is_dir() else []
    found = (whole_number(entry.name) for entry in entries if entry.is_dir())
    return [step for step in found if step is not None]


def choose_checkpoint(path: Path) -> Path:
    """What find_checkpoint finds on process 0, on all processes.

    The run may still train: what is described, hashed and read has to be this one, whatever it
    saves meanwhile. Every process must call this with the same path, once.
    """
    require_plain(path.absolute(), "the checkpoint")
    return path / agree(
        f"checkpoint of {path}", lambda: str(find_checkpoint(path).relative_to(path))
    )


def describe(folder: Path) -> dict[str, Any]:
    """A checkpoint's `run` item: `config`, `digest`, `tokenizer`; a run's also has `step`.

    Raises ConfigError where the checkpoint is gone or damaged.
    """
    try:
        return read_run(folder)
    except CorruptCheckpoint as error:
        raise _unreadable(folder, error) from None


def load_params(folder: Path, layout: Layout | None = None) -> tuple[ModelConfig, Params]:
    """The weights, float32, of one checkpoint.

    They lie as `layout` says; without one on the first device. Raises ConfigError, also where a
    weight is not finite.
    """
    # Orbax takes no other.
    folder = folder.absolute()
    try:
        run = read_run(folder)
        config = ModelConfig(**run["config"]["model"])
        # Shapes and axes come from the model's settings, not from the files: what does not fit is
        # refused with both shapes before anything is read.
        _, shapes, axes = abstract_model(config)
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def place(shape: Any, names: tuple[str, ...]) -> jax.ShapeDtypeStruct:
            sharding = one if layout is None else layout.stored(*names)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        target = {"params": jax.tree.map(place, shapes, axes)}
        digest_of = lambda items: named_digest(jax.jit(digest), items)
        params = restore_items(folder, target, run["digest"], digest_of)["params"]
    except CorruptCheckpoint as error:
        raise _unreadable(folder, error) from None
    require_finite(folder, params)
    return config, params


def require_finite(path: Path | str, params: Params) -> None:
    """Raise ConfigError where a weight is NaN or infinite: all that is computed would be NaN."""
    all_finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree))
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(all_finite(params)))
    wrong = [jax.tree_util.keystr(key, simple=True, separator="/") for key, ok in found if not ok]
    if wrong:
        raise ConfigError(
            f"the weights of {path} are not finite ({', '.join(wrong[:4])}: {len(wrong)} of "
            f"{len(found)} arrays have NaN or infinite numbers); choose other weights"
        )


def save_params(
    path: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer_hash: str | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write weights as a checkpoint folder that `init_from` and load_params read.

    `facts`: what a Hugging Face folder said of them that a ModelConfig has no place for.
    """
    items = {"params": params}
    run = {
        "config": {"model": dataclasses.asdict(config)},
        "tokenizer": tokenizer_hash,
        "facts": facts or {},
        "digest": named_digest(jax.jit(digest), items),
    }
    # No CheckpointManager: weights alone are one checkpoint, without steps.
    with (
        quiet_saves(),
        naming(Path(path)),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(Path(path).absolute(), args=save_arguments(items, run))


def _unreadable(folder: Path, error: CorruptCheckpoint) -> ConfigError:
    if not (folder / "params").is_dir():
        return ConfigError(
            f"{folder} was deleted meanwhile: its run still trains and keeps few checkpoints "
            "(checkpoint.keep_last); start again, or give a copy of a checkpoint"
        )
    return ConfigError(f"{folder} is damaged: {error}; choose another checkpoint of the run")
